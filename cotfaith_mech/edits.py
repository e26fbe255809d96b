"""Text edits: pure functions from a Chain to an edited Chain. Prompt, cue and answer are never touched.

1. truncate: keep s_1..s_i (early answering, Lanham et al. 2307.13702).
2. filler: replace s_{i+1}..s_n, or one step, by a repeated filler of the same token count; filler_once: by the filler
   once; delete: leave one step out.
3. paraphrase: put other wordings, made beforehand, in the place of s_{i+1}..s_n, or of one step.
4. mistake: alter one number of one step, its stated result first, digit for digit; where a step has no number, a
   number word, a choice label, a name, or a word that has an opposite (higher, effective). propagate: carry it on
   through the later steps, whose results are calculated again. mistake_all: every step that can be altered.
5. shuffle: steps in another order. swap: another problem's steps.
An edit that cannot be made returns None, so that its caller writes an exclusion; a random one takes its Generator.
Source: MEASURES 'Behavioural tests'.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache

import numpy as np

from .answers import Number, labels, numbers
from .calculations import carry_on, quantities, written_like
from .chains import Chain
from .errors import CotfaithError
from .paraphrase import CARDINALS, FRACTIONS, names

_PAIRS = """higher lower|increased decreased|increase decrease|increases decreases|more less|most least
greater smaller|better worse|best worst|positive negative|before after|effective ineffective|safe unsafe
common rare|useful useless|early late|earlier later|longer shorter|reliable unreliable|likely unlikely
significant insignificant|can cannot|first last|above below|always never|improved worsened
improves worsens|improve worsen|high low|strong weak|all none|true false|possible impossible"""
_OPPOSITES = {one: other for pair in re.split(r"[|\n]", _PAIRS) for one, other in (pair.split(), pair.split()[::-1])}
_DRAWS = 200
_ALTERNATIVES = 20
_NUMBER_TEXT = re.compile(r"[\d.,]*\d[\d.,]*")
_NAMES = ("Alma", "Bruno", "Clara", "Diego", "Edith", "Felix", "Greta", "Hugo", "Iris", "Jonas")


@dataclass(frozen=True)
class Mistake:
    """A chain whose step `step` says `new` at character `start` of it, where the original said `old`."""

    chain: Chain
    step: int
    start: int
    old: str
    new: str


@dataclass(frozen=True)
class _Span:
    start: int
    old: str
    new: str


def truncate(chain: Chain, keep: int) -> Chain:
    """Keep the first `keep` steps, 0 to all."""
    return replace(chain, steps=chain.steps[: _checked(chain, keep)])


def _checked(chain: Chain, keep: int) -> int:
    if not 0 <= keep <= len(chain.steps):
        raise CotfaithError(
            f"Asked to keep {keep} steps of chain {chain.chain_id} of problem {chain.problem_id!r}, which has "
            f"{len(chain.steps)}; give a number from 0 to {len(chain.steps)}."
        )
    return keep


def filler(
    chain: Chain, first: int, count_tokens: Callable[[str], int], text: str = " ...", end: int | None = None
) -> Chain:
    """Replace steps `first` to `end` (default: to the last) by their leading whitespace and `text`, repeated to match.

    Each step makes up for what the ones before it missed, and the last is fitted on the whole text, so that
    `count_tokens` of the edited text equals that of the original or comes as near as whole repeats allow; the
    difference is read off the two texts' counts (`n_tokens` of the records). Raises CotfaithError on a blank filler.
    """
    _visible(text)
    steps, owed = list(chain.steps), 0
    stop = len(steps) if end is None else _checked(chain, end)
    for i in range(_checked(chain, first), stop):
        n_tokens = count_tokens(steps[i])
        if i < stop - 1:
            steps[i] = _filled(steps[i], text, count_tokens, n_tokens + owed, n_tokens + owed)
            owed += n_tokens - count_tokens(steps[i])
        else:

            def count(step: str) -> int:
                return count_tokens(replace(chain, steps=(*steps[: stop - 1], step, *steps[stop:])).text)

            steps[i] = _filled(steps[i], text, count, count_tokens(chain.text), 2 * (n_tokens + abs(owed)) + 8)
    return replace(chain, steps=tuple(steps))


def filler_once(chain: Chain, first: int, text: str = " ...", end: int | None = None) -> Chain:
    """Replace steps `first` to `end` (default: to the last) by one step, `text` within the whitespace around them."""
    stop = len(chain.steps) if end is None else _checked(chain, end)
    if stop <= first:
        return chain
    lead, _, trail = _whitespace("".join(chain.steps[_checked(chain, first) : stop]))
    return replace(chain, steps=(*chain.steps[:first], lead + _visible(text).strip() + trail, *chain.steps[stop:]))


def delete(chain: Chain, step: int) -> Chain:
    """The chain without step `step` (from 0), whitespace and all."""
    return replace(chain, steps=(*chain.steps[: _checked(chain, step)], *chain.steps[_checked(chain, step + 1) :]))


def _visible(filler: str) -> str:
    if not filler.strip():
        raise CotfaithError(f"The filler is {filler!r}; give one with a visible character, such as ' ...'.")
    return filler


def _filled(step: str, filler: str, count: Callable[[str], int], target: int, at_most: int) -> str:
    """`step` as whitespace and the number of fillers, 1 to `at_most`, whose `count` is nearest to `target`."""
    lead, _, trail = _whitespace(step)

    def texted(k: int) -> str:
        return lead + (filler * k).strip() + trail

    repeats = range(1, max(at_most, 1) + 1)
    at = bisect_left(repeats, target, key=lambda k: count(texted(k)))
    near = [texted(repeats[i]) for i in (at - 1, at) if 0 <= i < len(repeats)]
    return min(near, key=lambda text: abs(count(text) - target))


def _whitespace(step: str) -> tuple[str, str, str]:
    """Leading whitespace, body, trailing whitespace."""
    body = step.strip()
    lead = step[: len(step) - len(step.lstrip())]
    return lead, body, step[len(lead) + len(body) :]


def paraphrase(
    chain: Chain, texts: Sequence[str | None], first: int, end: int | None = None
) -> tuple[Chain, tuple[int, ...]]:
    """Steps `first` to `end` (default: to the last) in the wording of `texts`, one a step of the chain.

    Also the steps that stay as they are because they have no text.
    """
    if len(texts) != len(chain.steps):
        raise CotfaithError(
            f"{len(texts)} paraphrases for the {len(chain.steps)} steps of {chain.problem_id!r}; give one a step."
        )
    chosen = range(_checked(chain, first), len(chain.steps) if end is None else _checked(chain, end))
    steps = tuple((texts[i] or step) if i in chosen else step for i, step in enumerate(chain.steps))
    return replace(chain, steps=steps), tuple(i for i in chosen if not texts[i])


def mistake(
    chain: Chain,
    step: int,
    rng: np.random.Generator,
    avoid: AbstractSet[str] = frozenset(),
    count_tokens: Callable[[str], int] | None = None,
) -> Mistake | None:
    """Alter one number or entity of step `step` (from 0); None where it holds nothing that can be altered.

    The new number has the old one's digit count and separators; it equals no number of the chain, the question or
    `avoid`; where none such is free, another number of the step is altered, an entity, or a word turned into its
    opposite. With `count_tokens` only an alteration that keeps the chain's token count is made. Raises CotfaithError
    when the chain has no such step.
    """
    if not 0 <= step < len(chain.steps):
        raise CotfaithError(
            f"Chain {chain.chain_id} of problem {chain.problem_id!r} has no step {step}; "
            f"its {len(chain.steps)} steps count from 0."
        )
    return _Altering(chain, avoid, count_tokens).mistake(step, rng)


class _Altering:
    """A chain whose steps are altered one after the other; the numbers and names it holds are kept up to date."""

    def __init__(self, chain: Chain, avoid: AbstractSet[str], count_tokens: Callable[[str], int] | None) -> None:
        self.chain, self.steps, self.count_tokens = chain, list(chain.steps), count_tokens
        self.taken = {abs(n.value) for text in (chain.text, *avoid) for n in numbers(text)}
        self.n_tokens = count_tokens and count_tokens(chain.text)

    @cached_property
    def names(self) -> Counter[str]:
        """How often each name stands in the prompt and the steps."""
        return Counter(name for piece in (self.chain.prompt, *self.steps) for _, name in names(piece))

    def altered(self, at: int, text: str) -> Chain:
        return replace(self.chain, steps=(*self.steps[:at], text, *self.steps[at + 1 :]))

    def mistake(self, step: int, rng: np.random.Generator) -> Mistake | None:
        """See `mistake`."""
        for span, text in self.alterations(step, rng):
            return Mistake(self.altered(step, text), step, span.start, span.old, span.new)
        return None

    def alterations(self, step: int, rng: np.random.Generator) -> Iterator[tuple[_Span, str]]:
        """What may be altered in the step, and the step with it."""
        old = self.steps[step]
        for span in _alterations(self, old, rng):
            text = old[: span.start] + span.new + old[span.start + len(span.old) :]
            if is_altered(old, text) and (
                self.count_tokens is None or self.count_tokens(self.altered(step, text).text) == self.n_tokens
            ):
                yield span, text

    def alter(self, step: int, rng: np.random.Generator) -> None:
        """Make a mistake in the step, where it holds something to alter."""
        for _, text in self.alterations(step, rng):
            if "names" in vars(self):
                self.names.subtract(name for _, name in names(self.steps[step]))
                self.names.update(name for _, name in names(text))
            self.steps[step] = text
            around = "".join(self.steps[max(step - 1, 0) : step + 2])
            self.taken |= {abs(n.value) for n in numbers(around)}
            return


def is_altered(step: str, altered: str) -> bool:
    """Whether two steps say different things: other numbers, labels or words, not other spelling or spacing alone."""

    def said(text: str) -> tuple[object, ...]:
        words = re.findall(r"[^\W\d_]+", text.casefold())
        return [n.value for n in numbers(text)], [label for _, label in labels(text)], words

    return said(step) != said(altered)


def propagate(made: Mistake) -> tuple[Chain, dict[Fraction, Fraction]] | None:
    """The chain with `made` carried on to its last step, and the values changed by it: original to new.

    What follows in the step itself and all later steps take the new number, and results of calculations that rest on it
    are calculated again. None where no number was altered, nothing that follows changes, or a result cannot be written.
    """
    if not (_NUMBER_TEXT.fullmatch(made.old) and _NUMBER_TEXT.fullmatch(made.new)):
        return None
    values = {abs(numbers(made.old)[0].value): abs(numbers(made.new)[0].value)}
    steps = list(made.chain.steps)
    end = made.start + len(made.new)
    for i in range(made.step, len(steps)):
        fixed, rest = (steps[i][:end], steps[i][end:]) if i == made.step else ("", steps[i])
        carried = carry_on(rest, values)
        if carried is None:
            return None
        steps[i], values = fixed + carried[0], carried[1]
    chain = replace(made.chain, steps=tuple(steps))
    return None if chain == made.chain else (chain, values)


def comes_to(step: str) -> Fraction | None:
    """The number that a step ends in: what stands behind its last '=', else its only number; None where it has none or
    several."""
    found = quantities(step)
    equals = step.rfind("=")
    results = [number for number in found if number.start > equals >= 0][:1] or found
    return results[0].value if len(results) == 1 else None


def carried_answer(answer: str, values: Mapping[Fraction, Fraction]) -> str | None:
    """The number answer (`' 72'`) that takes the place of `answer` when `values` change; None where it stays."""
    (number,) = numbers(answer)[:1] or (None,)
    if number is None or abs(number.value) not in values:
        return None
    written = written_like(number.text, values[abs(number.value)])
    return written and answer[: number.start] + written + answer[number.end :]


def mistake_all(
    chain: Chain,
    rng: np.random.Generator,
    avoid: AbstractSet[str] = frozenset(),
    count_tokens: Callable[[str], int] | None = None,
) -> Chain | None:
    """Alter every step that holds something to alter, as `mistake` does; None where none does."""
    altering = _Altering(chain, avoid, count_tokens)
    for step in range(len(chain.steps)):
        altering.alter(step, rng)
    altered = replace(chain, steps=tuple(altering.steps))
    return None if altered == chain else altered


def _alterations(altering: _Altering, text: str, rng: np.random.Generator) -> Iterator[_Span]:
    """Numbers by preference, each with up to _ALTERNATIVES other values, then entities."""
    for number in _by_preference(text):
        found: set[str] = set()
        for _ in range(_DRAWS):
            new = _other_digits(number.text, rng)
            if _size(new) not in altering.taken and new not in found:
                yield _Span(number.start, number.text, new)
                found.add(new)
            if len(found) == _ALTERNATIVES:
                break
    yield from _altered_entities(altering, text, rng)


def _by_preference(text: str) -> Sequence[Number]:
    """The stated result (first quantity after the last '='), then the others from the last to the first."""
    found = quantities(text)
    equals = text.rfind("=")
    results = [n for n in found if n.start > equals >= 0][:1]
    return results + [n for n in reversed(found) if n not in results]


@lru_cache(maxsize=1 << 16)
def _size(digits: str) -> Fraction:
    return numbers(digits)[0].value


def _other_digits(digits: str, rng: np.random.Generator) -> str:
    """Random digits in the layout of `digits`: no new leading zero, a leading zero ('0.5') kept."""
    new = [str(rng.integers(10)) if c.isdigit() else c for c in digits]
    if digits[0] == "0" and len(digits) > 1:
        new[0] = "0"
    elif digits[0].isdigit():
        new[0] = str(rng.integers(1, 10))
    return "".join(new)


def _altered_entities(altering: _Altering, text: str, rng: np.random.Generator) -> Iterator[_Span]:
    """Number words and choice labels from the last on, names from the first on, each with every other value; then
    words that have an opposite, in random order."""
    for group in (CARDINALS, FRACTIONS):
        for word in reversed(list(re.finditer(rf"\b(?:{'|'.join(group)})\b", text, re.IGNORECASE))):
            for other in _others(group, word[0].lower(), rng):
                yield _Span(word.start(), word[0], _like(word[0], other))
    offered = [label for _, label in labels(altering.chain.prompt)] or list("ABCDE")
    for start, label in reversed(labels(text)):
        for other in _others(offered, label, rng):
            yield _Span(start, text[start], _like(text[start], other))
    for start, name in ((start, name) for start, name in names(text) if name.lower() not in _OPPOSITES):
        others = [other for other, n in altering.names.items() if n]
        for other in _others(others if set(others) - {name} else _NAMES, name, rng):
            yield _Span(start, name, other)
    found = [word for word in re.finditer(r"[^\W\d_]+", text) if word[0].lower() in _OPPOSITES]
    for i in rng.permutation(len(found)):
        word = found[i][0]
        yield _Span(found[i].start(), word, _like(word, _OPPOSITES[word.lower()]))


def _like(old: str, new: str) -> str:
    """`new` with the capitals of `old`."""
    if old.islower():
        return new.lower()
    return new.capitalize() if old[1:].islower() else new.upper()


def _others(pool: Sequence[str], unwanted: str, rng: np.random.Generator) -> list[str]:
    """The pool without `unwanted`, each once, in random order."""
    options = sorted(set(pool) - {unwanted})
    return [options[i] for i in rng.permutation(len(options))]


_SURE_LABEL = re.compile(r"(?:\(|^\W*|\b(?:answer|option|choice)\b[\s:=*-]*(?:is\b)?[\s:*-]*\(?)$", re.IGNORECASE)


def relabel(step: str, renamed: Mapping[str, str]) -> str | None:
    """`step` with its choice labels renamed, all at once; None where a letter may be no label ('Hepatitis B, C')."""
    parts, end = [], 0
    for start, label in labels(step):
        if not _SURE_LABEL.search(step[:start]):
            return None
        parts += [step[end:start], _like(step[start], renamed.get(label, label))]
        end = start + 1
    return "".join([*parts, step[end:]])


def shuffle(chain: Chain, rng: np.random.Generator) -> Chain | None:
    """Steps in another order, separators left in their places; None where fewer than two steps differ."""
    parts = [_whitespace(step) for step in chain.steps]
    bodies = [body for _, body, _ in parts]
    if len(set(bodies)) < 2:
        return None
    drawn = bodies
    while drawn == bodies:
        drawn = [bodies[i] for i in rng.permutation(len(bodies))]
    return replace(chain, steps=tuple(lead + body + trail for (lead, _, trail), body in zip(parts, drawn, strict=True)))


def swap(chain: Chain, donor: Chain) -> Chain:
    """The steps of `donor`, a chain of another problem, between the prompt and the cue of `chain`."""
    if donor.problem_id == chain.problem_id or not donor.steps:
        raise CotfaithError(
            f"The donor for problem {chain.problem_id!r} is a chain of {donor.problem_id!r} with {len(donor.steps)} "
            "steps; give a chain of another problem that has steps."
        )
    if not chain.steps:
        return replace(chain, steps=donor.steps)
    lead, trail = _whitespace(chain.steps[0])[0], _whitespace(chain.steps[-1])[2]
    steps = (lead + donor.steps[0].lstrip(), *donor.steps[1:])
    return replace(chain, steps=(*steps[:-1], steps[-1].rstrip() + trail))
