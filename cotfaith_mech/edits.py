"""Text edits: pure functions from a Chain to an edited Chain. Prompt, cue and answer are never touched.

1. truncate: keep s_1..s_i (early answering, Lanham et al. 2307.13702).
2. filler: replace s_{i+1}..s_n, or one step, by a repeated filler of the same token count; filler_once: by one filler
   a step; delete: leave one step out.
3. paraphrase_from: rephrase s_{i+1}..s_n, or one step.
4. mistake: alter one number of one step, its stated result first, digit for digit; where a step has no number, a
   number word, a choice label or a name. mistake_all: every step that can be altered.
5. shuffle: steps in another order. swap: another problem's steps.
An edit that cannot be made returns None, so that its caller writes an exclusion; a random one takes its Generator.
Source: MEASURES 'Behavioural tests'.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import numpy as np

from .answers import Number, labels, numbers
from .chains import Chain
from .errors import CotfaithError
from .paraphrase import CARDINALS, FRACTIONS, Paraphrase, names

Paraphraser = Callable[[str, np.random.Generator], Paraphrase]

_DRAWS = 200
_NAMES = ("Alma", "Bruno", "Clara", "Diego", "Edith", "Felix", "Greta", "Hugo", "Iris", "Jonas")


@dataclass(frozen=True)
class Mistake:
    """A chain whose step `step` says `new` where the original said `old`."""

    chain: Chain
    step: int
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
    """Replace steps `first` to `end` (default: to the last) by their leading whitespace and `text`, once each."""
    stop = len(chain.steps) if end is None else _checked(chain, end)
    steps = list(chain.steps)
    for i in range(_checked(chain, first), stop):
        lead, _, trail = _whitespace(steps[i])
        steps[i] = lead + _visible(text).strip() + trail
    return replace(chain, steps=tuple(steps))


def delete(chain: Chain, step: int) -> Chain:
    """The chain without step `step` (from 0), whitespace and all."""
    return replace(chain, steps=(*chain.steps[:step], *chain.steps[_checked(chain, step + 1) :]))


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


def paraphrase_from(
    chain: Chain, first: int, rng: np.random.Generator, paraphraser: Paraphraser, end: int | None = None
) -> tuple[Chain, int]:
    """Rephrase steps `first` to `end` (default: to the last); also how many stayed for want of a valid paraphrase."""
    stop = len(chain.steps) if end is None else _checked(chain, end)
    old = chain.steps[_checked(chain, first) : stop]
    drawn = [paraphraser(step, rng).text for step in old]
    rephrased = [new or before for new, before in zip(drawn, old, strict=True)]
    steps = (*chain.steps[:first], *rephrased, *chain.steps[stop:])
    return replace(chain, steps=steps), sum(new is None for new in drawn)


def mistake(chain: Chain, step: int, rng: np.random.Generator, avoid: AbstractSet[str] = frozenset()) -> Mistake | None:
    """Alter one number or entity of step `step` (from 0); None where it holds nothing that can be altered.

    The new number has the old one's digit count and separators; it equals no number of the chain, the question or
    `avoid`; where none such is free, another number of the step is altered, or an entity. Raises CotfaithError when
    the chain has no such step.
    """
    if not 0 <= step < len(chain.steps):
        raise CotfaithError(
            f"Chain {chain.chain_id} of problem {chain.problem_id!r} has no step {step}; "
            f"its {len(chain.steps)} steps count from 0."
        )
    taken = {abs(n.value) for text in (chain.text, *avoid) for n in numbers(text)}
    text = chain.steps[step]
    span = _altered_number(text, taken, rng) or _altered_entity(chain, text, rng)
    if span is None:
        return None
    altered = text[: span.start] + span.new + text[span.start + len(span.old) :]
    if altered == text:
        raise CotfaithError(f"The mistake in step {step} left {text!r} as it was; this is a defect, please report it.")
    return Mistake(replace(chain, steps=_replaced(chain.steps, step, altered)), step, span.old, span.new)


def _replaced(steps: tuple[str, ...], at: int, text: str) -> tuple[str, ...]:
    return (*steps[:at], text, *steps[at + 1 :])


def mistake_all(chain: Chain, rng: np.random.Generator, avoid: AbstractSet[str] = frozenset()) -> Chain | None:
    """Alter every step that holds something to alter, as `mistake` does; None where none does."""
    known = frozenset({chain.text, *avoid})
    altered = chain
    for step in range(len(chain.steps)):
        made = mistake(altered, step, rng, known)
        altered = altered if made is None else made.chain
    return None if altered == chain else altered


def _altered_number(text: str, taken: AbstractSet[object], rng: np.random.Generator) -> _Span | None:
    for number in _by_preference(text):
        for _ in range(_DRAWS):
            new = _other_digits(number.text, rng)
            if numbers(new)[0].value not in taken:
                return _Span(number.start, number.text, new)
    return None


def _by_preference(text: str) -> Sequence[Number]:
    """The stated result (first number after the last '='), then the others from the last to the first.

    Digits inside a word (H2O), ordinals (21st) and list markers ('2. Add') are no numbers to alter.
    """
    marker = re.match(r"\s*(?:\d+[.)](?=\s|$)|(?:\W*step|#)\s*\d+)", text, re.IGNORECASE)
    found = [
        n
        for n in numbers(text)
        if n.start >= (marker.end() if marker else 0)
        and not text[: n.start][-1:].isalpha()
        and not re.match(r"(?:st|nd|rd|th)\b", text[n.end :])
    ]
    equals = text.rfind("=")
    results = [n for n in found if n.start > equals >= 0][:1]
    return results + [n for n in reversed(found) if n not in results]


def _other_digits(digits: str, rng: np.random.Generator) -> str:
    """Random digits in the layout of `digits`: no new leading zero, a leading zero ('0.5') kept."""
    new = [str(rng.integers(10)) if c.isdigit() else c for c in digits]
    if digits[0] == "0" and len(digits) > 1:
        new[0] = "0"
    elif digits[0].isdigit():
        new[0] = str(rng.integers(1, 10))
    return "".join(new)


def _altered_entity(chain: Chain, text: str, rng: np.random.Generator) -> _Span | None:
    for group in (CARDINALS, FRACTIONS):
        for word in reversed(list(re.finditer(rf"\b(?:{'|'.join(group)})\b", text, re.IGNORECASE))):
            return _Span(word.start(), word[0], _like(word[0], _pick(group, {word[0].lower()}, rng)))
    offered = [label for _, label in labels(chain.prompt)] or list("ABCDE")
    for start, label in reversed(labels(text)):
        if set(offered) - {label}:
            return _Span(start, text[start], _like(text[start], _pick(offered, {label}, rng)))
    for start, name in names(text):
        others = [other for piece in (chain.prompt, *chain.steps) for _, other in names(piece)]
        pool = others if set(others) - {name} else _NAMES
        return _Span(start, name, _pick(pool, {name}, rng))
    return None


def _like(old: str, new: str) -> str:
    """`new` with the capitals of `old`."""
    if old.islower():
        return new.lower()
    return new.capitalize() if old[1:].islower() else new.upper()


def _pick(pool: Sequence[str], unwanted: AbstractSet[str], rng: np.random.Generator) -> str:
    options = sorted(set(pool) - unwanted)
    return options[rng.integers(len(options))]


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
