"""Text variants of one base run as a forest of token trees, packed into the rows of one batch.

1. A variant leaves the base's tokens at its root, the length of the prefix they share, and goes on with tokens of its
   own. Variants of equal root and equal next tokens share nodes, so that a distinct prefix is computed once, unless
   the attention between the strangers of one row would cost more than the tokens shared.
2. Trees are packed into rows of equal width, the largest first, each into the first row that has room, so that a short
   variant costs its own tokens and not those of the longest. Of several widths the cheapest is taken.
3. A node stands at its position in its text and sees the base before its root and its own ancestors (in a layer with a
   sliding window: those near enough), which is what it would see in a run of its own.
4. A batch can grow: variants that go on, as in greedy decoding, put new slots behind those of their row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int


@dataclass
class _Tree:
    """Nodes in the order they were added, parents before children; parent -1 is the base."""

    root: int
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    children: dict[tuple[int, int], int] = field(default_factory=dict)

    def path(self, suffix: Sequence[int]) -> list[int]:
        """The nodes along `suffix` that are there already."""
        found, node = [], -1
        for token in suffix:
            node = self.children.get((node, token), -2)
            if node == -2:
                break
            found.append(node)
        return found

    def add(self, suffix: Sequence[int]) -> list[int]:
        """The nodes along `suffix`, those made that were missing."""
        path = self.path(suffix)
        for token in suffix[len(path) :]:
            parent = path[-1] if path else -1
            self.children[parent, token] = len(self.tokens)
            path.append(len(self.tokens))
            self.tokens.append(token)
            self.parents.append(parent)
        return path


@dataclass(frozen=True)
class Placed:
    """A variant in a batch: its number, its row, the slots of its tokens after its root, and last positions read.

    Slots are those of the keys: once a batch has grown, the slots of the batch it grew from come first.
    """

    number: int
    row: int
    root: int
    slots: Sequence[int]
    n_reads: int


@dataclass(frozen=True)
class Batch:
    """Rows of packed trees. Slots without a node see themselves alone.

    `ancestors` and `key_positions` cover all key slots of a row, of which the last are the batch's own.
    """

    tokens: Int[np.ndarray, "row slot"]
    positions: Int[np.ndarray, "row slot"]
    roots: Int[np.ndarray, "row slot"]
    ancestors: Bool[np.ndarray, "row slot key"]
    key_positions: Int[np.ndarray, "row key"]
    placed: Sequence[Placed]

    def visible(self, n_base: int, window: int | None) -> Bool[np.ndarray, "row 1 slot key"]:
        """What each slot may attend to: keys 0..n_base-1 of the base, then the slots of its row."""
        keys = np.arange(n_base)
        base, own = keys < self.roots[..., None], self.ancestors
        if window is not None:
            base = base & (self.positions[..., None] - keys < window)
            own = own & (self.positions[:, :, None] - self.key_positions[:, None] < window)
        return np.concatenate([base, own], -1)[:, None]

    def reads(self) -> Iterator[tuple[int, list[int]]]:
        """Each placed variant's row, and the slots of the positions it reads."""
        first = self.key_positions.shape[1] - self.tokens.shape[1]
        for one in self.placed:
            yield one.row, [slot - first for slot in one.slots[-one.n_reads :]]

    def grown(self, longer: Sequence[tuple[Placed, int, Sequence[int], int]]) -> tuple[list[int], Batch]:
        """The batch of variants that go on: each with how many of its slots it keeps, the tokens after them, and how
        many of these are read. The rows kept stand first.
        """
        rows = sorted({one.row for one, *_ in longer})
        taken = [0] * len(rows)
        places = []
        for one, n_kept, tokens, n_reads in longer:
            row = rows.index(one.row)
            places.append((row, taken[row], one, n_kept, tokens, n_reads))
            taken[row] += len(tokens)
        width, n_old = max(taken), self.key_positions.shape[1]
        new, positions, roots = (np.zeros((len(rows), width), dtype=np.int64) for _ in range(3))
        ancestors = np.zeros((len(rows), width, n_old + width), dtype=bool)
        ancestors[:, range(width), range(n_old, n_old + width)] = True
        placed = []
        for row, start, one, n_kept, tokens, n_reads in places:
            end = start + len(tokens)
            slots = [*one.slots[:n_kept], *range(n_old + start, n_old + end)]
            new[row, start:end], roots[row, start:end] = tokens, one.root
            positions[row, start:end] = one.root + np.arange(n_kept, len(slots))
            for i in range(start, end):
                ancestors[row, i, slots[: n_kept + i - start]] = True
            placed.append(Placed(one.number, row, one.root, slots, n_reads))
        keys = np.concatenate([self.key_positions[rows], positions], 1)
        return rows, Batch(new, positions, roots, ancestors, keys, placed)


def packed(
    variants: Sequence[tuple[int, Sequence[int], int]], max_slots: int, d_model: int, max_keys: int | None = None
) -> Iterator[Batch]:
    """Batches of about `max_slots` slots for variants given as root, tokens after it, and last positions read; where
    `max_keys` is given, all rows of a batch together see about as many keys, those of the base among them.

    A token costs about 12 d_model^2 operations a layer, a pair of tokens in attention about 4 d_model.
    """
    trees: list[_Tree] = []
    paths: list[list[tuple[int, list[int], int]]] = []
    growing: dict[tuple[int, int], int] = {}
    for number, (root, suffix, n_reads) in enumerate(variants):
        at = growing.get((root, suffix[0]))
        if at is None or not _worth_sharing(trees[at], suffix, d_model):
            at = growing[root, suffix[0]] = len(trees)
            trees.append(_Tree(root))
            paths.append([])
        paths[at].append((number, trees[at].add(suffix), n_reads))
    sizes = [len(tree.tokens) for tree in trees]
    plans = [(width, _rows(sizes, width)) for width in (max(sizes), 3 * max(sizes) // 2, 2 * max(sizes))]
    width, rows = min(plans, key=lambda plan: len(plan[1]) * plan[0] * (3 * d_model + plan[0]))
    per_batch = max(1, max_slots // width)
    if max_keys is not None:
        per_batch = max(1, min(per_batch, max_keys // (width + max(root for root, *_ in variants))))
    for first in range(0, len(rows), per_batch):
        yield _batch(rows[first : first + per_batch], trees, paths, width)


def _worth_sharing(tree: _Tree, suffix: Sequence[int], d_model: int) -> bool:
    shared = len(tree.path(suffix))
    return 12 * d_model * shared >= 2 * 4 * len(tree.tokens) * (len(suffix) - shared)


def _rows(sizes: Sequence[int], width: int) -> list[list[int]]:
    """Numbers of the trees of each row, none wider than `width`: first fit, decreasing."""
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((row for row, free in enumerate(room) if free >= sizes[number]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(number)
        room[row] -= sizes[number]
    return rows


def _batch(
    rows: Sequence[Sequence[int]],
    trees: Sequence[_Tree],
    paths: Sequence[list[tuple[int, list[int], int]]],
    width: int,
) -> Batch:
    tokens, positions, roots = (np.zeros((len(rows), width), dtype=np.int64) for _ in range(3))
    ancestors = np.zeros((len(rows), width, width), dtype=bool)
    ancestors[:, range(width), range(width)] = True
    placed: list[Placed] = []
    for row, members in enumerate(rows):
        start = 0
        for number in members:
            tree = trees[number]
            slots = slice(start, start + len(tree.tokens))
            tokens[row, slots], roots[row, slots] = tree.tokens, tree.root
            for node, parent in enumerate(tree.parents):
                slot = start + node
                positions[row, slot] = tree.root if parent < 0 else positions[row, start + parent] + 1
                if parent >= 0:
                    ancestors[row, slot] |= ancestors[row, start + parent]
            for variant, nodes, n_reads in paths[number]:
                placed.append(Placed(variant, row, tree.root, [start + node for node in nodes], n_reads))
            start += len(tree.tokens)
    return Batch(tokens, positions, roots, ancestors, positions, placed)
