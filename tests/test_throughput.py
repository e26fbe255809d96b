"""The model of throughput: what its hooks count, its arithmetic by hand, and the page that shows it."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cotfaith_mech.backends.counted import CountedModel
from cotfaith_mech.backends.huggingface import HuggingFaceModel
from cotfaith_mech.sites import ActivationEdit, Site

from .tiny import tiny

ROOT = Path(__file__).parent.parent
KEPT = json.loads((ROOT / "experiments" / "results" / "throughput.json").read_text())


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(ROOT / "experiments"), *sys.path])
    return importlib.import_module("throughput")


def test_hooks_count_the_rows_that_join_as_a_pass_climbs(script: Any) -> None:
    """By hand: positions 3 to 19 of a text of 20, one row more in each of 4 layers; the plan counts the same."""
    model = HuggingFaceModel(tiny("llama-gqa"))
    value = torch.zeros(2, model.info.d_model)
    cells = [[ActivationEdit(Site("resid_pre", layer), (3, 4), "replace", value)] for layer in range(4)]
    run = model.cached_run(range(2, 22))
    with script.listened(model) as calls:
        run.edited(cells, n_logits=1, reduce=lambda logits: logits[:, 0, :1])
    assert [(call.layer, call.tokens, call.keys) for call in calls if call.layer is not None] == [
        (layer, 17 * (1 + layer), 20) for layer in range(4)
    ]
    assert [call.tokens for call in calls if call.layer is None] == [4]
    empty = CountedModel(tiny("llama-gqa"), "cpu")
    counted = empty.cached_run(range(2, 22))
    before = empty.tally.flops
    counted.edited(cells, n_logits=1, reduce=lambda logits: logits[:, 0, :1])
    shape = script.Shape.of(model.weights.model.config.to_dict(), 4)
    pairs = shape.a_pair * sum(range(17)) * 10
    assert sum(script.flops_of(call, shape) for call in calls) == empty.tally.flops - before + pairs


def test_a_backward_pass_counts_as_another(script: Any) -> None:
    model = HuggingFaceModel(tiny("llama-gqa"))
    run = model.cached_run(range(2, 22))
    with script.listened(model) as calls:
        run.head_gradients(19, [2], [1.0], lambda logits: logits[:, 0, 5])
    assert [(call.layer, call.tokens, call.passes) for call in calls] == [(2, 1, 2), (3, 1, 2), (None, 1, 2)]


def test_a_call_takes_the_longest_of_its_three(script: Any) -> None:
    shape = script.Shape(layer=100, unembedding=1000, a_pair=4, itemsize=2)
    call = script.Call(0, tokens=10, keys=50)
    flops = (2 * 100 + 4 * 50) * 10
    assert script.flops_of(call, shape) == flops
    assert script.Device(flops=10, bytes=1e9, host=1).seconds(call, shape) == flops / 10
    assert script.Device(flops=1e9, bytes=10, host=1).seconds(call, shape) == 100 * 2 / 10
    assert script.Device(flops=1e9, bytes=1e9, host=1).seconds(call, shape) == 1
    assert script.Device(flops=1e9, bytes=10, host=1).seconds(script.Call(None, 1, 0), shape) == 1000 * 2 / 10


def test_the_shape_is_that_of_llama_3_8b(script: Any) -> None:
    """8.03e9 parameters: layers, embedding and unembedding; the norms are left out."""
    shape = script.Shape.of(script.LLAMA_3_8B, 2)
    assert 32 * shape.layer + 2 * shape.unembedding == pytest.approx(8.03e9, rel=1e-3)


def test_the_last_round_idles_and_a_full_driver_sets_the_pace(script: Any) -> None:
    assert script.idle(1319, 512) == pytest.approx(1 - 1319 / (3 * 512))
    assert script.idle(1320, 8) == 0
    values = {name: value for name, (value, _) in script.ASSUMED.items()} | {"driver_s_a_unit": 0.01}
    rows = {(row["units"], row["gpus"]): row for row in script.cluster(2.0, values)}
    assert rows[1319, 8]["measuring_h"] == round(165 * 2 / 3600, 3)
    assert rows[1319, 512]["measuring_h"] == round(1319 * 0.01 / 3600, 3)
    assert rows[1319, 512]["loading_s"] == round(64 * 16.06 / 20, 1)
    assert rows[1319, 8]["loading_s"] == round(16.06, 1)


def test_what_is_kept_follows_from_its_counts_and_assumptions(script: Any) -> None:
    assert {name: (one["value"], one["from"]) for name, one in KEPT["assumed"].items()} == script.ASSUMED
    assert tuple(KEPT["core"]) == script.CORE
    assert [unit["steps"] for unit in KEPT["units"]] == list(script.STEPS)
    values = {name: one["value"] for name, one in KEPT["assumed"].items()}
    for unit in KEPT["units"]:
        for key, seconds in unit["unit"].items():
            parts = sum(unit["measures"][name][key] for name in script.CORE)
            assert seconds == pytest.approx(parts + values["write_s_a_unit"], abs=2e-3)
        for one in unit["measures"].values():
            least = one["layer_calls"] * values["host_s_a_layer"] + one["texts_and_records_s"]
            assert one["s_at_20%"] >= one["s_at_40%"] >= least - 2e-3
            assert one["tflop"] == pytest.approx(one["tflop_of_the_plan"], rel=0.15, abs=0.1)
    typical = next(unit["unit"] for unit in KEPT["units"] if unit["steps"] == script.TYPICAL)
    for key, rows in KEPT["cluster"].items():
        assert rows == [{"steps": script.TYPICAL, **row} for row in script.cluster(typical[key], values)]


def test_the_page_shows_what_is_kept() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "generated.py"))["on_page_markdown"]
    page = made((ROOT / "docs" / "recipes" / "throughput.md").read_text())
    assert "<!--" not in page
    shown = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in page.splitlines() if line[:1] == "|"]
    for unit in KEPT["units"]:
        of_unit = [row for row in shown if row[0] == f"{unit['steps']} steps, {unit['tokens']} tokens"]
        for name, one in unit["measures"].items():
            (row,) = (row for row in of_unit if row[1] == name)
            assert [float(cell.replace(",", "")) for cell in row[2:4]] == [one["layer_calls"], one["token_layers"]]
            assert np.allclose([float(cell) for cell in row[-2:]], [one["s_at_20%"], one["s_at_40%"]], atol=0.006)
    hours = {(row[0], row[1]): row[5:7] for row in shown if len(row) == 10}
    for one in KEPT["cluster"]["s_at_20%"]:
        assert hours[f"{one['units']:,}", str(one["gpus"])][0] == f"{one['units_an_hour']:,}"
    assert sum(len(row) == 6 for row in shown) == len(KEPT["validation"]["measures"]) + 2
