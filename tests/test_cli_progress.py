"""Time left and the problem at hand: in bars on a terminal, in a line now and then elsewhere, not at all when quiet."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from cotfaith_mech import progress
from cotfaith_mech.progress import Pace, in_words, name_of, shown


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_time_left_counts_what_took_its_time_and_not_what_was_on_disk() -> None:
    clock = Clock()
    pace = Pace(6, clock)
    assert pace.left() is None
    pace.advance()
    pace.advance()
    assert pace.left() is None
    for seconds in (10, 30):
        clock.now += seconds
        pace.advance()
    assert pace.left() == 2 * 20
    clock.now += 5
    assert pace.left() == 35
    clock.now += 100
    assert pace.left() == 20


def test_lines_come_at_most_every_thirty_seconds_and_name_the_problem(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    track = progress._lines(clock)
    items = [SimpleNamespace(problem_id=f"p{i}") for i in range(10)]
    for _ in track(items, "reader A"):
        clock.now += 12
    for _ in track(["only"], "load A"):
        clock.now += 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [
        "[0 s] reader A 1/10 p0",
        "[36 s] reader A 4/10 p3, about 84 s left",
        "[72 s] reader A 7/10 p6, about 48 s left",
        "[2 min] reader A 10/10 p9, about 12 s left",
        "[2 min] load A only",
    ]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (89.0, "89 s"), (91.0, "2 min"), (3600.0, "60 min"), (5400.0, "1 h 30 min"), (7260.0, "2 h 1 min")],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


@pytest.mark.parametrize(
    ("item", "name"),
    [
        ({"problem_id": "p1", "steps": []}, "p1"),
        (("unit", {"problem_id": "p2"}), "p2"),
        ("nnsight", "nnsight"),
        (in_words, "in words"),
        (SimpleNamespace(problem_id="p3"), "p3"),
        (3, ""),
    ],
)
def test_names_of_items(item: object, name: str) -> None:
    assert name_of(item) == name


def test_quiet_says_nothing_and_gives_every_item(capsys: pytest.CaptureFixture[str]) -> None:
    with shown(quiet=True) as track:
        assert list(track([1, 2], "x")) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_an_unfinished_study_names_its_unit_by_the_problem() -> None:
    from cotfaith_mech.chains import Chain
    from cotfaith_mech.paraphrasers import Paraphrases
    from cotfaith_mech.problems import Problem
    from cotfaith_mech.units import Unit

    chain = Chain("p7", "gold", "Q\n", (" A.",), "\nSo", "")
    unit = Unit("hash", Problem("p7", "Q", "1", "test"), chain, Paraphrases("none", (), {}))
    assert name_of(unit) == "p7"


def test_a_terminal_gets_a_bar_with_the_problem_which_is_gone_in_the_end() -> None:
    code = (
        "import time\nfrom cotfaith_mech.progress import shown\n"
        "with shown(False) as track:\n"
        "    for _ in track([{'problem_id': f'problem-{i}'} for i in range(4)], 'reader [A]'): time.sleep(0.3)\n"
        "print('done')"
    )
    leader, follower = pty.openpty()
    around = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    subprocess.run([sys.executable, "-c", code], stdout=follower, stderr=follower, check=True, env=around)
    os.close(follower)
    raw = b""
    while True:
        try:
            raw += os.read(leader, 65536)
        except OSError:  # the end of a terminal on Linux
            break
        if raw.endswith(b"done\r\n"):
            break
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw.decode())
    frames = [line for line in re.split(r"[\r\n]+", text) if "reader [A]" in line]
    assert frames
    assert max(map(len, frames)) <= 80
    assert any(re.search(r"[12]/4 .* [01] s left +problem-[23]", frame) for frame in frames), frames
    assert raw.rstrip().endswith(b"\x1b[2Kdone") or text.rstrip().endswith("done")


def test_a_problem_is_named_as_it_is_and_a_stage_in_words() -> None:
    class Unit:
        problem_id = "gsm8k_test_a-460"

    assert name_of(Unit()) == "gsm8k_test_a-460"
    assert name_of(Pace.advance) == "advance"
    assert name_of(name_of) == "name of"
