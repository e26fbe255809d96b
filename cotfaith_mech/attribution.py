"""Attention attribution: how much each head moves from each step straight into the answer's logits.

Direct logit contribution of key k through head h of layer l, read at the position that predicts the first token where
a* and the foil diverge: a[q, k] * v[k] W_O[h] . u, with u the unembedding direction of a* minus foil, every norm's
scale frozen at the run's own. Exact and linear: summed over all keys and heads, with output biases, embedding and MLPs,
it is the logit difference before any final soft-cap, and in each layer the heads and the bias sum to what attention
wrote; the larger error of these identities is recorded.
Attention weights stand beside it. Attention alone is not evidence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from einops import einsum, repeat
from jaxtyping import Float
from torch import Tensor

from .contrast import AnswerContrast
from .errors import CotfaithError
from .measured import Measured
from .problems import Problem
from .reading import Trunk
from .sites import Site, SiteKind


def measure_attribution(trunk: Trunk, problem: Problem, reader: str) -> Measured:
    """Records of `attribution`: contribution and attention weight per layer, head and step, and completeness."""
    measured = Measured(trunk.chain, reader)
    if problem.twin_answer is None:
        measured.exclusions.append("attribution: the problem has no foil (twin_answer) to contrast a* with")
        return measured
    try:
        contrast = AnswerContrast.of(trunk, f" {problem.twin_answer}")
    except CotfaithError as error:
        measured.exclusions.append(f"attribution: {error}")
        return measured
    direct = direct_contributions(trunk, contrast, trunk.spans.answer[0] + contrast.index - 1)
    for step, (start, end) in enumerate(trunk.spans.steps):
        for variant, metric, values in (
            ("direct", "contribution", direct.contribution[..., start:end].sum(-1)),
            ("weight", "weight", direct.weight[..., start:end].sum(-1)),
        ):
            for layer, row in enumerate(values.tolist()):
                for head, value in enumerate(row):
                    where = {"step": step, "layer": layer, "head": head}
                    measured.add("attribution", variant, {metric: value}, len(trunk.run.tokens), **where)
    steps = sum(float(direct.contribution[..., a:b].sum()) for a, b in trunk.spans.steps)
    values = {
        "completeness_error": direct.error,
        "logit_diff": direct.logit_diff,
        "remainder": direct.logit_diff - steps,
    }
    measured.add("attribution", "direct", values, len(trunk.run.tokens))
    return measured


@dataclass(frozen=True)
class DirectContributions:
    """Contribution of every key to the logit difference at one query, its attention weight, that difference, and the
    error of the sums: in each layer, heads and bias against what attention wrote; over all, with embedding and MLPs,
    against the logit difference itself. The larger one; the pieces are read apart, so a wrong one shows."""

    contribution: Float[Tensor, "layer head key"]
    weight: Float[Tensor, "layer head key"]
    logit_diff: float
    error: float


def direct_contributions(trunk: Trunk, contrast: AnswerContrast, query: int) -> DirectContributions:
    """Contributions and attention weights of every key at position `query`."""
    info = trunk.model.info
    layers = range(info.n_layers)
    first, last = Site("resid_pre", 0), Site("resid_post", info.n_layers - 1)
    kinds: tuple[SiteKind, ...] = ("pattern", "z", "attn_out", "mlp_out")
    here = trunk.run.read([first, last, *(Site(kind, layer) for layer in layers for kind in kinds)], first=query)
    values = trunk.run.read([Site("v", layer) for layer in layers])
    pattern = torch.stack([here[Site("pattern", layer)][:, 0] for layer in layers]).float()
    z, attn_out, mlp_out = (torch.stack([here[Site(kind, layer)][0] for layer in layers]).float() for kind in kinds[1:])
    v = torch.stack([values[Site("v", layer)].to(z) for layer in layers])
    v = repeat(v, "layer key kv d -> layer key (kv group) d", group=info.n_heads // info.n_kv_heads)
    path = trunk.model.direct_path(z, here[last][0].to(z), contrast.answer_token, contrast.foil_token)
    contribution = pattern * einsum(v, path.into_z, "layer key head d, layer head d -> layer head key")
    by_layer = contribution.sum((1, 2)) + path.bias
    logits = trunk.run.logits(contrast.n_logits)[contrast.index]
    logit_diff = float(
        trunk.model.uncapped(logits[contrast.answer_token]) - trunk.model.uncapped(logits[contrast.foil_token])
    )
    total = by_layer.sum() + mlp_out.sum(0) @ path.direction + here[first][0].to(z) @ path.direction
    errors = [*(by_layer - attn_out @ path.direction).abs().tolist(), abs(float(total) - logit_diff)]
    return DirectContributions(contribution.cpu(), pattern.cpu(), logit_diff, float(np.max(errors)))
