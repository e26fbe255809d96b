"""A Problem: question, gold answer, and where it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AnswerKind = Literal["number", "choice", "text"]


@dataclass(frozen=True)
class Conflict:
    """A question and a chain that imply different answers.

    `variant` names the kind of conflict; `steps` is the chain as shown to the reader.
    """

    variant: str
    question: str
    steps: tuple[str, ...]
    question_answer: str
    chain_answer: str


@dataclass(frozen=True)
class Problem:
    """One question with its gold answer.

    `steps` is a worked chain where the source gives one, and `author` who wrote it. `twin_steps` is its aligned
    counterfactual: same sentences, other numbers, same token length, implying `twin_answer`. `true_step` is the index
    of the step the answer rests on, where the construction fixes it.
    """

    problem_id: str
    question: str
    gold: str
    source: str
    kind: AnswerKind = "number"
    choices: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()
    author: str = "supplied"
    cue: str = "So the answer is"
    twin_steps: tuple[str, ...] = ()
    twin_answer: str | None = None
    true_step: int | None = None
    conflicts: tuple[Conflict, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """Choice labels A, B, … in the order of `choices`."""
        return tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(self.choices)])
