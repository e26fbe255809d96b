"""The summary fits one screen of 80 x 24; --json and --quiet say the same for machines, and nothing else."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cotfaith_mech import cli, study
from cotfaith_mech.compare import primary_name
from cotfaith_mech.config import PRIMARY
from cotfaith_mech.plan import Part, Plan
from cotfaith_mech.records import RunDirectory
from cotfaith_mech.summary import print_plan, print_summary

from .fake_run import CONCLUSION, write_fake_run
from .tiny_study import write_tiny_study


def screen(show: Callable[[Console], None]) -> list[str]:
    console = Console(file=StringIO(), width=80, force_terminal=False)
    show(console)
    return console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]


def finished_run(path: Path, **options: Any) -> RunDirectory:
    """The fake run as a concluded one, with the demo's outcomes and what its manifest has beside them."""
    run = write_fake_run(path, **options)
    counts = {"problems": 6, "units": 18, "records": 12345, "exclusions": 1}
    made = {"paraphraser": "rules", "valid": 300, "wanted": 320, "rejected": {"numbers differ": 20}}
    verdict = {"0.5": "load_bearing", "0.25": "load_bearing", "0.75": "undecided"}
    verdicts = [{"arm": arm, **verdict} for arm in "AB"]
    config = run.read_manifest()["config"] | {"primary": list(PRIMARY)}
    absent = [
        name for name in ("accuracy", *map(primary_name, PRIMARY)) if name not in {e.name for e in run.read_estimates()}
    ]
    model = [e for e in run.read_estimates() if e.name == primary_name(PRIMARY[0])]
    run.write_estimates([*run.read_estimates(), *(replace(e, name=name) for name in absent for e in model)])
    run.update_manifest(
        run.read_manifest() | {"config": config, "counts": counts, "paraphrases": made, "verdicts": verdicts}
    )
    return run


def test_the_summary_of_the_demo_fits_one_screen(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    lines = screen(lambda console: print_summary(console, run))
    assert len(lines) < 24, "\n".join(lines)
    assert max(map(len, lines[:-1])) <= 80
    shown = " ".join(" ".join(lines).split())
    assert all(sentence in shown for sentence in CONCLUSION)
    assert all(
        words in shown
        for words in ("same answer no chain", "knockout / true step / .72 .10 .69 -.62 [-.75, -.49]", ".80 [.67, .93]")
    )
    assert "12345 records, 1 exclusions, 3 checks" in shown
    assert lines[-1] == f"Report: {tmp_path / 'report.html'}"


def test_a_failed_check_stands_in_the_summary(tmp_path: Path) -> None:
    run = finished_run(tmp_path, checks_pass=False)
    assert any(
        "CHECK FAILED transformer_lens: 0.4 > 0.0001" in line for line in screen(lambda c: print_summary(c, run))
    )


def test_markup_in_names_stays_text(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    manifest = run.read_manifest()
    run.update_manifest(manifest | {"conclusion": ["[red]x[/red] [/nothing]"]})
    assert "[red]x[/red] [/nothing]" in screen(lambda console: print_summary(console, run))


def test_the_plan_fits_one_screen() -> None:
    records = {"attribution": 103776, "early_termination": 1680, "attribution_patching": 5, "knockout": 1728}
    part = Part("reader A", 16, 4, records, {"edited texts": 1704, "base runs": 2}, 1.02e13, 0, 610.0, 2.4)
    plan = Plan("runs/demo", 16, 16, 0, 1, {"too long": 1}, (part,) * 4, 2500.0, 2.4, ("It rests on this.",) * 4)
    lines = screen(lambda console: print_plan(console, plan))
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert lines[:2] == ["16 problems, 16 chains (0 to be written), 1 exclusions", "- left out, 1 x: too long"]
    shown = " ".join(" ".join(lines).split())
    assert "reader A 16 4 1,706 107,189 10.2 10 min 2.4" in shown
    assert "Forwards: edited texts 6,816, base runs 8" in shown
    assert "About 42 min in all, with up to 2.4 GB, into runs/demo" in shown


@pytest.fixture
def cotfaith(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """stdout and stderr of a command whose study is at once a finished run."""

    def run(*arguments: str) -> tuple[str, str]:
        monkeypatch.setattr(study, "run_study", lambda config, out, progress, shard: finished_run(Path(out)))
        monkeypatch.setattr(sys, "argv", ["cotfaith", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert not left.value.code
        return tuple(capsys.readouterr())

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    return run


def test_json_and_quiet_of_a_study(cotfaith: Any, tmp_path: Path) -> None:
    shown, errors = cotfaith("test", "-r", "A=x", "-p", "people:1", "-o", str(tmp_path / "one"), "--json")
    found = json.loads(shown)
    assert (found["run"], found["counts"]["records"], errors) == (str(tmp_path / "one"), 12345, "")
    assert {"name", "arm", "value", "ci_low"} <= set(found["estimates"][0])
    shown, errors = cotfaith("demo", "-o", str(tmp_path / "two"), "--quiet")
    assert (shown, errors) == (f"{tmp_path / 'two' / 'report.html'}\n", "")


def test_json_and_quiet_of_a_report(cotfaith: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cotfaith_mech import conclude

    monkeypatch.setattr(conclude, "conclude", lambda run, progress: run.path / "report.html")
    finished_run(tmp_path / "run")
    path = str(tmp_path / "run" / "report.html")
    shown, errors = cotfaith("report", str(tmp_path / "run"), "--json")
    assert (json.loads(shown), errors) == ({"report": path}, "")
    assert cotfaith("report", str(tmp_path / "run"), "--quiet") == (f"{path}\n", "")
    assert cotfaith("report", str(tmp_path / "run")) == (f"Report: {path}\n", "")


def test_a_dry_run_in_json_names_counts_time_and_memory(cotfaith: Any, tmp_path: Path) -> None:
    path = write_tiny_study(tmp_path, 2, tests=["filler"], mechanisms=["knockout"])
    out = tmp_path / "run"
    shown, errors = cotfaith("study", str(path), "-o", str(out), "--dry-run", "--json")
    plan = json.loads(shown)
    assert (plan["problems"], plan["chains"], plan["parts"][0]["units"], errors.count("Error")) == (2, 2, 2, 0)
    assert plan["parts"][0]["records"].keys() == {"baseline", "filler", "knockout"}
    assert plan["seconds"] > plan["parts"][0]["seconds"] > 0
    assert not out.exists()


def test_a_quiet_dry_run_is_one_line(cotfaith: Any, tmp_path: Path) -> None:
    path = write_tiny_study(tmp_path, 3, tests=["filler"], mechanisms=["knockout"])
    shown, errors = cotfaith("study", str(path), "-o", str(tmp_path / "run"), "--dry-run", "--quiet")
    assert re.fullmatch(r"3 units to do, \d+ s, \d+\.\d GB\n", shown)
    assert errors.count("Error") == 0
