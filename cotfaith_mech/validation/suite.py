"""All checks together, at a size that takes minutes and at their full size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..backends.weights import WHEEL, locate
from ..certificate import Check
from ..conclude import Progress
from .calibration import calibration
from .invariance import invariance
from .ranking import ranking
from .recovery import routes, trained

SEED = 11


@dataclass(frozen=True)
class Size:
    """How much is run: problems of each organism, of the A/A pool and its samples, repeats, problems of the rest."""

    n: int
    pool: int
    sizes: tuple[int, ...]
    repeats: int
    n_beside: int
    smollm2: bool


QUICK = Size(n=8, pool=60, sizes=(16, 50), repeats=40, n_beside=0, smollm2=False)
FULL = Size(n=32, pool=2000, sizes=(16, 50, 200), repeats=1000, n_beside=16, smollm2=True)


def checks(size: Size, progress: Progress, seed: int = SEED) -> Iterator[Check]:
    """Every check at this size; the invariance and ranking tables where `n_beside` is not 0. Raises CotfaithError at
    once where SmolLM2 is needed and not at hand."""
    if size.smollm2:
        locate(WHEEL)
    yield from trained(progress, size.n, seed)
    yield from routes(progress, size.n, seed)
    yield from calibration(progress, pool_size=size.pool, sizes=size.sizes, repeats=size.repeats, seed=seed)
    if size.n_beside:
        yield from invariance(progress, size.n_beside, seed)
        yield from ranking(progress, size.n_beside, seed, size.smollm2)
