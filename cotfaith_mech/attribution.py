"""Attention attribution: how much each head moves from each step straight into the answer's logits.

Direct logit contribution of key k through head h of layer l, read at the position that predicts the first token where
a* and the foil diverge: a[q, k] * v[k] W_O[h] . u, with u the unembedding direction of a* minus foil, every norm's
scale frozen at the run's own. Exact and linear: summed over all keys and heads, with output biases and the remainder
(embedding and MLPs), it is the logit difference before any final soft-cap; the error of that identity is recorded.
Attention weights stand beside it. Attention alone is not evidence.
"""

from __future__ import annotations

import torch
from einops import einsum, repeat
from jaxtyping import Float
from torch import Tensor

from .measured import Measured
from .patching import AnswerContrast
from .problems import Problem
from .reading import Trunk
from .sites import Site


def measure_attribution(trunk: Trunk, problem: Problem, reader: str) -> Measured:
    """Records of `attribution`: contribution and attention weight per layer, head and step, and completeness."""
    measured = Measured(trunk.chain, reader)
    if problem.twin_answer is None:
        measured.exclusions.append("attribution: the problem has no foil (twin_answer) to contrast a* with")
        return measured
    contrast = AnswerContrast.of(trunk, f" {problem.twin_answer}")
    query = trunk.spans.answer[0] + contrast.index - 1
    contribution, weight, rest = direct_contributions(trunk, contrast, query)
    logit_diff = _logit_difference(trunk, contrast)
    total = float(contribution.sum()) + rest
    for step, (start, end) in enumerate(trunk.spans.steps):
        for variant, metric, values in (
            ("direct", "contribution", contribution[..., start:end].sum(-1)),
            ("weight", "weight", weight[..., start:end].sum(-1)),
        ):
            for layer, row in enumerate(values.tolist()):
                for head, value in enumerate(row):
                    where = {"step": step, "layer": layer, "head": head}
                    measured.add("attribution", variant, {metric: value}, len(trunk.run.tokens), **where)
    steps = sum(float(contribution[..., a:b].sum()) for a, b in trunk.spans.steps)
    values = {"completeness_error": abs(total - logit_diff), "logit_diff": logit_diff, "remainder": logit_diff - steps}
    measured.add("attribution", "direct", values, len(trunk.run.tokens))
    return measured


def direct_contributions(
    trunk: Trunk, contrast: AnswerContrast, query: int
) -> tuple[Float[Tensor, "layer head key"], Float[Tensor, "layer head key"], float]:
    """Contributions and attention weights of every key at `query`, and what no head moved (biases, MLPs, embedding)."""
    info = trunk.model.info
    layers = range(info.n_layers)
    last = Site("resid_post", info.n_layers - 1)
    attention = [Site(kind, layer) for layer in layers for kind in ("pattern", "z")]
    here = trunk.run.read([last, *attention], first=query)
    values = trunk.run.read([Site("v", layer) for layer in layers])
    pattern = torch.stack([here[Site("pattern", layer)][:, 0] for layer in layers]).float()
    z = torch.stack([here[Site("z", layer)][0] for layer in layers]).float()
    v = torch.stack([values[Site("v", layer)] for layer in layers]).float()
    v = repeat(v, "layer key kv d -> layer key (kv group) d", group=info.n_heads // info.n_kv_heads)
    into_z, rest = trunk.model.direct_path(z, here[last][0].float(), contrast.answer_token, contrast.foil_token)
    moved = einsum(v, into_z, "layer key head d, layer head d -> layer head key")
    return (pattern * moved).cpu(), pattern.cpu(), rest


def _logit_difference(trunk: Trunk, contrast: AnswerContrast) -> float:
    logits = trunk.run.logits(contrast.n_logits)[contrast.index]
    return float(
        trunk.model.uncapped(logits[contrast.answer_token]) - trunk.model.uncapped(logits[contrast.foil_token])
    )
