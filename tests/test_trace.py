"""The logit lens against plain forwards: the last layer's lens is the model's own reading, an earlier one is worked out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cotfaith_mech.arithmetic import people_problems
from cotfaith_mech.backends.huggingface import HuggingFaceModel
from cotfaith_mech.reading import Trunk
from cotfaith_mech.sampling import supplied_chain
from cotfaith_mech.sites import Site
from cotfaith_mech.trace import measure_trace

from .tiny import tiny


@pytest.fixture(params=["llama-gqa", "gemma2"])
def trunk(request: pytest.FixtureRequest) -> Trunk:
    weights = tiny(request.param)
    weights.model.config.max_position_embeddings = 512
    model, problem = HuggingFaceModel(weights), people_problems(2, seed=11)[1]
    return Trunk.of(model, supplied_chain(model, problem).with_answer(f" {problem.gold}"), problem.kind)


def test_lens_of_the_last_layer_is_the_reading_itself(trunk: Trunk) -> None:
    """Read where the first visible token of a* is predicted: behind the blank where that is a token of its own."""
    measured = measure_trace(trunk, "A")
    value = {(r.step, r.layer, r.metric): r.value for r in measured.records}
    n = len(trunk.chain.steps)
    assert {step for step, *_ in value} == set(range(n + 1))
    for keep in (0, 2, n):
        chain = replace(trunk.chain, steps=trunk.chain.steps[:keep])
        ids = trunk.model.encode(chain.text).ids
        start = len(trunk.model.encode(chain.with_answer("").text).ids)
        visible = next(i for i in range(start, len(ids)) if trunk.model.decode([ids[i]]).strip())
        p = trunk.model.run(torch.tensor([ids[:visible]])).logits[0, -1].float().softmax(-1)
        assert value[keep, 3, "p_answer"] == pytest.approx(float(p[ids[visible]]), rel=1e-4)
        assert value[keep, 3, "is_top"] == float(p.argmax() == ids[visible])


def test_lens_of_an_earlier_layer_by_hand(trunk: Trunk) -> None:
    run = trunk.model.run(torch.tensor([trunk.run.tokens]), read=[Site("resid_post", 1)])
    x = run.activations[Site("resid_post", 1)][0, -1].float()
    model = trunk.model.weights.model.model
    weight = model.norm.weight + (1 if "Gemma" in type(model).__name__ else 0)
    normed = (
        x
        / (
            x.square().mean() + model.norm.eps
            if hasattr(model.norm, "eps")
            else x.square().mean() + model.norm.variance_epsilon
        ).sqrt()
    )
    logits = trunk.model.weights.model.lm_head.weight @ (normed * weight)
    if "Gemma" in type(model).__name__:
        logits = 9.0 * torch.tanh(logits / 9.0)
    torch.testing.assert_close(trunk.model.lens(x), logits, atol=1e-4, rtol=1e-4)
