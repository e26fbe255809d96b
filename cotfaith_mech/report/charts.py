"""The report's interactive charts as plotly.js values (`data`, `layout`): tables of views.py in, plain dicts out.

plotly.js reads a little markup in every text it draws, so each text of a model or data set passes through `label`,
and axes of names say that they are, as names like dates or numbers would be drawn as such.
Colours of text and grid are left to the page, which knows whether it is light or dark.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from .. import views
from ..figure_style import READER_COLOURS
from ..figures import CONFLICT_COLOURS, CONFLICT_LABELS, CURVE_LABELS, CURVE_Y
from ..merge import Merged
from ..outcomes import Table
from ..stats import Estimate

GREY = "#777777"
CONTROLS = {code: 0x2400 + code for code in range(32) if not chr(code).isspace()} | {0xFFFE: 0xFFFD, 0xFFFF: 0xFFFD}
"""Characters that a picture's XML cannot hold, and those that show them."""
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross")


def label(text: str, width: int = 60, most: int = 240) -> str:
    """Text that plotly draws as it stands: shortened, wrapped, its characters of markup and templates as entities."""
    short = text[: most - 2].rstrip() + " …" if len(text) > most else text
    lines = textwrap.wrap(short.translate(CONTROLS), width)
    return "<br>".join(html.escape(line, quote=False).replace("%{", "%&#123;") for line in lines) or " "


def numbers(values: Iterable[Any]) -> list[float | None]:
    """JSON numbers of at most five significant digits; what is not finite is null."""
    return [float(f"{value:.5g}") if not pd.isna(value) and math.isfinite(value) else None for value in values]


def colour(readers: Sequence[str], reader: str) -> str:
    return READER_COLOURS[list(readers).index(reader) % len(READER_COLOURS)]


def chart_of(title: str, data: list[dict[str, Any]], height: int, **layout: Any) -> dict[str, Any]:
    """`title` is text; `heading` the same for plotly, which writes it into a saved picture."""
    return {"title": title, "heading": label(title), "height": height, "data": data, "layout": layout}


def curve_charts(curves: Table, readers: Sequence[str]) -> list[dict[str, Any]]:
    """One chart a test: a line and a band per reader."""
    charts = []
    for measure in views.CURVES:
        traces = []
        for number, reader in enumerate(readers):
            one = curves[(curves["measure"] == measure) & (curves["reader"] == reader)]
            if len(one):
                traces += _line_with_band(one, label(reader), colour(readers, reader), SYMBOLS[number % len(SYMBOLS)])
        if traces:
            kept = "kept verbatim" if measure == "paraphrase" else "of the chain kept"
            x = {"title": {"text": f"fraction {kept}"}, "range": [-0.03, 1.03]}
            y = {"title": {"text": CURVE_Y}, "range": [-0.03, 1.06]}
            charts.append(chart_of(CURVE_LABELS[measure], traces, 300, xaxis=x, yaxis=y))
    return charts


def _line_with_band(one: Table, name: str, shade: str, symbol: str) -> list[dict[str, Any]]:
    x = numbers(one["x"])
    hidden = {
        "x": x,
        "mode": "lines",
        "line": {"width": 0},
        "hoverinfo": "skip",
        "showlegend": False,
        "legendgroup": name,
    }
    low = {**hidden, "y": numbers(one["low"])}
    high = {**hidden, "y": numbers(one["high"]), "fill": "tonexty", "fillcolor": shade + "26"}
    line = {
        "x": x,
        "y": numbers(one["value"]),
        "name": name,
        "legendgroup": name,
        "mode": "lines+markers",
        "line": {"color": shade, "width": 2},
        "marker": {"symbol": symbol, "size": 7},
        "customdata": [list(row) for row in zip(low["y"], high["y"], one["n"].tolist(), strict=True)],
        "hovertemplate": "%{y:.2f} [%{customdata[0]:.2f}, %{customdata[1]:.2f}], %{customdata[2]} problems"
        f"<extra>{name}</extra>",
    }
    return [low, high, line]


def conflict_chart(triple: Table, readers: Sequence[str]) -> dict[str, Any]:
    """Stacked bars: whose answer is given, a bar per record variant and reader."""
    rows = triple.assign(order=triple["reader"].map(list(readers).index)).sort_values(["variant", "order"])
    variants = [label(variant.replace("_", " "), 14) for variant in rows["variant"]]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "y": [variants, [label(reader) for reader in rows["reader"]]],
            "x": numbers(rows[metric]),
            "name": CONFLICT_LABELS[metric],
            "marker": {"color": shade},
            "texttemplate": "%{x:.2f}",
            "textfont": {"color": "#1b1b1b"},
            "textposition": "inside",
            "insidetextanchor": "middle",
            "hovertemplate": "%{y}: %{x:.3f}<extra>" + CONFLICT_LABELS[metric] + "</extra>",
        }
        for metric, shade in CONFLICT_COLOURS.items()
    ]
    x = {"title": {"text": "probability"}, "range": [0, 1]}
    y = {"type": "multicategory", "autorange": "reversed", "ticklabelposition": "outside"}
    uniform = {"minsize": 9, "mode": "hide"}
    return chart_of(
        "",
        data,
        130 + 30 * len(rows),
        barmode="stack",
        bargap=0.25,
        xaxis=x,
        yaxis=y,
        uniformtext=uniform,
        legend={"traceorder": "normal"},
    )


def _marks(estimates: Sequence[Estimate], rows: Sequence[str], shades: str | list[str]) -> dict[str, Any]:
    """A mark with its interval for each estimate, in the row of the same place; `shades`: one for all or one each."""
    values, lows, highs = (numbers(getattr(e, name) for e in estimates) for name in ("value", "ci_low", "ci_high"))
    above = [None if v is None or h is None else h - v for v, h in zip(values, highs, strict=True)]
    below = [None if v is None or low is None else v - low for v, low in zip(values, lows, strict=True)]
    bar = shades if isinstance(shades, str) else GREY
    return {
        "mode": "markers",
        "orientation": "h",
        "x": values,
        "y": list(rows),
        "marker": {"color": shades, "size": 9},
        "error_x": {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "color": bar},
        "customdata": [list(row) for row in zip(lows, highs, (e.n_problems for e in estimates), strict=True)],
        "hovertemplate": "%{x:+.3f} [%{customdata[0]:+.3f}, %{customdata[1]:+.3f}], %{customdata[2]} problems",
    }


def _row_name(name: str) -> str:
    return label(name.split(" | ")[0].replace("/", " / ").replace("_", " "), 20)


def forest_chart(differences: Sequence[Estimate], readers: Sequence[str]) -> dict[str, Any]:
    """Paired differences with their intervals, one row an endpoint and arm."""
    data = []
    for arm in dict.fromkeys(estimate.arm for estimate in differences):
        own = [estimate for estimate in differences if estimate.arm == arm]
        reader = views.tuned_reader(arm, readers) or arm
        trace = _marks(own, [_row_name(e.name) for e in own], colour(readers, reader) if reader in readers else GREY)
        trace["marker"]["symbol"] = SYMBOLS[len(data) % len(SYMBOLS)]
        trace["hovertemplate"] += f"<extra>{label(arm)}</extra>"
        data.append({**trace, "name": label(arm)})
    names = list(dict.fromkeys(_row_name(estimate.name) for estimate in differences))
    return _forest(data, names, 62, "paired difference")


def _forest(data: list[dict[str, Any]], names: list[str], row_height: int, unit: str) -> dict[str, Any]:
    x = {"title": {"text": unit}, "zeroline": True}
    y = {
        "type": "category",
        "dtick": 1,
        "range": [len(names) - 0.5, -0.5],
        "categoryorder": "array",
        "categoryarray": names,
    }
    height = 130 + row_height * len(names)
    return chart_of("", data, height, xaxis=x, yaxis=y, scattermode="group", scattergap=0.4)


def seeds_chart(rows: Sequence[Merged], unit: str) -> dict[str, Any]:
    """A row an endpoint and arm: each group's mean with its interval, and every training seed a dot beside it."""
    groups = list(dict.fromkeys(row.group for row in rows))
    name_of = {id(row): f"{_row_name(row.estimate.name)}<br>{label(row.estimate.arm)}" for row in rows}
    data = []
    for number, group in enumerate(groups):
        own = [row for row in rows if row.group == group]
        trace = _marks([row.estimate for row in own], [name_of[id(row)] for row in own], colour(groups, group))
        trace["marker"]["symbol"] = SYMBOLS[number % len(SYMBOLS)]
        trace["hovertemplate"] += f"<extra>{label(group)}</extra>"
        dots = [(value, name_of[id(row)], f"seed {seed}") for row in own for seed, value in row.seeds.items()]
        seeds = {
            "mode": "markers",
            "orientation": "h",
            "x": numbers(value for value, _, _ in dots),
            "y": [name for _, name, _ in dots],
            "text": [label(text) for _, _, text in dots],
            "marker": {"color": colour(groups, group), "size": 5, "opacity": 0.45},
            "hovertemplate": f"%{{text}}: %{{x:+.3f}}<extra>{label(group)}</extra>",
            "showlegend": False,
        }
        data += [{**one, "name": label(group), "legendgroup": group, "offsetgroup": group} for one in (trace, seeds)]
    return _forest(data, list(dict.fromkeys(name_of.values())), max(48, 20 * len(groups)), unit)


def cross_model_charts(cells: Table, readers: Sequence[str]) -> list[dict[str, Any]]:
    """P(chain's answer) under conflict with one layer of the other model, a chart a tuned reader and direction; dashes
    are the two models as they are. `readers`: the base first."""
    charts = []
    for tuned in views.present(readers, cells):
        names = {"base": readers[0], "tuned": tuned}
        of_reader = cells[cells["reader"] == tuned]
        for into, donor in (("tuned", "base"), ("base", "tuned")):
            traces = []
            for rows, shade, symbol in (("chain_rows", "#0072B2", "circle"), ("cue_rows", "#D55E00", "square")):
                one = of_reader[(of_reader["into"] == into) & (of_reader["rows"] == rows)].sort_values("layer")
                traces += _line_with_band(one.assign(x=one["layer"]), rows.replace("_", " "), shade, symbol)
            layers = numbers(of_reader["layer"].dropna().sort_values())
            for model in (into, donor):
                own = of_reader[(of_reader["into"] == model) & (of_reader["rows"] == "own")]["value"]
                for value in numbers(own):
                    line = {"color": "#777777", "dash": "dash", "width": 1}
                    ends = {"x": [layers[0], layers[-1]], "y": [value, value], "mode": "lines", "line": line}
                    traces.append({**ends, "name": f"{label(names[model])} as it is", "hoverinfo": "name+y"})
            x, y = (
                {"title": {"text": "layer exchanged"}},
                {"title": {"text": "P(chain's answer)"}, "range": [-0.03, 1.06]},
            )
            title = f"one layer of {names[donor]} in {names[into]}"
            charts.append(chart_of(title, traces, 320, xaxis=x, yaxis=y))
    return charts


def levels_chart(estimates: Sequence[Estimate], readers: Sequence[str], title: str, unit: str) -> dict[str, Any]:
    """One number of every reader with its interval, a row a reader and author."""
    shades = [colour(readers, e.arm.split("/")[0]) for e in estimates]
    trace = _marks(estimates, [label(e.arm.replace("/", " reads ")) for e in estimates], shades)
    trace["hovertemplate"] = "%{y}: " + trace["hovertemplate"] + "<extra></extra>"
    x = {"title": {"text": unit}, "zeroline": True}
    y = {"type": "category", "dtick": 1, "autorange": "reversed"}
    return chart_of(title, [{**trace, "showlegend": False}], 110 + 34 * len(estimates), xaxis=x, yaxis=y)


def knockout_chart(losses: Table, readers: Sequence[str]) -> dict[str, Any]:
    """Boxes with every problem as a point, grouped by the role of the step."""
    order = [role for role in (*views.ROLES, "random") if (losses["role"] == role).any()]
    data = []
    for reader in views.present(readers, losses):
        one = losses[losses["reader"] == reader]
        box = {
            "type": "box",
            "x": one["role"].replace({"random": "random positions"}).tolist(),
            "y": numbers(one["value"]),
            "text": [label(problem) for problem in one["problem_id"]],
            "name": label(reader),
            "marker": {"color": colour(readers, reader), "size": 5, "opacity": 0.55},
            "line": {"width": 1.3},
            "boxpoints": "all",
            "boxmean": True,
            "jitter": 0.5,
            "pointpos": 0,
            "hovertemplate": "%{text}: %{y:.3f}<extra>" + label(reader) + "</extra>",
        }
        data.append(box)
    x = {
        "categoryorder": "array",
        "categoryarray": [role if role != "random" else "random positions" for role in order],
    }
    y = {"title": {"text": "probability lost"}, "zeroline": True}
    return chart_of("", data, 360, boxmode="group", xaxis=x, yaxis=y)


def bridge_chart(points: Table, disagreements: Table, readers: Sequence[str]) -> dict[str, Any]:
    """Behaviour against mechanism, one point a step; steps of disagreeing chains carry a dark ring."""
    apart = set(zip(disagreements["reader"], disagreements["chain_id"], strict=True))
    data = []
    for number, reader in enumerate(views.present(readers, points)):
        one = points[points["reader"] == reader]
        ringed = [(reader, chain) in apart for chain in one["chain_id"]]
        marker = {
            "color": colour(readers, reader),
            "size": 9,
            "opacity": 0.75,
            "symbol": SYMBOLS[number % len(SYMBOLS)],
            "line": {"width": [2 if ring else 0 for ring in ringed], "color": "#777777"},
        }
        names = [f"{label(p)}, step {s + 1}" for p, s in zip(one["problem_id"], one["step"], strict=True)]
        trace = {"mode": "markers", "x": numbers(one["mistake"]), "y": numbers(one["knockout"])}
        trace |= {"name": label(reader), "meta": reader}
        hover = "%{text}<br>mistake %{x:.2f}, knockout %{y:.2f}<extra>" + label(reader) + "</extra>"
        links = [str(chain) for chain in one["chain_id"]]
        data.append({**trace, "marker": marker, "text": names, "customdata": links, "hovertemplate": hover})
    x = {"title": {"text": "behaviour: mistake in the step<br>(total variation)"}}
    y = {"title": {"text": "mechanism: knockout (probability lost)"}}
    return chart_of("", data, 420, xaxis=x, yaxis=y)
