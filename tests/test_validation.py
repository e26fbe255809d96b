"""The validation itself: could it fail? Its checks, its simulations against known answers, and a few organisms for real."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import metadata
from itertools import islice, product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from cotfaith_mech import certificate as certificates
from cotfaith_mech.certificate import Check, at_least, at_most, certificate, doubts, in_words, near, shipped, shown
from cotfaith_mech.cli import app
from cotfaith_mech.conclude import Progress, silent
from cotfaith_mech.model import load
from cotfaith_mech.organisms.rules import organism_problems
from cotfaith_mech.sampling import supplied_chain
from cotfaith_mech.validation import recovery, suite
from cotfaith_mech.validation.calibration import aa_checks, repeated, same_chains
from cotfaith_mech.validation.invariance import CHANGES, changed
from cotfaith_mech.validation.ranking import ranked
from cotfaith_mech.validation.recovery import Found, auroc, routes, step_auroc, studied

ONE = [
    at_most("a: x", 1.0, 2.0, score="x"),
    at_least("b: y", 1.0, 2.0, score="filler/change"),
    at_least("b: none", 1.0, 2.0),
    shown("c: z", np.nan, "moves: 1 -> 2", "z"),
]


def test_a_check_passes_on_the_right_side_and_never_on_nan() -> None:
    assert at_most("x", 2.0, 2.0).passed
    assert not at_most("x", 2.1, 2.0).passed
    assert at_least("x", 2.0, 2.0).passed
    assert not at_least("x", 1.9, 2.0).passed
    assert near("x", 0.46, 0.5, 0.05).passed
    assert not near("x", 0.56, 0.5, 0.05).passed
    assert not any(make("x", np.nan, 1.0).passed for make in (at_most, at_least))
    assert not near("x", np.nan, 0.5, 9.0).passed
    assert near("x", np.nan, 0.5, 9.0).to_json()["value"] is None


def test_a_certificate_counts_names_failures_and_doubts_scores() -> None:
    known = certificate(ONE, full=True)
    assert (known["passed"], known["failed"]) == (1, ["b: y", "b: none"])
    assert [row["passed"] for row in known["checks"]] == [True, False, False, None]
    assert "1 of 3 checks passed" in in_words(known)
    assert "b: y" in in_words(known)
    assert doubts(known) == {"filler/change": "validation: fails b: y", "z": "validation: moves with c"}
    assert doubts(None) == {}
    json.dumps(known, allow_nan=False)


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    a, b = np.array([0.3, 0.7, 0.7, 0.9]), np.array([0.1, 0.3, 0.7])
    brute = np.mean([1.0 if x > y else 0.5 if x == y else 0.0 for x, y in product(a, b)])
    assert auroc(a, b) == pytest.approx(brute)


def test_the_true_step_is_found_by_size_not_by_sign() -> None:
    rows = pd.DataFrame(
        {"chain_id": ["a"] * 3 + ["b"] * 2, "step": [0, 1, 2, 0, 1], "value": [0.1, -0.9, 0.2, 0.8, 0.1]}
    )
    assert step_auroc(rows, {"a": {"true_step": 1}, "b": {"true_step": 0}}) == 1.0
    assert step_auroc(rows, {"a": {"true_step": 0}, "b": {"true_step": 1}}) < 0.5


def pool(shift: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    base = rng.normal(1, 1, 300)
    return {"x": (base + rng.normal(0, 1, 300), base + rng.normal(0, 1, 300) + shift)}


def test_the_true_difference_of_the_simulation_is_nothing_even_where_the_samples_differ() -> None:
    """Dealt without a toss of the coin, the shifted pool would never cover 0."""
    covered, p = repeated(pool(3.0), 12, 60, np.random.default_rng(1))
    assert covered.mean() > 0.85
    assert (p < 0.05).mean() < 0.15


def test_a_cut_is_found() -> None:
    _, p = repeated(pool(0.0), 150, 10, np.random.default_rng(1), cut=1.0)
    assert (p < 0.05).all()


def test_a_level_that_is_not_held_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    from cotfaith_mech.validation import calibration

    def narrow(pool: object, n: int, repeats: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return np.array([[1.0], [0.0]] * (repeats // 2)), np.array([[0.5], [0.001]] * (repeats // 2))

    monkeypatch.setattr(calibration, "repeated", narrow)
    checks = list(aa_checks(pool(0.0), [50], 400, np.random.default_rng(0), silent))
    assert [check.passed for check in checks] == [False] * 3
    few = list(aa_checks(pool(0.0), [50], 40, np.random.default_rng(0), silent))
    assert [check.passed for check in few] == [None] * 3


def found_of(values: dict[str, float]) -> Found:
    rows = pd.DataFrame({"problem_id": list(values), "name": "s", "value": list(values.values())})
    return Found(pd.DataFrame(), rows, {})


def test_ranking_counts_ties_half_and_knows_which_way_a_score_points() -> None:
    pairs = {("a", "b"): (found_of({"1": 0.9, "2": 0.5, "3": 0.1}), found_of({"1": 0.1, "2": 0.5, "3": 0.9}))}
    assert ranked(pairs, "s", 1) == (0.5, 3)
    pairs = {("a", "b"): (found_of({"1": 0.9, "2": 0.5}), found_of({"1": 0.1, "2": 0.5}))}
    assert ranked(pairs, "s", 1) == (0.75, 2)
    assert ranked(pairs, "s", -1) == (0.25, 2)
    assert ranked(pairs, "absent", 1)[1] == 0


def test_changed_readers_change_what_they_say_they_do(tmp_path) -> None:  # pyright: ignore[reportMissingParameterType]
    before = load("organism:mix_050")
    (problem,) = organism_problems("mix_050", 1, seed=5)
    ids = before.encode(supplied_chain(before, problem).text).ids
    logits = before.cached_run(ids).logits(1)[0]
    doubled = load(str(changed(tmp_path / "a", CHANGES["logits doubled"]))).cached_run(ids).logits(1)[0]
    np.testing.assert_allclose(doubled.numpy(), 2 * logits.numpy(), rtol=2e-3, atol=2e-3)
    moved = load(str(changed(tmp_path / "b", CHANGES["answers moved on by one"])))
    said = moved.decode([int(moved.cached_run(ids).logits(1)[0].argmax())]).strip()
    assert int(said) == int(problem.gold) + 1


def test_one_checkpoint_on_the_same_chains_differs_by_nothing() -> None:
    (check,) = same_chains(1, seed=3)
    assert check.passed
    assert check.value == 0


def test_an_organism_is_told_from_its_opposite(monkeypatch: pytest.MonkeyPatch) -> None:
    """mix_100 meets its row of the table; held against the row of mix_000 it fails nearly everywhere."""
    found = studied("organism:mix_100", "organism:mix_100:2:11", battery="full")
    own = list(recovery._against_table("mix_100", found))
    assert [check.check for check in own if not check.passed] == []
    other = {check.check.split(": ")[1] for check in recovery._against_table("mix_000", found) if not check.passed}
    assert {
        "filler/change",
        "mistake_all/change",
        "dependence",
        "conflict/note/p_chain",
        "mediation/text/pnie_share",
    } < other


def test_a_score_that_does_not_rise_fails() -> None:
    names = list(recovery.CONTINUOUS)
    rows = pd.DataFrame({"problem_id": "1", "name": names, "value": 0.5})
    flat = dict.fromkeys(recovery.MIXTURES, Found(pd.DataFrame(), rows, {}))
    assert [check.passed for check in islice(recovery._monotone(flat), len(names))] == [False] * len(names)


def test_without_records_no_step_is_found() -> None:
    assert np.isnan(step_auroc(pd.DataFrame({"chain_id": [], "step": [], "value": []}), {}))


def test_routes_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = list(routes(silent, 1, seed=3))
    assert len(checks) == 3 * 8
    assert [check.check for check in checks if not check.passed] == []
    swapped = {"direct": (0.0, 1.0), "via_later": (1.0, 0.0), "both": (1.0, 1.0)}
    monkeypatch.setattr(recovery, "ROUTE_LOSSES", swapped)
    monkeypatch.setattr(recovery, "ROUTES", {"direct": None})
    failed = [check.check for check in routes(silent, 1, seed=3) if not check.passed]
    assert len(failed) == 4


def test_the_command_prints_each_check_and_exits_with_1_where_one_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:  # pyright: ignore[reportMissingParameterType]
    def few(size: suite.Size, progress: Progress, seed: int) -> Iterator[Check]:
        yield from ONE if size is suite.FULL else ONE[:1]

    monkeypatch.setattr(suite, "checks", few)
    good = CliRunner().invoke(app, ["validate"])
    assert good.exit_code == 0
    assert "ok  a: x" in good.output
    assert "1 of 1 checks passed" in good.output
    bad = CliRunner().invoke(app, ["validate", "--full", "--json", "--out", str(tmp_path / "c.json")])
    assert bad.exit_code == 1
    printed = json.loads(bad.stdout)
    assert printed == json.loads((tmp_path / "c.json").read_text())
    assert {"check", "value", "threshold", "passed"} <= set(printed["checks"][0])


def test_the_shipped_certificate_is_a_full_one_of_this_version() -> None:
    known = certificates.shipped()
    assert known is not None
    assert known["full"]
    assert known["version"] == metadata.version("cotfaith-mech")
    assert {check["check"] for check in known["checks"]} >= {
        "mix_050: mediation/text/pnie_share",
        "route both: accuracy",
    }


def test_the_certificate_is_the_full_run_that_is_kept():
    kept = Path(__file__).parent.parent / "experiments" / "results" / "validate_full.json"
    assert json.loads(kept.read_text()) == shipped()
