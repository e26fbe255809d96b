"""The benchmarks: what they time is right (differences to the peers), counted right (the bound), and said (the JSON)."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from cotfaith_mech.backends.huggingface import HuggingFaceModel
from cotfaith_mech.bench import keep_rows, measure
from cotfaith_mech.bench_cells import BenchChain, corner_flops, sample_of_groups, worked_chain
from cotfaith_mech.bench_patching import patching
from cotfaith_mech.errors import CotfaithError
from cotfaith_mech.knockout import cut_edits
from cotfaith_mech.model import same_weights
from cotfaith_mech.sites import ActivationEdit, Site

from .tiny import tiny

ROOT = Path(__file__).resolve().parents[1]
CHAIN = BenchChain(tuple(range(5, 29)), tuple(range(35, 59)), ((4, 9), (9, 15), (15, 21)), (21, 24))


@cache
def model() -> Any:
    """A tiny model that takes texts as long as the generators' in its digits-and-bytes tokens."""
    made = HuggingFaceModel(tiny("llama-gqa"))
    made.info = replace(made.info, context=9999)
    return made


@cache
def backends() -> dict[str, Any]:
    return {name: same_weights(model(), name) for name in ("transformer_lens", "nnsight")}  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("patch_layer_token", 4 * 24),
        ("patch_layer_step", 4 * 3),
        ("patch_head_step", 4 * 6 * 3),
        ("knockout_matrix", 3 + 3),
    ],
)
def test_peers_and_engine_patch_the_same_cells(name: str, cells: int) -> None:
    rows = patching(lambda rounds, _: rounds, model(), backends(), name, CHAIN, rounds=1, sample=18)
    assert [row["peer"] for row in rows] == ["transformer_lens", "nnsight", "plain_hooks"]
    for row in rows:
        assert row["cells"] == row["ours_cells_timed"] == cells
        assert row["peer_cells_timed"] == min(18, cells)
        assert row["max_abs_diff"] < 1e-4
        assert row["bound_s"] == row["flops"] / row["matmul_flops_per_s"]
        assert row["bound_share"] == row["bound_s"] / row["ours_s"]
        assert row["ratio"] == row["peer_s"] / row["ours_s"]
        assert (row["tokens"], row["steps"], row["dtype"]) == (24, 3, "float32")


def test_a_sample_says_so_and_stands_for_all_cells_by_flops() -> None:
    rows = patching(
        lambda rounds, _: rounds, model(), backends(), "patch_head_step", CHAIN, rounds=2, sample=4, most_flops=4e6
    )
    row = rows[0]
    assert row["ours_cells_timed"] % 18 == 0
    assert 0 < row["ours_cells_timed"] < row["cells"] == 72
    assert row["ours_s"] > row["ours_times_s"][0] or row["ours_s"] > row["ours_times_s"][1]
    assert all(row["max_abs_diff"] < 1e-4 for row in rows)


def test_the_bound_counted_by_hand() -> None:
    """Per layer q 48x48, k and v 48x24, o 48x48, MLP 3 x 48x52: 14,400 weights; vocabulary 337, 6 heads of 8."""
    patch = [ActivationEdit(Site("resid_pre", 1), (20, 21), "zero")]
    cut = cut_edits(range(4), (22, 23), (4, 5))
    per_layer_1 = 2 * 14400 * 4 + 4 * 48 * (21 + 22 + 23 + 24)
    per_layer_2 = 2 * 14400 * 2 + 4 * 48 * (23 + 24)
    expected = [3 * per_layer_1 + 2 * 48 * 337, 4 * per_layer_2 + 2 * 48 * 337]
    assert corner_flops(model(), 24, [patch, cut]) == expected


def test_samples_take_whole_groups_from_all_over() -> None:
    groups = [i // 5 for i in range(50)]
    assert sample_of_groups(groups, [2] * 50, 100.0) == list(range(50))
    chosen = sample_of_groups(groups, [2] * 50, 41.0)
    assert len(chosen) == 20
    assert [chosen[i] // 25 for i in range(0, 20, 5)] == [0, 0, 1, 1]
    assert chosen == [i for i in range(50) if i // 5 in {c // 5 for c in chosen}]
    assert len(sample_of_groups(groups, [2] * 50, 1.0)) == 5


@pytest.mark.parametrize("n_tokens", [120, 700])
def test_worked_chains_have_whole_steps_and_an_aligned_twin(n_tokens: int) -> None:
    chain = worked_chain(model(), n_tokens)
    assert len(chain.tokens) == len(chain.twin) == n_tokens
    assert 2 <= len(chain.steps) <= 12
    bounds = [place for span in (*chain.steps, chain.cue) for place in span]
    assert bounds == sorted(bounds)
    assert bounds[-1] == n_tokens
    assert bounds[1:-1:2] == bounds[2::2]
    for first, end in chain.steps:
        text = model().decode(chain.tokens[first:end])
        assert text.rstrip().endswith(".")
        assert chain.twin[first:end] != chain.tokens[first:end]
    assert model().decode(chain.tokens[slice(*chain.cue)]).startswith("\nSo ")


def test_rows_replace_older_ones_of_the_same_work(tmp_path: Path) -> None:
    row = {"name": "a", "tokens": 75, "peer": "p", "device": "cpu", "dtype": "float32", "ratio": 1.0}
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"rows": [], "exploration": {"kept": True}}))
    keep_rows(file, [row, {**row, "tokens": 150}])
    keep_rows(file, [{**row, "ratio": 2.0}])
    kept = json.loads(file.read_text())
    assert kept["exploration"] == {"kept": True}
    assert {(r["tokens"], r["ratio"]) for r in kept["rows"]} == {(75, 2.0), (150, 1.0)}


def test_an_unknown_benchmark_is_named() -> None:
    with pytest.raises(CotfaithError, match="patch_layer_tokens is no benchmark"):
        next(measure(lambda r, _: r, model(), ["patch_layer_tokens"], [75], rounds=1, sample=1, most_flops=1.0))


@cache
def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_the_gpu_benchmark_runs_small_on_a_cpu(tmp_path: Path) -> None:
    script("bench_gpu").main(["--tiny", "--json", str(tmp_path / "gpu.json"), "--rounds", "1", "--sample", "5"])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert (found["tokens"], found["steps"], found["cells"]) == (56, 12, 48)
    assert found["device"] == "cpu"
    assert set(found["versions"]) == {"torch", "transformers", "transformer-lens", "nnsight"}
    assert [row["peer"] for row in found["peers"]] == ["transformer_lens", "nnsight", "plain_hooks"]
    assert all(row["max_abs_diff"] < 1e-4 and row["cells_timed"] == 5 for row in found["peers"])
    assert found["largest_effect"] > 1e-3
    assert found["share_of_matmul_rate"] == found["flops"] / found["ours_s"] / found["matmul_flops_per_s"]
    goals = found["goals"]
    assert {name: row["goal"] for name, row in goals.items()} == {
        "ratio_to_transformer_lens": 20,
        "share_of_matmul_rate": 0.5,
        "seconds_at_most": 10,
    }
    assert all(row["met"] is None and row["reached"] > 0 for row in goals.values())


@pytest.mark.parametrize("device", ["cpu", "NVIDIA H100"])
def test_goals_of_the_gpu_benchmark(device: str) -> None:
    peers = [{"peer": "transformer_lens", "ratio": 25.0}, {"peer": "nnsight", "ratio": 2.0}]
    found = {"device": device, "peers": peers, "share_of_matmul_rate": 0.4, "ours_s": 6.0, "base_run_s": 1.0}
    met = {name: row["met"] for name, row in script("bench_gpu").goals(found).items()}
    on_gpu = {"ratio_to_transformer_lens": True, "share_of_matmul_rate": False, "seconds_at_most": True}
    assert met == (on_gpu if device != "cpu" else dict.fromkeys(on_gpu))


SETS = ("patch_layer_token", "patch_layer_step", "patch_head_step", "knockout_matrix")


def test_the_committed_measurements_are_what_the_figure_draws(tmp_path: Path) -> None:
    rows = json.loads((ROOT / "experiments" / "results" / "bench_cpu.json").read_text())["rows"]
    wanted = {
        (name, n, peer)
        for name in script("bench_figure").PANELS
        for n in (75, 150, 300, 600)
        for peer in script("bench_figure").PEERS
    }
    assert wanted <= {(row["name"], row["tokens"], row["peer"]) for row in rows}
    assert all(row["max_abs_diff"] < 1e-4 and row["rounds"] >= 2 for row in rows)
    script("bench_figure").main("", str(tmp_path / "bench.png"))
    assert (tmp_path / "bench.png").stat().st_size > 10_000
