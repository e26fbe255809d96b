"""A model some of whose layers are another's: the same module tree, the tensors of one layer exchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from ..errors import CotfaithError
from .huggingface import HuggingFaceModel
from .transformer_lens import structural_clone


class Hybrid:
    """`recipient` with single layers of `donor`; neither of them is touched, and no tensor is copied.

    Raises CotfaithError where the two are not of one architecture and shape.
    """

    def __init__(self, recipient: HuggingFaceModel, donor: HuggingFaceModel) -> None:
        shapes = [{name: p.shape for name, p in m.weights.model.named_parameters()} for m in (recipient, donor)]
        if shapes[0] != shapes[1]:
            raise CotfaithError(
                f"{recipient.info.name!r} and {donor.info.name!r} are not of one architecture and shape, so their "
                "layers cannot be exchanged; give a model and its fine-tune."
            )
        self.model = HuggingFaceModel(replace(recipient.weights, model=structural_clone(recipient.weights.model)))
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
