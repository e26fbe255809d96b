"""Numbers with their uncertainty. The statistical unit is the problem; an error is one between problems.

1. An interval belongs to a statistic of a set of problems, given as a function of their indices. It is studentised:
   value -+ t(n - 1) x jackknife standard error. For a mean that is Student's t interval on the problem means, and the
   note gives its coverage on data like these; for a ratio or a correlation it is Tukey's jackknife. A bootstrap-t was
   not chosen: few problems with 0/1 outcomes give resamples of zero variance. Nor was BCa (Efron 1987), from 50
   problems on or at all: on two samples of chains of one model it covered .84 of the differences at 50 problems
   (experiments/interval_coverage.py).
2. Paired differences get a sign-flip permutation p (exact up to 14 differing problems), flips of 0/1 outcomes
   the exact McNemar p (statsmodels), associations within chains a permutation p within chains.
3. Families of p are adjusted by Holm (primary endpoints) or Benjamini-Hochberg (maps), both by statsmodels.

Undefined is NaN and the note says why.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import scipy.stats
from jaxtyping import Float, Int, Shaped
from numpy.random import Generator
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

LEVEL = 0.95
N_LABEL_SWAPS = 2000
N_SIGN_FLIPS = 2**14
EXACT_UP_TO = 14
_CHUNK = 2**11
JACKKNIFE_T = "jackknife t over problems"

Statistic = Callable[[Int[np.ndarray, " problem"]], float]
"""A number computed from the problems at the given indices."""


@dataclass(frozen=True)
class Estimate:
    """A number with its uncertainty: one row of estimates.parquet.

    `arm` is a reader ("A") or a difference of two ("B-A"); `method` has no "; " in it, because the note is stored
    behind the method after that mark. An undefined number is NaN.
    """

    name: str
    arm: str
    n_problems: int
    value: float
    ci_low: float
    ci_high: float
    p: float
    method: str
    note: str = ""

    @property
    def signed(self) -> str:
        """Value and interval as of a difference: '+0.12 [+0.01, +0.23]', or '+0.12, no interval'."""
        ends = f" [{self.ci_low:+.2f}, {self.ci_high:+.2f}]" if np.isfinite(self.ci_low) else ", no interval"
        return f"{self.value:+.2f}{ends}"


class Interval(NamedTuple):
    """A 95% interval, the method that gave it and what the reader of it must know."""

    low: float
    high: float
    method: str
    note: str = ""


def interval(n: int, statistic: Statistic) -> Interval:
    """95% interval of `statistic` over `n` problems.

    A statistic that no single problem can move has an interval of width 0, and the note says so. An undefined
    statistic, or one problem, has none (NaN).
    """
    value = statistic(np.arange(n)) if n else np.nan
    if not np.isfinite(value) or n < 2:
        return Interval(np.nan, np.nan, "none", f"undefined over {n} problems" if n != 1 else "one problem")
    left_out = np.array([statistic(np.delete(np.arange(n), i)) for i in range(n)])
    if not np.isfinite(left_out).all():
        return Interval(np.nan, np.nan, "none", "the value is undefined once one problem is left out")
    if np.ptp(left_out) < 1e-12 * max(1.0, abs(value)):
        return Interval(value, value, "none", "no variance between problems")
    half = scipy.stats.t.ppf((1 + LEVEL) / 2, n - 1) * np.sqrt((n - 1) * left_out.var())
    return Interval(float(value - half), float(value + half), JACKKNIFE_T)


def mean_estimate(name: str, arm: str, values: Float[np.ndarray, " problem"], rng: Generator) -> Estimate:
    """Mean over problems, one value each; NaN values are problems on which the quantity is undefined."""
    return _of_mean(name, arm, values[np.isfinite(values)], rng)


def _of_mean(name: str, arm: str, values: Float[np.ndarray, " problem"], rng: Generator, p: float = np.nan) -> Estimate:
    estimate = statistic_estimate(name, arm, len(values), lambda index: float(values[index].mean()), p)
    if estimate.method != JACKKNIFE_T:
        return estimate
    return replace(estimate, note=f"interval covers {coverage(values, len(values), rng):.0%} of resamples")


def statistic_estimate(
    name: str,
    arm: str,
    n: int,
    statistic: Statistic,
    p: float = np.nan,
    note: str = "",
) -> Estimate:
    """Any statistic of `n` problems with its interval."""
    value = float(statistic(np.arange(n))) if n else np.nan
    low, high, method, why = interval(n, statistic)
    return Estimate(name, arm, n, value, low, high, float(p), method, ", ".join(filter(None, (note, why))))


def difference_estimate(
    name: str,
    arm: str,
    base: Float[np.ndarray, " problem"],
    other: Float[np.ndarray, " problem"],
    rng: Generator,
) -> Estimate:
    """Mean of other - base, paired by problem; problems undefined for either are left out.

    p is exact McNemar where every outcome is 0 or 1, the sign-flip permutation p elsewhere.
    """
    both = np.isfinite(base) & np.isfinite(other)
    base, other = base[both], other[both]
    delta = other - base
    binary = bool(np.isin(base, (0, 1)).all() and np.isin(other, (0, 1)).all())
    p = mcnemar_p(base, other) if binary else sign_flip_p(delta, rng)
    test = "exact McNemar" if binary else "sign-flip permutation"
    estimate = _of_mean(name, arm, delta, rng, p)
    return replace(estimate, method=f"{estimate.method}, p {test}")


def ratio_of_sums(
    numerator: Float[np.ndarray, " problem"], denominator: Float[np.ndarray, " problem"]
) -> Callable[[Int[np.ndarray, " problem"]], float]:
    """Sum over sum as a statistic of problems; NaN where the denominator's sum is 0, to rounding.

    A mean of ratios would weigh problems by one over their own effect; see MEASURES.md, 'recovered'.
    """

    def statistic(index: Int[np.ndarray, " problem"]) -> float:
        below = denominator[index]
        return np.nan if _vanishes(below) else float(numerator[index].sum() / below.sum())

    return statistic


def _vanishes(terms: Float[np.ndarray, " problem"]) -> bool:
    """Whether the sum of `terms` is nothing but what rounding leaves."""
    return bool(abs(terms.sum()) <= 1e-12 * np.abs(terms).sum())


Sums = tuple[Float[np.ndarray, " problem"], Float[np.ndarray, " problem"]]
"""Numerator and denominator of each problem."""


def ratio_difference_estimate(name: str, arm: str, base: Sums, other: Sums, rng: Generator, note: str = "") -> Estimate:
    """Ratio of sums of `other` minus that of `base`, over the same problems; p by swapping the readers' labels."""
    of_base, of_other = ratio_of_sums(*base), ratio_of_sums(*other)
    p = _label_swap_p(base, other, rng)
    estimate = statistic_estimate(name, arm, len(base[0]), lambda i: of_other(i) - of_base(i), p, note)
    return replace(estimate, method=f"{estimate.method}, p label-swap permutation")


def _label_swap_p(base: Sums, other: Sums, rng: Generator) -> float:
    """Two-sided p of the difference of the ratios of sums when each problem's two readers are exchangeable."""
    if not len(base[0]) or _vanishes(base[1]) or _vanishes(other[1]):
        return np.nan
    swapped = rng.integers(0, 2, (N_LABEL_SWAPS, len(base[0])))
    swapped[0] = 0
    sums = [
        (a @ (1 - swapped).T + b @ swapped.T, b @ (1 - swapped).T + a @ swapped.T)
        for a, b in zip(base, other, strict=True)
    ]
    (base_top, other_top), (base_bottom, other_bottom) = sums
    with np.errstate(divide="ignore", invalid="ignore"):
        difference = np.abs(other_top / other_bottom - base_top / base_bottom)
    return float(np.mean(~(difference < difference[0] - 1e-12)))


def sign_flip_p(differences: Float[np.ndarray, " problem"], rng: Generator) -> float:
    """Two-sided p of 'each difference is as likely positive as negative'; statistic: their sum. NaN without any.

    Over all flips up to 14 differing problems, else (1 + count) / (1 + flips) over random ones: as scipy's
    permutation_test, which takes ten times as long (tests/test_stats.py holds them together).
    """
    moved = differences[differences != 0]
    if len(moved) < 2:
        return 1.0 if len(differences) else np.nan
    observed = abs(moved.sum()) * (1 - 1e-12)
    if len(moved) <= EXACT_UP_TO:
        signs = 1 - 2 * (np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved)) & 1)
        return float(np.mean(np.abs(signs @ moved) >= observed))
    as_large = 0
    for _ in range(0, N_SIGN_FLIPS, _CHUNK):
        signs = 1 - 2 * rng.integers(0, 2, (_CHUNK, len(moved)), dtype=np.int8)
        as_large += int((np.abs(signs @ moved) >= observed).sum())
    return (1 + as_large) / (1 + N_SIGN_FLIPS)


def mcnemar_p(before: Float[np.ndarray, " problem"], after: Float[np.ndarray, " problem"]) -> float:
    """Exact McNemar p for paired 0/1 outcomes; 1 where nothing flips, NaN without problems."""
    if not len(before):
        return np.nan
    up = int(((before == 0) & (after == 1)).sum())
    down = int(((before == 1) & (after == 0)).sum())
    if up + down == 0:
        return 1.0
    result = mcnemar([[0, up], [down, 0]], exact=True)
    return float(result.pvalue)  # pyright: ignore[reportAttributeAccessIssue]


def adjusted(p_values: Sequence[float], method: Literal["holm", "fdr_bh"]) -> Float[np.ndarray, " test"]:
    """Adjusted p of one family. An undefined p stays NaN but still counts as a member of the family."""
    p = np.asarray(p_values, dtype=float)
    if not len(p):
        return p
    known = np.isfinite(p)
    filled = np.where(known, p, 1.0)
    corrected = _holm(filled) if method == "holm" else np.asarray(multipletests(filled, method=method)[1])
    return np.where(known, corrected, np.nan)


def _holm(p: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """As statsmodels' `multipletests`, which collects garbage at each call: a tenth of a second in a full process."""
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected


def clusters(labels: Sequence[Hashable]) -> list[Int[np.ndarray, " row"]]:
    """Row numbers of each problem, in order of first appearance: the one partition all statistics resample."""
    codes, _ = pd.factorize(np.asarray(labels, dtype=object))
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(codes[order])) + 1) if len(order) else []


def cluster_estimate(
    name: str,
    arm: str,
    labels: Sequence[Hashable],
    statistic: Callable[[Int[np.ndarray, " row"]], float],
    p: float = np.nan,
    note: str = "",
) -> Estimate:
    """A statistic of table rows; whole problems (rows of equal label) are left out together."""
    groups = clusters(labels)

    def of_problems(index: Int[np.ndarray, " problem"]) -> float:
        return statistic(np.concatenate([groups[i] for i in index]))

    return statistic_estimate(name, arm, len(groups), of_problems, p, note)


def within_chain_p(
    values: Float[np.ndarray, " row"],
    chains: Shaped[np.ndarray, " row"],
    statistic: Callable[[Float[np.ndarray, " row"]], float],
    rng: Generator,
    n_permutations: int = 999,
) -> float:
    """One-sided p of a statistic at least this large when `values` are shuffled within each chain.

    (1 + count) / (1 + n_permutations), so never 0; NaN where the observed statistic is undefined.
    """
    observed = statistic(values)
    if not np.isfinite(observed):
        return np.nan
    codes, _ = pd.factorize(chains)
    by_chain = np.argsort(codes, kind="stable")
    at_least = 0
    for _ in range(n_permutations):
        shuffled = np.empty_like(values)
        shuffled[by_chain] = values[np.lexsort((rng.random(len(values)), codes))]
        at_least += statistic(shuffled) >= observed - 1e-12
    return (1 + at_least) / (1 + n_permutations)


def coverage(population: Float[np.ndarray, " problem"], n: int, rng: Generator, n_simulations: int = 2000) -> float:
    """Share of simulated samples of `n` problems whose Student interval covers the mean of `population`.

    The observed values stand for the population, so this is what the 95% are worth on such data.
    """
    samples = rng.choice(population, (n_simulations, n))
    half = scipy.stats.t.ppf((1 + LEVEL) / 2, n - 1) * samples.std(axis=1, ddof=1) / np.sqrt(n)
    return float(np.mean(np.abs(samples.mean(axis=1) - population.mean()) <= half + 1e-12))
