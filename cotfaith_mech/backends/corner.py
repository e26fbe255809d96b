"""The engine: counterfactuals of one base run, each by re-running only the corner that its edit can reach.

A decoder is causal: an edit at layer l and position p changes only layers >= l at positions >= p.
1. The base run is computed once; its residual stream around every layer and all K/V are kept.
2. Counterfactuals are grouped by their first position p; a group shares the frozen K/V before p.
3. One upward pass serves a group: a row starts at its own first layer, with the base's residual stream there, and
   joins the batch when the pass reaches that layer. Layers below the first row are passed through, not executed.
4. Logits are computed at the answer positions alone and reduced on the model's device.
A text variant is the case l = 0: it shares the K/V of the longest common prefix with the base run's tokens, and the
variants of one call are trees packed into rows (forest.py). A sibling shares that prefix too and is a base run of its
own. Modules, rotary embedding, attention and soft-caps are the model's own; masks are, but for packed trees.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from ..errors import CotfaithError
from ..model import Branch, CachedRun, Ids, ModelInfo, Readout, Reduce, Then
from ..sites import ActivationEdit, Site
from .answer_rows import answer_rows, compact
from .forest import Batch, packed
from .gradients import head_gradients, site_gradients
from .grouping import grouped
from .hooks import RowEdit, hooked
from .memory import KEYS_A_TOKEN, Kept, Recording
from .shadows import Shadow, is_replaced, is_zeroed, shadowed, shadowed_edits
from .traced import sent

if TYPE_CHECKING:
    from .huggingface import HuggingFaceModel


class _FrozenPrefix(DynamicLayer):
    """Base K/V of one layer before `start`, expanded to however many rows the pass holds.

    With `keeps`, what the rows add of their own stays, so that they can go on. Rows in `zeroed` see the values of some
    keys as zero, and a tensor in `values_seen` asks for the values of all keys (shadows.py).
    """

    def __init__(self, keys: Tensor, values: Tensor, start: int, keeps: bool = False) -> None:
        super().__init__()
        self.keys, self.values, self.start, self.keeps = keys[:, :, :start], values[:, :, :start], start, keeps
        self.own: tuple[Tensor, Tensor] | None = None
        self.zeroed: list[tuple[slice, list[int]]] = []
        self.values_seen: Tensor | None = None
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.own is not None:
            key_states, value_states = (
                torch.cat(pair, dim=2) for pair in zip(self.own, (key_states, value_states), strict=True)
            )
        if self.keeps:
            self.own = key_states, value_states
        keys, values = self._joined(self.keys, key_states), self._joined(self.values, value_states)
        for rows, cut in self.zeroed:
            values[rows, :, cut] = 0
        if self.values_seen is not None:
            self.values_seen = values
        return keys, values

    def _joined(self, prefix: Tensor | None, new: Tensor) -> Tensor:
        assert prefix is not None
        return torch.cat([prefix.to(new.device).expand(new.shape[0], -1, -1, -1), new], dim=2)

    def keep_rows(self, rows: Sequence[int]) -> None:
        assert self.own is not None
        self.own = self.own[0][rows], self.own[1][rows]

    def get_seq_length(self) -> int:
        return self.start + (0 if self.own is None else self.own[0].shape[2])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


def uncached(info: ModelInfo) -> Cache:
    """A cache without a prefix, for a whole pass some of whose rows see values as zero."""
    none = torch.empty(1, info.n_kv_heads, 0, info.d_head, device=info.device, dtype=getattr(torch, info.dtype))
    return Cache(layers=[_FrozenPrefix(none, none, 0) for _ in range(info.n_layers)])


class _PassThrough(nn.Module):
    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


Cell = Sequence[ActivationEdit]


class CornerRun:
    """CachedRun on a Hugging Face decoder; see the module's text for the method.

    Keeps the residual stream `[n_layers + 1, pos, d_model]` (before each layer, after the last) and the K/V
    `[1, kv_head, pos, d_head]` of every layer. What `tokens` share with `trunk` is taken from there.
    """

    accelerated = True

    def __init__(
        self,
        model: HuggingFaceModel,
        tokens: Sequence[int],
        trunk: CornerRun | None = None,
    ) -> None:
        self.model = model
        self.tokens = tuple(tokens)
        self._row: Int[Tensor, "1 pos"] = torch.tensor([self.tokens], device=model.info.device)
        self._whole(partial(self._begin, trunk))

    @property
    def max_tokens(self) -> int:
        """Tokens that a pass may hold now."""
        return self.model.room.tokens

    def _whole(self, run: Callable[[], None]) -> None:
        """Do `run`, a pass that cannot be divided; CotfaithError where memory runs out."""
        length = len(self.tokens)
        self.model.room.attempt(run, parts=1, tokens=length, length=length)

    def _begin(self, trunk: CornerRun | None) -> None:
        shared = 0 if trunk is None else trunk._shared(self.tokens)
        length, model = len(self.tokens), self.model
        self._keep(Kept(model.info, length, model.keep_on_cpu) if trunk is None else trunk._store.grown(shared, length))
        if shared < length:
            self._run_from(shared)

    def _keep(self, store: Kept) -> None:
        self._store, self._residual, self._keys_values = store, store.residual, store.keys_values

    @torch.no_grad()
    def _run_from(self, start: int) -> None:
        """Put down residual stream and K/V of the tokens from `start` on behind what is there of the ones before."""
        last, store = self.model.info.n_layers - 1, self._store
        sites = [*(Site("resid_pre", layer) for layer in range(last + 1)), Site("resid_post", last)]
        cache = Cache(layers=[Recording(store, layer, start) for layer in range(last + 1)])

        def keep(site: Site, rows: Tensor) -> Tensor:
            return store.write_residual(site.layer + (site.kind == "resid_post"), start, rows)

        with hooked(self.model.layout, d_head=self.model.info.d_head, read=sites, keep=keep):
            self._forward(self._row[:, start:], start, 1, cache)

    def sibling(self, tokens: Sequence[int]) -> CornerRun:
        """The base run of other tokens, of which only those after the common prefix are computed."""
        return CornerRun(self.model, tokens, self)

    def spliced(self, donor: CachedRun, first: int, end: int) -> CornerRun:
        """See `CachedRun.spliced`: the donor's residual stream is kept beside its keys and values."""
        if (
            not isinstance(donor, CornerRun)
            or len(donor.tokens) != len(self.tokens)
            or not 0 <= first < end <= len(self.tokens)
        ):
            raise CotfaithError(
                f"A run of {len(self.tokens)} tokens takes positions {first} to {end} of a run of as many on the same "
                f"backend; found {type(donor).__name__} of {len(donor.tokens)}."
            )
        shapes = [[(k.shape[1], k.shape[3]) for k, _ in run._keys_values] for run in (self, donor)]
        if shapes[0] != shapes[1] or self.model.info.d_model != donor.model.info.d_model:
            raise CotfaithError("The two models differ in layers or widths, so that one cannot read the other's K/V.")
        run = copy(self)
        run.tokens = (*self.tokens[:first], *donor.tokens[first:end], *self.tokens[end:])
        run._row = torch.tensor([run.tokens], device=self._row.device)
        run._keep(self._store.spliced(donor._store, first, end))
        if end < len(run.tokens):
            run._whole(partial(run._run_from, end))
        return run

    @torch.no_grad()
    def logits(self, n_logits: int) -> Float[Tensor, "read vocab"]:
        """Logits of the base run itself: its last residual stream through norm and unembedding, no layer executed."""
        start = len(self.tokens) - n_logits
        with self._joining({self.model.info.n_layers: 1}, start):
            return self._forward(self._row[:, start:], start, n_logits)[0].float()

    def read(self, sites: Sequence[Site], first: int = 0) -> Mapping[Site, Tensor]:
        """Activations of the base run from position `first` on, `[pos, *width]` (pattern: `[head, query, key]`).

        The residual stream between layers and v are kept already, and lie where runs are kept; other sites cost a pass
        over those positions.
        """
        kept = {site: value[first:] for site in sites if (value := self._kept(site)) is not None}
        missing = [site for site in sites if site not in kept]
        if missing:
            self._whole(lambda: kept.update(self._computed(missing, first)))
        return kept

    def _kept(self, site: Site) -> Tensor | None:
        if not 0 <= site.layer < self.model.info.n_layers:
            return None
        if site.kind in ("resid_pre", "resid_post"):
            return self._residual[site.layer + (site.kind == "resid_post")]
        if site.kind == "v":
            values = self._keys_values[site.layer][1][0].transpose(0, 1)
            return values if site.head is None else values[:, site.head]
        return None

    @torch.no_grad()
    def _computed(self, sites: Sequence[Site], first: int) -> dict[Site, Tensor]:
        wants_pattern = any(site.kind == "pattern" for site in sites)
        with (
            self.model.attention("eager" if wants_pattern else None),
            hooked(self.model.layout, d_head=self.model.info.d_head, read=sites) as store,
        ):
            self._forward(self._row[:, first:], first, 1)
        return {site: store[site][0].to(self._row.device) for site in sites}

    @torch.no_grad()
    def heads_within(self, layer: int, cells: Sequence[Cell]) -> Float[Tensor, "cell pos head d_head"]:
        """See `CachedRun.heads_within`: the layers above are passed through too."""
        for cell in cells:
            self._check(cell)
        site = Site("z", layer)

        def z(part: Sequence[Cell]) -> Tensor:
            edits = [RowEdit(edit, slice(i, i + 1), 0) for i, cell in enumerate(part) for edit in cell]
            with (
                self._joining({layer: len(part)}, 0, top=layer + 1),
                hooked(self.model.layout, d_head=self.model.info.d_head, edits=edits, read=[site]) as store,
            ):
                self._forward(self._row, 0, 1)
            return store[site].float().cpu()

        return torch.cat(list(self.model.room.in_parts(z, cells, len(self.tokens), len(self.tokens))))

    def head_gradients(
        self, position: int, layers: Sequence[int], scales: Sequence[float], readout: Readout
    ) -> tuple[Tensor, Tensor]:
        """See `CachedRun.head_gradients` and gradients.py."""
        return head_gradients(self, position, layers, scales, readout)

    def site_gradients(
        self, sites: Sequence[Site], readout: Readout, *, n_logits: int, dropped: Sequence[int | None] = (None,)
    ) -> Iterator[Mapping[Site, Tensor]]:
        """See `CachedRun.site_gradients` and gradients.py."""
        return site_gradients(self, sites, readout, n_logits, dropped)

    @torch.no_grad()
    def edited(self, cells: Sequence[Cell], *, n_logits: int, reduce: Reduce) -> Float[Tensor, "cell metric"]:
        """Each cell's logits at the last `n_logits` positions, reduced; rows in the order of `cells`."""
        for cell in cells:
            self._check(cell)
        read_from = len(self.tokens) - n_logits
        starts = [min(read_from, *(p for edit in cell for p in edit.positions)) for cell in cells]
        layers = [min(edit.site.layer for edit in cell) for cell in cells]
        results: dict[int, Tensor] = {}
        rows_a_cell = 2 if any(is_zeroed(edit) for cell in cells for edit in cell) else 1
        room, length = self.model.room, len(self.tokens)

        def rows(start: int) -> int:
            return room.tokens // room.cost(length - start, length, n_logits) // rows_a_cell

        def climb(group: Sequence[int]) -> Tensor:
            chosen = [cells[i] for i in group], [layers[i] for i in group]
            return reduce(self._climb(starts[group[0]], *chosen, n_logits).float())

        while left := [i for i in range(len(cells)) if i not in results]:
            for group in grouped(left, starts, layers, (self.model.info.n_layers, length), rows):
                tried = len(group) * rows_a_cell * room.cost(length - starts[group[0]], length, n_logits)
                reduced = room.attempt(partial(climb, group), parts=len(group), tokens=tried, length=length)
                if reduced is None:
                    break
                results.update(zip(group, reduced, strict=True))
        return torch.stack([results[i] for i in range(len(cells))]).cpu()

    def _check(self, cell: Cell) -> None:
        if not cell:
            raise CotfaithError("A cell without edits changes nothing; give at least one ActivationEdit.")
        for edit in cell:
            outside = [p for p in edit.positions if not 0 <= p < len(self.tokens)]
            if outside or not edit.positions:
                raise CotfaithError(f"{edit}: positions {outside} lie outside the run of {len(self.tokens)} tokens.")
            if not 0 <= edit.site.layer < self.model.info.n_layers:
                last = self.model.info.n_layers - 1
                raise CotfaithError(f"{edit.site} does not exist: the model has layers 0 to {last}.")

    def _climb(
        self, start: int, cells: Sequence[Cell], layers: Sequence[int], n_logits: int
    ) -> Float[Tensor, "cell read vocab"]:
        zeroed = [(i, edits) for i, cell in enumerate(cells) for edits in shadowed_edits(cell)]
        layers = [*layers, *(layers[i] for i, _ in zeroed)]
        row_of = {cell: row for row, cell in enumerate(sorted(range(len(layers)), key=lambda i: layers[i]))}
        rows = [slice(row_of[i], row_of[i] + 1) for i in range(len(layers))]
        edits = [RowEdit(edit, rows[i], start) for i, cell in enumerate(cells) for edit in cell]
        shadows = [
            Shadow(group, rows[i], shadow) for (i, group), shadow in zip(zeroed, rows[len(cells) :], strict=True)
        ]
        d_head, cache = self.model.info.d_head, self._frozen(start)
        with (
            self._joining(Counter(layers), start),
            answer_rows(self.model.layout, n_logits, cells),
            shadowed(
                self.model.layout,
                shadows,
                [row_edit for row_edit in edits if is_replaced(row_edit.edit)],
                d_head=d_head,
                offset=start,
                cache=cache,
                edits=hooked(self.model.layout, d_head=d_head, edits=edits),
            ),
        ):
            logits = self._forward(self._row[:, start:], start, n_logits, cache)
        return logits[sent(torch.tensor([row_of[i] for i in range(len(cells))]), logits.device)]

    def _forward(
        self,
        tokens: Int[Tensor, "row pos"],
        start: int,
        keep: int,
        cache: Cache | None = None,
        positions: Int[Tensor, "row pos"] | None = None,
    ) -> Tensor:
        """Logits at the last `keep` positions of `tokens` (0: all), which stand at `start` after the frozen prefix."""
        if cache is None:
            cache = self._frozen(start)
        if positions is None:
            positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
        compacted = self.model.layout.unembed.register_forward_pre_hook(compact)
        try:
            return self.model.weights.model(
                input_ids=tokens, past_key_values=cache, position_ids=positions, use_cache=True, logits_to_keep=keep
            ).logits
        finally:
            compacted.remove()

    def _frozen(self, start: int, keeps: bool = False) -> Cache:
        return Cache(layers=[_FrozenPrefix(keys, values, start, keeps) for keys, values in self._keys_values])

    @contextmanager
    def _joining(
        self, joins: Mapping[int, int], start: int, stop: int | None = None, top: int | None = None
    ) -> Iterator[None]:
        """Rows of positions `start` to `stop` (None: all) join at their layers (n_layers: after the last); layers below
        the first, and from `top` on, are passed through.

        Undone on any exit.
        """
        decoder: Any = self.model.layout.decoder
        original, first = decoder.layers, min(joins)
        modules = [*original, self.model.layout.norm]
        handles = []
        try:
            for layer, count in joins.items():
                rows = self._residual[layer, start:stop].to(self._row.device).expand(count, -1, -1)
                hook = partial(_join, rows.clone(), layer == first)
                handles.append(modules[layer].register_forward_pre_hook(hook, with_kwargs=True))
            executed = range(first, len(original) if top is None else top)
            decoder.layers = nn.ModuleList(m if i in executed else _PassThrough() for i, m in enumerate(original))
            yield
        finally:
            decoder.layers = original
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def branches(
        self, branches: Sequence[Branch], *, reduce: Callable[[Tensor, int], Tensor], then: Then | None = None
    ) -> list[Tensor]:
        """Text variants as trees on the shared trunk, many a pass; see forest.py.

        What follows (`then`) is computed on the K/V of its batch, which are dropped with it.
        """
        pending, results, apart = dict(enumerate(branches)), dict[int, Tensor](), False
        while pending:
            for numbers, batch in self._batches(pending, apart):
                start, (rows, width) = int(batch.roots.max()), batch.tokens.shape
                done = self.model.room.attempt(
                    partial(self._finish, batch, numbers, pending, results, reduce, then),
                    parts=len(batch.placed),
                    tokens=rows * self.model.room.cost(width, start + width),
                    length=start + width,
                )
                if not done:
                    apart = rows == 1
                    break
        return [results[i] for i in range(len(branches))]

    def _batches(self, pending: Mapping[int, Branch], apart: bool) -> Iterator[tuple[list[int], Batch]]:
        """Batches of what is `pending`, and the numbers that their variants have there; each alone where `apart`."""
        room = self.model.room.tokens
        for numbers in [[number] for number in pending] if apart else [list(pending)]:
            variants = []
            for branch in (pending[number] for number in numbers):
                root = min(self._shared(branch.tokens), len(branch.tokens) - branch.n_logits)
                variants.append((root, branch.tokens[root:], branch.n_logits))
            for batch in packed(variants, room, self.model.info.d_model, KEYS_A_TOKEN * room) if variants else ():
                yield numbers, batch

    def _finish(
        self,
        batch: Batch,
        numbers: Sequence[int],
        pending: dict[int, Branch],
        results: dict[int, Tensor],
        reduce: Callable[[Tensor, int], Tensor],
        then: Then | None,
    ) -> bool:
        """Read `batch`, and let its variants go on for as long as `then` says, each round on the K/V of its cache.

        `pending` is at any time what each variant is to read next, so that it can be begun again from there.
        """
        start = int(batch.roots.max())
        cache = self._frozen(start, keeps=then is not None)
        while True:
            logits, best = self._batch_logits(batch, start, cache)
            longer = []
            for one, row in zip(batch.placed, logits, strict=True):
                if (number := numbers[one.number]) not in results:
                    results[number] = reduce(row.float(), number).cpu()
            for one, words in zip(batch.placed, best, strict=True):
                before = pending.pop(number := numbers[one.number])
                if then is not None and (branch := then(number, words)) is not None:
                    pending[number] = branch
                    n_kept = _shared_length(before.tokens, branch.tokens) - one.root
                    longer.append((one, n_kept, branch.tokens[one.root + n_kept :], branch.n_logits))
            if not longer:
                return True
            rows, batch = batch.grown(longer)
            for layer in cache.layers:
                assert isinstance(layer, _FrozenPrefix)
                layer.keep_rows(rows)

    def _batch_logits(self, batch: Batch, start: int, cache: Cache) -> tuple[Iterator[Tensor], list[Ids]]:
        """Each variant's logits `[read, vocab]` at the positions it reads, and the most likely token after each of
        these; nothing else is unembedded, and no position twice."""
        device, model = self._row.device, self.model
        reads = list(batch.reads())
        places = {place: i for i, place in enumerate(dict.fromkeys((r, s) for r, slots in reads for s in slots))}
        row, slot = torch.tensor(list(places), device=device).T
        windows = {modules.window for modules in model.layout.layers}
        masked = {window: partial(_put_mask, self._mask(batch, start, window)) for window in windows}
        with ExitStack() as stack:
            for modules in model.layout.layers:
                hook = modules.layer.register_forward_pre_hook(masked[modules.window], with_kwargs=True)
                stack.callback(hook.remove)
            only_read = model.layout.unembed.register_forward_pre_hook(
                lambda _, args: (args[0][row.to(args[0].device), slot.to(args[0].device)][None],)
            )
            stack.callback(only_read.remove)
            tokens, positions = (torch.from_numpy(a).to(device) for a in (batch.tokens, batch.positions))
            logits = self._forward(tokens, start, 0, cache, positions)[0]
        which = [[places[r, s] for s in slots] for r, slots in reads]
        best = logits.argmax(-1).tolist()
        return (logits[own] for own in which), [tuple(best[i] for i in own) for own in which]

    def _mask(self, batch: Batch, start: int, window: int | None) -> Tensor:
        """Boolean, or additive where attention is eager and would add a boolean as 0 and 1."""
        visible = torch.from_numpy(batch.visible(start, window)).to(self._row.device)
        if not self.model.is_eager:
            return visible
        dtype = self._residual.dtype
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(
            ~visible, torch.finfo(dtype).min
        )

    def _shared(self, tokens: Sequence[int]) -> int:
        return _shared_length(tokens, self.tokens)


def _shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _put_mask(
    mask: Tensor, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Layer pre-hook that puts `mask` in place of the one the model made."""
    return args, {**kwargs, "attention_mask": mask}


def _join(
    rows: Tensor, alone: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    hidden = rows if alone else torch.cat([args[0], rows.to(args[0].device)])
    return (hidden, *args[1:]), kwargs
