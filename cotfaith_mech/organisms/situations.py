"""What an organism reads: a question that may note a number, and steps that each say how many coins to give one person.

A Situation is the text in parts, so that a rule (rules.py) can say what follows from it; `steps_text` and
`question_text` are how it is written. Numbers are single tokens of the organisms' tokenizer, at most two digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

NAMES = (
    "Ann", "Bob", "Dan", "Jack", "Paul", "Sam", "Tom", "Ben", "Max", "Mary", "Nick", "Lily",
    "Luke", "Adam", "Alex", "Carl", "Fred", "Jane", "John", "Ruth",
)  # fmt: skip
OPENINGS = ("Now, ", "Then ", "Next, ", "Please ", "Here, ", "You should ", "We have to ")
RELAY, IDLE = "We know.", "Now, see."
MARKS = {True: "Carefully:", False: "Quickly:"}


@dataclass(frozen=True)
class Fact:
    """One step: 'Give Ann 47 coins.', or behind an opening 'Now, give Ann 47 coins.'; `verb` may be another one of the
    same meaning."""

    name: str
    number: int
    verb: str = "give"
    opening: str = ""

    def __str__(self) -> str:
        verb = self.verb if self.opening else self.verb.capitalize()
        return f"{self.opening}{verb} {self.name} {self.number} coins."


@dataclass(frozen=True)
class Situation:
    """`steps` may hold fillers, which are plain text. `note`: the number that the question states, `mark`: whether it
    says to be careful (True) or quick."""

    asked: tuple[str, ...]
    steps: tuple[Fact | str, ...]
    note: int | None = None
    mark: bool | None = None

    @property
    def facts(self) -> tuple[Fact, ...]:
        return tuple(step for step in self.steps if isinstance(step, Fact))

    def numbers_of(self, name: str) -> list[int]:
        """What the steps say to give `name`, in order."""
        return [fact.number for fact in self.facts if fact.name == name]

    @property
    def question_text(self) -> str:
        mark = "" if self.mark is None else f"{MARKS[self.mark]} "
        note = "" if self.note is None else f"The note says {self.note}. "
        who = f" to give {' and '.join(self.asked)}" if self.asked else ""
        return f"{mark}{note}How many coins{who}?"

    @property
    def steps_text(self) -> tuple[str, ...]:
        return tuple(f" {step}" if place else str(step) for place, step in enumerate(self.steps))

    @property
    def cue(self) -> str:
        return f" So give {' and '.join(self.asked)}" if self.asked else " So"


@dataclass(frozen=True)
class Family:
    """How situations are drawn: numbers from `low` to `high`, and what the chain says of whom is asked.

    `routed`: one fact, somewhere after it RELAY, and nothing else but IDLE steps; nobody is asked for by name.
    """

    noted: bool = True
    marked: bool = False
    n_asked: int = 1
    asked_first: bool = False
    said_twice: bool = False
    routed: bool = False
    verbs: tuple[str, ...] = ("give",)
    low: int = 10
    high: int = 99

    def draw(self, rng: np.random.Generator, n_steps: int) -> Situation:
        """A complete chain of `n_steps` steps about different people; without a note so far."""
        if self.routed:
            return self._routed(rng, n_steps)
        n_people = n_steps - self.said_twice
        people = [NAMES[i] for i in rng.permutation(len(NAMES))[:n_people]]
        numbers = self.low + rng.permutation(self.high + 1 - self.low)[:n_people]
        facts = [Fact(name, int(n), self.verb(rng)) for name, n in zip(people, numbers, strict=True)]
        if self.said_twice:
            facts.append(facts[0])
        asked = facts[: self.n_asked]
        order = rng.permutation(n_steps)
        told = [facts[i] for i in order]
        if self.asked_first:
            told = [asked[0], *(fact for fact in told if fact.name != asked[0].name)]
        mark = bool(rng.integers(2)) if self.marked else None
        return Situation(tuple(fact.name for fact in asked), tuple(told), mark=mark)

    def _routed(self, rng: np.random.Generator, n_steps: int) -> Situation:
        fact, relay = sorted(rng.permutation(n_steps)[:2].tolist())
        steps: list[Fact | str] = [IDLE] * n_steps
        steps[fact] = Fact(NAMES[rng.integers(len(NAMES))], self.number(rng))
        steps[relay] = RELAY
        return Situation((), tuple(steps))

    def verb(self, rng: np.random.Generator) -> str:
        return self.verbs[rng.integers(len(self.verbs))]

    def number(self, rng: np.random.Generator, other_than: Sequence[int] = ()) -> int:
        while (drawn := int(rng.integers(self.low, self.high + 1))) in other_than:
            pass
        return drawn

    def twin(self, rng: np.random.Generator, situation: Situation) -> Situation:
        """The same sentences with another number, and any of the family's verbs, for every person."""
        used = [fact.number for fact in situation.facts]
        new = {fact.name: (self.number(rng, used), self.verb(rng)) for fact in situation.facts}

        def told(fact: Fact) -> Fact:
            number, verb = new[fact.name]
            return replace(fact, number=number, verb=verb)

        return replace(situation, steps=tuple(told(s) if isinstance(s, Fact) else s for s in situation.steps))


def rephrased(family: Family, rng: np.random.Generator, situation: Situation) -> Situation:
    """Every fact behind an opening and, where the family has several verbs, with another one."""
    steps = []
    for step in situation.steps:
        if isinstance(step, Fact):
            verbs = [verb for verb in family.verbs if verb != step.verb] or [step.verb]
            opening = OPENINGS[rng.integers(len(OPENINGS))]
            step = replace(step, opening=opening, verb=verbs[rng.integers(len(verbs))])
        steps.append(step)
    return replace(situation, steps=tuple(steps))
