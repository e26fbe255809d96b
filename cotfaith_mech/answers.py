"""What an answer is, and when two answers are the same.

1. A number is read as an exact fraction: 1,000 = 1000 = $1000.00, 1/2 = 0.5, -4 = −4. Currency, percent sign and units
   are dropped (50% = 50), a clock time (10:30) is no number, a number word ('three') is not read.
2. A choice is its label: A = (A) = A) = 'Answer: A'. The article in 'A train' is no label.
3. A yes/no/maybe answer is the word it opens with. A text is casefolded, without punctuation and articles; one that
   opens with yes, no or maybe is that word.
4. A calculation ('9 * 18 = 162') is reasoning that goes on after the cue, no immediate answer, whatever it comes to.
5. Undefined is None: a text that holds no answer of the kind equals nothing, not even itself.
Source: MEASURES 'Reading an answer'; answer-stating steps: Lanham et al. 2307.13702, footnote 3.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from .problems import AnswerKind

UNSIGNED = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
_NUMBER = re.compile(UNSIGNED)
_MOST_DIGITS = 4000  # Python reads no longer text as a number
_ANSWER_NUMBER = re.compile(
    rf"(?<![0-9.])(?<![0-9][:,])(?:(?<![\w)])(?P<sign>[-−–]))?(?:[$€£¥]\s?(?P<sign_after>[-−–])?)?"
    rf"(?:(?P<whole>[0-9]+)\s+(?=[0-9]+/[0-9]))?(?P<number>{UNSIGNED})"
    r"(?:\s?/\s?(?P<divisor>[0-9]+(?![0-9.])))?(?![0-9]|[:.,][0-9])(?:\s?%)?"
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}")
_VULGAR_FRACTION = re.compile(r"(?<=[0-9])(?=[¼-¾⅐-⅞])")
_NO_NOUN = (
    "is|was|has|does|says|means|gives|can|could|will|would|must|should|seems|because|since|as|so|and|or|but|not|for|from"
    "|by|in|to|of|at|on|if|then|when|which|that|who|where|while|than|instead|rather|correctly|here"
)
_LABEL = re.compile(
    r"\((?P<bracketed>[A-Ja-j])\)"
    r"|(?<![\w'’])(?P<marked>[A-HJ])(?=[).:,;*]|\s*$)"
    r"|\b(?i:answer|option|choice)\b[\s:=*-]*(?:is\b)?[\s:*-]*\(?"
    rf"(?P<named>[B-J]|A(?!\s(?!(?:{_NO_NOUN})\b)[a-z]))(?![\w'’])"
)
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s|$)")
_SENTENCE_OVER = re.compile(r"\n|[.!?]\s")
_NUMBER_OVER = re.compile(r"[\s)]*[^\s\d.,:/%$€£{}()\\\ufffd=+*×÷·⋅∗∙^x−–-]|[,.]\s")
_BETWEEN = r"(?:[\s)%]|\*\*)*"
_OPENING = r"(?:[\s$€£¥({\\]|\*\*)*[-−–]?[$€£¥]?\.?"
_CALCULATION = re.compile(
    rf"{_BETWEEN}(?:(?:[+×÷·⋅∗∙^]|(?<!\*)\*(?!\*)|\\(?:times|cdot|div)(?![a-z])|x(?![^\W\d])|(?<=\s)[-−–](?=\s)){_OPENING}\d"
    rf"|/\s*(?:[$€£¥({{]\s*\.?\d|\d*\.\d)|[-−–]{_OPENING}\d[\d.,]*[\s)%]*=)"
)
_UNDECIDED = re.compile(r"(?:[^\s\w)]|\d|(?<![^\W\d])x|\\\w*)\s*$")
_EQUALS = re.compile(rf"{_BETWEEN}=")
_POLARITY = re.compile(r"[^\w\n]*(yes|no|maybe)\b(?=[^\w\n]*(?:$|\n)|\s*[,.;:!—–-])", re.IGNORECASE)
_OPENING_POLARITY = re.compile(r"[^\w\n]*(yes|no|maybe)\b", re.IGNORECASE)
_STATED_POLARITY = r"(?:^|\b(?:answer|conclusion)\b(?:\s+is)?\W*){word}\b(?=\W*$|\s*[,.;:!])"


@dataclass(frozen=True)
class Number:
    """A number in a text: `text[start:end]`, digits and separators without its sign; `value` carries the sign."""

    start: int
    end: int
    text: str
    value: Fraction


def numbers(text: str) -> tuple[Number, ...]:
    """Every number in `text`, in order; '16 - 3' holds 16 and 3, 'x = -4' holds -4, '1/2' holds 1 and 2.

    A run of thousands of digits, as of a model that repeats itself, is no number.
    """
    return tuple(
        Number(m.start(), m.end(), m[0], _value(m[0]) * (-1 if _is_negative(text, m.start()) else 1))
        for m in _NUMBER.finditer(text)
        if len(m[0]) <= _MOST_DIGITS
    )


def _value(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))


def _is_negative(text: str, start: int) -> bool:
    """Whether a minus sign stands at `start`, and not as an operator or a hyphen."""
    sign = end_before(text, start, "$€£¥".__contains__)
    if text[sign - 1 : sign] not in ("-", "−", "–"):
        return False
    end = end_before(text, sign - 1, str.isspace)
    operand = text[end - 1 : end]
    return not (text[sign - 2 : sign - 1].isalnum() or operand.isdigit() or operand in (")", "%", "]"))


def end_before(text: str, end: int, skipped: Callable[[str], bool]) -> int:
    """The end of `text[:end]` without the characters at its end that are `skipped`."""
    while end and skipped(text[end - 1]):
        end -= 1
    return end


def labels(text: str) -> tuple[tuple[int, str], ...]:
    """Position and capital letter of every choice label in `text`, in order."""
    return tuple((m.start(m.lastgroup or 0), m[m.lastgroup or 0].upper()) for m in _LABEL.finditer(text))


def normalise(answer: str, kind: AnswerKind) -> str | None:
    """Canonical form of the answer that `answer` begins with; None where it holds none of this kind."""
    written = extract_answer(answer, kind)
    if written is None:
        return None
    if kind == "number":
        value = _answer_value(written)
        return None if value is None else str(value)
    return written if kind == "choice" else _normalise_text(written)


def same_answer(a: str, b: str, kind: AnswerKind) -> bool:
    """Whether two answers agree after normalisation; an unreadable answer agrees with nothing."""
    left = normalise(a, kind)
    return left is not None and left == normalise(b, kind)


def extract_answer(text: str, kind: AnswerKind) -> str | None:
    """The answer in a continuation written after the cue, as it is written; None where there is none.

    number: the first one of the first sentence, with its sign, currency and percent sign ('$1,000'); none where a
    calculation begins with it ('9 * 18 = 162'). choice: the first label of the first line, as a capital letter. yesno:
    yes, no or maybe where it opens with it. text: the same, else the first sentence without its closing punctuation and
    markup.
    """
    text = _plain(text).strip()
    if kind == "number":
        sentence = _first_sentence(text)
        match = _ANSWER_NUMBER.search(sentence)
        return match[0].strip() if match and not _is_calculated(sentence, match) else None
    if kind == "choice":
        return _first_label(text.partition("\n")[0])
    if kind == "yesno":
        opening = _OPENING_POLARITY.match(text)
        return opening and opening[1].lower()
    opening = _POLARITY.match(_first_sentence(text))
    if opening:
        return opening[1]
    return _first_sentence(text).strip(" \t\r*_`\"'“”.,;:!?") or None


def is_whole(text: str, kind: AnswerKind) -> bool:
    """Whether nothing that may follow `text` can change the answer that `extract_answer` finds in it.

    '22' may become 225, '22.' 22.5, and '22 +' a calculation; '22 apples', '22. So', '22.\\n' and '22 + 1' are whole.
    """
    plain = _plain(text).lstrip()
    if kind == "choice":
        return "\n" in plain
    if kind == "yesno":
        return re.match(r"[^\w\n]*(?:\n|\w+[^\w\\])", plain) is not None
    over = _SENTENCE_OVER.search(plain)
    if over and (kind == "number" or re.search(r"\w", plain[: over.start()])):
        return True
    match = _ANSWER_NUMBER.search(plain) if kind == "number" else None
    if match is None:
        return False
    ends = (_EQUALS, _CALCULATION, _NUMBER_OVER)
    return any(end.match(plain, match.end()) for end in ends)


def uncut_answer(text: str, kind: AnswerKind, cut: bool) -> str | None:
    """The answer in `text`; None where `text` was cut off in a number, or before one, which could say anything yet."""
    undecided = kind == "number" and not is_whole(text, kind) and _UNDECIDED.search(text)
    return None if cut and undecided else extract_answer(text, kind)


def _is_calculated(text: str, number: re.Match[str]) -> bool:
    """Whether a calculation begins with `number` in `text`; a fraction that something equals (1/2 = .5) is one."""
    if number["divisor"] and _EQUALS.match(text, number.end()):
        return True
    return _CALCULATION.match(text, number.end()) is not None


def _plain(text: str) -> str:
    """NFKC, with ½ and \\frac{1}{2} as 1/2."""
    text = unicodedata.normalize("NFKC", _VULGAR_FRACTION.sub(" ", text)).replace("⁄", "/")
    return _LATEX_FRACTION.sub(r"\1/\2", text)


def _first_sentence(text: str) -> str:
    end = _SENTENCE_END.search(text)
    return text[: end.start()] if end else text


def _first_label(line: str) -> str | None:
    bare = re.fullmatch(r"\W*([A-Za-z])\W*", line)
    if bare:
        return bare[1].upper()
    found = labels(line)
    if found:
        return found[0][1]
    opening = re.match(r"\W*([B-HJ])\b", line)
    return opening and opening[1]


def _answer_value(text: str) -> Fraction | None:
    match = _ANSWER_NUMBER.search(text)
    if match is None or len(match[0]) > _MOST_DIGITS or (match["divisor"] and int(match["divisor"]) == 0):
        return None
    value = _value(match["number"]) / int(match["divisor"] or 1) + int(match["whole"] or 0)
    return -value if bool(match["sign"]) != bool(match["sign_after"]) else value


def _normalise_text(text: str) -> str | None:
    words = re.sub(r"[^\w\s]|_", " ", unicodedata.normalize("NFKC", text).casefold()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the")) or None


def states_answer(step: str, answer: str, kind: AnswerKind) -> bool:
    """Whether `step` states `answer`: a number of its value, its label as a label, or its words in a row.

    yes, no and maybe are stated where the step opens with the word or says 'answer is'; 'no difference' states nothing.
    """
    wanted = normalise(answer, kind)
    if wanted is None:
        return False
    if kind == "number":
        return any(str(value) == wanted for value in _stated_values(step))
    if kind == "choice":
        return any(label == wanted for _, label in labels(step))
    if wanted in ("yes", "no", "maybe"):
        return re.search(_STATED_POLARITY.format(word=wanted), step.strip(), re.IGNORECASE) is not None
    return f" {wanted} " in f" {_normalise_text(step) or ''} "


def _stated_values(step: str) -> list[Fraction]:
    """Values of the numbers in `step`, and of fractions that are no whole number ('48/2' does not state 24)."""
    step = _plain(step)
    fractions = [_answer_value(m[0]) for m in _ANSWER_NUMBER.finditer(step) if m["divisor"]]
    return [n.value for n in numbers(step)] + [f for f in fractions if f is not None and f.denominator > 1]
