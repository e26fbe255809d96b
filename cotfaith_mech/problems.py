"""A Problem: question, gold answer, and where it came from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .errors import CotfaithError

HALF_PAIR = re.compile("[\ud800-\udfff]")
"""Half a surrogate pair, which JSON and YAML can spell and no encoding, tokenizer or table holds."""
LABELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
AnswerKind = Literal["number", "choice", "yesno", "text"]


def choice_listing(choices: Sequence[str]) -> str:
    """The choices as a question lists them, one a line: 'A) x\\nB) y'; 26 at most."""
    return "\n".join(f"{label}) {choice}" for label, choice in zip(LABELS, choices, strict=False))


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
    counterfactual: same sentences, other numbers, same token length, implying `twin_answer`; `twin_question` asks the
    same of those numbers, at the same token length. `true_step` is the index
    of the step the answer rests on, where the construction fixes it. `paraphrases` are supplied ones: one tuple a draw,
    one text a step, None where there is none.
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
    twin_question: str | None = None
    true_step: int | None = None
    conflicts: tuple[Conflict, ...] = ()
    paraphrases: tuple[tuple[str | None, ...], ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """What the reader may answer: A, B, … in the order of `choices`, or yes, no, maybe themselves."""
        if self.kind == "yesno":
            return self.choices
        return tuple(LABELS[: len(self.choices)])

    def reordered(self, order: Sequence[int]) -> Problem | None:
        """The same problem with its options in another order: `order[k]` is the old index of the choice now at k.

        Everything about a chain (steps, twin, paraphrases, conflicts) is dropped: its labels would be wrong. None where
        the gold is no label or the listing does not stand in the question exactly once. Raises CotfaithError when
        `order` is no permutation.
        """
        if sorted(order) != list(range(len(self.choices))):
            raise CotfaithError(
                f"The order {list(order)} is no permutation of the {len(self.choices)} choices; "
                f"give each index from 0 to {len(self.choices) - 1} once."
            )
        listing = choice_listing(self.choices)
        if self.kind != "choice" or self.gold not in self.labels or self.question.count(listing) != 1:
            return None
        choices = tuple(self.choices[old] for old in order)
        return replace(
            self,
            question=self.question.replace(listing, choice_listing(choices)),
            choices=choices,
            gold=self.labels[list(order).index(self.labels.index(self.gold))],
            steps=(),
            twin_steps=(),
            twin_answer=None,
            twin_question=None,
            true_step=None,
            conflicts=(),
            paraphrases=(),
        )
