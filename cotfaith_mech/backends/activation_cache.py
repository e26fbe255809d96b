"""A run's activations as a TransformerLens ActivationCache, so that its own analysis tools take them up."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import get_args

from transformer_lens import ActivationCache

from ..reading import Trunk
from ..sites import Site, SiteKind
from .transformer_lens import TransformerLensModel


def activation_cache(trunk: Trunk, sites: Sequence[Site] | None = None) -> ActivationCache:
    """Activations of the trunk's run at `sites` (None: every kind of site in every layer), named as TransformerLens
    names its hooks, `[1, pos, *width]` with the widths of sites.py, on the device of the run.

    Its model is a TransformerBridge on the same parameters, made here where the reader has another backend. Embedding
    and the scales of norms are no sites: `accumulated_resid`, say, works, `apply_ln_to_stack` does not.
    """
    model = trunk.model
    if sites is None:
        sites = [Site(kind, layer) for layer, kind in product(range(model.info.n_layers), get_args(SiteKind))]
    bridge = (model if isinstance(model, TransformerLensModel) else TransformerLensModel(model.weights)).bridge
    return ActivationCache({str(site): value[None] for site, value in trunk.run.read(sites).items()}, bridge)
