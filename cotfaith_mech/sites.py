"""Where a forward pass is read or edited, and the edit itself as a frozen value.

Names print as TransformerLens prints them (`blocks.3.hook_resid_pre`). Widths of a value at one position:
residual-stream sites d_model; z and q `[n_heads, d_head]`, or `[d_head]` for one head; k and v with n_kv_heads
in place of n_heads (so `head` counts KV heads there); pattern `[head, query, key]`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .errors import CotfaithError

SiteKind = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern"]
EditOp = Literal["replace", "add", "zero", "knockout"]

_IN_ATTENTION = ("z", "q", "k", "v", "pattern")


@dataclass(frozen=True)
class Site:
    """A hook point: kind, layer, and head where the site has heads (None: all of them)."""

    kind: SiteKind
    layer: int
    head: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(SiteKind):
            raise CotfaithError(f"Unknown site kind {self.kind!r}; use one of {', '.join(get_args(SiteKind))}.")
        if self.head is not None and self.kind not in _IN_ATTENTION:
            raise CotfaithError(f"Site {self.kind!r} has no heads, but head={self.head} was given; leave head out.")

    def __str__(self) -> str:
        attention = "attn." if self.kind in _IN_ATTENTION else ""
        head = "" if self.head is None else f"[{self.head}]"
        return f"blocks.{self.layer}.{attention}hook_{self.kind}{head}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """Inverse of `str`."""
        match = re.fullmatch(r"blocks\.(\d+)\.(?:attn\.)?hook_(\w+?)(?:\[(\d+)\])?", text)
        if match is None:
            raise CotfaithError(f"{text!r} is not a site; write it like 'blocks.3.hook_resid_pre'.")
        layer, kind, head = match.groups()
        return cls(kind, int(layer), None if head is None else int(head))  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, eq=False)
class ActivationEdit:
    """One intervention as a value: at `site`, for token `positions` (absolute), do `op`.

    replace, add: `value` is a tensor `[len(positions), *width]`. zero takes no value. At the site `pattern`, where
    `positions` are queries, replace puts weights `[query, head, key]` (`[query, key]` for one head), over the keys from
    0 on, in place of theirs after the softmax; knockout cuts the edges to key positions `keys` before it, so that the
    rest renormalises (a query's own key is never cut), and zero makes their weights 0 after it.
    """

    site: Site
    positions: tuple[int, ...]
    op: EditOp
    value: Any = None
    keys: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        on_edges = self.site.kind == "pattern"
        if (self.op == "knockout" and not on_edges) or (on_edges and self.op == "add"):
            raise CotfaithError(
                f"op={self.op!r} does not fit site {self.site}: pattern takes knockout, zero or replace, and it alone "
                "takes knockout."
            )
        if (self.value is None) != (self.op in ("zero", "knockout")):
            raise CotfaithError(f"op={self.op!r} at {self.site}: replace and add need a value, the others take none.")
        if self.value is not None and len(self.value) != len(self.positions):
            raise CotfaithError(
                f"Edit at {self.site} has {len(self.value)} value rows for {len(self.positions)} positions; "
                "give one row per position."
            )

    def __str__(self) -> str:
        keys = f" keys {list(self.keys)}" if self.keys else ""
        return f"{self.op} {self.site} at {list(self.positions)}{keys}"
