"""Kill a study at random moments, again and again, and see that its run equals one that was never killed.

    python experiments/kill_study.py --kills 50 --out kills.json

A child process measures the study, concludes and compacts it, and is killed (SIGKILL) at a random moment; the next
child resumes the directory. A run that ends is compared (records, chains, what was left out, estimates, conclusions,
the kept copy; row for row), and another is begun until there were enough kills. The models are the package's organisms,
the study real.
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

from cotfaith_mech.conclude import conclude
from cotfaith_mech.config import StudyConfig, parse_config
from cotfaith_mech.records import RunDirectory
from cotfaith_mech.study import measure_study

QUIETLY = os.WEXITED | os.WNOHANG | os.WNOWAIT
MOST_WHILE_MEASURING, MOST_AFTER = 12, 2
"""Kills of one run: behind these it is left to measure, and then to end."""


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
    manifest = run.read_manifest()
    concluded = [manifest[name] for name in ("checks", "counts", "conclusion", "verdicts", "disagreements", "pinned")]
    estimates = repr(run.read_estimates())
    return [run.read_records().to_json(), chains, run.read_exclusions(), run.read_unit_meta(), estimates, concluded]


def everything(config: StudyConfig, out: Path) -> list[float]:
    """Run the study in `out`/run and keep a copy; the seconds that measuring and the rest took."""
    started = time.perf_counter()
    run = measure_study(config, out / "run")
    measured = time.perf_counter()
    with run.writing():
        conclude(run)
        run.compacted(out / "kept")
    return [measured - started, time.perf_counter() - measured]


def contents(out: Path) -> list[Any]:
    run, kept = RunDirectory(out / "run"), RunDirectory(out / "kept")
    page = (run.path / "report.html").read_text()
    assert page.rstrip().endswith("</html>"), page[-20:]
    files = [sorted(str(path.relative_to(out)) for path in folder.rglob("*")) for folder in (run.figures, kept.path)]
    return [content(run), content(kept), files]


def child(config: StudyConfig, out: Path) -> int:
    """A forked process that runs the study; its number."""
    number = os.fork()
    if number:
        return number
    try:
        everything(config, out)
        os._exit(0)
    finally:
        traceback.print_exc()
        os._exit(1)


def finished(out: Path) -> int:
    """How many units are on disk."""
    return len(list((out / "run" / "records").glob("*.parquet")))


def kill_again_and_again(kills: int, seed: int, n_problems: int, folder: Path) -> dict[str, Any]:
    """How many kills were survived, at how many finished units each fell, and in how many runs."""
    rng, config = random.Random(seed), study(n_problems)
    everything(config, folder / "warm")
    measuring, concluding = everything(config, folder / "whole")
    whole, n_units, at_kill = contents(folder / "whole"), finished(folder / "whole"), []
    while sum(map(len, at_kill)) < kills:
        out, of_run = folder / f"run{len(at_kill)}", []
        at_kill.append(of_run)
        while True:
            process = child(config, out)
            if sum(map(len, at_kill)) < kills and of_run.count(n_units) < MOST_AFTER:
                if len(of_run) < MOST_WHILE_MEASURING and finished(out) < n_units:
                    time.sleep(measuring / 3 * rng.random() ** 2)
                else:
                    while finished(out) < n_units and os.waitid(os.P_PID, process, QUIETLY) is None:
                        time.sleep(0.01)
                    time.sleep(1.2 * concluding * rng.random())
                os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            if os.WIFEXITED(status):
                break
            of_run.append(finished(out))
        if status:
            raise SystemExit(f"A resumed run failed: {at_kill} units were finished at the kills.")
        if contents(out) != whole:
            raise SystemExit(
                f"A resumed run differs from the unkilled one: {at_kill} units were finished at the kills."
            )
    return {
        "kills": sum(map(len, at_kill)),
        "of_them_after_measuring": sum(of_run.count(n_units) for of_run in at_kill),
        "runs": len(at_kill),
        "units": n_units,
        "seconds_of_a_run": [round(measuring, 2), round(concluding, 2)],
        "units_finished_at_each_kill": at_kill,
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
