"""nnsight 0.8 behind the Model boundary: `TransformersModel` around a structural clone that shares the parameters.

nnsight wraps every module's forward in place; the clone keeps the original free of it. nnsight runs the body of a
`with` itself and waits for modules in the order they execute, so edits and reads are sorted into that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import CotfaithError
from ..model import CachedRun, PlainRun, Run
from ..sites import ActivationEdit, Site
from .hooks import Layout, RowEdit, apply_edit, cut_mask, heads_view
from .text import TextSide
from .transformer_lens import structural_clone
from .weights import Weights

_ORDER = ("knockout", "resid_pre", "q", "k", "v", "z", "pattern", "attn_out", "resid_mid", "mlp_out", "resid_post")


class NnsightModel(TextSide):
    """Plain forwards by nnsight tracing; its counterfactuals take the plain path."""

    def __init__(self, weights: Weights) -> None:
        from nnsight import TransformersModel

        super().__init__(weights, "nnsight")
        self._clone = structural_clone(weights.model)
        self._traced: Any = TransformersModel(self._clone, tokenizer=weights.tokenizer)
        self._clone_layout = Layout.of(self._clone)
        self._paths = {id(module): name for name, module in self._clone.named_modules()}

    @torch.no_grad()
    def run(
        self,
        tokens: Int[Tensor, "batch pos"],
        *,
        read: Sequence[Site] = (),
        edits: Sequence[ActivationEdit] = (),
        n_logits: int = 1,
    ) -> Run:
        """See `Model.run`. Reading a pattern needs eager attention, which the clone uses for that pass."""
        for edit in edits:
            if edit.site.kind == "pattern" and edit.op != "knockout":
                raise CotfaithError(f"{edit}: nnsight sees no weights between softmax and values; use huggingface.")
        for site in (*read, *(edit.site for edit in edits)):
            if not 0 <= site.layer < self.info.n_layers:
                raise CotfaithError(f"{site} does not exist: the model has layers 0 to {self.info.n_layers - 1}.")
        config = self._clone.config.get_text_config()
        before = config._attn_implementation
        if any(site.kind == "pattern" for site in read):
            config._attn_implementation = "eager"
        work = _in_order(edits, read)
        try:
            with self._traced.trace(tokens, use_cache=False, logits_to_keep=n_logits):
                store: Any = dict().save()  # noqa: C408  # pyright: ignore[reportAttributeAccessIssue]
                for item in work:
                    self._do(item, store)
                logits = self._traced.output.logits.save()
        finally:
            config._attn_implementation = before
        return Run(logits, dict(store))

    @torch.no_grad()
    def run_batch(
        self, tokens: Int[Tensor, "1 pos"], cells: Sequence[Sequence[ActivationEdit]], *, n_logits: int
    ) -> Float[Tensor, "cell read vocab"]:
        """Logits of several counterfactuals as invokes of one forward.

        All cells share one attention mask, so their knockouts are made by one more invoke that sees every row.
        """
        rows: list[Tensor] = []
        cuts = [RowEdit(e, slice(i, i + 1), 0) for i, cell in enumerate(cells) for e in cell if e.op == "knockout"]
        with self._traced.trace(use_cache=False, logits_to_keep=n_logits) as tracer:
            rows = list().save()  # noqa: C408  # pyright: ignore[reportAttributeAccessIssue]
            for cell in cells:
                with tracer.invoke(tokens):
                    for edit in _in_order([edit for edit in cell if edit.op != "knockout"], ()):
                        self._do(edit, {})
                    rows.append(self._traced.output.logits)
            if cuts:
                with tracer.invoke():
                    for layer in sorted({cut.edit.site.layer for cut in cuts}):
                        self._cut([cut for cut in cuts if cut.edit.site.layer == layer])
        return torch.cat(list(rows))

    def cached_run(self, tokens: Sequence[int]) -> CachedRun:
        return PlainRun(self, tokens)

    def _do(self, item: ActivationEdit | Site, store: dict[Site, Tensor]) -> None:
        site = item if isinstance(item, Site) else item.site
        if isinstance(item, ActivationEdit) and item.op == "knockout":
            self._cut([RowEdit(item, slice(None), 0)])
            return
        tensor = self._tensor(site)
        if isinstance(item, ActivationEdit):
            apply_edit(tensor, RowEdit(item, slice(None), 0))
            return
        if site.head is not None:
            tensor = tensor[:, site.head] if site.kind == "pattern" else tensor[..., site.head, :]
        store[site] = tensor.clone()

    def _cut(self, cuts: Sequence[RowEdit]) -> None:
        """Take the edges of `cuts`, all of one layer, out of the mask that this layer is given."""
        layer = self._envoy(self._clone_layout.layers[cuts[0].edit.site.layer].layer)
        args, kwargs = layer.inputs
        hidden = args[0] if args else kwargs["hidden_states"]
        mask = cut_mask(cuts, hidden, kwargs.get("attention_mask"), self.info.n_heads)
        layer.inputs = (args, {**kwargs, "attention_mask": mask})

    def _tensor(self, site: Site) -> Tensor:
        modules = self._clone_layout.layers[site.layer]
        if site.kind in ("q", "k", "v"):
            return heads_view(self._envoy(getattr(modules.attention, f"{site.kind}_proj")).output, self.info.d_head)
        if site.kind == "z":
            return heads_view(self._envoy(modules.attention.o_proj).input, self.info.d_head)
        if site.kind == "pattern":
            return self._envoy(modules.attention).output[1]
        if site.kind == "resid_pre":
            return self._envoy(modules.layer).input
        if site.kind == "resid_mid":
            return self._envoy(modules.mid_norm).input
        module = {"resid_post": modules.layer, "attn_out": modules.attn_out, "mlp_out": modules.mlp_out}[site.kind]
        out = self._envoy(module).output
        return out if isinstance(out, Tensor) else out[0]

    def _envoy(self, module: Any) -> Any:
        return self._traced.get(self._paths[id(module)])


def _in_order(edits: Sequence[ActivationEdit], read: Sequence[Site]) -> list[ActivationEdit | Site]:
    """Edits and reads in the order the modules run; at one site edits before reads."""

    def key(item: ActivationEdit | Site) -> tuple[int, int, bool]:
        site = item if isinstance(item, Site) else item.site
        kind = "knockout" if isinstance(item, ActivationEdit) and item.op == "knockout" else site.kind
        return site.layer, _ORDER.index(kind), isinstance(item, Site)

    return sorted([*edits, *read], key=key)
