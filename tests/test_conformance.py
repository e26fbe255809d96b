"""One suite over all backends and families: invariants 1 to 5 of the design, and the corner engine against all."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from cotfaith_mech.backends.grouping import cheapest_cuts
from cotfaith_mech.backends.huggingface import HuggingFaceModel
from cotfaith_mech.errors import CotfaithError
from cotfaith_mech.model import Branch, CachedRun, PlainRun, same_weights
from cotfaith_mech.sites import ActivationEdit, Site

from .tiny import ARCHITECTURES, tiny

BACKENDS = ("huggingface", "transformer_lens", "nnsight")
KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v")
N_TOKENS = 19


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
def test_sites_are_named_as_in_an_activation_cache_and_hold_the_same(architecture: str) -> None:
    """`run_with_cache` of the bridge: its names are str(Site), its short names find the same, and a cache made of what
    is read here serves its own analysis."""
    from transformer_lens import ActivationCache

    m, x = model(architecture), tokens(8)
    bridge = model(architecture, "transformer_lens").bridge
    with torch.no_grad():
        _, cache = bridge.run_with_cache(x, prepend_bos=False)
    sites = [Site(kind, layer) for layer in range(4) for kind in (*KINDS, "pattern")]  # pyright: ignore[reportArgumentType]
    ours = m.run(x, read=sites).activations
    assert {str(site) for site in sites} <= set(bridge.hook_dict)
    for site in sites:
        torch.testing.assert_close(cache[str(site)], ours[site], atol=1e-4, rtol=0, msg=str(site))
        assert Site.parse(str(site)) == site
    for kind, layer in (("resid_pre", 2), ("attn_out", 1), ("mlp_out", 3)):
        torch.testing.assert_close(cache[kind, layer], ours[Site(kind, layer)], atol=1e-4, rtol=0)  # pyright: ignore[reportArgumentType]
    made = ActivationCache({str(site): value for site, value in ours.items()}, bridge)
    theirs, back = (c.accumulated_resid(layer=3, incl_mid=False) for c in (cache, made))
    torch.testing.assert_close(back, theirs, atol=1e-4, rtol=0)


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


def zeroed_cells(n_heads: int) -> list[list[ActivationEdit]]:
    """Edges zeroed in all layers, in one, for the last head alone, beside other edits, for two groups of queries."""
    rows = ((N_TOKENS - 1, N_TOKENS - 2), "zero", None, (2, 5, 14, 15))
    early = ((9, 11), "zero", None, (3, 4, 8))
    cells = [[ActivationEdit(Site("pattern", layer), *rows) for layer in range(4)]]
    cells += [[ActivationEdit(Site("pattern", layer), *edges)] for layer, edges in ((2, rows), (1, early))]
    cells.append([ActivationEdit(Site("pattern", layer, n_heads - 1), *rows) for layer in (1, 3)])
    cells.append([ActivationEdit(Site("pattern", 2, head), *early) for head in (0, 2)])
    both = [ActivationEdit(Site("pattern", layer), *edges) for layer in (1, 2) for edges in (rows, early)]
    return [
        *cells,
        [*both, ActivationEdit(Site("resid_pre", 2), (10,), "zero")],
        [*both, ActivationEdit(Site("z", 2), (9,), "zero")],
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("backend", ["corner", "plain"])
def test_zeroed_edges_agree_with_transformer_lens(architecture: str, backend: str) -> None:
    """TransformerLens sets the weights to 0 where it shows them; here no weight is seen. Other cells share the batch."""
    ours, theirs, x = model(architecture), model(architecture, "transformer_lens"), tokens(2)[0].tolist()
    pairs = zip(zeroed_cells(ours.info.n_heads), random_cells(ours)[-7:], strict=True)
    mixed = [cell for pair in pairs for cell in pair]
    read = {"n_logits": 3, "reduce": last_logits}
    expected = PlainRun(theirs, x).edited(mixed, **read)
    run = ours.cached_run(x) if backend == "corner" else PlainRun(ours, x)
    torch.testing.assert_close(run.edited(mixed, **read), expected, atol=1e-4, rtol=0)
    base = last_logits(ours.run(torch.tensor([x]), n_logits=3).logits)
    assert ((expected[::2] - base).abs().amax(1) > 1e-3).all()


def weighted_cells(m: Any) -> list[list[ActivationEdit]]:
    """Attention weights of another text, for all heads or one, in one layer or two, beside other edits."""
    pattern = {
        layer: m.run(tokens(9), read=[Site("pattern", layer)]).activations[Site("pattern", layer)][0]
        for layer in (1, 2)
    }

    def weights(layer: int, queries: tuple[int, ...], head: int | None = None) -> ActivationEdit:
        rows = pattern[layer][:, list(queries)].transpose(0, 1)
        return ActivationEdit(Site("pattern", layer, head), queries, "replace", rows if head is None else rows[:, head])

    early, late, last = (4, 9), (N_TOKENS - 1, N_TOKENS - 2), m.info.n_heads - 1
    shorter = ActivationEdit(Site("pattern", 1), (12,), "replace", torch.rand(1, m.info.n_heads, 7))
    return [
        [weights(1, early)],
        [weights(2, late)],
        [weights(1, early, last), weights(1, early, 0)],
        [weights(1, early), weights(2, (*early, *late)), ActivationEdit(Site("v", 1), (3,), "zero")],
        [weights(2, late, 1), ActivationEdit(Site("z", 2, 1), (N_TOKENS - 1,), "zero")],
        [weights(2, late), ActivationEdit(Site("pattern", 2), early, "zero", None, (2, 3))],
        [shorter],
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("backend", ["corner", "plain"])
def test_replaced_attention_weights_agree_with_transformer_lens(architecture: str, backend: str) -> None:
    """TransformerLens writes the weights where it shows them; here z is made of them. Other cells share the batch."""
    ours, theirs, x = model(architecture), model(architecture, "transformer_lens"), tokens(2)[0].tolist()
    weighted = weighted_cells(ours)
    mixed = [cell for pair in zip(weighted, random_cells(ours)[-7:], zeroed_cells(6)[:7], strict=True) for cell in pair]
    read = {"n_logits": 3, "reduce": last_logits}
    expected = PlainRun(theirs, x).edited(mixed, **read)
    run = ours.cached_run(x) if backend == "corner" else PlainRun(ours, x)
    torch.testing.assert_close(run.edited(mixed, **read), expected, atol=1e-4, rtol=0)
    base = last_logits(ours.run(torch.tensor([x]), n_logits=3).logits)
    assert ((expected[::3] - base).abs().amax(1) > 1e-3).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_own_attention_weights_change_nothing(architecture: str) -> None:
    """To rounding: the weights are those of eager attention, and z is summed anew."""
    m, x = model(architecture), tokens(3)
    site, queries = Site("pattern", 2), tuple(range(4, N_TOKENS))
    own = m.run(x, read=[site]).activations[site][0, :, list(queries)].transpose(0, 1)
    edit = ActivationEdit(site, queries, "replace", own)
    base = m.run(x, n_logits=N_TOKENS).logits
    torch.testing.assert_close(m.run(x, edits=[edit], n_logits=N_TOKENS).logits, base, atol=1e-4, rtol=0)


def test_attention_weights_that_do_not_fit_are_refused() -> None:
    m, x = model("llama-gqa"), tokens(2)[0].tolist()
    for site, shape, told in (
        (Site("pattern", 1), (1, 5, 9), "weights have shape"),
        (Site("pattern", 1, 2), (1, 6, 9), "weights have shape"),
        (Site("pattern", 1), (1, 6, N_TOKENS + 1), f"at most {N_TOKENS} keys"),
    ):
        with pytest.raises(CotfaithError, match=told):
            m.cached_run(x).edited(
                [[ActivationEdit(site, (9,), "replace", torch.rand(shape))]], n_logits=1, reduce=last_logits
            )
    edits = [
        ActivationEdit(Site("pattern", 1), (9,), "replace", torch.rand(1, 6, 9)),
        ActivationEdit(Site("pattern", 1), (9, 10), "zero", None, (3,)),
    ]
    with pytest.raises(CotfaithError, match="in one edit"):
        m.run(tokens(2), edits=edits)
    with pytest.raises(CotfaithError, match="pattern takes knockout, zero or replace"):
        ActivationEdit(Site("pattern", 1), (9,), "add", torch.rand(1, 6, 9))


def test_zeroed_edges_do_not_renormalise_and_leave_other_reads_alone() -> None:
    """Two rows of a plain pass: z loses weight times value of the cut keys, at the queries and the head named."""
    m, x = model("llama-gqa"), tokens(4, rows=2)
    edit = ActivationEdit(Site("pattern", 1, 3), (14, 16), "zero", None, (2, 9))
    sites = [Site("z", 1), Site("v", 1), Site("pattern", 1), Site("resid_pre", 1)]
    base, got = (m.run(x, read=sites, edits=edits).activations for edits in ((), (edit,)))
    expected = base[sites[0]].clone()
    lost = base[sites[2]][:, 3][:, [14, 16]][:, :, [2, 9]] @ base[sites[1]][:, [2, 9], 3 // 2]
    expected[:, [14, 16], 3] -= lost
    torch.testing.assert_close(got[sites[0]], expected, atol=1e-5, rtol=0)
    assert lost.abs().max() > 1e-3
    assert torch.equal(got[sites[3]], base[sites[3]])


def test_zeroed_edges_that_cannot_be_made_are_refused() -> None:
    m, x = model("llama-gqa"), tokens(2)[0].tolist()
    site, read = Site("pattern", 1), {"n_logits": 1, "reduce": last_logits}
    for cell, told in (
        ([ActivationEdit(site, (9, 11), "zero", None, (3, 9))], "queries and keys"),
        (
            [ActivationEdit(site, (9,), "zero", None, (3,)), ActivationEdit(site, (9,), "zero", None, (4,))],
            "in one edit",
        ),
    ):
        with pytest.raises(CotfaithError, match=told):
            m.cached_run(x).edited([cell], **read)
    with pytest.raises(CotfaithError, match="use huggingface"):
        PlainRun(model("llama-gqa", "nnsight"), x).edited([[ActivationEdit(site, (9,), "zero", None, (3,))]], **read)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_invokes_of_one_nnsight_forward_do_not_mix(architecture: str) -> None:
    """Cells with and without knockouts in one batch: a mask that leaks from row to row is off by whole logits."""
    ours, x = model(architecture), tokens(2)
    cells = random_cells(ours)[-7:]
    got = model(architecture, "nnsight").run_batch(x, cells, n_logits=3)
    expected = torch.cat([ours.run(x, edits=cell, n_logits=3).logits for cell in cells])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("backend", ["transformer_lens", "nnsight"])
def test_reads_of_an_edited_pass_agree(architecture: str, backend: str) -> None:
    """Every site of the edited and the next layer, so that a hook on the wrong side of an edit shows."""
    ours, theirs, x = model(architecture), model(architecture, backend), tokens(12)
    sites = [Site(kind, layer) for layer in (1, 2) for kind in (*KINDS, "pattern")]  # pyright: ignore[reportArgumentType]
    cut = ActivationEdit(Site("pattern", 1), (16, 18), "knockout", None, (13, 15, 17))
    for kind in KINDS:
        edits = [ActivationEdit(Site(kind, 1), (4, 15), "add", torch.ones(2, *width(ours, kind))), cut]  # pyright: ignore[reportArgumentType]
        expected = ours.run(x, read=sites, edits=edits).activations
        got = theirs.run(x, read=sites, edits=edits).activations
        for site in sites:
            torch.testing.assert_close(got[site], expected[site], atol=1e-4, rtol=0, msg=f"{kind} edited, {site} read")
        pattern = expected[Site("pattern", 1)][0, :, [16, 18]]
        assert (pattern[:, :, [13, 15, 17]].abs().amax((0, 1)) == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kv_head_serves_its_own_query_heads(backend: str) -> None:
    """Six query heads on three KV heads: KV head g feeds query heads 2g and 2g + 1 of its layer, and no other."""
    m, x = model("llama-gqa", backend), tokens(13)
    site = Site("z", 2)
    base = m.run(x, read=[site]).activations[site]
    for kind in ("k", "v"):
        for head in range(3):
            edit = ActivationEdit(Site(kind, 2, head), (6,), "add", torch.ones(1, 8))
            moved = (m.run(x, read=[site], edits=[edit]).activations[site] - base).abs().amax((0, 1, 3)) > 1e-4
            assert moved.nonzero().flatten().tolist() == [2 * head, 2 * head + 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_head_output_patch_is_its_columns_of_the_projection(backend: str) -> None:
    """Algebra: z of head h moved by d moves attn_out by W_O[:, h] d, at that position alone."""
    m, x = model("llama-gqa", backend), tokens(14)
    site, moved = Site("attn_out", 1), torch.linspace(-1, 1, 8)
    base = m.run(x, read=[site]).activations[site][0]
    for head in (0, 3, 5):
        edit = ActivationEdit(Site("z", 1, head), (9,), "add", moved[None])
        got = m.run(x, read=[site], edits=[edit]).activations[site][0] - base
        expected = torch.zeros_like(got)
        expected[9] = m.layout.layers[1].attention.o_proj.weight[:, 8 * head : 8 * head + 8] @ moved
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "gemma2"])
def test_eager_and_sdpa_agree(architecture: str) -> None:
    """The two take masks of different kinds (additive, boolean); Gemma-2's soft-cap exists in eager alone."""
    m, x = model(architecture), tokens(2)[0].tolist()
    cells = random_cells(m)[-7:]
    read = {"n_logits": 3, "reduce": last_logits}
    expected = m.cached_run(x).edited(cells, **read)
    with m.attention("eager"):
        for run in (m.cached_run(x), PlainRun(m, x)):
            torch.testing.assert_close(run.edited(cells, **read), expected, atol=1e-4, rtol=0)


def test_layers_that_return_tuples() -> None:
    """Decoders written before transformers 5 return (hidden_states,) from a layer and unpack it themselves."""
    ours, x = model("llama-gqa"), tokens(2)[0].tolist()
    other = HuggingFaceModel(tiny("llama-gqa"))
    for modules in other.layout.layers:
        plain: Any = type(modules.layer)
        body = {
            "forward": lambda self, *args, _plain=plain, **kwargs: (_plain.forward(self, *args, **kwargs),),
            "__call__": lambda self, *args, _plain=plain, **kwargs: _plain.__call__(self, *args, **kwargs)[0],
        }
        modules.layer.__class__ = type("TupleLayer", (plain,), body)
    cells = random_cells(ours)
    read = {"n_logits": 3, "reduce": last_logits}
    expected = PlainRun(ours, x).edited(cells, **read)
    torch.testing.assert_close(PlainRun(other, x).edited(cells, **read), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(other.cached_run(x).edited(cells, **read), expected, atol=1e-4, rtol=0)
    site = Site("resid_post", 1)
    torch.testing.assert_close(other.cached_run(x).read([site])[site], ours.cached_run(x).read([site])[site])


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
    variants += [[*x, 5, 6, 7], [*x, 5, 6, 8], other, other, x[:14] + other[:8]]
    branches = [Branch(tuple(v), 1 + n % 3) for n, v in enumerate(variants)]

    def keep(logits: Tensor, index: int) -> Tensor:
        return torch.cat([logits.flatten(), torch.tensor([float(index)])])

    got = m.cached_run(x).branches(branches, reduce=keep)
    expected = PlainRun(m, x).branches(branches, reduce=keep)
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_branches_that_go_on_equal_separate_runs(architecture: str) -> None:
    """Greedy decoding in rounds on the K/V of packed trees: some stop early, some take up half of what they had."""
    m, x = model(architecture), tokens(8)[0].tolist()
    other = tokens(9)[0].tolist()
    variants = [x, x[:5] + x[12:], x[:14] + other[:9], x[:14] + other[:8], [*x, 5, 6, 7], [*x, 5, 6, 8], x[:1] + other]
    branches = [Branch(tuple(v), 1 + n % 3) for n, v in enumerate(variants)]

    def written(run: CachedRun) -> list[tuple[int, ...]]:
        texts = {i: branch.tokens[: len(branch.tokens) - i % 2] for i, branch in enumerate(branches)}

        def then(i: int, best: tuple[int, ...]) -> Branch | None:
            if len(texts[i]) >= len(branches[i].tokens) + 2 * i:
                return None
            texts[i] += best
            return Branch((*texts[i], *(7, 9)[: i % 3]), 1 + i % 3)

        run.branches(branches, reduce=lambda logits, _: logits.sum(), then=then)
        return list(texts.values())

    expected = written(PlainRun(m, x))
    assert written(m.cached_run(x)) == expected
    assert len({text[-3:] for text in expected}) == len(variants)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("backend", ["corner", "plain"])
def test_a_run_gives_its_own_logits_and_activations(architecture: str, backend: str) -> None:
    """What the run keeps, and what it computes from a later position on, is what one whole forward shows."""
    m, x = model(architecture), tokens(15)
    run = m.cached_run(x[0].tolist()) if backend == "corner" else PlainRun(m, x[0].tolist())
    torch.testing.assert_close(run.logits(3), m.run(x, n_logits=3).logits[0], atol=1e-4, rtol=0)
    sites = [Site(kind, layer) for layer in (0, 3) for kind in (*KINDS, "pattern")]  # pyright: ignore[reportArgumentType]
    sites += [Site("z", 2, 5), Site("v", 1, m.info.n_kv_heads - 1), Site("pattern", 2, 4)]
    whole = m.run(x, read=sites).activations
    for first in (0, 11):
        got = run.read(sites, first=first)
        for site in sites:
            expected = whole[site][0, ..., first:, :] if site.kind == "pattern" else whole[site][0, first:]
            torch.testing.assert_close(got[site], expected, atol=1e-4, rtol=0, msg=f"{site} from {first}")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sibling_is_the_run_of_its_own_tokens(architecture: str) -> None:
    """Longer, shorter, diverging early and late, and a sibling of a sibling: no stale prefix, and the trunk unharmed."""
    m, x, other = model(architecture), tokens(16)[0].tolist(), tokens(17)[0].tolist()
    trunk = m.cached_run(x)
    before = trunk.logits(2)
    cells = [[ActivationEdit(Site("resid_pre", layer), (p,), "zero")] for layer in (0, 2) for p in (3, 6)]
    for variant in (x[:9] + other[:6], x + other[:5], x[:12], other, x):
        for run in (trunk.sibling(variant), trunk.sibling(other[:8]).sibling(x[:4]).sibling(variant)):
            assert run.tokens == tuple(variant)
            fresh = m.cached_run(variant)
            torch.testing.assert_close(run.logits(2), fresh.logits(2), atol=1e-4, rtol=0)
            read = {"n_logits": 2, "reduce": last_logits}
            torch.testing.assert_close(run.edited(cells, **read), fresh.edited(cells, **read), atol=1e-4, rtol=0)
    assert torch.equal(trunk.logits(2), before)


def test_cheapest_cuts_against_all_cuts() -> None:
    generator = torch.Generator().manual_seed(0)
    price = torch.rand(8, 8, generator=generator).tolist()
    found = cheapest_cuts(7, lambda end: (price[first][end] for first in range(end - 1, -1, -1)))
    every = [list(pairwise([0, *(i + 1 for i in range(6) if chosen >> i & 1), 7])) for chosen in range(2**6)]
    assert found == min(every, key=lambda cuts: sum(price[a][b] for a, b in cuts))


def hooks_and_layers(m: Any) -> tuple[list[int], list[int]]:
    """Hooks in the original and in the backend's own clone or bridge, and which layers the decoder holds."""
    roots = [m.weights.model, *(getattr(m, name) for name in ("bridge", "_clone") if hasattr(m, name))]
    counts = [sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in root.modules()) for root in roots]
    return counts, [id(layer) for layer in m.layout.decoder.layers]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_survives_an_exception(backend: str) -> None:
    m, x = model("llama-gqa", backend), tokens(10)
    clean, before = m.run(x).logits, hooks_and_layers(m)
    wrong = ActivationEdit(Site("resid_pre", 2), (3,), "replace", torch.zeros(1, 7))
    with pytest.raises(CotfaithError, match=r"shape \(1, 7\), the site needs \(1, 48\)"):
        m.run(x, edits=[wrong])
    run = m.cached_run(x[0].tolist())
    good = ActivationEdit(Site("resid_pre", 2), (3,), "zero")

    def fail(logits: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run.edited([[good]], n_logits=1, reduce=fail)
    with pytest.raises(CotfaithError, match="the site needs"):
        run.edited([[wrong]], n_logits=1, reduce=last_logits)
    assert hooks_and_layers(m) == before
    assert torch.equal(m.run(x).logits, clean)


def test_a_decoder_that_only_looks_like_llama_is_refused() -> None:
    """OLMo-2 norms what attention and MLP write: its modules have Llama's names, its sites would mean something else."""
    shape = {"vocab_size": 337, "hidden_size": 48, "intermediate_size": 52, "num_hidden_layers": 3}
    config = transformers.Olmo2Config(**shape, num_attention_heads=6, num_key_value_heads=3, pad_token_id=1)
    weights = replace(tiny("llama-gqa"), model=transformers.Olmo2ForCausalLM(config).eval())
    with pytest.raises(CotfaithError, match="Olmo2ForCausalLM is no Llama-class decoder"):
        HuggingFaceModel(weights)


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
    owned = {parameter.data_ptr() for parameter in m.weights.model.parameters()}
    for backend, inside in (("transformer_lens", "bridge"), ("nnsight", "_clone")):
        other = model("llama-gqa", backend)
        other.run(x)
        assert {parameter.data_ptr() for parameter in getattr(other, inside).parameters()} == owned
    assert torch.equal(m.run(x).logits, before)
    assert m.weights.model.config._attn_implementation == "sdpa"
