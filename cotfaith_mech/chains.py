"""A Chain: prompt + reasoning steps + answer cue + answer, as one text whose pieces tile it.

1. Whitespace between pieces belongs to the piece that follows, so BPE tokens with a leading space stay whole.
2. The text is encoded once, complete; spans come from the tokenizer's offsets, never from re-encoded prefixes.
3. A token belongs to the piece that holds its first character: every token belongs to exactly one piece.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from .errors import CotfaithError
from .markup import chain_markup


@dataclass(frozen=True)
class Encoding:
    """Token ids and their character spans in the encoded text; both have one entry per token."""

    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Chain:
    """What a reader is shown. `answer` is the text after the cue (`' 22'`), possibly empty; `author` wrote the steps.

    `problem_id` names the Problem, `variant` the version of its question (empty: the question itself).
    """

    problem_id: str
    author: str
    prompt: str
    steps: tuple[str, ...]
    cue: str
    answer: str = ""
    variant: str = ""

    @property
    def text(self) -> str:
        """All of it: what is encoded."""
        return self.prompt + "".join(self.steps) + self.cue + self.answer

    @property
    def chain_id(self) -> str:
        """Hash of the content without the prompt, which each reader's template renders its own way."""
        content = json.dumps([self.problem_id, self.author, self.steps, self.cue, self.variant])
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    @property
    def pieces(self) -> tuple[str, ...]:
        """Prompt, each step, cue, answer: their concatenation is the text."""
        return (self.prompt, *self.steps, self.cue, self.answer)

    @property
    def char_spans(self) -> tuple[tuple[int, int], ...]:
        """Half-open character span of each piece."""
        spans, start = [], 0
        for piece in self.pieces:
            spans.append((start, start + len(piece)))
            start += len(piece)
        return tuple(spans)

    def with_answer(self, answer: str) -> Chain:
        """The same chain with `answer` forced after the cue."""
        return replace(self, answer=answer)

    def to_json(self) -> dict[str, Any]:
        """The fields, `chain_id` and `char_spans`: a line of chains.jsonl."""
        return {**asdict(self), "chain_id": self.chain_id, "char_spans": self.char_spans}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Chain:
        """Inverse of `to_json`; keys that are no field are ignored. CotfaithError where one is absent or no text."""
        fields = ("problem_id", "author", "prompt", "cue", "answer", "variant")
        texts, steps = {name: row.get(name) for name in fields}, row.get("steps")
        spoilt = next((name for name, text in texts.items() if not isinstance(text, str)), None)
        if not isinstance(steps, list | tuple) or not all(isinstance(step, str) for step in steps):
            spoilt = "steps"
        if spoilt is not None:
            raise CotfaithError(
                f"The chain of problem {row.get('problem_id')!r} has {row.get(spoilt)!r:.60} as its {spoilt}, and text "
                "is expected; delete its line of chains.jsonl and run again."
            )
        return cls(**texts, steps=tuple(steps))  # pyright: ignore[reportArgumentType]

    def _repr_html_(self) -> str:
        return chain_markup(self.prompt, self.steps, self.cue, self.answer)


@dataclass(frozen=True)
class TokenSpans:
    """Half-open token spans of a chain's pieces; together they tile the tokens."""

    prompt: tuple[int, int]
    steps: tuple[tuple[int, int], ...]
    cue: tuple[int, int]
    answer: tuple[int, int]


def token_spans(chain: Chain, encoding: Encoding) -> TokenSpans:
    """Token spans of `chain`'s pieces in `encoding`, the encoding of `chain.text`.

    Raises CotfaithError when a token straddles the border of cue and answer (the forced answer would leak into the
    cue) or when a non-empty answer got no token.
    """
    ends = [end for _, end in chain.char_spans]
    bounds = [0]
    token = 0
    for end in ends[:-1]:
        while token < len(encoding.offsets) and encoding.offsets[token][0] < end:
            token += 1
        bounds.append(token)
    bounds.append(len(encoding.ids))
    spans = tuple(pairwise(bounds))
    answer_start = chain.char_spans[-1][0]
    cue_end = spans[-1][0]
    if chain.answer and spans[-1][0] == spans[-1][1]:
        raise CotfaithError(f"Answer {chain.answer!r} has no token of its own; give an answer that is not blank.")
    if chain.answer and cue_end and encoding.offsets[cue_end - 1][1] > answer_start:
        raise CotfaithError(
            f"A token spans the border of cue {chain.cue!r} and answer {chain.answer!r}; "
            "end the cue without a space and begin the answer with one."
        )
    return TokenSpans(spans[0], spans[1:-2], spans[-2], spans[-1])


_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]*_]*(?=\s+\S)|(?<!\s)(?=\s*[\r\n]\s*\S)")
_LINE_END = re.compile(r"\s*[\r\n]")
_LIST_MARKER = re.compile(r"\s*(?:[-*•]\s*)?(?:\W*step\s*)?(?:\d+|[A-Za-z]|[ivx]+)[.)][*_]*", re.IGNORECASE)
_MARKER_LENGTH = 200
"""A list marker is shorter, spaces before it included."""
_VISIBLE = re.compile(r"\S")
_TITLE = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|Rs|vs|approx)\.$")
_INITIALS = re.compile(r"\b[A-Za-z]\.[A-Za-z]\.$|\b[Nn]o\.$")


def segment(text: str, max_steps: int = 40) -> tuple[str, ...]:
    """Split reasoning text into sentences or lines; the concatenation of the steps is `text` exactly.

    A decimal point, a thousands separator, a list marker ('2. Add'), a title ('Mr.') and 'e.g.' before a small letter
    end nothing. More than `max_steps` pieces are grouped into runs of nearly equal count: grouped, never cut.
    """
    ends = {m.end() for m in _SENTENCE_END.finditer(text, 0, len(text.rstrip()))} - {0, len(text)}
    cuts = sorted(end for end in ends if not _goes_on(text, end))
    pieces = [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]
    steps: list[str] = []
    for piece in pieces:
        if steps and not (piece.strip() and steps[-1].strip()):
            steps[-1] += piece
        else:
            steps.append(piece)
    return _grouped(steps, max_steps)


def _goes_on(text: str, end: int) -> bool:
    """Whether the full stop before `end` belongs to a list marker or an abbreviation."""
    if _LINE_END.match(text, end):
        return False
    line = text[max(0, end - _MARKER_LENGTH) : end].splitlines()[-1]
    if (len(line) < _MARKER_LENGTH and _LIST_MARKER.fullmatch(line)) or _TITLE.search(line):
        return True
    following = _VISIBLE.search(text, end) if _INITIALS.search(line) else None
    return following is not None and (following[0].islower() or following[0].isdigit())


def _grouped(steps: Sequence[str], max_steps: int) -> tuple[str, ...]:
    if len(steps) <= max_steps:
        return tuple(step for step in steps if step)
    edges = [round(i * len(steps) / max_steps) for i in range(max_steps + 1)]
    return tuple("".join(steps[a:b]) for a, b in pairwise(edges))
