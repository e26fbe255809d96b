"""`cotfaith bench`: the engine against its peers on the same work, in one process, and the file of what it measured.

Sets of patches and knockouts: bench_patching.py. behaviour_battery: every text of the full behavioural battery on one
chain, against plain batched forward passes; the peer is timed on a random sample of the texts, in interleaved rounds,
and the ratio is of medians of seconds a text.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .arithmetic import word_problems
from .bench_cells import CELL_SETS
from .bench_patching import Rounds, every_length
from .errors import CotfaithError
from .model import Model
from .paraphrasers import by_rules
from .reading import Answered, Trunk
from .sampling import supplied_chain
from .variants import BehaviourPlan, Editing, edited_chains

BENCHES = (*CELL_SETS, "behaviour_battery")
_SAME = ("name", "tokens", "peer", "device", "dtype")


def measure(
    progress: Rounds,
    model: Model,
    names: Sequence[str],
    lengths: Sequence[int],
    *,
    rounds: int,
    sample: int,
    most_flops: float,
) -> Iterator[list[dict[str, Any]]]:
    """Rows of each benchmark in `names` (all where it is empty), as soon as they are measured."""
    if unknown := set(names) - set(BENCHES):
        raise CotfaithError(f"{', '.join(sorted(unknown))} is no benchmark; use one of {', '.join(BENCHES)}.")
    names = names or BENCHES
    sets = [name for name in names if name in CELL_SETS]
    if sets:
        yield from every_length(progress, model, sets, lengths, rounds=rounds, sample=sample, most_flops=most_flops)
    if "behaviour_battery" in names:
        yield behaviour_battery(progress, model, rounds=rounds, sample=sample)


def keep_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Put `rows` into the JSON file at `path`, in place of older ones of the same work, peer and device."""
    kept = json.loads(path.read_text()) if path.exists() else {"rows": []}
    new = {tuple(row[key] for key in _SAME) for row in rows}
    old = [row for row in kept["rows"] if tuple(row[key] for key in _SAME) not in new]
    path.write_text(json.dumps({**kept, "rows": [*old, *rows]}, indent=1) + "\n")


def behaviour_battery(
    progress: Rounds, model: Model, *, n_steps: int = 10, rounds: int = 3, sample: int = 64
) -> list[dict[str, Any]]:
    """One row: the full battery of one chain, its answers scored against a* and the twin's answer.

    `max_abs_diff` is of log-probabilities (nats), `answers_differ` counts texts after which another answer is said.
    """
    from .backends.peers import PlainBatches

    problem = word_problems(1, seed=7, n_ops=(n_steps, n_steps))[0]
    trunk = Trunk.of(model, supplied_chain(model, problem), problem.kind)
    plan = BehaviourPlan(battery="full")
    answers = [trunk.chain.answer, f" {problem.twin_answer}"]
    paraphrases = by_rules(trunk.chain.steps, plan.draws, 0)
    editing = Editing(trunk.chain, problem, plan, paraphrases, (), model.count, 0, [])
    asked = [(chain, answers) for chain in dict.fromkeys(v.chain for v in edited_chains(editing))]
    chosen = np.random.default_rng(0).choice(len(asked), min(sample, len(asked)), replace=False).tolist()
    few = [asked[i] for i in chosen]
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    found: dict[str, list[Answered]] = {}
    for _ in progress(range(rounds), "behaviour_battery"):
        for name, run, texts in (("ours", model.cached_run, asked), ("peer", partial(PlainBatches, model), few)):
            started = time.perf_counter()
            found[name] = replace(trunk, run=run(trunk.run.tokens)).read(texts)
            times[name].append(time.perf_counter() - started)
    both = [(found["ours"][i], theirs) for i, theirs in zip(chosen, found["peer"], strict=True)]
    pairs = [pair for ours, theirs in both for pair in zip(ours.readings, theirs.readings, strict=True)]
    ours_s = statistics.median(times["ours"])
    peer_s = statistics.median(times["peer"]) * len(asked) / len(few)
    return [
        {
            "name": "behaviour_battery",
            "tokens": len(trunk.run.tokens),
            "steps": n_steps,
            "cells": len(asked) * len(answers),
            "ours_s": ours_s,
            "peer": f"huggingface, {PlainBatches.size} texts a batch",
            "peer_s": peer_s,
            "peer_cells_timed": len(few) * len(answers),
            "rounds": rounds,
            "ratio": peer_s / ours_s,
            "max_abs_diff": max(abs(o.logp - t.logp) for o, t in pairs),
            "answers_differ": sum(ours.said != theirs.said for ours, theirs in both),
            "device": model.info.device,
            "dtype": model.info.dtype,
        }
    ]
