"""What is done to the tensors of a pass, in plain values: hooks.py does it in this process, a trace where the model is.

For NDIF nnsight sends the source of these functions along with a request, so they use torch, numpy and each other, and
nothing else of this package. `no_type_check` keeps checkers at run time from wrapping them: wrappers cannot be sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, no_type_check

import numpy as np
import torch
from torch import Tensor

Cut = tuple[slice, int | None, Sequence[int], Sequence[int]]
"""Edges to be cut: rows, head (None: all), the places of queries in the pass, and keys."""


@no_type_check
def heads_view(flat: Tensor, d_head: int) -> Tensor:
    return flat.view(*flat.shape[:-1], -1, d_head)


@no_type_check
def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor`, made on the host, on `device`; from pinned memory to a GPU, so that the host does not wait for it."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@no_type_check
def assign(tensor: Tensor, index: Any, op: str, value: Tensor | None) -> None:
    """Replace, add to, or zero what stands at `index` of `tensor`, in place."""
    if value is None:
        tensor[index] = 0
        return
    value = value.to(device=tensor.device, dtype=tensor.dtype)
    tensor[index] = value if op == "replace" else tensor[index] + value


@no_type_check
def cut_mask(cuts: Sequence[Cut], offset: int, hidden: Tensor, mask: Tensor | None, n_heads: int) -> Tensor:
    """`mask` (None: causal; boolean; or additive) without the edges of `cuts`, `[row, head, query, key]`, in a pass
    that begins at `offset`; a query's own key stays."""
    n_query = hidden.shape[1]
    n_key = n_query + offset if mask is None else mask.shape[-1]
    per_head = any(head is not None for _, head, _, _ in cuts)
    blocked = np.zeros((hidden.shape[0], n_heads if per_head else 1, n_query, n_key), dtype=bool)
    for rows, head, queries, keys in cuts:
        places = np.array(queries, dtype=int)
        edges = np.zeros((n_query, n_key), dtype=bool)
        edges[np.ix_(places, np.array(keys, dtype=int))] = True
        edges[places, places + offset] = False
        blocked[rows, slice(None) if head is None else head] |= edges
    device = hidden.device if mask is None else mask.device
    forbidden = sent(torch.from_numpy(blocked), device)
    if mask is None:
        places_of = torch.arange(n_query, device=device)[:, None] + offset
        mask = (places_of >= torch.arange(n_key, device=device))[None, None]
    if mask.dtype == torch.bool:
        return mask & ~forbidden
    return mask.masked_fill(forbidden, torch.finfo(mask.dtype).min)


@no_type_check
def perform(model: Any, step: Mapping[str, Any], found: dict[int, Tensor]) -> None:
    """One step of a trace of nnsight's `model`: cut edges, edit a tensor, or put down in `found` what is read."""
    module, do = model.get(step["module"]), step["do"]
    if do == "cut":
        args, kwargs = module.inputs
        hidden = args[0] if args else kwargs["hidden_states"]
        mask = cut_mask(step["cuts"], 0, hidden, kwargs.get("attention_mask"), step["n_heads"])
        module.inputs = (args, {**kwargs, "attention_mask": mask})
        return
    tensor = module.input if step["port"] == "input" else module.output
    if not isinstance(tensor, Tensor):
        tensor = tensor[step["port"] == "weights"]
    if step["d_head"]:
        tensor = heads_view(tensor, step["d_head"])
    if do == "read":
        found[step["number"]] = tensor[step["index"]].clone()
    else:
        assign(tensor, step["index"], do, step["value"])
