"""Scoped hooks on a Hugging Face decoder: one place where sites become modules and edits become assignments.

1. `Layout.of` finds the modules once and refuses a decoder it does not recognise.
2. `hooked` registers, for the span of a `with`, edits first and reads after them; all are removed on any exit.
Edits are assignments into tensors of the running pass, so an edit with the pass's own values changes no bit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CotfaithError
from ..sites import ActivationEdit, Site, SiteKind
from .traced import Cut, assign, cut_mask, heads_view, sent


@dataclass(frozen=True)
class LayerModules:
    """The modules of one decoder layer at whose input or output the sites lie, and its sliding window (None: all)."""

    layer: nn.Module
    attention: Any
    attn_out: nn.Module
    mid_norm: nn.Module
    mlp: nn.Module
    mlp_out: nn.Module
    window: int | None


@dataclass(frozen=True)
class Layout:
    """Where a decoder keeps its layers, final norm and unembedding."""

    decoder: nn.Module
    layers: tuple[LayerModules, ...]
    norm: nn.Module
    unembed: Any

    @classmethod
    def of(cls, model: Any) -> Layout:
        """Layout of a Llama-class `model`; CotfaithError names the module that is missing."""
        decoder = model.get_decoder()
        unembed = model.get_output_embeddings()
        for name in ("layers", "norm"):
            if not hasattr(decoder, name):
                raise CotfaithError(
                    f"{type(model).__name__} has no {name!r} where Llama-class decoders keep it; "
                    "load it with backend='transformer_lens'."
                )
        return cls(decoder, tuple(_layer_modules(layer) for layer in decoder.layers), decoder.norm, unembed)


def _layer_modules(layer: Any) -> LayerModules:
    missing = [name for name in ("self_attn", "mlp", "post_attention_layernorm") if not hasattr(layer, name)]
    if missing or not hasattr(layer.self_attn, "o_proj"):
        raise CotfaithError(
            f"{type(layer).__name__} lacks {', '.join(missing) or 'self_attn.o_proj'}: not a Llama-class layer; "
            "load the model with backend='transformer_lens'."
        )
    attention = layer.self_attn
    window = getattr(attention.config, "sliding_window", None)
    window = getattr(attention, "sliding_window", window)
    if hasattr(layer, "pre_feedforward_layernorm"):
        attn_out, mid_norm, mlp_out = (
            layer.post_attention_layernorm,
            layer.pre_feedforward_layernorm,
            layer.post_feedforward_layernorm,
        )
    else:
        attn_out, mid_norm, mlp_out = attention, layer.post_attention_layernorm, layer.mlp
    return LayerModules(layer, attention, attn_out, mid_norm, layer.mlp, mlp_out, window)


@torch.no_grad()
def check_residual_stream(model: Any, layout: Layout) -> None:
    """Run three tokens and see that attention and MLP add to the residual stream where the sites say.

    Raises CotfaithError on a decoder that looks like Llama and is not (norms after the blocks, scaled residuals).
    """
    if layout.unembed.weight.is_meta:  # without weights there is nothing to run
        return
    last = len(layout.layers) - 1
    kinds: tuple[SiteKind, ...] = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    tokens = torch.tensor([[1, 2, 3]], device=layout.unembed.weight.device)
    for layer in sorted({0, last}):
        sites = [Site(kind, layer) for kind in kinds]
        with hooked(layout, d_head=1, read=sites) as store:
            model(input_ids=tokens, use_cache=False, logits_to_keep=1)
        before, attention, between, mlp, after = (store[site].float().cpu() for site in sites)
        error = max(float((before + attention - between).abs().max()), float((between + mlp - after).abs().max()))
        allowed = (1e-4 if store[sites[0]].dtype == torch.float32 else 3e-2) * max(1.0, float(after.abs().max()))
        if error > allowed:
            raise CotfaithError(
                f"{type(model).__name__} is no Llama-class decoder: in layer {layer} the residual stream differs by "
                f"{error:.2g} from the sum of what attention and MLP write (allowed {allowed:.2g}), so its sites would "
                "mean something else; use a model of the Llama, Qwen, Mistral, Phi or Gemma families."
            )


@dataclass(frozen=True)
class RowEdit:
    """An ActivationEdit applied to rows `[start, stop)` of a pass whose first token stands at `offset`."""

    edit: ActivationEdit
    rows: slice
    offset: int


@contextmanager
def hooked(
    layout: Layout,
    *,
    d_head: int,
    edits: Sequence[RowEdit] = (),
    read: Sequence[Site] = (),
    keep: Callable[[Site, Tensor], Tensor] = lambda _, tensor: tensor.clone(),
) -> Iterator[dict[Site, Tensor]]:
    """Apply `edits` and collect what `keep` makes of `read` during the forwards inside; raises when a hook never fired.

    Edges zeroed after the softmax are not made here but by shadows.py.
    """
    store: dict[Site, Tensor] = {}
    fired: set[int] = set()
    cuts: dict[int, list[RowEdit]] = defaultdict(list)
    with ExitStack() as stack:
        for number, row_edit in enumerate(edits):
            site = row_edit.edit.site
            if site.kind == "pattern":
                if row_edit.edit.op == "knockout":
                    cuts[site.layer].append(row_edit)
                continue
            _attach(stack, layout, site, d_head, partial(_edit, row_edit, fired, number))
        for layer, layer_cuts in cuts.items():
            cut = partial(_cut, [plain_cut(one) for one in layer_cuts], layer_cuts[0].offset)
            handle = layout.layers[layer].layer.register_forward_pre_hook(cut, with_kwargs=True)
            stack.callback(handle.remove)
        for site in read:
            _attach(stack, layout, site, d_head, partial(_read, store, site, keep))
        yield store
        expected = {number for number, row_edit in enumerate(edits) if row_edit.edit.site.kind != "pattern"}
        silent = [str(edits[number].edit) for number in expected - fired] + [str(s) for s in read if s not in store]
        if silent:
            raise CotfaithError(f"These hooks never fired: {'; '.join(silent)}; check layer and site.")


def _attach(stack: ExitStack, layout: Layout, site: Site, d_head: int, act: Callable[[Tensor], None]) -> None:
    """Call `act` on the tensor of `site`, viewed in the layout of sites.py, each time the pass computes it."""
    if not 0 <= site.layer < len(layout.layers):
        raise CotfaithError(f"{site} does not exist: the model has layers 0 to {len(layout.layers) - 1}.")
    modules = layout.layers[site.layer]
    projection: Any = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "z": "o_proj"}.get(site.kind)
    if projection is not None:
        module = getattr(modules.attention, projection, None)
        if module is None:
            raise CotfaithError(f"{site}: this architecture fuses q, k and v; read z or the residual sites instead.")
        if site.kind == "z":
            handle = module.register_forward_pre_hook(lambda _, args: act(heads_view(args[0], d_head)))
        else:
            handle = module.register_forward_hook(lambda _, args, out: act(heads_view(out, d_head)))
    elif site.kind == "pattern":
        handle = modules.attention.register_forward_hook(lambda _, args, out: act(out[1]))
    elif site.kind == "resid_pre":
        handle = modules.layer.register_forward_pre_hook(
            lambda _, args, kwargs: act(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    elif site.kind == "resid_mid":
        handle = modules.mid_norm.register_forward_pre_hook(lambda _, args: act(args[0]))
    else:
        module = {"resid_post": modules.layer, "attn_out": modules.attn_out, "mlp_out": modules.mlp_out}[site.kind]
        handle = module.register_forward_hook(lambda _, args, out: act(out if isinstance(out, Tensor) else out[0]))
    stack.callback(handle.remove)


def _edit(row_edit: RowEdit, fired: set[int], number: int, tensor: Tensor) -> None:
    apply_edit(tensor, row_edit)
    fired.add(number)


def apply_edit(tensor: Tensor, row_edit: RowEdit) -> None:
    """Assign `row_edit` into `tensor` `[row, pos, *width]` of the running pass, in place."""
    edit = row_edit.edit
    index: Any = (row_edit.rows, _places(edit.positions, row_edit.offset, tensor))
    if edit.site.head is not None:
        index = (*index, edit.site.head)
    if edit.value is not None and edit.value.shape != tensor[index].shape[1:]:
        raise CotfaithError(
            f"{edit}: value has shape {tuple(edit.value.shape)}, the site needs {tuple(tensor[index].shape[1:])}."
        )
    assign(tensor, index, edit.op, edit.value)


def _places(positions: Sequence[int], offset: int, tensor: Tensor) -> slice | Tensor:
    """Index of `positions` in `tensor` `[row, pos, *width]` of a pass that begins at `offset`.

    A slice, which needs no copy to the device, where they lie inside and follow one another.
    """
    places = [position - offset for position in positions]
    first, end = places[0], places[0] + len(places)
    if first >= 0 and end <= tensor.shape[1] and places == list(range(first, end)):
        return slice(first, end)
    return sent(torch.tensor(places), tensor.device)


def _read(store: dict[Site, Tensor], site: Site, keep: Callable[[Site, Tensor], Tensor], tensor: Tensor) -> None:
    if site.head is not None:
        tensor = tensor[:, site.head] if site.kind == "pattern" else tensor[..., site.head, :]
    store[site] = keep(site, tensor)


def plain_cut(cut: RowEdit) -> Cut:
    """The edges that a knockout cuts, as traced.py takes them."""
    return cut.rows, cut.edit.site.head, [p - cut.offset for p in cut.edit.positions], cut.edit.keys


def _cut(
    cuts: Sequence[Cut], offset: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Layer pre-hook that takes the cut edges out of whatever mask the model made for itself."""
    hidden = args[0] if args else kwargs["hidden_states"]
    n_heads = module.self_attn.config.num_attention_heads
    mask = cut_mask(cuts, offset, hidden, kwargs.get("attention_mask"), n_heads)
    return args, {**kwargs, "attention_mask": mask}
