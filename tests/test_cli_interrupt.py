"""A study that is stopped, by Ctrl-C or by a cluster, ends cleanly, says how to resume, and does nothing twice."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest

from cotfaith_mech.config import load_config
from cotfaith_mech.interrupts import Interrupted, catching_signals, resumable
from cotfaith_mech.records import RunDirectory
from cotfaith_mech.study import measure_study

from .tiny_study import write_tiny_study

SLOWLY = """
import time
from cotfaith_mech import cli, records
written = records.RunDirectory.write_unit
def write_unit(run, *arguments):
    written(run, *arguments)
    print("UNIT", flush=True)
    time.sleep(0.3)
records.RunDirectory.write_unit = write_unit
cli.main()
"""
"""The command itself, which rests a while after every unit, so that a signal comes between two of them."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_study_resumes_to_the_same_table(tmp_path: Path, number: signal.Signals) -> None:
    study = write_tiny_study(tmp_path, 8, tests=["filler"], mechanisms=["knockout"])
    out = tmp_path / "a run"
    command = ["study", str(study), "--out", str(out), "--quiet"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline() == "UNIT\n"
    process.send_signal(number)
    rest, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    kept = {path: path.stat().st_mtime_ns for path in (out / "records").iterdir()}
    assert len(kept) == 3 + rest.count("UNIT") < 8
    [line] = errors.strip().splitlines()
    told = f"Stopped by {number.name}. {len(kept)} finished units are kept in {out}; to resume: cotfaith "
    assert line == told + shlex.join(command)
    if number == signal.SIGTERM:
        return

    again = shlex.split(line.partition("to resume: ")[2])
    resumed = subprocess.run(
        [sys.executable, "-m", "cotfaith_mech.cli", *again[1:]], capture_output=True, text=True, check=True
    )
    assert resumed.stdout.splitlines() == [str(out / "report.html")]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    whole = measure_study(load_config(study), tmp_path / "whole").read_records()
    pd.testing.assert_frame_equal(RunDirectory(out).read_records(), whole, check_exact=True)


def test_the_signals_are_the_callers_again_afterwards() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted) as stopped, catching_signals():
        signal.raise_signal(signal.SIGTERM)
    assert (stopped.value.code, stopped.value.told) == (143, "Stopped by SIGTERM.")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_signal_is_not_caught() -> None:
    with catching_signals():
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_another_thread_catches_none() -> None:
    seen = []

    def inside() -> None:
        with catching_signals():
            seen.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before]


def test_before_the_first_unit_none_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["anything", "test", "-r", "A=a b"])
    with pytest.raises(Interrupted) as stopped, resumable(tmp_path / "none"):
        raise Interrupted(signal.SIGINT)
    expected = f"0 finished units are kept in {tmp_path / 'none'}; to resume: cotfaith test -r 'A=a b'"
    assert stopped.value.told == f"Stopped by SIGINT. {expected}"


def test_a_command_without_units_says_that_it_was_stopped(tmp_path: Path) -> None:
    code = (
        "import signal, cotfaith_mech.doctor as doctor, cotfaith_mech.cli as cli\n"
        "doctor.examine = lambda progress: signal.raise_signal(signal.SIGINT)\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code, "doctor"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Stopped by SIGINT.\n")
