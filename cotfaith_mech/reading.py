"""How a reader's answer is read off a chain, and off every text variant of it, on one shared trunk.

1. Number and text answers: the teacher-forced log-probability of each named answer after the cue, the sum over its
   tokens; a number must end there, so the probability that a digit follows, or a point and a digit, is taken off (63 is
   neither 636 nor 63.5).
2. What the reader says is decoded greedily, for all variants at once, until nothing that may follow can change it.
3. Choices and yes/no/maybe: the next-token distribution over the labels after the cue, renormalised; the mass outside
   the labels is kept (`label_mass`), and a chain on whose labels too little lies is refused.
4. Every variant is encoded whole, as text; the engine then shares the tokens it has in common with the base chain.
Source: MEASURES 'Reading an answer'; Lanham et al. 2307.13702 for the forced answer after a cue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .answers import is_whole, same_answer, uncut_answer
from .chains import Chain, TokenSpans, token_spans
from .errors import CotfaithError
from .model import Branch, CachedRun, Ids, Model, TextReader
from .problems import AnswerKind, Problem
from .sampling import supplied_chain

MIN_LABEL_MASS = 0.5
"""Least probability on the choice labels after the complete chain; below it their ratio is no answer."""
MAX_ANSWER_TOKENS = 20
BATCH = 16


@dataclass(frozen=True)
class Reading:
    """One answer under one variant: its log-probability (nats) and the standard error of its probability (0: exact),
    whether the reader says it, entropy (nats) where its first visible token is read, tokens read, and for choices the
    probability mass on the labels."""

    logp: float
    greedy: bool
    entropy: float
    n_tokens: int
    label_mass: float = 1.0
    p_se: float = 0.0

    @property
    def p(self) -> float:
        return float(np.exp(self.logp))


@dataclass(frozen=True)
class Answered:
    """What a reader says after one text (None: no answer of this kind, or logits that are NaN), and a Reading of each
    answer asked about."""

    said: str | None
    readings: tuple[Reading, ...]


Asked = Sequence[tuple[Chain, Sequence[str]]]
"""Text variants, each with the answers to read after its cue (`' 22'`)."""


@runtime_checkable
class ChainReader(Protocol):
    """A reader that has read a complete chain and given its own answer a* (`chain.answer`); text is all it shows."""

    @property
    def model(self) -> TextReader: ...
    @property
    def chain(self) -> Chain: ...
    @property
    def kind(self) -> AnswerKind: ...

    def read(self, asked: Asked) -> list[Answered]:
        """One Answered for each text variant; all answers of a call are read under the same question's labels."""
        ...


@dataclass(frozen=True)
class Trunk:
    """A chain that a reader has run once, with the reader's own answer a* forced after the cue.

    Made by `of_problem`. `chain.answer` is a* (`' 22'`), `spans` the token spans of prompt, steps, cue and answer,
    `run` the cached run whose activations are patched and whose edges are cut.
    """

    model: Model
    chain: Chain
    kind: AnswerKind
    labels: tuple[str, ...]
    spans: TokenSpans
    run: CachedRun

    @classmethod
    def of_problem(cls, model: Model, problem: Problem, chain: Chain | None = None) -> Trunk:
        """Let `model` read `chain`, by default the problem's own worked one, and answer the problem.

        Raises CotfaithError when there is no chain, and when the reader gives no answer of the problem's kind.
        """
        if chain is None and not problem.steps:
            raise CotfaithError(
                f"Problem {problem.problem_id!r} comes without worked steps; give a chain, "
                "as sampling.write_chains lets a model write it."
            )
        chain = chain or supplied_chain(model, problem)
        return cls.of(model, chain, problem.kind, problem.labels, problem.gold)

    @classmethod
    def of(
        cls,
        model: Model,
        chain: Chain,
        kind: AnswerKind,
        labels: tuple[str, ...] = (),
        guess: str | None = None,
        min_label_mass: float = MIN_LABEL_MASS,
    ) -> Trunk:
        """Find a* (or keep `chain.answer` if it is set already) and run the chain with it.

        `guess` (the gold answer, say) is what a* may well be: it changes no result and saves decoding steps.
        """
        run = None
        if not chain.answer:
            run, answer = own_answer(model, chain, kind, labels, guess, min_label_mass)
            chain = chain.with_answer(f" {answer}")
        encoding = model.encode(chain.text)
        spans = token_spans(chain, encoding)
        full = run.sibling(encoding.ids) if run else model.cached_run(encoding.ids)
        return cls(model, chain, kind, labels, spans, full)

    def read(self, asked: Asked) -> list[Answered]:
        """See `ChainReader.read`."""
        return self._read_labels(asked) if self.labels else self._read_free(asked)

    def _read_free(self, asked: Asked) -> list[Answered]:
        ending = self._ending()
        forced = [
            [_Forced(*_forced_ids(self.model, variant, answer)) for answer in answers] for variant, answers in asked
        ]
        flat = [one for row in forced for one in row]
        branches = [Branch((*one.ids, *ending), len(one.answer) + len(ending) + 1) for one in flat]
        first = np.cumsum([0, *(len(row) for row in forced)]).tolist()
        decoding = {i: _Decoding(self.model, self.kind, flat[i], ending) for i in first[:-1]}

        def reduce(logits: Float[Tensor, "read vocab"], i: int) -> Float[Tensor, "2"]:
            return self._score(logits, flat[i].answer, ending)

        def then(i: int, best: Ids) -> Branch | None:
            return decoding[i].go_on(best) if i in decoding else None

        if self.run.accelerated:
            scored = self.run.branches(branches, reduce=reduce, then=then)
            said = [decoding[i].said for i in first[:-1]]
        else:
            scored = self.run.branches(branches, reduce=reduce)
            said = self._generated([variant for variant, _ in asked])
        answered = []
        for word, (_, answers), start, end in zip(said, asked, first, first[1:], strict=False):
            if any(scored[i].isnan().any() for i in range(start, end)):
                word = None
            readings = [
                Reading(float(logp), same_answer(word or "", answer, self.kind), float(entropy), len(one.ids))
                for answer, one, (logp, entropy) in zip(answers, flat[start:end], scored[start:end], strict=True)
            ]
            answered.append(Answered(word, tuple(readings)))
        return answered

    def _ending(self) -> tuple[int, ...]:
        """Tokens of the full stop that likely follows an answer: read along, they save a decoding step."""
        ids, longer = (self.model.encode(self.chain.text + end).ids for end in ("", "."))
        return longer[len(ids) :] if longer[: len(ids)] == ids else ()

    def _score(self, logits: Float[Tensor, "read vocab"], ids: Sequence[int], ending: Ids) -> Float[Tensor, "2"]:
        """Log-probability of the answer `ids`, and the entropy at its first visible token."""
        logp = logits.log_softmax(-1)
        visible = next((i for i, token in enumerate(ids) if self.model.decode([token]).strip()), 0)
        total = logp[: len(ids)].gather(1, torch.tensor(ids, device=logits.device)[:, None]).sum()
        if self.kind == "number":
            digits = list(self.model.digit_tokens)
            further = logp[len(ids), digits].exp().sum()
            if len(ending) == 1:
                further = further + logp[len(ids), ending[0]].exp() * logp[len(ids) + 1, digits].exp().sum()
            total = total + torch.log1p(-further.clamp(max=1 - 1e-7))
        return torch.stack([total, _entropy(logp[visible])])

    def _generated(self, variants: Sequence[Chain]) -> list[str | None]:
        """What decoding on the trunk says, by the model's own batched generation: for a run that shares no trunk."""
        said = []
        for first in range(0, len(variants), BATCH):
            prompts = [variant.with_answer("").text for variant in variants[first : first + BATCH]]
            for text in self.model.generate(prompts, max_new_tokens=MAX_ANSWER_TOKENS):
                said.append(uncut_answer(text, self.kind, self.model.count(text) >= MAX_ANSWER_TOKENS))
        return said

    def _read_labels(self, asked: Asked) -> list[Answered]:
        tokens = label_tokens(self.model, asked[0][0], self.labels)
        branches = [Branch(_before_labels(self.model, variant, self.labels), 1) for variant, _ in asked]

        def reduce(logits: Float[Tensor, "1 vocab"], _: int) -> Float[Tensor, "label_and_mass"]:
            on_labels = logits[0].log_softmax(-1)[list(tokens)]
            return torch.cat([on_labels.log_softmax(-1), on_labels.exp().sum()[None]])

        rows = self.run.branches(branches, reduce=reduce)
        answered = []
        for row, branch, (_, answers) in zip(rows, branches, asked, strict=True):
            best, entropy, mass = int(row[:-1].argmax()), float(_entropy(row[:-1])), float(row[-1])
            wanted = [self.labels.index(answer.strip()) for answer in answers]
            readings = [Reading(float(row[w]), best == w, entropy, len(branch.tokens), mass) for w in wanted]
            answered.append(Answered(None if row.isnan().any() else self.labels[best], tuple(readings)))
        return answered


@dataclass(frozen=True)
class _Forced:
    """Tokens of a text up to its cue, and of an answer forced after it."""

    before: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        return (*self.before, *self.answer)


class _Decoding:
    """The greedy answer after a text: first of the forced answer as much as is likely, then a token a round, with the
    `ending` that is likely to follow read along (speculative decoding, Leviathan et al. 2211.17192)."""

    def __init__(self, model: Model, kind: AnswerKind, forced: _Forced, ending: Ids) -> None:
        self.model, self.before, self.ending = model, forced.before, ending
        self.kind: AnswerKind = kind
        self.path: Ids = ()
        self.draft: Ids = (*forced.answer, *ending)

    def go_on(self, best: Ids) -> Branch | None:
        """Take the most likely token after the path and each token of its draft; what is read next, unless it is over.

        What is known of the path and not yet read, its last token, is read with a draft of the ending.
        """
        self.path += _greedy_path(self.draft, best)
        if _is_over(self.model, self.path, self.kind):
            return None
        self.draft = self.ending
        return Branch((*self.before, *self.path, *self.ending), len(self.ending) + 1)

    @property
    def said(self) -> str | None:
        return _said(self.model, self.path, self.kind)


def _greedy_path(draft: Sequence[int], best: Sequence[int]) -> Ids:
    """The tokens of `draft` as far as they are the argmax of the text before them, and the argmax that follows."""
    agreed = next((i for i, token in enumerate(draft) if best[i] != token), len(draft))
    return (*draft[:agreed], best[agreed])


def _is_over(model: Model, path: Sequence[int], kind: AnswerKind) -> bool:
    stopped = any(token in model.stop_tokens for token in path)
    return stopped or len(path) >= MAX_ANSWER_TOKENS or is_whole(model.decode(path), kind)


def _text(model: Model, path: Sequence[int]) -> str:
    """What `path` says before its first stop token, of at most MAX_ANSWER_TOKENS tokens."""
    path = path[:MAX_ANSWER_TOKENS]
    end = next((i for i, token in enumerate(path) if token in model.stop_tokens), len(path))
    return model.decode(path[:end])


def _said(model: Model, path: Sequence[int], kind: AnswerKind) -> str | None:
    stopped = any(token in model.stop_tokens for token in path[:MAX_ANSWER_TOKENS])
    return uncut_answer(_text(model, path), kind, not stopped and len(path) >= MAX_ANSWER_TOKENS)


def _entropy(logp: Float[Tensor, "vocab"]) -> Float[Tensor, ""]:
    return -(logp.exp() * logp).masked_fill(logp == -torch.inf, 0).sum()


def label_tokens(model: Model, chain: Chain, labels: Sequence[str]) -> tuple[int, ...]:
    """The token of each label after the cue at which they part; CotfaithError when one is the beginning of another."""
    answers = [_forced_ids(model, chain, f" {label}")[1] for label in labels]
    shared = _shared_length(answers)
    tokens = tuple(answer[shared] for answer in answers if len(answer) > shared)
    if len(set(tokens)) < len(labels):
        raise CotfaithError(
            f"Choice labels {list(labels)} do not part at one token under {model.info.name!r}; "
            "use labels that differ in their first token, such as A, B, C."
        )
    return tokens


def _before_labels(model: Model, chain: Chain, labels: Sequence[str]) -> tuple[int, ...]:
    """Tokens of `chain` up to where the labels part: with the blank before them where that is a token of its own."""
    forced = [_forced_ids(model, chain, f" {label}") for label in labels]
    before, answer = forced[0]
    return (*before, *answer[: _shared_length([ids for _, ids in forced])])


def _forced_ids(model: Model, chain: Chain, answer: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens of `chain` before `answer`, forced after its cue, and of the answer."""
    forced = chain.with_answer(answer)
    encoding = model.encode(forced.text)
    start = token_spans(forced, encoding).answer[0]
    return encoding.ids[:start], encoding.ids[start:]


def _shared_length(answers: Sequence[Sequence[int]]) -> int:
    return next(
        (i for i, tokens in enumerate(zip(*answers, strict=False)) if len(set(tokens)) > 1), min(map(len, answers))
    )


def own_answer(
    model: Model,
    chain: Chain,
    kind: AnswerKind,
    labels: Sequence[str] = (),
    guess: str | None = None,
    min_label_mass: float = MIN_LABEL_MASS,
) -> tuple[CachedRun, str]:
    """The reader's greedy answer after the complete chain, and a run that begins with the chain.

    Raises CotfaithError when the reader writes no answer of this kind, puts less than `min_label_mass` on labels, or
    its logits are not finite.
    """
    run = model.cached_run(_before_labels(model, chain, labels) if labels else model.encode(chain.text).ids)
    if not run.logits(1).isfinite().all():
        raise CotfaithError(
            f"{model.info.name!r} ({model.info.dtype}) gives NaN or infinite logits after the complete chain of "
            f"{len(run.tokens)} tokens; see whether its weights are whole, or use float32."
        )
    if labels:
        on_labels = run.logits(1)[0].log_softmax(-1)[list(label_tokens(model, chain, labels))]
        check_label_mass(model, float(on_labels.exp().sum()), labels, min_label_mass)
        return run, labels[int(on_labels.argmax())]
    draft = model.encode(chain.with_answer(f" {guess}.").text).ids if guess else ()
    run, path = decoded(model, run, kind, draft)
    answer = _said(model, path, kind)
    if not answer:
        raise CotfaithError(
            f"{model.info.name!r} gave no {kind} at once after the cue {chain.cue!r}, but wrote "
            f"{_text(model, path)!r}; give another cue or reader."
        )
    return run, answer


def check_label_mass(model: TextReader, mass: float, labels: Sequence[str], least: float) -> None:
    """Raises CotfaithError when the reader puts less than `least` of its probability on the labels."""
    if mass < least:
        raise CotfaithError(
            f"{model.info.name!r} puts {mass:.2f} of its probability on the labels {', '.join(labels)} after the "
            f"complete chain, less than {least}; give another cue or template, or lower min_label_mass."
        )


def decoded(
    model: Model, run: CachedRun, kind: AnswerKind, draft: Sequence[int] = ()
) -> tuple[CachedRun, tuple[int, ...]]:
    """What the model writes greedily after `run` until its answer is over, and a run that begins with `run`'s tokens.

    `draft` is a whole token sequence that may come out (speculative decoding, Leviathan et al. 2211.17192): it is run
    in one pass, and of it stands what greedy decoding would have written. It changes the speed, not the result.
    """
    begun = len(run.tokens)
    path: tuple[int, ...] = ()
    if tuple(draft[:begun]) == run.tokens and len(draft) > begun:
        run = run.sibling(draft[: begun + MAX_ANSWER_TOKENS])
        path = _greedy_path(run.tokens[begun:], run.logits(len(run.tokens) - begun + 1).argmax(-1).tolist())
    while not path or not _is_over(model, path, kind):
        run = run.sibling((*run.tokens[:begun], *path))
        path = (*path, int(run.logits(1)[0].argmax()))
    return run, path
