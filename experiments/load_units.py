"""A hundred thousand units through the study's own code with a reader that costs nothing: memory and time per unit.

    python experiments/load_units.py --units 100000 --out experiments/results/load_units.json

Problems, chains, units, donors, exclusions and files are real; what a model would give is made up, RECORDS numbers a
unit. Then the records are compacted into one file and asked a question through pyarrow.dataset.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pyarrow.compute as pc
import pyarrow.dataset

from cotfaith_mech import study, units
from cotfaith_mech.config import parse_config
from cotfaith_mech.measured import Measured
from cotfaith_mech.records import Record, RunDirectory

RECORDS = 40
BLOCKS = 10


class Stub:
    """A reader that is asked for nothing but how it shows a question."""

    info = SimpleNamespace(weights_hash="stub", text_hash="stub", device="cpu", n_layers=0, context=None)

    def render(self, question: str) -> str:
        return f"{question}\n"


def made_up(_: Any, reader: Any, trunk: Any, unit: Any, donors: Sequence[Any]) -> tuple[Measured, list[str]]:
    place: Any = {"problem_id": unit.problem_id, "chain_id": unit.chain.chain_id, "author": unit.chain.author}
    values = np.random.default_rng(int(unit.name[:8], 16)).random(RECORDS)
    records = [
        Record(**place, reader=reader.name, measure="knockout", variant="masked", step=i, metric="delta_p", value=value)
        for i, value in enumerate(values.tolist())
    ]
    measured = Measured(unit.chain, reader.name)
    measured.records += records
    measured.exclusions += [f"made up, beside {len(donors)} donors"] if unit.name.startswith("00") else []
    return measured, []


def run_units(n: int, folder: Path) -> dict[str, Any]:
    rows = (
        {"id": f"p{i}", "question": f"{i} + 1?", "answer": str(i + 1), "steps": ["So.", f" {i + 1}."]} for i in range(n)
    )
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = parse_config(
        {"readers": [{"name": "A", "model": "stub"}], "problems": str(folder / "rows.jsonl")}
        | {"tests": ["filler"], "crosscheck_cells": 0}
    )
    process, marks, started = psutil.Process(), [], time.perf_counter()

    def progress(items: Sequence[Any], label: str) -> Iterator[Any]:
        for number, item in enumerate(items):
            if label.startswith("reader") and number % max(1, n // BLOCKS) == 0:
                marks.append((time.perf_counter(), process.memory_info().rss / 1e6))
            yield item
        marks.append((time.perf_counter(), process.memory_info().rss / 1e6))

    run = study.measure_study(config, folder / "run", progress)
    ended = time.perf_counter()
    times, memory = np.array(marks[-BLOCKS - 1 :]).T
    resumed = time.perf_counter()
    study.measure_study(config, folder / "run")
    resumed = time.perf_counter() - resumed
    return {
        "units": run.n_units(),
        "records": n * RECORDS,
        "before_the_first_unit_s": round(float(times[0]) - started, 1),
        "ms_a_unit_by_block": np.round(np.diff(times) / (n / BLOCKS) * 1e3, 2).tolist(),
        "memory_mb_by_block": np.round(memory).tolist(),
        "memory_slope_bytes_a_unit": round(float(np.polyfit(np.linspace(0, n, len(memory)), memory * 1e6, 1)[0]), 1),
        "whole_s": round(ended - started, 1),
        "resumed_with_nothing_to_do_s": round(resumed, 1),
        **queried(run, folder),
    }


def queried(run: RunDirectory, folder: Path) -> dict[str, Any]:
    started = time.perf_counter()
    kept = run.compacted(folder / "kept")
    compacting, started = time.perf_counter() - started, time.perf_counter()
    table = pyarrow.dataset.dataset(kept.path / "records" / "all.parquet").to_table(
        columns=["value"], filter=pc.field("step") == 3
    )
    return {
        "compacting_s": round(compacting, 1),
        "compacted_mb": round((kept.path / "records" / "all.parquet").stat().st_size / 1e6, 1),
        "query_s": round(time.perf_counter() - started, 2),
        "query_rows": table.num_rows,
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=100_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, help="Where to write; a temporary folder if left out.")
    arguments = parser.parse_args()
    study.load = lambda *_: Stub()  # pyright: ignore[reportAttributeAccessIssue]
    study.info_of = lambda _: vars(Stub.info)
    units.open_chain = lambda config, model, chain, problem: SimpleNamespace(chain=chain)  # pyright: ignore
    units.measured_of = made_up
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = run_units(arguments.units, Path(folder))
    text = json.dumps(found, indent=1) + "\n"
    if arguments.out:
        arguments.out.write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
