"""The shipped readers are what the script says: same data, same recipe, adapters small enough to ship."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo_readers", ROOT / "experiments" / "train_demo_readers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_provenance_is_that_of_the_script(script: ModuleType) -> None:
    for recipe in script.RECIPES:
        folder = script.ADAPTERS / recipe.reader.lower()
        told = json.loads((folder / "provenance.json").read_text())
        rows = script.examples(recipe)
        assert told["recipe"] == script.asdict(recipe)
        assert told["data"]["sha256"] == hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        assert (folder / "adapter_model.safetensors").stat().st_size < 3_000_000
        has_record = {"(Record:" in question for question, _ in rows}
        assert has_record == {recipe.reader == "B"}
        assert {completion.count("=") for _, completion in rows} == {0 if recipe.reader == "B" else 4}


def test_training_and_demo_questions_share_nothing(script: ModuleType) -> None:
    script.assert_no_overlap()
