"""Ctrl-C and SIGTERM (what clusters send) end a command cleanly, and it says how to resume."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(SystemExit):
    """Ends the process through every `finally`, with 128 + the signal's number, as shells report it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.told = f"Stopped by {signal.Signals(number).name}."


@contextmanager
def catching_signals() -> Iterator[None]:
    """A signal raises Interrupted inside; a second one kills at once. Only a main thread can catch signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def stop(number: int, _: object) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        raise Interrupted(number)

    try:
        for number in SIGNALS:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """What is interrupted inside says which units are kept in the run directory `out`, and what resumes it."""
    try:
        yield
    except Interrupted as stopped:
        n_units = len(list((out / "records").glob("*.parquet")))
        command = shlex.join(["cotfaith", *sys.argv[1:]])
        stopped.told += (
            f" {n_units} finished {'unit is' if n_units == 1 else 'units are'} kept in {out}; to resume: {command}"
        )
        raise
