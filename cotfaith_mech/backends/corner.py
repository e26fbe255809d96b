"""The engine: counterfactuals of one base run, each by re-running only the corner that its edit can reach.

A decoder is causal: an edit at layer l and position p changes only layers >= l at positions >= p.
1. The base run is computed once; its residual stream before every layer and all K/V are kept.
2. Counterfactuals are grouped by their first position p; a group shares the frozen K/V before p.
3. One upward pass serves a group: a row starts at its own first layer, with the base's residual stream there, and
   joins the batch when the pass reaches that layer. Layers below the first row are passed through, not executed.
4. Logits are computed at the answer positions alone and reduced on the model's device.
A text variant is the case l = 0: it shares the K/V of the longest common prefix with the base run's tokens.
Modules, masks, rotary embedding, sliding windows and soft-caps are the model's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from ..errors import CotfaithError
from ..model import Branch, Reduce
from ..sites import ActivationEdit, Site
from .hooks import RowEdit, hooked

if TYPE_CHECKING:
    from .huggingface import HuggingFaceModel

PASS_OVERHEAD = 15
"""Cost of executing a layer at all, in tokens (weight traffic and launches); a measured rule of thumb for grouping."""


class _FrozenPrefix(DynamicLayer):
    """Base K/V of one layer before `start`, expanded to however many rows the pass holds."""

    def __init__(self, keys: Tensor, values: Tensor, start: int) -> None:
        super().__init__()
        self.keys, self.values, self.start = keys[:, :, :start], values[:, :, :start], start
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._joined(self.keys, key_states), self._joined(self.values, value_states)

    def _joined(self, prefix: Tensor | None, new: Tensor) -> Tensor:
        assert prefix is not None
        return torch.cat([prefix.expand(new.shape[0], -1, -1, -1), new], dim=2)

    def get_seq_length(self) -> int:
        return self.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.start + query_length, 0


class _Recording(DynamicLayer):
    """A cache layer that keeps all K/V, whatever window the model's attention has."""


class _PassThrough(nn.Module):
    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


Cell = Sequence[ActivationEdit]


class CornerRun:
    """CachedRun on a Hugging Face decoder; see the module's text for the method.

    Keeps the residual stream `[layer, pos, d_model]` and K/V `[1, kv_head, pos, d_head]` of every layer.
    """

    accelerated = True

    def __init__(self, model: HuggingFaceModel, tokens: Sequence[int], max_tokens: int = 4096) -> None:
        self.model = model
        self.tokens = tuple(tokens)
        self.max_tokens = max_tokens if model.info.device == "cpu" else 8 * max_tokens
        n_layers = model.info.n_layers
        self._row: Int[Tensor, "1 pos"] = torch.tensor([self.tokens], device=model.info.device)
        sites = [Site("resid_pre", layer) for layer in range(n_layers)]
        cache = Cache(layers=[_Recording() for _ in range(n_layers)])
        with torch.no_grad(), hooked(model.layout, d_head=model.info.d_head, read=sites) as store:
            model.weights.model(input_ids=self._row, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self._residual: Float[Tensor, "layer pos d_model"] = torch.cat([store[site] for site in sites])
        self._keys_values: list[tuple[Any, Any]] = [
            (layer.keys, layer.values) for layer in cache.layers if isinstance(layer, _Recording)
        ]

    def read(self, sites: Sequence[Site]) -> Mapping[Site, Tensor]:
        """Activations of the base run at all positions, `[pos, *width]` (pattern: `[head, query, key]`)."""
        run = self.model.run(self._row, read=sites)
        return {site: run.activations[site][0] for site in sites}

    @torch.no_grad()
    def edited(self, cells: Sequence[Cell], *, n_logits: int, reduce: Reduce) -> Float[Tensor, "cell metric"]:
        """Each cell's logits at the last `n_logits` positions, reduced; rows in the order of `cells`."""
        for cell in cells:
            self._check(cell)
        read_from = len(self.tokens) - n_logits
        starts = [min(read_from, *(p for edit in cell for p in edit.positions)) for cell in cells]
        layers = [min(edit.site.layer for edit in cell) for cell in cells]
        results: dict[int, Tensor] = {}
        for group in self._groups(starts, layers):
            start = starts[group[0]]
            logits = self._climb(start, [cells[i] for i in group], [layers[i] for i in group], n_logits)
            reduced = reduce(logits.float())
            results.update(zip(group, reduced, strict=True))
        return torch.stack([results[i] for i in range(len(cells))]).cpu()

    def _check(self, cell: Cell) -> None:
        if not cell:
            raise CotfaithError("A cell without edits changes nothing; give at least one ActivationEdit.")
        for edit in cell:
            outside = [p for p in edit.positions if not 0 <= p < len(self.tokens)]
            if outside or not edit.positions:
                raise CotfaithError(f"{edit}: positions {outside} lie outside the run of {len(self.tokens)} tokens.")

    def _groups(self, starts: Sequence[int], layers: Sequence[int]) -> Iterator[list[int]]:
        """Cells that climb together, sorted by layer; each group begins with its smallest start.

        Neighbouring starts are merged where re-reading a few more tokens costs less than another pass, by dynamic
        programming over the distinct starts; then groups are cut to `max_tokens` rows x suffix.
        """
        n_layers, length = self.model.info.n_layers, len(self.tokens)
        distinct = sorted(set(starts))
        work = Counter[int]()
        for start, layer in zip(starts, layers, strict=True):
            work[start] += n_layers - layer
        best: list[tuple[float, int]] = [(0.0, 0)]
        for end in range(1, len(distinct) + 1):
            options, joint = [], 0
            for first in range(end - 1, max(-1, end - 17), -1):
                joint += work[distinct[first]]
                cost = joint * (length - distinct[first]) + PASS_OVERHEAD * n_layers
                options.append((best[first][0] + cost, first))
            best.append(min(options))
        edges = [len(distinct)]
        while edges[-1]:
            edges.append(best[edges[-1]][1])
        for first, end in zip(edges[1:], edges[:-1], strict=True):
            chosen = set(distinct[first:end])
            members = sorted((i for i, s in enumerate(starts) if s in chosen), key=lambda i: layers[i])
            rows = max(1, self.max_tokens // (length - distinct[first]))
            for cut in range(0, len(members), rows):
                part = members[cut : cut + rows]
                lowest = min(part, key=lambda i: starts[i])
                yield [lowest, *(i for i in part if i != lowest)]

    def _climb(
        self, start: int, cells: Sequence[Cell], layers: Sequence[int], n_logits: int
    ) -> Float[Tensor, "cell read vocab"]:
        order = sorted(range(len(cells)), key=lambda i: layers[i])
        row_of = {cell: row for row, cell in enumerate(order)}
        edits = [RowEdit(edit, slice(row_of[i], row_of[i] + 1), start) for i, cell in enumerate(cells) for edit in cell]
        joins = Counter(layers)
        with (
            self._joining(joins, start),
            hooked(self.model.layout, d_head=self.model.info.d_head, edits=edits),
        ):
            logits = self._forward(self._row[:, start:], start, n_logits)
        return logits[[row_of[i] for i in range(len(cells))]]

    def _forward(self, tokens: Int[Tensor, "row pos"], start: int, keep: int | Tensor) -> Tensor:
        cache = Cache(layers=[_FrozenPrefix(keys, values, start) for keys, values in self._keys_values])
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
        return self.model.weights.model(
            input_ids=tokens, past_key_values=cache, position_ids=positions, use_cache=True, logits_to_keep=keep
        ).logits

    @contextmanager
    def _joining(self, joins: Mapping[int, int], start: int) -> Iterator[None]:
        """Rows join at their layers; layers below the first are passed through. Undone on any exit."""
        decoder: Any = self.model.layout.decoder
        original, first = decoder.layers, min(joins)
        handles = []
        try:
            for layer, count in joins.items():
                rows = self._residual[layer, start:].expand(count, -1, -1)
                hook = _joiner(rows.clone(), alone=layer == first)
                handles.append(original[layer].register_forward_pre_hook(hook, with_kwargs=True))
            decoder.layers = nn.ModuleList([_PassThrough() for _ in range(first)] + list(original[first:]))
            yield
        finally:
            decoder.layers = original
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def branches(self, branches: Sequence[Branch], *, reduce: Callable[[Tensor, int], Tensor]) -> list[Tensor]:
        """Text variants on the shared trunk, several a batch, right-padded (a causal model never looks there)."""
        starts = [min(self._shared(b.tokens), len(b.tokens) - b.n_logits) for b in branches]
        order = sorted(range(len(branches)), key=lambda i: (-starts[i], len(branches[i].tokens)))
        results: dict[int, Tensor] = {}
        while order:
            batch = self._batch(order, starts, branches)
            order = order[len(batch) :]
            start = min(starts[i] for i in batch)
            logits, first = self._branch_logits([branches[i] for i in batch], start)
            for row, i in enumerate(batch):
                end = len(branches[i].tokens) - start - first
                results[i] = reduce(logits[row, end - branches[i].n_logits : end].float(), i).cpu()
        return [results[i] for i in range(len(branches))]

    def _shared(self, tokens: Sequence[int]) -> int:
        pairs = zip(tokens, self.tokens, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(self.tokens)))

    def _batch(self, order: Sequence[int], starts: Sequence[int], branches: Sequence[Branch]) -> list[int]:
        """The longest head of `order` whose padded, re-read tokens stay within 1.25 of its own and `max_tokens`."""
        own = 0
        for count, i in enumerate(order, 1):
            own += len(branches[i].tokens) - starts[i]
            start = starts[i]
            widest = max(len(branches[k].tokens) for k in order[:count])
            total = count * (widest - start)
            if count > 1 and (total > 1.25 * own + PASS_OVERHEAD or total > self.max_tokens):
                return list(order[: count - 1])
        return list(order)

    def _branch_logits(self, branches: Sequence[Branch], start: int) -> tuple[Tensor, int]:
        """Logits from the first suffix position that any branch reads, and that position."""
        widest = max(len(b.tokens) for b in branches) - start
        rows = [list(b.tokens[start:]) + [0] * (widest + start - len(b.tokens)) for b in branches]
        first = min(len(b.tokens) - b.n_logits for b in branches) - start
        tokens = torch.tensor(rows, device=self._row.device)
        keep = torch.arange(first, widest, device=tokens.device)
        return self._forward(tokens, start, keep), first


def _joiner(rows: Tensor, alone: bool) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden = rows if alone else torch.cat([args[0], rows])
        return (hidden, *args[1:]), kwargs

    return hook
