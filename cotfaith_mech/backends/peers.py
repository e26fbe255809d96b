"""The peers' own patching routines on given cells, for `cotfaith bench`: as their users would write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

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
        with torch.no_grad():
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
