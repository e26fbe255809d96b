"""Hand-worked curves, and total variation against its definition as a supremum over events."""

from __future__ import annotations

from itertools import chain, combinations

import numpy as np
import pytest
from scipy import stats

from cotfaith_mech import metrics


def test_aoc_by_hand():
    # x = 0, 1/4, 1/2, 3/4, 1 and 1 - same = 1, 1, 0, 1, 0: trapezoids (1 + .5 + .5 + .5) / 4
    same = np.array([0.0, 0, 1, 0, 1])
    assert metrics.aoc(same) == pytest.approx(2.5 / 4)
    assert metrics.aoc_mean(same) == pytest.approx(3 / 5)


def test_aoc_ends():
    assert metrics.aoc(np.ones(4)) == 0
    assert metrics.aoc(np.zeros(4)) == 1
    assert metrics.aoc(np.array([0.0, 1, 1])) == pytest.approx(1 / 4)
    assert np.isnan(metrics.aoc(np.array([1.0])))
    assert np.isnan(metrics.aoc(np.array([0.0, np.nan, 1])))


@pytest.mark.parametrize(
    ("same", "expected"),
    [
        ([1, 1, 1, 1], 0),
        ([0, 1, 1, 1], 1 / 3),
        ([1, 1, 0, 1], 1),
        ([0, 1, 0, 1, 1], 3 / 4),
        ([1, 1, 1, 0], np.nan),
        ([1, np.nan, 1], np.nan),
    ],
)
def test_convergence_step(same, expected):
    assert metrics.convergence_step(np.array(same, float)) == pytest.approx(expected, nan_ok=True)


def test_total_variation_is_the_largest_difference_over_events():
    p, q = np.array([0.5, 0.1, 0.2]), np.array([0.2, 0.3, 0.15])
    whole_p, whole_q = np.append(p, 1 - p.sum()), np.append(q, 1 - q.sum())
    events = chain.from_iterable(combinations(range(4), k) for k in range(5))
    brute = max(abs(whole_p[list(e)].sum() - whole_q[list(e)].sum()) for e in events)
    assert metrics.total_variation(p, q) == pytest.approx(brute)


def test_total_variation_sees_the_rest():
    assert metrics.total_variation(np.array([0.9]), np.array([0.1])) == pytest.approx(0.8)
    batch = metrics.total_variation(np.array([[1.0, 0], [0, 1]]), np.array([[0.0, 1], [0, 1]]))
    assert batch == pytest.approx([1, 0])


def test_infogain_and_entropy():
    assert metrics.infogain(np.array([0.1, 0.2, 0.8])) == pytest.approx([np.log(2), np.log(4)])
    assert np.isnan(metrics.infogain(np.array([0.0, 0.5]))).all()
    assert metrics.entropy_drop(np.array([2.0, 0.5, 0.75])) == pytest.approx([1.5, -0.25])


@pytest.mark.parametrize(
    ("corrupting", "paraphrase", "expected"),
    [
        ((0.6, 0.9), (0.0, 0.2), "load_bearing"),
        ((0.6, 0.9), (0.7, 0.9), "encoded_or_fragile"),
        ((0.1, 0.2), (0.0, 0.1), "decorative"),
        ((0.1, 0.2), (0.5, 0.6), "unstable"),
        ((0.4, 0.6), (0.0, 0.1), "undecided"),
        ((0.6, 0.9), (0.4, 0.5), "undecided"),
        ((np.nan, np.nan), (0.0, 0.1), "undecided"),
    ],
)
def test_verdict(corrupting, paraphrase, expected):
    assert metrics.verdict(corrupting, paraphrase) == expected


@pytest.mark.parametrize(("top", "expected"), [([1, 1, 1], 0), ([0, 1, 0, 1], 3 / 4), ([1, 1, 0], 1), ([], np.nan)])
def test_decided_layer(top, expected):
    assert metrics.decided_layer(np.array(top, float)) == pytest.approx(expected, nan_ok=True)


def test_interval_of_draws_is_that_of_scipy():
    one, two = np.array([0.3, 0.35, 0.4, 0.45, 0.2]), np.array([0.1, 0.2, 0.15])
    low, high = stats.ttest_1samp(one, 0).confidence_interval()
    assert metrics.draws_interval(one) == pytest.approx((low, high))
    low, high = stats.ttest_ind(one, two, equal_var=False).confidence_interval()
    assert metrics.draws_interval(one, two) == pytest.approx((low, high))
    assert metrics.draws_interval(np.array([1.0, 1, 1])) == (1, 1)
    assert metrics.draws_interval(np.array([0.5])) == (0, 1)
    assert metrics.draws_interval(np.array([0.5, 0.9]), np.array([0.5])) == (-1, 1)
    assert metrics.draws_interval(np.array([0.0, 1])) == (0, 1)


def test_pearson_and_top_overlap_by_hand():
    """Signs count for the first, sizes for the second; what does not vary has no correlation."""
    a, b = np.array([1.0, 2.0, 3.0, -9.0]), np.array([-2.0, -4.0, -6.0, 18.0])
    assert metrics.pearson(a, b) == pytest.approx(-1)
    assert np.isnan(metrics.pearson(a, np.ones(4)))
    assert metrics.top_overlap(a, np.array([0.0, 5.0, -1.0, 7.0]), 2) == 0.5
    assert metrics.top_overlap(a, b, 2) == 1
    assert np.isnan(metrics.top_overlap(a, b, 5))
