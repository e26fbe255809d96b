"""Which cells climb together: groups of counterfactuals that share a pass of the corner engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise

PASS_OVERHEAD = 40
"""Cost of executing a layer at all, in tokens (weight traffic and launches); measured on SmolLM2 on two CPU cores."""
MOST_STARTS = 17
"""Distinct first positions that one group of cells may join."""


def grouped(
    cells: Sequence[int],
    starts: Sequence[int],
    layers: Sequence[int],
    shape: tuple[int, int],
    rows: Callable[[int], int],
) -> Iterator[list[int]]:
    """Groups of `cells` (indices into `starts` and `layers`) that climb together, sorted by layer; each begins with its
    smallest start. `shape`: layers of the model, tokens of the run.

    Neighbouring starts are merged where re-reading a few more tokens costs less than another pass, by dynamic
    programming over the distinct starts; then groups are cut to the cells, `rows(start)`, that a pass has room for.
    """
    n_layers, length = shape
    distinct = sorted({starts[i] for i in cells})
    work = Counter[int]()
    for i in cells:
        work[starts[i]] += n_layers - layers[i]

    def costs(end: int) -> Iterator[float]:
        joint = 0
        for first in range(end - 1, max(-1, end - 1 - MOST_STARTS), -1):
            joint += work[distinct[first]]
            yield joint * (length - distinct[first]) + PASS_OVERHEAD * n_layers

    for first, end in cheapest_cuts(len(distinct), costs):
        chosen = set(distinct[first:end])
        members = sorted((i for i in cells if starts[i] in chosen), key=lambda i: layers[i])
        size = max(1, rows(distinct[first]))
        for cut in range(0, len(members), size):
            part = members[cut : cut + size]
            lowest = min(part, key=lambda i: starts[i])
            yield [lowest, *(i for i in part if i != lowest)]


def cheapest_cuts(n: int, costs: Callable[[int], Iterator[float]]) -> list[tuple[int, int]]:
    """The cheapest cut of range(n) into segments `[first, end)`, by dynamic programming.

    `costs(end)` gives the costs of the segments that end there, the shortest first.
    """
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, n + 1):
        options = enumerate(islice(costs(end), end), 1)
        best.append(min((best[end - length][0] + cost, end - length) for length, cost in options))
    edges = [n]
    while edges[-1]:
        edges.append(best[edges[-1]][1])
    edges.reverse()
    return list(pairwise(edges))
