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
from ..compare import holm_p, primary_name
from ..figure_style import STYLE
from ..merge import ENOUGH_SEEDS, Merged, group_of, labels_of, merged
from ..merged_figures import seeds_figure
from ..records import RunDirectory
from .build import HERE, environment, write_page


def build_merged(runs: Sequence[RunDirectory], not_run: Sequence[Path], out: Path) -> Path:
    """Merge `runs`, list `not_run`, and write OUT/report.html and OUT/forest.png and .pdf; the page's path.

    Primary endpoints are those of the first run's config. Raises CotfaithError where the runs cannot be merged.
    """
    config = runs[0].read_manifest()["config"]
    base = config["readers"][0]["name"]
    names = [primary_name(name) for name in config.get("primary") or []]
    found = {e.arm.partition(f"-{base}")[2] for run in runs for e in run.read_estimates() if f"-{base}" in e.arm}
    ends = sorted(end for end in found if not end.startswith(" ("))
    rows = merged(runs, [f"{name}@{end}" for name in names for end in ends])
    primary = sorted(
        (row for row in rows if row.estimate.name in names), key=lambda row: names.index(row.estimate.name)
    )
    known = shipped()
    page = (
        environment()
        .get_template("merged.html.j2")
        .render(
            style=Markup((HERE / "report.css").read_text("utf-8")),
            groups=list(dict.fromkeys(row.group for row in rows)),
            certificate=in_words(known)
            if known
            else "This version of the package carries no certificate of validation.",
            runs=[_run_row(run) for run in runs],
            not_run=[str(path) for path in not_run],
            primary=primary,
            rows=rows,
            forest=_forest(primary, out) if primary else "",
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


def _forest(primary: Sequence[Merged], out: Path) -> str:
    """The forest of the primary outcomes, as files and as base64 of the PNG."""
    out.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = seeds_figure(primary, list(dict.fromkeys(row.group for row in primary)))
        figure.savefig(buffer, format="png", metadata={"Software": None})
        figure.set_layout_engine("none")
        figure.savefig(out / "forest.pdf", metadata={"CreationDate": None})
    (out / "forest.png").write_bytes(buffer.getvalue())
    return base64.b64encode(buffer.getvalue()).decode()
