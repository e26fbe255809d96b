"""Whose chains are read by whom, and what a chain of another author must not inherit from the problem's own."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cotfaith_mech.authoring import is_read, problem_for
from cotfaith_mech.compare import estimates_of
from cotfaith_mech.conclude import estimate
from cotfaith_mech.config import parse_config
from cotfaith_mech.datasets_io import read_problems
from cotfaith_mech.errors import CotfaithError
from cotfaith_mech.model import load
from cotfaith_mech.organisms.rules import organism_problems
from cotfaith_mech.study import measure_study
from cotfaith_mech.units import donors_of, fitting, units_of

ARMS = {
    "readers": [{"name": "base", "model": "organism:writer"}, {"name": "tuned", "model": "organism:mix_100"}],
    "problems": "organism:writer:3:5",
    "authors": ["supplied", "base", "tuned"],
    "mechanism_authors": ["supplied"],
    "generation": {"max_new_tokens": 40},
    "tests": ["early_termination", "filler"],
    "mechanisms": ["knockout", "patching"],
    "draws": 2,
    "crosscheck_cells": 0,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    done = measure_study(parse_config(ARMS), tmp_path_factory.mktemp("arms") / "run")
    estimate(done)
    return done


def test_everyone_reads_supplied_and_the_base_and_its_own():
    config = parse_config(ARMS | {"readers": [*ARMS["readers"], {"name": "other", "model": "organism:mix_050"}]})
    read = {
        (r, a) for r in ("base", "tuned", "other") for a in ("gold", "base", "tuned", "other") if is_read(config, r, a)
    }
    assert ("base", "tuned") in read
    assert ("base", "other") in read
    assert ("tuned", "tuned") in read
    assert {("tuned", "other"), ("other", "tuned")} & read == set()
    assert all((reader, author) in read for reader in ("base", "tuned", "other") for author in ("gold", "base"))


def test_a_chain_of_another_author_inherits_no_twin_and_no_true_step():
    (problem,) = organism_problems("writer", 1, 5)
    assert problem_for(problem, "supplied") == problem
    bare = problem_for(problem, "base")
    assert (bare.steps, bare.twin_steps, bare.true_step, bare.paraphrases) == ((), (), None, ())
    assert bare.conflicts == ()
    assert (bare.question, bare.gold, bare.twin_answer) == (problem.question, problem.gold, problem.twin_answer)


def test_donors_are_chains_of_the_same_author_to_other_problems(run):
    config = parse_config(ARMS)
    problems, _ = read_problems(ARMS["problems"])
    model = load("organism:writer")
    units = units_of(config, config.readers[0], model, problems, run)
    fits = fitting(model, units)
    for number, unit in enumerate(units):
        donors = donors_of(units, number, fits)
        assert {donor.author for donor in donors} <= {unit.chain.author}
        assert unit.chain.problem_id not in {donor.problem_id for donor in donors}
    supplied = [number for number, unit in enumerate(units) if unit.chain.author == "supplied"]
    assert [len(donors_of(units, number, fits)) for number in supplied] == [2, 2, 2]


def test_a_problem_without_its_own_chain_keeps_the_others(tmp_path):
    rows = [{"question": "The note says 47. How many coins to give Ann?", "answer": "47", "cue": " So give Ann"}]
    (tmp_path / "bare.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    config = parse_config(
        ARMS | {"problems": str(tmp_path / "bare.jsonl"), "authors": ["supplied", "base"], "tests": []}
    )
    done = measure_study(config, tmp_path / "run")
    assert {row["author"] for row in done.read_chains()} == {"base"}
    assert [row["reader"] for row in done.read_exclusions() if row["stage"] == "chain"] == ["supplied"]


def test_who_wrote_nothing_is_counted_and_arms_keep_their_names(run):
    records, chains = run.read_records(), run.read_chains()
    left = [row for row in chains if row["author"] != "tuned"]
    own = records[records["author"] != "tuned"]
    base = own[own["author"] == "base"]
    got = estimates_of(base, left, ["base", "tuned"], [], np.random.default_rng(0), ["base", "tuned"])
    assert "tuned-base/base" in {e.arm for e in got}
    written = {e.arm: e.value for e in got if e.name == "chains_written"}
    assert written == {"base": 1.0, "tuned": 0.0, "tuned-base": -1.0}


def test_arms_on_disk(run):
    records = run.read_records()
    read = set(records.groupby(["reader", "author"]).groups)
    assert {("base", "supplied"), ("base", "base"), ("tuned", "supplied"), ("tuned", "base")} <= read
    opened = set(records.loc[records["measure"].isin(["knockout", "patching"]), "author"])
    assert opened == {"supplied"}
    # mix_100 never learned to write: what it could not is an exclusion in its own name
    wrote = {row["problem_id"] for row in run.read_chains() if row["author"] == "tuned"}
    left_out = {
        row["problem_id"] for row in run.read_exclusions() if row["stage"] == "chain" and row["reader"] == "tuned"
    }
    assert len(wrote | left_out) == 3
    assert not wrote & left_out


def test_estimates_keep_authors_apart(run):
    arms = {e.arm for e in run.read_estimates() if e.name == "filler/change"}
    assert {"base/supplied", "tuned/supplied", "tuned-base/supplied", "base/base", "tuned-base/base"} <= arms
    written = {e.arm: e.value for e in run.read_estimates() if e.name == "chains_written"}
    assert written["base"] == 1.0


def test_a_second_run_measures_nothing_again(run):
    before = {path: path.stat().st_mtime_ns for path in (run.path / "records").iterdir()}
    measure_study(parse_config(ARMS), run.path)
    assert {path: path.stat().st_mtime_ns for path in (run.path / "records").iterdir()} == before


def test_an_author_must_be_a_reader():
    with pytest.raises(CotfaithError, match="author 'someone' is no reader"):
        parse_config(ARMS | {"authors": ["someone"]})
    with pytest.raises(CotfaithError, match="no reader may be named 'supplied'"):
        parse_config({"readers": [{"name": "supplied", "model": "m"}], "problems": "people:2"})


def test_mechanisms_by_name_are_what_the_battery_says_without():
    core = parse_config({"readers": [{"name": "A", "model": "m"}], "problems": "people:2"})
    assert core.mechanisms_of(core.readers[0]) == ("knockout", "patching", "attribution")
    text_alone = parse_config({"readers": [{"name": "A", "model": "m", "mechanism": False}], "problems": "people:2"})
    assert text_alone.mechanisms_of(text_alone.readers[0]) == ("knockout",)
    full = parse_config({"readers": [{"name": "A", "model": "m"}], "problems": "people:2", "battery": "full"})
    assert len(full.mechanisms_of(full.readers[0])) == 9
    named = parse_config(
        {"readers": [{"name": "A", "model": "m"}], "problems": "people:2", "mechanisms": ["mediation"]}
    )
    assert named.mechanisms_of(named.readers[0]) == ("mediation",)
