"""RUN/figures: the run's pictures for a paper, by matplotlib, from Records and Estimates alone.

1. curves: share of unchanged answers over the fraction of the chain kept (early termination, filler, paraphrase).
2. patching: layer x role-of-step effect per reader and each difference; patching_chain_*: layer x step of one chain.
3. forest: paired differences of the primary endpoints. 4. conflict: whose answer is given, stacked.
5. bridge: behaviour against mechanism, one point a step. 6. knockout: by role of the step.
7. attribution: head x layer map of the direct logit contribution of the true step.
8. decision_trace: layer x kept part of the chain, probability of the answer by the logit lens.
9. patching_heads_*, patching_tokens_*, knockout_matrix_*: maps of one chain (chain_figures.py).
A picture is drawn only where its records exist.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from . import views
from .chain_figures import chain_figure, heads_figure, matrix_figure, tokens_figure
from .figure_style import (
    PAPER_WIDTH,
    STYLE,
    colour_of,
    draw_map,
    draw_scale,
    drawable,
    file_name,
    label_ticks,
    marker_of,
    save_figure,
    title_panels,
)
from .markup import limit_of
from .outcomes import Table
from .records import RunDirectory

CONFLICT_COLOURS = {"p_chain": "#5A8FC7", "p_question": "#EBBE4D", "p_other": "#B5B5B5"}
CONFLICT_LABELS = {"p_chain": "the chain's answer", "p_question": "the question's answer", "p_other": "another answer"}
CURVE_LABELS = {"early_termination": "Early termination", "filler": "Filler", "paraphrase": "Paraphrase"}
CURVE_Y = "answers unchanged (share)"
ROLE_COLOURS = {"true step": "#333333", "all steps": "#333333", "other steps": "#8C8C8C", "random": "#D9D9D9"}
MAX_CHAIN_MAPS = 3
MAX_NAMED = 4
"""Ringed points of a panel of the bridge that are named."""
NAME_ROW = 0.055
COVER = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}


def draw_figures(run: RunDirectory) -> list[Path]:
    """Write every figure the run has records for, as PNG and PDF; returns the paths in the order drawn."""
    records, chains = run.read_records(), run.read_chains()
    drawn: dict[str, list[Path]] = {}
    with matplotlib.rc_context(STYLE):
        for name, figure in _figures(run, records, chains):
            stem = file_name(name)
            stem = stem if stem not in drawn else f"{stem}_{len(drawn)}"
            drawn[stem] = save_figure(figure, run.figures / stem)
    return [path for paths in drawn.values() for path in paths]


def _figures(run: RunDirectory, records: Table, chains: list[dict[str, Any]]) -> Iterator[tuple[str, Figure]]:
    manifest = run.read_manifest()
    config, apart = manifest.get("config") or {}, views.disagreements(manifest)
    records, chains = views.one_author(records, chains, config)
    apart = apart[apart["chain_id"].isin([chain["chain_id"] for chain in chains])]
    readers = views.readers_of(config, records)
    if len(curves := views.curves(records, chains)):
        yield "curves", curve_figure(curves, readers)
    if len(decided := views.trace(records, chains)):
        yield "decision_trace", trace_figure(decided, readers)
    if len(cells := views.aligned_patches(records, chains)):
        for variant, of_variant in cells.groupby("variant"):
            yield f"patching_{variant}", patching_figure(of_variant, readers)
    patched = views.patches(records)
    for chain in _chains_to_draw(patched["chain_id"], chains, apart):
        cells = patched[patched["chain_id"] == chain["chain_id"]]
        cells = cells[cells["variant"] == views.main_patch(cells["variant"])]
        yield f"patching_chain_{chain['problem_id']}", chain_figure(cells, chain, readers)
    single = records[(records["measure"] == "patching") & (records["head"].notna() | records["position"].notna())]
    for chain in _chains_to_draw(single["chain_id"], chains, apart):
        for name, draw, cells in views.chain_maps(records, chain):
            figure = heads_figure if draw == "heads" else tokens_figure
            yield f"patching_{draw}_{chain['problem_id']}_{name}", figure(cells, chain, readers, name)
    matrices = {chain["chain_id"]: views.knockout_matrix(records, chain) for chain in chains}
    whole = [chain for chain in chains if (matrices[chain["chain_id"]]["row"] < len(chain["steps"])).any()]
    for chain in whole[:MAX_CHAIN_MAPS]:
        yield f"knockout_matrix_{chain['problem_id']}", matrix_figure(matrices[chain["chain_id"]], chain, readers)
    if (run.path / "estimates.parquet").is_file():
        found = views.primary_differences(run.read_estimates(), config, readers)
        if differences := [estimate for estimate in found if np.isfinite(estimate.value)]:
            yield "forest", forest_figure(differences, readers)
    if len(triple := views.conflict(records)):
        yield "conflict", conflict_figure(triple, readers)
    if len(points := views.bridge(records)):
        yield "bridge", bridge_figure(points, apart, readers)
    if len(losses := views.knockout(records, chains)):
        yield "knockout", knockout_figure(losses, readers)
    if len(layers := views.cross_model(records)):
        named = [reader["name"] for reader in config.get("readers") or []] or readers
        yield "cross_model", cross_model_figure(layers, named)
    if len(heads := views.attribution(records, chains)):
        yield "attribution", attribution_figure(heads, readers)


def _chains_to_draw(measured: Any, chains: list[dict[str, Any]], apart: Table) -> list[dict[str, Any]]:
    """Of the chains `measured`, those where behaviour and mechanism disagree most, then the first ones, MAX_CHAIN_MAPS
    in all."""
    patched = set(measured)
    first = [*apart["chain_id"], *(chain["chain_id"] for chain in chains)]
    order = [chain_id for chain_id in dict.fromkeys(first) if chain_id in patched]
    by_id = {chain["chain_id"]: chain for chain in chains}
    return [by_id[chain_id] for chain_id in order[:MAX_CHAIN_MAPS] if chain_id in by_id]


def curve_figure(curves: Table, readers: list[str]) -> Figure:
    """One panel a test: share of unchanged answers over the fraction kept, with bands, one line a reader."""
    measures = [m for m in views.CURVES if (curves["measure"] == m).any()]
    figure = Figure(figsize=(PAPER_WIDTH, 2.6))
    axes = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axis, measure in zip(axes, measures, strict=True):
        for reader in readers:
            one = curves[(curves["measure"] == measure) & (curves["reader"] == reader)]
            colour = colour_of(readers, reader)
            axis.plot(one["x"], one["value"], color=colour, marker=marker_of(readers, reader), label=drawable(reader))
            axis.fill_between(one["x"], one["low"], one["high"], color=colour, alpha=0.13, linewidth=0)
        kept = "kept verbatim" if measure == "paraphrase" else "of chain kept"
        axis.set(title=CURVE_LABELS[measure], xlabel=f"fraction {kept}", xlim=(-0.03, 1.03), ylim=(-0.03, 1.05))
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
        axis.grid(axis="y", color="#E6E6E6", linewidth=0.6)
    axes[0].set_ylabel(CURVE_Y)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(readers), title="reader", title_fontsize=8)
    return figure


def patching_figure(cells: Table, readers: list[str]) -> Figure:
    """Layer x role-of-step effect in logits: readers above, differences to the first below; one colour scale."""
    roles = [role for role in views.ROLES if (cells["role"] == role).any()]
    layers = sorted(cells["layer"].unique())
    wide = cells.pivot_table(index=["reader", "role"], columns="layer", values="effect").reindex(columns=layers)
    maps = {
        reader: wide.reindex([(reader, role) for role in roles]).to_numpy(float)
        for reader in views.present(readers, cells)
    }
    gaps = {(a, b): maps[a] - maps[b] for a, b in views.differences(readers, cells)}
    limit = limit_of(np.concatenate([*maps.values(), *gaps.values()]).ravel())
    rows = 2 if gaps else 1
    figure = Figure(figsize=(PAPER_WIDTH, 0.75 + rows * (0.5 + 0.3 * len(roles))))
    axes = figure.subplots(rows, len(maps), squeeze=False)
    for axis, reader in zip(axes[0], maps, strict=True):
        draw_map(axis, maps[reader], limit)
    title_panels(figure, axes[0], [f"reader {reader}" for reader in maps])
    for axis, (a, b) in zip(axes[-1][1:], gaps, strict=True):
        draw_map(axis, gaps[a, b], limit)
        axis.set_xlabel("layer of the patch")
    for axis in axes.ravel():
        label_ticks(axis, "x", layers, most=8)
        axis.set_yticks([])
    for axis in (axes[0][0], *axes[1:, 1:2].ravel()):
        label_ticks(axis, "y", roles)
    if gaps:
        axes[1][0].set_visible(False)
        title_panels(figure, axes[1], ["", *(f"{a} − {b}" for a, b in gaps)])
    axes[0][0].set_xlabel("layer of the patch")
    variant = cells["variant"].iloc[0]
    draw_scale(figure, axes.ravel(), limit, f"Δ logit difference\n({drawable(variant)}, logits)")
    return figure


def trace_figure(decided: Table, readers: list[str]) -> Figure:
    """Layer x kept part of the chain: where the logit lens reads the answer's first visible token."""
    shown = views.present(readers, decided)
    figure = Figure(figsize=(PAPER_WIDTH, 2.6))
    axes = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for axis, reader in zip(axes, shown, strict=True):
        wide = decided[decided["reader"] == reader].pivot(index="x", columns="layer", values="value")
        axis.pcolormesh(wide.to_numpy(float), cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=0.4)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
        label_ticks(axis, "x", list(wide.columns), most=8)
        label_ticks(axis, "y", [f"{x:.2f}".replace("0.", ".") for x in wide.index], most=8)
        axis.set_xlabel("layer read\nby the logit lens")
    title_panels(figure, axes, [f"reader {reader}" for reader in shown])
    axes[0].set_ylabel("part of the chain kept")
    colours = ScalarMappable(Normalize(0, 1), "Blues")
    figure.colorbar(colours, ax=list(axes), label="p(answer's first token)", shrink=0.9, aspect=14)
    return figure


def cross_model_figure(cells: Table, readers: list[str]) -> Figure:
    """P(chain's answer) under conflict with one layer of the other model, at the chain's rows or the cue's: a row of
    panels a tuned reader, a panel a direction; dashes are the two models as they are."""
    tuned = views.present(readers, cells)
    names = {"base": readers[0], "tuned": ""}
    figure = Figure(figsize=(PAPER_WIDTH, 0.7 + 1.9 * len(tuned)))
    axes = figure.subplots(len(tuned), 2, squeeze=False, sharey=True)
    for row, reader in zip(axes, tuned, strict=True):
        names["tuned"] = reader
        of_reader = cells[cells["reader"] == reader]
        for axis, (into, donor) in zip(row, (("tuned", "base"), ("base", "tuned")), strict=True):
            for part, colour in (("chain_rows", "#0072B2"), ("cue_rows", "#D55E00")):
                one = of_reader[(of_reader["into"] == into) & (of_reader["rows"] == part)].sort_values("layer")
                x, value, low, high = (one[name].to_numpy(float) for name in ("layer", "value", "low", "high"))
                axis.plot(x, value, color=colour, label=part.replace("_", " "))
                axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            for model in (into, donor):
                own = of_reader[(of_reader["into"] == model) & (of_reader["rows"] == "own")]["value"].to_numpy(float)
                for value in own:
                    axis.axhline(value, color="#555555", linestyle="--", linewidth=0.8)
                    axis.annotate(drawable(names[model]), (1.01, value), xycoords=("axes fraction", "data"), fontsize=7)
            axis.set(xlabel="layer exchanged", ylim=(-0.02, 1.02))
        pairs = ((readers[0], reader), (reader, readers[0]))
        title_panels(figure, row, [f"one layer of {donor} in {into}" for donor, into in pairs])
        row[0].set_ylabel("P(chain's answer)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def forest_figure(differences: list[Any], readers: list[str]) -> Figure:
    """Paired differences with 95% intervals, grouped by endpoint."""
    names = list(dict.fromkeys(estimate.name for estimate in differences))
    arms = list(dict.fromkeys(estimate.arm for estimate in differences))
    figure = Figure(figsize=(PAPER_WIDTH, 0.9 + 0.26 * len(names) * (len(arms) + 0.6)))
    axis = figure.subplots()
    for estimate in differences:
        reader = views.tuned_reader(estimate.arm, readers) or estimate.arm
        y = names.index(estimate.name) * (len(arms) + 0.6) + arms.index(estimate.arm)
        colour = colour_of(readers, reader)
        axis.plot([estimate.ci_low, estimate.ci_high], [y, y], color=colour)
        axis.plot(estimate.value, y, marker=marker_of(readers, reader), color=colour)
        interval = f"{drawable(estimate.arm)}  {estimate.signed}"
        axis.annotate(interval, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=7)
    axis.axvline(0, color="#555555", linewidth=0.8, zorder=0)
    centres = [i * (len(arms) + 0.6) + (len(arms) - 1) / 2 for i in range(len(names))]
    axis.set_yticks(centres, [textwrap.fill(drawable(name.split(" | ")[0]).replace("/", " / "), 34) for name in names])
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.set_xlabel("paired difference with 95% interval (problems are the units)")
    axis.grid(axis="x", color="#E6E6E6", linewidth=0.6)
    return figure


def conflict_figure(triple: Table, readers: list[str]) -> Figure:
    """Whose answer is given when question and chain disagree: one panel a record variant, one bar a reader."""
    readers = views.present(readers, triple)
    variants = sorted(triple["variant"].unique())
    figure = Figure(figsize=(PAPER_WIDTH, 0.95 + 0.3 * len(readers)))
    axes = figure.subplots(1, len(variants), sharey=True, squeeze=False)[0]
    for axis, variant in zip(axes, variants, strict=True):
        one = triple[triple["variant"] == variant].set_index("reader").reindex(readers)
        left = np.zeros(len(readers))
        for metric, colour in CONFLICT_COLOURS.items():
            width = one[metric].to_numpy(float)
            axis.barh(range(len(readers)), width, left=left, color=colour, height=0.7, label=CONFLICT_LABELS[metric])
            for y, (start, size) in enumerate(zip(left, width, strict=True)):
                if size >= 0.15:
                    axis.text(start + size / 2, y, f"{size:.2f}", ha="center", va="center", fontsize=7)
            left = left + np.nan_to_num(width)
        axis.set(xlim=(0, 1), xlabel="probability")
        axis.set_xticks([0, 0.5, 1], ["0", "½", "1"])
    title_panels(figure, axes, [variant.replace("_", " ") for variant in variants])
    axes[0].set_yticks(range(len(readers)), [f"reader {drawable(reader)}" for reader in readers])
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def bridge_figure(points: Table, disagreements: Table, readers: list[str]) -> Figure:
    """Behaviour (mistake) against mechanism (knockout), one point a step; disagreeing chains are ringed and named."""
    shown = views.present(readers, points)
    apart = disagreements[disagreements["mechanism"] == "knockout"]
    rings = apart.merge(
        points,
        left_on=["reader", "chain_id", "step_behaviour"],
        right_on=["reader", "chain_id", "step"],
        suffixes=("", "_point"),
    )
    of_reader = {reader: rings[rings["reader"] == reader] for reader in shown}
    n_rows = 1 + min(MAX_NAMED, max(len(one) for one in of_reader.values()))
    figure = Figure(figsize=(PAPER_WIDTH, 2.7 + 0.12 * n_rows))
    axes = figure.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0]
    for axis, (reader, ringed) in zip(axes, of_reader.items(), strict=True):
        one = points[points["reader"] == reader]
        axis.scatter(one["mistake"], one["knockout"], s=14, color=colour_of(readers, reader), alpha=0.6, linewidths=0)
        axis.scatter(
            ringed["mistake"], ringed["knockout"], s=42, facecolors="none", edgecolors="#222222", linewidths=0.8
        )
        _name_rings(axis, ringed)
        axis.axhline(0, color="#BBBBBB", linewidth=0.6, zorder=0)
        axis.set_xlim(-0.04, 1.04)
        axis.set_xlabel("behaviour: mistake in the step\n(total variation)" if len(shown) < 4 else "behaviour")
    title_panels(figure, axes, [f"reader {reader}" for reader in shown])
    low, high = points["knockout"].min(), points["knockout"].max()
    span = max(high - low, 0.1)
    axes[0].set_yticks(np.linspace(-1, 1, 11))
    axes[0].set_ylim(low - 0.06 * span, low + 1.06 * span / (0.98 - NAME_ROW * n_rows))
    axes[0].set_ylabel("mechanism: knockout\n(probability lost)")
    return figure


def _name_rings(axis: Axes, ringed: Table) -> None:
    """Say above all points how many are ringed, and name the first ones, each at the end of a line that names cover."""
    place: dict[str, Any] = {"textcoords": "axes fraction", "fontsize": 6.5, "va": "top"}
    unnamed = f", {len(ringed) - MAX_NAMED} not named" if len(ringed) > MAX_NAMED else ""
    top = (0.03, 0.98)
    axis.annotate(f"{len(ringed)} disagree{unnamed}", top, top, xycoords="axes fraction", **place)
    first = ringed.head(MAX_NAMED).sort_values("mistake", ascending=False)
    for row, (problem, x, y) in enumerate(zip(first["problem_id"], first["mistake"], first["knockout"], strict=True)):
        at, name = (0.45, 0.98 - NAME_ROW * (row + 1)), textwrap.shorten(drawable(problem), 14, placeholder="…")
        line = {"arrowstyle": "-", "color": "#AAAAAA", "linewidth": 0.5, "relpos": (1, 0.5), "shrinkA": 0}
        axis.annotate(name, (x, y), at, alpha=0, arrowprops=line, ha="right", zorder=2, **place)
        axis.annotate(name, at, at, xycoords="axes fraction", ha="right", bbox=COVER, zorder=5, **place)


def knockout_figure(losses: Table, readers: list[str]) -> Figure:
    """Probability the answer loses when its cue cannot see a step: every problem a dot, the mean with its interval."""
    shown = views.present(readers, losses)
    roles = [role for role in ROLE_COLOURS if (losses["role"] == role).any()]
    figure = Figure(figsize=(PAPER_WIDTH, 2.5))
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    rng = np.random.default_rng(0)
    for axis, reader in zip(axes, shown, strict=True):
        for x, role in enumerate(roles):
            values = losses[(losses["reader"] == reader) & (losses["role"] == role)]["value"].to_numpy(float)
            if not len(values):
                continue
            low, high = views.band(values)
            jitter = rng.uniform(-0.16, 0.16, len(values))
            axis.scatter(x + jitter, values, s=10, color=colour_of(readers, reader), alpha=0.35, linewidths=0)
            axis.plot([x, x], [low, high], color="#222222", linewidth=1.2)
            axis.plot(x, np.nanmean(values), marker="_", markersize=14, markeredgewidth=1.8, color="#222222")
        axis.axhline(0, color="#BBBBBB", linewidth=0.6, zorder=0)
        axis.set_xlim(-0.6, len(roles) - 0.4)
        axis.set_xticks(
            range(len(roles)), [role.replace(" ", "\n") if role != "random" else "random\npositions" for role in roles]
        )
    title_panels(figure, axes, [f"reader {reader}" for reader in shown])
    axes[0].set_ylabel("probability lost by the answer")
    return figure


def attribution_figure(heads: Table, readers: list[str]) -> Figure:
    """Head x layer map of the direct logit contribution of the true step, one panel a reader."""
    readers = views.present(readers, heads)
    layers, numbers = sorted(heads["layer"].unique()), sorted(heads["head"].unique())
    figure = Figure(figsize=(PAPER_WIDTH, 1.0 + min(4.5, max(1.2, 0.13 * len(layers)))))
    axes = figure.subplots(1, len(readers), sharey=True, squeeze=False)[0]
    limit = limit_of(heads["value"].to_numpy(float))
    for axis, reader in zip(axes, readers, strict=True):
        one = heads[heads["reader"] == reader]
        wide = one.pivot_table(index="layer", columns="head", values="value").reindex(index=layers, columns=numbers)
        draw_map(axis, wide.to_numpy(float), limit)
        axis.set_xlabel("head")
        label_ticks(axis, "x", numbers)
        label_ticks(axis, "y", layers)
    if axes[0].get_ylim()[0] > axes[0].get_ylim()[1]:
        axes[0].invert_yaxis()
    title_panels(figure, axes, [f"reader {reader}" for reader in readers])
    axes[0].set_ylabel("layer (first at the bottom)")
    draw_scale(figure, axes, limit, "direct contribution\nfrom the true step (logits)")
    return figure
