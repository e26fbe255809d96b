"""What `cotfaith bench` patches: a worked chain of a given length, sets of cells on it, and what their corners cost.

patch_layer_token: resid_pre, every layer x position.  patch_layer_step: resid_pre, every layer x step, all its tokens.
patch_head_step: z of one query head, every layer x head x step.  knockout_matrix: edges cut before the softmax in all
layers, each step -> each earlier step, and the cue -> each step.

FLOPs of a corner: every layer from the edited one up, that one included, for the tokens from the first edited position
to the end: 2 a weight and token, and 4 x heads x d_head for each pair of a query and a key that it sees, the prefix
included; then the unembedding of one position. Norms, softmax, rotary embedding, copies of keys and values and the base
run count nothing. The last layer counts in full, though only its last position is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any

import numpy as np

from .arithmetic import people_problems
from .chains import Chain, token_spans
from .errors import CotfaithError
from .knockout import cut_edits
from .model import Ids, Model
from .sites import ActivationEdit, Site

MOST_STEPS = 12
Cell = list[ActivationEdit]
Span = tuple[int, int]


@dataclass(frozen=True)
class BenchChain:
    """The last tokens of a worked chain and of its aligned twin; the spans of its whole steps and of its cue."""

    tokens: Ids
    twin: Ids
    steps: tuple[Span, ...]
    cue: Span


def worked_chain(model: Model, n_tokens: int) -> BenchChain:
    """The last `n_tokens` of as few people problems as are long enough: their questions, then all their steps.

    More than 12 steps are grouped into 12. A step that the beginning cuts in two counts as prompt. Raises CotfaithError
    where the twin's tokens do not align or the context is too short.
    """
    for n_problems in count(1):
        problems = people_problems(n_problems, seed=7, n_people=12)
        prompt = model.render(" ".join(problem.question for problem in problems))
        base, twin = (
            Chain("bench", "generator", prompt, _grouped(steps), problems[-1].cue)
            for steps in ([p.steps for p in problems], [p.twin_steps for p in problems])
        )
        encoding, other = model.encode(base.text), model.encode(twin.text)
        spans = token_spans(base, encoding)
        if spans != token_spans(twin, other):
            raise CotfaithError(f"{model.info.name!r} gives a chain and its twin different tokens; take another model.")
        cut = len(encoding.ids) - n_tokens
        if cut >= 0:
            steps = tuple((first - cut, end - cut) for first, end in spans.steps if first >= cut)
            cue = (spans.cue[0] - cut, spans.cue[1] - cut)
            return BenchChain(encoding.ids[cut:], other.ids[cut:], steps, cue)
    raise AssertionError


def _grouped(chains: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The steps of all chains, each chain on a line of its own, in at most 12 groups."""
    steps = [("\n" if place and not i else "") + step for place, own in enumerate(chains) for i, step in enumerate(own)]
    edges = np.linspace(0, len(steps), min(MOST_STEPS, len(steps)) + 1).round().astype(int)
    return tuple("".join(steps[a:b]) for a, b in pairwise(edges))


@dataclass(frozen=True)
class CellSet:
    """Cells `[cell]`, and the group of each: a sample of the set takes whole groups."""

    name: str
    cells: list[Cell]
    groups: list[int]


def _replacement(site: Site, span: Span, source: Any) -> Cell:
    return [ActivationEdit(site, tuple(range(*span)), "replace", source[site][span[0] : span[1]])]


def layer_token(model: Model, chain: BenchChain, source: Any) -> CellSet:
    """Groups are runs of neighbouring positions, in all layers: 8 of them at 75 tokens, 1 at 600."""
    sites, run = [Site("resid_pre", layer) for layer in range(model.info.n_layers)], max(1, 600 // len(chain.tokens))
    places = [(site, p) for site in sites for p in range(len(chain.tokens))]
    cells = [_replacement(site, (p, p + 1), source) for site, p in places]
    return CellSet("patch_layer_token", cells, [p // run for _, p in places])


def layer_step(model: Model, chain: BenchChain, source: Any) -> CellSet:
    """Groups are layers."""
    sites = [Site("resid_pre", layer) for layer in range(model.info.n_layers)]
    places = [(site, span) for site in sites for span in chain.steps]
    cells = [_replacement(site, span, source) for site, span in places]
    return CellSet("patch_layer_step", cells, [site.layer for site, _ in places])


def head_step(model: Model, chain: BenchChain, source: Any) -> CellSet:
    """Groups are layers."""
    cells, groups = [], []
    for layer in range(model.info.n_layers):
        values = source[Site("z", layer)]
        for head in range(model.info.n_heads):
            site = Site("z", layer, head)
            cells += [_replacement(site, span, {site: values[:, head]}) for span in chain.steps]
            groups += [layer] * len(chain.steps)
    return CellSet("patch_head_step", cells, groups)


def knockout_matrix(model: Model, chain: BenchChain, source: Any) -> CellSet:
    """Groups are the rows of the matrix: what one step, or the cue, no longer sees."""
    cells, groups = [], []
    for row, queries in enumerate((*chain.steps, chain.cue)):
        for keys in chain.steps[:row]:
            cells.append(cut_edits(range(model.info.n_layers), range(*queries), range(*keys)))
            groups.append(row)
    return CellSet("knockout_matrix", cells, groups)


CELL_SETS: dict[str, Callable[[Model, BenchChain, Any], CellSet]] = {
    "patch_layer_token": layer_token,
    "patch_layer_step": layer_step,
    "patch_head_step": head_step,
    "knockout_matrix": knockout_matrix,
}


def source_sites(model: Model, name: str) -> list[Site]:
    """Where the source run is read for the cells of the set `name`."""
    if name == "knockout_matrix":
        return []
    return [Site("z" if name == "patch_head_step" else "resid_pre", layer) for layer in range(model.info.n_layers)]


def corner_flops(model: Model, n_tokens: int, cells: Sequence[Cell]) -> list[int]:
    """FLOPs of each cell's corner, as the module's text counts them."""
    info, weights = model.info, model.weights.model
    layer = weights.get_decoder().layers[0]
    dense = 2 * sum(p.numel() for p in layer.parameters() if p.ndim == 2)
    pairs = 4 * info.n_heads * info.d_head
    unembedding = 2 * weights.get_output_embeddings().weight.numel()
    flops = []
    for cell in cells:
        start = min(p for edit in cell for p in edit.positions)
        n_layers = info.n_layers - min(edit.site.layer for edit in cell)
        seen = (n_tokens * (n_tokens + 1) - start * (start + 1)) // 2
        flops.append(n_layers * ((n_tokens - start) * dense + seen * pairs) + unembedding)
    return flops


def sample_of_groups(groups: Sequence[int], flops: Sequence[int], most_flops: float) -> list[int]:
    """Indices of all cells, or of those of as many groups as `most_flops` buy: one drawn from each equal stretch."""
    if sum(flops) <= most_flops:
        return list(range(len(groups)))
    names = sorted(set(groups))
    n = max(1, round(len(names) * most_flops / sum(flops)))
    edges = np.linspace(0, len(names), n + 1).astype(int)
    rng = np.random.default_rng(0)
    chosen = {names[int(rng.integers(a, b))] for a, b in pairwise(edges)}
    return [i for i, group in enumerate(groups) if group in chosen]
