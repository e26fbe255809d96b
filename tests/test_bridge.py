"""Synthetic tables whose answer is known: perfect agreement, independence, a pure position confound."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from cotfaith_mech.bridge import agreement, bridge, partial_spearman, spearman, step_table
from cotfaith_mech.records import COLUMNS

PAIR = "bridge/mistake~knockout/"


def records_of(behaviour, knockout, *, random=None, reader="A", draws=5):
    """Records of chains c0, c1, … from per-chain lists of b_j and m_j; `random` are the control's effects."""
    rows = []
    for i, (b, m) in enumerate(zip(behaviour, knockout, strict=True)):
        base = {"problem_id": f"p{i}", "chain_id": f"c{i}", "author": "gold", "reader": reader, "n_tokens": 40 + i}
        rows.append({**base, "measure": "baseline", "variant": "", "metric": "p_answer", "value": 0.9 + i / 1000})
        for step, (effect, cut) in enumerate(zip(b, m, strict=True)):
            offsets = np.linspace(-0.01, 0.01, draws) if draws > 1 else [0.0]
            for seed, offset in enumerate(offsets):
                rows.append({**base, "measure": "mistake", "variant": "local", "step": step, "seed": seed, "metric": "tv", "value": effect + offset})  # fmt: skip
            rows.append({**base, "measure": "knockout", "variant": "masked", "step": step, "metric": "delta_p", "value": cut})  # fmt: skip
    for seed, value in enumerate(random if random is not None else []):
        rows.append({**rows[0], "measure": "knockout", "variant": "masked_random", "step": 0, "seed": seed, "metric": "delta_p", "value": value})  # fmt: skip
    frame = pd.DataFrame(rows).reindex(columns=list(COLUMNS))
    return frame.astype(dict.fromkeys(("step", "layer", "head", "position", "n_tokens", "seed"), "Int64"))


def chains_of(behaviour, **extra):
    rng = np.random.default_rng(9)
    return [
        {"chain_id": f"c{i}", "steps": ["x" * int(k) for k in rng.integers(5, 40, len(b))], **extra}
        for i, b in enumerate(behaviour)
    ]


def scores(behaviour, knockout, chains=None, **kwargs):
    records = records_of(behaviour, knockout, **kwargs)
    found, disagreements = bridge(records, chains or chains_of(behaviour), ["A"], np.random.default_rng(0))
    return {estimate.name.removeprefix(PAIR): estimate for estimate in found}, disagreements


def test_perfect_agreement():
    rng = np.random.default_rng(1)
    behaviour = [rng.permutation(np.arange(1, 7)) / 10 for _ in range(11)]
    found, disagreements = scores(behaviour, [b**2 for b in behaviour])
    assert (found["top1"].value, found["top1"].ci_low, found["top1"].ci_high) == (1, 1, 1)
    assert found["top1_chance"].value == pytest.approx(1 / 6)
    for name in ("rho", "rho_within"):
        assert found[name].value == pytest.approx(1)
        assert found[name].p == pytest.approx(1 / 1000)
    assert found["rho_partial"].value == pytest.approx(1)
    assert disagreements.empty


def test_independent_sides():
    rng = np.random.default_rng(2)
    behaviour, knockout = rng.uniform(size=(41, 5)), rng.uniform(size=(41, 5))
    found, disagreements = scores(behaviour, knockout)
    assert found["top1"].value == pytest.approx(0.2, abs=0.15)
    assert found["top1"].p > 0.05
    assert abs(found["rho"].value) < 0.15
    assert found["rho"].ci_low < 0 < found["rho"].ci_high
    assert found["rho_within"].p > 0.05
    apart = np.argmax(behaviour, 1) != np.argmax(knockout, 1)
    assert disagreements["chain_id"].tolist() == sorted(f"c{i}" for i in np.flatnonzero(apart))


def test_position_alone_makes_rho_but_not_partial_rho():
    rng = np.random.default_rng(3)
    position = np.tile(np.arange(7) / 7, (37, 1))
    behaviour = position + rng.normal(0, 0.1, position.shape)
    knockout = position + rng.normal(0, 0.1, position.shape)
    found, _ = scores(behaviour, knockout)
    assert found["rho"].value > 0.75
    assert found["rho_position"].value > 0.85
    assert found["rho_is_last"].value > 0.4
    assert abs(found["rho_partial"].value) < 0.15
    assert found["rho_partial"].p > 0.01
    assert "position, is_last, characters, n_tokens, confidence" in found["rho_partial"].note


def test_effects_not_above_the_control_are_ties():
    behaviour, knockout = [[0.1, 0.2, 0.9]], [[0.05, 0.04, 0.03]]
    quiet, quiet_list = scores(behaviour, knockout, random=[0.001] * 20)
    assert quiet["top1"].value == 0
    assert quiet_list["reason"].tolist() == ["different steps"]
    assert (quiet_list["step_behaviour"][0], quiet_list["step_mechanism"][0]) == (2, 0)
    loud, loud_list = scores(behaviour, knockout, random=[0.06] * 20)
    assert loud["top1"].value == pytest.approx(1 / 3)
    assert loud_list["reason"].tolist() == ["mistakes move the answer, no mechanism effect is above its control"]
    assert loud_list["step_mechanism"][0] is None or np.isnan(loud_list["step_mechanism"][0])
    # one of twenty random cuts is large: the 95th percentile, not the maximum, is the floor
    one, _ = scores(behaviour, knockout, random=[0.001] * 39 + [0.5])
    assert one["top1"].value == 0


def test_agreement_breaks_ties_at_random():
    starts = np.array([0, 3, 5])
    behaviour = np.array([1.0, 1, 0, 2, 1, 0, 0])
    effect = np.array([1.0, 0, 0, 2, 2, 0, 0])
    assert agreement(behaviour, effect, starts) == pytest.approx([1 / 2, 1 / 2, 1 / 2])
    rng = np.random.default_rng(0)
    noise = rng.uniform(0, 1e-6, (2, 20_000, 3))
    brute = np.mean((behaviour[:3] + noise[0]).argmax(1) == (effect[:3] + noise[1]).argmax(1))
    assert brute == pytest.approx(0.5, abs=0.02)


def test_short_chains_have_no_rho_of_their_own():
    found, _ = scores([[0.1, 0.5, 0.2]] * 4, [[0.1, 0.5, 0.2]] * 4)
    assert np.isnan(found["rho_within"].value)
    assert found["rho_within"].note == "no chain has 5 steps that differ on both sides"
    assert found["top1"].value == 1


def test_few_draws_are_said():
    found, _ = scores([[0.1, 0.5], [0.5, 0.1]], [[0.1, 0.5], [0.5, 0.1]], draws=4)
    assert found["top1"].note.startswith("some chain has fewer than 5 mistakes in a step")


def test_without_the_steps_that_state_the_answer():
    behaviour = [[0.1, 0.3, 0.9], [0.3, 0.1, 0.9], [0.2, 0.4, 0.9]]
    knockout = [[0.3, 0.1, 0.9], [0.1, 0.3, 0.9], [0.4, 0.2, 0.9]]
    found, _ = scores(behaviour, knockout, chains_of(behaviour, answer_steps=[2]))
    assert found["top1"].value == 1
    assert found["top1 | without_answer_steps"].value == 0
    assert found["top1_chance | without_answer_steps"].value == pytest.approx(1 / 2)
    assert not [name for name in scores(behaviour, knockout)[0] if "without" in name]


def test_a_problem_missing_on_one_side_is_left_out():
    records = records_of([[0.1, 0.5], [0.5, 0.1], [0.1, 0.6]], [[0.1, 0.5], [0.1, 0.5], [0.1, 0.5]])
    gone = (records["measure"] == "knockout") & (records["chain_id"] == "c1")
    found, _ = bridge(records[~gone], chains_of([[0, 0]] * 3), ["A"], np.random.default_rng(0))
    top1 = next(estimate for estimate in found if estimate.name == PAIR + "top1")
    assert (top1.value, top1.n_problems) == (1, 2)


def test_patch_and_direct_columns_by_hand():
    records = records_of([[0.1, 0.5]], [[0.1, 0.5]])
    base = records.iloc[0].to_dict()

    def row(measure, variant, metric, value, **where):
        return {**base, "measure": measure, "variant": variant, "metric": metric, "value": value, **where}

    extra = [
        row("patching", "noise", "p_answer_base", 0.8),
        row("control", "norm_matched", "delta_p", -0.2, step=0, layer=6),
    ]
    for layer, values in ((2, (0.0, 0.0)), (6, (0.7, 0.2)), (8, (0.8, 0.8))):
        for step, value in enumerate(values):
            extra.append(row("patching", "noise", "p_answer", value, step=step, layer=layer, site=f"blocks.{layer}.hook_resid_pre"))  # fmt: skip
            extra.append(
                row("attribution", "direct", "contribution", layer * (step + 1), step=step, layer=layer, head=0)
            )
    extra.append(row("attribution", "direct", "contribution", 99.0, layer=2, head=0))
    records = pd.concat([records, pd.DataFrame(extra).astype(records.dtypes.drop("site"))], ignore_index=True)
    chains = {row["chain_id"]: row for row in chains_of([[0.1, 0.5]])}
    table = step_table(records, chains)
    assert table["patch"].tolist() == pytest.approx([0, 0.6])  # .1 does not pass the control's .2
    assert table["direct"].tolist() == pytest.approx([16, 32])
    assert table["mistake"].tolist() == pytest.approx([0.1, 0.5])
    assert table["position"].tolist() == [0, 1]
    assert table["confidence"].tolist() == [0.9, 0.9]
    assert step_table(records, chains, layer=2)["patch"].tolist() == pytest.approx([0.8, 0.8])
    names = {estimate.name for estimate in bridge(records, list(chains.values()), ["A"], np.random.default_rng(0))[0]}
    assert {"bridge/mistake~patch/top1", "bridge/mistake~direct/top1"} <= names


def test_readers_keep_their_own_control():
    quiet = records_of([[0.1, 0.9]], [[0.05, 0.2]], random=[0.01] * 10)
    loud = records_of([[0.1, 0.9]], [[0.05, 0.2]], random=[0.5] * 10, reader="B")
    table = step_table(pd.concat([quiet, loud], ignore_index=True), {"c0": chains_of([[0, 0]])[0]})
    assert table.groupby("reader")["knockout"].apply(list).to_dict() == {"A": [0.05, 0.2], "B": [0, 0]}


def test_correlations_against_scipy():
    rng = np.random.default_rng(4)
    z = rng.normal(size=(60, 1))
    x, y = z[:, 0] + rng.normal(size=60), z[:, 0] + rng.normal(size=60)
    assert spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert np.isnan(spearman(x, np.ones(60)))
    rxy, rxz, ryz = (scipy.stats.spearmanr(a, b).statistic for a, b in ((x, y), (x, z[:, 0]), (y, z[:, 0])))
    textbook = (rxy - rxz * ryz) / np.sqrt((1 - rxz**2) * (1 - ryz**2))
    assert partial_spearman(x, y, z) == pytest.approx(textbook)
    assert np.isnan(partial_spearman(z[:, 0], y, z))
