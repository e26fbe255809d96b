"""A sweep asks the device for nothing until its end: no operation in it would make the host wait for a GPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cotfaith_mech.backends.hooks import RowEdit, apply_edit
from cotfaith_mech.backends.huggingface import HuggingFaceModel
from cotfaith_mech.sites import ActivationEdit, Site

from .tiny import tiny

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")


class Operations(TorchDispatchMode):
    """Counts operations by name, and uses of a boolean index as `boolean_index`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.seen[name] += 1
        if name in ("index", "index_put_", "index_put") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        ):
            self.seen["boolean_index"] += 1
        return func(*args, **(kwargs or {}))


def sweep(kind: str) -> Operations:
    model = HuggingFaceModel(tiny("llama-gqa"))
    run = model.cached_run(range(5, 24))
    spans = [(3, 8), (8, 12), (12, 16)]
    sites = [Site(kind, layer) for layer in range(4)]  # pyright: ignore[reportArgumentType]
    states = {} if kind == "pattern" else run.read(sites)
    cells = []
    for site in sites:
        for first, end in spans:
            span, earlier = tuple(range(first, end)), tuple(range(first))
            if kind == "pattern":
                cells.append([ActivationEdit(site, span, "knockout", None, earlier)])
            else:
                cells.append([ActivationEdit(site, span, "replace", states[site][first:end] + 1)])
    with Operations() as operations:
        run.edited(cells, n_logits=2, reduce=lambda logits: logits[:, -1, 7:9])
    return operations


@pytest.mark.parametrize("kind", ["resid_pre", "z", "pattern"])
def test_nothing_in_a_sweep_waits_for_the_device(kind: str) -> None:
    seen = sweep(kind).seen
    assert seen["mm"] + seen["addmm"] + seen["bmm"] > 0
    assert {name: seen[name] for name in (*WAITS, "boolean_index") if seen[name]} == {}


@pytest.mark.parametrize("positions", [(3, 4, 5), (4,), (2, 5, 6), (6, 5), (3, 3)])
@pytest.mark.parametrize("head", [None, 2])
@pytest.mark.parametrize("op", ["replace", "add", "zero"])
def test_an_edit_is_the_assignment_position_by_position(positions: tuple[int, ...], head: int | None, op: Any) -> None:
    """Oracle: one position after the other, whether or not they follow one another; an `add` twice at 3 counts once."""
    generator = torch.Generator().manual_seed(1)
    before = torch.randn(3, 6, 4, 5, generator=generator)
    width = (5,) if head is not None else (4, 5)
    value = (
        None
        if op == "zero"
        else torch.randn(1, *width, generator=generator).repeat(len(positions), *(1 for _ in width))
    )
    after, expected = before.clone(), before.clone()
    apply_edit(after, RowEdit(ActivationEdit(Site("z", 0, head), positions, op, value), slice(1, 3), 1))
    for place in {position - 1 for position in positions}:
        at = (slice(1, 3), place) if head is None else (slice(1, 3), place, head)
        new = 0 if value is None else value[0]
        expected[at] = expected[at] + new if op == "add" else new
    assert torch.equal(after, expected)


def test_a_position_outside_the_pass_is_no_shorter_edit() -> None:
    with pytest.raises(IndexError):
        apply_edit(torch.ones(1, 4, 5), RowEdit(ActivationEdit(Site("resid_pre", 0), (3, 4), "zero"), slice(1), 0))
