"""The four arms against hand-worked numbers, their identity, and slips that would swap reader and author."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cotfaith_mech.arms import arm_estimates, part_arm, writing_estimates
from cotfaith_mech.records import COLUMNS

ARMS = {("B", "B"): 0.1, ("T", "B"): 0.4, ("B", "T"): 0.2, ("T", "T"): 0.9}
"""(reader, author) -> value."""


def baseline(problem, reader, author, correct=1.0):
    row = dict.fromkeys(COLUMNS)
    row |= {"problem_id": problem, "chain_id": f"{problem}-{author}", "author": author, "reader": reader}
    return row | {
        "measure": "baseline",
        "variant": "",
        "metric": "correct",
        "value": correct,
        "n_tokens": 40,
        "step": pd.NA,
    }


def outcome(values, problems=("p0", "p1", "p2")):
    rows = [
        {"problem_id": p, "reader": r, "author": a, "name": "dependence", "value": v + k / 100}
        for k, p in enumerate(problems)
        for (r, a), v in values.items()
    ]
    return pd.DataFrame(rows)


def found(values, records, problems=("p0", "p1", "p2"), chains=()):
    got = arm_estimates(outcome(values, problems), records, chains, "B", "T", np.random.default_rng(0))
    return {(estimate.name, estimate.arm): estimate for estimate in got}


def records_of(problems, **options):
    return pd.DataFrame([baseline(p, r, a, **options) for p in problems for r, a in ARMS])


def test_reading_and_chains_by_hand():
    got = found(ARMS, records_of(["p0", "p1", "p2"]))
    values = {part: got["dependence", part_arm("B", "T", part)].value for part in ("reading", "chains", "interaction")}
    assert values["reading"] == pytest.approx(((0.4 - 0.1) + (0.9 - 0.2)) / 2)
    assert values["chains"] == pytest.approx(((0.2 - 0.1) + (0.9 - 0.4)) / 2)
    assert values["interaction"] == pytest.approx(0.9 - 0.4 - 0.2 + 0.1)
    assert values["reading"] + values["chains"] == pytest.approx(ARMS["T", "T"] - ARMS["B", "B"])


def test_a_reader_that_ignores_whose_chain_it_is_changes_reading_alone():
    by_reader = {(reader, author): {"B": 0.2, "T": 0.7}[reader] for reader, author in ARMS}
    got = found(by_reader, records_of(["p0", "p1", "p2"]))
    assert got["dependence", part_arm("B", "T", "reading")].value == pytest.approx(0.5)
    assert got["dependence", part_arm("B", "T", "chains")].value == pytest.approx(0)


def test_a_problem_without_all_four_arms_is_left_out():
    table = outcome(ARMS)
    table = table[~((table["problem_id"] == "p1") & (table["author"] == "T"))]
    got = list(arm_estimates(table, records_of(["p0", "p2"]), [], "B", "T", np.random.default_rng(0)))
    assert {estimate.n_problems for estimate in got if "|" not in estimate.name} == {2}
    only_base = table[table["author"] == "B"]
    assert not list(arm_estimates(only_base, records_of(["p0"]), [], "B", "T", np.random.default_rng(0)))


def test_strata_ask_all_four_arms_and_equal_lengths():
    rows = [baseline(p, r, a) for p in ("p0", "p1", "p2") for r, a in ARMS]
    rows[2]["value"] = 0.0  # p0: B is wrong on T's chain
    lengths = {"p0": (40, 44), "p1": (40, 45), "p2": (40, 40)}
    chains = [
        {"problem_id": p, "author": author, "steps": ["x" * 30, "y" * (n - 30)]}
        for p, pair in lengths.items()
        for author, n in zip("BT", pair, strict=True)
    ]
    got = found(ARMS, pd.DataFrame(rows), chains=chains)
    arm = part_arm("B", "T", "reading")
    assert got["dependence | both_correct", arm].n_problems == 2
    # 44 characters against 40 are 9% more, 45 are 11%
    assert got["dependence | length_matched", arm].n_problems == 2


def test_how_often_each_writes():
    rows = [{"problem_id": p, "author": a} for p in ("p0", "p1", "p2", "p3") for a in ("gold", "B")]
    rows += [{"problem_id": "p2", "author": "T"}]
    got = {e.arm: e for e in writing_estimates(rows, ["B", "T"], np.random.default_rng(0))}
    assert (got["B"].value, got["T"].value, got["T-B"].value) == (1.0, 0.25, -0.75)
    assert got["T-B"].p == pytest.approx(0.25)
    assert writing_estimates(rows, [], np.random.default_rng(0)) == []
