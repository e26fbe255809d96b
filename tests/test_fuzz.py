"""A small part of `experiments/fuzz.py`: spoilt inputs to every reader of what others wrote."""

from __future__ import annotations

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "experiments" / "fuzz.py"


def test_spoilt_inputs_raise_nothing_but_our_own_error() -> None:
    spec = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    found = fuzz.fuzz(1800, seed=11)
    assert found["faults"] == []
    assert sum(found["tried"].values()) == 1800
    assert all(0 < found["refused"].get(name, 0) < n for name, n in found["tried"].items() if name in fuzz.REFUSING)
