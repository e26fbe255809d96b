"""Where numbers end: saturated logits, ties, p of 0 and 1, one problem, one step, chains that are all alike.

Each gives a defined number, worked out here by hand, or NaN with a reason. numpy's and scipy's warnings are errors.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from cotfaith_mech import metrics, stats
from cotfaith_mech.arithmetic import people_problems
from cotfaith_mech.backends.huggingface import HuggingFaceModel
from cotfaith_mech.behaviour import measure_behaviour
from cotfaith_mech.chains import Chain
from cotfaith_mech.compare import conclusion, estimates_of, moved, verdict_of
from cotfaith_mech.config import load_config
from cotfaith_mech.contrast import AnswerContrast
from cotfaith_mech.knockout import KnockoutPlan, measure_knockout
from cotfaith_mech.mediation import effects, measure_cmi, measure_mediation
from cotfaith_mech.merge import student
from cotfaith_mech.outcomes import outcomes, recovered
from cotfaith_mech.patching import PatchPlan, measure_patching
from cotfaith_mech.reading import Trunk, _entropy
from cotfaith_mech.sampling import supplied_chain
from cotfaith_mech.stats import Estimate
from cotfaith_mech.study import run_study
from cotfaith_mech.units import undefined_in
from cotfaith_mech.variants import BehaviourPlan

from .test_bridge import chains_of, scores
from .test_compare import chain_rows, estimates, rows, table
from .tiny import tiny
from .tiny_study import write_tiny_study

NAN, INF = math.nan, math.inf
A, FOIL = 2, 1
CONTRAST = AnswerContrast((A,), 0, A, FOIL)
"""a* is token 2 of 4, its foil token 1."""


# logits


@pytest.mark.parametrize(
    ("logits", "difference", "p", "says_foil", "says_own", "logp"),
    [
        ((0, 0, 1e4, 0), 1e4, 1, 0, 1, 0),
        ((0, 1e4, 0, 0), -1e4, 0, 1, 0, -1e4),
        ((-INF, -INF, 5, -INF), INF, 1, 0, 1, 0),
        ((-INF, 5, -INF, -INF), -INF, 0, 1, 0, -INF),
        ((0, 7, 7, 0), 0, 0.5, 1, 0, math.log(0.5)),
        ((0, -INF, -INF, 0), NAN, 0, 0, 0, -INF),
        ((0, NAN, 3, 0), NAN, NAN, NAN, NAN, NAN),
    ],
)
def test_saturated_and_tied_logits_by_hand(
    logits: tuple[float, ...], difference: float, p: float, says_foil: float, says_own: float, logp: float
) -> None:
    """Of a tie the first token is said. With a* and foil both impossible their difference alone is undefined."""
    row = CONTRAST.reduce(torch.tensor([[logits]], dtype=torch.float32))[0].tolist()
    expected = [difference, p, says_foil, says_own, says_own, logp]
    assert row == pytest.approx(expected, abs=1e-2, nan_ok=True)
    if p in (0, 1):
        assert row[1] == p


@pytest.mark.parametrize(
    ("base", "edited", "kl"),
    [
        ((0, 0, 1e4, 0), (0, 0, 1e4, 0), 0),
        ((0, 0, 1e4, 0), (0, 1e4, 0, 0), 1e4),
        ((-INF, 0, 0, -INF), (-INF, 0, 0, -INF), 0),
        ((-INF, 0, 0, -INF), (-INF, 0, math.log(3), -INF), math.log(0.5) - (math.log(1 / 4) + math.log(3 / 4)) / 2),
        ((-INF, 0, 0, -INF), (0, 0, 0, 0), math.log(2)),
        ((0, 0, 0, 0), (-INF, 0, 0, 0), INF),
        ((0, 0, 0, 0), (NAN, 0, 0, 0), NAN),
    ],
)
def test_divergence_counts_no_token_that_the_base_gives_nothing(
    base: tuple[float, ...], edited: tuple[float, ...], kl: float
) -> None:
    base_row, edited_row = (torch.tensor([one], dtype=torch.float32) for one in (base, edited))
    assert CONTRAST.beside(base_row)(edited_row[None])[0, -1].item() == pytest.approx(kl, nan_ok=True)


@pytest.mark.parametrize(("logits", "entropy"), [((1e4, 0, 0), 0), ((5, -INF, -INF), 0), ((3, 3, -INF), math.log(2))])
def test_entropy_of_a_sure_reader_is_zero(logits: tuple[float, ...], entropy: float) -> None:
    logp = torch.tensor(logits, dtype=torch.float32).log_softmax(-1)
    assert float(_entropy(logp)) == pytest.approx(entropy)


def labels_trunk(shift: float, favoured: str | None) -> tuple[Trunk, list[str]]:
    """A choice on a model whose unembedding gives `shift` more to one label's token, and to the others the same 0."""
    labels = ("A", "B", "C")
    weights = tiny("llama-gqa")
    weights.model.config.max_position_embeddings = 512
    model = HuggingFaceModel(weights)
    chain = Chain("p", "hand", "Which?\n", (" Ann has 22.", " Bob has 26."), "\nSo the answer is")
    tokens = [model.encode(chain.with_answer(f" {label}").text).ids[-1] for label in labels]
    old = weights.model.lm_head
    head = torch.nn.Linear(old.in_features, old.out_features).requires_grad_(False)
    head.weight.copy_(old.weight)
    head.bias.fill_(-1e4)
    for label, token in zip(labels, tokens, strict=True):
        head.weight[token] = 0
        head.bias[token] = shift if label == favoured else 0.0
    weights.model.lm_head = head
    trunk = Trunk.of(model, chain, "choice", labels)
    return trunk, [f" {label}" for label in labels]


@pytest.mark.parametrize(("shift", "favoured"), [(1e4, "B"), (-INF, "A")])
def test_a_label_that_takes_all_has_one_and_one_at_minus_infinity_nothing(shift: float, favoured: str) -> None:
    if shift == -INF:
        with pytest.raises(ValueError, match="NaN or infinite logits after the complete chain"):
            labels_trunk(shift, favoured)
        return
    trunk, asked = labels_trunk(shift, favoured)
    assert trunk.chain.answer == " B"
    [answered] = trunk.read([(trunk.chain, asked)])
    assert [one.p for one in answered.readings] == [0, 1, 0]
    assert [one.logp for one in answered.readings] == [-1e4, 0, -1e4]
    assert {(one.entropy, one.label_mass) for one in answered.readings} == {(0, 1)}


def test_of_labels_that_tie_the_first_is_said_everywhere() -> None:
    trunk, asked = labels_trunk(0.0, None)
    assert trunk.chain.answer == " A"
    [answered] = trunk.read([(trunk.chain, asked)])
    assert answered.said == "A"
    assert [one.greedy for one in answered.readings] == [True, False, False]
    assert [one.p for one in answered.readings] == pytest.approx([1 / 3] * 3)


def test_own_answer_and_reading_agree_where_every_label_is_all_but_impossible() -> None:
    """Probabilities of e^-200 and e^-210 are both 0 in float32; what is said must not turn on that."""
    trunk, asked = labels_trunk(10.0, "C")
    head = trunk.model.weights.model.lm_head
    head.bias[:3] = 200.0
    again = Trunk.of(trunk.model, replace(trunk.chain, answer=""), "choice", trunk.labels, min_label_mass=0.0)
    assert again.chain.answer == " C"
    [answered] = again.read([(again.chain, asked)])
    assert answered.said == "C"
    assert answered.readings[0].label_mass == 0


def test_every_measure_of_a_saturated_model_is_finite_or_says_where_it_is_not() -> None:
    """Logits of 1e4 and more: probabilities of exactly 0 and 1 in every record of behaviour, knockout, patching and
    mediation."""
    weights = tiny("llama-gqa")
    weights.model.config.max_position_embeddings = 512
    weights.model.lm_head.weight.mul_(1e5)
    model, problem = HuggingFaceModel(weights), people_problems(2, seed=11)[1]
    chain = supplied_chain(model, problem)
    trunk = Trunk.of(model, chain.with_answer(f" {problem.gold}"), problem.kind)
    donor = supplied_chain(model, people_problems(2, seed=11)[0])
    plan = BehaviourPlan(("early_termination", "filler", "mistake", "paraphrase", "shuffle", "conflict"), 1)
    parts = [
        measure_behaviour(trunk, problem, "A", plan),
        measure_knockout(trunk, "A", KnockoutPlan()),
        measure_patching(trunk, problem, "A", PatchPlan((1,), ("noise", "denoise"))),
        measure_mediation(trunk, problem, "A"),
        measure_cmi(trunk, [donor], "A"),
    ]
    records = [record for part in parts for record in part.records]
    p = {record.value for record in records if record.metric in ("p_answer", "p_gold")}
    assert p == {0.0}
    reasons = " ".join(reason for part in parts for reason in undefined_in(part))
    for record in records:
        if not math.isfinite(record.value):
            assert f"{record.measure} {record.variant} {record.metric}: value is {record.value}" in reasons
    assert {record.value for record in records if record.metric == "tv"} == {0.0}
    assert all(math.isnan(r.value) for r in records if r.metric == "cmi"), "neither patch takes anything"


# scores of one chain


def test_scores_of_curves_at_their_ends() -> None:
    one = np.array([1.0])
    for score in (metrics.aoc, metrics.aoc_mean, metrics.convergence_step):
        assert math.isnan(score(one))
        assert math.isnan(score(np.full(3, NAN)))
    assert metrics.infogain(np.array([0.0, 0.0, 1.0, 1.0])).tolist() == pytest.approx([NAN, NAN, 0], nan_ok=True)
    assert metrics.infogain(one).size == 0
    assert metrics.total_variation(np.array([1.0, 0]), np.array([0.0, 1])) == 1
    assert metrics.total_variation(np.array([0.0, 0]), np.array([0.0, 0])) == 0
    assert math.isnan(metrics.total_variation(np.array([NAN]), np.array([0.5])))


@pytest.mark.parametrize(
    ("samples", "interval"),
    [
        ([[0.1] * 3], (0.1, 0.1)),
        ([[1.0] * 5, [0.0] * 5], (1, 1)),
        ([[0.5]], (0, 1)),
        ([[NAN, NAN]], (0, 1)),
        ([[0.0, 1e-200]], (0, 0)),
        ([[0.0, 1.0], [NAN, 1.0]], (-1, 1)),
    ],
)
def test_intervals_of_draws_that_are_alike_undefined_or_next_to_nothing(
    samples: list[list[float]], interval: tuple[float, float]
) -> None:
    low, high = metrics.draws_interval(*map(np.array, samples))
    assert (low, high) == pytest.approx(interval, abs=1e-12)


@pytest.mark.parametrize("values", [[0.1] * 3, [1e-200] * 2, [NAN, 1.0, 2.0], [INF, 1.0, 2.0], [INF] * 3, [0.3], []])
def test_what_does_not_vary_or_is_not_finite_has_no_correlation(values: list[float]) -> None:
    """Three times .1 has a standard deviation of 1e-17 in floating point, and must not correlate for that."""
    a, b = np.array(values, float), np.arange(float(len(values)))
    assert math.isnan(metrics.pearson(a, b))
    assert math.isnan(metrics.pearson(b, a))


def test_values_next_to_nothing_correlate_as_others_do() -> None:
    a, b = np.array([0.0, 1, 3, 2]), np.array([1.0, 5, 2, 2])
    for scale in (1e-200, 1e-30, 1e200):
        assert metrics.pearson(scale * a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert metrics.spearman(np.array([1.0, 1, 1, 1]), b) is not None
    assert math.isnan(metrics.spearman(np.array([1.0, 1, 1, 1]), b))


def test_mediation_where_nothing_or_everything_runs_through_the_chain() -> None:
    nothing = effects({"qc": 0.0, "qc'": 0.0, "q'c": 1.0, "q'c'": 1.0})
    assert (nothing["pnie"], nothing["tnie"], nothing["te"], nothing["interaction"]) == (0, 0, 1, 0)
    everything = effects({"qc": 0.0, "qc'": 1.0, "q'c": 0.0, "q'c'": 1.0})
    assert (everything["pnie"], everything["pnde"], everything["te"]) == (1, 0, 1)


# statistics over problems


def defined_or_told(estimate: Estimate) -> None:
    """A value with its interval; else NaN, with a reason in the note."""
    if not np.isfinite([estimate.value, estimate.ci_low, estimate.ci_high]).all():
        assert estimate.note, estimate


SAMPLES = {
    "none": [],
    "one": [0.4],
    "two alike": [0.1, 0.1],
    "all alike": [0.1] * 7,
    "all 1": [1.0] * 7,
    "all 0": [0.0] * 7,
    "all NaN": [NAN] * 5,
    "one known": [NAN, NAN, 0.3],
    "one that differs": [0.0] * 6 + [1.0],
    "next to nothing": [1e-300, 2e-300, 3e-300],
}


@pytest.mark.parametrize("values", SAMPLES.values(), ids=SAMPLES.keys())
def test_means_and_differences_are_defined_or_say_why_not(values: list[float]) -> None:
    sample, rng = np.array(values, float), np.random.default_rng(0)
    known = sample[np.isfinite(sample)]
    mean = stats.mean_estimate("x", "A", sample, rng)
    same = stats.difference_estimate("x", "B-A", sample, sample.copy(), rng)
    for estimate in (mean, same):
        defined_or_told(estimate)
        assert estimate.n_problems == len(known)
    if len(known):
        assert mean.value == pytest.approx(known.mean(), abs=0)
        assert (same.value, same.p) == (0, 1)
    else:
        assert math.isnan(mean.value)
        assert math.isnan(same.p)
    if len(known) > 1 and np.ptp(known) == 0:
        assert (mean.ci_low, mean.ci_high, mean.note) == (mean.value, mean.value, "no variance between problems")
    if len(known) == 1:
        assert mean.note == "one problem"


@pytest.mark.parametrize(
    ("numerator", "denominator", "ratio"),
    [
        ([1.0, 2.0], [0.0, 0.0], NAN),
        ([1.0, 2.0, 1.0], [0.1, 0.2, -0.3], NAN),
        ([0.0, 0.0], [0.5, 0.25], 0),
        ([1e-30], [2e-30], 0.5),
        ([], [], NAN),
    ],
)
def test_effects_over_no_effect_are_undefined(numerator: list[float], denominator: list[float], ratio: float) -> None:
    """.1 + .2 - .3 is 6e-17 in floating point: a sum of nothing, by which nothing is divided."""
    sums = np.array(numerator, float), np.array(denominator, float)
    statistic = stats.ratio_of_sums(*sums)
    assert statistic(np.arange(len(numerator))) == pytest.approx(ratio, nan_ok=True)
    rng = np.random.default_rng(0)
    estimate = stats.statistic_estimate("r", "A", len(numerator), statistic)
    difference = stats.ratio_difference_estimate("r", "B-A", sums, sums, rng)
    defined_or_told(estimate)
    defined_or_told(difference)
    assert math.isnan(difference.value) == math.isnan(difference.p) == math.isnan(ratio)


def test_seeds_all_alike_have_an_interval_of_no_width() -> None:
    assert student(np.array([0.3, 0.3, 0.3])) == pytest.approx((0.3, 0.3, 0))
    assert student(np.zeros(4)) == (0, 0, 1)


def test_p_values_that_are_all_undefined_stay_so() -> None:
    assert np.isnan(stats.adjusted([NAN, NAN], "holm")).all()
    assert np.isnan(stats.adjusted([NAN], "fdr_bh")).all()
    assert stats.adjusted([], "holm").size == 0


@pytest.mark.parametrize(
    ("behaviour", "effect"),
    [
        ([[0.3]], [[0.2]]),
        ([[0.3], [0.3]], [[0.2], [0.2]]),
        ([[0.5] * 6] * 3, [[0.5] * 6] * 3),
        ([[0.0] * 6] * 3, [[0.0] * 6] * 3),
        ([[0.1, 0.2, 0.3, 0.4, 0.5]], [[0.0] * 5]),
        ([[0.1, 0.2, 0.3, 0.4, 0.5]] * 2, [[1.0, 2.0, 3.0, 4.0, 5.0]] * 2),
        ([[NAN] * 5] * 2, [[NAN] * 5] * 2),
    ],
    ids=["one step", "two of one step", "all tied", "all 0", "a silent mechanism", "identical chains", "all NaN"],
)
def test_the_bridge_is_defined_or_says_why_not(behaviour: list[list[float]], effect: list[list[float]]) -> None:
    found, _ = scores(behaviour, effect, chains_of(behaviour), draws=1)
    for estimate in found.values():
        if math.isnan(estimate.value) or math.isnan(estimate.ci_low):
            assert estimate.note.replace("some chain has fewer than 5 mistakes in a step", ""), estimate
    if behaviour[0] == [0.5] * 6:
        assert found["top1"].value == pytest.approx(1 / 6), "of a tie each step is the largest by chance"
        assert math.isnan(found["rho"].value)
    if effect[0] == [1.0, 2.0, 3.0, 4.0, 5.0]:
        assert (found["top1"].value, found["rho_within"].value) == pytest.approx((1, 1))
        assert found["rho_within"].ci_low == pytest.approx(found["rho_within"].ci_high)


def records_of_one(problem: str, value: float, n_steps: int = 1) -> list[list[dict]]:
    """Every kind of record of one chain, all of one value."""
    groups = [rows("baseline", problem=problem, p_answer=value, correct=1, label_mass=value)]
    for step in range(n_steps + 1):
        curve = {"same": 1, "answered": 1, "correct": 1, "p_gold": value, "entropy": value, "tv": value}
        groups.append(rows("early_termination", problem=problem, step=step, **curve))
    for step in range(n_steps):
        groups.append(rows("filler", "matched", problem=problem, step=step, same=1, tv=value))
        for seed in range(2):
            groups.append(rows("paraphrase", "cumulative", problem=problem, step=step, seed=seed, same=1, tv=value))
            groups.append(rows("mistake", "local", problem=problem, step=step, seed=seed, same=1, tv=value))
        groups.append(rows("knockout", "masked", problem=problem, step=step, delta_p=value, delta_logp=value))
        where = {"problem": problem, "step": step, "layer": 3, "site": "blocks.3.hook_resid_pre"}
        groups.append(rows("patching", "noise", **where, logit_diff=value, p_answer=value))
        groups.append(rows("attribution", "direct", problem=problem, step=step, layer=3, head=0, contribution=value))
    groups += [rows("mistake", "all", problem=problem, seed=seed, tv=value) for seed in range(2)]
    groups.append(rows("patching", "noise", problem=problem, logit_diff_base=value, logit_diff_source=value))
    groups.append(rows("mediation", "text", problem=problem, pnie=0, tnie=0, te=0))
    groups.append(rows("conflict", "record_agree", problem=problem, p_chain=value, p_question=value, p_other=value))
    return groups


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, NAN])
@pytest.mark.parametrize("problems", [("p0",), ("p0", "p1", "p2")])
def test_scores_of_chains_all_alike_are_defined_or_say_why_not(value: float, problems: tuple[str, ...]) -> None:
    """Of one problem no interval is given; of several alike it has no width; over an effect of 0 nothing is shared."""
    records = table(*(group for problem in problems for group in records_of_one(problem, value)))
    found = estimates(records, problems, true_step=0, steps=["a"])
    assert found["accuracy", "A"].value == 1
    for estimate in found.values():
        defined_or_told(estimate)
    for (name, _), estimate in found.items():
        if (name.startswith("mediation") and "share" in name) or "recovered" in name:
            assert math.isnan(estimate.value), name
    if value in (0, 1, 0.1):
        assert found["mistake_all/change", "A"].value == pytest.approx(value)
        assert found["dependence", "A"].value == 0
        if len(problems) > 1:
            assert found["mistake_all/change", "A"].ci_low == pytest.approx(value)
        else:
            assert math.isnan(found["mistake_all/change", "A"].ci_low)
            assert verdict_of(list(found.values()), "A") == "undecided"


def test_a_chain_of_no_step_has_no_gain_and_no_area() -> None:
    """As one whose only step states the answer, and which is not in chains.jsonl."""
    records = table(rows("early_termination", step=0, same=1, answered=1, correct=1, p_gold=0.5, entropy=0.2, tv=0))
    values = outcomes(records, {}).set_index("name").value
    assert math.isnan(values["infogain/logp_gain"])
    assert math.isnan(values["early_termination/aoc"])
    assert values["same_answer_no_chain"] == 1


def test_a_pair_on_one_problem_is_undecided_in_words() -> None:
    groups = [[row | {"reader": reader} for row in group] for reader in "AB" for group in records_of_one("p0", 0.5)]
    found = estimates_of(table(*groups), chain_rows(["p0"]), ["A", "B"], ["conflict/record_agree/p_chain"], np.random.default_rng(0))  # fmt: skip
    said = conclusion(found, "A", "B")
    assert said.endswith("undecided.")
    assert "nan" not in said
    assert {moved(estimate) for estimate in found if estimate.arm == "B-A"} == {0}
    assert recovered(table(*groups), {}).empty


# whole studies


def study_of_chains(folder: Path, chains: dict[str, list[str]]) -> Path:
    path = write_tiny_study(folder, 1, tests=["early_termination", "filler", "mistake", "paraphrase"], draws=2)
    row = json.loads((folder / "rows.jsonl").read_text())
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row | {"id": i, "steps": s}) for i, s in chains.items()))
    study = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(study | {"patch_layers": [1], "patch_directions": ["noise"]}))
    return path


STEPS = ["Ann has 14 + 8 = 22 marbles.", "Bob has 31 - 5 = 26 marbles."]


@pytest.mark.parametrize(
    "chains",
    [{"p0": STEPS}, {"p0": STEPS[:1], "p1": STEPS[1:]}, {"p0": STEPS, "p1": STEPS}],
    ids=["one problem", "chains of one step", "two that are alike"],
)
def test_a_study_of_next_to_nothing_runs_to_its_report(chains: dict[str, list[str]], tmp_path: Path) -> None:
    run = run_study(load_config(study_of_chains(tmp_path, chains)), tmp_path / "run")
    assert (run.path / "report.html").stat().st_size > 0
    assert len(run.read_unit_meta()) == len(chains)
    for estimate in run.read_estimates():
        defined_or_told(estimate)
    records = run.read_records()
    if len(chains) == 2 and chains["p0"] == chains["p1"]:
        keys = ["measure", "variant", "step", "layer", "head", "metric"]
        exact = records[records.seed.isna()].set_index("problem_id")
        one, other = (exact.loc[name].drop(columns="chain_id").sort_values(keys, ignore_index=True) for name in chains)
        pd.testing.assert_frame_equal(one, other, check_exact=False, rtol=0, atol=1e-4)
