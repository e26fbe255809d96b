"""Seeds that follow from content alone, so that order, batches, number of workers and resuming do not matter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from .errors import CotfaithError


def check_seeds(seeds: Sequence[int], prompts: Sequence[str], temperature: float) -> None:
    """CotfaithError where texts are drawn and there is not one seed for each prompt."""
    if temperature and len(seeds) != len(prompts):
        raise CotfaithError(
            f"{len(prompts)} texts are drawn at temperature {temperature:g} with {len(seeds)} seeds; give one for "
            "each prompt."
        )


def seed_of(content: Any) -> int:
    """A seed of 32 bits; `content` is any JSON value."""
    return int.from_bytes(hashlib.sha256(json.dumps(content).encode()).digest()[:4], "big")
