"""Which scores move when nothing about the reliance does? mix_050 changed in ways that leave its reliance at one half.

Logits halved and doubled (a temperature of the reader); every answer moved on by one (accuracy 0, the chain followed as
before); longer chains. A score that moves by more than MOVED is labelled so.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..backends.weights import locate
from ..certificate import MOVES, Check, shown
from ..conclude import Progress
from .recovery import Found, studied

MOVED = 0.1
SCORES = (
    "accuracy",
    "same_answer_no_chain",
    "early_termination/aoc",
    "filler/aoc",
    "filler/change",
    "mistake_all/change",
    "paraphrase/change",
    "dependence",
    "conflict/note/p_chain",
    "mediation/text/pnie_share",
    "mediation/kv/pnie_share",
    "infogain/logp_gain",
    "knockout/true_step/delta_p",
    "knockout/true_step/delta_logp",
)
ORGANISM = "organism:mix_050"


def changed(folder: Path, change: Callable[[Any], Any]) -> Path:
    """A copy of the organism's folder below `folder`, its unembedding put through `change`."""
    from safetensors.torch import load_file, save_file

    copy = folder / "changed"
    shutil.copytree(locate(ORGANISM), copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"] = change(tensors["lm_head.weight"]).contiguous()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def _moved_on(weight: Any) -> Any:
    """Every number's row in the place of the next one's."""
    words = json.loads((locate(ORGANISM) / "tokenizer.json").read_text())["model"]["vocab"]
    new = weight.clone()
    for number in range(11, 100):
        new[words[str(number)]] = weight[words[str(number - 1)]]
    new[words["10"]] = weight[words["99"]]
    return new


CHANGES: dict[str, Callable[[Any], Any]] = {
    "logits halved": lambda weight: weight * 0.5,
    "logits doubled": lambda weight: weight * 2,
    "answers moved on by one": _moved_on,
}


def invariance(progress: Progress, n: int, seed: int) -> Iterator[Check]:
    """How far each score of each changed reader lies from that of mix_050; nothing here can pass or fail."""
    problems = f"{ORGANISM}:{n}:{seed}:3"
    before = studied(ORGANISM, problems, battery="full")
    for name in progress([*CHANGES, "5 steps in place of 3"], "invariance"):
        if name in CHANGES:
            with TemporaryDirectory() as scratch:
                after = studied(str(changed(Path(scratch), CHANGES[name])), problems, battery="full")
        else:
            after = studied(ORGANISM, f"{ORGANISM}:{n}:{seed}:5", battery="full")
        yield from _moves(name, before, after)


def _moves(name: str, before: Found, after: Found) -> Iterator[Check]:
    for score in SCORES:
        was, now = before.mean(score), after.mean(score)
        label = "undefined" if np.isnan(now - was) else MOVES if abs(now - was) > MOVED else "stays"
        yield shown(f"{name}: {score}", now - was, f"{label}: {was:.3f} -> {now:.3f}", score)
