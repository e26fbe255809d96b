"""What a pass may hold, where a base run is kept, and what a process has used.

1. Room: tokens of one pass of a model; where memory runs out they are halved for good, and the pass is made in parts.
2. Kept: residual stream and K/V of a base run, on the model's device or on the CPU. A run that goes on where another
ends writes behind it in the same memory; one that parts from it earlier copies what they share.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..errors import CotfaithError
from ..model import ModelInfo

MAX_TOKENS = 4096
"""Tokens in one pass on a CPU; elsewhere eight times as many, on a GPU as far as its free memory goes."""
KEYS_A_TOKEN = 16
"""Keys that the rows of a pass may see, a token of its room: each row holds those of all tokens before it."""
LOGITS_A_TOKEN = 8192
"""Logits that a pass may give, a token of its room."""
SHARE = 0.5
"""Part of a GPU's free memory that a pass may fill; the rest is for base runs and for what the allocator cannot use."""
SPARE = 64
"""Positions behind a base run, so that the runs of its answer need no copy."""
LOG = logging.getLogger("cotfaith_mech")

Made = TypeVar("Made")


@dataclass
class Room:
    """How many tokens one pass of a model may hold (None: not looked up yet), shared by all its runs."""

    info: ModelInfo
    intermediate: int
    limit: int | None = None

    @property
    def tokens(self) -> int:
        """Looked up when the first pass asks; after that it only shrinks."""
        if self.limit is None:
            self.limit = MAX_TOKENS if self.info.device == "cpu" else 8 * MAX_TOKENS
            if self.info.device.startswith("cuda"):
                free, device = torch.cuda.mem_get_info(self.info.device)[0], self.info.device
                unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
                self.limit = min(self.limit, max(1, int(SHARE * (free + unused)) // self.bytes_a_token))
        return self.limit

    @property
    def bytes_a_token(self) -> int:
        """What a token of room costs: its own activations in one layer, keys and values joined and repeated for the
        heads that share them, logits in the model's precision and three times in float32."""
        info, size = self.info, getattr(torch, self.info.dtype).itemsize
        own = 6 * info.d_model + 3 * self.intermediate + 2 * (info.n_heads + 2 * info.n_kv_heads) * info.d_head
        keys = KEYS_A_TOKEN * 2 * (info.n_heads + info.n_kv_heads) * info.d_head
        return (own + keys) * size + LOGITS_A_TOKEN * (size + 3 * 4)

    def cost(self, suffix: int, length: int, n_logits: int = 0) -> int:
        """Tokens of room that one row takes, of `suffix` own tokens, `length` keys and `n_logits` positions read."""
        return max(suffix, length // KEYS_A_TOKEN, n_logits * self.info.vocab // LOGITS_A_TOKEN)

    def in_parts(
        self, compute: Callable[[Sequence[Any]], Made], rows: Sequence[Any], tokens_a_row: int, length: int
    ) -> Iterator[Made]:
        """What `compute` makes of all `rows`, as many of them at a time as there is room for."""
        done = 0
        while done < len(rows):
            part = rows[done : done + max(1, self.tokens // tokens_a_row)]
            made = self.attempt(partial(compute, part), parts=len(part), tokens=len(part) * tokens_a_row, length=length)
            if made is not None:
                done += len(part)
                yield made

    def attempt(self, compute: Callable[[], Made], *, parts: int, tokens: int, length: int) -> Made | None:
        """What `compute` makes, or None where memory ran out: the room is then half of the `tokens` tried, so that the
        `parts` of the pass can be tried in smaller groups.

        Raises CotfaithError where there is but one part, of a text of `length` tokens.
        """
        try:
            return compute()
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            if parts == 1:
                raise CotfaithError(
                    f"Memory ran out in a pass of {self.info.name!r} ({self.info.dtype}, {self.info.device}) that "
                    f"cannot be divided: one text of {length} tokens. Give a shorter chain, a lower precision "
                    "(dtype: bfloat16), or keep residual stream and K/V on the CPU (keep_on_cpu: true)."
                ) from error
        self.limit = max(1, min(self.tokens, tokens) // 2)
        if self.info.device.startswith("cuda"):
            torch.cuda.empty_cache()
        LOG.warning(
            "Memory ran out in a pass of %d tokens of room (%d parts) of %s; from now on a pass takes at most %d.",
            tokens,
            parts,
            self.info.name,
            self.limit,
        )
        return None


def ran_out(error: BaseException) -> bool:
    """Whether `error` says that memory could not be allocated, on a GPU or by the CPU allocator."""
    told = ("DefaultCPUAllocator", "not enough memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in told)


class Kept:
    """Residual stream `[n_layers + 1, pos, d_model]` (before each layer, after the last) and K/V
    `[1, kv_head, pos, d_head]` of every layer, of `length` positions of a base run."""

    def __init__(self, info: ModelInfo, length: int, on_cpu: bool) -> None:
        self.info, self.length, self.on_cpu = info, length, on_cpu
        size = length + SPARE
        self._residual = self._empty(info.n_layers + 1, size, info.d_model)
        self._keys_values = [
            (self._empty(1, info.n_kv_heads, size, info.d_head), self._empty(1, info.n_kv_heads, size, info.d_head))
            for _ in range(info.n_layers)
        ]
        self._written = [length]

    def _empty(self, *shape: int) -> Tensor:
        device = "cpu" if self.on_cpu else self.info.device
        return torch.empty(*shape, dtype=getattr(torch, self.info.dtype), device=device)

    @property
    def residual(self) -> Float[Tensor, "depth pos d_model"]:
        return self._residual[:, : self.length]

    @property
    def keys_values(self) -> list[tuple[Tensor, Tensor]]:
        return [(keys[:, :, : self.length], values[:, :, : self.length]) for keys, values in self._keys_values]

    def write_residual(self, depth: int, start: int, rows: Float[Tensor, "1 pos d_model"]) -> Tensor:
        """Put down `rows` as the residual stream from position `start` on; what stands there then."""
        place = self._residual[depth, start : self.length]
        place.copy_(rows[0])
        return place

    def write_keys_values(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Put down K/V `[1, kv_head, pos, d_head]` from position `start` on."""
        for kept, new in zip(self._keys_values[layer], (keys, values), strict=True):
            kept[:, :, start : start + new.shape[2]].copy_(new)

    def grown(self, shared: int, length: int) -> Kept:
        """Of `length` positions, the first `shared` of which are these; the others are to be written."""
        behind = shared == self._written[0] and length <= self._residual.shape[1]
        if behind or length == shared:
            other = copy(self)
            other.length, self._written[0] = length, max(self._written[0], length)
            return other
        other = Kept(self.info, length, self.on_cpu)
        other._copy(self, 0, shared)
        return other

    def spliced(self, donor: Kept, first: int, end: int) -> Kept:
        """As long as these, with those of `donor` at positions `first` to `end` - 1; what follows is to be written."""
        other = Kept(self.info, self.length, self.on_cpu)
        other._copy(self, 0, first)
        other._copy(donor, first, end)
        return other

    def _copy(self, other: Kept, first: int, end: int) -> None:
        self._residual[:, first:end].copy_(other._residual[:, first:end])
        for own, others in zip(self._keys_values, other._keys_values, strict=True):
            for kept, new in zip(own, others, strict=True):
                kept[:, :, first:end].copy_(new[:, :, first:end])


class Recording(DynamicLayer):
    """A cache layer that puts down all K/V it is given, whatever window the model's attention has, behind those before
    `start`."""

    def __init__(self, kept: Kept, layer: int, start: int) -> None:
        super().__init__()
        self.kept, self.layer, self.start, self.is_initialized = kept, layer, start, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.kept.write_keys_values(self.layer, self.start, key_states, value_states)
        if not self.start:
            return key_states, value_states
        before = (kept[:, :, : self.start].to(key_states.device) for kept in self.kept.keys_values[self.layer])
        keys, values = (torch.cat(pair, 2) for pair in zip(before, (key_states, value_states), strict=True))
        return keys, values

    def get_seq_length(self) -> int:
        return self.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.start + query_length, 0


def peak_memory_gb() -> dict[str, float]:
    """Most memory that this process has held so far, in GB (10^9 bytes): `resident`, and with a GPU `cuda`, what torch
    had allocated there. `resident` is missing where the system does not tell (Windows)."""
    found: dict[str, float] = {}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        found["resident"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)
    if torch.cuda.is_available():
        found["cuda"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return found
