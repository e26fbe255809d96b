"""Kill a study at random moments, again and again, and see that its run equals one that was never killed.

    python experiments/kill_study.py --kills 50 --out kills.json

A child process measures the study and is killed (SIGKILL) after a random part of the time that a whole run takes; the
next child resumes the directory. A run that ends is compared (records, chains, what was left out, row for row), and
another is begun until there were enough kills. The models are the package's organisms, the study real.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from cotfaith_mech.config import StudyConfig, parse_config
from cotfaith_mech.records import RunDirectory
from cotfaith_mech.study import measure_study


def study(n_problems: int) -> StudyConfig:
    """Two readers of chains that one of them has written: every kind of writing occurs."""
    return parse_config(
        {
            "readers": [{"name": name, "model": "organism:mix_100"} for name in ("base", "tuned")],
            "problems": f"organism:mix_100:{n_problems}:7",
            "authors": ["supplied", "tuned"],
            "generation": {"max_new_tokens": 12},
            "tests": ["filler", "paraphrase", "conflict"],
            "draws": 2,
            "mechanisms": ["knockout"],
            "cross_model": "write_read",
            "crosscheck_cells": 0,
        }
    )


def content(run: RunDirectory) -> list[Any]:
    """What two runs of one study share, row for row."""
    chains = [json.dumps(row, sort_keys=True) for row in run.read_chains()]
    return [run.read_records().to_json(), chains, run.read_exclusions(), run.read_unit_meta()]


def child(config: StudyConfig, out: Path) -> int:
    """A forked process that measures the study; its number."""
    number = os.fork()
    if number:
        return number
    try:
        measure_study(config, out)
        os._exit(0)
    finally:
        traceback.print_exc()
        os._exit(1)


def kill_again_and_again(kills: int, seed: int, n_problems: int, folder: Path) -> dict[str, Any]:
    """How many kills were survived, where they fell, and in how many runs."""
    rng, config = random.Random(seed), study(n_problems)
    whole = content(measure_study(config, folder / "whole"))
    started = time.perf_counter()
    measure_study(config, folder / "timed")
    seconds = time.perf_counter() - started
    survived, runs, units_at_kill = 0, 0, []
    while survived < kills:
        out, ended = folder / f"run{runs}", False
        while not ended:
            process = child(config, out)
            time.sleep(rng.random() ** 2 * seconds / 3 if survived < kills else 1e-3)
            if survived < kills:
                os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            if os.WIFSIGNALED(status):
                survived += 1
                units_at_kill.append(len(list((out / "records").glob("*.parquet"))))
            elif os.WEXITSTATUS(status):
                raise SystemExit(f"A resumed run failed after {survived} kills.")
            else:
                ended = True
        runs += 1
        if content(RunDirectory(out)) != whole:
            raise SystemExit(f"Run {runs} differs from the unkilled one after {survived} kills.")
    return {
        "kills": survived,
        "runs": runs,
        "units": len(whole[3]),
        "seconds_of_a_run": round(seconds, 2),
        "units_finished_at_each_kill": units_at_kill,
        "equal": True,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--problems", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = kill_again_and_again(arguments.kills, arguments.seed, arguments.problems, Path(folder))
    text = json.dumps(found)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
