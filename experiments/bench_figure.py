"""docs/bench.png from the committed measurements: python experiments/bench_figure.py [results/bench_cpu.json] [PNG]"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cotfaith_mech.figures import PAPER_WIDTH, READER_COLOURS, READER_MARKERS, STYLE

ROOT = Path(__file__).resolve().parents[1]
PANELS = {"patch_layer_token": "a  one position, every layer", "patch_layer_step": "b  one step, every layer"}
PEERS = {"transformer_lens": "TransformerLens", "nnsight": "nnsight", "plain_hooks": "plain hooks"}
SECONDS = (0.03, 0.1, 0.3, 1)


def main(source: str = "", target: str = "") -> None:
    rows = json.loads(Path(source or ROOT / "experiments" / "results" / "bench_cpu.json").read_text())["rows"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PAPER_WIDTH, 2.9))
        left, right = figure.subplots(1, 2, sharex=True, sharey=True)
        for axes, (name, title) in zip((left, right), PANELS.items(), strict=True):
            draw(axes, [row for row in rows if row["name"] == name], title)
        left.set_ylabel("seconds a cell")
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        figure.savefig(target or ROOT / "docs" / "bench.png")


def draw(axes: Axes, rows: list[dict[str, Any]], title: str) -> None:
    """Seconds a cell against chain length, both on logarithmic axes."""
    for number, (peer, label) in enumerate(PEERS.items(), 1):
        own = sorted((row for row in rows if row["peer"] == peer), key=lambda row: row["tokens"])
        line: dict[str, Any] = {"color": READER_COLOURS[number], "marker": READER_MARKERS[number]}
        axes.plot([r["tokens"] for r in own], [r["peer_cell_s"] for r in own], label=label, **line)
    ours = sorted((row for row in rows if row["peer"] == "transformer_lens"), key=lambda row: row["tokens"])
    lengths = [row["tokens"] for row in ours]
    line: dict[str, Any] = {"color": READER_COLOURS[0], "marker": READER_MARKERS[0]}
    axes.plot(lengths, [row["ours_cell_s"] for row in ours], label="this engine", **line)
    bound = [row["bound_s"] / row["cells"] for row in ours]
    axes.plot(lengths, bound, label="its arithmetic alone", color="#555555", linestyle="--")
    axes.set(title=title, xlabel="tokens of the chain", xscale="log", yscale="log")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_yticks(SECONDS, [f"{seconds:g}" for seconds in SECONDS])
    axes.minorticks_off()


if __name__ == "__main__":
    main(*sys.argv[1:])
