"""A model some of whose layers are another's: the same module tree, the tensors of one layer exchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ..errors import CotfaithError
from .huggingface import HuggingFaceModel
from .transformer_lens import structural_clone

_NO_COMPUTATION = {
    "architectures", "transformers_version", "dtype", "torch_dtype", "tie_word_embeddings", "vocab_size", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "quantization_config",
}  # fmt: skip
"""Keys of a model's config that say nothing of what its layers compute."""


def _computed(model: HuggingFaceModel) -> tuple[Any, ...]:
    """What the layers of a model compute with: shapes of their parameters, and the config's other fields."""
    config = model.weights.model.config.get_text_config().to_dict()
    fields = {key: value for key, value in config.items() if key not in _NO_COMPUTATION and not key.startswith("_")}
    layers = [{name: p.shape for name, p in m.layer.named_parameters()} for m in model.layout.layers]
    return fields, layers, model.windows


class Hybrid:
    """`recipient` with single layers of `donor`; neither of them is touched, and no tensor is copied.

    Raises CotfaithError where the two are not of one architecture and shape.
    """

    def __init__(self, recipient: HuggingFaceModel, donor: HuggingFaceModel) -> None:
        if _computed(recipient) != _computed(donor):
            raise CotfaithError(
                f"{recipient.info.name!r} and {donor.info.name!r} are not of one architecture and shape, so their "
                "layers cannot be exchanged; give a model and its fine-tune."
            )
        self.model = HuggingFaceModel(
            replace(recipient.weights, model=structural_clone(recipient.weights.model)), recipient.keep_on_cpu
        )
        self._own, self._other = recipient, donor

    @contextmanager
    def with_layer(self, layer: int) -> Iterator[HuggingFaceModel]:
        """The hybrid while layer `layer` is the donor's."""
        module = self.model.layout.layers[layer].layer
        own, other = (m.layout.layers[layer].layer.state_dict() for m in (self._own, self._other))
        module.load_state_dict(other, assign=True)
        try:
            yield self.model
        finally:
            module.load_state_dict(own, assign=True)
