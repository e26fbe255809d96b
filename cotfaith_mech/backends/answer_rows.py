"""What only the read positions need is computed for them alone: most of the last layer, and the unembedding.

The last layer's keys and values are needed at every position, and its queries come with them; its output projection and
MLP only where logits are read. Where that is one position, they are given the last row of their input, and the
residual stream they are added to spreads their result over all positions: right at the last one, never read elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from ..sites import ActivationEdit
from .hooks import Layout

_BELOW_THE_PROJECTION = ("resid_pre", "q", "k", "v")


@contextmanager
def answer_rows(layout: Layout, n_logits: int, cells: Sequence[Sequence[ActivationEdit]]) -> Iterator[None]:
    """During the forwards inside, the logits of the last position (`n_logits` 1) cost the last layer little more.

    Nothing changes where an edit of `cells` lies behind the last layer's attention, or more positions are read.
    """
    last = len(layout.layers) - 1
    with ExitStack() as stack:
        if n_logits == 1 and not any(_lies_behind(edit, last) for cell in cells for edit in cell):
            modules = layout.layers[last]
            for module in (modules.attention.o_proj, modules.mlp):
                stack.callback(module.register_forward_pre_hook(_last_row).remove)
        yield


def _lies_behind(edit: ActivationEdit, last: int) -> bool:
    site = edit.site
    below = site.kind in _BELOW_THE_PROJECTION or (site.kind == "pattern" and edit.op == "knockout")
    return site.layer == last and not below


def _last_row(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0][:, -1:], *args[1:])


def compact(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
    """Pre-hook: rows of a larger tensor are copied out, since PyTorch multiplies each apart where they have gaps."""
    return (args[0].contiguous(),)
