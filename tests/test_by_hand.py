"""A model solved on paper: one layer, two query heads on one KV head, d_model 8, uniform attention, an idle MLP.

Tokens A, B and C are the unit vectors e0, e1, e2; every RMS norm of a unit vector is sqrt(8) times it. Queries and keys
are zero, so each of n keys has weight 1/n. Values: v = (x0, x1). Head 0 writes 2 * 3 / sqrt(8) * v[0] to e3, head 1 writes
3 / sqrt(8) * v[1] to e4; the unembedding reads e3 for A and e4 for B. After 'A B C', C's residual stream is
  e2 + 2 e3 + e4, square 6, so the final norm multiplies by 1 / sqrt(6 / 8) and F = logit A - logit B = sqrt(8 / 6).
"""

from __future__ import annotations

from functools import cache
from math import asinh, sqrt
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from cotfaith_mech.attribution import attribution_maps
from cotfaith_mech.backends.huggingface import HuggingFaceModel
from cotfaith_mech.backends.weights import Weights, hash_parameters
from cotfaith_mech.chains import Chain, TokenSpans
from cotfaith_mech.contrast import AnswerContrast
from cotfaith_mech.knockout import KnockoutPlan, cut_edits, measure_knockout
from cotfaith_mech.model import same_weights
from cotfaith_mech.patching import step_edits
from cotfaith_mech.reading import Trunk
from cotfaith_mech.sites import ActivationEdit, Site

from .tiny import tokenizer

A, B, C = 1, 2, 3
F = sqrt(8 / 6)


@cache
def solved() -> HuggingFaceModel:
    config = transformers.LlamaConfig(
        vocab_size=7,
        hidden_size=8,
        intermediate_size=5,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=2,
        rms_norm_eps=1e-12,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model: Any = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0 if "norm" in name else 0.0)
    layer = model.model.layers[0].self_attn
    for dim, token in enumerate((A, B, C)):
        model.model.embed_tokens.weight[token, dim] = 1
    layer.v_proj.weight[0, 0] = layer.v_proj.weight[1, 1] = 1
    layer.o_proj.weight[3, 0] = 2 * 3 / sqrt(8)
    layer.o_proj.weight[4, 3] = 3 / sqrt(8)
    model.lm_head.weight[A, 3] = model.lm_head.weight[B, 4] = 1
    return HuggingFaceModel(Weights("solved", model, tokenizer(), hash_parameters(model)))


def trunk(*tokens: int) -> Trunk:
    """Steps 'A' and 'B', cue 'C', answer 'A'."""
    spans = TokenSpans((0, 0), ((0, 1), (1, 2)), (2, 3), (3, 4))
    chain = Chain("p", "hand", "", ("A", "B"), "C", "A")
    return Trunk(solved(), chain, "text", (), spans, solved().cached_run((*tokens, A)))


CONTRAST = AnswerContrast((A,), 0, A, B)


def edited(cell: list[ActivationEdit], *tokens: int) -> float:
    return float(trunk(*tokens).run.edited([cell], n_logits=2, reduce=CONTRAST.reduce)[0, 0])


def test_the_model_does_what_was_worked_out() -> None:
    logits = trunk(A, B, C).run.logits(2)[0]
    assert logits[A].item() == pytest.approx(2 * F, abs=1e-6)
    assert logits[B].item() == pytest.approx(F, abs=1e-6)


def test_attribution_on_paper() -> None:
    """Head 0 carries A by 2 F, head 1 carries B by -F, nothing else anything; a norm of 2 and of 1 is written by a
    third of the attention. Gradients see the final norm turn."""
    maps = attribution_maps(trunk(A, B, C), CONTRAST, gradients=True)
    assert maps.logit_diff == pytest.approx(F, abs=1e-6)
    expected = {
        "weight": [[1 / 3, 1 / 3, 1 / 3], [1 / 3, 1 / 3, 1 / 3]],
        "value_norm": [[2, 0, 0], [0, 1, 0]],
        "direct": [[2 * F, 0, 0], [0, -F, 0]],
        # F = (r3 - r4) sqrt(8) / |r|: dF/dr3 = F (1 - 2/6) = 2/3 F, dF/dr4 = F (-1 - 1/6) = -7/6 F
        "gradient": [[2 * 2 / 3 * F, 0, 0], [0, -7 / 6 * F, 0]],
    }
    for kind, values in expected.items():
        torch.testing.assert_close(maps.kinds[kind][0], torch.tensor(values, dtype=torch.float32), atol=1e-5, rtol=0)
    # scaled by s the stream is e2 + 2 s e3 + s e4: F(s) = s sqrt(8) / sqrt(1 + 5 s^2), from 0 to F, and
    # dF/dr3 = sqrt(8) (1 + 3 s^2) / (1 + 5 s^2)^1.5, whose integral from 0 to 1 is as follows
    integral = sqrt(8) * (1 / sqrt(6) + 3 * (asinh(sqrt(5)) / 5**1.5 - 1 / (5 * sqrt(6))))
    assert float(maps.kinds["integrated"][0, 0, 0]) == pytest.approx(2 * integral, abs=1e-4)
    assert float(maps.kinds["integrated"].sum()) == pytest.approx(F, abs=1e-3)
    assert maps.direct_error < 1e-5


def test_knockout_on_paper() -> None:
    """Zeroed: head 0 loses A, the stream is e2 + e4, F = -1 / sqrt(2 / 8) = -2. Masked: B and C share the attention, the
    stream is e2 + 1.5 e4, F = -1.5 / sqrt(3.25 / 8)."""
    for kind, value in (("zeroed", -2.0), ("masked", -1.5 / sqrt(3.25 / 8))):
        cell = cut_edits((0,), (2,), (0,), kind)  # pyright: ignore[reportArgumentType]
        assert edited(cell, A, B, C) == pytest.approx(value, abs=1e-5)
        plan = KnockoutPlan(("step",), (kind,))  # pyright: ignore[reportArgumentType]
        records = measure_knockout(trunk(A, B, C), "A", plan, contrast=CONTRAST).records
        lost = {r.step: r.value for r in records if r.metric == "delta_logit_diff"}
        assert lost[0] == pytest.approx(F - value, abs=1e-5)
    # head 1 cannot see B: e2 + 2 e3, F = 2 / sqrt(5 / 8)
    assert edited(cut_edits((0,), (2,), (1,), "zeroed", 1), A, B, C) == pytest.approx(2 / sqrt(5 / 8), abs=1e-5)
    assert edited(cut_edits((0,), (2,), (1,), "zeroed", 0), A, B, C) == pytest.approx(F, abs=1e-5)


def test_patching_on_paper() -> None:
    """Step 0 from 'B B C': head 1 then carries two B, e2 + 2 e4, F = -2 / sqrt(5 / 8). One head's z at C: head 0 gives
    nothing, e2 + e4, F = -2. All attention on A: e2 + 6 e3, F = 6 / sqrt(37 / 8)."""
    source = solved().cached_run((B, B, C, A))
    site = Site("resid_pre", 0)
    assert edited(step_edits(0, (0, 1), source.read([site])[site]), A, B, C) == pytest.approx(
        -2 / sqrt(5 / 8), abs=1e-5
    )
    z = source.read([Site("z", 0)])[Site("z", 0)]
    torch.testing.assert_close(z[2, 1], torch.tensor([0.0, 2 * sqrt(8) / 3]))
    one = [ActivationEdit(Site("z", 0, 0), (2,), "replace", z[2:3, 0])]
    assert edited(one, A, B, C) == pytest.approx(-2.0, abs=1e-5)
    on_a = torch.zeros(1, 2, 3)
    on_a[..., 0] = 1
    cell = [ActivationEdit(Site("pattern", 0), (2,), "replace", on_a)]
    assert edited(cell, A, B, C) == pytest.approx(6 / sqrt(37 / 8), abs=1e-5)
    values: Tensor = source.read([Site("v", 0)])[Site("v", 0)]
    one = [ActivationEdit(Site("v", 0, 0), (0,), "replace", values[0:1, 0])]
    assert edited(one, A, B, C) == pytest.approx(-2 / sqrt(5 / 8), abs=1e-5)


def test_transformer_lens_reads_the_same_numbers_off_it() -> None:
    run = same_weights(solved(), "transformer_lens").run(torch.tensor([[A, B, C]]), read=[Site("resid_post", 0)])
    expected = torch.tensor([0.0, 0, 1, 2, 1, 0, 0, 0])
    torch.testing.assert_close(run.activations[Site("resid_post", 0)][0, 2], expected, atol=1e-5, rtol=0)
