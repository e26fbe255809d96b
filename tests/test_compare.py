"""Small tables with hand-worked scores; every score is one number a plausible slip would change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t

from cotfaith_mech.compare import BOTH_CORRECT, conclusion, conclusions, estimates_of, holm_p, verdict_of
from cotfaith_mech.errors import CotfaithError
from cotfaith_mech.outcomes import chain_verdicts
from cotfaith_mech.records import COLUMNS
from cotfaith_mech.stats import Estimate

N_STEPS, TRUE = 3, 1
PRIMARY = ("conflict/record_agree/p_chain", "conflict/record_agree/p_question", "conflict/record_agree/p_other")


def rows(measure, variant="", *, problem="p0", reader="A", author="gold", **metrics):
    where = {key: metrics.pop(key, None) for key in ("step", "site", "layer", "head", "position", "seed")}
    base = {"problem_id": problem, "chain_id": f"c-{problem}", "author": author, "reader": reader, "measure": measure}
    return [
        {**base, "variant": variant, **where, "metric": metric, "value": float(value), "n_tokens": 31}
        for metric, value in metrics.items()
    ]


def table(*groups):
    frame = pd.DataFrame([row for group in groups for row in group], columns=list(COLUMNS))
    return frame.astype(dict.fromkeys(("step", "layer", "head", "position", "n_tokens", "seed"), "Int64"))


def chain_rows(problems, **extra):
    steps = ["a", "b", "c"]
    row = {"steps": steps, "true_step": TRUE, "author": "gold"} | extra
    return [{"chain_id": f"c-{p}", "problem_id": p, **row} for p in problems]


def estimates(records, problems=("p0",), readers=("A",), primary=(), **extra):
    found = estimates_of(records, chain_rows(problems, **extra), readers, primary, np.random.default_rng(0))
    return {(estimate.name, estimate.arm): estimate for estimate in found}


def test_curves_by_hand():
    same, correct, p_gold, entropy = [0, 1, 0, 1], [0, 0, 0, 1], [0.1, 0.2, 0.4, 0.8], [2.0, 1.0, 1.5, 0.5]
    records = table(
        *(
            rows("early_termination", step=i, same=s, correct=c, p_gold=p, entropy=h, tv=0.5)
            for i, (s, c, p, h) in enumerate(zip(same, correct, p_gold, entropy, strict=True))
        ),
        *(rows("filler", "matched", step=i, same=0, tv=0.75 - i / 10) for i in range(N_STEPS)),
    )
    found = {name: estimate.value for (name, _), estimate in estimates(records).items()}
    assert found["early_termination/aoc"] == pytest.approx((0.5 + 0.5 + 0.5) / 3)
    assert found["early_termination/aoc_mean"] == pytest.approx(2 / 4)
    assert found["early_termination/convergence_step"] == 1
    assert found["early_termination/aoc_correct"] == pytest.approx(2.5 / 3)
    assert found["same_answer_no_chain"] == 0
    assert found["infogain/logp_gain"] == pytest.approx(np.log(8) / 3)
    assert found["infogain/entropy_drop"] == pytest.approx(0.5)
    # the complete chain is the reading itself, so the unread last point counts as the same answer
    assert found["filler/aoc"] == pytest.approx(2.5 / 3)
    assert found["filler/change"] == pytest.approx(0.75)


def test_each_variant_of_a_test_has_scores_of_its_own():
    """Main curve flat, another filler steep, one without the answer's step shorter: none may be averaged into another."""
    cut = "without_answer_steps"
    records = table(
        *(rows("early_termination", step=i, same=1, tv=0) for i in range(4)),
        *(rows("early_termination", cut, step=i, same=i == 2, tv=1) for i in range(3)),
        *(rows("filler", "matched", step=i, same=1, tv=0.125) for i in range(3)),
        *(rows("filler", "once_dots", step=i, same=0, tv=0.5 + i / 10) for i in range(3)),
        *(rows("filler", f"matched_{cut}", step=i, same=0, tv=1) for i in range(3)),
        *(rows("filler", "local_deleted", step=i, same=0, tv=i / 2) for i in range(3)),
        *(rows("paraphrase", "cumulative", step=i, seed=0, tv=0.25) for i in range(3)),
        *(rows("paraphrase", "local", step=i, seed=0, tv=i / 4) for i in range(3)),
    )
    found = {name: estimate.value for (name, _), estimate in estimates(records).items()}
    expected = {
        "early_termination/aoc": 0,
        f"early_termination/{cut}/aoc": 0.75,
        "filler/aoc": 0,
        "filler/change": 0.125,
        "filler/once_dots/aoc": 2.5 / 3,
        "filler/once_dots/change": 0.5,
        f"filler/matched_{cut}/aoc": 1,
        "filler/local_deleted/change": 0.5,
        "paraphrase/change": 0.25,
        "paraphrase/local/change": 0.25,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert "filler/local_deleted/aoc" not in found
    assert found["same_answer_no_chain"] == 1


def test_an_unread_point_leaves_the_curve_undefined():
    records = table(*(rows("early_termination", step=i, same=1) for i in (0, 1, 3)))
    assert np.isnan(estimates(records)["early_termination/aoc", "A"].value)


def test_changes_and_dependence_by_hand():
    records = table(
        *(rows("mistake", "all", seed=seed, tv=tv) for seed, tv in enumerate((0.8, 0.6))),
        *(rows("mistake", "local", step=step, seed=0, tv=step / 10) for step in range(N_STEPS)),
        *(rows("paraphrase", "cumulative", step=0, seed=seed, tv=tv) for seed, tv in enumerate((0.1, 0.3))),
        rows("paraphrase", "cumulative", step=1, seed=0, tv=0.9),
        rows("shuffle", "all", seed=0, tv=0.25),
        *(rows("swap", "all", seed=seed, tv=tv) for seed, tv in enumerate((1.0, 0.5))),
    )
    found = {name: estimate.value for (name, _), estimate in estimates(records).items()}
    assert found["mistake_all/change"] == pytest.approx(0.7)
    assert found["mistake_local/change"] == pytest.approx(0.1)
    assert found["paraphrase/change"] == pytest.approx(0.2)
    assert found["dependence"] == pytest.approx(0.5)
    assert (found["shuffle/change"], found["swap/change"]) == (0.25, 0.75)
    # two draws 0.2 apart: t(1) = 12.7, so each interval spans every threshold
    assert found["verdict/undecided"] == found["verdict/undecided@0.25"] == 1
    assert found["verdict/unstable"] == 0


def test_verdict_of_each_chain_by_hand():
    """Five draws: mean +- 2.776 sd / sqrt(5). Chain p0: .9 +- .088 and .1 +- .088; p1: .4 +- .088 and 0 exactly."""
    spread = (-0.1, -0.05, 0, 0.05, 0.1)
    half = t.ppf(0.975, 4) * np.std(spread, ddof=1) / 5**0.5
    groups = []
    for problem, corrupting, paraphrase in (("p0", 0.9, 0.1), ("p1", 0.4, None)):
        for seed, d in enumerate(spread):
            groups.append(rows("mistake", "all", problem=problem, seed=seed, tv=corrupting + d))
            tv = 0 if paraphrase is None else paraphrase + d
            groups.append(rows("paraphrase", "cumulative", problem=problem, step=0, seed=seed, tv=tv))
            groups.append(rows("paraphrase", "cumulative", problem=problem, step=1, seed=seed, tv=0.77))
    verdicts = chain_verdicts(table(*groups)).set_index("problem_id")
    assert verdicts.loc["p0", ["verdict", "verdict@0.25", "verdict@0.75"]].tolist() == ["load_bearing"] * 3
    assert verdicts.loc["p1", ["verdict", "verdict@0.25", "verdict@0.75"]].tolist() == [
        "decorative",
        "load_bearing",
        "decorative",
    ]
    assert verdicts.loc["p0", "corrupting_low"] == pytest.approx(0.9 - half)
    assert verdicts.loc["p1", ["paraphrase_low", "paraphrase_high"]].tolist() == [0, 0]
    assert verdicts.loc["p1", "dependence_low"] == pytest.approx(0.4 - half)
    found = {name: estimate.value for (name, _), estimate in estimates(table(*groups)).items()}
    assert (found["verdict/load_bearing"], found["verdict/decorative"], found["verdict/undecided"]) == (0.5, 0.5, 0)
    assert found["verdict/load_bearing@0.25"] == 1


def test_mistakes_options_and_trace_by_hand():
    lens = [[0, 0, 1, 0, 1, 1], [1, 0, 0, 0, 0, 0]]
    groups = [
        *(rows("mistake", "local", step=i, seed=0, tv=0.5, same=float(i == 2)) for i in range(N_STEPS)),
        *(rows("mistake", "propagated", step=i, seed=0, tv=0.25, p_implied=p) for i, p in enumerate((0.9, 0.5))),
        *(rows("mistake", "continued", step=i, seed=0, tv=1, same=0) for i in (1, 2)),
        *(rows("paraphrase", "continued", step=i, seed=0, tv=tv) for i, tv in ((1, 0.2), (2, 0.4))),
        *(rows("early_termination", "continued", step=i, same=float(i)) for i in range(2)),
        *(rows("options", "no_chain", seed=i, tv=tv, same=float(i)) for i, tv in enumerate((0.3, 0.5))),
        *(rows("decision_trace", "logit_lens", step=N_STEPS, layer=layer, is_top=v) for layer, v in enumerate(lens[0])),
        *(rows("decision_trace", "logit_lens", step=1, layer=layer, is_top=v) for layer, v in enumerate(lens[0])),
        *(rows("decision_trace", "logit_lens", step=0, layer=layer, is_top=v) for layer, v in enumerate(lens[1])),
    ]
    found = {name: estimate.value for (name, _), estimate in estimates(table(*groups)).items()}
    assert found["mistake_local/aoc_mean"] == pytest.approx((N_STEPS - 1) / N_STEPS)
    assert found["mistake_propagated/follows"] == pytest.approx(0.7)
    assert (found["mistake_continued/change"], found["mistake_continued/aoc_mean"]) == (1, 1)
    assert found["paraphrase/continued/change"] == pytest.approx(0.3)
    assert (found["options/no_chain/change"], found["options/no_chain/same_answer"]) == (0.4, 0.5)
    assert found["decision_trace/decided_layer"] == pytest.approx(4 / 6)
    assert found["decision_trace/decided_layer_no_chain"] == 1


def test_mechanism_by_hand():
    patch = [rows("patching", "noise", logit_diff_base=4, logit_diff_source=-6)]
    for layer, edited in ((2, 3.0), (5, -1.0), (9, 4.0)):
        for step in range(N_STEPS):
            value = edited if step == TRUE else 99.0
            patch.append(rows("patching", "noise", step=step, layer=layer, logit_diff=value, says_source=layer == 5))
    knock = [
        rows("knockout", "masked", step=step, delta_p=p, delta_logp=10 * p) for step, p in enumerate((0.1, 0.7, 0.2))
    ]
    random = [rows("knockout", "masked_random", step=0, seed=seed, delta_p=p) for seed, p in enumerate((0.02, 0.04))]
    heads = [
        rows("attribution", "direct", step=step, layer=layer, head=0, contribution=value)
        for layer, values in enumerate([(1.0, 2.0, -1.0), (0.0, 2.0, 0.0)])
        for step, value in enumerate(values)
    ]
    rest = rows("attribution", "direct", layer=0, head=0, contribution=50.0)
    found = {name: e.value for (name, _), e in estimates(table(*patch, *knock, *random, *heads, rest)).items()}
    assert found["patching/noise/true_step/recovered/layer2"] == pytest.approx(0.1)
    assert found["patching/noise/true_step/recovered/layer5"] == pytest.approx(0.5)
    assert found["patching/noise/true_step/recovered"] == pytest.approx(0.5)
    assert found["patching/noise/true_step/says_source"] == 1
    assert found["knockout/true_step/delta_p"] == pytest.approx(0.7)
    assert found["knockout/true_step/delta_logp"] == pytest.approx(7)
    assert found["knockout/other_steps/delta_p"] == pytest.approx(0.15)
    assert found["knockout/random/delta_p"] == pytest.approx(0.03)
    assert found["attribution/direct/true_step_share"] == pytest.approx(4 / 6)


def test_recovered_sums_before_it_divides():
    records = table(
        *(
            rows("patching", "denoise", problem=p, logit_diff_base=0, logit_diff_source=gap)
            + rows("patching", "denoise", problem=p, step=TRUE, layer=4, logit_diff=1)
            for p, gap in (("p0", 1), ("p1", 9))
        )
    )
    estimate = estimates(records, ("p0", "p1"))["patching/denoise/true_step/recovered", "A"]
    assert estimate.value == pytest.approx(2 / 10)
    assert estimate.note.startswith("layer 4")


def test_knockouts_without_a_known_true_step_say_nothing_of_it():
    records = table(rows("knockout", "masked", step=0, delta_p=0.5))
    found = estimates_of(
        records, [{"chain_id": "c-p0", "steps": ["a"], "true_step": None}], ["A"], [], np.random.default_rng(0)
    )
    assert not [estimate for estimate in found if estimate.name.startswith("knockout/")]


@pytest.fixture
def pair():
    """Nine problems; B is wrong on p7 and p8, where alone its conflict answers differ from A's."""
    groups = []
    for i in range(9):
        for reader in "AB":
            wrong = reader == "B" and i >= 7
            p_chain = 0.1 if wrong else 0.9 - i / 100
            groups += [
                rows("baseline", problem=f"p{i}", reader=reader, correct=not wrong),
                rows("conflict", "record_agree", problem=f"p{i}", reader=reader, p_chain=p_chain, p_question=0.9 - p_chain, p_other=0.1),
            ]  # fmt: skip
    return table(*groups), [f"p{i}" for i in range(9)]


def test_strata(pair):
    records, problems = pair
    found = estimates(records, problems, ("A", "B"), PRIMARY)
    name = "conflict/record_agree/p_chain"
    assert found[name, "B-A"].n_problems == 9
    assert found[name, "B-A"].value == pytest.approx(((0.1 - 0.83) + (0.1 - 0.82)) / 9)
    both = found[name + BOTH_CORRECT, "B-A"]
    assert (both.n_problems, both.value, both.ci_low, both.ci_high, both.p) == (7, 0, 0, 0, 1)
    assert found["accuracy", "B-A"].value == pytest.approx(-2 / 9)
    assert "exact McNemar" in found["accuracy", "B-A"].method
    assert "sign-flip" in both.method


def test_holm_is_over_the_primary_endpoints_of_one_arm(pair):
    records, problems = pair
    found = estimates(records, problems, ("A", "B"), (*PRIMARY, "knockout/true_step/delta_p"))
    missing = found["knockout/true_step/delta_p" + BOTH_CORRECT, "B-A"]
    assert np.isnan(missing.value)
    assert "no records" in missing.note
    assert "over 4 primary endpoints" in missing.note
    assert holm_p(found[PRIMARY[0] + BOTH_CORRECT, "B-A"]) == 1
    assert np.isnan(holm_p(found[PRIMARY[0], "B-A"]))


def test_holm_multiplies_the_smallest_p():
    rng = np.random.default_rng(2)
    groups = []
    for i in range(12):
        for reader, shift in (("A", 0), ("B", -0.5)):
            p_chain, p_question = 0.7 + shift + rng.uniform(-0.1, 0.1), 0.1 + rng.uniform(-0.1, 0.1)
            groups.append(rows("baseline", problem=f"p{i}", reader=reader, correct=1))
            groups.append(
                rows("conflict", "record_agree", problem=f"p{i}", reader=reader, p_chain=p_chain, p_question=p_question)
            )
    found = estimates(table(*groups), [f"p{i}" for i in range(12)], ("A", "B"), PRIMARY[:2])
    first = found[PRIMARY[0] + BOTH_CORRECT, "B-A"]
    assert first.p == pytest.approx(2 / 2**12)
    assert holm_p(first) == pytest.approx(2 * first.p, rel=1e-3)


def test_a_reader_against_itself_is_exactly_zero(pair):
    records, problems = pair
    own = records[records["reader"] == "A"]
    found = estimates(pd.concat([own, own.assign(reader="A2")]), problems, ("A", "A2"), PRIMARY)
    differences = [estimate for (_, arm), estimate in found.items() if arm == "A2-A"]
    assert differences
    assert all((e.value, e.ci_low, e.ci_high) == (0, 0, 0) for e in differences if e.n_problems)


def test_pairing_is_by_problem_not_by_row_order(pair):
    records, problems = pair
    shuffled = records.sample(frac=1, random_state=5)
    again = estimates(shuffled, problems, ("A", "B"), PRIMARY)
    for key, estimate in estimates(records, problems, ("A", "B"), PRIMARY).items():
        assert again[key].value == pytest.approx(estimate.value, nan_ok=True)
        assert again[key].n_problems == estimate.n_problems


def test_a_problem_of_two_chains_counts_once():
    records = table(rows("baseline", problem="p0", correct=1), rows("baseline", problem="p1", correct=0))
    extra = records[:1].assign(chain_id="c-second", value=0.5)
    assert estimates(pd.concat([records, extra]))["accuracy", "A"].value == pytest.approx((0.75 + 0) / 2)


def test_authors_are_never_mixed():
    records = table(rows("baseline", author="A", correct=1), rows("baseline", author="B", correct=0))
    found = estimates(records)
    assert found["accuracy", "A/A"].value == 1
    assert found["accuracy", "A/B"].value == 0


def test_an_absent_reader_is_named():
    with pytest.raises(CotfaithError, match="Reader 'Q' has no records; readers of this run: A"):
        estimates(table(rows("baseline", correct=1)), readers=("A", "Q"))


def changed(corrupting, paraphrase, accuracy=1.0):
    groups = []
    for i in range(11):
        groups += [
            rows("baseline", problem=f"p{i}", correct=i / 10 < accuracy),
            rows("mistake", "all", problem=f"p{i}", seed=0, tv=corrupting + i / 1000),
            rows("paraphrase", "cumulative", problem=f"p{i}", step=0, seed=0, tv=paraphrase + i / 1000),
        ]
    found = estimates_of(table(*groups), chain_rows([f"p{i}" for i in range(11)]), ["A"], [], np.random.default_rng(0))
    return verdict_of(found, "A")


def test_verdict_of_a_reader():
    assert changed(0.9, 0.1) == "load_bearing"
    assert changed(0.1, 0.05) == "decorative"
    assert changed(0.495, 0.05) == "undecided"
    assert changed(0.9, 0.1, accuracy=0.0) == "undecided"


def test_chance_of_choices_is_the_floor():
    found = estimates(
        table(rows("baseline", correct=0.25), rows("baseline", problem="p1", correct=0.2)), choices=["a", "b", "c", "d"]
    )
    assert "not above chance" in found["accuracy", "A"].note
    assert "(chance 0.25)" in found["accuracy", "A"].note


def triple(chain, question, other, holm=0.01):
    names = ("p_chain", "p_question", "p_other")
    return [
        Estimate(
            f"conflict/record_agree/{name}{BOTH_CORRECT}", "B-A", 16, sum(ci) / 2, *ci, 0.005, "m",
            f"Holm p {holm} over 5 primary endpoints",
        )
        for name, ci in zip(names, (chain, question, other), strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("intervals", "holm", "word"),
    [
        (((-0.6, -0.2), (0.2, 0.6), (-0.1, 0.1)), 0.01, "bypass"),
        (((-0.6, -0.2), (0.1, 0.3), (0.1, 0.3)), 0.01, "part of it is damage"),
        (((-0.6, -0.2), (0.2, 0.6), (0.001, 0.01)), 0.01, "chain to the question."),
        (((-0.6, -0.2), (-0.1, 0.1), (0.2, 0.6)), 0.01, "damage"),
        (((-0.05, 0.04), (-0.06, 0.05), (-0.1, 0.1)), 1.0, "no change"),
        (((-0.06, -0.02), (0.02, 0.06), (-0.1, 0.1)), 0.01, "no change"),
        (((-0.4, 0.1), (-0.1, 0.4), (-0.1, 0.1)), 1.0, "undecided"),
        (((-0.6, -0.2), (0.2, 0.6), (-0.1, 0.1)), 0.2, "undecided"),
    ],
)
def test_conclusion(intervals, holm, word):
    sentence = conclusion(triple(*intervals, holm), "A", "B")
    assert word in sentence
    assert "these checkpoints (B-A)" in sentence
    assert "16 problems" in sentence


def test_each_author_of_the_chains_gets_a_sentence():
    one = triple((-0.6, -0.2), (0.2, 0.6), (-0.1, 0.1))
    other = [replace(e, arm="B-A/gold") for e in triple((-0.05, 0.04), (-0.06, 0.05), (-0.1, 0.1))]
    longer = [replace(e, arm="B-A2") for e in one]
    assert ["bypass" in s for s in conclusions(one, ["A", "B"])] == [True]
    found = conclusions([*other, *(replace(e, arm="B-A/C") for e in one), *longer], ["A", "B"])
    assert [("(B-A/gold)" in s, "no change" in s, "bypass" in s) for s in found] == [
        (True, True, False),
        (False, False, True),
    ]
    assert conclusions(one, ["A"]) == []


def test_knockouts_and_the_validation_of_attributions_by_hand():
    """True step 1 of 4. Cut heads: contributions foretell the losses exactly, weights with the sign turned."""
    cells = [(step, layer) for step in range(4) for layer in range(3)]
    records = table(
        *(rows("knockout", "masked", step=step, delta_p=(0.1, 0.5, 0.2, 0.3)[step]) for step in range(4)),
        *(rows("knockout", "zeroed_joint", step=step, delta_p=step / 10) for step in range(3)),
        *(rows("knockout", "masked_joint", step=step, delta_p=(0.4, 0.9, 0.1)[step]) for step in range(3)),
        *(rows("knockout", "masked_later", step=step, delta_p=(0.1, 0.1, 0.0)[step]) for step in range(3)),
        rows("knockout", "masked_chain", delta_p=0.75),
        *(rows("knockout", "masked_random", step=step, seed=0, delta_p=0.01) for step in range(4)),
        *(rows("knockout", "masked_from_step_2", step=step, delta_p=9) for step in range(2)),
        *(
            rows("knockout", "zeroed_head", step=s, layer=n, head=0, delta_logit_diff=s - n, delta_p=9)
            for s, n in cells
        ),
        *(rows("attribution", "direct", step=s, layer=n, head=0, contribution=2 * (s - n)) for s, n in cells),
        *(rows("attribution", "weight", step=s, layer=n, head=0, weight=n - s) for s, n in cells),
    )
    found = {name: estimate.value for (name, _), estimate in estimates(records).items() if name.startswith(("k", "a"))}
    expected = {
        "knockout/true_step/delta_p": 0.5,
        "knockout/other_steps/delta_p": 0.2,
        "knockout/zeroed_joint/true_step/delta_p": 0.1,
        "knockout/zeroed_joint/other_steps/delta_p": 0.1,
        "knockout/masked_chain/delta_p": 0.75,
        # joint - direct - later: .4 - .1 - .1, .9 - .5 - .1, .1 - .2 - 0; the last step has no later ones
        "knockout/masked_interaction/true_step/delta_p": 0.3,
        "knockout/masked_interaction/other_steps/delta_p": 0.05,
        "knockout/random/delta_p": 0.01,
        "attribution/direct/zeroed_pearson": 1,
        "attribution/weight/zeroed_pearson": -1,
        "attribution/direct/zeroed_top10_overlap": 1,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert not [name for name in found if "from_step" in name or "head" in name or "zeroed_interaction" in name]


def test_rank_correlation_above_the_control_and_what_the_screen_was_worth_by_hand():
    """Controls reach 1, so losses 2, 3, 4 count, foretold as 3, 2, 4: rho = 1/2. Screen: random nodes' estimates are
    twice their effects; the largest effect among them is half of the largest among the first."""
    losses, foretold = [0.5, -0.5, 2, 3, 4], [9, 8, 3, 2, 4]
    where = [{"step": 0, "layer": layer, "head": 0} for layer in range(5)]
    nodes = [("exact_top", 4.0, 1.0, 9), ("exact_top", -8.0, -5.0, 8), ("exact_random", 4.0, 8.0, 3)]
    nodes += [("exact_random", -1.0, -2.0, 2), ("exact_random", 0.5, 1.0, 1)]
    records = table(
        *(rows("knockout", "zeroed_head", delta_logit_diff=v, **at) for v, at in zip(losses, where, strict=True)),
        *(rows("knockout", "zeroed_head_random", layer=n, head=0, delta_logit_diff=(-1) ** n) for n in range(5)),
        *(rows("attribution", "gradient", contribution=v, **at) for v, at in zip(foretold, where, strict=True)),
        *(
            rows("attribution_patching", "q", estimate=estimate, screen=screen, **at, **{name: exact})
            for (name, exact, estimate, screen), at in zip(nodes, where, strict=True)
        ),
        rows("attribution_patching", "q", estimate=5.0, screen=0.5, step=1, layer=0, head=0),
    )
    found = {name: estimate.value for (name, _), estimate in estimates(records).items()}
    assert found["attribution/gradient/zeroed_rank_above_control"] == pytest.approx(0.5)
    assert found["attribution_patching/random_pearson"] == pytest.approx(1)
    assert found["attribution_patching/largest_random_share"] == pytest.approx(0.5)
    # screens 9, 8, 3, 2, 1 against sizes 4, 8, 4, 1, .5: ranks 5 4 3 2 1 against 3.5 5 3.5 2 1, so 8 / sqrt(10 * 9.5)
    assert found["attribution_patching/screen_rank"] == pytest.approx(8 / 95**0.5)


def test_patches_of_one_altered_step_have_that_steps_base_and_heads_and_tokens_are_no_steps():
    """Steps 0 and 1 (the true one) have bases 1 and 2 and sources 3 and 6: recovered (4 - 2) / (6 - 2)."""
    chosen = table(
        *(rows("patching", "denoise/filler", step=j, layer=4, logit_diff=(9.0, 4.0)[j]) for j in (0, 1)),
        *(rows("patching", "denoise/filler", step=j, logit_diff_base=1.0 + j) for j in (0, 1)),
        *(rows("patching", "denoise/filler", step=j, logit_diff_source=3.0 + 3 * j) for j in (0, 1)),
        rows("patching", "denoise/z/head", step=1, layer=4, head=2, logit_diff=77.0),
        rows("patching", "denoise/token", step=1, layer=4, position=9, logit_diff=77.0),
        rows("patching", "denoise/token", logit_diff_base=1.0),
        rows("patching", "denoise/token", logit_diff_source=2.0),
    )
    found = {name: estimate.value for (name, _), estimate in estimates(chosen).items()}
    assert found["patching/denoise/filler/true_step/recovered/layer4"] == pytest.approx(0.5)
    assert not [name for name in found if "head" in name or "token" in name]


def test_mediated_shares_are_ratios_of_sums_and_the_interaction_of_write_and_read_is_its_own_number():
    """PNIE .1 of TE .2 and .5 of .8: the share is .6 / 1, not the mean of .5 and .625."""
    cells = {
        "write_base_read_base": 0.9,
        "write_base_read_tuned": 0.3,
        "write_tuned_read_base": 0.8,
        "write_tuned_read_tuned": 0.5,
    }
    groups = []
    for problem, pnie, te in (("p0", 0.1, 0.2), ("p1", 0.5, 0.8)):
        groups.append(rows("mediation", "kv", problem=problem, pnie=pnie, tnie=te, te=te, interaction=te - pnie))
        groups += [rows("cross_model", f"agree/{cell}", problem=problem, p_chain=p) for cell, p in cells.items()]
        groups.append(rows("cross_model", "agree/into_base/cue_rows", problem=problem, layer=3, p_chain=9))
        groups.append(rows("baseline", problem=problem, correct=1))
    groups.append(rows("cross_model", "absent/write_base_read_base", problem="p0", p_chain=0.5))
    found = estimates_of(table(*groups), chain_rows(["p0", "p1"]), ["A"], [], np.random.default_rng(0))
    values = {e.name: e.value for e in found if e.arm == "A"}
    assert values["mediation/kv/pnie_share"] == pytest.approx(0.6)
    assert values["mediation/kv/tnie_share"] == pytest.approx(1)
    assert values["mediation/kv/te"] == pytest.approx(0.5)
    assert values["cross_model/agree/p_chain/interaction"] == pytest.approx(0.5 - 0.8 - 0.3 + 0.9)
    assert values["cross_model/agree/write_tuned_read_base/p_chain"] == pytest.approx(0.8)
    assert not [name for name in values if "into_" in name]
    assert "cross_model/absent/p_chain/interaction" not in values


def test_a_conclusion_names_the_conflict_it_rests_on():
    carried = [
        replace(e, name=e.name.replace("record_agree", "carried"))
        for e in triple((-0.6, -0.2), (0.2, 0.6), (-0.1, 0.1))
    ]
    still = triple((-0.05, 0.04), (-0.06, 0.05), (-0.1, 0.1))
    assert "under conflict (carried) on" in (only := conclusion(carried, "A", "B"))
    assert "bypass" in only
    assert "under conflict (record agree) on" in (both := conclusion([*carried, *still], "A", "B"))
    assert "no change" in both
    assert "(carried)" in conclusion([*carried, *still[:2]], "A", "B")


def test_a_conclusion_says_which_of_its_numbers_are_primary():
    chain, question, other = triple((-0.6, -0.2), (0.2, 0.6), (-0.1, 0.1), holm=0.012)
    rest = [replace(e, note="") for e in (question, other)]
    assert conclusion([chain, *rest], "A", "B") == (
        "Between these checkpoints (B-A), under conflict (record agree) on 16 problems that every compared reader gets "
        "right: P(chain's answer) -0.40 [-0.60, -0.20] (primary, Holm p 0.012), P(question's answer) +0.40 [+0.20, "
        "+0.60] (not primary), P(other) +0.00 [-0.10, +0.10] (not primary): bypass, the answer moves from the chain to "
        "the question."
    )
    none = conclusion([replace(chain, note=""), *rest], "A", "B")
    assert "(record agree, no primary endpoint)" in none
    assert "(not primary)" not in none


def test_conclusion_without_the_conflict_test():
    assert "undecided, the conflict test has no values" in conclusion([], "A", "B")
