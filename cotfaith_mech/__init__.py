"""Does a model's answer come from the reasoning it wrote, through which path, and did fine-tuning cut that path?

The public names load on first use, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attribution import measure_attribution
    from .behaviour import measure_behaviour
    from .chains import Chain
    from .config import StudyConfig, load_config
    from .datasets_io import read_problems
    from .errors import CotfaithError
    from .knockout import KnockoutPlan, measure_knockout
    from .model import load
    from .patching import PatchPlan, measure_patching
    from .problems import Problem
    from .reading import Trunk
    from .records import Record, RunDirectory
    from .sites import ActivationEdit, Site
    from .study import run_study
    from .variants import BehaviourPlan

_HOMES = {
    "ActivationEdit": "sites",
    "BehaviourPlan": "variants",
    "Chain": "chains",
    "CotfaithError": "errors",
    "KnockoutPlan": "knockout",
    "PatchPlan": "patching",
    "Problem": "problems",
    "Record": "records",
    "RunDirectory": "records",
    "Site": "sites",
    "StudyConfig": "config",
    "Trunk": "reading",
    "load": "model",
    "load_config": "config",
    "measure_attribution": "attribution",
    "measure_behaviour": "behaviour",
    "measure_knockout": "knockout",
    "measure_patching": "patching",
    "read_problems": "datasets_io",
    "run_study": "study",
}

__all__ = [
    "ActivationEdit",
    "BehaviourPlan",
    "Chain",
    "CotfaithError",
    "KnockoutPlan",
    "PatchPlan",
    "Problem",
    "Record",
    "RunDirectory",
    "Site",
    "StudyConfig",
    "Trunk",
    "load",
    "load_config",
    "measure_attribution",
    "measure_behaviour",
    "measure_knockout",
    "measure_patching",
    "read_problems",
    "run_study",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
