"""The public names: loaded when asked for, documented, annotated; tables, notebook views and other tools' activations."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path
from typing import Any

import jaxtyping
import matplotlib as mpl
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from transformer_lens import ActivationCache

import cotfaith_mech as cm
from cotfaith_mech.attribution import measure_attribution
from cotfaith_mech.attribution_patching import measure_attribution_patching
from cotfaith_mech.behaviour import measure_behaviour
from cotfaith_mech.chains import Chain
from cotfaith_mech.contrast import AnswerContrast
from cotfaith_mech.crossmodel import Pair, measure_cross_model
from cotfaith_mech.edits import filler
from cotfaith_mech.errors import CotfaithError
from cotfaith_mech.knockout import KnockoutPlan, measure_knockout
from cotfaith_mech.mediation import measure_cmi, measure_mediation
from cotfaith_mech.model import same_weights
from cotfaith_mech.patching import PatchPlan, measure_patching
from cotfaith_mech.problems import choice_listing
from cotfaith_mech.reading import Trunk
from cotfaith_mech.records import COLUMNS, UNITS, Record, RunDirectory
from cotfaith_mech.sampling import supplied_chain
from cotfaith_mech.sites import Site
from cotfaith_mech.tables import unit_of_estimate
from cotfaith_mech.trace import measure_trace
from cotfaith_mech.variants import BehaviourPlan

from .fake_run import write_fake_run
from .test_mechanism import model, problem, trunk

HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(1)> \" ' & $x$ {{ 7*7 }} \u202etxt.exe"


# names


def test_importing_the_package_loads_no_library_and_tables_and_views_load_no_torch() -> None:
    heavy = "any(m in sys.modules for m in ('torch', 'pandas', 'numpy', 'matplotlib'))"
    code = f"import sys, cotfaith_mech as cm; assert not {heavy}; dir(cm); assert not {heavy}"
    code += "; cm.table, cm.heatmap, cm.chain_view, cm.RunDirectory, cm.CotfaithError; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_lists_of_names_agree() -> None:
    tree = ast.parse(Path(cm.__file__).read_text())
    typed = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    assert typed == cm._HOMES
    assert cm.__all__ == sorted(cm._HOMES) == dir(cm)
    assert cm.__version__ == metadata.version("cotfaith-mech")
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        _ = cm.lod


@pytest.mark.parametrize(
    ("plan", "options", "told"),
    [
        (
            KnockoutPlan,
            {"edges": ("step", "steps")},
            "edges has 'steps', which is none of step, random, later, joint, chain, question, matrix, heads, windows; "
            "did you mean 'step'?",
        ),
        (
            KnockoutPlan,
            {"kinds": ("foo",)},
            "kinds has 'foo', which is none of masked, zeroed; use one of these.",
        ),
        (
            KnockoutPlan,
            {"edges": "step"},
            "edges is the text 'step', where several words are expected; write ('step',).",
        ),
        (
            BehaviourPlan,
            {"tests": ("filer",)},
            "tests has 'filer', which is none of early_termination, filler, paraphrase, mistake, shuffle, swap, "
            "conflict; did you mean 'filler'?",
        ),
        (BehaviourPlan, {"battery": "ful"}, "battery has 'ful', which is none of core, full; did you mean 'full'?"),
        (
            PatchPlan,
            {"directions": ("noisee",)},
            "directions has 'noisee', which is none of noise, denoise; did you mean 'noise'?",
        ),
        (
            PatchPlan,
            {"kinds": ("resid",)},
            "kinds has 'resid', which is none of resid_pre, resid_mid, resid_post, attn_out, mlp_out, z, q, k, v, "
            "pattern; did you mean 'resid_pre'?",
        ),
        (
            PatchPlan,
            {"sources": ("twins",)},
            "sources has 'twins', which is none of twin, twin_step, filler, other, mean; did you mean 'twin'?",
        ),
    ],
)
def test_a_misspelt_word_of_a_plan_is_refused(plan: type, options: dict[str, Any], told: str, monkeypatch: Any) -> None:
    """As users run it, without the type checks of the tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(CotfaithError) as refused:
        plan(**options)
    assert str(refused.value) == told


def public_functions(thing: Any) -> list[tuple[str, Any]]:
    if not inspect.isclass(thing):
        return [(thing.__name__, thing)]
    members = {name: inspect.getattr_static(thing, name) for name in vars(thing) if not name.startswith("_")}
    plain = {
        name: getattr(member, "fget", None) or getattr(member, "__func__", member) for name, member in members.items()
    }
    return [(f"{thing.__name__}.{name}", member) for name, member in plain.items() if inspect.isfunction(member)]


@pytest.mark.parametrize("name", cm.__all__)
def test_every_public_name_says_what_it_is_and_is_annotated(name: str) -> None:
    thing = getattr(cm, name)
    assert inspect.isclass(thing) or inspect.isfunction(thing)
    assert len((thing.__doc__ or "").split()) >= 8
    assert not thing.__doc__.startswith(f"{name}("), "a dataclass that says nothing but its signature"
    for called, function in public_functions(thing):
        assert inspect.getdoc(function), called
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty, called
        for parameter in signature.parameters.values():
            assert parameter.name in ("self", "cls") or parameter.annotation is not inspect.Parameter.empty, called


@pytest.mark.smollm2
def test_the_example_in_the_package_s_docstring_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [line[4:] for line in (cm.__doc__ or "").splitlines() if line.startswith("    ")]
    assert lines[0] == "import cotfaith_mech as cm"
    assert "run_study" in lines[-1]
    names: dict[str, Any] = {}
    exec("\n".join(lines[:-1]), names)
    heatmap = cm.heatmap(names["patches"], names["trunk"].chain)
    assert heatmap.values.shape == (4, 4)
    assert abs(heatmap.values).max(axis=1).idxmax() == names["problem"].true_step
    assert "<table" in cm.chain_view(names["tests"], names["trunk"].chain)._repr_html_()
    assert len(pd.read_parquet("patches.parquet")) == len(names["patches"].records)


# a problem, read


def test_a_trunk_of_a_problem_has_its_chain_its_kind_and_its_labels() -> None:
    m, p = model("llama-gqa"), problem()
    ours = trunk()
    made = Trunk.of_problem(m, p, supplied_chain(m, p).with_answer(f" {p.gold}"))
    assert (made.chain, made.kind, made.labels, made.spans) == (ours.chain, "number", (), ours.spans)
    choices = ("red", "blue")
    asked = replace(p, kind="choice", choices=choices, gold="B", question=f"{p.question}\n{choice_listing(choices)}")
    assert Trunk.of_problem(m, asked, supplied_chain(m, asked).with_answer(" B")).labels == ("A", "B")
    with pytest.raises(CotfaithError, match="comes without worked steps"):
        Trunk.of_problem(m, replace(p, steps=()))


# tables


def measured_everything() -> list[Any]:
    t, p, m = trunk(), problem(), model("llama-gqa")
    pair = Pair.of(m, m)
    donors = [replace(t.chain, problem_id="other", steps=t.chain.steps[::-1])]
    return [
        measure_behaviour(t, p, "A", BehaviourPlan(draws=1, battery="full"), donors=donors),
        measure_knockout(t, "A", contrast=AnswerContrast.named(t, p.twin_answer)),
        measure_patching(t, p, "A", PatchPlan((1,))),
        measure_attribution(t, p, "A", full=True),
        measure_attribution_patching(t, p, "A"),
        measure_mediation(t, p, "A"),
        measure_cmi(t, donors, "A"),
        measure_trace(t, "A"),
        measure_cross_model(pair, p, t.chain, "A"),
    ]


def test_every_metric_that_is_measured_has_a_unit() -> None:
    found = measured_everything()
    metrics = {record.metric for one in found for record in one.records}
    assert len(metrics) > 45
    assert metrics <= set(UNITS)


def test_a_table_holds_the_records_and_their_units_whatever_it_is_made_of(tmp_path: Path) -> None:
    measured = measure_patching(trunk(), problem(), "A", PatchPlan((1, 3)))
    frame = cm.table(measured)
    assert list(frame.columns) == [*COLUMNS, "unit"]
    assert [Record(**{k: None if v is pd.NA or v is None else v for k, v in row.items()}) for row in
            frame.drop(columns="unit").astype(object).where(lambda f: f.notna(), None).to_dict("records")] == measured.records  # fmt: skip
    assert dict(zip(frame["metric"], frame["unit"], strict=True)) == {
        name: UNITS[name] for name in frame["metric"].unique()
    }
    pd.testing.assert_frame_equal(cm.table(measured.records), frame)
    run = RunDirectory.create(tmp_path / "run", {"seed": 3})
    run.write_unit("one", measured.records, {})
    run.add_exclusion(problem_id="p9", stage="read", reason="no answer")
    pd.testing.assert_frame_equal(cm.table(run), frame)
    assert cm.table(run).attrs["config"] == {"seed": 3}
    assert [row["reason"] for row in cm.table(run).attrs["exclusions"]] == ["no answer"]
    empty = cm.table([])
    assert empty.empty
    assert empty.dtypes.to_dict() == frame.dtypes.to_dict()


def test_estimates_are_a_table_too(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run")
    frame, estimates = cm.table(run.read_estimates()), run.read_estimates()
    assert list(frame.columns) == [
        "name",
        "arm",
        "n_problems",
        "value",
        "ci_low",
        "ci_high",
        "p",
        "method",
        "note",
        "unit",
    ]
    assert frame["value"].tolist() == [estimate.value for estimate in estimates]
    assert frame["note"].tolist() == [estimate.note for estimate in estimates]
    assert frame["unit"].notna().all()


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("knockout/true_step/delta_p | both_correct", "probability"),
        ("conflict/record_agree/says_chain", "share of problems"),
        ("infogain/logp_gain", "nats a step"),
        ("patching/noise/true_step/recovered/layer12", "share of the effect"),
        ("verdict/load_bearing@0.75", "share of problems"),
        ("bridge/mistake~knockout/rho", "rank correlation"),
        ("no_such/score", None),
    ],
)
def test_the_unit_of_an_estimate_follows_from_its_name(name: str, unit: str | None) -> None:
    assert unit_of_estimate(name) == unit


def test_parquet_and_csv_come_back_equal(tmp_path: Path) -> None:
    frame = cm.table(write_fake_run(tmp_path / "run", hostile='# a, "b"\n'))
    frame.loc[0, "value"] = np.nan
    frame.loc[1, "value"] = 1 / 3
    assert (frame["variant"] == "").any()
    frame.to_parquet(tmp_path / "t.parquet")
    back = pd.read_parquet(tmp_path / "t.parquet")
    pd.testing.assert_frame_equal(back, frame, check_exact=True)
    assert back.attrs == frame.attrs
    assert b'"seeds": {"study": 7}' in pq.read_schema(tmp_path / "t.parquet").metadata[b"PANDAS_ATTRS"]
    frame.to_csv(tmp_path / "t.csv", index=False)
    numbers = {name: [""] for name in frame.columns if frame[name].dtype.kind in "if"}
    missing = numbers | {"site": [""]}
    kinds = frame.dtypes.to_dict()
    read = pd.read_csv(tmp_path / "t.csv", dtype=kinds, keep_default_na=False, na_values=missing)  # fmt: skip
    pd.testing.assert_frame_equal(read, frame, check_exact=True)


# views


class Parsed(HTMLParser):
    """Tags and attributes of a text, and what it says."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.said = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said += data

    def titles(self) -> list[str]:
        return [value for name, value in self.attributes if name == "title"]


def shown(view: Any) -> Parsed:
    text = view._repr_html_()
    text.encode()
    parsed = Parsed(text)
    assert set(parsed.tags) <= {"div", "table", "tr", "td", "th", "b", "bdi", "span"}
    assert {name for name, _ in parsed.attributes} <= {"style", "title", "class"}
    assert not [value for name, value in parsed.attributes if name == "style" and "url" in value]
    assert "mathjax_ignore" in text
    assert parsed.open == []
    return parsed


def test_text_of_a_model_never_becomes_markup() -> None:
    text = f"{HOSTILE} \ud800"
    chain = Chain(HOSTILE, HOSTILE, text, (text, f" second {text}"), text, text)
    records = [record(chain, "knockout", "masked", "delta_p", 0.5, step=0)]
    records += [record(chain, "patching", HOSTILE, "logit_diff", 2.0, step=1, layer=3, site="blocks.3.hook_resid_pre")]
    records += [record(chain, "patching", HOSTILE, "logit_diff_base", 1.0)]
    for view in (chain, cm.chain_view(records, chain, "knockout"), cm.heatmap(records, chain)):
        parsed = shown(view)
        assert parsed.said.count(f"{HOSTILE} ?") >= 2
        assert parsed.said.count(HOSTILE) >= 4
    assert f"1  second {HOSTILE} ?" in parsed.titles()


def record(chain: Chain, measure: str, variant: str, metric: str, value: float, **where: Any) -> Record:
    made = {"problem_id": chain.problem_id, "chain_id": chain.chain_id, "author": chain.author, "reader": HOSTILE}
    return Record(**made, measure=measure, variant=variant, metric=metric, value=value, **where)


def test_a_heatmap_is_the_effect_of_each_patch_centred_at_white(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run")
    row = run.read_chains()[2]
    chain, records = Chain.from_json(row), run.read_records()
    heatmap = cm.heatmap(run, chain, "noise", "A")
    own = records[(records["chain_id"] == chain.chain_id) & (records["reader"] == "A")]
    own = own[(own["measure"] == "patching") & (own["variant"] == "noise")]
    for step in range(4):
        for layer in (0, 5, 25):
            at = own[(own["step"] == step) & (own["layer"] == layer) & (own["metric"] == "logit_diff")]
            assert heatmap.values.loc[step, layer] == pytest.approx(float(at["value"].iloc[0]) - 3, abs=1e-12)
    assert cm.heatmap(run, chain, reader="A").variant == "denoise"
    parsed = shown(heatmap)
    cells = [style for name, style in parsed.attributes if name == "style" and "height:22px" in style]
    titles = [title for title in parsed.titles() if title.startswith("step")]
    assert len(cells) == len(titles) == 4 * 6
    assert f"2  {chain.steps[2].strip()}" in parsed.titles()
    worst = np.nanargmin(heatmap.values.to_numpy(float))
    assert np.nanmax(abs(heatmap.values.to_numpy(float))) == -heatmap.values.to_numpy(float).ravel()[worst]
    reddest = ",".join(str(round(255 * part)) for part in mpl.colormaps["RdBu"](0.0)[:3])
    assert f"background:rgb({reddest})" in cells[worst]
    step, layer = divmod(worst, 6)
    least = heatmap.values.iloc[step, layer]
    assert titles[worst] == f"step {step}, layer {heatmap.values.columns[layer]}: {least:+.3f} logits"
    assert "logits" in parsed.said


def test_a_cell_that_was_not_measured_is_grey_and_zero_is_white() -> None:
    chain = Chain("p", "a", "Q", (" one.", " two."), " So")
    records = [record(chain, "patching", "noise", "logit_diff_base", 1.0)]
    for layer, value in ((0, 1.0), (1, 3.0)):
        records.append(record(chain, "patching", "noise", "logit_diff", value, step=0, layer=layer, site="x"))
    heatmap = cm.heatmap(records, chain)
    assert heatmap.values.loc[0].tolist() == [0.0, 2.0]
    parsed = shown(heatmap)
    cells = [style.split(";")[0] for name, style in parsed.attributes if name == "style" and "height:22px" in style]
    white = ",".join(str(round(255 * part)) for part in mpl.colormaps["RdBu"](0.5)[:3])
    assert cells[0] == f"background:rgb({white})"
    assert cells[2:] == ["background:#ddd"] * 2
    assert parsed.titles()[3:5] == ["1  two.", "step 1, layer 0: not measured"]


def test_a_chain_is_coloured_by_the_effect_that_is_asked_for(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run")
    row = run.read_chains()[0]
    chain, records = Chain.from_json(row), run.read_records()
    first = cm.chain_view(run, chain, reader="A")
    assert first.effect.key == "knockout"
    masked = records[(records["measure"] == "knockout") & (records["variant"] == "masked") & (records["reader"] == "A")]
    masked = masked[masked["chain_id"] == chain.chain_id].set_index("step")["value"]
    assert first.values.tolist() == pytest.approx([masked[step] for step in range(4)], abs=1e-12)
    assert first.values.idxmax() == row["true_step"]
    assert "probability the answer loses" in shown(first).said
    assert cm.chain_view(run, chain, "mistake", "A").effect.unit == "total variation"


def test_views_say_what_there_is_when_something_is_not(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run")
    chain = Chain.from_json(run.read_chains()[0])
    with pytest.raises(CotfaithError, match="read by A, B, C, and reader=None"):
        cm.heatmap(run, chain)
    other = replace(chain, cue=" Else")
    nothing = f"The results hold nothing of chain {other.chain_id} of problem {chain.problem_id!r}; measure it, or give"
    for view, results, asked in ((cm.heatmap, run, "A"), (cm.heatmap, [], None), (cm.chain_view, [], None)):
        with pytest.raises(CotfaithError, match=nothing):
            view(results, other, reader=asked)
    with pytest.raises(CotfaithError, match=r"no patch 'noise/z' of this chain, but denoise, noise;"):
        cm.heatmap(run, chain, "noise/z", "A")
    with pytest.raises(
        CotfaithError, match=r"no effect 'infogain' of this chain's steps, but knockout, mistake, patch"
    ):
        cm.chain_view(run, chain, "infogain", "A")
    bare = measure_knockout(trunk(), "A", KnockoutPlan(("chain",)))
    with pytest.raises(CotfaithError, match="no effect 'of single steps'"):
        cm.chain_view(bare, trunk().chain)


# activations of other tools


def bridged_cache(ids: tuple[int, ...]) -> Any:
    bridge = same_weights(model("llama-gqa"), "transformer_lens").bridge
    with torch.no_grad():
        return bridge.run_with_cache(torch.tensor([ids]), prepend_bos=False)[1]


def test_a_run_is_an_activation_cache_equal_to_transformer_lens_s_own() -> None:
    t = trunk()
    ours, theirs = cm.activation_cache(t), bridged_cache(t.run.tokens)
    assert isinstance(ours, ActivationCache)
    assert len(ours) == 10 * t.model.info.n_layers
    for name in ours.keys():  # noqa: SIM118 - the cache iterates over values
        assert ours[name].shape == theirs[name].shape, name
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=0, msg=name)
    torch.testing.assert_close(ours["resid_post", -1], theirs["resid_post", -1], atol=1e-4, rtol=0)
    for made in (ours.accumulated_resid(layer=2), ours.stack_activation("z")):
        assert made.isfinite().all()
    torch.testing.assert_close(ours.accumulated_resid(2), theirs.accumulated_resid(2), atol=1e-4, rtol=0)
    assert list(cm.activation_cache(t, [Site("z", 1)]).keys()) == ["blocks.1.attn.hook_z"]


def twin_ids(t: Trunk) -> tuple[int, ...]:
    return t.model.encode(replace(t.chain, steps=problem().twin_steps).text).ids


def cells(records: list[Record]) -> dict[tuple[Any, ...], float]:
    """Patches but for what is said of the source run itself, wherever they are from."""
    return {
        (r.variant.replace("/cache", ""), r.metric, r.layer, r.step, r.position): r.value
        for r in records
        if r.measure == "patching" and r.metric not in ("says_source", "logit_diff_source", "p_answer_source")
    }


@pytest.mark.parametrize(
    "plan",
    [
        PatchPlan((0, 1, 3), ("noise",), ("resid_pre", "attn_out", "z", "v", "pattern"), ("step", "chain", "40:43")),
        PatchPlan((2,), ("noise",), parts=("token",)),
    ],
    ids=["sites", "tokens"],
)
def test_patching_from_transformer_lens_s_cache_equals_patching_from_our_own_source_run(plan: PatchPlan) -> None:
    t, cache = trunk(), bridged_cache(twin_ids(trunk()))
    own = cells(measure_patching(t, problem(), "A", plan, controls=False).records)
    records = measure_patching(t, problem(), "A", plan, cache=cache, controls=False).records
    assert {r.variant for r in records} == {
        "/".join(["noise/cache", *filter(None, ["" if kind == "resid_pre" else kind, "" if part == "step" else part])])
        for kind in plan.kinds
        for part in plan.parts
    }
    other = cells(records)
    assert own.keys() == other.keys()
    for where, value in own.items():
        assert other[where] == pytest.approx(value, abs=2e-4), where
    (base,) = {value for where, value in own.items() if where[1] == "logit_diff_base"}
    assert sum(abs(value - base) > 0.01 for where, value in own.items() if where[1] == "logit_diff") > 20
    single = measure_patching(t, problem(), "A", plan, cache=cache.remove_batch_dim(), controls=False).records
    assert single == records


def test_a_cache_that_does_not_fit_is_refused_and_restores_nothing() -> None:
    t = trunk()
    cache = bridged_cache(t.run.tokens[:-1])
    with pytest.raises(CotfaithError, match=r"expected \d+ positions of one text"):
        measure_patching(t, problem(), "A", PatchPlan((1,)), cache=cache)
    with pytest.raises(CotfaithError, match=r"The cache has no blocks.1.hook_resid_pre; make it with run_with_cache"):
        measure_patching(t, problem(), "A", PatchPlan((1,)), cache={})
    filled = t.model.encode(filler(t.chain, 0, t.model.count).text).ids
    assert len(filled) == len(t.run.tokens)
    measured = measure_patching(t, problem(), "A", PatchPlan((1,)), cache=bridged_cache(filled))
    assert {r.variant for r in measured.records if r.measure == "patching"} == {"noise/cache"}
    assert "denoising from cache" in measured.exclusions[0]

    class Folded(dict):
        model = type("Bridge", (), {"compatibility_mode": True})

    with pytest.raises(CotfaithError, match="compatibility mode"):
        measure_patching(t, problem(), "A", PatchPlan((1,)), cache=Folded())
