"""Activation patching on one reader and one chain: site x step, x token, x any span; windows of layers; single heads.

Patching (how to: 2404.15255, 2309.16042): the activation of a site at some tokens is replaced by a source run's.
  noise:   base = the chain, source = the other run;     denoise: base = the other run, source = the chain.
Sources:
  twin       the aligned value swap, consequences carried on: same question and sentences, other numbers, same tokens
  twin_step  the same of one step alone, the later steps left as they are
  filler     one step replaced by filler of equal length (for other parts of the chain: every step)
  other      another problem's chain, under its own question: its step j, or its last one
  mean       the mean over such chains
  cache      activations of these very tokens' positions from elsewhere, such as a TransformerLens ActivationCache
A run of `other` or `mean` has other tokens. Where two spans are equally long their activations go over token by token,
else the mean over the source's span goes to every token: nothing is cut. Such a run, or a cache, cannot be restored, so
it is no base.
All runs have a* forced after the cue. The logit difference is read at the first token where a* and the foil diverge,
the foil being the twin's answer or the runner-up (AnswerContrast.named); beside it stand p(a*), its logarithm, KL(base
|| edited) of the next token there, and whether the source's own answer is said (the counterfactual target).
A record's `head` counts query heads at z, q and pattern, KV heads at k and v, each of which serves a group of query
heads; the variant says which. Pattern is patched at the queries: their weights over all keys.
A residual patch at layer l acts through the keys and values of layers >= l alone. Patches of k or v in one layer are
another measure, named so.
Controls at the middle layer of resid_pre: self-patch (exactly 0), a random direction of the patch's norm, and the patch
at as many random positions of the other steps.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from . import edits
from .chains import Chain, TokenSpans, token_spans
from .contrast import AnswerContrast
from .errors import CotfaithError, EndpointError, check_words
from .interop import CacheSource, NamedActivations
from .measured import Measured
from .model import CachedRun
from .problems import Problem
from .reading import Trunk
from .sites import ActivationEdit, Site, SiteKind

Direction = Literal["noise", "denoise"]
Source = Literal["twin", "twin_step", "filler", "other", "mean"]
HEAD_KINDS: tuple[SiteKind, ...] = ("z", "q", "k", "v", "pattern")
Span = tuple[int, int]
States = Mapping[Site, Tensor]


@dataclass(frozen=True)
class PatchPlan:
    """What to patch. None: all layers; the twin where the problem has one, else filler.

    `parts`: `step`, `token` (each token of the steps and the cue), `prompt`, `chain`, `cue`, or `12:20` (those tokens).
    `by_head`: each head by itself, at sites that have heads, instead of all together. `window`: so many layers at once.
    """

    layers: tuple[int, ...] | None = None
    directions: tuple[Direction, ...] = ("noise", "denoise")
    kinds: tuple[SiteKind, ...] = ("resid_pre",)
    parts: tuple[str, ...] = ("step",)
    sources: tuple[Source, ...] | None = None
    by_head: bool = False
    window: int = 1

    def __post_init__(self) -> None:
        check_words("directions", self.directions, get_args(Direction))
        check_words("kinds", self.kinds, get_args(SiteKind))
        check_words("sources", self.sources or (), get_args(Source))
        for name in ("layers", "directions", "kinds", "parts", "sources"):
            if (values := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(dict.fromkeys(values)))
        named = ("step", "token", "prompt", "chain", "cue")
        if bad := [part for part in self.parts if part not in named and not _is_range(part)]:
            raise CotfaithError(
                f"{', '.join(bad)} is no part of a chain; use {', '.join(named)}, or tokens like 12:20."
            )
        if self.by_head and (without := [kind for kind in self.kinds if kind not in HEAD_KINDS]):
            raise CotfaithError(f"{', '.join(without)} has no heads; use {', '.join(HEAD_KINDS)} with by_head.")
        if self.layers == () or self.window < 1:
            raise CotfaithError(f"layers={self.layers}, window={self.window}: name a layer, and a window of 1 or more.")


_RANGE = re.compile(r"(\d+):(\d+)")


def _is_range(part: str) -> bool:
    match = _RANGE.fullmatch(part)
    return match is not None and int(match[1]) < int(match[2])


def step_edits(layer: int, span: Span, source: Tensor) -> list[ActivationEdit]:
    """One cell: resid_pre of `layer` at the tokens of `span` replaced by `source[span]`."""
    return [ActivationEdit(Site("resid_pre", layer), tuple(range(*span)), "replace", source[span[0] : span[1]])]


def measure_patching(
    trunk: Trunk,
    problem: Problem,
    reader: str,
    plan: PatchPlan | None = None,
    *,
    donors: Sequence[Chain] = (),
    cache: NamedActivations | None = None,
    controls: bool = True,
    seed: int = 0,
) -> Measured:
    """Records of `patching` and its `controls`; what cannot be made of `plan` on this chain is an exclusion.

    Per cell, at its `layer` and `step` (`head`, `position`): `logit_diff` of the edited run (logits), `p_answer`
    (probability), `logp_answer` and `kl` (nats), `says_source` (0 or 1); without a layer `logit_diff_base` and
    `logit_diff_source`, what the two runs say unedited. How to read them: 2404.15255.

    `donors` are chains of other problems, for the sources `other` (the first one) and `mean` (all). With a `cache`,
    which `run_with_cache` of TransformerLens gave on as many tokens, noise is patched from it and no other source.
    Raises CotfaithError for layers the model does not have and a cache that does not fit.
    """
    plan = plan or PatchPlan()
    measured, n_layers = Measured(trunk.chain, reader), trunk.model.info.n_layers
    if absent := [layer for layer in plan.layers or () if not 0 <= layer < n_layers]:
        raise CotfaithError(f"Layers {absent} do not exist: {trunk.model.info.name!r} has 0 to {n_layers - 1}.")
    try:
        contrast = AnswerContrast.named(trunk, problem.twin_answer)
    except EndpointError:
        raise
    except CotfaithError as error:
        measured.exclusions.append(f"patching: {error}")
        return measured
    if cache is None:
        others = _all_others(trunk, problem, plan, donors, measured)
    else:
        others = [_Other("cache", (CacheSource(cache, len(trunk.run.tokens)),), (trunk.spans,))]
        if "denoise" in plan.directions:
            measured.exclusions.append("denoising from cache: a cache is no run that could be restored; noise alone")
    for other in others:
        parts = list(_parts(plan, trunk.spans, other, measured))
        for direction in plan.directions:
            if parts and (direction == "noise" or other.restores):
                _patch(_Patch(trunk, contrast, plan, direction, other, problem.twin_answer), parts, measured)
        if controls:
            _norm_matched(measured, trunk, contrast, plan, other, seed)
    if controls:
        _controls(measured, trunk, contrast, problem, plan, seed)
    return measured


@dataclass(frozen=True)
class _Other:
    """The other runs of a patch, with the spans of each; several where their mean is the source.

    `step`: the one in which alone it differs from the chain (None: more). `aligned`: its positions are the chain's.
    """

    source: Source | Literal["cache"]
    runs: tuple[CachedRun | CacheSource, ...]
    spans: tuple[TokenSpans, ...]
    step: int | None = None
    aligned: bool = True

    @property
    def restores(self) -> bool:
        """Whether it can be a base run too."""
        return self.aligned and self.source != "cache"

    @property
    def run(self) -> CachedRun:
        """The one run of an other that restores."""
        (run,) = self.runs
        assert not isinstance(run, CacheSource)
        return run


def _all_others(
    trunk: Trunk, problem: Problem, plan: PatchPlan, donors: Sequence[Chain], measured: Measured
) -> Iterator[_Other]:
    for source in plan.sources or (("twin",) if problem.twin_steps else ("filler",)):
        yield from _others(trunk, problem, source, plan, donors, measured)


def _others(
    trunk: Trunk, problem: Problem, source: Source, plan: PatchPlan, donors: Sequence[Chain], measured: Measured
) -> Iterator[_Other]:
    """The other runs of `source`; why one cannot be had is an exclusion."""
    if source in ("other", "mean"):
        chosen = donors[:1] if source == "other" else donors
        encodings = [trunk.model.encode(donor.text) for donor in chosen]
        spans = tuple(token_spans(donor, encoding) for donor, encoding in zip(chosen, encodings, strict=True))
        if len(chosen) < (2 if source == "mean" else 1):
            measured.exclusions.append(
                f"patching from {source}: there is no other problem's chain" + " but one" * len(chosen)
            )
        else:
            yield _Other(source, tuple(trunk.run.sibling(e.ids) for e in encodings), spans, None, False)
        return
    if source != "filler" and not problem.twin_steps:
        measured.exclusions.append(
            f"patching from {source}: the problem has no aligned twin to take source activations from; use filler, "
            "other or mean"
        )
        return
    if source == "twin_step" and len(problem.twin_steps) != len(trunk.chain.steps):
        measured.exclusions.append("patching from twin_step: the twin has another number of steps")
        return
    if source == "twin_step" and (whole := [part for part in plan.parts if part not in ("step", "token")]):
        measured.exclusions.append(f"patching from twin_step: it alters one step; {', '.join(whole)} is left out")
    for step, chain in _altered(trunk, problem, source, plan):
        if (run := _aligned_run(trunk, chain)) is not None:
            yield _Other(source, (run,), (trunk.spans,), step)
        else:
            where = "" if step is None else f", step {step}"
            measured.exclusions.append(f"patching from {source}{where}: its tokens do not align with the chain's")


def _altered(trunk: Trunk, problem: Problem, source: Source, plan: PatchPlan) -> Iterator[tuple[int | None, Chain]]:
    """The altered chains of a source, each with the step in which alone it differs."""
    own, within_steps = trunk.chain, {"step", "token"} & set(plan.parts)
    if source == "twin":
        yield None, replace(own, steps=problem.twin_steps)
    if source == "filler" and set(plan.parts) - within_steps:
        yield None, edits.filler(own, 0, trunk.model.count)
    for j, step in enumerate(own.steps if within_steps else ()):
        if source == "filler":
            yield j, edits.filler(own, j, trunk.model.count, end=j + 1)
        elif source == "twin_step" and step != (swapped := problem.twin_steps[j]):
            yield j, replace(own, steps=(*own.steps[:j], swapped, *own.steps[j + 1 :]))


def _aligned_run(trunk: Trunk, chain: Chain) -> CachedRun | None:
    """The run of a chain whose pieces stand at the same tokens as the trunk's; None where they do not."""
    encoding = trunk.model.encode(chain.text)
    return trunk.run.sibling(encoding.ids) if token_spans(chain, encoding) == trunk.spans else None


def other_run(trunk: Trunk, problem: Problem) -> CachedRun | None:
    """The twin's run, or without a twin that of the chain with filler in place of every step; None where its tokens do
    not align with the chain's."""
    steps = problem.twin_steps or edits.filler(trunk.chain, 0, trunk.model.count).steps
    return _aligned_run(trunk, replace(trunk.chain, steps=steps))


@dataclass(frozen=True)
class _Part:
    """Tokens patched together, where they are taken from in each of the other runs, and their coordinates."""

    name: str
    span: Span
    taken: tuple[Span, ...]
    where: dict[str, int]


def _parts(plan: PatchPlan, own: TokenSpans, other: _Other, measured: Measured) -> Iterator[_Part]:
    """The parts of a plan that one other run can give: of one altered step that step and its tokens alone. Why one
    cannot be had is an exclusion."""
    for name in plan.parts:
        if name in ("step", "token"):
            steps = range(len(own.steps)) if other.step is None else (other.step,)
            for j in steps if other.source != "filler" or other.step is not None else ():
                taken = tuple(spans.steps[min(j, len(spans.steps) - 1)] for spans in other.spans)
                yield from _step_parts(name, j, own.steps[j], taken)
            if name == "token" and other.source in ("twin", "cache"):
                yield from (_Part(name, (at, at + 1), ((at, at + 1),), {"position": at}) for at in range(*own.cue))
            elif name == "token" and other.step in (None, 0):
                why = f"patching from {other.source}: of single tokens those of the steps alone, not the cue's"
                measured.exclusions.append(why)
            continue
        if other.step is not None:
            continue
        if match := _RANGE.fullmatch(name):
            span, taken = (int(match[1]), int(match[2])), ((int(match[1]), int(match[2])),)
            inside = other.aligned and span[1] <= own.answer[1]
            why = f"the chain's tokens are 0:{own.answer[1]}" if other.aligned else "it has other tokens"
        else:
            span, taken = _named(own, name), tuple(_named(spans, name) for spans in other.spans)
            inside, why = all(first < end for first, end in (span, *taken)), "there it has no tokens"
        if inside:
            yield _Part(name, span, taken, {})
        else:
            measured.exclusions.append(f"patching: {name} cannot be taken from {other.source}: {why}")


def _step_parts(name: str, step: int, span: Span, taken: tuple[Span, ...]) -> Iterator[_Part]:
    if name == "step":
        yield _Part(name, span, taken, {"step": step})
        return
    for offset, at in enumerate(range(*span)):
        each = tuple((a + offset, a + offset + 1) if b - a == span[1] - span[0] else (a, b) for a, b in taken)
        yield _Part(name, (at, at + 1), each, {"step": step, "position": at})


def _named(spans: TokenSpans, name: str) -> Span:
    return {"prompt": spans.prompt, "chain": (spans.prompt[1], spans.cue[0]), "cue": spans.cue}[name]


@dataclass(frozen=True)
class _Patch:
    """One direction between a chain and other runs, by a plan."""

    trunk: Trunk
    contrast: AnswerContrast
    plan: PatchPlan
    direction: Direction
    other: _Other
    twin_answer: str | None

    @property
    def base(self) -> CachedRun:
        return self.other.run if self.direction == "denoise" else self.trunk.run

    @property
    def given(self) -> tuple[CachedRun | CacheSource, ...]:
        """The source's runs."""
        return self.other.runs if self.direction == "noise" else (self.trunk.run,)

    def variant(self, kind: SiteKind, part: str) -> str:
        """The direction, and whatever is not the plainest patch: of a step at resid_pre, all heads, from the twin."""
        heads = "" if not self.plan.by_head else "kv_head" if kind in ("k", "v") else "head"
        window = f"window_{self.plan.window}" if self.plan.window > 1 else ""
        source = "" if self.other.source == "twin" else self.other.source
        parts = [source, "" if kind == "resid_pre" else kind, heads, "" if part == "step" else part, window]
        return "/".join([self.direction, *filter(None, parts)])

    def layers(self) -> Sequence[int]:
        return range(self.trunk.model.info.n_layers) if self.plan.layers is None else self.plan.layers

    def window(self, layer: int) -> range:
        return range(layer, min(layer + self.plan.window, self.trunk.model.info.n_layers))

    def heads(self, kind: SiteKind) -> Sequence[int | None]:
        info = self.trunk.model.info
        n_heads = info.n_kv_heads if kind in ("k", "v") else info.n_heads
        return range(n_heads) if self.plan.by_head else (None,)


def _patch(patch: _Patch, parts: Sequence[_Part], measured: Measured) -> None:
    for kind in patch.plan.kinds:
        if kind == "pattern" and not patch.other.aligned:
            reason = f"patching from {patch.other.source} at pattern: its run has other keys; patch z instead"
            measured.exclusions.append(reason)
            continue
        _patch_kind(patch, kind, parts, measured)


def _patch_kind(patch: _Patch, kind: SiteKind, parts: Sequence[_Part], measured: Measured) -> None:
    base, contrast = patch.base, patch.contrast
    sites = [Site(kind, layer) for layer in sorted({at for layer in patch.layers() for at in patch.window(layer)})]
    states = [run.read(sites) for run in patch.given]
    cells, coordinates = [], []
    for part in parts:
        for layer in patch.layers():
            for head in patch.heads(kind):
                cells.append([_edit(Site(kind, at, head), part, states) for at in patch.window(layer)])
                where = {"site": str(Site(kind, layer, head)), "layer": layer, "head": head}
                coordinates.append((patch.variant(kind, part.name), where | part.where))
    own = base.logits(contrast.n_logits)
    rows = base.edited(cells, n_logits=contrast.n_logits, reduce=contrast.beside(own))
    for (variant, where), row in zip(coordinates, rows.tolist(), strict=True):
        measured.add("patching", variant, _values(patch, row), len(base.tokens), **where)
    references = {"base": own}
    if patch.other.restores:
        source = patch.other.run if patch.direction == "noise" else patch.trunk.run
        references["source"] = source.logits(contrast.n_logits)
    where = {} if patch.other.step is None else {"step": patch.other.step}
    for variant in dict.fromkeys(variant for variant, _ in coordinates):
        for name, logits in references.items():
            row = contrast.reduce(logits[None])[0].tolist()
            values = {f"logit_diff_{name}": row[0], f"p_answer_{name}": row[1]}
            measured.add("patching", variant, values, len(base.tokens), **where)


def _edit(site: Site, part: _Part, states: Sequence[States]) -> ActivationEdit:
    """`site` at the tokens of `part` replaced by the source's: token by token, or by the mean of a span of another
    length; the mean over the runs."""
    whole, n = replace(site, head=None), part.span[1] - part.span[0]
    values = []
    for (first, end), state in zip(part.taken, states, strict=True):
        rows = state[whole][:, first:end].transpose(0, 1) if site.kind == "pattern" else state[whole][first:end]
        values.append(rows if end - first == n else rows.mean(0, keepdim=True).expand(n, *rows.shape[1:]))
    value = values[0] if len(values) == 1 else torch.stack(values).mean(0)
    return ActivationEdit(
        site, tuple(range(*part.span)), "replace", value if site.head is None else value[:, site.head]
    )


def _values(patch: _Patch, row: Sequence[float]) -> dict[str, float]:
    """Metrics of one cell. The source's answer is a* when the chain donates, the foil when the twin does."""
    difference, p, says_foil, says_own, _, logp, divergence = row
    values = {"logit_diff": difference, "p_answer": p, "logp_answer": logp, "kl": divergence}
    if patch.direction == "denoise":
        return values | {"says_source": says_own}
    foil_is_the_twins = patch.other.source == "twin" and patch.twin_answer is not None
    return values | {"says_source": says_foil} if foil_is_the_twins else values


def _middle(plan: PatchPlan, trunk: Trunk) -> Site:
    layers = sorted(range(trunk.model.info.n_layers) if plan.layers is None else plan.layers)
    return Site("resid_pre", layers[len(layers) // 2])


def _norm_matched(
    measured: Measured, trunk: Trunk, contrast: AnswerContrast, plan: PatchPlan, other: _Other, seed: int
) -> None:
    """Control of a source, at each step it can give: the residual stream there moved in a random direction, as far at
    every token as the patch moves it."""
    middle, run = _middle(plan, trunk), trunk.run
    base = run.read([middle])[middle]
    states = [other_run.read([middle]) for other_run in other.runs]
    parts = list(_parts(PatchPlan(plan.layers), trunk.spans, other, measured))
    cells = []
    for part in parts:
        step = part.where["step"]
        own, value = base[slice(*part.span)], _edit(middle, part, states).value.to(base)
        random = torch.randn(own.shape, generator=torch.Generator().manual_seed(seed + step)).to(own)
        random = random * ((value - own).norm(dim=-1) / random.norm(dim=-1))[:, None]
        cells.append([ActivationEdit(middle, tuple(range(*part.span)), "replace", own + random)])
    if not cells:
        return
    read = {"n_logits": contrast.n_logits, "reduce": contrast.reduce}
    p_base = float(contrast.reduce(run.logits(contrast.n_logits)[None])[0, 1])
    variant = "norm_matched" + ("" if other.source == "twin" else f"/{other.source}")
    for part, p in zip(parts, run.edited(cells, **read)[:, 1].tolist(), strict=True):
        where = {"site": str(middle), "layer": middle.layer, "step": part.where["step"], "seed": seed}
        measured.add("control", variant, {"delta_p": p_base - p}, len(run.tokens), **where)


def _controls(
    measured: Measured, trunk: Trunk, contrast: AnswerContrast, problem: Problem, plan: PatchPlan, seed: int
) -> None:
    """At the middle of the patched layers: self-patch of one step, drawn from `seed`; and for each step the twin's
    states, or those of a chain of filler, at as many random positions of other steps.

    The self-patch is compared with a null edit of the same shape, so that not a bit may differ.
    """
    run, read = trunk.run, {"n_logits": contrast.n_logits, "reduce": contrast.reduce}
    middle = _middle(plan, trunk)
    base = run.read([middle])[middle]
    span = trunk.spans.steps[int(np.random.default_rng(seed).integers(len(trunk.spans.steps)))]
    null = ActivationEdit(middle, tuple(range(*span)), "add", torch.zeros_like(base[slice(*span)]))
    self_patch = run.edited([step_edits(middle.layer, span, base)], **read) - run.edited([[null]], **read)
    worst = {"max_abs_diff": float(self_patch.abs().amax())}
    measured.add("control", "self_patch", worst, len(run.tokens), layer=middle.layer)
    if (other := other_run(trunk, problem)) is None:
        measured.exclusions.append("patching controls: the twin's or filler's tokens do not align with the chain's")
        return
    cells = dict(_elsewhere(trunk.spans, middle, other.read([middle])[middle], seed))
    p_base = float(contrast.reduce(run.logits(contrast.n_logits)[None])[0, 1])
    rows = run.edited(list(cells.values()), **read)[:, 1].tolist() if cells else []
    for step, p in zip(cells, rows, strict=True):
        where = {"site": str(middle), "layer": middle.layer, "step": step, "seed": seed}
        measured.add("control", "random_positions", {"delta_p": p_base - p}, len(run.tokens), **where)


def _elsewhere(spans: TokenSpans, site: Site, source: Tensor, seed: int) -> Iterator[tuple[int, list[ActivationEdit]]]:
    """For each step as many random positions of the other steps, fewer where these have not as many."""
    for j, own in enumerate(spans.steps):
        others = [at for i, span in enumerate(spans.steps) if i != j for at in range(*span)]
        n = min(own[1] - own[0], len(others))
        drawn = sorted(np.random.default_rng([seed, 7, j]).choice(others, n, replace=False).tolist()) if n else []
        if drawn:
            yield j, [ActivationEdit(site, tuple(drawn), "replace", source[drawn])]
