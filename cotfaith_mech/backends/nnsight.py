"""nnsight 0.8 behind the Model boundary: `TransformersModel` around a structural clone that shares the parameters.

nnsight wraps every module's forward in place; the clone keeps the original free of it. nnsight runs the body of a
`with` itself and waits for modules in the order they execute, so edits and reads are sorted into that order. A trace
holds plain values and the functions of traced.py alone, so that it can be sent to where the model is.
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
from .hooks import Layout, RowEdit, plain_cut
from .text import TextSide
from .traced import perform
from .transformer_lens import structural_clone
from .weights import Weights, is_sharded

_ORDER = ("knockout", "resid_pre", "q", "k", "v", "z", "pattern", "attn_out", "resid_mid", "mlp_out", "resid_post")


class NnsightModel(TextSide):
    """Plain forwards by nnsight tracing; its counterfactuals take the plain path.

    `remote`: nnsight's own argument: True sends each trace to NDIF, "local" plays that through in this process.
    `traced`: a `TransformersModel` to use as it is; without one a clone of the weights' model is wrapped, or the model
    itself where it is sharded: then every process makes the same calls, and gets the same whole tensors.
    """

    def __init__(self, weights: Weights, *, remote: bool | str = False, traced: Any = None) -> None:
        import nnsight

        super().__init__(weights, "nnsight")
        nnsight.register(perform.__module__)
        whole = traced is None and not is_sharded(weights.model)
        self._clone = structural_clone(weights.model) if whole else weights.model
        if is_sharded(weights.model):
            _show_where_plans_are()
        self._traced: Any = traced or nnsight.TransformersModel(self._clone, tokenizer=weights.tokenizer)
        self._remote = remote
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
        self._check(read, edits)
        steps = [self._step(item, number) for number, item in enumerate(_in_order(edits, read))]
        sites = {number: item for number, item in enumerate(_in_order(edits, read)) if isinstance(item, Site)}
        model, config = self._traced, self._clone.config.get_text_config()
        before = config._attn_implementation
        if any(site.kind == "pattern" for site in read):
            config._attn_implementation = "eager"
        try:
            with model.trace(tokens, use_cache=False, logits_to_keep=n_logits, remote=self._remote):
                found: Any = dict().save()  # noqa: C408  # pyright: ignore[reportAttributeAccessIssue]
                for step in steps:
                    perform(model, step, found)
                logits = model.output.logits.save()
        finally:
            config._attn_implementation = before
        return Run(logits, {site: found[number].to(tokens.device) for number, site in sites.items()})

    @torch.no_grad()
    def run_batch(
        self, tokens: Int[Tensor, "1 pos"], cells: Sequence[Sequence[ActivationEdit]], *, n_logits: int
    ) -> Float[Tensor, "cell read vocab"]:
        """Logits of several counterfactuals as invokes of one forward.

        All cells share one attention mask, so their knockouts are made by one more invoke that sees every row.
        """
        model = self._traced
        rows: list[Tensor] = []
        steps = [
            [self._step(edit, 0) for edit in _in_order([edit for edit in cell if edit.op != "knockout"], ())]
            for cell in cells
        ]
        all_cuts = [RowEdit(e, slice(i, i + 1), 0) for i, cell in enumerate(cells) for e in cell if e.op == "knockout"]
        layers = sorted({cut.edit.site.layer for cut in all_cuts})
        cuts = [self._cut([cut for cut in all_cuts if cut.edit.site.layer == layer]) for layer in layers]
        with model.trace(use_cache=False, logits_to_keep=n_logits) as tracer:
            rows = list().save()  # noqa: C408  # pyright: ignore[reportAttributeAccessIssue]
            for own in steps:
                with tracer.invoke(tokens):
                    for step in own:
                        perform(model, step, {})
                    rows.append(model.output.logits)
            if cuts:
                with tracer.invoke():
                    for step in cuts:
                        perform(model, step, {})
        return torch.cat(list(rows))

    def cached_run(self, tokens: Sequence[int]) -> CachedRun:
        return PlainRun(self, tokens)

    def _check(self, read: Sequence[Site], edits: Sequence[ActivationEdit]) -> None:
        info = self.info
        for site in (*read, *(edit.site for edit in edits)):
            if not 0 <= site.layer < info.n_layers:
                raise CotfaithError(f"{site} does not exist: the model has layers 0 to {info.n_layers - 1}.")
        by_head = [*read, *(edit.site for edit in edits if edit.site.head is not None)]
        if is_sharded(self._clone) and any(site.kind == "pattern" for site in by_head):
            raise CotfaithError(
                f"Under torchrun no process sees the attention of all heads of {info.name!r}; cut edges of all heads "
                "at once, and read other sites."
            )
        for edit in edits:
            if edit.site.kind == "pattern" and edit.op != "knockout":
                raise CotfaithError(f"{edit}: nnsight sees no weights between softmax and values; use huggingface.")
            if edit.value is None:
                continue
            heads = {"z": info.n_heads, "q": info.n_heads, "k": info.n_kv_heads, "v": info.n_kv_heads}
            width = (heads[edit.site.kind], info.d_head) if edit.site.kind in heads else (info.d_model,)
            needed = (len(edit.positions), *(width if edit.site.head is None else width[1:]))
            if edit.value.shape != needed:
                raise CotfaithError(f"{edit}: value has shape {tuple(edit.value.shape)}, the site needs {needed}.")

    def _step(self, item: ActivationEdit | Site, number: int) -> dict[str, Any]:
        """`item` in the plain values of traced.py; what is read is put down under `number`."""
        if isinstance(item, Site):
            index: tuple[Any, ...] = (...,)
            if item.head is not None:
                index = (slice(None), item.head) if item.kind == "pattern" else (..., item.head, slice(None))
            return {"do": "read", "number": number, "index": index, **self._place(item)}
        if item.op == "knockout":
            return self._cut([RowEdit(item, slice(None), 0)])
        index = (slice(None), list(item.positions)) + (() if item.site.head is None else (item.site.head,))
        return {"do": item.op, "index": index, "value": item.value, **self._place(item.site)}

    def _cut(self, cuts: Sequence[RowEdit]) -> dict[str, Any]:
        """Takes the edges of `cuts`, all of one layer, out of the mask that this layer is given."""
        module = self._paths[id(self._clone_layout.layers[cuts[0].edit.site.layer].layer)]
        plain = [plain_cut(cut) for cut in cuts]
        return {"do": "cut", "module": module, "cuts": plain, "n_heads": self.info.n_heads}

    def _place(self, site: Site) -> dict[str, Any]:
        modules = self._clone_layout.layers[site.layer]
        if site.kind in ("q", "k", "v"):
            module, port = getattr(modules.attention, f"{site.kind}_proj"), "output"
        elif site.kind == "pattern":
            module, port = modules.attention, "weights"
        else:
            places = {
                "z": (modules.attention.o_proj, "input"),
                "resid_pre": (modules.layer, "input"),
                "resid_mid": (modules.mid_norm, "input"),
                "resid_post": (modules.layer, "output"),
                "attn_out": (modules.attn_out, "output"),
                "mlp_out": (modules.mlp_out, "output"),
            }
            module, port = places[site.kind]
        d_head = self.info.d_head if site.kind in ("q", "k", "v", "z") else None
        return {"module": self._paths[id(module)], "port": port, "d_head": d_head}


def _show_where_plans_are() -> None:
    """nnsight 0.8.1 asks for the plan of a parameter where transformers had it before 5.23."""
    from transformers.distributed import parallel_utils, tensor_parallel

    if not hasattr(tensor_parallel, "_get_parameter_plan"):
        tensor_parallel._get_parameter_plan = parallel_utils._get_parameter_plan  # pyright: ignore[reportAttributeAccessIssue]


def _in_order(edits: Sequence[ActivationEdit], read: Sequence[Site]) -> list[ActivationEdit | Site]:
    """Edits and reads in the order the modules run; at one site edits before reads."""

    def key(item: ActivationEdit | Site) -> tuple[int, int, bool]:
        site = item if isinstance(item, Site) else item.site
        kind = "knockout" if isinstance(item, ActivationEdit) and item.op == "knockout" else site.kind
        return site.layer, _ORDER.index(kind), isinstance(item, Site)

    return sorted([*edits, *read], key=key)
