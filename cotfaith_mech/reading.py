"""How a reader's answer is read off a chain, and off every text variant of it, on one shared trunk.

1. Number and text answers: the teacher-forced log-probability of each named answer after the cue, the sum over its
   tokens; `greedy` says whether greedy decoding would write exactly it (every token is the argmax and, for numbers,
   the next token is no further digit).
2. Choices: the next-token distribution over the labels after the cue, renormalised; the mass outside the labels is
   kept (`label_mass`), never hidden.
3. Every variant is encoded whole, as text; the engine then shares the tokens it has in common with the base chain.
Source: MEASURES 'Reading an answer'; Lanham et al. 2307.13702 for the forced answer after a cue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .answers import extract_answer
from .chains import Chain, TokenSpans, token_spans
from .errors import CotfaithError
from .model import Branch, CachedRun, Model
from .problems import AnswerKind


@dataclass(frozen=True)
class Reading:
    """One answer under one variant: log-probability (nats), whether greedy decoding gives it, entropy (nats) of the
    next-token distribution where the answer's first visible token is read, tokens read, and for choices the
    probability mass on the labels."""

    logp: float
    greedy: bool
    entropy: float
    n_tokens: int
    label_mass: float = 1.0

    @property
    def p(self) -> float:
        return float(np.exp(self.logp))


@dataclass(frozen=True)
class Trunk:
    """A chain that a reader has run once, with the reader's own answer a* forced after the cue."""

    model: Model
    chain: Chain
    kind: AnswerKind
    labels: tuple[str, ...]
    spans: TokenSpans
    run: CachedRun

    @classmethod
    def of(
        cls, model: Model, chain: Chain, kind: AnswerKind, labels: tuple[str, ...] = (), guess: str | None = None
    ) -> Trunk:
        """Find a* (or keep `chain.answer` if it is set already) and run the chain with it.

        `guess` (the gold answer, say) is what a* may well be: it changes no result and saves decoding steps.
        """
        run = None
        if not chain.answer:
            run, answer = own_answer(model, chain, kind, labels, guess)
            chain = chain.with_answer(f" {answer}")
        encoding = model.encode(chain.text)
        spans = token_spans(chain, encoding)
        full = run.sibling(encoding.ids) if run else model.cached_run(encoding.ids)
        return cls(model, chain, kind, labels, spans, full)

    def read(self, asked: Sequence[tuple[Chain, Sequence[str]]]) -> list[list[Reading]]:
        """Readings `[variant][answer]` of pairs of a text variant and the answers to read after its cue (`' 22'`)."""
        if self.kind == "choice":
            return self._read_choices(asked)
        branches, answer_ids = [], []
        for variant, answers in asked:
            for answer in answers:
                forced = variant.with_answer(answer)
                encoding = self.model.encode(forced.text)
                start, end = token_spans(forced, encoding).answer
                branches.append(Branch(encoding.ids, end - start + 1))
                answer_ids.append(encoding.ids[start:])
        rows = self.run.branches(branches, reduce=lambda logits, i: self._forced(logits, answer_ids[i]))
        readings = iter(
            Reading(float(row[0]), bool(row[1]), float(row[2]), len(branch.tokens))
            for row, branch in zip(rows, branches, strict=True)
        )
        return [[next(readings) for _ in answers] for _, answers in asked]

    def _forced(self, logits: Float[Tensor, "read vocab"], ids: Sequence[int]) -> Float[Tensor, "3"]:
        logp = logits.log_softmax(-1)
        target = torch.tensor(ids, device=logits.device)
        best = logits.argmax(-1).tolist()
        greedy = best[:-1] == list(ids) and not (self.kind == "number" and self.model.decode(best[-1:])[:1].isdigit())
        visible = next((i for i, token in enumerate(ids) if self.model.decode([token]).strip()), 0)
        total = logp[:-1].gather(1, target[:, None]).sum()
        return torch.stack([total, torch.tensor(float(greedy), device=total.device), _entropy(logp[visible])])

    def _read_choices(self, asked: Sequence[tuple[Chain, Sequence[str]]]) -> list[list[Reading]]:
        first = label_tokens(self.model, asked[0][0], self.labels)
        branches = [Branch(self.model.encode(variant.with_answer("").text).ids, 1) for variant, _ in asked]

        def reduce(logits: Float[Tensor, "1 vocab"], _: int) -> Float[Tensor, "label_and_mass"]:
            on_labels = logits[0].log_softmax(-1)[list(first)]
            return torch.cat([on_labels.log_softmax(-1), on_labels.exp().sum()[None]])

        rows = self.run.branches(branches, reduce=reduce)
        readings = []
        for row, branch, (_, answers) in zip(rows, branches, asked, strict=True):
            best, entropy, mass = int(row[:-1].argmax()), float(_entropy(row[:-1])), float(row[-1])
            wanted = [self.labels.index(answer.strip()) for answer in answers]
            readings.append([Reading(float(row[w]), best == w, entropy, len(branch.tokens), mass) for w in wanted])
        return readings


def _entropy(logp: Float[Tensor, "vocab"]) -> Float[Tensor, ""]:
    return -(logp.exp() * logp).nan_to_num().sum()


def label_tokens(model: Model, chain: Chain, labels: Sequence[str]) -> tuple[int, ...]:
    """First token of each choice label after the cue; CotfaithError when two labels share it."""
    tokens = []
    for label in labels:
        forced = chain.with_answer(f" {label}")
        encoding = model.encode(forced.text)
        tokens.append(encoding.ids[token_spans(forced, encoding).answer[0]])
    if len(set(tokens)) < len(tokens):
        raise CotfaithError(
            f"Choice labels {list(labels)} share a first token under {model.info.name!r}; "
            "use labels that differ in their first token, such as A, B, C."
        )
    return tuple(tokens)


def own_answer(
    model: Model, chain: Chain, kind: AnswerKind, labels: Sequence[str] = (), guess: str | None = None
) -> tuple[CachedRun, str]:
    """The reader's greedy answer after the complete chain, and a run that begins with the chain.

    Raises CotfaithError when the reader writes no answer of this kind.
    """
    run = model.cached_run(model.encode(chain.text).ids)
    if kind == "choice":
        first = label_tokens(model, chain, labels)
        return run, labels[int(run.logits(1)[0, list(first)].argmax())]
    draft = model.encode(chain.with_answer(f" {guess}.").text).ids if guess else ()
    run, written = decoded(model, run, draft)
    answer = extract_answer(written, kind)
    if not answer:
        raise CotfaithError(f"{model.info.name!r} wrote no {kind} after the cue {chain.cue!r}, but {written!r}.")
    return run, answer


def decoded(model: Model, run: CachedRun, draft: Sequence[int] = (), max_new_tokens: int = 12) -> tuple[CachedRun, str]:
    """What the model writes greedily after `run`, and the run with it; at most `max_new_tokens` tokens.

    `draft` is a whole token sequence that may come out (speculative decoding, Leviathan et al. 2211.17192): it is run
    in one pass, and of it stands what greedy decoding would have written. It changes the speed, not the result.
    """
    begun = len(run.tokens)
    if tuple(draft[:begun]) == run.tokens and len(draft) > begun:
        drafted = run.sibling(draft[: begun + max_new_tokens])
        best = drafted.logits(len(drafted.tokens) - begun + 1).argmax(-1).tolist()
        pairs = zip(drafted.tokens[begun:], best, strict=False)
        kept = next(
            (i for i, (guess, token) in enumerate(pairs) if guess != token or guess in model.stop_tokens), len(best) - 1
        )
        run = drafted.sibling(drafted.tokens[: begun + kept])
    while len(run.tokens) < begun + max_new_tokens:
        token = int(run.logits(1)[0].argmax())
        if token in model.stop_tokens:
            break
        run = run.sibling((*run.tokens, token))
    return run, model.decode(run.tokens[begun:])
