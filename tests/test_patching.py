"""Patching at every site, part and source, the screen of it, and the mediation index: each against edits of whole plain
passes that are put together by hand here."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cotfaith_mech import edits
from cotfaith_mech.arithmetic import people_problems
from cotfaith_mech.attribution_patching import KINDS, measure_attribution_patching
from cotfaith_mech.chains import Chain, token_spans
from cotfaith_mech.contrast import AnswerContrast
from cotfaith_mech.errors import CotfaithError
from cotfaith_mech.mediation import measure_cmi
from cotfaith_mech.model import PlainRun, same_weights
from cotfaith_mech.patching import PatchPlan, measure_patching
from cotfaith_mech.reading import Trunk
from cotfaith_mech.records import Record
from cotfaith_mech.sampling import supplied_chain
from cotfaith_mech.sites import ActivationEdit, Site

from .test_mechanism import model, problem, trunk

SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern")


def forced(t: Trunk, chain: Chain) -> tuple[int, ...]:
    return t.model.encode(chain.with_answer(t.chain.answer).text).ids


def twin_ids(t: Trunk) -> tuple[int, ...]:
    return forced(t, replace(t.chain, steps=problem().twin_steps))


@cache
def theirs(m: Any) -> Any:
    return same_weights(m, "transformer_lens")


def states(t: Trunk, ids: tuple[int, ...], site: Site) -> Tensor:
    """By TransformerLens, whole pass: `[pos, *width]`, pattern `[query, head, key]`."""
    found = theirs(t.model).run(torch.tensor([ids]), read=[site]).activations[site][0]
    return found.transpose(0, 1) if site.kind == "pattern" else found


def read_off(t: Trunk, ids: tuple[int, ...], edit: list[ActivationEdit]) -> tuple[float, float, Tensor]:
    """Logit difference, log p(a*) and the next-token distribution where a* and the foil part, of an edited whole pass."""
    contrast = AnswerContrast.named(t, problem().twin_answer)
    n, start = len(contrast.answer_ids), t.spans.answer[0]
    other = theirs(t.model)
    logits = other.run(torch.tensor([ids]), edits=edit, n_logits=len(ids)).logits[0, start - 1 : start - 1 + n]
    logp = logits.log_softmax(-1)
    here = logits[contrast.index]
    total = float(sum(logp[i, token] for i, token in enumerate(contrast.answer_ids)))
    return float(here[contrast.answer_token] - here[contrast.foil_token]), total, logp[contrast.index]


def values(records: list[Record], variant: str, **where: Any) -> dict[str, float]:
    found = {
        r.metric: r.value
        for r in records
        if r.measure == "patching" and r.variant == variant and all(getattr(r, k) == v for k, v in where.items())
    }
    assert found, (variant, where, sorted({r.variant for r in records}))
    return found


def check(t: Trunk, got: dict[str, float], ids: tuple[int, ...], edit: list[ActivationEdit]) -> float:
    """`got` are the readouts of `ids` with `edit`; gives how far the edit moves the logit difference."""
    difference, logp, edited = read_off(t, ids, edit)
    before, _, base = read_off(t, ids, [])
    assert got["logit_diff"] == pytest.approx(difference, abs=1e-4)
    assert got["logp_answer"] == pytest.approx(logp, abs=1e-4)
    assert got["kl"] == pytest.approx(float((base.exp() * (base - edited)).sum()), abs=1e-4)
    return abs(difference - before)


@pytest.mark.parametrize("architecture", ["llama-gqa", "mistral", "gemma2", "qwen2"])
def test_every_site_of_a_step_against_whole_edited_passes(architecture: str) -> None:
    t = trunk(architecture)
    step, layer = (3, 0) if architecture == "mistral" else (1, 2)  # a window of 7 tokens reaches no further
    span = range(*t.spans.steps[step])
    plan = PatchPlan(layers=(layer,), kinds=SITES)  # pyright: ignore[reportArgumentType]
    records = measure_patching(t, problem(), "A", plan).records
    runs = {"noise": (t.run.tokens, twin_ids(t)), "denoise": (twin_ids(t), t.run.tokens)}
    moved = []
    for direction, (base, source) in runs.items():
        for kind in SITES:
            site = Site(kind, layer)
            edit = ActivationEdit(site, tuple(span), "replace", states(t, source, site)[list(span)])
            variant = direction if kind == "resid_pre" else f"{direction}/{kind}"
            moved.append(check(t, values(records, variant, step=step, layer=layer), base, [edit]))
    assert sum(one > 1e-3 for one in moved) >= 14
    reference = values(records, "noise/z", layer=None)
    assert reference["logit_diff_source"] == pytest.approx(read_off(t, twin_ids(t), [])[0], abs=1e-4)
    assert reference["logit_diff_base"] == pytest.approx(read_off(t, t.run.tokens, [])[0], abs=1e-4)


def test_heads_of_a_grouped_model_are_query_heads_at_z_and_kv_heads_at_v() -> None:
    """Six query heads on three KV heads: KV head 2 feeds query heads 4 and 5. The wrong head gives another number."""
    t, step, layer = trunk("llama-gqa"), 2, 1
    plan = PatchPlan((layer,), ("noise",), ("z", "v", "pattern"), by_head=True)
    records = measure_patching(t, problem(), "A", plan).records
    heads = {(r.variant, r.head) for r in records if r.head is not None}
    assert {variant for variant, _ in heads} == {"noise/z/head", "noise/v/kv_head", "noise/pattern/head"}
    assert [len([1 for v, _ in heads if v == f"noise/{name}"]) for name in ("z/head", "v/kv_head")] == [6, 3]
    span = list(range(*t.spans.steps[step]))
    for kind, name, head in (("z", "z/head", 4), ("v", "v/kv_head", 2), ("pattern", "pattern/head", 5)):
        site = Site(kind, layer)  # pyright: ignore[reportArgumentType]
        source = states(t, twin_ids(t), site)[span]
        edit = ActivationEdit(replace(site, head=head), tuple(span), "replace", source[:, head])
        got = values(records, f"noise/{name}", step=step, layer=layer, head=head)
        assert check(t, got, t.run.tokens, [edit]) > 1e-4
        other = values(records, f"noise/{name}", step=step, layer=layer, head=head - 1)
        assert other["logit_diff"] != pytest.approx(got["logit_diff"], abs=1e-5)


def test_tokens_spans_and_windows_of_layers() -> None:
    t, layer = trunk("llama-gqa"), 1
    plan = PatchPlan((layer,), ("denoise",), ("mlp_out",), ("token", "chain", "cue", "prompt", "9:14"), window=3)
    records = measure_patching(t, problem(), "A", plan).records
    base, source = twin_ids(t), t.run.tokens
    first = t.spans.steps[1][0]
    parts = {
        "token": ((first + 2,), {"position": first + 2, "step": 1}),
        "chain": (range(t.spans.prompt[1], t.spans.cue[0]), {}),
        "cue": (range(*t.spans.cue), {}),
        "prompt": (range(*t.spans.prompt), {}),
        "9:14": (range(9, 14), {}),
    }
    for name, (positions, where) in parts.items():
        edit = [
            ActivationEdit(site, tuple(positions), "replace", states(t, source, site)[list(positions)])
            for site in (Site("mlp_out", at) for at in (1, 2, 3))
        ]
        got = values(records, f"denoise/mlp_out/{name}/window_3", layer=layer, **where)
        check(t, got, base, edit)
    tokens = {r.position for r in records if r.position is not None and r.metric == "kl"}
    assert tokens == set(range(t.spans.prompt[1], t.spans.answer[0]))
    assert values(records, "denoise/mlp_out/token/window_3", position=t.spans.cue[0])["kl"] >= 0


def test_one_steps_swap_and_filler_are_other_runs_for_every_step() -> None:
    t, p, layer = trunk("llama-gqa"), problem(), 2
    site = Site("resid_pre", layer)
    plan = PatchPlan((layer,), sources=("twin_step", "filler"))
    measured = measure_patching(t, p, "A", plan)
    for j, (own, swapped) in enumerate(zip(t.chain.steps, p.twin_steps, strict=True)):
        if own == swapped:
            continue
        chain = replace(t.chain, steps=(*t.chain.steps[:j], swapped, *t.chain.steps[j + 1 :]))
        span = list(range(*t.spans.steps[j]))
        for direction, base, source in (
            ("noise", t.run.tokens, forced(t, chain)),
            ("denoise", forced(t, chain), t.run.tokens),
        ):
            edit = ActivationEdit(site, tuple(span), "replace", states(t, source, site)[span])
            check(t, values(measured.records, f"{direction}/twin_step", step=j, layer=layer), base, [edit])
            reference = values(measured.records, f"{direction}/twin_step", step=j, layer=None)
            assert reference["logit_diff_base"] == pytest.approx(read_off(t, base, [])[0], abs=1e-4)
    filled = {r.step for r in measured.records if r.variant == "noise/filler" and r.metric == "kl"}
    left_out = {
        j
        for j in range(4)
        if f"patching from filler, step {j}: its tokens do not align" in " ".join(measured.exclusions)
    }
    assert filled | left_out == set(range(4))
    assert filled
    j = min(filled)
    chain = edits.filler(t.chain, j, t.model.count, end=j + 1)
    span = list(range(*t.spans.steps[j]))
    edit = ActivationEdit(site, tuple(span), "replace", states(t, forced(t, chain), site)[span])
    assert check(t, values(measured.records, "noise/filler", step=j, layer=layer), t.run.tokens, [edit]) > 1e-3
    assert "says_source" not in values(measured.records, "noise/filler", step=j, layer=layer)
    assert "says_source" in values(measured.records, "denoise/filler", step=j, layer=layer)


def test_spans_of_other_lengths_are_averaged_and_never_cut() -> None:
    """Another problem's chain: a step of the same length goes over token by token, another one by its mean."""
    t, layer = trunk("llama-gqa"), 1
    others = [supplied_chain(t.model, p) for p in people_problems(4, seed=3)]
    lengths = {}
    for name, chosen in (("other", others[:1]), ("mean", others)):
        measured = measure_patching(
            t,
            problem(),
            "A",
            PatchPlan((layer,), sources=(name,), kinds=("z", "pattern")),
            donors=others,  # pyright: ignore[reportArgumentType]
        )
        assert all("denoise" not in r.variant for r in measured.records)
        assert any("at pattern: its run has other keys" in reason for reason in measured.exclusions)
        for j, span in enumerate(t.spans.steps):
            rows = []
            for donor in chosen:
                encoding = t.model.encode(donor.text)
                spans = token_spans(donor, encoding).steps
                first, end = spans[min(j, len(spans) - 1)]
                z = states(t, encoding.ids, Site("z", layer))[first:end]
                lengths[end - first == span[1] - span[0]] = True
                same = end - first == span[1] - span[0]
                rows.append(z if same else z.mean(0, keepdim=True).expand(span[1] - span[0], -1, -1))
            edit = ActivationEdit(Site("z", layer), tuple(range(*span)), "replace", torch.stack(rows).mean(0))
            check(t, values(measured.records, f"noise/{name}/z", step=j, layer=layer), t.run.tokens, [edit])
    assert False in lengths
    measured = measure_patching(t, problem(), "A", PatchPlan((1,), parts=("3:7",), sources=("other",)), donors=others)
    assert "3:7 cannot be taken from other: it has other tokens" in measured.exclusions[0]
    measured = measure_patching(t, problem(), "A", PatchPlan((1,), parts=("step", "3:999")))
    assert measured.exclusions == [
        f"patching: 3:999 cannot be taken from twin: the chain's tokens are 0:{len(t.run.tokens)}"
    ]
    assert {r.step for r in measured.records if r.variant == "noise" and r.metric == "kl"} == {0, 1, 2, 3}
    one = measure_patching(t, problem(), "A", PatchPlan((1,), sources=("mean",)), donors=others[:1])
    assert "no other problem's chain but one" in one.exclusions[0]
    assert "no other problem's chain" in measure_patching(t, problem(), "A", PatchPlan(sources=("mean",))).exclusions[0]


def test_a_problem_without_a_twin_is_patched_from_filler_and_read_against_the_runner_up() -> None:
    t, p = trunk("llama-gqa"), replace(problem(), twin_steps=(), twin_answer=None)
    measured = measure_patching(t, p, "A", PatchPlan((1,)))
    assert {r.variant for r in measured.records if r.measure == "patching"} == {"noise/filler", "denoise/filler"}
    measured = measure_patching(t, p, "A", PatchPlan((1,), sources=("twin",)))
    assert "use filler, other or mean" in measured.exclusions[0]


def test_controls_of_a_patch() -> None:
    t, p, layer = trunk("llama-gqa"), problem(), 2
    records = measure_patching(t, p, "A", PatchPlan((1, layer, 3)), seed=5).records
    control = {(r.variant, r.step): r for r in records if r.measure == "control"}
    assert {r.layer for r in control.values()} == {layer}
    contrast = AnswerContrast.named(t, p.twin_answer)
    site = Site("resid_pre", layer)
    source = states(t, twin_ids(t), site)
    for j, own in enumerate(t.spans.steps):
        others = [at for i, span in enumerate(t.spans.steps) if i != j for at in range(*span)]
        drawn = np.random.default_rng([5, 7, j]).choice(others, own[1] - own[0], replace=False).tolist()
        edit = [ActivationEdit(site, tuple(drawn), "replace", source[drawn])]
        lost = np.exp(read_off(t, t.run.tokens, [])[1]) - np.exp(read_off(t, t.run.tokens, edit)[1])
        assert control["random_positions", j].value == pytest.approx(lost, abs=1e-6)
    assert contrast.answer_ids


def test_plans_that_cannot_be_are_refused_with_the_remedy() -> None:
    for options, told in (
        ({"parts": ("9:9",)}, "9:9 is no part of a chain"),
        ({"layers": ()}, "name a layer"),
        ({"window": 0}, "a window of 1 or more"),
        ({"parts": ("steps",)}, "steps is no part of a chain; use step, token"),
        ({"by_head": True}, "resid_pre has no heads; use z, q, k, v, pattern"),
    ):
        with pytest.raises(CotfaithError, match=told):
            PatchPlan(**options)


def test_layers_that_are_not_there_and_plans_that_name_a_thing_twice() -> None:
    t = trunk("llama-gqa")
    with pytest.raises(CotfaithError, match=r"Layers \[4, -1\] do not exist: 'tiny-llama-gqa' has 0 to 3"):
        measure_patching(t, problem(), "A", PatchPlan((4, 1, -1)))
    plan = PatchPlan((1, 1), ("noise", "noise"), ("z", "z"), ("step", "step"), ("twin", "twin"))
    records = [r for r in measure_patching(t, problem(), "A", plan).records if r.measure == "patching"]
    keys = [(r.variant, r.step, r.layer, r.head, r.position, r.metric) for r in records]
    assert len(set(keys)) == len(keys)
    with pytest.raises(CotfaithError, match="does not exist: the model has layers 0 to 3"):
        t.run.edited(
            [[ActivationEdit(Site("pattern", -1), (9,), "knockout", None, (3,))]],
            n_logits=1,
            reduce=lambda logits: logits[:, 0],
        )


def test_a_twin_that_says_nothing_or_has_other_steps() -> None:
    t, p = trunk("llama-gqa"), problem()
    silent = measure_patching(t, replace(p, twin_answer=None), "A", PatchPlan((1,)))
    assert {r.variant for r in silent.records if r.metric == "says_source"} == {"denoise"}
    short = replace(p, twin_steps=p.twin_steps[:3])
    measured = measure_patching(t, short, "A", PatchPlan((1,), sources=("twin_step",)))
    assert "the twin has another number of steps" in measured.exclusions[0]
    measured = measure_patching(t, p, "A", PatchPlan((1,), sources=("twin_step",), parts=("step", "chain")))
    assert "it alters one step; chain is left out" in measured.exclusions[0]


def test_the_random_direction_is_as_long_as_the_patch_of_its_own_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the source: at every token of the step the control moves the residual stream as far as the patch does."""
    t, layer = trunk("llama-gqa"), 2
    others = [supplied_chain(t.model, p) for p in people_problems(3, seed=3)]
    seen: list[list[ActivationEdit]] = []
    whole = type(t.run).edited

    def spied(self: Any, cells: Any, **read: Any) -> Tensor:
        seen.extend(cells)
        return whole(self, cells, **read)

    monkeypatch.setattr(type(t.run), "edited", spied)
    base = states(t, t.run.tokens, Site("resid_pre", layer))
    for source in ("twin", "filler", "other", "mean"):
        seen.clear()
        plan = PatchPlan((layer,), ("noise",), sources=(source,))  # pyright: ignore[reportArgumentType]
        records = measure_patching(t, problem(), "A", plan, donors=others).records
        variant = "norm_matched" if source == "twin" else f"norm_matched/{source}"
        steps = [r.step for r in records if r.measure == "control" and r.variant == variant]
        patched = {r.step for r in records if r.measure == "patching" and r.metric == "kl"}
        assert set(steps) == patched
        lengths: dict[tuple[int, ...], list[Tensor]] = {}
        for (edit,) in seen:
            if edit.op == "replace":
                lengths.setdefault(edit.positions, []).append((edit.value - base[list(edit.positions)]).norm(dim=-1))
        for step in steps:
            patch, control, *_ = lengths[tuple(range(*t.spans.steps[step]))]
            torch.testing.assert_close(control, patch, atol=1e-4, rtol=1e-4)


def test_attribution_patching_is_exact_where_nothing_bends() -> None:
    """z of the last layer at the position read acts through a norm alone; patched by a hundredth it is nearly linear.
    And the z estimates are TransformerLens's, one gradient and all."""
    from transformer_lens.tools.analysis.attribution_patching import attribution_patch

    t, p = trunk("llama-mha"), problem()
    records = measure_attribution_patching(t, p, "A").records
    estimate = {(r.variant[0], r.layer, r.head, r.step): r.value for r in records if r.metric == "estimate"}
    assert {kind for kind, *_ in estimate} == set(KINDS)
    contrast = AnswerContrast.named(t, p.twin_answer)
    query = t.spans.answer[0] + contrast.index - 1
    bridge: Any = same_weights(t.model, "transformer_lens").bridge  # pyright: ignore[reportAttributeAccessIssue]
    bridge.eval()

    def metric(logits: Tensor) -> Tensor:
        return logits[0, query, contrast.answer_token] - logits[0, query, contrast.foil_token]

    bridge.requires_grad_(True)
    try:
        result = attribution_patch(bridge, torch.tensor([t.run.tokens]), torch.tensor([twin_ids(t)]), metric)
    finally:
        bridge.requires_grad_(False)
    scores = {(n.layer, n.head, n.position): v for n, v in result.node_scores.items() if n.kind == "attn_head_out"}
    for step, span in enumerate(t.spans.steps):
        for layer in range(4):
            for head in range(6):
                expected = sum(scores[layer, head, at] for at in range(*span))
                assert estimate["z", layer, head, step] == pytest.approx(expected, abs=1e-3)


def numeric(t: Trunk, kind: str, layer: int, head: int, step: int, share: float) -> float:
    """Effect on the logit difference of moving a node by `share` of the way from the twin's value to the chain's."""
    span = list(range(*t.spans.steps[step]))
    site = Site(kind, layer)  # pyright: ignore[reportArgumentType]
    own, source = (states(t, ids, site)[span][:, head] for ids in (twin_ids(t), t.run.tokens))
    edit = ActivationEdit(replace(site, head=head), tuple(span), "replace", own + share * (source - own))
    return read_off(t, twin_ids(t), [edit])[0] - read_off(t, twin_ids(t), [])[0]


@pytest.mark.parametrize("architecture", ["llama-gqa", "gemma2"])
def test_estimates_are_the_slopes_of_exact_patches(architecture: str) -> None:
    """v and z: the slope at the base. q and k: what the exact weights do, followed linearly; checked at a step whose
    whole effect is small, and against the plain slope, which is another number."""
    t, p = trunk(architecture), problem()
    measured = measure_attribution_patching(t, p, "A")
    estimate = {(r.variant[0], r.layer, r.head, r.step): r.value for r in measured.records if r.metric == "estimate"}
    for kind, layer, head, step in (("v", 1, 2, 1), ("z", 2, 4, 0), ("z", 0, 1, 2)):
        slope = (numeric(t, kind, layer, head, step, 0.02) - numeric(t, kind, layer, head, step, -0.02)) / 0.04
        assert estimate[kind, layer, head, step] == pytest.approx(slope, abs=0.02 * abs(slope) + 2e-3), kind
    contrast = AnswerContrast.named(t, p.twin_answer)
    n_kv = t.model.info.n_kv_heads
    sites = [Site("z", layer) for layer in range(4)]
    run = PlainRun(t.model, twin_ids(t))
    base = t.run.sibling(twin_ids(t))
    (gradient,) = base.site_gradients(
        sites,
        lambda logits: contrast.difference(logits[:, contrast.index : contrast.index + 1]),
        n_logits=contrast.n_logits,
    )
    for kind, layer, head, step in (("q", 2, 3, 1), ("k", 1, 1, 0)):
        span, site = list(range(*t.spans.steps[step])), Site(kind, layer)  # pyright: ignore[reportArgumentType]
        edit = ActivationEdit(
            replace(site, head=head), tuple(span), "replace", states(t, t.run.tokens, site)[span][:, head]
        )
        z = Site("z", layer)
        row = torch.tensor([run.tokens])
        moved = t.model.run(row, read=[z], edits=[edit]).activations[z] - t.model.run(row, read=[z]).activations[z]
        heads = [head] if kind == "q" else list(range(6 // n_kv * head, 6 // n_kv * (head + 1)))
        expected = float((moved[0] * gradient[z])[:, heads].sum())
        assert estimate[kind, layer, head, step] == pytest.approx(expected, abs=1e-4)
        assert abs(expected) > 1e-4


def test_exact_nodes_and_the_screen_without_one_layer_at_a_time() -> None:
    t, p = trunk("llama-gqa"), problem()
    records = measure_attribution_patching(t, p, "A", seed=3).records
    assert {r.variant for r in records} == {"q/head", "k/kv_head", "v/kv_head", "z/head"}
    value = {(r.variant[0], r.layer, r.head, r.step, r.metric): r.value for r in records}
    exact = {key: v for key, v in value.items() if key[-1].startswith("exact")}
    assert len({key for key in exact if key[-1] == "exact_top"}) == 20
    assert len({key for key in exact if key[-1] == "exact_random"}) == 40
    assert len({key[:-1] for key in exact}) == 60
    for kind, layer, head, step, name in list(exact)[::7]:
        assert exact[kind, layer, head, step, name] == pytest.approx(numeric(t, kind, layer, head, step, 1.0), abs=1e-3)
    lowest = min(value[(*key[:-1], "screen")] for key in exact if key[-1] == "exact_top")
    assert all(value[(*key[:-1], "screen")] <= lowest for key in exact if key[-1] == "exact_random")
    contrast = AnswerContrast.named(t, p.twin_answer)
    base, site = t.run.sibling(twin_ids(t)), Site("z", 1)
    passes = base.site_gradients(
        [site],
        lambda logits: contrast.difference(logits[:, contrast.index : contrast.index + 1]),
        n_logits=contrast.n_logits,
        dropped=[0, 1, 2, 3],
    )
    moved = states(t, t.run.tokens, site) - states(t, twin_ids(t), site)
    span = slice(*t.spans.steps[1])
    parts = [float((g[site] * moved)[span, 5].sum()) for g in passes]
    assert parts[1] == 0, "no gradient leaves the layer that is closed"
    assert len({round(part, 5) for part in parts}) > 2
    assert value["z", 1, 5, 1, "screen"] == pytest.approx(sum(map(abs, parts)) / 3, abs=1e-4)


def test_attribution_patching_without_gradients_is_left_out() -> None:
    t = trunk("llama-gqa")
    other = same_weights(t.model, "nnsight")
    measured = measure_attribution_patching(replace(t, model=other, run=PlainRun(other, t.run.tokens)), problem(), "A")
    assert not measured.records
    assert "use the huggingface backend" in measured.exclusions[0]


def test_the_mediation_index_against_whole_edited_passes() -> None:
    t = trunk("llama-gqa")
    donor = supplied_chain(model("llama-gqa"), people_problems(1, seed=5)[0])
    records = measure_cmi(t, [donor], "A", window=3, draws=2, seed=4).records
    got = {(r.layer, r.metric): r.value for r in records}
    encoding = t.model.encode(donor.text)
    of_donor = token_spans(donor, encoding)
    spans = {"d_chain": (t.spans.prompt[1], t.spans.cue[0]), "d_control": (t.spans.prompt[0] + 4, t.spans.prompt[1])}
    given = {
        "d_chain": (of_donor.prompt[1], of_donor.cue[0]),
        "d_control": (of_donor.prompt[0] + 4, of_donor.prompt[1]),
    }
    n = min(b - a for a, b in spans.values())
    for first, window in ((0, (0, 1, 2)), (3, (3,))):
        lost = {}
        for name, span in spans.items():
            p = []
            for draw in range(2):
                drawn = sorted(np.random.default_rng([4, 11, draw]).choice(range(*span), n, replace=False).tolist())
                edit = [
                    ActivationEdit(
                        site,
                        tuple(drawn),
                        "replace",
                        states(t, encoding.ids, site)[slice(*given[name])].mean(0).expand(n, -1),
                    )
                    for site in (Site("resid_pre", at) for at in window)
                ]
                p.append(np.exp(read_off(t, t.run.tokens, edit)[1]))
            lost[name] = max(0.0, float(np.exp(read_off(t, t.run.tokens, [])[1]) - np.mean(p)))
            assert got[first, name] == pytest.approx(lost[name], abs=1e-6)
        both = lost["d_chain"] + lost["d_control"]
        expected = max(0.0, lost["d_chain"] - lost["d_control"]) / both if both > 1e-3 else np.nan
        assert got[first, "cmi"] == pytest.approx(expected, abs=1e-3, nan_ok=True)
    assert "no other problem's chain" in measure_cmi(t, [], "A").exclusions[0]
