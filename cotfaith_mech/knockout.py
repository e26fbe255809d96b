"""Attention knockout (Geva et al. 2304.14767): on which edges between the parts of a chain does its answer rest?

Rows are the cue and the forced answer. Edges cut, in all layers and heads unless a record says which:
  step: rows -> step j (variants `masked`, `zeroed`);  later: the steps after j -> step j;  joint: both of them, which
  for `masked` is the step deleted at kept positions;  chain: rows -> all steps;  question: rows -> prompt but for its
  first tokens;  matrix: step i -> step j;  heads: the row that predicts where a* and the foil part -> step j, one query
  head of one layer;  windows: rows -> step j in some neighbouring layers.
Masked edges are cut before the softmax, so the rest renormalises, and a query's own key is never cut; zeroed ones after
it. Edges that lie outside a sliding window in every layer do not exist: their effect is NaN, not 0.
Control: as many random prompt positions cut from the rows; of single heads, as many as the median step has tokens.
A joint effect larger than the sum of its parts is backup.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, get_args

import numpy as np

from .contrast import AnswerContrast
from .errors import check_words
from .measured import Measured
from .reading import Trunk
from .sites import ActivationEdit, Site

SINK_TOKENS = 4
"""Prompt tokens at the start that no cut touches: attention sinks there are load-bearing for anything."""

Kind = Literal["masked", "zeroed"]
Edges = Literal["step", "random", "later", "joint", "chain", "question", "matrix", "heads", "windows"]
ALL_EDGES: tuple[Edges, ...] = ("step", "random", "later", "joint", "chain", "question", "matrix")


@dataclass(frozen=True)
class KnockoutPlan:
    """Which edges, cut how, random draws of the control per step, and layers of a window."""

    edges: tuple[Edges, ...] = ("step", "random")
    kinds: tuple[Kind, ...] = ("masked",)
    random_draws: int = 2
    window: int = 5

    def __post_init__(self) -> None:
        check_words("edges", self.edges, get_args(Edges))
        check_words("kinds", self.kinds, get_args(Kind))


@dataclass(frozen=True)
class _Cut:
    """Edges of one knockout, and the coordinates of its records."""

    variant: str
    queries: Sequence[int]
    keys: Sequence[int]
    layers: Sequence[int]
    head: int | None
    where: dict[str, Any]


def cut_edits(
    layers: Iterable[int], queries: Sequence[int], keys: Sequence[int], kind: Kind = "masked", head: int | None = None
) -> list[ActivationEdit]:
    """One cell: edges from `queries` to `keys` cut in `layers`, for one query head or all (None)."""
    op = "knockout" if kind == "masked" else "zero"
    return [ActivationEdit(Site("pattern", layer, head), tuple(queries), op, None, tuple(keys)) for layer in layers]


def measure_knockout(
    trunk: Trunk,
    reader: str,
    plan: KnockoutPlan | None = None,
    *,
    contrast: AnswerContrast | None = None,
    seed: int = 0,
) -> Measured:
    """Records of `knockout`: what a* loses when edges are cut (Geva et al. 2304.14767).

    Per cut, at its `step`: `delta_logp` (nats), `delta_p` (probability), `same` (1: all of a* is still the argmax), and
    with a `contrast` that has a foil `delta_logit_diff` (logits). Positive is a loss. NaN where no such edge exists
    under a sliding window, or the prompt is too short for the control.
    """
    plan = plan or KnockoutPlan()
    measured, foil = Measured(trunk.chain, reader), contrast
    contrast = contrast or AnswerContrast.alone(trunk)
    for kind in plan.kinds:
        cuts = list(_cuts(trunk, plan, contrast, seed))
        cells = [cut_edits(cut.layers, cut.queries, cut.keys, kind, cut.head) for cut in cuts]
        null = cut_edits((0,), range(trunk.spans.cue[0], trunk.spans.answer[1]), (), kind)
        read = trunk.run.edited([null, *cells], n_logits=contrast.n_logits, reduce=contrast.reduce)
        base, *rows = read.tolist()
        for cut, row in zip(cuts, rows, strict=True):
            exists = _exists(trunk.model.windows, cut)
            values = {
                "delta_logp": base[5] - row[5],
                "delta_p": base[1] - row[1],
                "same": row[4],
            }
            if foil is not None:
                values["delta_logit_diff"] = base[0] - row[0]
            values = {metric: value if exists else np.nan for metric, value in values.items()}
            measured.add("knockout", f"{kind}{cut.variant}", values, len(trunk.run.tokens), **cut.where)
    return measured


def _cuts(trunk: Trunk, plan: KnockoutPlan, contrast: AnswerContrast, seed: int) -> Iterator[_Cut]:
    """Every knockout of the plan; the steps are spans of tokens, the rows the tokens of cue and answer."""
    spans, n_layers = trunk.spans, trunk.model.info.n_layers
    rows, steps = range(spans.cue[0], spans.answer[1]), [range(*span) for span in spans.steps]
    prompt = range(spans.prompt[0] + SINK_TOKENS, spans.prompt[1])
    everywhere, at = range(n_layers), spans.answer[0] + contrast.index - 1
    if "chain" in plan.edges:
        yield _Cut("_chain", rows, range(spans.prompt[1], spans.cue[0]), everywhere, None, {})
    if "question" in plan.edges:
        yield _Cut("_question", rows, prompt, everywhere, None, {})
    for j, keys in enumerate(steps):
        where, later = {"step": j}, range(keys.stop, spans.cue[0])
        if "step" in plan.edges:
            yield _Cut("", rows, keys, everywhere, None, where)
        if "later" in plan.edges and later:
            yield _Cut("_later", later, keys, everywhere, None, where)
        if "joint" in plan.edges and later:
            yield _Cut("_joint", range(keys.stop, spans.answer[1]), keys, everywhere, None, where)
        if "matrix" in plan.edges:
            for i in range(j + 1, len(steps)):
                yield _Cut(f"_from_step_{i}", steps[i], keys, everywhere, None, where)
        for draw in range(plan.random_draws if "random" in plan.edges else 0):
            rng = np.random.default_rng([seed, 5, j, draw])
            drawn = sorted(rng.choice(prompt, min(len(keys), len(prompt)), replace=False).tolist())
            enough = drawn if len(drawn) == len(keys) else ()
            yield _Cut("_random", rows, enough, everywhere, None, {"step": j, "seed": draw})
        for layer in everywhere if "windows" in plan.edges else ():
            layers = range(layer, min(layer + plan.window, n_layers))
            yield _Cut(f"_window_{plan.window}", rows, keys, layers, None, {"step": j, "layer": layer})
        for layer in everywhere if "heads" in plan.edges else ():
            for head in range(trunk.model.info.n_heads):
                yield _Cut("_head", (at,), keys, (layer,), head, {"step": j, "layer": layer, "head": head})
    if "heads" in plan.edges and steps:
        n_keys = min(int(np.median([len(keys) for keys in steps])), len(prompt))
        for layer, head in product(everywhere, range(trunk.model.info.n_heads)):
            rng = np.random.default_rng([seed, 13, layer, head])
            drawn = sorted(rng.choice(prompt, n_keys, replace=False).tolist())
            yield _Cut("_head_random", (at,), drawn, (layer,), head, {"layer": layer, "head": head})


def _exists(windows: Sequence[int | None], cut: _Cut) -> bool:
    """Whether any query of `cut` sees any of its keys in any of its layers; false without keys: a prompt too short for
    the control, say."""
    if not cut.keys:
        return False
    nearest = min(query - key for query in cut.queries for key in cut.keys if key <= query)
    return any(window is None or nearest < window for window in (windows[layer] for layer in cut.layers))
