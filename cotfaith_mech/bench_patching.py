"""The engine against TransformerLens, nnsight and plain hooks on one set of cells (bench_cells.py), in one process.

1. Each round times the engine, then each peer on a few random ones of the cells that the engine timed: interleaved,
   because a machine's speed drifts. Source activations are read beforehand, outside the timing.
2. Where all cells would cost the engine more than `most_flops`, it is timed on a sample of them. Its seconds for all
   cells are those of the sample in proportion to the corners' FLOPs; a peer's, in proportion to the number of cells,
   since it runs the whole chain for each.
3. Ratios are of medians over the rounds.
4. `bound_s` is the FLOPs of all corners at the rate of `nn.functional.linear` measured in the same rounds (512 tokens
   through one projection of the MLP), `bound_share` the share of it that the engine reaches.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .bench_cells import CELL_SETS, BenchChain, Cell, CellSet, corner_flops, sample_of_groups, source_sites
from .model import CachedRun, Model, PlainRun, Reduce

Rounds = Callable[[Sequence[int], str], Iterable[int]]
"""Gives the rounds on, one at a time, and shows how far it is under a label."""
Peer = Callable[[Sequence[Cell]], Tensor]
RATE_TOKENS = 512


@dataclass(frozen=True)
class Work:
    """Cells of one set on one chain: which of them the engine is timed on, and which of those the peers (indices)."""

    of: CellSet
    chain: BenchChain
    flops: list[int]
    timed: list[int]
    few: list[int]
    source: Mapping[Any, Tensor]

    def cells(self, which: Sequence[int]) -> list[Cell]:
        return [self.of.cells[i] for i in which]


def work_of(model: Model, name: str, chain: BenchChain, sample: int, most_flops: float) -> Work:
    """The cells of set `name`; `sample` of those the engine is timed on are drawn for the peers."""
    source = model.cached_run(chain.twin).read(source_sites(model, name))
    cells = CELL_SETS[name](model, chain, source)
    flops = corner_flops(model, len(chain.tokens), cells.cells)
    timed = sample_of_groups(cells.groups, flops, most_flops)
    few = np.random.default_rng(1).choice(len(timed), min(sample, len(timed)), replace=False)
    return Work(cells, chain, flops, timed, [timed[i] for i in sorted(few.tolist())], source)


def patching(
    progress: Rounds,
    model: Model,
    backends: Mapping[str, Model],
    name: str,
    chain: BenchChain,
    *,
    rounds: int = 3,
    sample: int = 60,
    most_flops: float = 1e13,
) -> list[dict[str, Any]]:
    """One row a peer: plain hooks, and those of `backends` (by name); times in seconds for all cells of the set."""
    work = work_of(model, name, chain, sample, most_flops)
    run = model.cached_run(chain.tokens)
    reduce = top_two_difference(run)
    peers = peers_of(model, backends, work, reduce)
    times: dict[str, list[float]] = {"ours": [], "rate": [], **{peer: [] for peer in peers}}
    results: dict[str, Tensor] = {}
    for _ in progress(range(rounds), f"{name} {len(chain.tokens)}"):
        results["ours"] = timed(
            times["ours"], lambda: run.edited(work.cells(work.timed), n_logits=1, reduce=reduce)
        ).flatten()
        for peer, patch in peers.items():
            results[peer] = timed(times[peer], lambda patch=patch: patch(work.cells(work.few))).flatten()
            times["rate"].append(matmul_rate(model))
    return [_row(model, work, peer, times, results, rounds) for peer in peers]


def _row(
    model: Model,
    work: Work,
    peer: str,
    times: Mapping[str, list[float]],
    results: Mapping[str, Tensor],
    rounds: int,
) -> dict[str, Any]:
    n_cells, flops = len(work.flops), sum(work.flops)
    rate = statistics.median(times["rate"])
    ours_s = statistics.median(times["ours"]) * flops / sum(work.flops[i] for i in work.timed)
    peer_s = statistics.median(times[peer]) * n_cells / len(work.few)
    same = results["ours"][[work.timed.index(i) for i in work.few]]
    return {
        "name": work.of.name,
        "tokens": len(work.chain.tokens),
        "steps": len(work.chain.steps),
        "cells": n_cells,
        "ours_s": ours_s,
        "ours_cell_s": ours_s / n_cells,
        "ours_cells_timed": len(work.timed),
        "peer": peer,
        "peer_s": peer_s,
        "peer_cell_s": peer_s / n_cells,
        "peer_cells_timed": len(work.few),
        "rounds": rounds,
        "ratio": peer_s / ours_s,
        "max_abs_diff": float((results[peer].float().cpu() - same).abs().max()),
        "flops": flops,
        "matmul_flops_per_s": rate,
        "bound_s": flops / rate,
        "bound_share": flops / rate / ours_s,
        "bound_ratio": peer_s * rate / flops,
        "device": model.info.device,
        "dtype": model.info.dtype,
        "load_average": os.getloadavg()[0],
        "ours_times_s": times["ours"],
        "peer_times_s": times[peer],
    }


def top_two_difference(run: CachedRun) -> Reduce:
    """Logit difference of the base run's two most likely tokens, at the last position."""
    a, b = run.logits(1)[-1].topk(2).indices.tolist()

    def reduce(logits: Float[Tensor, "cell read vocab"]) -> Float[Tensor, "cell 1"]:
        return (logits[:, -1, a].float() - logits[:, -1, b].float())[:, None]

    return reduce


def peers_of(model: Model, backends: Mapping[str, Model], work: Work, reduce: Reduce) -> dict[str, Peer]:
    """What patches cells, by the name of the library it is written with."""
    from .backends.peers import nnsight_patch, transformer_lens_patch

    base, twin = (torch.tensor([ids], device=model.info.device) for ids in (work.chain.tokens, work.chain.twin))
    plain = PlainRun(model, work.chain.tokens)
    peers: dict[str, Peer] = {}
    if "transformer_lens" in backends:
        peers["transformer_lens"] = transformer_lens_patch(backends["transformer_lens"], base, twin, reduce)
    if "nnsight" in backends:
        peers["nnsight"] = nnsight_patch(backends["nnsight"], base, reduce)
    return {**peers, "plain_hooks": lambda cells: plain.edited(cells, n_logits=1, reduce=reduce)}


def timed(times: list[float], run: Callable[[], Tensor]) -> Tensor:
    """What `run` gives; its seconds, a GPU's work included, are appended to `times`."""
    synchronise()
    started = time.perf_counter()
    result = run()
    synchronise()
    times.append(time.perf_counter() - started)
    return result


def synchronise() -> None:
    """Wait for the GPU, where one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def matmul_rate(model: Model) -> float:
    """FLOPs a second of `nn.functional.linear`, 512 tokens through a projection of the MLP; median over .5 s."""
    weight: Any = model.weights.model.get_decoder().layers[0].mlp.up_proj.weight
    x = torch.randn(RATE_TOKENS, weight.shape[1], device=weight.device, dtype=weight.dtype)
    times: list[float] = []
    while sum(times) < 0.5:
        timed(times, lambda: torch.nn.functional.linear(x, weight))
    return 2 * RATE_TOKENS * weight.numel() / statistics.median(times)


def every_length(
    progress: Rounds, model: Model, names: Sequence[str], lengths: Sequence[int], *, sample: int, **options: Any
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each set and chain length; the longer the chain the fewer cells for the peers, down to 8."""
    from .bench_cells import worked_chain
    from .model import same_weights

    backends = {name: same_weights(model, name) for name in ("transformer_lens", "nnsight")}
    for name in names:
        for n_tokens in lengths:
            few = max(min(8, sample), sample * 75 // max(75, n_tokens))
            yield patching(progress, model, backends, name, worked_chain(model, n_tokens), sample=few, **options)
