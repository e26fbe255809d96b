"""Maps of one chain, by matplotlib: layer x step, head x step, layer x token, step x step."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from . import views
from .figure_style import PAPER_WIDTH, draw_map, draw_scale, drawable, label_ticks, title_panels
from .markup import limit_of
from .outcomes import Table

MOST_HEADS = 28
"""Heads in a head x step map: those that move the answer most."""
MOST_STEPS = 60
"""Steps that are named in a map of a chain; of a longer one every n-th is, and the one the answer rests on."""


def chain_figure(cells: Table, chain: dict[str, Any], readers: list[str]) -> Figure:
    """Layer x step effect of one chain with the steps' own text, one panel a reader; a dot marks the true step."""
    readers = views.present(readers, cells)
    layers, steps = sorted(cells["layer"].unique()), list(range(len(chain["steps"])))
    named = _named(len(steps), chain.get("true_step"))
    figure = Figure(figsize=(PAPER_WIDTH, 1.2 + 0.36 * len(named)))
    axes = figure.subplots(1, len(readers), squeeze=False)[0]
    limit = limit_of(cells["effect"].to_numpy(float))
    for axis, reader in zip(axes, readers, strict=True):
        one = cells[cells["reader"] == reader]
        wide = one.pivot_table(index="step", columns="layer", values="effect").reindex(index=steps, columns=layers)
        draw_map(axis, wide.to_numpy(float), limit, lines=len(steps) <= MOST_STEPS)
        axis.set_xlabel("layer of the patch")
        label_ticks(axis, "x", layers, most=8)
        axis.set_yticks([])
    title_panels(figure, axes, [f"reader {reader}" for reader in readers], width=34)
    marks = ["● " if step == chain.get("true_step") else "" for step in named]
    texts = [textwrap.shorten(drawable(chain["steps"][step]), 78, placeholder=" …") for step in named]
    labels = [f"{mark}{textwrap.fill(text, 40)}" for mark, text in zip(marks, texts, strict=True)]
    axes[0].set_yticks([step + 0.5 for step in named], labels, fontsize=6.5)
    variant = cells["variant"].iloc[0]
    draw_scale(figure, axes, limit, f"Δ logit difference\n({variant}, logits)")
    figure.suptitle(
        f"Problem {drawable(chain['problem_id'])}: the chain's steps (● the step the answer rests on)", fontsize=8.5
    )
    return figure


def heads_figure(cells: Table, chain: dict[str, Any], readers: list[str], variant: str) -> Figure:
    """Step x head: what patching one head at one step does, a panel a reader, the heads that do most in any of them."""
    readers, n = views.present(readers, cells), len(chain["steps"])
    names = cells["layer"].astype(int).astype(str) + "." + cells["head"].astype(int).astype(str)
    cells = cells.assign(name=names)
    most = cells.assign(size=cells["effect"].abs()).groupby("name")["size"].max().nlargest(MOST_HEADS).index
    shown = sorted(most, key=lambda name: tuple(map(int, name.split("."))))
    figure = Figure(figsize=(PAPER_WIDTH, 0.9 + len(readers) * (0.45 + min(0.24 * n, 3.0))))
    axes = figure.subplots(len(readers), 1, squeeze=False, sharex=True)[:, 0]
    limit = limit_of(cells["effect"].to_numpy(float))
    for axis, reader in zip(axes, readers, strict=True):
        one = cells[cells["reader"] == reader]
        wide = one.pivot_table(index="step", columns="name", values="effect").reindex(index=range(n), columns=shown)
        draw_map(axis, wide.to_numpy(float), limit)
        axis.set(title=f"reader {drawable(reader)}", ylabel="step")
        label_ticks(axis, "y", [_marked(chain, step) for step in range(n)], most=30)
    axes[-1].set_xticks(np.arange(len(shown)) + 0.5, shown, rotation=90, fontsize=6.5)
    axes[-1].set_xlabel(f"layer.{'KV head' if 'kv_head' in variant else 'query head'}, the {len(shown)} that do most")
    draw_scale(figure, axes, limit, f"Δ logit difference\n({variant}, logits)")
    figure.suptitle(f"Problem {drawable(chain['problem_id'])}: single heads (● the answer's step)", fontsize=8.5)
    return figure


def tokens_figure(cells: Table, chain: dict[str, Any], readers: list[str], variant: str) -> Figure:
    """Layer x token of one chain, a panel a reader; lines part the steps, a dot marks the one the answer rests on."""
    readers = views.present(readers, cells)
    positions, layers = sorted(cells["position"].unique()), sorted(cells["layer"].unique())
    figure = Figure(figsize=(PAPER_WIDTH, 0.8 + len(readers) * (0.55 + min(2.6, 0.5 + 0.07 * len(layers)))))
    axes = figure.subplots(len(readers), 1, squeeze=False, sharex=True)[:, 0]
    limit = limit_of(cells["effect"].to_numpy(float))
    starts = cells.dropna(subset=["step"]).groupby("step")["position"].min()
    for axis, reader in zip(axes, readers, strict=True):
        one = cells[cells["reader"] == reader]
        wide = one.pivot_table(index="layer", columns="position", values="effect").reindex(layers, columns=positions)
        draw_map(axis, wide.to_numpy(float), limit, lines=False)
        axis.invert_yaxis()
        axis.set(title=f"reader {drawable(reader)}", ylabel="layer")
        label_ticks(axis, "y", layers, most=8)
        for at in starts:
            axis.axvline(positions.index(at), color="#444444", linewidth=0.6)
    word = "step " if len(starts) <= 8 else ""
    named = set(_named(len(chain["steps"]), chain.get("true_step")))
    marked = {positions.index(at): _marked(chain, int(step), word) for step, at in starts.items() if step in named}
    axes[-1].set_xticks(list(marked), list(marked.values()), ha="left")
    axes[-1].set_xlabel("token of the chain, by step")
    draw_scale(figure, axes, limit, f"Δ logit difference\n({variant}, logits)")
    figure.suptitle(f"Problem {drawable(chain['problem_id'])}: single tokens (● the answer's step)", fontsize=8.5)
    return figure


def matrix_figure(cells: Table, chain: dict[str, Any], readers: list[str]) -> Figure:
    """Step x step: probability the answer loses when one part of a chain cannot attend to a step, a panel a reader."""
    readers, n = views.present(readers, cells), len(chain["steps"])
    figure = Figure(figsize=(PAPER_WIDTH, 1.3 + min(0.3 * n, PAPER_WIDTH / len(readers))))
    axes = figure.subplots(1, len(readers), squeeze=False)[0]
    limit = limit_of(cells["value"].to_numpy(float))
    for axis, reader in zip(axes, readers, strict=True):
        wide = cells[cells["reader"] == reader].pivot_table(index="row", columns="step", values="value")
        draw_map(axis, wide.reindex(index=range(1, n + 1), columns=range(n)).to_numpy(float), limit)
        axis.set_xlabel("step that cannot be seen")
        label_ticks(axis, "x", [_marked(chain, step) for step in range(n)], most=10)
        axis.set_yticks([])
    title_panels(figure, axes, [f"reader {reader}" for reader in readers])
    label_ticks(axes[0], "y", [*(f"step {step + 1}" for step in range(1, n)), "answer"], most=40)
    axes[0].set_ylabel("what cannot see it")
    draw_scale(figure, axes, limit, "probability lost\n(masked)")
    figure.suptitle(
        f"Problem {drawable(chain['problem_id'])}: attention between steps (● the answer's step)", fontsize=8.5
    )
    return figure


def _named(n_steps: int, true_step: int | None) -> list[int]:
    """The steps that are named, MOST_STEPS at most."""
    every = max(1, -(-n_steps // MOST_STEPS))
    named = list(range(0, n_steps, every))
    if true_step is not None:
        named[true_step // every] = true_step
    return named


def _marked(chain: dict[str, Any], step: int, word: str = "") -> str:
    """A step's number for people, from 1 (records count from 0); a dot where the answer rests on it."""
    return f"{'● ' if step == chain.get('true_step') else ''}{word}{step + 1}"
