"""What `cotfaith validate` found: checks, and the certificate that reports carry.

A Check is one number held against what it must be; or, without a threshold, one that stands beside the others. The
certificate of the full run that a version was released with ships with it (certificate.json).
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Check:
    """`passed` is None for a number that is only shown; `note` says what was measured, and on how much. `score` is the
    outcome or estimate that is judged, as reports name it; empty where that is none."""

    check: str
    value: float
    threshold: float | None
    passed: bool | None
    note: str = ""
    score: str = ""

    def to_json(self) -> dict[str, Any]:
        value = None if not np.isfinite(self.value) else round(self.value, 6)
        return asdict(self) | {"value": value}


def at_most(check: str, value: float, threshold: float, note: str = "", score: str = "") -> Check:
    return Check(check, float(value), threshold, bool(value <= threshold), _sided("at most", note), score)


def at_least(check: str, value: float, threshold: float, note: str = "", score: str = "") -> Check:
    return Check(check, float(value), threshold, bool(value >= threshold), _sided("at least", note), score)


def _sided(side: str, note: str) -> str:
    return f"{side}; {note}" if note else side


def near(check: str, measured: float, truth: float, tolerance: float, score: str = "") -> Check:
    """The distance of `measured` from `truth`, which must be at most `tolerance`; NaN fails."""
    note = f"measured {measured:.3f}, truth {truth:.3f}"
    return at_most(check, abs(measured - truth), tolerance, note, score)


def shown(check: str, value: float, note: str = "", score: str = "") -> Check:
    return Check(check, float(value), None, None, note, score)


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


def in_words(known: dict[str, Any] | None) -> str:
    """The outcome in one sentence."""
    if known is None:
        return "This version of the package carries no certificate of validation."
    n = known["passed"] + len(known["failed"])
    failed = f"; failed: {', '.join(known['failed'])}" if known["failed"] else ""
    return (
        f"Validated on models whose truth is known: {known['passed']} of {n} checks passed "
        f"(version {known['version']}, {known['date']}{', full run' if known['full'] else ''}){failed}."
    )


MOVES = "moves"
"""Begins the note of a score that moved although no reliance did."""


def doubts(known: dict[str, Any] | None) -> dict[str, str]:
    """Score -> what the certificate holds against it: checks that it failed, changes that move it."""
    against: dict[str, list[str]] = {}
    for check in known["checks"] if known else ():
        subject, score = check["check"].partition(": ")[0], check["score"]
        if score and check["passed"] is False:
            against.setdefault(score, []).append(f"fails {check['check']}")
        elif score and check["note"].startswith(MOVES):
            against.setdefault(score, []).append(f"moves with {subject}")
    return {score: _listed(reasons) for score, reasons in against.items()}


def _listed(reasons: Iterable[str]) -> str:
    return "validation: " + ", ".join(reasons)
