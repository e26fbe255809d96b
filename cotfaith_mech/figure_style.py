"""What all figures share: one style sheet, the colours of readers, maps centred at 0, text made drawable.

Colours are Okabe and Ito's and ColorBrewer's RdBu, both safe for colour-blind readers; blue is positive and white is 0
in every map. Text of models and data is never read as mathtext.
"""

from __future__ import annotations

import functools
import hashlib
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

from .disk import write_atomically

READER_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
READER_MARKERS = ("o", "s", "^", "D", "v", "P")
PAPER_WIDTH = 7.0  # inches: two columns
MOST_BYTES = 180
"""Of a figure's file name, without what tells it apart and the ending; file systems take 255."""

STYLE: Any = {
    "figure.dpi": 200,
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.07,
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": "#555555",
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "pdf.fonttype": 42,
    "text.parse_math": False,
}


def colour_of(readers: list[str], reader: str) -> str:
    return READER_COLOURS[readers.index(reader) % len(READER_COLOURS)] if reader in readers else "#333333"


def marker_of(readers: list[str], reader: str) -> str:
    return READER_MARKERS[readers.index(reader) % len(READER_MARKERS)] if reader in readers else "o"


@functools.cache
def _font() -> FT2Font:
    return FT2Font(font_manager.findfont("DejaVu Sans"))


def drawable(text: str) -> str:
    """`text` on one line, with a box for every character the figures' font has no glyph for."""
    font = _font()
    plain = " ".join(text.split())
    return "".join(c if font.get_char_index(ord(c)) else "□" for c in plain)


def title_panels(figure: Figure, axes: Iterable[Axes], texts: Iterable[str], width: int = 48) -> None:
    """Title neighbouring panels, wrapped so that none reaches the next, and make the figure higher by the lines added.

    `width` is the characters that fit beside each other over all panels; a name that is longer than its panel is wide
    breaks after `_`, `-` or `/`.
    """
    axes = list(axes)
    most = max(6, width // len(axes))
    long_names = textwrap.TextWrapper(most)
    long_names.wordsep_re = re.compile(r"(\s+|[^\s_/-]+[_/-]+(?=\S))")
    whole = textwrap.TextWrapper(most, break_on_hyphens=False)
    titles = [
        (whole if max(map(len, text.split()), default=0) <= most else long_names).fill(drawable(text)) for text in texts
    ]
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title)
    figure.set_figheight(figure.get_figheight() + 0.14 * max(title.count("\n") for title in titles))


def draw_map(axis: Axes, values: np.ndarray, limit: float, lines: bool = True) -> None:
    """A RdBu map centred at 0, with lines between the cells or not; cells without a value are grey."""
    axis.set_facecolor("#DDDDDD")
    edges: dict[str, Any] = {"edgecolors": "white", "linewidth": 0.4} if lines else {}
    axis.pcolormesh(np.ma.masked_invalid(values), cmap="RdBu", vmin=-limit, vmax=limit, **edges)
    axis.invert_yaxis()
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)


def draw_scale(figure: Figure, axes: Iterable[Axes], limit: float, label: str) -> None:
    """The colour bar that all maps of a figure share."""
    colours = ScalarMappable(Normalize(-limit, limit), "RdBu")
    figure.colorbar(colours, ax=list(axes), label=label, shrink=0.9, aspect=14)


def label_ticks(axis: Axes, which: str, labels: list[Any], most: int = 12) -> None:
    """Label every n-th cell so that at most `most` labels stand on the axis."""
    every = max(1, -(-len(labels) // most))
    at = range(0, len(labels), every)
    axis.set(**{f"{which}ticks": [i + 0.5 for i in at], f"{which}ticklabels": [str(labels[i]) for i in at]})


def file_name(name: str) -> str:
    """`name` as the stem of a file: letters, digits, - and _ alone; a long one is cut, and told apart by its hash."""
    stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
    if len(stem.encode()) <= MOST_BYTES:
        return stem
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{stem.encode()[:MOST_BYTES].decode(errors='ignore')}_{digest}"


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write the figure beside `stem` as PNG and as PDF, each in one move; the two paths."""
    png, pdf = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.pdf")
    write_atomically(png, lambda file: figure.savefig(file, format="png", metadata={"Software": None}))
    figure.set_layout_engine("none")
    write_atomically(pdf, lambda file: figure.savefig(file, format="pdf", metadata={"CreationDate": None}))
    return [png, pdf]
