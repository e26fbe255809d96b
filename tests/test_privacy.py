"""What a run writes and says holds no home folder, no key and no name of machine or user."""

from __future__ import annotations

import gzip
import json
import socket
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from cotfaith_mech import cli, doctor
from cotfaith_mech.backends.weights import locate
from cotfaith_mech.config import parse_config
from cotfaith_mech.datasets_io import read_problems
from cotfaith_mech.errors import CotfaithError
from cotfaith_mech.jobs import load
from cotfaith_mech.privacy import at_home, from_home, holds_secret, shared, without_password
from cotfaith_mech.records import RunDirectory
from cotfaith_mech.study import measure_study
from cotfaith_mech.units import units_of

from .tiny_study import write_tiny_study

SENTINELS = {
    "HF_TOKEN": "hf_sentinelsentinelsentinel",
    "OPENAI_API_KEY": "sk-sentinel-of-a-key",
    "WANDB_API_KEY": "wandbsentinelwandbsentinel",
    "SOME_PASSWORD": "sentinel-of-a-password",
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home" / "ann-b"
    folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("{home}", "~"),
        ("{home}/models/x", "~/models/x"),
        ("No model at '{home}/x': see {home}.", "No model at '~/x': see ~."),
        ("{home}/m+{home}/lora", "~/m+~/lora"),
        ("file://{home}/x", "file://~/x"),
        ("{home}by/x", "{home}by/x"),
        ("{home}-by/x", "{home}-by/x"),
        ("{home}.old/x", "{home}.old/x"),
        ("/mnt{home}/x", "/mnt{home}/x"),
        ("people:16", "people:16"),
    ],
)
def test_a_path_in_the_home_folder_begins_with_a_tilde(home: Path, text: str, shown: str) -> None:
    assert from_home(text.format(home=home)) == shown.format(home=home)


def test_a_home_behind_a_link_is_known_by_both_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    monkeypatch.setenv("HOME", str(tmp_path / "link"))
    assert from_home(f"{tmp_path}/disk/x {tmp_path}/link/x") == "~/x ~/x"


@pytest.mark.parametrize("root", ["/", ""])
def test_where_the_root_is_the_home_paths_stay(monkeypatch: pytest.MonkeyPatch, root: str) -> None:
    monkeypatch.setenv("HOME", root)
    assert from_home("/data/x of /") == "/data/x of /"


@pytest.mark.parametrize(
    ("address", "secret"),
    [
        ("https://host:8000/v1", False),
        ("https://host/v1?api-version=2024-10-21", False),
        ("https://me@host/v1", True),
        ("https://me:hush@host/v1", True),
        ("https://me:hush/@host/v1", True),
        ("https://host/v1?api-version=1&subscription-key=x", True),
        ("https://host/v1?X-Amz-Signature=x", True),
        ("https://host/v1?access_token=x", True),
    ],
)
def test_secrets_in_an_address(address: str, secret: bool) -> None:
    assert holds_secret(address) == secret


def test_passwords_are_starred() -> None:
    told = "No https://me:hush@host/v1 and no m@http://you@h, but a@b.c"
    assert without_password(told) == "No https://***@host/v1 and no m@http://***@h, but a@b.c"


def test_the_doctor_shows_no_password_of_a_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://me:hush@127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    [row] = doctor._hub()
    assert "http://***@127.0.0.1:9 is out of reach" in row["value"]


def test_paths_in_the_home_folder_are_read_by_both_names(home: Path) -> None:
    (home / "model").mkdir()
    (home / "rows.jsonl").write_text(json.dumps({"question": "2 + 2?", "answer": "4"}))
    assert locate("~/model") == home / "model"
    for source in ("~/rows.jsonl", str(home / "rows.jsonl")):
        [problem] = read_problems(source)[0]
        assert problem.problem_id == "rows-1"
    with pytest.raises(CotfaithError, match="No model at '~/other'"):
        locate("~/other")


def whole_and_short(home: Path) -> list[dict]:
    """The same study, its paths as a user of that home may write them."""
    reader = {"name": "A", "model": f"{home}/model"}
    whole = {"readers": [reader], "problems": f"{home}/rows.jsonl", "paraphraser": reader | {"adapter": f"{home}/l"}}
    return [whole, json.loads(json.dumps(whole).replace(str(home), "~"))]


def test_a_study_is_the_same_by_both_names(home: Path) -> None:
    whole, short = (parse_config(study) for study in whole_and_short(home))
    assert whole == short
    assert str(home) not in whole.model_dump_json()


def test_an_old_run_with_whole_paths_resumes_and_adds_nothing(home: Path) -> None:
    """Its units keep their names, though the paraphraser's path is part of them, and what was pinned still fits."""
    study = yaml.safe_load(write_tiny_study(home, 2, tests=["paraphrase"], draws=1, mechanisms=[]).read_text())
    study["paraphraser"] = {"name": "P", "model": study["readers"][0]["model"]}
    config = parse_config(study)
    manifest = RunDirectory.create(home / "run", config.model_dump(mode="json")).path / "manifest.json"
    manifest.write_text(manifest.read_text().replace("~/", f"{home}/"))
    run = measure_study(config, home / "run")
    assert str(home) in manifest.read_text()
    before = {path: path.stat().st_mtime_ns for path in (run.path / "records").iterdir()}
    assert len(before) == 2
    by_whole_path = unit_names(run, study, str(home))
    assert {path.stem for path in before} == by_whole_path != unit_names(run, study, "~")
    measure_study(config, run.path)
    assert {path: path.stat().st_mtime_ns for path in (run.path / "records").iterdir()} == before
    with pytest.raises(CotfaithError, match=r"readers\[0\]\.model is '~/model' there, '~/other' here"):
        measure_study(parse_config(study | {"readers": [{"name": "A", "model": "~/other"}]}), run.path)


def unit_names(run: RunDirectory, study: dict, home: str) -> set[str]:
    """As they are named where the paraphraser's path begins with `home`."""
    config = parse_config(study)
    paraphraser = config.model_dump(mode="json")["paraphraser"] | {"model": f"{home}/model"}
    fake = RunDirectory.create(run.path.parent / f"named{len(home)}", {})
    (fake.path / "manifest.json").write_text(json.dumps({"config": {"paraphraser": paraphraser}}))
    fake.write_chains(run.read_chains())
    model = load(config, config.readers[0])
    problems = read_problems(config.problems)[0]
    return {unit.name for unit in units_of(config, config.readers[0], model, problems, fake)}


def test_what_is_left_out_is_written_without_the_home_folder(home: Path) -> None:
    run = RunDirectory.create(home / "run", {"problems": str(home / "rows.jsonl")})
    reason = f"No file {home}/x.safetensors; see {home / 'y'}."
    run.add_exclusion(problem_id="p", stage="measure", reason=reason)
    run.leave_out_unit("u", [{"problem_id": "q", "stage": "measure", "reason": reason}])
    run.update_manifest({"checks": [{"detail": reason, "path": home / "z"}]})
    run.pin("data", {"source": str(home / "rows.jsonl")})
    run.pin("data", {"source": "~/rows.jsonl"})
    assert {row["reason"] for row in run.read_exclusions()} == {"No file ~/x.safetensors; see ~/y."}
    assert str(home) not in written(run.path)


def test_data_keep_their_paths(home: Path) -> None:
    run = RunDirectory.create(home / "run", {})
    run.write_chains([{"chain_id": "c", "steps": [f"cd {home}/x"]}])
    assert run.read_chains()[0]["steps"] == [f"cd {home}/x"]


def written(folder: Path) -> str:
    """All that is in the files of `folder`, names included, parquet and gzip unpacked."""
    parts = []
    for path in sorted(folder.rglob("*")):
        parts.append(str(path.relative_to(folder)))
        if path.is_file():
            content = path.read_bytes()
            parts += [content.decode("utf-8", "replace"), content.decode("utf-16", "replace")]
            if path.suffix == ".parquet":
                parts.append(pd.read_parquet(path).to_csv())
            if path.suffix == ".gz":
                parts.append(gzip.decompress(content).decode())
    return "\n".join(parts)


def command(words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["cotfaith", *words.split()])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


def test_a_study_its_report_and_the_doctor_write_and_say_nothing_private(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the commands themselves, whose environment holds tokens; and what a reader that is not there says. Nothing of
    it is in any file of the run, nor in what is printed."""
    for name, value in SENTINELS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(home)
    monkeypatch.setattr(doctor, "_engine", list)
    study = write_tiny_study(home, 2, tests=["early_termination"], draws=1, mechanisms=["knockout"])
    bad = yaml.safe_load(study.read_text())
    bad["readers"] = [{"name": "A", "model": str(home / "absent")}]
    (home / "bad.yaml").write_text(yaml.safe_dump(bad))
    assert command("study study.yaml --out run", monkeypatch) == 0
    assert command("study bad.yaml --out bad", monkeypatch) == 1
    command("doctor", monkeypatch)
    manifest = json.loads((home / "run" / "manifest.json").read_text())
    assert manifest["config"]["problems"] == "~/rows.jsonl"
    assert manifest["models"]["A"]["name"] == "~/model"
    everything = "".join(capfd.readouterr()) + written(home / "run") + written(home / "bad")
    assert "No model at '~/absent'" in everything
    assert "Report: run/report.html" in everything
    for secret in (*SENTINELS.values(), str(home), str(home.resolve())):
        assert secret not in everything
    private = json.dumps({key: value for key, value in manifest.items() if key != "config"})
    assert socket.gethostname() not in private
    assert not any(path.read_bytes() for path in (home / "run").glob(".lock*")), "who writes is known while it writes"


def test_a_worker_of_another_home_gets_paths_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    given = {"model": f"{tmp_path}/m", "readers": [{"adapter": None, "name": "~"}], "n": 3}
    assert at_home(shared(given)) == given
    assert shared(given) != given
