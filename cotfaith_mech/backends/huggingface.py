"""The default backend: a Hugging Face decoder driven through its own modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor

from ..model import CachedRun, Run
from ..sites import ActivationEdit, Site
from .corner import CornerRun
from .hooks import RowEdit, hooked
from .text import TextSide
from .weights import Weights


class HuggingFaceModel(TextSide):
    """Plain forwards with scoped hooks, and `cached_run` for counterfactuals of one base run."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights, "huggingface")

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
        row_edits = [RowEdit(edit, slice(None), 0) for edit in edits]
        wants_pattern = any(site.kind == "pattern" for site in read)
        with (
            self.attention("eager" if wants_pattern else None),
            hooked(self.layout, d_head=self.info.d_head, edits=row_edits, read=read) as store,
        ):
            out = self.weights.model(input_ids=tokens, use_cache=False, logits_to_keep=n_logits)
        return Run(out.logits, store)

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
