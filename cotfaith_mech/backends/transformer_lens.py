"""TransformerLens 4 behind the Model boundary: `TransformerBridge` on a structural clone that shares the parameters.

The bridge changes the model it is given in place (eager attention, bridged blocks); the clone keeps the original as it
is. Raw weights, no compatibility mode. Tokens go in, never text, so no BOS is added. Site names are the bridge's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import CotfaithError
from ..model import CachedRun, PlainRun, Run
from ..sites import ActivationEdit, Site
from .hooks import RowEdit, apply_edit
from .text import TextSide
from .weights import Weights, is_sharded


def structural_clone(model: Any) -> Any:
    """A copy of the module tree on the same parameter and buffer tensors: no memory, no effect on the original."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _tokenizer_as_is(weights: Weights) -> Any:
    """A copy that the bridge takes as it is: it would otherwise load the tokenizer again by name, from the hub."""
    tokenizer = copy.deepcopy(weights.tokenizer)
    tokenizer.init_kwargs |= {"name_or_path": weights.name, "add_bos_token": True}
    return tokenizer


class TransformerLensModel(TextSide):
    """Plain forwards of the bridge with TransformerLens hooks; its counterfactuals take the plain path."""

    def __init__(self, weights: Weights) -> None:
        from transformer_lens.model_bridge import TransformerBridge

        super().__init__(weights, "transformer_lens")
        if is_sharded(weights.model) or len({parameter.device for parameter in weights.model.parameters()}) > 1:
            raise CotfaithError(
                f"{weights.name!r} is spread over several devices and TransformerLens takes one; use the huggingface "
                "backend, with crosscheck_cells: 0 in a study."
            )
        self.bridge: Any = TransformerBridge.boot_transformers(
            weights.name,
            hf_model=structural_clone(weights.model),
            tokenizer=_tokenizer_as_is(weights),
            dtype=next(weights.model.parameters()).dtype,
            device=self.info.device,
        )

    @torch.no_grad()
    def run(
        self,
        tokens: Int[Tensor, "batch pos"],
        *,
        read: Sequence[Site] = (),
        edits: Sequence[ActivationEdit] = (),
        n_logits: int = 1,
    ) -> Run:
        """See `Model.run`."""
        fired: set[str] = set()
        store: dict[Site, Tensor] = {}
        hooks = [_edit_hook(edit, fired) for edit in edits if edit.site.kind != "resid_mid"]
        hooks += [(_name(site), _reader(store, site)) for site in read]
        hooks += [hook for edit in edits if edit.site.kind == "resid_mid" for hook in _mid_hooks(edit, fired)]
        for name, _ in hooks:
            if name not in self.bridge.hook_dict:
                raise CotfaithError(
                    f"TransformerLens has no hook {name!r} on {self.info.architecture}; use huggingface."
                )
        logits = self.bridge.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits", prepend_bos=False)
        silent = [str(edit) for edit in edits if str(edit) not in fired] + [str(s) for s in read if s not in store]
        if silent:
            raise CotfaithError(f"These hooks never fired: {'; '.join(silent)}; check layer and site.")
        return Run(logits[:, -n_logits:], store)

    def cached_run(self, tokens: Sequence[int]) -> CachedRun:
        return PlainRun(self, tokens)


def _name(site: Site) -> str:
    return str(site).partition("[")[0]


def _reader(store: dict[Site, Tensor], site: Site) -> Callable[..., None]:
    def hook(tensor: Tensor, hook: Any) -> None:
        if site.head is not None:
            tensor = tensor[:, site.head] if site.kind == "pattern" else tensor[..., site.head, :]
        store[site] = tensor.clone()

    return hook


def _edit_hook(edit: ActivationEdit, fired: set[str]) -> tuple[str, Callable[..., Tensor]]:
    if edit.site.kind == "pattern" and edit.op == "zero":
        return _name(edit.site), _zeroer(edit, fired)
    if edit.site.kind == "pattern" and edit.op == "replace":
        return _name(edit.site), _weigher(edit, fired)
    if edit.op == "knockout":
        return f"blocks.{edit.site.layer}.attn.hook_attn_scores", _cutter(edit, fired)
    return _name(edit.site), _editor(edit, fired)


def _editor(edit: ActivationEdit, fired: set[str]) -> Callable[..., Tensor]:
    def hook(tensor: Tensor, hook: Any) -> Tensor:
        tensor = tensor.clone()
        apply_edit(tensor, RowEdit(edit, slice(None), 0))
        fired.add(str(edit))
        return tensor

    return hook


def _mid_hooks(edit: ActivationEdit, fired: set[str]) -> list[tuple[str, Callable[..., Tensor | None]]]:
    """An edit of the residual between attention and MLP, made by way of hook_attn_out.

    The bridge's hook_resid_mid stands at the input of the second norm: an edit there leaves the residual stream itself
    as it was (4.3.0), so it cannot be used. Where the edit leaves the residual's own value, attn_out keeps its bits.
    Registered after all reads: attn_out is read as attention wrote it.
    """
    residual: list[Tensor] = []

    def keep(resid_pre: Tensor, hook: Any) -> None:
        residual[:] = [resid_pre.clone()]

    def write(attn_out: Tensor, hook: Any) -> Tensor:
        before = residual[0] + attn_out
        after = before.clone()
        apply_edit(after, RowEdit(edit, slice(None), 0))
        fired.add(str(edit))
        return torch.where(after == before, attn_out, after - residual[0])

    return [(f"blocks.{edit.site.layer}.hook_resid_pre", keep), (f"blocks.{edit.site.layer}.hook_attn_out", write)]


def _zeroer(edit: ActivationEdit, fired: set[str]) -> Callable[..., Tensor]:
    def hook(pattern: Tensor, hook: Any) -> Tensor:
        pattern = pattern.clone()
        heads = slice(None) if edit.site.head is None else edit.site.head
        for query in edit.positions:
            pattern[:, heads, query, list(edit.keys)] = 0
        fired.add(str(edit))
        return pattern

    return hook


def _weigher(edit: ActivationEdit, fired: set[str]) -> Callable[..., Tensor]:
    heads = slice(None) if edit.site.head is None else slice(edit.site.head, edit.site.head + 1)

    def hook(pattern: Tensor, hook: Any) -> Tensor:
        pattern = pattern.clone()
        for query, weights in zip(edit.positions, edit.value.to(pattern), strict=True):
            pattern[:, heads, query] = 0
            pattern[:, heads, query, : weights.shape[-1]] = weights
        fired.add(str(edit))
        return pattern

    return hook


def _cutter(edit: ActivationEdit, fired: set[str]) -> Callable[..., Tensor]:
    def hook(scores: Tensor, hook: Any) -> Tensor:
        scores = scores.clone()
        heads = slice(None) if edit.site.head is None else edit.site.head
        for query in edit.positions:
            keys = [key for key in edit.keys if key != query]
            scores[:, heads, query, keys] = torch.finfo(scores.dtype).min
        fired.add(str(edit))
        return scores

    return hook
