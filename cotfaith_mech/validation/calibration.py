"""Are the intervals worth their 95%? One checkpoint against itself, where the true difference is known: nothing.

1. Same chains: every difference is exactly 0.
2. A/A: two independent samples of chains (temperature 0.8) of the writer. Each repeat redraws n problems from a pool
   and deals each problem's two samples to the two arms at random, so that the true difference is exactly 0. Coverage of
   the 95% interval, rejections at 5%, families with any rejection after Holm; each with its Monte Carlo error.
3. Power: one arm's reliance set to 0 on a part of the problems; and, by Student's t, against the number of seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import reduce
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped
from statsmodels.stats.power import TTestPower

from ..certificate import Check, at_least, at_most, shown
from ..compare import estimates_of
from ..conclude import Progress
from ..config import StudyConfig
from ..stats import adjusted, difference_estimate
from ..study import measure_study
from .recovery import studied

ENDPOINTS = (
    "filler/change",
    "mistake_all/change",
    "mistake_local/change",
    "mistake_local/aoc_mean",
    "swap/change",
    "infogain/logp_gain",
)
"""Scores that differ between two samples of chains; the writer's greedy answers hardly ever do."""
TESTS = ("early_termination", "filler", "mistake", "swap")
LEVEL = 0.05
JUDGED_FROM = 50
"""Problems from which on coverage is judged."""
ENOUGH = 400
"""Repeats from which on a rate is judged."""
CHUNK = 100
"""Repeats that one process makes at a time."""
COVERED = (0.93, 0.97)
Pool = Mapping[str, tuple[Float[np.ndarray, " problem"], Float[np.ndarray, " problem"]]]
"""Of each endpoint, its value on every problem under two samples of chains."""


def same_chains(n: int, seed: int) -> Iterator[Check]:
    """A checkpoint compared with itself on the same chains: every estimate of a difference."""
    model = "organism:mix_050"
    readers = [{"name": name, "model": model} for name in "AB"]
    options = {"paraphraser": "supplied", "crosscheck_cells": 0, "patch_directions": ("denoise",)}
    config = StudyConfig.model_validate({"readers": readers, "problems": f"{model}:{n}:{seed}", **options})
    with TemporaryDirectory() as scratch:
        run = measure_study(config, Path(scratch) / "run")
        found = estimates_of(run.read_records(), run.read_chains(), "AB", config.primary, np.random.default_rng(seed))
    differences = [e for e in found if e.arm == "B-A" and e.n_problems and not np.isnan(e.value)]
    largest = max((abs(e.value) for e in differences), default=np.nan)
    yield at_most("same checkpoint, same chains: largest difference", largest, 0.0, f"{len(differences)} estimates")


def written_pool(n: int, seed: int) -> Pool:
    """Two samples of chains that the writer writes to the same `n` problems, both read by the writer; problems to
    which it wrote none in either sample, or where a score is undefined, are left out."""
    samples = [
        studied(
            "organism:writer",
            f"organism:writer:{n}:{seed}",
            mechanism=False,
            chains="generate",
            generation={"temperature": 0.8, "max_new_tokens": 48},
            paraphraser="rules",
            tests=TESTS,
            draws=2,
            seed=sample,
        )
        for sample in (1, 2)
    ]
    values = [[sample.of(name).dropna() for sample in samples] for name in ENDPOINTS]
    shared = reduce(pd.Index.intersection, (one.index for pair in values for one in pair))
    first, second = ([pair[k][shared].to_numpy(float) for pair in values] for k in (0, 1))
    return {name: (a, b) for name, a, b in zip(ENDPOINTS, first, second, strict=True)}


def repeated(
    pool: Pool, n: int, repeats: int, rng: np.random.Generator, cut: float = 0.0
) -> tuple[Float[np.ndarray, "repeat endpoint"], Float[np.ndarray, "repeat endpoint"]]:
    """Whether the interval covers 0, and p, of each endpoint in each repeat; `cut`: the part of problems on which the
    second arm's value is 0. Many repeats are shared out among the cores, with the same result."""
    sizes = [min(CHUNK, repeats - done) for done in range(0, repeats, CHUNK)]
    jobs = [(pool, n, size, stream, cut) for size, stream in zip(sizes, rng.spawn(len(sizes)), strict=True)]
    if len(jobs) == 1:
        return _repeated(*jobs[0])
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as processes:
        parts = list(processes.map(_repeated, *zip(*jobs, strict=True)))
    covered, p = (np.concatenate(part) for part in zip(*parts, strict=True))
    return covered, p


def _repeated(
    pool: Pool, n: int, repeats: int, rng: np.random.Generator, cut: float
) -> tuple[Float[np.ndarray, "repeat endpoint"], Float[np.ndarray, "repeat endpoint"]]:
    covered, p = np.empty((repeats, len(pool))), np.empty((repeats, len(pool)))
    size = min(len(first) for first, _ in pool.values())
    for repeat in range(repeats):
        chosen, swapped = rng.choice(size, n, replace=False), rng.random(n) < 0.5
        lost = rng.random(n) < cut
        for k, (a, b) in enumerate(pool.values()):
            first, second = np.where(swapped, b[chosen], a[chosen]), np.where(swapped, a[chosen], b[chosen])
            estimate = difference_estimate("", "", first, np.where(lost, 0.0, second), rng)
            covered[repeat, k] = estimate.ci_low <= 0 <= estimate.ci_high
            p[repeat, k] = estimate.p
    return covered, p


def aa_checks(
    pool: Pool, sizes: Sequence[int], repeats: int, rng: np.random.Generator, progress: Progress
) -> Iterator[Check]:
    """Coverage, rejection and family error at each size; intervals of 50 problems or more must cover 93 to 97%, give or
    take twice the Monte Carlo error. Fewer than ENOUGH repeats could not fail, so they are shown alone."""

    def judged(check: str, value: float, threshold: float, note: str, score: str = "") -> Check:
        if repeats < ENOUGH:
            return shown(check, value, f"{note}, too few repeats to judge", score)
        return at_most(check, value, threshold, note, score)

    for n in progress(sizes, "A/A samples"):
        covered, p = repeated(pool, n, repeats, rng)
        for k, name in enumerate(pool):
            rate, error = _rate(covered[:, k])
            off = max(COVERED[0] - rate, rate - COVERED[1], 0.0)
            check, note = f"A/A n={n}: {name} coverage off 93-97%", f"{rate:.3f} (Monte Carlo error {error:.3f})"
            if n >= JUDGED_FROM:
                yield judged(check, off, 2 * error, note, name)
            else:
                yield shown(f"A/A n={n}: {name} coverage", rate, note)
        rejected, error = _rate((p < LEVEL).mean(1))
        yield judged(f"A/A n={n}: rejected at 5%", rejected, LEVEL + 2 * error, f"{rejected:.3f} ({error:.3f})")
        holm = np.array([np.nanmin(adjusted(row.tolist(), "holm")) < LEVEL for row in p])
        family, error = _rate(holm)
        label, note = f"A/A n={n}: any of {len(pool)} rejected after Holm", f"{family:.3f} ({error:.3f})"
        yield judged(label, family, LEVEL + 2 * error, note)


def _rate(hits: Shaped[np.ndarray, " repeat"]) -> tuple[float, float]:
    """Mean share of hits and its Monte Carlo error, that of one hit or miss in all repeats at least."""
    rate, n = float(np.mean(hits)), len(hits)
    return rate, max(float(np.std(hits)), np.sqrt((1 - 1 / n) / n)) / float(np.sqrt(n))


def power(pool: Pool, sizes: Sequence[int], repeats: int, rng: np.random.Generator) -> Iterator[Check]:
    """Share of repeats in which the change of filler is found smaller, where one arm lost it on a part of problems."""
    one = {"filler/change": pool["filler/change"]}
    for cut in (0.1, 0.25, 0.5):
        for n in sizes:
            rate, error = _rate(repeated(one, n, repeats, rng, cut)[1][:, 0] < LEVEL)
            yield shown(f"power: reliance lost on {cut:.0%} of problems, n={n}", rate, f"Monte Carlo error {error:.3f}")
    for seeds in (3, 5, 8, 12):
        for effect in (1.0, 2.0):
            found = TTestPower().power(effect, seeds, LEVEL)
            yield shown(
                f"power: mean over seeds {effect:.0f} sd between seeds, {seeds} seeds", float(found), "Student's t"
            )


def calibration(
    progress: Progress, *, pool_size: int, sizes: Sequence[int], repeats: int, seed: int
) -> Iterator[Check]:
    yield from same_chains(4, seed)
    rng = np.random.default_rng([seed, 5])
    pool = written_pool(pool_size, seed)
    n_pool = min(len(first) for first, _ in pool.values())
    yield at_least("A/A: problems in the pool", n_pool, 0.95 * pool_size, "chains written twice")
    yield from aa_checks(pool, [n for n in sizes if n <= n_pool], repeats, rng, progress)
    yield from power(pool, [n for n in (16, 50) if n <= n_pool], max(20, repeats // 5), rng)
