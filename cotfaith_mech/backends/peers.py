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

from ..model import Branch, PlainRun, Then
from ..sites import ActivationEdit, Site

LayerToken = Sequence[tuple[int, int]]
Metric = Callable[[Float[Tensor, "batch pos vocab"]], Tensor]


def transformer_lens_patch(
    model: Any, base: Int[Tensor, "1 pos"], source: Int[Tensor, "1 pos"], metric: Metric
) -> Callable[[LayerToken], Float[Tensor, "cell"]]:
    """`generic_activation_patch` on resid_pre; the source is cached beforehand, outside the timing."""
    from transformer_lens.patching import generic_activation_patch, layer_pos_patch_setter

    bridge: Any = model.bridge
    with torch.no_grad():
        _, cache = bridge.run_with_cache(source, names_filter=lambda name: name.endswith("hook_resid_pre"))

    def patch(cells: LayerToken) -> Float[Tensor, "cell"]:
        index = pd.DataFrame(list(cells), columns=["layer", "pos"])
        with torch.no_grad(), redirect_stderr(StringIO()):
            return generic_activation_patch(
                bridge, base, cache, metric, layer_pos_patch_setter, "resid_pre", index_df=index
            ).flatten()

    return patch


def nnsight_patch(
    model: Any, base: Int[Tensor, "1 pos"], source: dict[Site, Tensor], metric: Metric, invokes: int = 16
) -> Callable[[LayerToken], Float[Tensor, "cell"]]:
    """Several invokes of one forward, `invokes` cells a batch."""

    def patch(cells: LayerToken) -> Float[Tensor, "cell"]:
        rows = []
        for first in range(0, len(cells), invokes):
            edits = []
            for layer, pos in cells[first : first + invokes]:
                site = Site("resid_pre", layer)
                edits.append([ActivationEdit(site, (pos,), "replace", source[site][pos : pos + 1])])
            rows += [metric(logits[None]) for logits in model.run_batch(base, edits, n_logits=1)]
        return torch.stack(rows).flatten()

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
