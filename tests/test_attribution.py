"""Attribution of heads and steps: each kind against an oracle of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cotfaith_mech.attribution import attribution_maps, measure_attribution
from cotfaith_mech.contrast import AnswerContrast
from cotfaith_mech.errors import CotfaithError
from cotfaith_mech.model import DirectPath, PlainRun, same_weights
from cotfaith_mech.reading import Trunk
from cotfaith_mech.sites import ActivationEdit, Site

from .test_mechanism import problem, trunk
from .tiny import ARCHITECTURES


def contrast_and_query(t: Trunk) -> tuple[AnswerContrast, int]:
    contrast = AnswerContrast.of(t, f" {problem().twin_answer}")
    return contrast, t.spans.answer[0] + contrast.index - 1


def bridge_gradients(
    t: Trunk, contrast: AnswerContrast, query: int, layer: int, scale: float
) -> tuple[Tensor, Tensor, float]:
    """By TransformerLens's autograd: weights and their gradients `[head, key]` at `query`, and the logit difference, the
    weights of all heads there scaled in `layer`."""
    bridge: Any = same_weights(t.model, "transformer_lens").bridge  # pyright: ignore[reportAttributeAccessIssue]
    seen: dict[str, Tensor] = {}

    def scaled(pattern: Tensor, hook: Any) -> Tensor:
        own = pattern.detach()[0, :, query].clone()
        seen["own"], seen["leaf"] = own, (own * scale).requires_grad_()
        pattern = pattern.detach().clone()
        pattern[0, :, query] = seen["leaf"]
        return pattern

    with torch.enable_grad():
        logits = bridge.run_with_hooks(
            torch.tensor([t.run.tokens]), fwd_hooks=[(f"blocks.{layer}.attn.hook_pattern", scaled)], prepend_bos=False
        )[0, query]
        difference = logits[contrast.answer_token] - logits[contrast.foil_token]
        (gradient,) = torch.autograd.grad(difference, seen["leaf"])
    n = query + 1
    return seen["own"][:, :n], gradient[:, :n], float(difference.detach())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_kinds_agree_with_transformer_lens(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    t = trunk(architecture)
    contrast, query = contrast_and_query(t)
    kinds = attribution_maps(t, contrast, gradients=True).kinds
    for layer in (0, 2, 3):
        own, gradient, _ = bridge_gradients(t, contrast, query, layer, 1.0)
        torch.testing.assert_close(kinds["gradient"][layer], own * gradient, atol=1e-4, rtol=1e-3)
        assert (own * gradient).abs().max() > 1e-2
    monkeypatch.setattr("cotfaith_mech.attribution.FEWEST_POINTS", 6)
    monkeypatch.setattr("cotfaith_mech.attribution.MOST_POINTS", 6)
    points, weights = np.polynomial.legendre.leggauss(6)
    parts = [
        w / 2 * bridge_gradients(t, contrast, query, 3, (x + 1) / 2)[1] for x, w in zip(points, weights, strict=True)
    ]
    mean = torch.stack(parts).sum(0)
    kinds = attribution_maps(t, contrast, gradients=True).kinds
    own, _, _ = bridge_gradients(t, contrast, query, 3, 1.0)
    if not kinds["integrated"][3].isnan().any():
        torch.testing.assert_close(kinds["integrated"][3], own * mean, atol=1e-4, rtol=1e-3)
    assert (kinds["integrated"] - kinds["gradient"]).nan_to_num(1).abs().max() > 1e-3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_integrated_gradients_sum_to_what_zeroed_weights_take(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Completeness against the engine's own edit: all of a layer's weights at the query replaced by zeros. A layer whose
    sum misses gets more points; with points enough every sum is right, with too few such a layer is NaN."""
    t = trunk(architecture)
    contrast, query = contrast_and_query(t)
    zeros = torch.zeros(1, t.model.info.n_heads, query + 1)
    cells = [[ActivationEdit(Site("pattern", layer), (query,), "replace", zeros)] for layer in range(4)]
    cells.append([ActivationEdit(Site("resid_pre", 0), (query,), "add", torch.zeros(1, 48))])
    *zeroed, whole = t.run.edited(cells, n_logits=contrast.n_logits, reduce=contrast.reduce)[:, 0].tolist()
    lost = torch.tensor([whole - value for value in zeroed])
    assert lost.abs().min() > 5e-3
    allowed = 1e-2 + 1e-2 * lost.abs() + 1e-4
    few = attribution_maps(t, contrast, gradients=True)
    monkeypatch.setattr("cotfaith_mech.attribution.MOST_POINTS", 512)
    many = attribution_maps(t, contrast, gradients=True)
    for maps in (few, many):
        sums = maps.kinds["integrated"].sum((1, 2))
        known = ~sums.isnan()
        assert ((sums - lost).abs() <= allowed)[known].all()
        assert torch.equal(torch.tensor(maps.integrated_errors) > allowed, ~known)
    assert not many.kinds["integrated"].isnan().any()


def test_a_layer_that_too_few_points_miss_is_nan_and_says_how_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cotfaith_mech.attribution.MOST_POINTS", 8)
    t = trunk("mistral")
    contrast, _ = contrast_and_query(t)
    maps = attribution_maps(t, contrast, gradients=True)
    assert maps.kinds["integrated"][0].isnan().all()
    assert maps.integrated_errors[0] > 1
    assert not maps.kinds["gradient"].isnan().any()


def test_records_of_every_kind_add_up_to_the_steps_and_say_their_errors() -> None:
    t, p = trunk(), problem()
    records = measure_attribution(t, p, "A", full=True).records
    kinds = attribution_maps(t, AnswerContrast.of(t, f" {p.twin_answer}"), gradients=True).kinds
    value = {(r.variant, r.step, r.layer, r.head): r.value for r in records if r.layer is not None}
    assert (
        {variant for variant, *_ in value} == set(kinds) == {"weight", "value_norm", "direct", "gradient", "integrated"}
    )
    start, end = t.spans.steps[2]
    for kind, values in kinds.items():
        assert value[kind, 2, 3, 5] == pytest.approx(float(values[3, 5, start:end].sum()), abs=1e-6)
    whole = {(r.variant, r.metric): r.value for r in records if r.layer is None and r.step is None}
    steps = sum(v for (kind, *_), v in value.items() if kind == "direct")
    assert whole["direct", "remainder"] == pytest.approx(whole["direct", "logit_diff"] - steps, abs=1e-3)
    errors = {r.layer for r in records if (r.variant, r.metric) == ("integrated", "completeness_error")}
    assert errors == set(range(4))


def test_without_a_twin_the_foil_is_the_runner_up() -> None:
    t, p = trunk(), replace(problem(), twin_answer=None)
    contrast = AnswerContrast.named(t, None)
    own = t.model.encode(t.chain.text).ids[t.spans.answer[0] :]
    assert contrast.answer_token == own[contrast.index]
    assert t.model.decode([contrast.answer_token]).strip()
    logits = t.model.run(torch.tensor([t.run.tokens]), n_logits=len(own) + 1).logits[0, contrast.index]
    others = [token for token in logits.argsort(descending=True).tolist() if token != contrast.answer_token]
    assert contrast.foil_token == others[0]
    records = measure_attribution(t, p, "A").records
    difference = next(r.value for r in records if r.metric == "logit_diff")
    assert difference == pytest.approx(float(logits[contrast.answer_token] - logits[others[0]]), abs=1e-4)


def test_gradients_leave_the_model_as_it_was_and_other_backends_refuse_them() -> None:
    t = trunk()
    contrast, query = contrast_and_query(t)
    layers = list(t.model.layout.layers)  # pyright: ignore[reportAttributeAccessIssue]
    attribution_maps(t, contrast, gradients=True)
    with pytest.raises(RuntimeError, match="in the middle"):
        t.run.head_gradients(query, [0, 1], [1.0], failing)
    assert all(not m.layer._forward_pre_hooks and not m.attention.o_proj._forward_pre_hooks for m in layers)
    assert not any(parameter.requires_grad for parameter in t.model.weights.model.parameters())
    assert not t.run.logits(1).requires_grad
    with pytest.raises(CotfaithError, match="use the huggingface backend"):
        PlainRun(same_weights(t.model, "nnsight"), t.run.tokens).head_gradients(query, [0], [1.0], contrast.difference)


def failing(logits: Tensor) -> Tensor:
    raise RuntimeError("in the middle")


@pytest.mark.parametrize("architecture", ["llama-mha", "llama-gqa", "llama-mqa", "qwen2", "mistral", "gemma2"])
def test_direct_contributions_sum_to_the_logit_difference(architecture: str) -> None:
    records = measure_attribution(trunk(architecture), problem(), "A").records
    values = {r.metric: r.value for r in records if r.layer is None and r.variant == "direct"}
    assert values["completeness_error"] < 1e-3
    assert abs(values["logit_diff"]) > 1e-3


@pytest.mark.parametrize("architecture", ["llama-mha", "gemma2"])
@pytest.mark.parametrize("wrong", ["into_z", "bias"])
def test_a_wrong_direct_path_breaks_the_sums(architecture: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pieces are read apart: no remainder swallows what a wrong map leaves out."""
    t = trunk(architecture)
    whole = t.model.direct_path
    if wrong == "bias" and t.model.layout.layers[0].attention.o_proj.bias is None:
        return

    def damaged(*args: Any) -> DirectPath:
        path = whole(*args)
        return replace(path, **{wrong: 0.9 * getattr(path, wrong)})

    monkeypatch.setattr(t.model, "direct_path", damaged)
    records = measure_attribution(t, problem(), "A").records
    assert next(r.value for r in records if r.metric == "completeness_error") > 1e-2


def test_one_direct_contribution_by_hand() -> None:
    """a v W_O . u written out for one head of a GQA model; the neighbouring KV head gives another number."""
    t, p = trunk("llama-gqa"), problem()
    contrast = AnswerContrast.of(t, f" {p.twin_answer}")
    query = t.spans.answer[0] + contrast.index - 1
    kinds = attribution_maps(t, contrast).kinds
    contribution, weight = kinds["direct"], kinds["weight"]
    layer, head, key = 2, 3, t.spans.steps[1][0] + 2
    m = t.model
    states = m.run(
        torch.tensor([t.run.tokens]), read=[Site("v", layer), Site("pattern", layer), Site("resid_post", 3)]
    ).activations
    final = states[Site("resid_post", 3)][0, query]
    norm = m.layout.norm
    scale = norm.weight / (final.square().mean() + norm.variance_epsilon).sqrt()
    u = (m.layout.unembed.weight[contrast.answer_token] - m.layout.unembed.weight[contrast.foil_token]) * scale
    w_o = m.layout.layers[layer].attention.o_proj.weight[:, head * 8 : head * 8 + 8]
    a = states[Site("pattern", layer)][0, head, query, key]

    def moved(kv_head: int) -> float:
        return float(a * (w_o @ states[Site("v", layer)][0, key, kv_head]) @ u)

    assert float(contribution[layer, head, key]) == pytest.approx(moved(head // 2), abs=1e-6)
    assert moved(head // 2) != pytest.approx(moved(head // 2 - 1), abs=1e-4)
    norm = float(a * (w_o @ states[Site("v", layer)][0, key, head // 2]).norm())
    assert float(kinds["value_norm"][layer, head, key]) == pytest.approx(norm, abs=1e-5)
    assert float(weight[layer, head, key]) == pytest.approx(float(a), abs=1e-6)
    assert weight.sum(-1).allclose(torch.ones(4, 6), atol=1e-5)
