"""Attention weights edited after the softmax, without a look inside any attention.

z at a query is the sum over keys of weight times value. Zeroed edges: z loses exactly the cut edges where the values of
the cut keys are zero. A shadow row repeats a layer on the input of the row it shadows, with those values zeroed, and
hands its z over at the queries and heads of the edit. The weights stay as they are: nothing is renormalised. Exact for
any attention implementation, sliding window, soft-cap and grouping of heads, at the price of one more row a cell.
Replaced weights: z is the given weights times the row's own values. Own weights put back give z to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..errors import CotfaithError
from ..sites import ActivationEdit
from .hooks import Layout, RowEdit
from .traced import heads_view


def is_replaced(edit: ActivationEdit) -> bool:
    """Whether `edit` puts other attention weights in place of a query's."""
    return edit.site.kind == "pattern" and edit.op == "replace"


def is_zeroed(edit: ActivationEdit) -> bool:
    """Whether `edit` zeroes attention edges (a knockout cuts them before the softmax)."""
    return edit.site.kind == "pattern" and edit.op == "zero"


@dataclass(frozen=True)
class Shadow:
    """`edits`, equal in queries and keys, of the rows `rows`, made by way of the rows `shadows`."""

    edits: tuple[ActivationEdit, ...]
    rows: slice
    shadows: slice


def shadowed_edits(cell: Sequence[ActivationEdit]) -> list[tuple[ActivationEdit, ...]]:
    """The zeroed edits of a cell, those of equal queries and keys together: one shadow serves all layers and heads.

    Raises CotfaithError where a key is a query too, or two groups, or one and replaced weights, meet in a layer at a
    query.
    """
    groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[ActivationEdit]] = {}
    for edit in filter(is_zeroed, cell):
        if both := sorted(set(edit.positions) & set(edit.keys)):
            raise CotfaithError(f"{edit}: positions {both} are queries and keys; zero edges between different tokens.")
        groups.setdefault((edit.positions, edit.keys), []).append(edit)
    taken = {(edit.site.layer, position) for edit in filter(is_replaced, cell) for position in edit.positions}
    for edits in groups.values():
        own = {(edit.site.layer, position) for edit in edits for position in edit.positions}
        if own & taken:
            raise CotfaithError(f"{edits[0]}: its queries lose other keys too; give all keys of a query in one edit.")
        taken |= own
    return [tuple(edits) for edits in groups.values()]


@contextmanager
def shadowed(
    layout: Layout,
    shadows: Sequence[Shadow],
    replaced: Sequence[RowEdit] = (),
    *,
    d_head: int,
    offset: int,
    cache: Cache | None,
    edits: Any,
) -> Iterator[None]:
    """Make the edits of `shadows` and the `replaced` weights during the forwards inside, whose first token stands at
    `offset`.

    The other edits, a context, go in between: a shadow repeats a layer on an input already edited, and z is edited
    after it was handed over. The layers of `cache` have a list `zeroed` of (rows, keys) whose values count as zero, and
    show in `values_seen` those of all keys `[row, kv_head, key, d_head]` where that is an empty tensor beforehand.
    """
    at_work = [(shadow, layer, edits) for shadow in shadows for layer, edits in _by_layer(shadow).items()]
    with ExitStack() as stack:
        for shadow, layer, own in at_work:
            values: Any = cache and cache.layers[layer]
            values.zeroed.append((shadow.shadows, list(own[0].keys)))
            hook = layout.layers[layer].attention.o_proj.register_forward_pre_hook(
                partial(_hand_over, shadow, own, offset, d_head)
            )
            stack.callback(hook.remove)
        for row_edit in replaced:
            layer = row_edit.edit.site.layer
            shown: Any = cache and cache.layers[layer]
            shown.values_seen = torch.empty(0)
            hook = layout.layers[layer].attention.o_proj.register_forward_pre_hook(
                partial(_weigh, row_edit, shown, d_head)
            )
            stack.callback(hook.remove)
        stack.enter_context(edits)
        for shadow, layer, _ in at_work:
            hook = layout.layers[layer].layer.register_forward_pre_hook(partial(_repeat, shadow), with_kwargs=True)
            stack.callback(hook.remove)
        yield


def _by_layer(shadow: Shadow) -> dict[int, list[ActivationEdit]]:
    by_layer: dict[int, list[ActivationEdit]] = {}
    for edit in shadow.edits:
        by_layer.setdefault(edit.site.layer, []).append(edit)
    return by_layer


def _repeat(shadow: Shadow, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    hidden[shadow.shadows] = hidden[shadow.rows]


def _hand_over(
    shadow: Shadow,
    edits: Sequence[ActivationEdit],
    offset: int,
    d_head: int,
    module: nn.Module,
    args: tuple[Tensor, ...],
) -> None:
    queries = [position - offset for position in edits[0].positions]
    z = heads_view(args[0], d_head)
    for edit in edits:
        heads = slice(None) if edit.site.head is None else slice(edit.site.head, edit.site.head + 1)
        z[shadow.rows, queries, heads] = z[shadow.shadows, queries, heads]


def _weigh(row_edit: RowEdit, shown: Any, d_head: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Puts given weights times the values in `shown` in place of z, at the rows, queries and head of the edit."""
    edit, head = row_edit.edit, row_edit.edit.site.head
    queries = [position - row_edit.offset for position in edit.positions]
    z = heads_view(args[0], d_head)
    values = shown.values_seen[row_edit.rows]
    n_heads, n_kv = z.shape[2], values.shape[1]
    weights = edit.value.to(z)
    expected = (n_heads,) if head is None else ()
    if weights.shape[1:-1] != expected or weights.shape[-1] > values.shape[2]:
        raise CotfaithError(
            f"{edit}: weights have shape {tuple(weights.shape)}, the site needs [query, *{list(expected)}, key] "
            f"with at most {values.shape[2]} keys."
        )
    values = values[:, :, : weights.shape[-1]]
    if head is not None:
        own = values[:, head // (n_heads // n_kv)]
        z[row_edit.rows, queries, head] = einsum(weights, own, "query key, row key d -> row query d")
        return
    weights = rearrange(weights, "query (kv group) key -> query kv group key", kv=n_kv)
    new = einsum(weights, values, "query kv group key, row kv key d -> row query kv group d")
    z[row_edit.rows, queries] = rearrange(new, "row query kv group d -> row query (kv group) d")
