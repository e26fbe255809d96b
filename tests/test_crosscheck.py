"""The cross-check fails when engines differ, when a value is not finite, and when a backend cannot take the model."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch

from cotfaith_mech import crosscheck
from cotfaith_mech.arithmetic import people_problems
from cotfaith_mech.backends.huggingface import HuggingFaceModel
from cotfaith_mech.errors import CotfaithError
from cotfaith_mech.model import Run
from cotfaith_mech.problems import Problem
from cotfaith_mech.reading import Trunk
from cotfaith_mech.sampling import supplied_chain

from .tiny import tiny


@lru_cache
def model() -> HuggingFaceModel:
    weights = tiny("llama-gqa")
    weights.model.config.max_position_embeddings = 512
    return HuggingFaceModel(weights)


def sample(problem: Problem) -> crosscheck.Sample:
    trunk = Trunk.of(model(), supplied_chain(model(), problem).with_answer(f" {problem.gold}"), problem.kind)
    return crosscheck.sample_cells(trunk, problem, 4, np.random.default_rng(0))


def test_three_engines_agree_on_patches_and_knockouts() -> None:
    found = sample(people_problems(1, seed=2)[0])
    assert {edit.op for cell in found.cells for edit in cell} == {"replace", "knockout"}
    rows = crosscheck.check_engines(model(), [found])
    assert [row["passed"] for row in rows] == [True, True]
    assert all(0 < float(str(row["value"])) < 1e-4 for row in rows)


def test_a_chain_without_a_twin_is_checked_by_its_knockouts() -> None:
    problem = Problem("p", "Ann has 3 nuts. How many?", "3", "test", steps=("Ann has 3.", "\nBob has 9."))
    found = sample(problem)
    assert {edit.op for cell in found.cells for edit in cell} == {"knockout"}
    assert all(row["passed"] for row in crosscheck.check_engines(model(), [found]))


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_peer_that_differs_or_gives_nan_fails_the_check(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    found = sample(people_problems(1, seed=2)[0])
    other = HuggingFaceModel(model().weights)
    n_logits = found.contrast.n_logits
    monkeypatch.setattr(other, "run", lambda *_, **__: Run(torch.full((1, n_logits, 337), value)))
    monkeypatch.setattr(crosscheck, "same_weights", lambda *_: other)
    assert [row["passed"] for row in crosscheck.check_engines(model(), [found])] == [False, False]


def test_a_backend_that_refuses_the_model_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise CotfaithError("no such architecture")

    monkeypatch.setattr(crosscheck, "same_weights", refuse)
    for row in crosscheck.check_engines(model(), [sample(people_problems(1, seed=2)[0])]):
        assert row["passed"] is False
        assert "no such architecture" in str(row["detail"])
