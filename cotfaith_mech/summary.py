"""What a finished run, or the plan of one, says on one screen."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from .progress import in_words

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from .plan import Plan
    from .records import RunDirectory
    from .stats import Estimate

HEADLINES = ("accuracy", "early_termination/aoc", "filler/aoc", "paraphrase/change", "mistake_all/change", "dependence")
"""Estimates of a run with one reader that stand in its summary, beside the primary outcomes."""


def print_summary(console: Console, run: RunDirectory) -> None:
    """The primary outcomes, what they say, failed checks, counts, and where the report is."""
    manifest = run.read_manifest()
    if (table := _primary_table(run, manifest)) is not None:
        console.print(table)
    for sentence in manifest.get("conclusion", []):
        console.print(sentence, markup=False)
    for row in manifest.get("verdicts", []):
        found = {at: row[at].replace("_", " ") for at in ("0.5", "0.25", "0.75")}
        console.print(f"Chain of {row['arm']}: {found['0.5']} (at .25: {found['0.25']}; at .75: {found['0.75']})")
    for check in manifest["checks"]:
        if not check["passed"]:
            told = f"CHECK FAILED {check['check']}: {check['value']} > {check['threshold']}"
            console.print(told, style="bold red", markup=False)
    if (made := manifest.get("paraphrases")) and made["wanted"]:
        rejected = sum(made["rejected"].values())
        console.print(
            f"Paraphrases by {made['paraphraser']}: {made['valid']} of {made['wanted']} valid, {rejected} rejected",
            markup=False,
        )
    counts = manifest["counts"]
    console.print(f"{counts['records']} records, {counts['exclusions']} exclusions, {len(manifest['checks'])} checks")
    console.print(f"Report: {run.path / 'report.html'}", soft_wrap=True, markup=False)


def _primary_table(run: RunDirectory, manifest: dict[str, Any]) -> Table | None:
    """Accuracy on all problems and the primary outcomes; for one reader its headline numbers instead. None where there
    is no such estimate. Intervals stand beside differences, or beside the means of a single arm."""
    from rich import box
    from rich.table import Table

    from .compare import BOTH_CORRECT, primary_name

    compared = len(manifest["config"]["readers"]) > 1
    primary = [primary_name(name) for name in manifest["config"]["primary"]]
    named = ["accuracy", *primary] if compared else [*HEADLINES, *(n.removesuffix(BOTH_CORRECT) for n in primary)]
    found = {(e.name, e.arm): e for e in run.read_estimates() if e.name in named and math.isfinite(e.value)}
    arms = list(dict.fromkeys(arm for _, arm in found))
    differences = {arm for (_, arm), estimate in found.items() if math.isfinite(estimate.p)}
    n_problems = max((estimate.n_problems for (name, _), estimate in found.items() if name in named[1:]), default=0)
    of = f"the problems every reader gets right ({n_problems})" if compared else f"problems ({n_problems})"
    what = "Mean, difference [95% interval]" if differences else "Mean [95% interval]"
    table = Table("", title=f"{what} over {of}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for arm in arms:
        table.add_column(arm, no_wrap=True)
    for name in named:
        cells = [_cell(found.get((name, arm)), arm in differences or len(arms) == 1) for arm in arms]
        if any(cells):
            label = name.split(" | ")[0].replace("/", " / ").replace("_", " ")
            table.add_row("accuracy (all problems)" if name == "accuracy" else label, *cells)
    return table if found else None


def _cell(estimate: Estimate | None, with_interval: bool) -> str:
    """Empty where there is no estimate."""
    if estimate is None:
        return ""
    value, low, high = (f"{x:.2f}".replace("0.", ".") for x in (estimate.value, estimate.ci_low, estimate.ci_high))
    if not with_interval:
        return value
    return f"{value} \\[{low}, {high}]" if math.isfinite(estimate.ci_low) else f"{value}, no interval"


def print_plan(console: Console, plan: Plan) -> None:
    """What each reader would do, how long and with how much memory, and what these figures rest on."""
    from rich import box
    from rich.table import Table

    console.print(
        f"{plan.problems} problems, {plan.chains} chains ({plan.to_write} to be written), {plan.exclusions} exclusions",
    )
    for reason, n in plan.reasons.items():
        console.print(f"- left out, {n} x: {reason}", style="dim", highlight=False, markup=False)
    table = Table("", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("units", "finished", "forwards", "records", "TFLOP", "time", "GB"):
        table.add_column(name, justify="right", no_wrap=True)
    for part in plan.parts:
        n_forwards, n_records = sum(part.forwards.values()), sum(part.records.values())
        counts = [f"{n:,}" for n in (part.units, part.finished, n_forwards, n_records)]
        table.add_row(part.name, *counts, f"{part.flops / 1e12:.3g}", in_words(part.seconds), f"{part.memory_gb:.1f}")
    console.print(table)
    for name in ("forwards", "records"):
        total: Counter[str] = Counter()
        for part in plan.parts:
            total.update(getattr(part, name))
        if total:
            told = ", ".join(f"{kind} {n:,}" for kind, n in total.items())
            console.print(f"{name.capitalize()}: {told}", highlight=False)
    console.print(f"About {in_words(plan.seconds)} in all, with up to {plan.memory_gb:.1f} GB, into {plan.run}")
    for sentence in plan.rests_on:
        console.print(f"- {sentence}", style="dim", highlight=False)
