"""Pictures of several runs merged: every training seed a dot, and the shares of the two-by-two table."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from .figure_style import PAPER_WIDTH, colour_of, drawable, marker_of
from .merge import Merged
from .metrics import CELLS

CELL_COLOURS = {
    "load_bearing": "#0072B2",
    "encoded_or_fragile": "#56B4E9",
    "decorative": "#D55E00",
    "unstable": "#CC79A7",
    "undecided": "#CCCCCC",
}


DIFFERENCE = "tuned minus base, 95% interval: t over training seeds; of one seed, over problems"
LEVEL = "level of each run, 95% interval"


def seeds_figure(
    rows: Sequence[Merged], groups: Sequence[str], label: str = DIFFERENCE, base: str | None = None
) -> Figure:
    """Differences to the base (or levels, of runs without one), grouped by endpoint: mean over training seeds with its
    interval, each seed a dot. Colours are those of figures that show `base` before the groups."""
    colours = [*([base] if base else []), *groups]
    names = list(dict.fromkeys((row.estimate.name, row.estimate.arm) for row in rows))
    arms = {arm for _, arm in names}
    height = len(groups) + 0.7
    figure = Figure(figsize=(PAPER_WIDTH, 0.9 + 0.17 * len(names) * height))
    axis = figure.subplots()
    for row in rows:
        estimate, colour = row.estimate, colour_of(colours, row.group)
        y = names.index((estimate.name, estimate.arm)) * height + groups.index(row.group)
        seeds = np.array(list(row.seeds.values()))
        axis.scatter(seeds, np.full(len(seeds), y), s=9, color=colour, alpha=0.45, linewidths=0)
        axis.plot([estimate.ci_low, estimate.ci_high], [y, y], color=colour)
        axis.plot(estimate.value, y, marker=marker_of(colours, row.group), color=colour, markersize=4.5)
        text = f"{estimate.signed}  {len(seeds)} seed{'s'[: len(seeds) - 1]}"
        if row.alike:
            text = f"{estimate.value:+.2f} in each of {len(seeds)} seeds"
        axis.annotate(text, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=6)
    for group in groups:
        axis.plot([], [], color=colour_of(colours, group), marker=marker_of(colours, group), label=drawable(group))
    axis.axvline(0, color="#555555", linewidth=0.8, zorder=0)
    centres = [i * height + (len(groups) - 1) / 2 for i in range(len(names))]
    labels = [name.split(" | ")[0] + (f" ({arm})" if len(arms) > 1 else "") for name, arm in names]
    axis.set_yticks(centres, [textwrap.fill(drawable(label).replace("/", " / "), 26) for label in labels])
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.set_xlabel(label)
    axis.grid(axis="x", color="#E6E6E6", linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=3, fontsize=7)
    return figure


def verdict_figure(shares: dict[str, dict[str, float]]) -> Figure:
    """Share of chains in each cell of the two-by-two table, a bar a reader: `{reader: {cell: share}}`."""
    figure = Figure(figsize=(PAPER_WIDTH, 0.9 + 0.28 * len(shares)))
    axis = figure.subplots()
    left = np.zeros(len(shares))
    for cell in (*CELLS, "undecided"):
        width = np.array([own.get(cell, 0.0) for own in shares.values()])
        axis.barh(
            range(len(shares)), width, left=left, height=0.7, color=CELL_COLOURS[cell], label=cell.replace("_", " ")
        )
        for y, (start, size) in enumerate(zip(left, width, strict=True)):
            if size >= 0.08:
                axis.text(start + size / 2, y, f"{size:.2f}", ha="center", va="center", fontsize=7)
        left = left + width
    axis.set_yticks(range(len(shares)), [drawable(name).replace("_", " ") for name in shares])
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), xlabel="share of chains")
    figure.legend(loc="outside lower center", ncols=5, fontsize=7)
    return figure
