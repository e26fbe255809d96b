"""Three engines on the same cells: a random sample of a run's patching and knockout cells, computed again elsewhere.

Each sampled cell is computed by the corner engine, by TransformerLens and by nnsight on the same weights; the largest
absolute difference of the answer's readouts is what the manifest and the report show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .chains import token_spans
from .contrast import AnswerContrast
from .errors import CotfaithError
from .knockout import cut_edits
from .model import BackendName, CachedRun, Model, PlainRun, same_weights
from .patching import step_edits
from .problems import Problem
from .reading import Trunk
from .sites import ActivationEdit, Site

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}
"""Largest difference of engines in one precision that passes, of logit differences and of log p(a*).

Measured on SmolLM2 on a CPU, 36 cells of 3 chains (experiments/results/precision_cpu.json): 3e-5 in float32, .375 in
bfloat16, .078 in float16 against TransformerLens, whose attention is eager; 0 against nnsight, whose attention is the
model's own. Logits between 16 and 32 lie .125 apart in bfloat16 and .016 in float16: .375 are three such spacings.
"""
REFUSALS = (CotfaithError, ValueError, LookupError, RuntimeError, AttributeError, TypeError, AssertionError, OSError)
"""What a peer raises on a model it cannot take; a check that could not be made has failed, the run's units stand."""


@dataclass(frozen=True)
class Sample:
    """Cells of one chain, kept until the check runs."""

    trunk: Trunk
    contrast: AnswerContrast
    cells: tuple[list[ActivationEdit], ...]


def sample_cells(trunk: Trunk, problem: Problem, n_cells: int, rng: np.random.Generator) -> Sample:
    """`n_cells` random cells: knockouts, and in turn with them patches where the chain has an aligned twin."""
    source, foil = _aligned_twin(trunk, problem)
    n_layers = trunk.model.info.n_layers
    cells = []
    for number in range(n_cells):
        span = trunk.spans.steps[rng.integers(len(trunk.spans.steps))]
        if source is None or number % 2:
            cells.append(cut_edits(range(n_layers), range(trunk.spans.cue[0], trunk.spans.answer[1]), range(*span)))
        else:
            site = Site("resid_pre", int(rng.integers(n_layers)))
            cells.append(step_edits(site.layer, span, source.read([site])[site]))
    return Sample(trunk, foil, tuple(cells))


def _aligned_twin(trunk: Trunk, problem: Problem) -> tuple[CachedRun | None, AnswerContrast]:
    """The twin's run and the contrast with its answer; without one, a* is contrasted with nothing."""
    if problem.twin_steps and problem.twin_answer is not None:
        twin = replace(trunk.chain, steps=problem.twin_steps)
        encoding = trunk.model.encode(twin.text)
        try:
            contrast = AnswerContrast.of(trunk, f" {problem.twin_answer}")
        except CotfaithError:
            return None, AnswerContrast.alone(trunk)
        if token_spans(twin, encoding) == trunk.spans:
            return trunk.run.sibling(encoding.ids), contrast
    return None, AnswerContrast.alone(trunk)


BACKENDS: tuple[BackendName, ...] = ("transformer_lens", "nnsight")


def check_engines(
    model: Model,
    samples: Sequence[Sample],
    progress: Callable[[Sequence[BackendName], str], Iterable[BackendName]] = lambda items, label: items,
) -> list[dict[str, object]]:
    """One row per other backend: the largest absolute difference over all sampled cells, and whether it passes.

    A backend that cannot take the model, and a difference that is not finite, is a failed check that says why.
    """
    tolerance = TOLERANCE[model.info.dtype]
    rows: list[dict[str, object]] = []
    for backend in progress(BACKENDS, "check against TransformerLens and nnsight"):
        worst, detail = float("nan"), ""
        try:
            other = same_weights(model, backend)
            worst = float(np.max([_difference(other, sample) for sample in samples]))
        except REFUSALS as error:
            detail = f"; {backend} failed: {' '.join(str(error).split())[:300]}"
        n_cells = sum(len(sample.cells) for sample in samples)
        rows.append(
            {
                "check": f"crosscheck/{backend}",
                "value": worst,
                "threshold": tolerance,
                "passed": worst <= tolerance,
                "detail": f"{n_cells} cells of {len(samples)} chains, reader {model.info.name}{detail}",
            }
        )
    return rows


def _difference(other: Model, sample: Sample) -> float:
    def reduce(logits: Float[Tensor, "cell read vocab"]) -> Float[Tensor, "cell 2"]:
        difference, p_answer = sample.contrast.reduce(logits)[:, :2].T
        return torch.stack([difference, p_answer.clamp_min(1e-30).log()], 1)

    read = {"n_logits": sample.contrast.n_logits, "reduce": reduce}
    ours = sample.trunk.run.edited(sample.cells, **read)
    theirs = PlainRun(other, sample.trunk.run.tokens).edited(sample.cells, **read)
    return float((ours - theirs).abs().max())
