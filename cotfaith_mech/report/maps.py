"""The report's heat maps as plotly.js values: patching, decision trace, one chain's layers and heads, attribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from .. import views
from ..markup import limit_of
from ..outcomes import Table
from .charts import chart_of, label, numbers

RDBU = (
    "#67001f", "#b2182b", "#d6604d", "#f4a582", "#fddbc7", "#f7f7f7", "#d1e5f0", "#92c5de", "#4393c3", "#2166ac",
    "#053061",
)  # fmt: skip
"""ColorBrewer's RdBu, red (negative) to blue (positive)."""
BLUES = (
    "#f7fbff", "#deebf7", "#c6dbef", "#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b",
)  # fmt: skip
"""ColorBrewer's Blues, for what has no sign."""
MOST_HEADS = 12


def heatmap(
    title: str,
    values: np.ndarray,
    x: Sequence[Any],
    y: Sequence[str],
    limit: float,
    hover: list[list[str]],
    *,
    unit: str = "logits",
    cells: dict[str, list[list[Any]]] | None = None,
    colours: Sequence[str] = RDBU,
    row_height: int = 30,
    axes: tuple[str, str] = ("", ""),
) -> dict[str, Any]:
    """A map of RDBU centred at 0 with limits ±`limit`, or of BLUES from 0 to `limit`.

    `hover[row][column]` is already safe text; `cells` are further columns of the saved table, in the shape of `values`.
    """
    trace = {
        "type": "heatmap",
        "z": [numbers(row) for row in values],
        "x": [str(value) for value in x],
        "y": list(range(len(y))),
        "text": hover,
        "hovertemplate": "%{text}<br><b>%{z:+.3f}</b><extra></extra>",
        "colorscale": [[i / (len(colours) - 1), shade] for i, shade in enumerate(colours)],
        "zmin": 0 if colours is BLUES else -limit,
        "zmax": limit,
        "showscale": False,
        "colorbar": {"title": {"text": unit, "side": "right"}, "thickness": 14},
        "xgap": 1,
        "ygap": 1,
        "hoverongaps": False,
    }
    every = max(1, -(-len(y) // 16))
    ticks = list(range(0, len(y), every))
    y_axis = {"tickvals": ticks, "ticktext": [y[i] for i in ticks], "title": {"text": axes[1]}, "showgrid": False}
    x_axis = {"type": "category", "title": {"text": axes[0]}, "showgrid": False, "nticks": 12, "tickangle": 0}
    chart = chart_of(title, [trace], 84 + row_height * len(y), xaxis=x_axis, yaxis={**y_axis, "zeroline": False})
    return {**chart, "unit": unit, "rows": list(y), "cells": cells or {}}


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
        grid = [[of.get((role, layer), {}) for layer in layers] for role in roles]
        values = np.array([[cell.get("effect", np.nan) for cell in row] for row in grid])
        names = {"ci_low": "low", "ci_high": "high", "n": "n", "recovered": "recovered"}
        more = {"site": [[label(str(sites[layer])) for layer in layers] for _ in roles]}
        more |= {name: [numbers(cell.get(key) for cell in row) for row in grid] for name, key in names.items()}
        charts.append(heatmap(title, values, layers, roles, limit, hover, cells=more, axes=("layer", "")))
        charts[-1]["layout"]["yaxis"]["autorange"] = "reversed"
    return {"charts": charts, "limit": limit}


def _hover_of(role: str, site: str, row: dict[str, Any] | None) -> str:
    lines = [role, label(site)]
    if row is not None and np.isfinite(row["low"]):
        lines.append(f"95% [{row['low']:+.3f}, {row['high']:+.3f}], {row['n']} problems")
    if row is not None and np.isfinite(row.get("recovered", np.nan)):
        lines.append(f"recovered {row['recovered']:.0%}")
    return "<br>".join(lines)


def trace_charts(decided: Table, readers: Sequence[str]) -> list[dict[str, Any]]:
    """Maps of kept part of the chain x layer, one a reader: probability of the answer's first token by the lens."""
    charts = []
    for reader in views.present(readers, decided):
        own = decided[decided["reader"] == reader]
        wide, n = (own.pivot(index="x", columns="layer", values=name) for name in ("value", "n"))
        layers, kept = list(wide.columns), [f"{x:.2f}" for x in wide.index]
        hover = [[f"{x} of the chain kept<br>layer {layer}" for layer in layers] for x in kept]
        chart = heatmap(
            f"reader {reader}",
            wide.to_numpy(float),
            layers,
            kept,
            1.0,
            hover,
            unit="probability",
            cells={"n": [numbers(row) for row in n.to_numpy(float)]},
            colours=BLUES,
            axes=("layer", "part of the chain kept"),
        )
        charts.append(chart)
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
    more = {
        "site": [[label(str(site)) for site in sites] for _ in names],
        "text": [[label(text)] * len(sites) for text in chain["steps"]],
    }
    limit = limit_of(values)
    charts = []
    for reader in readers:
        own = of_reader == reader
        if own.any():
            columns = np.searchsorted(layers, layer[own].astype(int))
            wide = _means(step[own].astype(int), columns, values[own], (len(names), len(layers)))
            title, axes = f"reader {reader}", ("layer", "step")
            chart = heatmap(title, wide, layers.tolist(), names, limit, hover, cells=more, axes=axes)
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
    more = {"text": [[label(text) for text in chain["steps"]] for _ in names]}
    limit = limit_of(np.concatenate([one[chosen].ravel() for one in wide.values()]))
    marks = [_step_name(chain, j) for j in range(shape[1])]
    charts = []
    for reader in shown:
        title, own = f"reader {reader}", wide[reader][chosen]
        charts.append(heatmap(title, own, marks, names, limit, hover, cells=more, row_height=22, axes=("step", "")))
        charts[-1]["layout"]["yaxis"]["autorange"] = "reversed"
    return {"charts": charts, "limit": limit}


def _step_name(chain: dict[str, Any], step: int) -> str:
    return f"{step + 1}{' ●' if step == chain.get('true_step') else ''}"


def attribution_charts(heads: Table, readers: Sequence[str]) -> dict[str, Any]:
    """Maps of layer x head, one a reader, and the limit."""
    layers, columns = sorted(heads["layer"].unique()), sorted(heads["head"].unique())
    limit = limit_of(heads["value"])
    hover = [[f"layer {layer}, head {head}" for head in columns] for layer in layers]
    charts = []
    for reader in readers:
        one = heads[heads["reader"] == reader]
        if len(one):
            values, n = (
                one.pivot_table(index="layer", columns="head", values=name)
                .reindex(layers, columns=columns)
                .to_numpy(float)
                for name in ("value", "n")
            )
            rows, height = [str(layer) for layer in layers], 26 if len(layers) <= 12 else 11
            more = {"n": [numbers(row) for row in n]}
            chart = heatmap(
                f"reader {reader}", values, columns, rows, limit, hover,
                cells=more, row_height=height, axes=("head", "layer"),
            )  # fmt: skip
            charts.append(chart)
    return {"charts": charts, "limit": limit}
