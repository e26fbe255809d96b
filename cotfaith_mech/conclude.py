"""From the records of a run to its estimates, figures and report: what a laptop without a model can do again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .bridge import bridge
from .compare import conclusions, estimates_of, verdicts
from .config import keys_of, parse_config
from .errors import CotfaithError
from .figures import draw_figures
from .paraphrasers import Paraphrases, tally
from .records import RunDirectory
from .report import build_report
from .stats import Estimate

ALL = "(all)"
"""In place of a problem's id in an exclusion that holds for all of them."""

Progress = Callable[[Sequence[Any], str], Iterable[Any]]
"""Gives the items on, one at a time, and shows how far it is under a label."""


def silent(items: Sequence[Any], label: str) -> Iterable[Any]:
    return items


def conclude(run: RunDirectory, progress: Progress = silent) -> Path:
    """Estimates, figures and report of a run directory from its records; needs no model. Gives the report's path.

    Of a run kept without some of its records (RunDirectory.compacted) the estimates stand as they are."""
    stages: tuple[Callable[[RunDirectory], Any], ...] = (estimate, draw_figures, build_report)
    if run.read_manifest().get("records_left_out"):
        stages = stages[1:]
    *_, path = (stage(run) for stage in progress(stages, "estimates, figures, report"))
    return path


def estimate(run: RunDirectory) -> None:
    """Estimates and bridge from the records, with the checks, counts and conclusions they give to the manifest."""
    manifest = run.read_manifest()
    config = parse_config(manifest["config"], keys_of(f"The study in {run.path / 'manifest.json'}"))
    records, chains = run.read_records(), run.read_chains()
    if records.empty:
        raise CotfaithError(f"{run.path} holds no records: {why_empty(run)}.")
    names = [reader.name for reader in config.readers]
    rng = np.random.default_rng(config.seed)
    several = bool(config.authors) or len(set(records["author"])) > 1
    estimates = estimates_of(records, chains, names, config.primary, rng, config.authors)
    bridges, disagreements = _bridges(records, chains, names, several, config.seed + 1)
    run.write_estimates([*estimates, *bridges])
    checks = [check for check in manifest.get("checks", []) if not check["check"].startswith("records/")]
    made = [Paraphrases.from_json(row["paraphrases"]) for row in chains if row.get("paraphrases")]
    run.update_manifest(
        {
            "checks": checks + _record_checks(records, config.dtype),
            "counts": {
                "problems": int(records.problem_id.nunique()),
                "units": len(run.read_unit_meta()),
                "records": len(records),
                "exclusions": len(run.read_exclusions()),
            },
            "paraphrases": tally(made) if made else None,
            "disagreements": disagreements.to_dict("records"),
            "conclusion": conclusions(estimates, names),
            "verdicts": verdicts(estimates, names),
        }
    )


def _bridges(records: Any, chains: Any, names: Sequence[str], several: bool, seed: int) -> tuple[list[Estimate], Any]:
    """The bridge of each author's chains by itself."""
    estimates, disagreements = [], []
    for author, own in records.groupby("author"):
        found, apart = bridge(own, chains, names, np.random.default_rng(seed))
        estimates += [replace(e, arm=f"{e.arm}/{author}") if several else e for e in found]
        disagreements.append(apart)
    return estimates, pd.concat(disagreements, ignore_index=True)


_STAGES = ("few_shot", "read", "paraphrase", "edit", "chain", "measure")
"""Of exclusions, by how well their reasons tell why nothing was measured at all: the last best."""


def why_empty(run: RunDirectory) -> str:
    """The most frequent reason of the stage that decided it, or the command that would fill the run."""
    rows = [row for row in run.read_exclusions() if row["problem_id"] != ALL]
    if not rows:
        return "give its chains.jsonl to `cotfaith test -p`, or run the study again"
    found = Counter((row["stage"], row["reason"]) for row in rows)
    stage, reason = max(found, key=lambda one: (one[0] in _STAGES and _STAGES.index(one[0]), found[one]))
    n = found[stage, reason]
    return reason.rstrip(".") + (f" ({n} of {len(rows)} exclusions)" if len(rows) > 1 else "")


COMPLETENESS = {"float32": 1e-2, "bfloat16": 0.5, "float16": 0.1}
"""Largest error of the sums of direct contributions that passes, in logits; .06 was measured in bfloat16."""


def _record_checks(records: Any, dtype: str) -> list[dict[str, Any]]:
    checks = []
    sums = "direct contributions sum to the logit difference"
    for measure, variant, metric, name, threshold in (
        ("control", "self_patch", "max_abs_diff", "self_patch", 0.0),
        ("attribution", "direct", "completeness_error", sums, COMPLETENESS[dtype]),
    ):
        of_measure = records[(records.measure == measure) & (records.variant == variant)]
        values = of_measure[of_measure.metric == metric].value
        if len(values):
            worst = float(values.max(skipna=False))
            row = {"check": f"records/{name}", "value": worst, "threshold": threshold, "passed": worst <= threshold}
            checks.append({**row, "detail": f"largest of {len(values)}"})
    return checks
