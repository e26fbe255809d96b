"""Intervals and p-values against scipy, statsmodels, brute force and known truth."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.multitest import multipletests

from cotfaith_mech import stats


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def mean_of(values):
    return lambda index: float(values[index].mean())


@pytest.mark.parametrize("n", [17, 53])
def test_the_mean_has_students_interval(rng, n):
    values = rng.gamma(2, 1, n)
    low, high, method, _ = stats.interval(n, mean_of(values))
    expected = scipy.stats.t.interval(0.95, n - 1, values.mean(), scipy.stats.sem(values))
    assert (low, high) == pytest.approx(expected)
    assert method == "jackknife t over problems"


def test_coverage_is_near_nominal_and_falls_where_data_are_rare(rng):
    assert 0.93 <= stats.coverage(rng.normal(0, 1, 400), 13, rng) <= 0.97
    rare = np.r_[np.zeros(380), np.ones(20)]
    assert stats.coverage(rare, 13, rng) < 0.6


def test_coverage_simulates_the_interval_that_is_given(rng):
    population, hits = rng.gamma(0.5, 1, 40), 0
    for _ in range(500):
        sample = rng.choice(population, 7)
        low, high, *_ = stats.interval(7, mean_of(sample))
        hits += low <= population.mean() <= high
    assert hits / 500 == pytest.approx(stats.coverage(population, 7, rng), abs=0.05)
    assert "of resamples" in stats.mean_estimate("x", "A", population, rng).note


def test_bca_covers_less_where_it_is_not_given(rng):
    """Why no interval is BCa: skewed units, fifty of them, against the mean they were drawn with."""
    hits = np.zeros(2)
    for _ in range(200):
        sample = rng.lognormal(0, 1.2, 50) * np.where(rng.random(50) < 0.5, -1, 1)
        bca = scipy.stats.bootstrap((sample,), np.mean, n_resamples=500, rng=rng).confidence_interval
        student = stats.interval(50, mean_of(sample))
        hits += [one[0] <= 0 <= one[1] for one in (bca, student)]
    assert hits[0] / 200 < 0.91 < 0.93 < hits[1] / 200


@pytest.mark.parametrize("n", [19, 57])
def test_no_variance_gives_width_zero_and_says_so(rng, n):
    values = np.full(n, 0.3)
    low, high, method, note = stats.interval(n, mean_of(values))
    assert low == high == pytest.approx(0.3)
    assert (method, note) == ("none", "no variance between problems")


def test_undefined_has_a_reason(rng):
    estimate = stats.mean_estimate("x", "A", np.array([np.nan, np.nan]), rng)
    assert np.isnan([estimate.value, estimate.ci_low]).all()
    assert estimate.n_problems == 0
    assert estimate.note == "undefined over 0 problems"
    assert stats.mean_estimate("x", "A", np.array([0.5, np.nan]), rng).note == "one problem"


def test_identical_readers_differ_by_exactly_zero(rng):
    for values in (rng.normal(size=23), rng.integers(0, 2, 23).astype(float)):
        estimate = stats.difference_estimate("x", "B-A", values, values.copy(), rng)
        assert (estimate.value, estimate.ci_low, estimate.ci_high, estimate.p) == (0, 0, 0, 1)


def test_difference_is_paired(rng):
    base = rng.normal(0, 100, 29)
    other = base + 0.5 + rng.normal(0, 0.1, 29)
    other[3] = np.nan
    estimate = stats.difference_estimate("x", "B-A", base, other, rng)
    assert estimate.n_problems == 28
    assert 0.3 < estimate.ci_low < 0.5 < estimate.ci_high < 0.7
    assert estimate.p < 0.001
    assert estimate.method.endswith("p sign-flip permutation")


def test_sign_flip_against_all_flips(rng):
    d = rng.normal(0.4, 1, 9)
    sums = np.array([np.dot(signs, d) for signs in product((-1, 1), repeat=9)])
    brute = np.mean(np.abs(sums) >= abs(d.sum()) - 1e-12)
    assert stats.sign_flip_p(d, rng) == pytest.approx(brute)
    assert stats.sign_flip_p(np.r_[d, np.zeros(5)], rng) == pytest.approx(brute)
    assert stats.sign_flip_p(np.zeros(4), rng) == 1
    assert stats.sign_flip_p(np.array([0.3, 0.0]), rng) == 1
    assert np.isnan(stats.sign_flip_p(np.zeros(0), rng))


def test_random_sign_flips_against_scipy(rng):
    d = rng.normal(0.35, 1, 43)
    oracle = scipy.stats.permutation_test((d,), np.sum, permutation_type="samples", n_resamples=20_000, rng=rng)
    assert stats.sign_flip_p(d, rng) == pytest.approx(oracle.pvalue, abs=0.01)
    assert stats.sign_flip_p(d + 5, rng) == pytest.approx(1 / (1 + stats.N_SIGN_FLIPS))


def test_mcnemar_is_the_binomial_of_the_flips():
    before = np.array([0.0] * 9 + [1] * 1 + [1] * 6)
    after = np.array([1.0] * 9 + [0] * 1 + [1] * 6)
    assert stats.mcnemar_p(before, after) == pytest.approx(scipy.stats.binomtest(1, 10).pvalue)
    assert stats.mcnemar_p(before, before) == 1
    method = stats.difference_estimate("x", "B-A", before, after, np.random.default_rng(0)).method
    assert method.endswith("p exact McNemar")


def test_ratio_of_sums_is_not_a_mean_of_ratios(rng):
    numerator, denominator = np.array([1.0, 1.0]), np.array([1.0, 9.0])
    statistic = stats.ratio_of_sums(numerator, denominator)
    assert statistic(np.arange(2)) == pytest.approx(0.2)
    assert np.isnan(stats.ratio_of_sums(numerator, np.array([1.0, -1.0]))(np.arange(2)))


def test_jackknife_of_a_ratio_covers_it():
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(300):
        denominator = rng.gamma(4, 1, 19)
        numerator = 0.6 * denominator + rng.normal(0, 0.5, 19)
        low, high, *_ = stats.interval(19, stats.ratio_of_sums(numerator, denominator))
        hits += low <= 0.6 <= high
    assert 0.9 <= hits / 300 <= 0.985


def test_ratio_difference(rng):
    denominator = rng.gamma(4, 1, 21)
    base = (0.8 * denominator, denominator)
    same = stats.ratio_difference_estimate("r", "B-A", base, base, rng)
    assert (same.value, same.ci_low, same.ci_high, same.p) == (0, 0, 0, 1)
    lower = stats.ratio_difference_estimate("r", "B-A", base, (0.2 * denominator, denominator), rng)
    assert lower.value == pytest.approx(-0.6)
    assert lower.p < 0.01


def test_ratio_difference_p_against_all_swaps(rng):
    n = 8
    base, other = [(rng.normal(1, 1, n), rng.gamma(4, 1, n)) for _ in range(2)]

    def difference(swap):
        top, bottom = (np.where(swap, [o, b], [b, o]) for b, o in zip(base, other, strict=True))
        return top[1].sum() / bottom[1].sum() - top[0].sum() / bottom[0].sum()

    swaps = np.array(list(product((False, True), repeat=n)))
    observed = abs(difference(swaps[0]))
    brute = np.mean([abs(difference(swap)) >= observed - 1e-12 for swap in swaps])
    assert stats.ratio_difference_estimate("r", "B-A", base, other, rng).p == pytest.approx(brute, abs=0.04)


@pytest.mark.parametrize("method", ["holm", "fdr_bh"])
def test_adjustment_and_an_undefined_member(method):
    p = [0.01, 0.04, 0.03, 0.2]
    assert stats.adjusted(p, method) == pytest.approx(multipletests(p, method=method)[1])
    with_undefined = stats.adjusted([*p, np.nan], method)
    assert np.isnan(with_undefined[-1])
    assert with_undefined[:-1] == pytest.approx(multipletests([*p, 1.0], method=method)[1][:-1])
    assert stats.adjusted([0.01, 0.04, 0.03], "holm") == pytest.approx([0.03, 0.06, 0.06])


def test_clusters_partition_the_rows():
    groups = stats.clusters(["b", "a", "b", "c", "a"])
    assert [group.tolist() for group in groups] == [[0, 2], [1, 4], [3]]
    assert stats.clusters([]) == []


def test_cluster_interval_is_wider_than_the_rows_would_give(rng):
    problems = np.repeat(np.arange(16), 7)
    values = rng.normal(size=16)[problems] + rng.normal(0, 0.01, 16 * 7)
    estimate = stats.cluster_estimate("x", "A", problems.tolist(), mean_of(values))
    means = values.reshape(16, 7).mean(1)
    expected = scipy.stats.t.interval(0.95, 15, means.mean(), scipy.stats.sem(means))
    assert (estimate.ci_low, estimate.ci_high) == pytest.approx(expected)
    assert estimate.n_problems == 16


def test_within_chain_permutation_ignores_differences_between_chains(rng):
    chains = np.array(["x"] * 6 + ["y"] * 5 + ["z"] * 7)
    level = np.repeat([0.0, 100, -50], [6, 5, 7])
    fixed = level + rng.normal(size=18)
    p_between = stats.within_chain_p(
        level + rng.normal(size=18), chains, lambda v: float(np.corrcoef(v, fixed)[0, 1]), rng
    )
    p_within = stats.within_chain_p(fixed.copy(), chains, lambda v: float(np.corrcoef(v, fixed)[0, 1]), rng)
    assert p_between > 0.05
    assert p_within == pytest.approx(1 / 1000)


def test_within_chain_permutation_keeps_each_chains_values(rng):
    chains = np.array(["y", "x", "y", "x", "y"])
    values = np.array([1.0, 10, 2, 20, 3])

    def statistic(shuffled):
        assert sorted(shuffled[[0, 2, 4]]) == [1, 2, 3]
        assert sorted(shuffled[[1, 3]]) == [10, 20]
        return float(shuffled[0])

    p = stats.within_chain_p(values, chains, statistic, rng, 499)
    assert p == 1
    p = stats.within_chain_p(values[::-1].copy(), chains[::-1].copy(), lambda v: float(v[0] == 3), rng, 1999)
    assert p == pytest.approx(1 / 3, abs=0.05)


def test_holm_is_that_of_statsmodels() -> None:
    rng = np.random.default_rng(3)
    for n in (1, 2, 7, 40):
        p = rng.choice([0.0, 1e-9, 0.004, 0.02, 0.02, 0.3, 1.0], n) * rng.choice([1.0, 0.5], n)
        np.testing.assert_allclose(stats.adjusted(p.tolist(), "holm"), multipletests(p, method="holm")[1], rtol=1e-12)
