"""OUT/report.html of several runs merged: primary outcomes, every training seed, all estimates, what was not run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from ..certificate import in_words, shipped
from ..compare import UNDECIDED, conclusions, holm_p, moved
from ..figure_style import STYLE, save_figure
from ..merge import ENOUGH_SEEDS, Merged, endpoint, group_of, labels_of, merged
from ..merged_figures import DIFFERENCE, LEVEL, seeds_figure
from ..privacy import from_home
from ..records import RunDirectory
from .build import as_base64, by_outcome, environment, heights, p_value, shell, signed, write_page
from .chain_view import block
from .charts import seeds_chart


def build_merged(runs: Sequence[RunDirectory], not_run: Sequence[Path], out: Path) -> Path:
    """Merge `runs`, list `not_run`, and write OUT/report.html and OUT/forest.png and .pdf; the page's path.

    Primary endpoints are those of the first run's config. Raises CotfaithError where the runs cannot be merged.
    """
    paired = [run for run in runs if len(run.read_manifest()["config"]["readers"]) > 1]
    run = (paired or runs)[0]
    primary_names = run.read_manifest()["config"].get("primary") or []
    authors = sorted({row["author"] for one in runs for row in one.read_chains()})
    there = {(e.name, e.arm) for one in runs for e in one.read_estimates()}
    asked = [f"{name}@{end}" for name in primary_names for end in ("", *(f"/{author}" for author in authors))]
    wanted = [text for text in asked if endpoint(run, text) in there]
    rows = merged(runs, wanted)
    order = {endpoint(run, text): place for place, text in enumerate(wanted)}
    chosen = [row for row in rows if (row.estimate.name, row.estimate.arm) in order]
    primary = sorted(chosen, key=lambda row: order[row.estimate.name, row.estimate.arm])
    chart = seeds_chart(primary, "tuned minus base" if paired else "level") | {"id": "forest", "pdf": "forest"}
    forest = [chart] if primary else []
    context = {
        **shell("charts", rules=heights(forest)),
        "groups": list(dict.fromkeys(row.group for row in rows)),
        "verdicts": _verdicts(rows, primary, [reader["name"] for reader in run.read_manifest()["config"]["readers"]]),
        "certificate": in_words(shipped()),
        "runs": [_run_row(run) for run in runs],
        "not_run": [from_home(str(path)) for path in not_run],
        "primary": _by_endpoint(primary),
        "estimates": by_outcome(rows, lambda row: row.estimate.name),
        "forest": forest,
        "forest_pdf": as_base64(_draw_forest(primary, out, DIFFERENCE if paired else LEVEL)) if primary else "",
        "page_data": block({"charts": {spec["id"]: spec for spec in forest}}),
        "paired": bool(paired),
        "holm": holm_p,
        "enough": ENOUGH_SEEDS,
    }
    return write_page(environment().get_template("merged.html.j2").render(context), out / "report.html")


def _by_endpoint(primary: Sequence[Merged]) -> dict[tuple[str, str], list[Merged]]:
    """Every group's row, by name and arm of the endpoint."""
    found: dict[tuple[str, str], list[Merged]] = {}
    for row in primary:
        found.setdefault((row.estimate.name, row.estimate.arm), []).append(row)
    return found


def _verdicts(rows: Sequence[Merged], primary: Sequence[Merged], readers: Sequence[str]) -> dict[str, list[str]]:
    """Of each group: what its conflict triple says of each author's chains, and which primary endpoints moved."""
    found = {}
    for group in dict.fromkeys(row.group for row in rows):
        said = conclusions([row.estimate for row in rows if row.group == group], readers)
        said = [sentence for sentence in said if not sentence.endswith(UNDECIDED)]
        found[group] = [*said, _of_primary([row for row in primary if row.group == group], len(readers) > 1)]
    return found


def _of_primary(own: Sequence[Merged], paired: bool) -> str:
    """The primary differences that are told from 0, with their intervals; of levels, all."""
    if not own:
        return "No primary endpoint has a value."
    shown = [row for row in own if moved(row.estimate)] if paired else own
    listed = "; ".join(map(_in_words, shown))
    if not paired:
        return f"Levels: {listed}."
    if not shown:
        least = min(own, key=lambda row: np.nan_to_num(holm_p(row.estimate), nan=np.inf))
        return (
            f"None of {len(own)} primary differences is told from 0 (95% interval and Holm's p); the least Holm p is "
            f"{p_value(holm_p(least.estimate))}: {_in_words(least)}."
        )
    return f"{len(shown)} of {len(own)} primary differences are told from 0 (95% interval and Holm's p): {listed}."


def _in_words(row: Merged) -> str:
    e, seeds = row.estimate, len(row.seeds)
    found = f"in each of {seeds} seeds" if row.alike else f"[{signed(e.ci_low)}, {signed(e.ci_high)}]"
    return f"{e.name.split(' | ')[0]} ({e.arm}) {signed(e.value)} {found}"


def _run_row(run: RunDirectory) -> dict[str, Any]:
    manifest = run.read_manifest()
    readers = [
        " + ".join(filter(None, (row.get("model"), row.get("adapter")))) for row in manifest["config"]["readers"]
    ]
    problems = (manifest.get("counts") or {}).get("problems", "")
    left_out = Counter((row["stage"], row["reason"]) for row in run.read_exclusions())
    row = {
        "path": from_home(str(run.path)),
        "group": group_of(labels_of(run)),
        "problems": problems,
        "readers": readers,
    }
    return {**row, "left_out": left_out.most_common(), "n_left_out": left_out.total()}


def _draw_forest(primary: Sequence[Merged], out: Path, label: str) -> Path:
    """The forest of the primary outcomes as a paper figure, PNG and PDF; the path of the PDF."""
    with matplotlib.rc_context(STYLE):
        figure = seeds_figure(primary, list(dict.fromkeys(row.group for row in primary)), label)
        return save_figure(figure, out / "forest")[-1]
