"""All checks together, and the certificate that reports carry: date, version, outcome, and scores that fail."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ..conclude import Progress
from .calibration import calibration
from .checks import Check
from .invariance import invariance
from .ranking import ranking
from .recovery import routes, trained

SEED = 11


@dataclass(frozen=True)
class Size:
    """How much is run: problems of each organism, of the A/A pool and its samples, repeats, and problems of the rest."""

    n: int
    pool: int
    sizes: tuple[int, ...]
    repeats: int
    n_beside: int
    smollm2: bool


QUICK = Size(n=8, pool=60, sizes=(16, 50), repeats=40, n_beside=0, smollm2=False)
FULL = Size(n=32, pool=2000, sizes=(16, 50, 200), repeats=1000, n_beside=16, smollm2=True)


def checks(size: Size, progress: Progress, seed: int = SEED) -> Iterator[Check]:
    """Every check at this size; the invariance and ranking tables where `n_beside` is not 0."""
    yield from trained(progress, size.n, seed)
    yield from routes(progress, size.n, seed)
    yield from calibration(progress, pool_size=size.pool, sizes=size.sizes, repeats=size.repeats, seed=seed)
    if size.n_beside:
        yield from invariance(progress, size.n_beside, seed)
        yield from ranking(progress, size.n_beside, seed, size.smollm2)


def certificate(found: Sequence[Check], full: bool) -> dict[str, Any]:
    """What is known of this version, as JSON."""
    judged = [check for check in found if check.passed is not None]
    return {
        "date": datetime.date.today().isoformat(),
        "version": metadata.version("cotfaith-mech"),
        "full": full,
        "checks": [check.to_json() for check in found],
        "passed": sum(bool(check.passed) for check in judged),
        "failed": [check.check for check in judged if not check.passed],
    }


def shipped() -> dict[str, Any] | None:
    """The certificate of the full run that this version was released with; None where there is none."""
    path = Path(__file__).parent / "certificate.json"
    return json.loads(path.read_text()) if path.exists() else None


def in_words(known: dict[str, Any]) -> str:
    """One sentence for a report."""
    n = known["passed"] + len(known["failed"])
    failed = f"; failed: {', '.join(known['failed'])}" if known["failed"] else ""
    return (
        f"Validated on models whose truth is known: {known['passed']} of {n} checks passed "
        f"(version {known['version']}, {known['date']}{', full run' if known['full'] else ''}){failed}."
    )
