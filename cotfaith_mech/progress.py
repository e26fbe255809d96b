"""How far a command is, on stderr: bars on a terminal, elsewhere a line now and then, so that logs show life."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conclude import Progress

QUIET_SECONDS = 30.0
"""Least time between two lines under one label."""
SKIPPED = 0.05
"""Items done in less time (seconds) were on disk already and say nothing of how long the others take."""


class Pace:
    """Time left of `total` items, from the mean of those that took their time."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.clock = total, clock
        self.done, self.counted, self.spent = 0, 0, 0.0
        self.last = clock()

    def advance(self) -> None:
        now = self.clock()
        if now - self.last >= SKIPPED:
            self.counted, self.spent = self.counted + 1, self.spent + now - self.last
        self.done, self.last = self.done + 1, now

    def left(self) -> float | None:
        """Seconds, less what the item under way has taken; None before there is anything to go by."""
        if not self.counted:
            return None
        each = self.spent / self.counted
        return max(each * (self.total - self.done) - min(self.clock() - self.last, each), 0.0)


def in_words(seconds: float) -> str:
    """'40 s', '12 min', '3 h 20 min'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def name_of(item: Any) -> str:
    """What an item of work is about: its problem, the name of a stage, or a text as it stands."""
    if isinstance(item, str):
        return item
    if isinstance(item, tuple):
        return name_of(item[-1])
    if isinstance(item, Mapping):
        return str(item.get("problem_id", ""))
    if (problem_id := getattr(item, "problem_id", None)) is not None:
        return str(problem_id)
    return str(getattr(item, "__name__", "")).replace("_", " ").strip()


@contextmanager
def shown(quiet: bool) -> Iterator[Progress]:
    """Gives what shows progress over items under a label; with `quiet` nothing."""
    if quiet:
        yield lambda items, label: items
    elif sys.stderr.isatty():
        with _bars() as progress:
            yield progress
    else:
        yield _lines()


def _lines(clock: Callable[[], float] = time.monotonic) -> Progress:
    started = clock()

    def progress(items: Sequence[Any], label: str) -> Iterable[Any]:
        pace, last = Pace(len(items), clock), -QUIET_SECONDS
        for number, item in enumerate(items):
            now = clock()
            if now - last >= QUIET_SECONDS:
                last, left = now, pace.left()
                rest = "" if left is None else f", about {in_words(left)} left"
                name = f" {name}" if (name := name_of(item)) else ""
                at = f" {number + 1}/{len(items)}" if len(items) > 1 else ""
                print(f"[{in_words(now - started)}] {label}{at}{name}{rest}", file=sys.stderr, flush=True)
            yield item
            pace.advance()

    return progress


@contextmanager
def _bars() -> Iterator[Progress]:
    """One bar a label, gone when the command is done: time spent, time left, and the problem it is at."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars
    from rich.table import Column
    from rich.text import Text

    class Left(ProgressColumn):
        max_refresh = 0.5

        def render(self, task: Task) -> Text:
            left = task.fields["pace"].left()
            return Text("" if left is None or task.finished else f"{in_words(left)} left", "cyan")

    def fitting(**options: Any) -> Column:
        return Column(no_wrap=True, overflow="ellipsis", **options)

    columns = (
        TextColumn("{task.description}", table_column=fitting(max_width=24)),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        Left(table_column=fitting(min_width=10)),
        TextColumn("{task.fields[item]}", markup=False, table_column=fitting(max_width=16)),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:

        def progress(items: Sequence[Any], label: str) -> Iterable[Any]:
            pace = Pace(len(items))
            task = bars.add_task(label, total=len(items), pace=pace, item="")
            for item in items:
                bars.update(task, item=name_of(item))
                yield item
                pace.advance()
                bars.advance(task)
            bars.update(task, item="")

        yield progress
