"""Memory that runs out, base runs kept on the CPU, and values that are not finite: what comes out is what would have."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cotfaith_mech import study
from cotfaith_mech.arithmetic import people_problems
from cotfaith_mech.attribution import measure_attribution
from cotfaith_mech.backends import memory
from cotfaith_mech.backends.huggingface import HuggingFaceModel
from cotfaith_mech.backends.memory import Room, peak_memory_gb, ran_out
from cotfaith_mech.config import parse_config
from cotfaith_mech.errors import CotfaithError
from cotfaith_mech.knockout import KnockoutPlan, measure_knockout
from cotfaith_mech.mediation import measure_mediation
from cotfaith_mech.model import Branch, CachedRun
from cotfaith_mech.patching import PatchPlan, measure_patching
from cotfaith_mech.reading import Trunk
from cotfaith_mech.records import Record, RunDirectory
from cotfaith_mech.sampling import supplied_chain
from cotfaith_mech.sites import Site
from cotfaith_mech.trace import measure_trace
from cotfaith_mech.units import undefined_in

from .test_conformance import hooks_and_layers, last_logits, random_cells, tokens, zeroed_cells
from .tiny import tiny

X, OTHER = tokens(8)[0].tolist(), tokens(9)[0].tolist()
READ = {"n_logits": 3, "reduce": last_logits}
ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
)


def model(architecture: str = "llama-gqa", keep_on_cpu: bool = False) -> HuggingFaceModel:
    weights = tiny(architecture)
    weights.model.config.max_position_embeddings = 512
    return HuggingFaceModel(weights, keep_on_cpu)


@contextmanager
def scarce(m: Any, most: int, error: Exception = ERRORS[0]) -> Iterator[list[int]]:
    """The MLP of layer 2 raises `error` on more than `most` tokens; yields the numbers of tokens it was given."""
    mlp, seen = m.layout.layers[2].layer.mlp, []
    plain = mlp.forward

    def forward(hidden: Tensor) -> Tensor:
        seen.append(hidden.shape[0] * hidden.shape[1])
        if seen[-1] > most:
            raise error
        return plain(hidden)

    mlp.forward = forward
    try:
        yield seen
    finally:
        mlp.forward = plain


@pytest.mark.parametrize("error", ERRORS, ids=["gpu", "cpu", "host"])
def test_cells_are_redone_in_smaller_groups(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """Cells of every kind, also such that take two rows; the limit stays for the model's other runs, and grows no
    hook."""
    m = model()
    cells = [*random_cells(m), *zeroed_cells(m.info.n_heads)]
    expected = m.cached_run(X).edited(cells, **READ)
    before, run, whole = hooks_and_layers(m), m.cached_run(X), m.room.tokens
    with caplog.at_level(logging.WARNING, "cotfaith_mech"), scarce(m, 60, error) as seen:
        got = run.edited(cells, **READ)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert max(seen) > 60
    assert hooks_and_layers(m) == before
    told = [record.getMessage() for record in caplog.records if record.name == "cotfaith_mech"]
    limits = [int(line.split("at most ")[1].rstrip(".")) for line in told]
    assert all("Memory ran out in a pass of" in line for line in told)
    assert limits == sorted(limits, reverse=True)
    assert m.room.tokens == limits[-1] < whole
    with scarce(m, 60, error) as seen:
        m.cached_run(X).edited(cells, **READ)
    assert max(seen) <= 60


def test_texts_are_redone_from_where_they_were(caplog: pytest.LogCaptureFixture) -> None:
    """Memory runs out while the variants go on: none is told a second time what it wrote, none is lost."""
    m = model()
    variants = [X, X[:5] + X[12:], X[:14] + OTHER[:9], X[:14] + OTHER[:8], [*X, 5, 6, 7], X[:1] + OTHER, OTHER]
    branches = [Branch(tuple(v), 1 + n % 3) for n, v in enumerate(variants)]

    def written(run: CachedRun) -> tuple[list[tuple[int, ...]], Tensor]:
        texts = {i: branch.tokens for i, branch in enumerate(branches)}

        def then(i: int, best: tuple[int, ...]) -> Branch | None:
            if len(texts[i]) >= len(branches[i].tokens) + 2 * i:
                return None
            texts[i] += best[-1:]
            return Branch(texts[i], 1)

        def keep(logits: Tensor, i: int) -> Tensor:
            return torch.stack([logits.sum(), logits.max(), torch.tensor(float(i))])

        return list(texts.values()), torch.stack(run.branches(branches, reduce=keep, then=then))

    expected = written(m.cached_run(X))
    before = hooks_and_layers(m)
    for most in (70, 45, 24):
        m.room.limit = None
        run = m.cached_run(X)
        with caplog.at_level(logging.WARNING, "cotfaith_mech"), scarce(m, most) as seen:
            got = written(run)
        assert got[0] == expected[0]
        torch.testing.assert_close(got[1], expected[1], atol=1e-4, rtol=0)
        assert max(seen) > most
    assert hooks_and_layers(m) == before
    assert caplog.records


@pytest.mark.parametrize("what", ["base run", "read", "cell", "text", "splice"])
def test_one_row_that_does_not_fit_names_sizes_and_remedy(what: str) -> None:
    m = model()
    run, other = m.cached_run(X), m.cached_run(OTHER)
    before = hooks_and_layers(m)
    act: dict[str, Callable[[], Any]] = {
        "base run": lambda: m.cached_run(X),
        "read": lambda: run.read([Site("z", 3)]),
        "cell": lambda: run.edited(random_cells(m)[:1], **READ),
        "text": lambda: run.branches([Branch(tuple(OTHER), 2)], reduce=lambda logits, _: logits),
        "splice": lambda: run.spliced(other, 2, 9),
    }
    with (
        scarce(m, 2),
        pytest.raises(CotfaithError, match=r"tiny-llama-gqa.*float32, cpu.*one text of 19 tokens.*keep_on_cpu"),
    ):
        act[what]()
    assert hooks_and_layers(m) == before
    torch.testing.assert_close(m.cached_run(X).logits(2), run.logits(2))


def test_other_errors_are_not_taken_for_memory() -> None:
    m = model()
    run, before = m.cached_run(X), m.room.tokens
    with scarce(m, 2, RuntimeError("shapes do not match")), pytest.raises(RuntimeError, match="shapes do not match"):
        run.edited(random_cells(m), **READ)
    assert m.room.tokens == before


def test_what_the_allocator_of_this_machine_says_is_understood() -> None:
    with pytest.raises(RuntimeError) as told:
        torch.empty(2**60, dtype=torch.uint8)
    assert ran_out(told.value)
    assert not ran_out(RuntimeError("a and b must have the same size"))


def test_the_room_of_a_gpu_follows_from_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama-3-8B in bfloat16, worked out: bytes a token, and what half of 8 GB free and 2 GB unused takes."""
    info = replace(
        model().info,
        device="cuda:0",
        dtype="bfloat16",
        d_model=4096,
        n_heads=32,
        n_kv_heads=8,
        d_head=128,
        vocab=128256,
    )
    room = Room(info, 14336)
    own = 6 * 4096 + 3 * 14336 + 2 * 48 * 128
    assert room.bytes_a_token == 2 * (own + 16 * 2 * 40 * 128) + 8192 * 14
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (8 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 5 * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 3 * 10**9)
    assert room.tokens == 5 * 10**9 // room.bytes_a_token
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 80 * 10**9))
    assert room.tokens == 5 * 10**9 // room.bytes_a_token, "looked up once"
    assert Room(replace(info, device="cpu"), 14336).tokens == 4096


def test_rows_on_a_long_prefix_and_many_logits_count() -> None:
    """Ten tokens behind 4,000: a pass of 4,096 would take 409 rows, each with a copy of all keys; and none is lost."""
    room = Room(replace(model().info, vocab=49152), 52)
    assert room.cost(10, 4000, 1) == 4000 // 16
    assert room.cost(300, 400, 1) == 300
    assert room.cost(4, 40, 5) == 5 * 49152 // 8192
    m = model()
    variants = [Branch((*X, 5 + n, 6, 7), 2) for n in range(9)]
    expected = m.cached_run(X).branches(variants, reduce=lambda logits, _: logits)
    m.room.limit = 5
    got = m.cached_run(X).branches(variants, reduce=lambda logits, _: logits)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_a_sibling_that_goes_on_shares_its_trunks_memory_and_a_second_one_does_not_write_over_it() -> None:
    m = model()
    trunk = m.cached_run(X)
    first, second, shorter = trunk.sibling([*X, 5, 6]), trunk.sibling([*X, 7, 8, 9]), trunk.sibling(X[:12])
    site = Site("resid_post", 2)

    def at(run: CachedRun) -> int:
        return run.read([site])[site].data_ptr()

    assert at(first) == at(trunk) == at(shorter)
    assert at(second) != at(trunk)
    assert at(first.sibling([*X, 5, 6, *range(4, 4 + memory.SPARE)])) != at(trunk)
    longer = shorter.sibling([*X[:12], 30, 31, 32])
    for run in (trunk, first, second, shorter, longer, first.sibling([*X, 5, 6, 7])):
        fresh = m.cached_run(run.tokens)
        torch.testing.assert_close(run.logits(3), fresh.logits(3), atol=1e-5, rtol=0)
        for wanted in (site, Site("v", 3)):
            torch.testing.assert_close(run.read([wanted])[wanted], fresh.read([wanted])[wanted], atol=1e-4, rtol=0)


class Stored(Tensor):
    """A tensor of another device, as far as one processor can show it: nothing but moving, copying, slicing and writing
    into it is allowed, and what is moved off it is a plain tensor."""

    moved = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "to":
            Stored.moved += 1
            with torch._C.DisableTorchFunctionSubclass():
                return func(args[0].as_subclass(Tensor), *args[1:], **kwargs)
        if name not in ("__getitem__", "__setitem__", "copy_", "transpose", "__get__", "__len__"):
            raise AssertionError(f"{name} on a tensor that was not moved")
        if name == "copy_" and not isinstance(args[0], Stored):
            raise AssertionError("copied into a pass without a move")
        return super().__torch_function__(func, types, args, kwargs)


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> type[Stored]:
    plain = memory.Kept._empty

    def empty(self: memory.Kept, *shape: int) -> Tensor:
        made = plain(self, *shape)
        return made.as_subclass(Stored) if self.on_cpu else made

    monkeypatch.setattr(memory.Kept, "_empty", empty)
    monkeypatch.setattr(Stored, "moved", 0)
    return Stored


@pytest.mark.parametrize("architecture", ["llama-gqa", "mistral", "gemma2"])
def test_runs_kept_on_the_cpu_move_what_a_pass_reads(architecture: str, stored: type[Stored]) -> None:
    """No GPU here: a tensor kept that meets another one without a move is an error, and all results are the same."""
    plain, m = model(architecture), model(architecture, keep_on_cpu=True)
    cells = [*random_cells(m), *zeroed_cells(m.info.n_heads)]
    runs = {one: one.cached_run(X) for one in (plain, m)}
    assert isinstance(runs[m].read([Site("resid_pre", 1)])[Site("resid_pre", 1)], stored)
    siblings = {one: run.sibling([*X[:7], *OTHER]) for one, run in runs.items()}
    spliced = {one: run.spliced(one.cached_run(OTHER), 4, 11) for one, run in runs.items()}
    for of in (runs, siblings, spliced):
        torch.testing.assert_close(of[m].logits(2), of[plain].logits(2), atol=1e-5, rtol=0)
        torch.testing.assert_close(of[m].edited(cells, **READ), of[plain].edited(cells, **READ), atol=1e-5, rtol=0)
        texts = [Branch(tuple(v), 2) for v in (OTHER, X[:9] + OTHER[:5], [*X, 4, 5])]
        ours, theirs = (of[one].branches(texts, reduce=lambda logits, _: logits.sum(0)) for one in (m, plain))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        for kind in ("resid_pre", "v", "z", "mlp_out", "pattern"):
            site = Site(kind, 2)
            got, expected = (of[one].read([site], first=5)[site] for one in (m, plain))
            torch.testing.assert_close(got.to("cpu"), expected, atol=1e-5, rtol=0)
    assert stored.moved > 100


def values(records: list[Record]) -> dict[tuple[Any, ...], float]:
    return {(r.measure, r.variant, r.step, r.site, r.layer, r.head, r.seed, r.metric): r.value for r in records}


def test_measures_on_runs_kept_on_the_cpu_are_the_same(stored: type[Stored]) -> None:
    """But for patching's controls and the decision trace, which calculate with what is kept where it lies."""
    problem = people_problems(1, seed=2)[0]
    found = []
    for keep in (False, True):
        m = model(keep_on_cpu=keep)
        trunk = Trunk.of(m, supplied_chain(m, problem).with_answer(f" {problem.gold}"), problem.kind)
        parts = [
            measure_patching(trunk, problem, "A", PatchPlan(), controls=False),
            measure_knockout(trunk, "A", KnockoutPlan()),
            measure_attribution(trunk, problem, "A"),
            measure_mediation(trunk, problem, "A"),
        ]
        assert not [reason for part in parts for reason in part.exclusions]
        found.append(values([record for part in parts for record in part.records]))
    assert stored.moved > 100
    assert found[0].keys() == found[1].keys()
    np.testing.assert_allclose([*found[1].values()], [*found[0].values()], atol=1e-5, rtol=1e-4)


def test_one_nan_weight_gives_exclusions_with_coordinates_and_no_number() -> None:
    """A row of the embedding that the chain does not use and its twin does: what reads the twin is undefined, and only
    that."""
    m, foreign = model(), []
    for problem in people_problems(40, seed=2, n_people=2):
        chain = supplied_chain(m, problem).with_answer(f" {problem.gold}")
        twin = replace(chain, steps=problem.twin_steps)
        foreign = sorted({*m.encode(twin.text).ids} - {*m.encode(chain.text).ids})
        if foreign:
            break
    clean = Trunk.of(m, chain, problem.kind)
    knockout = values(measure_knockout(clean, "A", KnockoutPlan()).records)
    m.weights.model.get_input_embeddings().weight[foreign[0], 3] = torch.nan
    trunk = Trunk.of(m, chain, problem.kind)
    assert values(measure_knockout(trunk, "A", KnockoutPlan()).records) == knockout
    measured = measure_patching(trunk, problem, "A", PatchPlan())
    told = undefined_in(measured)
    bad = [record for record in measured.records if not np.isfinite(record.value)]
    assert sum(len(reason.split("; ")) for reason in told) == len(bad) > len(told) > 0
    place = next(step for step, (a, b) in enumerate(trunk.spans.steps) if foreign[0] in m.encode(twin.text).ids[a:b])
    cells = {(r.variant, r.step, r.layer, r.metric): r.value for r in measured.records if r.site}
    for layer in range(4):
        for metric in ("logit_diff", "p_answer", "says_source"):
            assert np.isnan(cells["noise", place, layer, metric])
            assert np.isnan(cells["denoise", place, layer, metric]) == (layer > 0 or place == 0) or layer == 0
    earlier = [value for (variant, step, *_), value in cells.items() if variant == "noise" and step and step < place]
    assert np.isfinite(earlier).all()
    assert any("patching noise kl: value is nan at" in reason and f"step {place} layer 2" in reason for reason in told)


def test_a_model_that_is_nan_throughout_gives_no_number_at_all() -> None:
    m, problem = model(), people_problems(1, seed=2)[0]
    m.layout.layers[1].layer.mlp.down_proj.weight[3, 3] = torch.nan
    with pytest.raises(CotfaithError, match="NaN or infinite"):
        Trunk.of(m, supplied_chain(m, problem), problem.kind)
    trunk = Trunk.of(m, supplied_chain(m, problem).with_answer(f" {problem.gold}"), problem.kind)
    for measured in (
        measure_knockout(trunk, "A", KnockoutPlan(("step", "heads"), ("masked",))),
        measure_patching(trunk, problem, "A", PatchPlan()),
        measure_trace(trunk, "A"),
    ):
        of_model = [record for record in measured.records if record.layer != 0 or record.measure == "knockout"]
        assert of_model
        assert not [record for record in of_model if np.isfinite(record.value)]
        told = undefined_in(measured)
        assert sum(len(reason.split("; ")) for reason in told) >= len(of_model)
    heads = undefined_in(measure_knockout(trunk, "A", KnockoutPlan(("heads",))))
    assert any("step 1 layer 2 head 4" in reason for reason in heads)


def test_a_study_of_a_model_with_a_nan_weight_leaves_its_chains_out(tmp_path: Path) -> None:
    m = model()
    m.layout.layers[1].layer.mlp.down_proj.weight[3, 3] = torch.nan
    m.weights.model.save_pretrained(tmp_path / "model")
    m.weights.tokenizer.save_pretrained(tmp_path / "model")
    config = {
        "readers": [{"name": "A", "model": str(tmp_path / "model")}],
        "problems": "people:2",
        "crosscheck_cells": 0,
        "keep_on_cpu": True,
    }
    with pytest.raises(CotfaithError, match=r"holds no records.*NaN or infinite.*\(1 of \d+ exclusions\)"):
        study.run_study(parse_config(config), tmp_path / "run")
    reasons = [row["reason"] for row in RunDirectory(tmp_path / "run").read_exclusions()]
    assert sum("NaN or infinite" in reason for reason in reasons) == 2


def test_the_manifest_says_how_much_memory_was_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most of all processes that worked on the run, a resumed one included."""
    used = peak_memory_gb()
    assert 0.05 < used["resident"] < 100
    assert ("cuda" in used) == torch.cuda.is_available()
    run = RunDirectory.create(tmp_path / "run", {})
    manifest = {"models": {"A": {"device": "cpu"}}}
    peaks = iter([{"resident": 2.5}, {"resident": 1.5, "cuda": 3.0}])
    monkeypatch.setattr(memory, "peak_memory_gb", lambda: next(peaks))
    study.write_manifest(run, manifest)
    study.write_manifest(run, manifest)
    assert json.loads((run.path / "manifest.json").read_text())["peak_memory_gb"] == {"resident": 2.5, "cuda": 3.0}
