"""Seeds that follow from content alone, so that order, batches, number of workers and resuming do not matter."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def seed_of(content: Any) -> int:
    """A seed of 32 bits; `content` is any JSON value."""
    return int.from_bytes(hashlib.sha256(json.dumps(content).encode()).digest()[:4], "big")
