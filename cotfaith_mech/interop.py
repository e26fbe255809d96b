"""Activations by TransformerLens's names, as another tool computed them: the source of a patch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from .errors import CotfaithError
from .sites import Site


@runtime_checkable
class NamedActivations(Protocol):
    """What `run_with_cache` of TransformerLens gives (ActivationCache), or a dict with its names: `[1, pos, *width]`,
    or without the batch axis."""

    def keys(self) -> Iterable[str]:
        """Names such as 'blocks.3.hook_resid_pre'."""
        ...

    def __getitem__(self, name: str, /) -> Tensor: ...


class CacheSource:
    """A cache in place of a source run: it can be read, and nothing else.

    Raises CotfaithError for a cache of a bridge in compatibility mode, whose folded weights give another residual
    stream.
    """

    def __init__(self, cache: NamedActivations, n_tokens: int) -> None:
        if getattr(getattr(cache, "model", None), "compatibility_mode", False):
            raise CotfaithError(
                "The cache is of a TransformerLens model in compatibility mode, whose residual stream is not the "
                "model's own; make it without enable_compatibility_mode()."
            )
        self._cache, self._n_tokens = cache, n_tokens

    def read(self, sites: Sequence[Site], first: int = 0) -> Mapping[Site, Tensor]:
        """As `CachedRun.read`; CotfaithError for a site the cache does not hold, and for other numbers of tokens."""
        names = set(self._cache.keys())
        if absent := [str(site) for site in sites if str(site) not in names]:
            raise CotfaithError(
                f"The cache has no {', '.join(absent[:3])}{' …' * (len(absent) > 3)}; make it with run_with_cache and "
                "without a names_filter that leaves them out."
            )
        return {site: self._of(site, first) for site in sites}

    def _of(self, site: Site, first: int) -> Tensor:
        value = self._cache[str(site)]
        with_batch = 4 if site.kind in ("z", "q", "k", "v", "pattern") else 3
        if value.ndim == with_batch and len(value) == 1:
            value = value[0]
        n_tokens = value.shape[-2] if site.kind == "pattern" else len(value)
        if value.ndim != with_batch - 1 or n_tokens != self._n_tokens:
            raise CotfaithError(
                f"{site} has shape {tuple(value.shape)} in the cache, expected {self._n_tokens} positions of one text; "
                "make the cache of one row with as many tokens as the chain and its answer (trunk.run.tokens)."
            )
        return value[:, first:] if site.kind == "pattern" else value[first:]
