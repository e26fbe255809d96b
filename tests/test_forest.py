"""Packed trees against their definition: what a node may see is exactly the text before it, whoever shares its row."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cotfaith_mech.backends.forest import Batch, packed

BASE = tuple(range(100, 117))
suffixes = st.lists(st.integers(0, 2), min_size=1, max_size=9)
variant_lists = st.lists(st.tuples(st.integers(0, len(BASE)), suffixes, st.integers(1, 9)), min_size=1, max_size=12)


def text_seen(
    batch: Batch, row: int, slot: int, window: int | None, keys: np.ndarray | None = None
) -> list[tuple[int, int]]:
    """Position and token of everything that a slot may attend to, in order of position; `keys`: tokens of key slots."""
    n_base = len(BASE)
    keys = batch.tokens if keys is None else keys
    seen = np.flatnonzero(batch.visible(n_base, window)[row, 0, slot])
    own = [(int(batch.key_positions[row, k - n_base]), int(keys[row, k - n_base])) for k in seen if k >= n_base]
    return sorted([(int(k), BASE[k]) for k in seen if k < n_base] + own)


@given(variant_lists, st.integers(1, 40), st.sampled_from([1, 64, 10**6]), st.sampled_from([None, 1, 5]))
def test_a_node_sees_its_own_text_and_nothing_else(
    drawn: list[tuple[int, list[int], int]], max_slots: int, d_model: int, window: int | None
) -> None:
    variants = [(root, suffix, min(n_reads, len(suffix))) for root, suffix, n_reads in drawn]
    found: list[int] = []
    for batch in packed(variants, max_slots, d_model):
        found += [one.number for one in batch.placed]
        for number, (row, slots) in zip([one.number for one in batch.placed], batch.reads(), strict=True):
            root, suffix, n_reads = variants[number]
            text = list(enumerate((*BASE[:root], *suffix)))
            assert len(slots) == n_reads
            for slot, end in zip(slots, range(len(text) - n_reads + 1, len(text) + 1), strict=True):
                near = 0 if window is None else max(0, end - window)
                assert text_seen(batch, row, slot, window) == text[near:end]
        assert batch.visible(3, window).any(-1).all()
    assert sorted(found) == list(range(len(variants)))


@given(variant_lists, st.data(), st.sampled_from([1, 10**6]), st.sampled_from([None, 2, 5]))
def test_what_a_batch_grows_sees_its_own_text_and_nothing_else(
    drawn: list[tuple[int, list[int], int]], data: st.DataObject, d_model: int, window: int | None
) -> None:
    texts = {i: list(enumerate((*BASE[:root], *suffix))) for i, (root, suffix, _) in enumerate(drawn)}
    (batch,) = packed([(root, suffix, 1) for root, suffix, _ in drawn], 10**6, d_model)
    keys = batch.tokens
    for _ in range(3):
        longer = []
        for one in batch.placed:
            if data.draw(st.integers(0, 2)):
                n_kept, new = data.draw(st.integers(1, len(one.slots))), data.draw(suffixes)
                texts[one.number] = texts[one.number][: one.root + n_kept]
                texts[one.number] += list(enumerate(new, one.root + n_kept))
                longer.append((one, n_kept, new, data.draw(st.integers(1, len(new)))))
        if not longer:
            return
        rows, batch = batch.grown(longer)
        keys = np.concatenate([keys[rows], batch.tokens], 1)
        for one, (row, slots) in zip(batch.placed, batch.reads(), strict=True):
            text = texts[one.number]
            for slot, end in zip(slots, range(len(text) - one.n_reads + 1, len(text) + 1), strict=True):
                near = 0 if window is None else max(0, end - window)
                assert text_seen(batch, row, slot, window, keys) == text[near:end]
        assert batch.visible(3, window).any(-1).all()


def test_every_distinct_prefix_is_computed_once() -> None:
    """Two answers after one long text cost the text once; two texts that share one token alone stay apart."""
    text = list(range(30))
    (batch,) = packed([(4, [*text, 51, 52], 3), (4, [*text, 53], 2)], 512, d_model=64)
    assert (batch.positions > 0).sum() == 33
    apart = [(4, [7, *text], 2), (4, [7, *reversed(text)], 2)]
    (batch,) = packed(apart, 512, d_model=16)
    assert (batch.positions > 0).sum() == 62
    assert batch.tokens.shape == (2, 31)


def test_short_variants_fill_the_rows_of_long_ones() -> None:
    variants = [(n, [n] * length, 1) for n, length in enumerate((40, 13, 27, 11, 29, 40))]
    (batch,) = packed(variants, 512, d_model=10**6)
    assert batch.tokens.size == 160


def test_batches_keep_to_their_slots() -> None:
    variants = [(n, [n] * 10, 1) for n in range(9)]
    sizes = [batch.tokens.size for batch in packed(variants, 40, d_model=64)]
    assert len(sizes) > 2
    assert max(sizes) <= 40
