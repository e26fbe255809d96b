"""Attribution patching (2403.00745): a gradient screen of what exact patching would show, and how far to believe it.

Nodes are q, k, v and z of each head at each step, denoised: base = the other run, source = the chain, what moves is the
logit difference. Per node
  estimate  sum over the step's tokens of dF/dx . (x_source - x_base), the gradient taken on the base run. For q and k
            with the QK correction: the weights saturate in the softmax, so they are computed anew with the source's q
            or k, and only what follows them is linear. That is dF/dz . (z' - z) with z' from the layer's own attention.
  screen    GradDrop: the mean over layers of |estimate| with no gradient through that layer, times L / (L - 1), so that
            paths that cancel are not lost. Nodes are ranked by it.
  exact     the patch itself, of the `top` nodes by screen and of as many `random` others; the agreement of the two is
            what the screen is worth on this chain (outcomes.py).
A record's `head` counts query heads at q and z, KV heads at k and v, as its variant says.

TransformerLens's `attribution_patch` (4.3) scores whole heads' outputs and MLPs by one gradient; it has no q, k and v
nodes, neither correction, and refuses edges on grouped heads. Where the two overlap (z) it is the oracle in the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from einops import einsum, reduce
from jaxtyping import Float
from torch import Tensor

from .contrast import AnswerContrast
from .errors import CotfaithError
from .measured import Measured
from .model import CachedRun
from .patching import other_run
from .problems import Problem
from .reading import Trunk
from .sites import ActivationEdit, Site, SiteKind

KINDS: tuple[SiteKind, ...] = ("q", "k", "v", "z")
TOP = 20
RANDOM = 40
"""Nodes computed exactly: the first by the screen, and so many drawn at random from the others."""

Scores = dict[SiteKind, Float[Tensor, "layer _ step"]]
Values = dict[SiteKind, Float[Tensor, "layer pos _ d_head"]]
Node = tuple[SiteKind, int, int, int]


def measure_attribution_patching(trunk: Trunk, problem: Problem, reader: str, *, seed: int = 0) -> Measured:
    """Records of `attribution_patching`: estimate and screen of every node, and the exact effects of some.

    The other run is the twin's, or that of a chain of filler; without alignment, or gradients, an exclusion.
    """
    measured = Measured(trunk.chain, reader)
    try:
        contrast = AnswerContrast.named(trunk, problem.twin_answer)
        if (base := other_run(trunk, problem)) is None:
            raise CotfaithError("the tokens of the twin, or of filler, do not align with the chain's")
        source = _read(trunk, trunk.run)
        estimate, screen = screened(trunk, contrast, base, source)
    except CotfaithError as error:
        measured.exclusions.append(f"attribution patching: {error}")
        return measured
    n_tokens = len(base.tokens)
    variant = {kind: f"{kind}/{'kv_head' if kind in ('k', 'v') else 'head'}" for kind in KINDS}
    for kind in KINDS:
        for layer, head, step in product(*map(range, estimate[kind].shape)):
            at = (layer, head, step)
            values = {"estimate": float(estimate[kind][at]), "screen": float(screen[kind][at])}
            measured.add("attribution_patching", variant[kind], values, n_tokens, layer=layer, head=head, step=step)
    chosen = _chosen(screen, seed)
    nodes = [node for group in chosen.values() for node in group]
    exact = iter(_exact(trunk, contrast, base, source, nodes))
    for name, group in chosen.items():
        for kind, layer, head, step in group:
            where = {"layer": layer, "head": head, "step": step}
            measured.add("attribution_patching", variant[kind], {f"exact_{name}": next(exact)}, n_tokens, **where)
    return measured


def _read(trunk: Trunk, run: CachedRun) -> Values:
    layers = range(trunk.model.info.n_layers)
    states = run.read([Site(kind, layer) for kind in KINDS for layer in layers])
    return {kind: torch.stack([states[Site(kind, layer)].float().cpu() for layer in layers]) for kind in KINDS}


def screened(trunk: Trunk, contrast: AnswerContrast, base: CachedRun, source: Values) -> tuple[Scores, Scores]:
    """Estimate (logits) and screen of every node when `source` values go into `base`."""
    n_layers, own = trunk.model.info.n_layers, _read(trunk, base)
    moved: dict[SiteKind, Tensor] = {kind: source[kind] - own[kind] for kind in ("v", "z")}
    within = _within_attention(trunk, base, own["z"], source)
    sites = [Site(kind, layer) for kind in ("v", "z") for layer in range(n_layers)]

    def readout(logits: Float[Tensor, "row read vocab"]) -> Float[Tensor, "row"]:
        return contrast.difference(logits[:, contrast.index : contrast.index + 1])

    dropped = [None, *range(n_layers)]
    passes = base.site_gradients(sites, readout, n_logits=contrast.n_logits, dropped=dropped)
    estimate: Scores = {}
    screen: Scores = {kind: torch.zeros(()) for kind in KINDS}
    for layer, found in zip(dropped, passes, strict=True):
        gradient: dict[SiteKind, Tensor] = {
            kind: torch.stack([found[Site(kind, at)].cpu() for at in range(n_layers)]) for kind in ("v", "z")
        }
        scores = _scores(trunk, gradient, moved, within)
        if layer is None:
            estimate = scores
        else:
            screen = {kind: screen[kind] + scores[kind].abs() / max(n_layers - 1, 1) for kind in KINDS}
    return estimate, screen


def _within_attention(
    trunk: Trunk, base: CachedRun, z: Float[Tensor, "layer pos head d_head"], source: Values
) -> dict[SiteKind, Float[Tensor, "layer step pos head d_head"]]:
    """How far z moves when q, or k, of a step is the source's in that layer alone, the softmax taken anew; a head's
    depends on its own q and k alone, so one edit serves all of them."""
    found: dict[SiteKind, Tensor] = {}
    for kind in ("q", "k"):
        moved = []
        for layer, (before, values) in enumerate(zip(z, source[kind], strict=True)):
            site = Site(kind, layer)
            cells = [
                [ActivationEdit(site, tuple(range(*span)), "replace", values[span[0] : span[1]])]
                for span in trunk.spans.steps
            ]
            moved.append(base.heads_within(layer, cells) - before)
        found[kind] = torch.stack(moved)
    return found


def _scores(trunk: Trunk, gradient: dict[SiteKind, Tensor], moved: dict[SiteKind, Tensor], within: Any) -> Scores:
    """gradient . movement of each node, in logits."""
    scores: Scores = {}
    for kind in ("v", "z"):
        each = einsum(gradient[kind], moved[kind], "layer pos head d, layer pos head d -> layer head pos")
        scores[kind] = torch.stack([each[..., a:b].sum(-1) for a, b in trunk.spans.steps], -1)
    for kind in ("q", "k"):
        scores[kind] = einsum(gradient["z"], within[kind], "layer pos head d, layer step pos head d -> layer head step")
    n_kv = trunk.model.info.n_kv_heads
    scores["k"] = reduce(scores["k"], "layer (kv group) step -> layer kv step", "sum", kv=n_kv)
    return scores


def _chosen(screen: Scores, seed: int) -> dict[str, list[Node]]:
    """The first nodes by the screen, and random ones of the rest."""
    nodes: list[Node] = [(k, a, b, c) for k in KINDS for a, b, c in product(*map(range, screen[k].shape))]
    value = np.concatenate([screen[kind].flatten().numpy() for kind in KINDS])
    order = np.argsort(-value, kind="stable")
    top, rest = order[:TOP], order[TOP:]
    drawn = np.random.default_rng(seed).choice(rest, min(RANDOM, len(rest)), replace=False)
    return {"top": [nodes[i] for i in top], "random": [nodes[i] for i in drawn]}


def _exact(
    trunk: Trunk, contrast: AnswerContrast, base: CachedRun, source: Values, nodes: Sequence[Node]
) -> list[float]:
    """The patch of each node: logit difference of the edited run minus the base run's."""
    cells = []
    for kind, layer, head, step in nodes:
        first, end = trunk.spans.steps[step]
        value = source[kind][layer, first:end, head]
        cells.append([ActivationEdit(Site(kind, layer, head), tuple(range(first, end)), "replace", value)])
    rows = base.edited(cells, n_logits=contrast.n_logits, reduce=contrast.reduce)[:, 0]
    own = contrast.reduce(base.logits(contrast.n_logits)[None])[0, 0]
    return (rows - own).tolist()
