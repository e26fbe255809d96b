"""Three engines on the same cells: a random sample of a run's patching and knockout cells, computed again elsewhere.

Each sampled cell is computed by the corner engine, by TransformerLens and by nnsight on the same weights; the largest
absolute difference of the answer's readouts is what the manifest and the report show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .chains import token_spans
from .model import BackendName, Model, PlainRun, same_weights
from .patching import AnswerContrast, cut_edits, step_edits
from .problems import Problem
from .reading import Trunk
from .sites import ActivationEdit, Site

TOLERANCE = 1e-3
"""Largest difference that passes, on a logit difference in float32."""


@dataclass(frozen=True)
class Sample:
    """Cells of one chain, kept until the check runs."""

    trunk: Trunk
    contrast: AnswerContrast
    cells: tuple[list[ActivationEdit], ...]


def sample_cells(trunk: Trunk, problem: Problem, n_cells: int, rng: np.random.Generator) -> Sample | None:
    """`n_cells` random cells, patches and knockouts in turn; None where the chain has no aligned twin."""
    if not problem.twin_steps or problem.twin_answer is None:
        return None
    twin = replace(trunk.chain, steps=problem.twin_steps)
    encoding = trunk.model.encode(twin.text)
    if token_spans(twin, encoding) != trunk.spans:
        return None
    n_layers = trunk.model.info.n_layers
    source = trunk.run.sibling(encoding.ids)
    cells = []
    for number in range(n_cells):
        span = trunk.spans.steps[rng.integers(len(trunk.spans.steps))]
        if number % 2:
            cells.append(cut_edits(n_layers, range(trunk.spans.cue[0], trunk.spans.answer[1]), range(*span)))
        else:
            site = Site("resid_pre", int(rng.integers(n_layers)))
            cells.append(step_edits(site.layer, span, source.read([site])[site]))
    return Sample(trunk, AnswerContrast.of(trunk, f" {problem.twin_answer}"), tuple(cells))


BACKENDS: tuple[BackendName, ...] = ("transformer_lens", "nnsight")


def check_engines(
    model: Model,
    samples: Sequence[Sample],
    progress: Callable[[Sequence[BackendName], str], Iterable[BackendName]] = lambda items, label: items,
) -> list[dict[str, object]]:
    """One row per other backend: the largest absolute difference over all sampled cells, and whether it passes."""
    rows: list[dict[str, object]] = []
    for backend in progress(BACKENDS, "check against TransformerLens and nnsight"):
        other = same_weights(model, backend)
        worst, n_cells = 0.0, 0
        for sample in samples:
            read = {
                "n_logits": sample.contrast.n_logits,
                "reduce": lambda logits, c=sample.contrast: c.reduce(logits)[:, :2],
            }
            ours = sample.trunk.run.edited(sample.cells, **read)
            theirs = PlainRun(other, sample.trunk.run.tokens).edited(sample.cells, **read)
            worst = max(worst, float((ours - theirs).abs().max()))
            n_cells += len(sample.cells)
        rows.append(
            {
                "check": f"crosscheck/{backend}",
                "value": worst,
                "threshold": TOLERANCE,
                "passed": worst <= TOLERANCE,
                "detail": f"{n_cells} cells of {len(samples)} chains, reader {model.info.name}",
            }
        )
    return rows
