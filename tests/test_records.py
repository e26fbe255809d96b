"""What a run directory promises: whole files only, resuming adds nothing twice, errors that say what to do."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from cotfaith_mech.errors import CotfaithError
from cotfaith_mech.records import COLUMNS, Record, RunDirectory, unit_id
from cotfaith_mech.stats import Estimate

CONFIG = {"seed": 3, "tests": {"paraphrase": {"draws": 5}}, "readers": ("A", "B")}


def record(**fields) -> Record:
    base = {"problem_id": "p1", "chain_id": "c1", "author": "gold", "reader": "A", "measure": "baseline"}
    return Record(**{**base, "metric": "p_answer", "value": 0.25, **fields})


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", CONFIG)


def test_columns_are_the_contract():
    contract = (
        "problem_id chain_id author reader measure variant step site layer head position metric value n_tokens seed"
    )
    assert contract.split() == list(COLUMNS)


def test_records_come_back(run):
    full = record(
        measure="patching", variant="noise", step=0, site="blocks.3.hook_resid_pre", layer=3, head=7,
        position=11, value=math.nan, n_tokens=29, seed=2**40,
    )  # fmt: skip
    run.write_unit("u", [record(), full], {"reader": "A"})
    table = run.read_records()
    assert list(table.columns) == list(COLUMNS)
    assert table["step"].dtype == pd.Int64Dtype()
    assert table["step"].isna().tolist() == [True, False]
    assert table.loc[1, ["step", "layer", "head", "position", "n_tokens", "seed"]].tolist() == [0, 3, 7, 11, 29, 2**40]
    assert table.loc[0, "value"] == 0.25
    assert np.isnan(table.loc[1, "value"])
    assert pd.isna(table.loc[0, "site"])
    assert table.loc[0, "variant"] == ""


def test_meta_comes_back_from_the_schema(run):
    run.write_unit("u", [record()], {"answer": " 22", "tv": np.float32(np.nan), "steps": ("a", "ü")})
    assert run.read_unit_meta() == [{"unit": "u", "answer": " 22", "tv": None, "steps": ["a", "ü"]}]


def test_order_of_writing_does_not_matter(tmp_path):
    tables = []
    for order in (["u1", "u2", "u3"], ["u3", "u1", "u2"]):
        run = RunDirectory.create(tmp_path / "-".join(order), CONFIG)
        for unit in order:
            run.write_unit(unit, [record(problem_id=unit), record(problem_id=unit, value=0.5)], {})
        tables.append(run.read_records())
    pd.testing.assert_frame_equal(*tables)


def test_a_killed_write_leaves_no_unit(run, monkeypatch):
    def killed(table, file):
        file.write(b"PAR1 half")
        raise KeyboardInterrupt

    monkeypatch.setattr(pq, "write_table", killed)
    with pytest.raises(KeyboardInterrupt):
        run.write_unit("u", [record()], {})
    assert not run.has_unit("u")
    assert list((run.path / "records").iterdir()) == []
    monkeypatch.undo()
    (run.path / "records" / ".u.parquet.x7.tmp").write_bytes(b"PAR1 half")
    assert len(run.read_records()) == 0
    run.write_unit("u", [record()], {})
    assert run.has_unit("u")
    assert len(run.read_records()) == 1


def test_the_rename_comes_after_the_flush(run, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    run.write_unit("u", [record()], {})
    assert calls == ["fsync", "replace"]


def test_an_empty_unit_is_finished(run):
    run.write_unit("u", [], {"reader": "A"})
    assert run.has_unit("u")
    assert run.read_records().shape == (0, len(COLUMNS))


def test_half_a_file_is_named(run):
    run.write_unit("u", [record()] * 50, {})
    path = run.path / "records" / "u.parquet"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CotfaithError, match=r"u\.parquet is not a whole parquet file.*delete it and run again"):
        run.read_records()


def test_not_a_run_directory(tmp_path):
    with pytest.raises(CotfaithError, match=r"not a run directory: it has no manifest\.json"):
        RunDirectory(tmp_path)


def test_a_run_that_never_began_makes_way_for_another(run):
    RunDirectory.create(run.path, {"seed": 8})
    assert run.read_manifest() == {"config": {"seed": 8}}


def test_another_config_is_refused_by_key(run):
    run.write_unit("u", [record()], {})
    RunDirectory.create(run.path, json.loads(json.dumps(CONFIG)))
    other = {**CONFIG, "tests": {"paraphrase": {"draws": 7}}}
    with pytest.raises(CotfaithError, match=r"tests\.paraphrase\.draws is 5 there, 7 here"):
        RunDirectory.create(run.path, other)
    with pytest.raises(CotfaithError, match="extra is nothing there"):
        RunDirectory.create(run.path, {**CONFIG, "extra": 1})


def test_a_differing_reader_is_named_by_its_key(tmp_path):
    """Not the two lists of readers, one after the other."""
    readers = [{"name": "A", "model": "x"}, {"name": "B", "model": "y"}]
    run = RunDirectory.create(tmp_path / "r", {"readers": readers})
    run.write_unit("u", [record()], {})
    with pytest.raises(CotfaithError, match=r"another config: readers\[1\]\.model is 'y' there, 'z' here;"):
        RunDirectory.create(run.path, {"readers": [readers[0], {**readers[1], "model": "z"}]})
    with pytest.raises(CotfaithError, match=r"readers is \[.*\] there"):
        RunDirectory.create(run.path, {"readers": readers[:1]})


def test_what_was_left_out_of_a_unit_travels_with_it(run, tmp_path):
    """In the same move as its records: nothing that a kill could part; a unit that is left out is finished, unmeasured."""
    rows = [{"problem_id": f"p{i}", "chain_id": "c", "reader": "A", "stage": "edit", "reason": "x"} for i in range(2)]
    run.add_exclusions([{"problem_id": "p9", "stage": "read", "reason": "no answer"}] * 2)
    run.write_unit("u", [record()], {"reader": "A"}, rows[:1])
    run.leave_out_unit("v", rows)
    assert run.has_unit("v")
    assert run.n_units() == 2
    assert run.read_unit_meta() == [{"unit": "u", "reader": "A"}]
    common = {"problem_id": "p9", "chain_id": None, "reader": None, "stage": "read", "reason": "no answer"}
    assert run.read_exclusions() == [common, *rows]
    assert run.compacted(tmp_path / "kept").read_exclusions() == [common, *rows]
    assert len(run.read_records()) == 1


def test_a_kept_copy_is_neither_resumed_nor_put_beside_units(run, tmp_path):
    """Either would count every record twice."""
    run.write_unit("u", [record()], {})
    kept = run.compacted(tmp_path / "kept")
    run.compacted(kept.path)
    with pytest.raises(CotfaithError, match="kept copy with all records in one file, which no run resumes"):
        RunDirectory.create(kept.path, CONFIG)
    with pytest.raises(CotfaithError, match="beside which all would count twice"):
        kept.compacted(run.path)
    assert len(kept.read_records()) == len(run.read_records()) == 1


def test_a_run_whose_folder_is_gone_is_told_of(run):
    (run.path / "manifest.json").unlink()
    with pytest.raises(CotfaithError, match=r"Cannot read .*manifest\.json \(No such file or directory\)"):
        run.update_manifest({"counts": {}})


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(CotfaithError, match="holds files but no run"):
        RunDirectory.create(tmp_path, CONFIG)


def test_a_path_that_cannot_be_written(tmp_path, run, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CotfaithError, match="Cannot make folder"):
        RunDirectory.create(tmp_path / "file" / "run", CONFIG)

    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", refused)
    with pytest.raises(CotfaithError, match=r"Cannot write .*u\.parquet \(Permission denied\)"):
        run.write_unit("u", [record()], {})


def test_unknown_measure():
    with pytest.raises(CotfaithError, match="Unknown measure 'patchin'"):
        record(measure="patchin")


def test_a_copy_begun_anew_clears_what_a_kill_left_half_written_and_nothing_of_others(run, tmp_path):
    run.write_unit("u", [record()], {})
    for left in ("kept/records/.all.parquet.x.tmp", "kept/.manifest.json.x.tmp", "kept/.mine.tmp"):
        (tmp_path / left).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / left).write_text("half")
    kept = run.compacted(tmp_path / "kept")
    assert {path.name for path in (kept.path / "records").iterdir()} == {"all.parquet", "units.json.gz"}
    assert {path.name for path in kept.path.iterdir()} == {"records", "manifest.json", ".mine.tmp"}


def test_exclusions_are_written_once(run):
    row = {"problem_id": "p1", "chain_id": None, "reader": "A", "stage": "chains", "reason": "no step"}
    for _ in range(2):
        run.add_exclusion(**row)
    run.add_exclusion(**{**row, "reader": "B"})
    assert RunDirectory(run.path).read_exclusions() == [row, {**row, "reader": "B"}]
    run.withdraw_exclusions(reader="B", stage="nothing")
    assert len(run.read_exclusions()) == 2
    run.withdraw_exclusions(reader="B", stage=row["stage"])
    assert run.read_exclusions() == [row]


def test_chains_come_back_and_a_bad_line_is_numbered(run):
    rows = [{"chain_id": "c1", "steps": ["a\u2028b", "\ud800"]}, {"chain_id": "c2", "true_step": None}]
    run.write_chains(rows)
    assert run.read_chains() == rows
    with (run.path / "chains.jsonl").open("a") as file:
        file.write('{"chain_id": ')
    with pytest.raises(CotfaithError, match=r"chains\.jsonl line 3 is not JSON"):
        run.read_chains()


def test_estimates_come_back(run):
    estimates = [
        Estimate("aoc", "A", 17, 0.5, 0.25, 0.75, math.nan, "jackknife t"),
        Estimate("aoc", "B-A", 17, -0.5, -0.75, -0.25, 0.01, "BCa, p sign-flip", "Holm p 0.02; primary"),
    ]
    run.write_estimates(estimates)
    back = run.read_estimates()
    assert back[1] == estimates[1]
    assert math.isnan(back[0].p)
    columns = "name arm n_problems value ci_low ci_high p method"
    assert pq.read_schema(run.path / "estimates.parquet").names == columns.split()


def test_manifest_is_strict_json(run):
    run.update_manifest({"config": CONFIG, "checks": [{"value": np.inf, "n": np.int64(3)}]})
    text = (run.path / "manifest.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["checks"] == [{"value": None, "n": 3}]


def test_unit_id_hashes_the_content():
    ids = {unit_id(r, c, p) for r in ("A", "B") for c in ("c1", "c2") for p in ({"x": 1}, {"x": 2})}
    assert len(ids) == 8
    assert unit_id("A", "c", {"x": 1, "y": (2,)}) == unit_id("A", "c", {"y": [2], "x": 1})


def test_other_inputs_under_the_same_config_are_refused(tmp_path):
    run = RunDirectory.create(tmp_path / "run", {"seed": 1})
    run.pin("reader A", {"weights": "aa", "text": "bb"})
    run.pin("reader A", {"weights": "aa", "text": "bb"})
    run.pin("data", {"sha256": "cc"})
    with pytest.raises(CotfaithError, match=r"reader A\.weights is 'aa' there, 'xx' here; choose a new output folder"):
        run.pin("reader A", {"weights": "xx", "text": "bb"})
    assert run.read_manifest()["pinned"]["data"] == {"sha256": "cc"}


def test_a_run_is_not_compacted_into_itself(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", {})
    with pytest.raises(CotfaithError, match="is the run itself"):
        run.compacted(tmp_path / "x" / ".." / "run")


def test_a_key_that_is_not_there_is_no_text_that_says_nothing(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", {"labels": {"c": "nothing"}})
    run.write_chains([])
    with pytest.raises(CotfaithError, match=r"labels\.c is 'nothing' there, nothing here"):
        RunDirectory.create(run.path, {"labels": {}})
