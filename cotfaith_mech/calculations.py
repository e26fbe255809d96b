"""Calculations written in a text, '14 + 8 = 22', and the text with some of its numbers changed and the results redone.

1. A calculation is a run of numbers and operators (+ - − × x * ÷ /, brackets, currency) before '=' and the number after
   it; list markers, other sentences and markup before it are no part of it. It counts where it is right as written.
2. `carry_on` puts new values in the place of old ones, sentence by sentence: where an operand changed, the result is
   calculated again, and stands for the old one from there on.
Source: MEASURES 'equal-length value swap (consequences propagated or not)'.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from .answers import UNSIGNED, Number, numbers

_OPERAND = rf"(?:[$€£]\s?)?{UNSIGNED}"
_LEFT = re.compile(
    rf"(?<![\w.,])(?:\(\s*|[−–-](?=[\d.$€£(]))*{_OPERAND}"
    rf"(?:[\s)]*[+*/×÷x−–-]\s*(?:\(\s*|[−–-](?=[\d.$€£(]))*{_OPERAND})+[\s)]*$"
)
_LEFT_CHARACTERS = "0123456789.,$€£()+*/×÷x−–- \t\u00a0\u202f"
_GOES_BEFORE = re.compile(r"[\w)\]}%][^\S\r\n]*[+*/×÷−–-][^\S\r\n]*$")
_MARKER = re.compile(r"^\s*(?:\W*step\s*|#\s*|(?=\d+[.)][^\S\r\n]+\S))(\d+)", re.IGNORECASE | re.MULTILINE)
_RESULT = re.compile(r"[\s$€£−–-]*(?=[\d.])")
_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclass(frozen=True)
class Calculation:
    """`text[start:equals]` is the left side, `result` the number after the sign; both sides have the same value."""

    start: int
    equals: int
    result: Number


def quantities(text: str) -> list[Number]:
    """The numbers of `text` but digits inside a word (H2O), ordinals (21st) and list markers ('2. Add', 'Step 2')."""
    marked = {m.start(1) for m in _MARKER.finditer(text)}
    return [
        n
        for n in numbers(text)
        if n.start not in marked
        and (
            not text[max(0, n.start - 1) : n.start].isalpha()
            or re.search(r"[\d)]x$", text[max(0, n.start - 2) : n.start])
        )
        and not re.match(r"(?:st|nd|rd|th)\b", text[n.end : n.end + 3])
    ]


def calculations(text: str) -> list[Calculation]:
    """The right calculations of `text`, in order."""
    by_start = {n.start: n for n in numbers(text)} if "=" in text else {}
    found = []
    for sign in re.finditer("=", text):
        start, lead = _left(text, sign.start()), _RESULT.match(text, sign.end())
        result = by_start.get(lead.end()) if lead else None
        if start is not None and result and evaluated(text[start : sign.start()]) == result.value:
            found.append(Calculation(start, sign.start(), result))
    return found


def _left(text: str, equals: int) -> int | None:
    """Where the left side that ends at `equals` begins; None where there is none or it goes on before that."""
    left = _LEFT.search(text, len(text[:equals].rstrip(_LEFT_CHARACTERS)), equals)
    if left is None or _GOES_BEFORE.search(text, max(0, left.start() - 9), left.start()):
        return None
    side = left[0]
    while side.startswith("(") and side.count("(") > side.count(")"):
        side = side[1:].lstrip()
    return equals - len(side)


def evaluated(expression: str) -> Fraction | None:
    """Exact value of an arithmetic expression as people write it ('$1,200 ÷ 4'); None where it is none."""
    plain = re.sub(r"[$€£,\s]", "", expression).translate(str.maketrans("×÷x−–", "*/*--"))
    if not re.fullmatch(r"[0-9.()+*/-]+", plain):
        return None
    try:
        return _value(ast.parse(plain, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(ast.dump(node))


def carry_on(text: str, changed: Mapping[Fraction, Fraction]) -> tuple[str, dict[Fraction, Fraction]] | None:
    """`text` with the `changed` values and what follows from them, and all values changed by its end.

    A number written with a sign of its own counts as its size. None where a new result cannot be written as the old
    one was: it would need another sign or more decimals than two, or run into a number next to it.
    """
    changed = dict(changed)
    results = {c.result.start: c for c in calculations(text)}
    open_ = {n.start for n in quantities(text)}
    parts: list[str] = []
    spans: dict[int, tuple[int, int]] = {}
    end = 0
    for number in numbers(text):
        parts.append(text[end : number.start])
        start = sum(map(len, parts))
        calculation = results.get(number.start)
        new = changed.get(abs(number.value), abs(number.value)) if number.start in open_ else abs(number.value)
        if calculation is not None:
            new = _recalculated("".join(parts), calculation, spans)
            changed.pop(abs(number.value), None)
            if new is not None and new != abs(number.value):
                changed[abs(number.value)] = new
        same = new == abs(number.value)
        written = number.text if same else None if new is None else written_like(number.text, new)
        if written is None:
            return None
        parts.append(written)
        spans[number.start] = (start, start + len(written))
        end = number.end
    carried = "".join([*parts, text[end:]])
    return (carried, changed) if [n.text for n in numbers(carried)] == parts[1::2] else None


def _recalculated(so_far: str, calculation: Calculation, spans: Mapping[int, tuple[int, int]]) -> Fraction | None:
    """Size of the result of the left side as it stands at the end of `so_far`; None where its sign would change."""
    first = min((old for old in spans if old >= calculation.start), default=None)
    if first is None:
        return None
    shift = spans[first][0] - first
    left = so_far[calculation.start + shift : so_far.rindex("=")]
    value = evaluated(left)
    if value is None or (value and (value < 0) != (calculation.result.value < 0)):
        return None
    return abs(value)


def written_like(old: str, value: Fraction) -> str | None:
    """`value` with the separators and decimals of the number text `old`; None where two decimals do not hold it."""
    decimals = len(old.partition(".")[2])
    if value.denominator != 1 and (value * 100).denominator != 1:
        return None
    if value.denominator != 1:
        decimals = max(decimals, 1 if (value * 10).denominator == 1 else 2)
    grouped = "," if "," in old else ""
    exact = Decimal(value.numerator) / value.denominator
    return f"{exact:{grouped}.{decimals}f}" if value < 10**12 else None
