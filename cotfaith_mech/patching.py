"""Activation patching at step granularity, on one reader and one chain.

Patching (how to: 2404.15255, 2309.16042): the residual stream before layer l at all tokens of step j is replaced by
a source run's. The source is the aligned value swap: same question, same sentences, other numbers, same tokens.
  noise:   base = the chain, source = its twin;     denoise: base = the twin, source = the chain.
Both runs have a* forced after the cue. The logit difference is read at the first token where a* and the foil (the
twin's answer) diverge, their shared prefix teacher-forced.
Controls: self-patch (exactly 0), a random direction of the patch's norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .chains import token_spans
from .contrast import AnswerContrast
from .errors import CotfaithError
from .measured import Measured
from .model import CachedRun
from .problems import Problem
from .reading import Trunk
from .sites import ActivationEdit, Site

Direction = Literal["noise", "denoise"]


@dataclass(frozen=True)
class PatchPlan:
    """Layers to patch (None: all) and directions."""

    layers: tuple[int, ...] | None = None
    directions: tuple[Direction, ...] = ("noise", "denoise")


def step_edits(layer: int, span: tuple[int, int], source: Tensor) -> list[ActivationEdit]:
    """One cell: resid_pre of `layer` at the tokens of `span` replaced by `source[span]`."""
    positions = tuple(range(*span))
    return [ActivationEdit(Site("resid_pre", layer), positions, "replace", source[span[0] : span[1]])]


def measure_patching(trunk: Trunk, problem: Problem, reader: str, plan: PatchPlan, *, seed: int = 0) -> Measured:
    """Records of `patching` and its controls; needs a token-aligned twin of the chain, else an exclusion."""
    measured = Measured(trunk.chain, reader)
    if not problem.twin_steps or problem.twin_answer is None:
        measured.exclusions.append("patching: the problem has no aligned twin to take source activations from")
        return measured
    twin = replace(trunk.chain, steps=problem.twin_steps)
    encoding = trunk.model.encode(twin.text)
    if token_spans(twin, encoding) != trunk.spans:
        measured.exclusions.append("patching: the twin's tokens do not align with the chain's")
        return measured
    try:
        contrast = AnswerContrast.of(trunk, f" {problem.twin_answer}")
    except CotfaithError as error:
        measured.exclusions.append(f"patching: {error}")
        return measured
    layers = tuple(range(trunk.model.info.n_layers)) if plan.layers is None else plan.layers
    sites = [Site("resid_pre", layer) for layer in layers]
    runs = {"chain": trunk.run, "twin": trunk.run.sibling(encoding.ids)}
    states = {name: run.read(sites) for name, run in runs.items()}
    for direction in plan.directions:
        base, source = ("chain", "twin") if direction == "noise" else ("twin", "chain")
        _patch(measured, trunk, contrast, direction, runs[base], states[source], runs[source])
    _patch_controls(measured, trunk, contrast, states["chain"], states["twin"], seed)
    return measured


def _patch(
    measured: Measured,
    trunk: Trunk,
    contrast: AnswerContrast,
    direction: Direction,
    base: CachedRun,
    source_states: Any,
    source: CachedRun,
) -> None:
    cells, coordinates = [], []
    for site, values in source_states.items():
        for step, span in enumerate(trunk.spans.steps):
            cells.append(step_edits(site.layer, span, values))
            coordinates.append((site, step))
    rows = base.edited(cells, n_logits=contrast.n_logits, reduce=contrast.reduce)
    for (site, step), row in zip(coordinates, rows.tolist(), strict=True):
        where = {"site": str(site), "layer": site.layer, "step": step}
        values = {"logit_diff": row[0], "p_answer": row[1], "says_source": _source_said(direction, row)}
        measured.add("patching", direction, values, len(trunk.run.tokens), **where)
    for name, run in (("base", base), ("source", source)):
        row = contrast.reduce(run.logits(contrast.n_logits)[None])[0].tolist()
        values = {f"logit_diff_{name}": row[0], f"p_answer_{name}": row[1]}
        measured.add("patching", direction, values, len(trunk.run.tokens))


def _source_said(direction: Direction, row: Sequence[float]) -> float:
    """Is the source's answer the argmax where the two part: the foil when noising, a* when denoising?"""
    return row[2] if direction == "noise" else row[3]


def _patch_controls(measured: Measured, trunk: Trunk, contrast: AnswerContrast, own: Any, twin: Any, seed: int) -> None:
    """At the middle layer: self-patch of one step, drawn from `seed`, and norm-matched random directions at each.

    The self-patch is compared with a null edit of the same shape, so that not a bit may differ.
    """
    middle = sorted(own, key=lambda site: site.layer)[len(own) // 2]
    generator = torch.Generator().manual_seed(seed)
    base, difference = own[middle], twin[middle] - own[middle]
    random = torch.randn(difference.shape, generator=generator).to(difference)
    random = random * (difference.norm(dim=-1) / random.norm(dim=-1))[:, None]
    run, read = trunk.run, {"n_logits": contrast.n_logits, "reduce": contrast.reduce}
    span = trunk.spans.steps[int(np.random.default_rng(seed).integers(len(trunk.spans.steps)))]
    null = ActivationEdit(middle, tuple(range(*span)), "add", torch.zeros_like(base[slice(*span)]))
    self_patch = run.edited([step_edits(middle.layer, span, base)], **read) - run.edited([[null]], **read)
    worst = {"max_abs_diff": float(self_patch.abs().amax())}
    measured.add("control", "self_patch", worst, len(run.tokens), layer=middle.layer)
    noise = [step_edits(middle.layer, span, base + random) for span in trunk.spans.steps]
    p_base = float(contrast.reduce(run.logits(contrast.n_logits)[None])[0, 1])
    for step, p_edited in enumerate(run.edited(noise, **read)[:, 1].tolist()):
        where = {"site": str(middle), "layer": middle.layer, "step": step, "seed": seed}
        measured.add("control", "norm_matched", {"delta_p": p_base - p_edited}, len(run.tokens), **where)
