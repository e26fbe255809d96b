"""HTML of chains and maps in a notebook; whatever a model or a data set wrote is escaped, and never read as math.

Colours are RdBu centred at 0 with symmetric limits, as in the figures: blue is positive, white is 0, grey has no value.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

import numpy as np

_FRAME = (
    '<div class="tex2jax_ignore mathjax_ignore" style="font:13px/1.45 system-ui,sans-serif;color:#1a1a1a;'
    'background:#fff;padding:8px 10px;overflow-x:auto">{}</div>'
)
_TABLE = '<table style="border-collapse:collapse;margin:6px 0;font-size:13px;color:#1a1a1a;background:#fff">{}</table>'
_QUIET = "color:#666;font-size:12px"
_NUMBER = "text-align:right;padding:1px 8px;border:0;font-variant-numeric:tabular-nums"
_LINE = "text-align:left;white-space:nowrap;overflow:hidden;text-overflow:ellipsis;max-width:320px;padding:0 8px 0 0"
_TEXT = "text-align:left;white-space:pre-wrap;overflow-wrap:anywhere;padding:3px 8px;border:0"


def escaped(text: str) -> str:
    """`text` for HTML content and quoted attributes, its direction kept to itself; a lone surrogate becomes '?'."""
    return f"<bdi>{_plain(text)}</bdi>"


def _plain(text: str) -> str:
    return html.escape(text.encode("utf-8", "replace").decode())


def limit_of(values: Iterable[float]) -> float:
    """Largest size of a value; 1 where none is finite or all are 0."""
    return max((abs(value) for value in values if math.isfinite(value)), default=0) or 1.0


def colours(value: float, limit: float) -> str:
    """CSS of a cell: RdBu from -limit to limit, with text that can be read on it."""
    import matplotlib as mpl

    if not math.isfinite(value):
        return "background:#ddd;color:#1a1a1a"
    red, green, blue, _ = (round(255 * part) for part in mpl.colormaps["RdBu"]((value / limit + 1) / 2))
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140
    return f"background:rgb({red},{green},{blue});color:{'#fff' if dark else '#1a1a1a'}"


def signed(value: float, unit: str) -> str:
    """The value as text, with its sign and unit."""
    return f"{value:+.3f} {unit}".rstrip() if math.isfinite(value) else "not measured"


def scale(limit: float, label: str) -> str:
    """The colour bar, with its limits and what it shows."""
    stops = ",".join(colours(at, 1.0).split(";")[0].removeprefix("background:") for at in np.linspace(-1, 1, 11))
    bar = (
        f'<span style="display:inline-block;width:160px;height:10px;background:linear-gradient(90deg,{stops})"></span>'
    )
    return f'<div style="{_QUIET}">−{limit:.3g} {bar} +{limit:.3g}&ensp;{escaped(label)}</div>'


def chain_markup(
    prompt: str, steps: Sequence[str], cue: str, answer: str, values: Sequence[float] | None = None, unit: str = ""
) -> str:
    """Prompt, numbered steps and cue with its answer in bold; with `values`, one a step, the steps coloured by them."""
    limit, rows = limit_of(values or ()), []
    for j, step in enumerate(steps):
        style, number = _TEXT, ""
        if values is not None:
            style += ";" + colours(values[j], limit)
            number = f'<td style="{_NUMBER};{_QUIET}">{_plain(signed(values[j], unit))}</td>'
        text = f'<td style="{style}">{escaped(step.strip())}</td>'
        rows.append(f'<tr><td style="{_NUMBER};{_QUIET}">{j}</td>{text}{number}</tr>')
    said = f"{escaped(cue.strip())} <b>{escaped(answer.strip())}</b>"
    rows.append(f'<tr><td style="border:0"></td><td style="{_TEXT}">{said}</td></tr>')
    head = f'<div style="{_QUIET};white-space:pre-wrap;overflow-wrap:anywhere">{escaped(prompt.strip())}</div>'
    return framed(head + _TABLE.format("".join(rows)))


def map_markup(rows: Sequence[str], columns: Sequence[int], values: np.ndarray, titles: Sequence[Sequence[str]]) -> str:
    """A map of `values[row, column]` with the text of each row before it, on one line; `titles` show on hover."""
    limit, every = limit_of(values.ravel().tolist()), max(1, -(-len(columns) // 12))
    heads = "".join(
        f'<th style="{_QUIET};padding:0;border:0;font-weight:400;text-align:center">'
        f"{column if i % every == 0 else ''}</th>"
        for i, column in enumerate(columns)
    )
    body = [f'<tr><th style="border:0"></th>{heads}</tr>']
    width = max(6, min(28, 560 // len(columns)))
    for text, cells, hints in zip(rows, values.tolist(), titles, strict=True):
        drawn = "".join(
            f'<td title="{_plain(hint)}" style="{colours(value, limit).split(";")[0]};min-width:{width}px;height:22px;'
            'padding:0;border:1px solid #fff"></td>'
            for value, hint in zip(cells, hints, strict=True)
        )
        name = f'<div title="{_plain(text)}" style="{_LINE}">{escaped(text)}</div>'
        body.append(f'<tr><td style="border:0">{name}</td>{drawn}</tr>')
    return _TABLE.format("".join(body))


def framed(content: str) -> str:
    """`content`, which is HTML already, with the colours of a light page: it looks the same in a dark notebook."""
    return _FRAME.format(content)


def caption(text: str) -> str:
    """A bold line above a map."""
    return f'<div style="font-weight:600">{escaped(text)}</div>'
