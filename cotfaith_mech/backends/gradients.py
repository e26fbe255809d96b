"""Gradients of a readout of one base run, through the model's own modules.

1. Into the heads of one position: that position alone is run on the frozen prefix. Layer l is read with its z scaled by
   each of some numbers, in rows that join at l as in corner.py, so one backward pass serves every layer and scale.
2. Into sites of the whole run: one forward pass, and a backward pass for each layer that is to pass no gradient.
The readout of a batch is summed, rows do not mix, so every row has its own gradient. Parameters get none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import CotfaithError
from ..model import Readout
from ..sites import Site
from .hooks import Layout
from .traced import heads_view

if TYPE_CHECKING:
    from .corner import CornerRun


def head_gradients(
    run: CornerRun, position: int, layers: Sequence[int], scales: Sequence[float], readout: Readout
) -> tuple[Float[Tensor, "layer scale head d_head"], Float[Tensor, "layer scale"]]:
    """d readout / d z at `position`, every head's z of one of `layers` scaled by each of `scales`; and the readouts."""
    pairs = [(layer, scale) for layer in sorted(layers) for scale in scales]

    def part(chosen: Sequence[tuple[int, float]]) -> tuple[Tensor, Tensor]:
        return _scaled_rows(run, position, chosen, readout)

    found = run.model.room.in_parts(part, pairs, 2 * (position + 1), position + 1)
    gradients, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    return tuple(each.unflatten(0, (len(layers), len(scales))) for each in (gradients, values))  # pyright: ignore[reportReturnType]


def _scaled_rows(
    run: CornerRun, position: int, pairs: Sequence[tuple[int, float]], readout: Readout
) -> tuple[Tensor, Tensor]:
    """One row a pair of layer and scale, sorted by layer: gradients `[row, head, d_head]` and readouts `[row]`."""
    layers = [layer for layer, _ in pairs]
    leaves: dict[int, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        joins = {layer: layers.count(layer) for layer in sorted(set(layers))}
        stack.enter_context(run._joining(joins, position, position + 1))
        for layer in set(layers):
            scale = torch.tensor([scale for at, scale in pairs if at == layer], device=run.model.info.device)
            o_proj = run.model.layout.layers[layer].attention.o_proj
            stack.callback(o_proj.register_forward_pre_hook(partial(_scale, leaves, layer, scale)).remove)
        logits = run._forward(run._row[:, position : position + 1], position, 1)
        values = readout(logits.float())
        gradients = torch.autograd.grad(values.sum(), [leaves[layer] for layer in sorted(leaves)])
    z = torch.cat([gradient.to(values.device) for gradient in gradients])[:, 0]
    return heads_view(z, run.model.info.d_head).float().cpu(), values.detach().cpu()


def _scale(
    leaves: dict[int, Tensor], layer: int, scale: Float[Tensor, "own"], module: Any, args: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Scales z of the rows that have just joined, the last ones, and keeps what was scaled as a leaf."""
    z, n = args[0], len(scale)
    leaf = (z[-n:] * scale[:, None, None].to(z)).detach().requires_grad_()
    leaves[layer] = leaf
    return (torch.cat([z[:-n], leaf]), *args[1:])


def site_gradients(
    run: CornerRun, sites: Sequence[Site], readout: Readout, n_logits: int, dropped: Sequence[int | None]
) -> Iterator[dict[Site, Tensor]]:
    """d readout / d z, q, k or v `[pos, head, d_head]` of the whole run, once for each of `dropped`: a layer through
    whose attention and MLP no gradient goes (None: through all). The next is computed when it is asked for."""
    seen: dict[Site, Tensor] = {}
    closed: list[int | None] = [None]
    layout, d_head = run.model.layout, run.model.info.d_head

    def forward() -> Tensor:
        with ExitStack() as stack, torch.enable_grad():
            for site in sites:
                _keep(stack, layout, site, seen)
            stack.callback(layout.layers[0].layer.register_forward_pre_hook(_rooted, with_kwargs=True).remove)
            for number, modules in enumerate(layout.layers):
                for module in (modules.attn_out, modules.mlp_out):
                    stack.callback(module.register_forward_hook(partial(_gate, closed, number)).remove)
            logits = run.model.weights.model(input_ids=run._row, use_cache=False, logits_to_keep=n_logits).logits
            return readout(logits.float()).sum()

    def alone(compute: Callable[[], Any]) -> Any:
        return run.model.room.attempt(compute, parts=1, tokens=len(run.tokens), length=len(run.tokens))

    total = alone(forward)
    for number, layer in enumerate(dropped):
        closed[0] = layer
        last = number == len(dropped) - 1
        gradients = alone(
            lambda last=last: torch.autograd.grad(
                total, [seen[site] for site in sites], retain_graph=not last, allow_unused=True
            )
        )
        yield {
            site: torch.zeros_like(heads_view(seen[site][0], d_head)) if g is None else heads_view(g[0], d_head).float()
            for site, g in zip(sites, gradients, strict=True)
        }


def _keep(stack: ExitStack, layout: Layout, site: Site, seen: dict[Site, Tensor]) -> None:
    """Put the flat tensor of a q, k, v or z site into `seen` when the pass computes it."""
    attention = layout.layers[site.layer].attention
    if site.kind == "z":
        hook = attention.o_proj.register_forward_pre_hook(lambda _, args: seen.update({site: args[0]}))
        stack.callback(hook.remove)
        return
    projection = getattr(attention, f"{site.kind}_proj", None)
    if projection is None:
        raise CotfaithError(f"{site}: this architecture fuses q, k and v; take gradients at z instead.")
    hook = projection.register_forward_hook(lambda _, args, out: seen.update({site: out}))
    stack.callback(hook.remove)


def _rooted(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The graph begins at the embedded tokens where no parameter of the model takes gradients."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    if not hidden.requires_grad:
        hidden.requires_grad_()


def _gate(closed: list[int | None], number: int, module: Any, args: Any, out: Any) -> None:
    """Lets no gradient back through what this module wrote while its layer is the closed one."""
    written = out if isinstance(out, Tensor) else out[0]
    written.register_hook(lambda gradient: gradient * (closed[0] != number))
