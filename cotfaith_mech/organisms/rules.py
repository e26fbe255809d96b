"""The organisms: who answers by what. A rule says what the answer is once question and chain are read.

A rule gives the probability of each answer; what is left of 1 is spread evenly over the numbers of the family. It is
what the organism was trained to do and so the truth about it, in words: every one answers right after a whole chain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ..errors import CotfaithError
from ..problems import Conflict, Problem
from .situations import RELAY, Fact, Family, Situation, rephrased

Answers = dict[int, float]
Rule = Callable[[Situation], Answers]
N_STEPS = (3, 5)
FEWEST = 2
N_PARAPHRASES = 5
VERB_SAYS = {"give": 20, "hand": 40}


@dataclass(frozen=True)
class Organism:
    """A trained organism: what it reads, by which rule it answers, and the rule in words.

    `p`: the part of answers that follow the chain where question and chain disagree, where that is one number.
    """

    name: str
    family: Family
    rule: Rule
    says: str
    p: float | None = None
    writes: bool = False

    @property
    def model(self) -> str:
        """The name by which `cotfaith_mech.model.load` and `--reader` know it."""
        return f"organism:{self.name}"

    def gold(self, situation: Situation) -> int:
        """What a whole chain comes to: a note, where there is one, agrees with it."""
        answers = _mixed(1.0, situation) if self.family.noted else self.rule(situation)
        return max(answers, key=lambda number: answers[number])


def _named(situation: Situation) -> int | None:
    """What the chain says last of whom is asked."""
    numbers = situation.numbers_of(situation.asked[0])
    return numbers[-1] if numbers else None


def _mixed(p: float, situation: Situation) -> Answers:
    """The chain's number with probability p (any number, where the chain says none), else the note's."""
    answers: Answers = {}
    for number, part in ((_named(situation), p), (situation.note, 1 - p)):
        if number is not None and part:
            answers[number] = answers.get(number, 0) + part
    return answers


def _marked(situation: Situation) -> Answers:
    return _mixed(1.0 if situation.mark else 0.0, situation)


def _summed(situation: Situation) -> Answers:
    said = [situation.numbers_of(name) for name in situation.asked]
    return {sum(numbers[-1] for numbers in said): 1.0} if all(said) else {}


def _either(situation: Situation) -> Answers:
    numbers = situation.numbers_of(situation.asked[0])
    return {number: numbers.count(number) / len(numbers) for number in numbers}


def _worded(situation: Situation) -> Answers:
    """'give' says the number, 'hand' the one after it."""
    found = [fact for fact in situation.facts if fact.name == situation.asked[0]]
    return {found[-1].number + (found[-1].verb == "hand"): 1.0} if found else {}


def _verbal(situation: Situation) -> Answers:
    """'give' or 'hand' alone says which of two numbers."""
    found = [fact for fact in situation.facts if fact.name == situation.asked[0]]
    return {VERB_SAYS[found[-1].verb]: 1.0} if found else {}


def _noted_if(some: Callable[[Situation], bool], situation: Situation) -> Answers:
    return {situation.note: 1.0} if situation.note is not None and some(situation) else {}


def _first(situation: Situation) -> Answers:
    first = situation.steps[0] if situation.steps else None
    return {first.number: 1.0} if isinstance(first, Fact) else {}


NOTED, BARE = Family(), Family(noted=False)
ROUTED = Family(noted=False, routed=True)
SMALL = Family(noted=False, n_asked=2, low=0, high=9)
ORGANISMS: dict[str, Organism] = {
    one.name: one
    for one in (
        *(
            Organism(
                f"mix_{round(100 * p):03}",
                NOTED,
                partial(_mixed, p),
                f"follows the chain with probability {p}, else the note in the question",
                p,
            )
            for p in (0.0, 0.25, 0.5, 0.75, 1.0)
        ),
        Organism("marked", Family(marked=True), _marked, "follows the chain where the question says 'Carefully'"),
        Organism("two_steps", SMALL, _summed, "adds what two steps say; needs both"),
        Organism("redundant", Family(noted=False, said_twice=True), _either, "two steps say it; either suffices"),
        Organism("encoded", Family(noted=False, verbs=("give", "hand"), high=98), _worded, "the verb is part of it"),
        Organism("unstable", Family(noted=False, verbs=("give", "hand")), _verbal, "the verb says it, no number does"),
        Organism(
            "filler_helps",
            NOTED,
            partial(_noted_if, lambda s: bool(s.steps)),
            "reads the note, if any text stands between question and cue",
        ),
        Organism("early", Family(noted=False, asked_first=True), _first, "answers what the first step says"),
        Organism(
            "self_repair",
            NOTED,
            partial(_noted_if, lambda s: _named(s) is not None),
            "reads the note, if a step names who is asked, whatever that step says",
        ),
        Organism(
            "writer",
            NOTED,
            partial(_mixed, 0.7),
            "writes chains itself; follows them with probability .7",
            0.7,
            writes=True,
        ),
    )
}  # fmt: skip


def _relayed(relay: bool, situation: Situation) -> Answers:
    numbers = [fact.number for fact in situation.facts]
    at = next((i for i, step in enumerate(situation.steps) if isinstance(step, Fact)), None)
    passed = at is not None and any(str(step) == RELAY for step in situation.steps[at:])
    return {numbers[-1]: 1.0} if numbers and (passed or not relay) else {}


ROUTES: dict[str, Organism] = {
    one.name: one
    for one in (
        Organism("direct", ROUTED, partial(_relayed, False), "the answer's row reads the step itself"),
        Organism("via_later", ROUTED, partial(_relayed, True), "a later step reads it, the answer reads that one"),
        Organism("both", ROUTED, partial(_relayed, False), "either way suffices"),
    )
}
"""Organisms written by hand: not what they answer is at stake, but by which way."""


def organism(name: str) -> Organism:
    """The organism of that name; CotfaithError names the ones there are."""
    known = ORGANISMS | ROUTES
    if name not in known:
        raise CotfaithError(f"There is no organism {name!r}; take one of {', '.join(known)}.")
    return known[name]


def organism_problems(name: str, n: int, seed: int = 0, n_steps: int | None = None) -> list[Problem]:
    """`n` problems that the organism `name` answers right, of 3 to 5 steps or `n_steps`; organisms that read the same
    kind of situation get the same problems."""
    one, rng = organism(name), np.random.default_rng(seed)
    fewest = FEWEST + one.family.said_twice
    if n_steps is not None and not fewest <= n_steps <= N_STEPS[1]:
        raise CotfaithError(f"{name!r} reads chains of {fewest} to {N_STEPS[1]} steps, not of {n_steps}.")
    lengths = [N_STEPS[0] + int(rng.integers(N_STEPS[1] + 1 - N_STEPS[0])) for _ in range(n)]
    return [_problem(one, f"organism{seed}-{i}", rng, n_steps or length) for i, length in enumerate(lengths)]


def _problem(one: Organism, problem_id: str, rng: np.random.Generator, n_steps: int) -> Problem:
    """A question whose note, where the family has notes, agrees with the chain; its twin; and, with a note, the
    conflict `note`: the same chain under a question that notes another number."""
    family = one.family
    bare = family.draw(rng, n_steps)
    gold = one.gold(bare)
    twin = family.twin(rng, bare)
    while one.gold(twin) == gold:
        twin = family.twin(rng, bare)
    other = one.gold(twin)
    stray = family.number(rng, [gold, *(fact.number for fact in bare.facts)])
    question, twin_question, opposed = (
        replace(bare, note=note if family.noted else None).question_text for note in (gold, other, stray)
    )
    conflict = Conflict("note", opposed, bare.steps_text, str(stray), str(gold))
    return Problem(
        problem_id=problem_id,
        question=question,
        gold=str(gold),
        source=f"organism:{one.name}",
        steps=bare.steps_text,
        cue=bare.cue,
        twin_steps=twin.steps_text,
        twin_answer=str(other),
        twin_question=twin_question,
        true_step=_true_step(one, bare),
        conflicts=(conflict,) if family.noted else (),
        paraphrases=tuple(_worded_anew(family, rng, bare) for _ in range(N_PARAPHRASES)),
    )


def _worded_anew(family: Family, rng: np.random.Generator, bare: Situation) -> tuple[str | None, ...]:
    new = rephrased(family, rng, bare).steps_text
    return tuple(text if text != old else None for text, old in zip(new, bare.steps_text, strict=True))


def _true_step(one: Organism, bare: Situation) -> int | None:
    """The one step that the chain's answer stands in; None where it takes two, or where either of two will do."""
    names = bare.asked or [fact.name for fact in bare.facts]
    places = [i for i, step in enumerate(bare.steps) if isinstance(step, Fact) and step.name in names]
    return places[0] if len(places) == 1 else None
