"""The default backend: a Hugging Face decoder driven through its own modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import CotfaithError
from ..model import CachedRun, Run
from ..sites import ActivationEdit, Site
from .corner import CornerRun, uncached
from .hooks import RowEdit, hooked
from .memory import Room
from .shadows import Shadow, is_replaced, shadowed, shadowed_edits
from .text import TextSide
from .weights import Weights, is_sharded


class HuggingFaceModel(TextSide):
    """Plain forwards with scoped hooks, and `cached_run` for counterfactuals of one base run, whose residual
    stream and K/V lie on the CPU with `keep_on_cpu`."""

    def __init__(self, weights: Weights, keep_on_cpu: bool = False) -> None:
        if is_sharded(weights.model):
            raise CotfaithError(
                f"Under torchrun every process holds a part of each layer of {weights.name!r}, and the engine needs "
                "whole ones; use the nnsight backend, or no torchrun."
            )
        super().__init__(weights, "huggingface")
        self.keep_on_cpu = keep_on_cpu
        self.room = Room(self.info, getattr(weights.model.config.get_text_config(), "intermediate_size", 0))

    @torch.no_grad()
    def run(
        self,
        tokens: Int[Tensor, "batch pos"],
        *,
        read: Sequence[Site] = (),
        edits: Sequence[ActivationEdit] = (),
        n_logits: int = 1,
    ) -> Run:
        """See `Model.run`. Reading a pattern switches attention to eager for this pass."""
        n, d_head = len(tokens), self.info.d_head
        groups = shadowed_edits(edits)
        shadows = [Shadow(group, slice(n), slice(i * n, (i + 1) * n)) for i, group in enumerate(groups, 1)]
        row_edits = [RowEdit(edit, slice(n), 0) for edit in edits]
        wants_pattern = any(site.kind == "pattern" for site in read)
        replaced = [row_edit for row_edit in row_edits if is_replaced(row_edit.edit)]
        cache = uncached(self.info) if shadows or replaced else None
        with (
            self.attention("eager" if wants_pattern else None),
            shadowed(
                self.layout,
                shadows,
                replaced,
                d_head=d_head,
                offset=0,
                cache=cache,
                edits=hooked(self.layout, d_head=d_head, edits=row_edits),
            ),
            hooked(self.layout, d_head=d_head, read=read) as store,
        ):
            rows = tokens.repeat(1 + len(shadows), 1)
            out = self.weights.model(
                input_ids=rows, past_key_values=cache, use_cache=cache is not None, logits_to_keep=n_logits
            )
        return Run(out.logits[:n], {site: value[:n].to(tokens.device) for site, value in store.items()})

    @property
    def is_eager(self) -> bool:
        """Whether attention adds its mask to the scores, as eager attention does."""
        return self.weights.model.config.get_text_config()._attn_implementation == "eager"

    @contextmanager
    def attention(self, implementation: str | None) -> Iterator[None]:
        """Use another attention implementation inside; None keeps the model's own."""
        config = self.weights.model.config.get_text_config()
        before = config._attn_implementation
        if implementation is not None:
            config._attn_implementation = implementation
        try:
            yield
        finally:
            if implementation is not None:
                config._attn_implementation = before

    def cached_run(self, tokens: Sequence[int]) -> CachedRun:
        return CornerRun(self, tokens)
