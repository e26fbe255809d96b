"""OUT/report.html of several runs merged: primary outcomes, every training seed, all estimates, what was not run."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup

from ..certificate import in_words, shipped
from ..compare import holm_p
from ..figure_style import STYLE
from ..merge import ENOUGH_SEEDS, Merged, endpoint, group_of, labels_of, merged
from ..merged_figures import DIFFERENCE, LEVEL, seeds_figure
from ..records import RunDirectory
from .build import HERE, environment, write_page


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
    page = (
        environment()
        .get_template("merged.html.j2")
        .render(
            style=Markup((HERE / "report.css").read_text("utf-8")),
            groups=list(dict.fromkeys(row.group for row in rows)),
            certificate=in_words(shipped()),
            runs=[_run_row(run) for run in runs],
            not_run=[str(path) for path in not_run],
            primary=primary,
            rows=rows,
            forest=_forest(primary, out, DIFFERENCE if paired else LEVEL) if primary else "",
            paired=bool(paired),
            holm=holm_p,
            enough=ENOUGH_SEEDS,
        )
    )
    return write_page(page, out / "report.html")


def _run_row(run: RunDirectory) -> dict[str, Any]:
    manifest = run.read_manifest()
    readers = [
        " + ".join(filter(None, (row.get("model"), row.get("adapter")))) for row in manifest["config"]["readers"]
    ]
    problems = (manifest.get("counts") or {}).get("problems", "")
    return {"path": str(run.path), "group": group_of(labels_of(run)), "problems": problems, "readers": readers}


def _forest(primary: Sequence[Merged], out: Path, label: str) -> str:
    """The forest of the primary outcomes, as files and as base64 of the PNG."""
    out.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = seeds_figure(primary, list(dict.fromkeys(row.group for row in primary)), label)
        figure.savefig(buffer, format="png", metadata={"Software": None})
        figure.set_layout_engine("none")
        figure.savefig(out / "forest.pdf", metadata={"CreationDate": None})
    (out / "forest.png").write_bytes(buffer.getvalue())
    return base64.b64encode(buffer.getvalue()).decode()
