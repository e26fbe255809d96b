"""A Check: one number held against what it must be; or, without a threshold, one that stands beside the others."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Check:
    """`passed` is None for a number that is only shown; `note` says what was measured, and on how much."""

    check: str
    value: float
    threshold: float | None
    passed: bool | None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        value = None if not np.isfinite(self.value) else round(self.value, 6)
        return asdict(self) | {"value": value}


def at_most(check: str, value: float, threshold: float, note: str = "") -> Check:
    return Check(check, float(value), threshold, bool(value <= threshold), f"at most; {note}" if note else "at most")


def at_least(check: str, value: float, threshold: float, note: str = "") -> Check:
    return Check(check, float(value), threshold, bool(value >= threshold), f"at least; {note}" if note else "at least")


def near(check: str, measured: float, truth: float, tolerance: float, note: str = "") -> Check:
    """The distance of `measured` from `truth`, which must be at most `tolerance`; NaN fails."""
    found = f"measured {measured:.3f}, truth {truth:.3f}"
    return at_most(check, abs(measured - truth), tolerance, f"{found}, {note}" if note else found)


def shown(check: str, value: float, note: str = "") -> Check:
    return Check(check, float(value), None, None, note)
