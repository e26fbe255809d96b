"""One suite over all backends and families: invariants 1 to 5 of the design, and the corner engine against all."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from cotfaith_mech.backends.huggingface import HuggingFaceModel
from cotfaith_mech.errors import CotfaithError
from cotfaith_mech.model import Branch, PlainRun, same_weights
from cotfaith_mech.sites import ActivationEdit, Site

from .tiny import ARCHITECTURES, tiny

BACKENDS = ("huggingface", "transformer_lens", "nnsight")
KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v")
N_TOKENS = 19
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


@cache
def model(architecture: str, backend: str = "huggingface") -> Any:
    ours = HuggingFaceModel(tiny(architecture)) if backend == "huggingface" else None
    return ours or same_weights(model(architecture), backend)  # pyright: ignore[reportArgumentType]


def tokens(seed: int = 0, rows: int = 1) -> Tensor:
    return torch.randint(4, 331, (rows, N_TOKENS), generator=torch.Generator().manual_seed(seed))


def width(m: Any, kind: str) -> tuple[int, ...]:
    heads = {"z": m.info.n_heads, "q": m.info.n_heads, "k": m.info.n_kv_heads, "v": m.info.n_kv_heads}
    return (heads[kind], m.info.d_head) if kind in heads else (m.info.d_model,)


def random_cells(m: Any) -> list[list[ActivationEdit]]:
    """One or more of everything, layers and positions mixed, in no order."""
    generator = torch.Generator().manual_seed(5)

    def value(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    cells = []
    for number, kind in enumerate(KINDS):
        positions = (3 + number, 9 + number // 2)
        site = Site(kind, number % 4)  # pyright: ignore[reportArgumentType]
        cells.append([ActivationEdit(site, positions, "replace", value(2, *width(m, kind)))])
        cells.append([ActivationEdit(Site(kind, 3 - number % 4), (N_TOKENS - 2,), "add", value(1, *width(m, kind)))])  # pyright: ignore[reportArgumentType]
        cells.append([ActivationEdit(site, (5,), "zero")])
    last_kv = m.info.n_kv_heads - 1
    cells.append([ActivationEdit(Site("z", 1, 4), (6, 7), "replace", value(2, m.info.d_head))])
    cells.append([ActivationEdit(Site("k", 2, last_kv), (4,), "replace", value(1, m.info.d_head))])
    cells.append([ActivationEdit(Site("resid_pre", 2), (2,), "zero"), ActivationEdit(Site("mlp_out", 3), (8,), "zero")])
    cut = ((N_TOKENS - 1, N_TOKENS - 2, N_TOKENS - 3), "knockout", None, (2, 5, 14, 15, N_TOKENS - 2))
    cells.append([ActivationEdit(Site("pattern", layer), *cut) for layer in range(4)])
    cells.append([ActivationEdit(Site("pattern", 2, 1), *cut)])
    return cells


def last_logits(logits: Tensor) -> Tensor:
    return logits.flatten(1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_and_reads_agree_with_the_plain_forward(architecture: str, backend: str) -> None:
    m, x = model(architecture, backend), tokens(1, rows=2)
    sites = [Site(kind, layer) for layer in (0, 3) for kind in (*KINDS, "pattern")]  # pyright: ignore[reportArgumentType]
    sites += [Site("z", 2, 5), Site("v", 1, m.info.n_kv_heads - 1)]
    run = m.run(x, read=sites, n_logits=4)
    with torch.no_grad():
        plain = m.weights.model(input_ids=x, use_cache=False).logits[:, -4:]
    torch.testing.assert_close(run.logits, plain, atol=1e-4, rtol=0)
    reference = model(architecture).run(x, read=sites).activations
    for site in sites:
        torch.testing.assert_close(run.activations[site], reference[site], atol=1e-4, rtol=0, msg=str(site))
    rows = run.activations[Site("pattern", 3)].sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows), atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("backend", ["corner", "transformer_lens", "nnsight"])
def test_every_edit_agrees_with_the_plain_path(architecture: str, backend: str) -> None:
    ours, x = model(architecture), tokens(2)[0].tolist()
    cells = random_cells(ours)
    read = {"n_logits": 3, "reduce": last_logits}
    expected = PlainRun(ours, x).edited(cells, **read)
    run = ours.cached_run(x) if backend == "corner" else PlainRun(model(architecture, backend), x)
    got = run.edited(cells, **read)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    base = last_logits(ours.run(torch.tensor([x]), n_logits=3).logits)
    assert ((expected - base).abs().amax(1) > 1e-3).sum() >= 20


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_own_values_change_nothing(architecture: str, backend: str) -> None:
    m, x = model(architecture, backend), tokens(3)
    base = m.run(x, n_logits=N_TOKENS).logits
    for kind in KINDS:
        site = Site(kind, 2)  # pyright: ignore[reportArgumentType]
        own = m.run(x, read=[site]).activations[site][0, 4:9]
        edit = ActivationEdit(site, tuple(range(4, 9)), "replace", own)
        edited = m.run(x, edits=[edit], n_logits=N_TOKENS).logits
        if backend == "transformer_lens" and kind == "resid_mid":
            torch.testing.assert_close(edited, base, atol=1e-4, rtol=0)
        else:
            assert torch.equal(edited, base), kind


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_self_patch_in_the_corner_is_exactly_zero(architecture: str) -> None:
    m, x = model(architecture), tokens(3)[0].tolist()
    run = m.cached_run(x)
    own = run.read([Site("resid_pre", layer) for layer in range(4)])
    spans = [(site, value[p : p + 2], (p, p + 1)) for site, value in own.items() for p in (3, 8)]
    same = run.edited([[ActivationEdit(s, p, "replace", v)] for s, v, p in spans], n_logits=2, reduce=last_logits)
    null = run.edited([[ActivationEdit(s, p, "add", 0 * v)] for s, v, p in spans], n_logits=2, reduce=last_logits)
    assert torch.equal(same, null)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_last_residual_of_the_source_gives_its_logits(architecture: str, backend: str) -> None:
    m, base, source = model(architecture, backend), tokens(4), tokens(5)
    site = Site("resid_post", 3)
    donor = m.run(source, read=[site], n_logits=N_TOKENS)
    edit = ActivationEdit(site, tuple(range(N_TOKENS)), "replace", donor.activations[site][0])
    torch.testing.assert_close(m.run(base, edits=[edit], n_logits=N_TOKENS).logits, donor.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_heads_sum_to_the_attention_output(architecture: str) -> None:
    m, x = model(architecture), tokens(6)
    states = m.run(x, read=[Site("z", 1), Site("attn_out", 1)]).activations
    modules = m.layout.layers[1]
    projection = modules.attention.o_proj
    blocks = projection.weight.view(m.info.d_model, m.info.n_heads, m.info.d_head)
    total = torch.einsum("bphd,mhd->bpm", states[Site("z", 1)], blocks)
    total = total + (0 if projection.bias is None else projection.bias)
    if modules.attn_out is not modules.attention:
        total = modules.attn_out(total)
    torch.testing.assert_close(total, states[Site("attn_out", 1)], atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_knockout_against_a_hand_made_mask(architecture: str) -> None:
    """The independent oracle: causal and window rules written out, eager attention, an additive mask of our own."""
    m, x = model(architecture), tokens(7)
    queries, keys = (N_TOKENS - 1, N_TOKENS - 3), (1, 4, 13, N_TOKENS - 3)
    cell = [ActivationEdit(Site("pattern", layer), queries, "knockout", None, keys) for layer in range(4)]
    got = m.cached_run(x[0].tolist()).edited([cell], n_logits=2, reduce=last_logits)

    def mask(window: int | None) -> Tensor:
        allowed = torch.zeros(N_TOKENS, N_TOKENS, dtype=torch.bool)
        for q in range(N_TOKENS):
            for k in range(q + 1):
                near = window is None or q - k < window
                cut = q in queries and k in keys and q != k
                allowed[q, k] = near and not cut
        return torch.zeros(N_TOKENS, N_TOKENS).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]

    masks: Any = {"mistral": mask(7), "gemma2": {"full_attention": mask(None), "sliding_attention": mask(7)}}
    with torch.no_grad(), m.attention("eager"):
        out = m.weights.model(input_ids=x, attention_mask=masks.get(architecture, mask(None)), use_cache=False)
    torch.testing.assert_close(got, out.logits[:, -2:].flatten(1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_text_branches_equal_separate_runs(architecture: str) -> None:
    m, x = model(architecture), tokens(8)[0].tolist()
    other = tokens(9)[0].tolist()
    variants = [x, x[:5] + x[12:], other[:7], x[:14] + other[:9], x[:1] + other[2:6], x[:-1]]
    branches = [Branch(tuple(v), 1 + n % 3) for n, v in enumerate(variants)]

    def keep(logits: Tensor, index: int) -> Tensor:
        return torch.cat([logits.flatten(), torch.tensor([float(index)])])

    got = m.cached_run(x).branches(branches, reduce=keep)
    expected = PlainRun(m, x).branches(branches, reduce=keep)
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=0)


def hooks_and_layers(m: Any) -> tuple[int, list[int]]:
    count = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in m.weights.model.modules())
    return count, [id(layer) for layer in m.layout.decoder.layers]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_survives_an_exception(backend: str) -> None:
    m, x = model("llama-gqa", backend), tokens(10)
    clean, before = m.run(x).logits, hooks_and_layers(m)
    wrong = ActivationEdit(Site("resid_pre", 2), (3,), "replace", torch.zeros(1, 7))
    with pytest.raises(Exception):  # noqa: B017, PT011
        m.run(x, edits=[wrong])
    run = m.cached_run(x[0].tolist())
    good = ActivationEdit(Site("resid_pre", 2), (3,), "zero")

    def fail(logits: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run.edited([[good]], n_logits=1, reduce=fail)
    with pytest.raises(Exception):  # noqa: B017, PT011
        run.edited([[wrong]], n_logits=1, reduce=last_logits)
    assert hooks_and_layers(m) == before
    assert torch.equal(m.run(x).logits, clean)


def test_bad_cells_are_named() -> None:
    m = model("llama-gqa")
    run = m.cached_run(tokens()[0].tolist())
    with pytest.raises(CotfaithError, match="outside the run of 19 tokens"):
        run.edited([[ActivationEdit(Site("resid_pre", 0), (19,), "zero")]], n_logits=1, reduce=last_logits)
    with pytest.raises(CotfaithError, match="layers 0 to 3"):
        m.run(tokens(), read=[Site("z", 4)])
    with pytest.raises(CotfaithError, match="at least one"):
        run.edited([[]], n_logits=1, reduce=last_logits)


def test_backends_leave_the_original_weights_alone() -> None:
    m, x = model("llama-gqa"), tokens(11)
    before = m.run(x).logits
    for backend in ("transformer_lens", "nnsight"):
        model("llama-gqa", backend).run(x)
    assert torch.equal(m.run(x).logits, before)
    assert m.weights.model.config._attn_implementation == "sdpa"
