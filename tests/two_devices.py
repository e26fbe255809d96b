"""Devices that a machine without any can have: tensors on the CPU that say they are elsewhere.

Inside `pretended()` tensors may lie on `privateuseone:0` and `:1`. The CPU computes their values, and tensors of two
devices that meet in an operation are an error, as on GPUs. PyTorch keeps what is registered for it to the end of the
process, so this is run as one of its own (python -m tests.two_devices llama-gqa).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from cotfaith_mech.backends.huggingface import HuggingFaceModel
from cotfaith_mech.model import Branch
from cotfaith_mech.sites import ActivationEdit, Site

from .test_conformance import N_TOKENS, last_logits, random_cells, tokens
from .tiny import tiny

TYPE = "privateuseone"
_MOVES = {"_to_copy", "copy_"}


class Elsewhere(torch.Tensor):
    """A tensor `within` of the CPU that says it is on another device."""

    within: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> Elsewhere:
        one = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
            requires_grad=inner.requires_grad,
        )
        one.within = inner
        return one

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    places = {leaf.device for leaf in leaves if leaf.ndim}
    asked = kwargs.get("device")
    index_from_cpu = name.startswith("index")
    if name not in _MOVES and len(places - ({torch.device("cpu")} if index_from_cpu else set())) > 1:
        raise RuntimeError(f"{name}: tensors on {sorted(map(str, places))} meet")
    if asked is not None:
        device = torch.device(asked)
        kwargs = {**kwargs, "device": torch.device("cpu")}
    else:
        device = leaves[0].device if leaves else torch.device("cpu")
        elsewhere = [leaf.device for leaf in leaves if leaf.device.type == TYPE]
        if name != "copy_" and elsewhere:
            device = elsewhere[0]
    inner_args, inner_kwargs = tree_map(lambda x: x.within if isinstance(x, Elsewhere) else x, (args, kwargs))
    out = func(*inner_args, **inner_kwargs)
    own = {id(leaf.within): leaf for leaf in leaves if isinstance(leaf, Elsewhere)}

    def wrapped(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or device.type != TYPE:
            return x
        return own[id(x)] if id(x) in own else Elsewhere(x, device)

    return tree_map(wrapped, out)


class _Pretending(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _MadeHere(TorchFunctionMode):
    """`torch.tensor`, and an index that is a list, make tensors before any dispatch: they are made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is torch.Tensor.tolist:
            return args[0].cpu().tolist()
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(part) if isinstance(part, list) else part for part in index)
            args = (args[0], index, *args[2:])
        return func(*args, **kwargs)


@cache
def _register() -> None:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend()


@contextmanager
def pretended() -> Iterator[None]:
    _register()
    with _Pretending(), _MadeHere():
        yield


def spread(model: Any) -> None:
    """Layers 0 and 1 on one device, the rest on the other, with accelerate's hooks as `device_map` attaches them."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_execution_device_hook

    skip = model._skip_keys_device_placement
    parts = {"embed_tokens": 0, "rotary_emb": 0, "layers.0": 0, "layers.1": 0, "layers.2": 1, "layers.3": 1, "norm": 1}
    for name, place in {**{f"model.{part}": place for part, place in parts.items()}, "lm_head": 1}.items():
        module, device = model.get_submodule(name), f"{TYPE}:{place}"
        for part in module.modules():
            for key, tensor in part._parameters.items():
                part._parameters[key] = None if tensor is None else torch.nn.Parameter(tensor.to(device), False)
            for key, buffer in part._buffers.items():
                part._buffers[key] = None if buffer is None else buffer.to(device)
        attach_execution_device_hook(module, device, skip_keys=skip)
        if not hasattr(module, "_hf_hook"):
            add_hook_to_module(module, AlignDevicesHook(device, skip_keys=skip))
    add_hook_to_module(model, AlignDevicesHook(f"{TYPE}:0", io_same_device=True, skip_keys=skip))


def found(model: Any) -> dict[str, torch.Tensor]:
    """What the engine makes of all that it can be asked but gradients (PyTorch's backward pass needs true devices)."""
    x = tokens()[0].tolist()
    run, other = model.cached_run(x), model.cached_run([*x[:7], 9, 8, *x[9:]])
    sites = [Site(kind, layer) for kind in ("z", "resid_mid", "v", "resid_post", "pattern") for layer in (0, 1, 2, 3)]
    edges = [ActivationEdit(Site("pattern", layer), (15, 17), "zero", None, (3, 4)) for layer in (1, 2)]
    cells = [*random_cells(model), edges, [replaced(layer) for layer in (1, 3)]]
    read = run.read(sites, 2)
    z = torch.stack([run.read([Site("z", layer)])[Site("z", layer)][-1] for layer in range(4)])
    final = run.read([Site("resid_post", 3)])[Site("resid_post", 3)][-1]
    path = model.direct_path(z, final, 20, 30)
    branches = [Branch((*x[:n], *range(40, 46)), 2) for n in (5, 9, 12)]
    made = {
        "run": model.run(torch.tensor([x], device=model.info.device), read=sites, n_logits=3).logits,
        "logits": run.logits(4),
        "edited": run.edited(cells, n_logits=3, reduce=last_logits),
        "spliced": run.spliced(other, 7, 9).logits(2),
        "heads_within": run.heads_within(2, [[ActivationEdit(Site("q", 2), (5,), "zero")]]),
        "branches": torch.stack(run.branches(branches, reduce=lambda logits, _: logits)),
        "lens": model.lens(final),
        "written_norm": model.written_norm(3, z[3]),
        "into_z": path.into_z,
        "direction": path.direction,
        **{str(site): value for site, value in read.items()},
    }
    return {name: value.detach().cpu() for name, value in made.items()}


def replaced(layer: int) -> ActivationEdit:
    weights = torch.rand(1, 6, N_TOKENS - 2, generator=torch.Generator().manual_seed(layer))
    return ActivationEdit(Site("pattern", layer), (N_TOKENS - 3,), "replace", weights / weights.sum(-1, keepdim=True))


if __name__ == "__main__":
    differences = {}
    for architecture in sys.argv[1:]:
        plain, parted = tiny(architecture), tiny(architecture)
        for weights in (plain, parted):
            weights.model.config._attn_implementation = "eager"
        expected = found(HuggingFaceModel(plain))
        with pretended():
            spread(parted.model)
            got = found(HuggingFaceModel(parted))
        for name, value in expected.items():
            differences[f"{architecture} {name}"] = float((got[name] - value).abs().max())
    print(json.dumps(differences))
