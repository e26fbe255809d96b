"""Attention attribution: what each head moves from each step to the answer's logits, by five kinds side by side.

Everything is read at one query, the position that predicts the first token where a* and the foil diverge. With a the
attention weight of a key, v its value, F the logit difference a* minus foil:
  weight      a. Alone it is no evidence.
  value_norm  |a v W_O|, before any norm after attention (Kobayashi et al. 2004.10102).
  direct      a v W_O . u, u the unembedding direction of a* minus foil with every norm's scale frozen at the run's own.
              Exact and linear: summed over all keys and heads, with output biases, embedding and MLPs, it is F before
              any final soft-cap, and in each layer heads and bias sum to what attention wrote. Refuses norms that are
              not root-mean-square.
  gradient    a dF/da, through all that follows the head at the query, a final soft-cap too.
  integrated  a times the mean of dF/da over the layer's weights at this query scaled from 0 to 1 (integrated gradients,
              1703.01365, as in Hao et al. 2004.11207). Summed over heads and keys it is what F loses when the layer's
              weights at the query are zero. F bends sharply near 0 where a layer writes more than it was given (the
              first one): such layers get more points, and are NaN where the sum still misses by more than 1 %.
dF/da of a key is v . dF/dz: the gradient into z is all that is needed, and the key's whole path to the query counts.
The errors of these sums are recorded. Validated by zeroed knockout of the same head and step (outcomes.py).

TransformerLens's own tools (4.3) do not do this job: its direct logit attribution stops at whole heads, without keys or
steps; `attribution_patch` scores nodes by differences of two runs, refuses edges on grouped heads, and leaves
integrated gradients unimplemented. They serve as oracles in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import einsum, repeat
from jaxtyping import Float
from torch import Tensor

from .contrast import AnswerContrast
from .errors import CotfaithError
from .measured import Measured
from .metrics import ATTRIBUTION_KINDS
from .problems import Problem
from .reading import Trunk
from .sites import Site, SiteKind

FEWEST_POINTS, MOST_POINTS = 8, 128
"""Points of integrated gradients, by the Gauss-Legendre rule: as few as a layer's sum allows."""
Kinds = dict[str, Float[Tensor, "layer head key"]]


@dataclass(frozen=True)
class AttributionMaps:
    """Each kind's value for every key up to the query; the logit difference F; the larger error of the two sums of
    `direct`; and the error of each layer's sum of `integrated`, where asked for (logits)."""

    kinds: Kinds
    logit_diff: float
    direct_error: float
    integrated_errors: tuple[float, ...] = ()


def measure_attribution(trunk: Trunk, problem: Problem, reader: str, *, full: bool = False) -> Measured:
    """Records of `attribution`, per layer, head and step: weight (probability), norm (residual norm) and direct
    contribution (logits), with `full` those by gradients too (logits); and the errors of the sums (logits).

    The foil is the twin's answer, else the token the reader finds most likely beside a*'s (AnswerContrast.named). Norms
    that are not root-mean-square are an exclusion. Sources of the kinds: the head of attribution.py.
    """
    measured, n_tokens = Measured(trunk.chain, reader), len(trunk.run.tokens)
    try:
        maps = attribution_maps(trunk, AnswerContrast.named(trunk, problem.twin_answer), gradients=full)
    except CotfaithError as error:
        measured.exclusions.append(f"attribution: {error}")
        return measured
    for variant, values in maps.kinds.items():
        for step, (start, end) in enumerate(trunk.spans.steps):
            for layer, row in enumerate(values[..., start:end].sum(-1).tolist()):
                for head, value in enumerate(row):
                    where = {"step": step, "layer": layer, "head": head}
                    measured.add("attribution", variant, {ATTRIBUTION_KINDS[variant]: value}, n_tokens, **where)
    for layer, error in enumerate(maps.integrated_errors):
        measured.add("attribution", "integrated", {"completeness_error": error}, n_tokens, layer=layer)
    steps = sum(float(maps.kinds["direct"][..., a:b].sum()) for a, b in trunk.spans.steps)
    totals = {
        "completeness_error": maps.direct_error,
        "logit_diff": maps.logit_diff,
        "remainder": maps.logit_diff - steps,
    }
    measured.add("attribution", "direct", totals, n_tokens)
    return measured


def attribution_maps(trunk: Trunk, contrast: AnswerContrast, *, gradients: bool = False) -> AttributionMaps:
    """Every kind of attribution of every key, and the errors of their sums.

    Raises CotfaithError where the model's norms are no root-mean-square norms, or its backend gives no gradients.
    """
    heads = _Heads.read(trunk, trunk.spans.answer[0] + contrast.index - 1)
    maps = _direct_kinds(trunk, contrast, heads)
    return _with_gradients(maps, trunk, contrast, heads) if gradients else maps


@dataclass(frozen=True)
class _Heads:
    """What every layer's attention read and wrote at one query, in float32."""

    query: int
    pattern: Float[Tensor, "layer head key"]
    values: Float[Tensor, "layer key head d_head"]
    z: Float[Tensor, "layer head d_head"]
    attn_out: Float[Tensor, "layer d_model"]
    mlp_out: Float[Tensor, "layer d_model"]
    first: Float[Tensor, "d_model"]
    final: Float[Tensor, "d_model"]

    @classmethod
    def read(cls, trunk: Trunk, query: int) -> _Heads:
        info = trunk.model.info
        layers = range(info.n_layers)
        first, last = Site("resid_pre", 0), Site("resid_post", info.n_layers - 1)
        kinds: tuple[SiteKind, ...] = ("pattern", "z", "attn_out", "mlp_out")
        here = trunk.run.read([first, last, *(Site(kind, layer) for layer in layers for kind in kinds)], first=query)
        values = trunk.run.read([Site("v", layer) for layer in layers])
        pattern = torch.stack([here[Site("pattern", layer)][:, 0, : query + 1] for layer in layers]).float()
        z, attn_out, mlp_out = (
            torch.stack([here[Site(kind, layer)][0] for layer in layers]).float() for kind in kinds[1:]
        )
        v = torch.stack([values[Site("v", layer)][: query + 1].to(z) for layer in layers])
        v = repeat(v, "layer key kv d -> layer key (kv group) d", group=info.n_heads // info.n_kv_heads)
        return cls(query, pattern, v, z, attn_out, mlp_out, here[first][0].to(z), here[last][0].to(z))


def _direct_kinds(trunk: Trunk, contrast: AnswerContrast, heads: _Heads) -> AttributionMaps:
    """Weight, norm and direct contribution of every key."""
    model = trunk.model
    path = model.direct_path(heads.z, heads.final, contrast.answer_token, contrast.foil_token)
    direct = heads.pattern * einsum(heads.values, path.into_z, "layer key head d, layer head d -> layer head key")
    norms = torch.stack([model.written_norm(layer, v).T for layer, v in enumerate(heads.values)])
    by_layer = direct.sum((1, 2)) + path.bias
    logits = trunk.run.logits(contrast.n_logits)[contrast.index]
    logit_diff = float(model.uncapped(logits[contrast.answer_token]) - model.uncapped(logits[contrast.foil_token]))
    total = by_layer.sum() + heads.mlp_out.sum(0) @ path.direction + heads.first @ path.direction
    errors = [*(by_layer - heads.attn_out @ path.direction).abs().tolist(), abs(float(total) - logit_diff)]
    kinds = {"weight": heads.pattern, "value_norm": heads.pattern * norms, "direct": direct}
    return AttributionMaps({kind: values.cpu() for kind, values in kinds.items()}, logit_diff, float(np.max(errors)))


def _with_gradients(maps: AttributionMaps, trunk: Trunk, contrast: AnswerContrast, heads: _Heads) -> AttributionMaps:
    """`maps` with gradient x attention and integrated gradients of every key.

    A layer whose sum misses what it should be has its points multiplied by four, up to MOST_POINTS; where it still
    misses it is NaN.
    """
    layers = list(range(len(heads.pattern)))
    into_z, ends = trunk.run.head_gradients(heads.query, layers, [0.0, 1.0], contrast.difference)
    pattern, values, lost = heads.pattern.cpu(), heads.values.cpu(), ends[:, 1] - ends[:, 0]

    def of_keys(gradient: Tensor, chosen: list[int]) -> Tensor:
        moved = einsum(values[chosen], gradient, "layer key head d, layer head d -> layer head key")
        return pattern[chosen] * moved

    kinds = {"gradient": of_keys(into_z[:, 1], layers), "integrated": torch.empty_like(pattern)}
    errors, n, missed = torch.zeros(len(layers)), FEWEST_POINTS, layers
    allowed = 1e-2 + 1e-2 * lost.abs()
    while missed and n <= MOST_POINTS:
        points, weights = (torch.from_numpy(a).float() for a in np.polynomial.legendre.leggauss(n))
        scales = ((points + 1) / 2).tolist()
        found, _ = trunk.run.head_gradients(heads.query, missed, scales, contrast.difference)
        mean = einsum(weights / 2, found, "point, layer point head d -> layer head d")
        kinds["integrated"][missed] = of_keys(mean, missed)
        errors = (kinds["integrated"].sum((1, 2)) - lost).abs()
        missed = [layer for layer in missed if not errors[layer] <= allowed[layer]]
        n *= 4
    kinds["integrated"][missed] = torch.nan
    return replace(maps, kinds=maps.kinds | kinds, integrated_errors=tuple(errors.tolist()))
