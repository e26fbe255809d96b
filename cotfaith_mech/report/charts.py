"""The report's interactive charts as plotly.js values (`data`, `layout`): tables of views.py in, plain dicts out.

plotly.js reads a little markup in every text it draws, so each text of a model or data set passes through `label`.
Colours of text and grid are left to the page, which knows whether it is light or dark.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from .. import views
from ..figure_style import READER_COLOURS
from ..figures import CONFLICT_COLOURS, CONFLICT_LABELS, CURVE_LABELS, CURVE_Y
from ..markup import limit_of
from ..outcomes import Table
from ..stats import Estimate

RDBU = (
    "#67001f", "#b2182b", "#d6604d", "#f4a582", "#fddbc7", "#f7f7f7", "#d1e5f0", "#92c5de", "#4393c3", "#2166ac",
    "#053061",
)  # fmt: skip
"""ColorBrewer's RdBu, red (negative) to blue (positive)."""
MOST_HEADS = 12
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross")


def label(text: str, width: int = 60, most: int = 240) -> str:
    """Text that plotly draws as it stands: shortened, wrapped, its markup characters as entities."""
    short = textwrap.shorten(text, most, placeholder=" …") if len(text) > most else text
    return "<br>".join(html.escape(line, quote=False) for line in textwrap.wrap(short, width)) or " "


def numbers(values: Iterable[Any]) -> list[float | None]:
    """JSON numbers of at most five significant digits; what is not finite is null."""
    return [float(f"{value:.5g}") if not pd.isna(value) and math.isfinite(value) else None for value in values]


def colour(readers: Sequence[str], reader: str) -> str:
    return READER_COLOURS[list(readers).index(reader) % len(READER_COLOURS)]


def _chart(title: str, data: list[dict[str, Any]], height: int, **layout: Any) -> dict[str, Any]:
    return {"title": title, "height": height, "data": data, "layout": layout}


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
            charts.append(_chart(CURVE_LABELS[measure], traces, 300, xaxis=x, yaxis=y))
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
    y = {"autorange": "reversed", "ticklabelposition": "outside"}
    uniform = {"minsize": 9, "mode": "hide"}
    return _chart(
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


def forest_chart(differences: Sequence[Estimate], readers: Sequence[str]) -> dict[str, Any]:
    """Paired differences with their intervals, one row an endpoint and arm."""
    data = []
    for arm in dict.fromkeys(estimate.arm for estimate in differences):
        own = [estimate for estimate in differences if estimate.arm == arm]
        reader = views.tuned_reader(arm, readers) or arm
        shade = colour(readers, reader) if reader in readers else "#777777"
        values, lows, highs = (numbers(getattr(e, field) for e in own) for field in ("value", "ci_low", "ci_high"))
        above = [None if v is None or h is None else h - v for v, h in zip(values, highs, strict=True)]
        below = [None if v is None or low is None else v - low for v, low in zip(values, lows, strict=True)]
        data.append(
            {
                "mode": "markers",
                "orientation": "h",
                "x": values,
                "y": [label(e.name.split(" | ")[0].replace("/", " / ").replace("_", " "), 20) for e in own],
                "name": label(arm),
                "marker": {"color": shade, "size": 9, "symbol": SYMBOLS[len(data) % len(SYMBOLS)]},
                "error_x": {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "color": shade},
                "customdata": [list(pair) for pair in zip(lows, highs, strict=True)],
                "hovertemplate": "%{x:+.3f} [%{customdata[0]:+.3f}, %{customdata[1]:+.3f}]<extra>"
                + label(arm)
                + "</extra>",
            }
        )
    names = len({estimate.name for estimate in differences})
    x = {"title": {"text": "paired difference"}, "zeroline": True}
    y = {"range": [names - 0.5, -0.5]}
    return _chart("", data, 130 + 62 * names, xaxis=x, yaxis=y, scattermode="group", scattergap=0.4)


def heatmap(
    title: str,
    values: np.ndarray,
    x: Sequence[Any],
    y: Sequence[str],
    limit: float,
    hover: list[list[str]],
    *,
    row_height: int = 30,
    axes: tuple[str, str] = ("", ""),
) -> dict[str, Any]:
    """A RdBu map centred at 0 with limits ±`limit`; `hover[row][column]` is already safe text."""
    colours = [[i / (len(RDBU) - 1), shade] for i, shade in enumerate(RDBU)]
    trace = {
        "type": "heatmap",
        "z": [numbers(row) for row in values],
        "x": [str(value) for value in x],
        "y": list(range(len(y))),
        "text": hover,
        "hovertemplate": "%{text}<br><b>%{z:+.3f}</b><extra></extra>",
        "colorscale": colours,
        "zmin": -limit,
        "zmid": 0,
        "zmax": limit,
        "showscale": False,
        "xgap": 1,
        "ygap": 1,
        "hoverongaps": False,
    }
    every = max(1, -(-len(y) // 16))
    ticks = list(range(0, len(y), every))
    y_axis = {"tickvals": ticks, "ticktext": [y[i] for i in ticks], "title": {"text": axes[1]}, "showgrid": False}
    x_axis = {"type": "category", "title": {"text": axes[0]}, "showgrid": False, "nticks": 12, "tickangle": 0}
    return _chart(title, [trace], 84 + row_height * len(y), xaxis=x_axis, yaxis={**y_axis, "zeroline": False})


def patching_charts(cells: Table, gaps: Table, readers: Sequence[str]) -> dict[str, Any]:
    """Maps of layer x role of the step for one variant: readers, then `gaps` to the first; and the limit."""
    roles = [role for role in views.ROLES if (cells["role"] == role).any()]
    layers = sorted(cells["layer"].unique())
    sites = cells.groupby("layer")["site"].first()
    shown = [(f"reader {reader}", cells[cells["reader"] == reader]) for reader in views.present(readers, cells)]
    shown += [(f"{b} − {a}", gaps[gaps["reader"] == b]) for b, a in views.differences(readers, cells)]
    limit = limit_of(np.concatenate([one["effect"].to_numpy(float) for _, one in shown]))
    charts = []
    for title, one in shown:
        of = {(row["role"], row["layer"]): row for row in one.to_dict("records")}
        hover = [[_hover_of(role, str(sites[layer]), of.get((role, layer))) for layer in layers] for role in roles]
        values = np.array([[of.get((role, layer), {}).get("effect", np.nan) for layer in layers] for role in roles])
        charts.append(heatmap(title, values, layers, roles, limit, hover, axes=("layer", "")))
        charts[-1]["layout"]["yaxis"]["autorange"] = "reversed"
    return {"charts": charts, "limit": limit}


def _hover_of(role: str, site: str, row: dict[str, Any] | None) -> str:
    lines = [role, label(site)]
    if row is not None and np.isfinite(row["low"]):
        lines.append(f"95% [{row['low']:+.3f}, {row['high']:+.3f}], {row['n']} problems")
    if row is not None and np.isfinite(row.get("recovered", np.nan)):
        lines.append(f"recovered {row['recovered']:.0%}")
    return "<br>".join(lines)


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
            charts.append(_chart(title, traces, 320, xaxis=x, yaxis=y))
    return charts


def trace_charts(decided: Table, readers: Sequence[str]) -> list[dict[str, Any]]:
    """Maps of kept part of the chain x layer, one a reader: probability of the answer's first token by the lens."""
    charts = []
    for reader in views.present(readers, decided):
        wide = decided[decided["reader"] == reader].pivot(index="x", columns="layer", values="value")
        kept = [f"{x:.2f}" for x in wide.index]
        hover = [[f"{x} of the chain kept<br>layer {layer}" for layer in wide.columns] for x in kept]
        axes = ("layer", "part of the chain kept")
        charts.append(
            heatmap(f"reader {reader}", wide.to_numpy(float), list(wide.columns), kept, 1.0, hover, axes=axes)
        )
    return charts


def _means(
    rows: np.ndarray, columns: np.ndarray, values: np.ndarray, shape: tuple[int, int]
) -> Float[np.ndarray, "row column"]:
    """Mean of `values` in each cell of a grid; NaN where there is none."""
    total, count = np.zeros(shape), np.zeros(shape)
    np.add.at(total, (rows, columns), values)
    np.add.at(count, (rows, columns), 1)
    return np.divide(total, count, out=np.full(shape, np.nan), where=count > 0)


def chain_charts(cells: Table, chain: dict[str, Any], readers: Sequence[str]) -> dict[str, Any]:
    """Maps of layer x step of one chain and variant, one a reader, and the limit; hover shows site and step text."""
    layer, step, of_reader = (cells[name].to_numpy() for name in ("layer", "step", "reader"))
    values = cells["effect"].to_numpy(float)
    layers, first = np.unique(layer.astype(int), return_index=True)
    sites = cells["site"].to_numpy()[first]
    names = [_step_name(chain, j) for j in range(len(chain["steps"]))]
    hover = [[f"{label(text)}<br>{label(str(site))}" for site in sites] for text in chain["steps"]]
    limit = limit_of(values)
    charts = []
    for reader in readers:
        own = of_reader == reader
        if own.any():
            columns = np.searchsorted(layers, layer[own].astype(int))
            wide = _means(step[own].astype(int), columns, values[own], (len(names), len(layers)))
            chart = heatmap(f"reader {reader}", wide, layers.tolist(), names, limit, hover, axes=("layer", "step"))
            chart["layout"]["yaxis"]["autorange"] = "reversed"
            charts.append(chart)
    return {"charts": charts, "limit": limit}


def heads_by_step_charts(heads: Table, chain: dict[str, Any], readers: Sequence[str]) -> dict[str, Any]:
    """Maps of head x step of one chain, one a reader: direct logit contribution of the MOST_HEADS heads that carry the
    most from any step, of any reader; and the limit."""
    places, row = np.unique(heads[["layer", "head"]].to_numpy(int), axis=0, return_inverse=True)
    step, of_reader = heads["step"].to_numpy(int), heads["reader"].to_numpy()
    shape = len(places), len(chain["steps"])
    shown = views.present(readers, heads)
    wide = {}
    for reader in shown:
        own = of_reader == reader
        wide[reader] = _means(row[own], step[own], heads["value"].to_numpy(float)[own], shape)
    size = np.nanmax([np.nanmax(np.abs(one), axis=1) for one in wide.values()], axis=0)
    chosen = np.sort(np.argsort(-size, kind="stable")[:MOST_HEADS])
    names = [f"layer {layer}, head {head}" for layer, head in places[chosen]]
    hover = [[f"{name}<br>{label(text)}" for text in chain["steps"]] for name in names]
    limit = limit_of(np.concatenate([one[chosen].ravel() for one in wide.values()]))
    marks = [_step_name(chain, j) for j in range(shape[1])]
    charts = []
    for reader in shown:
        title, values = f"reader {reader}", wide[reader][chosen]
        charts.append(heatmap(title, values, marks, names, limit, hover, row_height=22, axes=("step", "")))
        charts[-1]["layout"]["yaxis"]["autorange"] = "reversed"
    return {"charts": charts, "limit": limit}


def _step_name(chain: dict[str, Any], step: int) -> str:
    return f"{step + 1}{' ●' if step == chain.get('true_step') else ''}"


def levels_chart(estimates: Sequence[Estimate], readers: Sequence[str], title: str, unit: str) -> dict[str, Any]:
    """One number of every reader with its interval, a row a reader and author."""
    shades = [colour(readers, e.arm.split("/")[0]) for e in estimates]
    values, lows, highs = (numbers(getattr(e, name) for e in estimates) for name in ("value", "ci_low", "ci_high"))
    above = [None if v is None or h is None else h - v for v, h in zip(values, highs, strict=True)]
    below = [None if v is None or low is None else v - low for v, low in zip(values, lows, strict=True)]
    trace = {
        "mode": "markers",
        "x": values,
        "y": [label(e.arm.replace("/", " reads ")) for e in estimates],
        "marker": {"color": shades, "size": 9},
        "error_x": {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "color": "#777777"},
        "customdata": [list(row) for row in zip(lows, highs, (e.n_problems for e in estimates), strict=True)],
        "hovertemplate": "%{y}: %{x:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}], %{customdata[2]} problems"
        "<extra></extra>",
        "showlegend": False,
    }
    x = {"title": {"text": unit}, "zeroline": True}
    return _chart(title, [trace], 110 + 34 * len(estimates), xaxis=x, yaxis={"autorange": "reversed"})


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
    return _chart("", data, 360, boxmode="group", xaxis=x, yaxis=y)


def attribution_charts(heads: Table, readers: Sequence[str]) -> dict[str, Any]:
    """Maps of layer x head, one a reader, and the limit."""
    layers, columns = sorted(heads["layer"].unique()), sorted(heads["head"].unique())
    limit = limit_of(heads["value"])
    hover = [[f"layer {layer}, head {head}" for head in columns] for layer in layers]
    charts = []
    for reader in readers:
        one = heads[heads["reader"] == reader]
        if len(one):
            wide = one.pivot_table(index="layer", columns="head", values="value").reindex(layers, columns=columns)
            rows = [str(layer) for layer in layers]
            height = 26 if len(layers) <= 12 else 11
            axes = ("head", "layer")
            values = wide.to_numpy(float)
            chart = heatmap(f"reader {reader}", values, columns, rows, limit, hover, row_height=height, axes=axes)
            charts.append(chart)
    return {"charts": charts, "limit": limit}


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
        trace = {"mode": "markers", "x": numbers(one["mistake"]), "y": numbers(one["knockout"]), "name": label(reader)}
        hover = "%{text}<br>mistake %{x:.2f}, knockout %{y:.2f}<extra>" + label(reader) + "</extra>"
        links = [str(chain) for chain in one["chain_id"]]
        data.append({**trace, "marker": marker, "text": names, "customdata": links, "hovertemplate": hover})
    x = {"title": {"text": "behaviour: mistake in the step<br>(total variation)"}}
    y = {"title": {"text": "mechanism: knockout (probability lost)"}}
    return _chart("", data, 420, xaxis=x, yaxis=y)
