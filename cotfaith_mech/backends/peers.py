"""The peers' own routines on given cells and texts, for `cotfaith bench`: as their users would write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..model import Branch, PlainRun, Reduce, Then
from ..sites import ActivationEdit

Cells = Sequence[Sequence[ActivationEdit]]


def transformer_lens_patch(
    model: Any, base: Int[Tensor, "1 pos"], source: Int[Tensor, "1 pos"], reduce: Reduce
) -> Callable[[Cells], Float[Tensor, "cell"]]:
    """`generic_activation_patch` with the source cached beforehand; for edges, hooks on the attention scores.

    Cells are alike: each one edit of the same kind, or edges of one step cut in all layers.
    """
    bridge: Any = model.bridge
    with torch.no_grad():
        _, cache = bridge.run_with_cache(
            source, names_filter=lambda name: name.endswith(("hook_resid_pre", "attn.hook_z"))
        )

    def patch(cells: Cells) -> Float[Tensor, "cell"]:
        kind = cells[0][0].site.kind
        with torch.no_grad(), redirect_stderr(StringIO()):
            if kind == "pattern":
                return torch.stack([_cut_scores(bridge, base, cell, reduce) for cell in cells])
            return _generic_patch(bridge, base, cache, kind, cells, reduce)

    return patch


def _generic_patch(
    bridge: Any, base: Int[Tensor, "1 pos"], cache: Any, kind: str, cells: Cells, reduce: Reduce
) -> Float[Tensor, "cell"]:
    """One position takes TransformerLens's own setter, a span or a head its like."""
    from transformer_lens.patching import generic_activation_patch, layer_pos_patch_setter

    edits = [cell[0] for cell in cells]
    if kind == "resid_pre" and all(len(edit.positions) == 1 for edit in edits):
        setter: Any = layer_pos_patch_setter
        index: dict[str, Any] = {"pos": [edit.positions[0] for edit in edits]}
    else:
        setter = _span_setter
        index = {"first": [edit.positions[0] for edit in edits], "last": [edit.positions[-1] for edit in edits]}
        if kind == "z":
            setter, index = _head_span_setter, {**index, "head": [edit.site.head for edit in edits]}
    frame = pd.DataFrame({"layer": [edit.site.layer for edit in edits], **index})

    def metric(logits: Float[Tensor, "1 pos vocab"]) -> Float[Tensor, ""]:
        return reduce(logits)[0, 0]

    return generic_activation_patch(bridge, base, cache, metric, setter, kind, index_df=frame).flatten()


def _span_setter(corrupted: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
    _, first, last = index
    corrupted[:, first : last + 1] = clean[:, first : last + 1]
    return corrupted


def _head_span_setter(corrupted: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
    _, first, last, head = index
    corrupted[:, first : last + 1, head] = clean[:, first : last + 1, head]
    return corrupted


def _cut_scores(
    bridge: Any, base: Int[Tensor, "1 pos"], cell: Sequence[ActivationEdit], reduce: Reduce
) -> Float[Tensor, ""]:
    """Edges from one span of queries to an earlier span of keys, cut in every layer of the cell."""
    queries, keys = (slice(at[0], at[-1] + 1) for at in (cell[0].positions, cell[0].keys))

    def cut(scores: Tensor, hook: Any) -> Tensor:
        scores[:, :, queries, keys] = -torch.inf
        return scores

    hooks = [(f"blocks.{edit.site.layer}.attn.hook_attn_scores", cut) for edit in cell]
    return reduce(bridge.run_with_hooks(base, fwd_hooks=hooks))[0, 0]


def nnsight_patch(
    model: Any, base: Int[Tensor, "1 pos"], reduce: Reduce, invokes: int = 16
) -> Callable[[Cells], Float[Tensor, "cell"]]:
    """Several invokes of one forward, `invokes` cells a batch."""

    def patch(cells: Cells) -> Float[Tensor, "cell"]:
        batches = [cells[first : first + invokes] for first in range(0, len(cells), invokes)]
        return torch.cat([reduce(model.run_batch(base, batch, n_logits=1)) for batch in batches]).flatten()

    return patch


class PlainBatches(PlainRun):
    """Text variants the straightforward way: whole forward passes of the model, several left-padded texts a batch."""

    size = 16

    @torch.no_grad()
    def branches(
        self, branches: Sequence[Branch], *, reduce: Callable[[Tensor, int], Tensor], then: Then | None = None
    ) -> list[Tensor]:
        results = []
        for first in range(0, len(branches), self.size):
            batch = branches[first : first + self.size]
            width, keep = max(len(b.tokens) for b in batch), max(b.n_logits for b in batch)
            padding = [width - len(b.tokens) for b in batch]
            ids = torch.tensor([[0] * n + list(b.tokens) for n, b in zip(padding, batch, strict=True)])
            mask = torch.tensor([[0] * n + [1] * (width - n) for n in padding])
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            device = self.model.info.device
            logits = self.model.weights.model(
                **{name: value.to(device) for name, value in inputs.items()}, use_cache=False, logits_to_keep=keep
            ).logits
            for index, (row, b) in enumerate(zip(logits, batch, strict=True), first):
                read = row[keep - b.n_logits :].float()
                results.append(reduce(read, index).cpu())
                self._follow(index, read, then)
        return results
