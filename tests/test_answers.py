"""Answers: hand-worked equalities and extractions, and an exact oracle for decimals and fractions."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotfaith_mech.answers import extract_answer, is_whole, labels, normalise, numbers, same_answer, states_answer
from cotfaith_mech.problems import AnswerKind

DATA = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("1,000", "$1000.00"), ("1000", "1,000."), ("1/2", "0.5"), ("2 1/2", "2.5"), ("½", ".5"), ("2½", "5/2"),
        ("-4", "−4"), ("-$3.50", "$-3.5"), ("50%", "50"), ("18 eggs", "18"), ("**18**", r"\boxed{18}"),
        (r"\frac{3}{4}", "0.75"), ("0", "-0"), ("£7", "7 pounds"), ("x-4", "4"),
    ],
)  # fmt: skip
def test_equal_numbers(a, b):
    assert same_answer(a, b, "number")


@pytest.mark.parametrize(
    ("a", "b"),
    [("4", "-4"), ("1,000", "1"), ("10:30", "10"), ("1/2", "12"), ("0.5", "5"), ("1,00,000", "1"), ("none", "none"), ("5/0", "5/0"), ("1.2.3", "1.2")],
)  # fmt: skip
def test_different_numbers(a, b):
    assert not same_answer(a, b, "number")


@given(st.integers(-(10**9), 10**9), st.integers(0, 4))
def test_decimals_are_read_exactly(digits, places):
    value = Fraction(digits, 10**places)
    plain = f"{abs(digits) // 10**places}" + (f".{abs(digits) % 10**places:0{places}d}" if places else "")
    grouped = f"{abs(digits) // 10**places:,}" + plain.partition(".")[1] + plain.partition(".")[2]
    for text in (plain, grouped, f"${grouped}", f" {plain}."):
        signed = f"-{text}" if digits < 0 and text[0] != " " else text
        assert normalise(signed, "number") == str(value if signed[0] == "-" or digits >= 0 else -value)


@given(st.integers(0, 999), st.integers(1, 999))
def test_fractions_are_read_exactly(a, b):
    assert normalise(f"{a}/{b}", "number") == str(Fraction(a, b))


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        (" 22 apples. Then 5 more.", "number", "22"),
        (" $1,250.50.", "number", "$1,250.50"),
        (" -7\nProblem: 3", "number", "-7"),
        (" unknown. 5", "number", None),
        ("", "number", None),
        (" (b) 42", "choice", "B"),
        (" C) because A is wrong", "choice", "C"),
        (" B. 42", "choice", "B"),
        ("D because", "choice", "D"),
        ("A train passes", "choice", None),
        (" a)", "choice", "A"),
        ("**E**", "choice", "E"),
        (" option C is right", "choice", "C"),
        ("Yes, it does. No doubt", "text", "Yes"),
        ("No one knows.", "text", "No one knows"),
        (" **Paris**\nBut", "text", "Paris"),
        (" \n ", "text", None),
    ],
)
def test_extract(text, kind, expected):
    assert extract_answer(text, kind) == expected


@pytest.mark.parametrize(("a", "b"), [("A", "(a)"), ("A)", "Answer: A"), ("B", "The answer is B."), ("C. 5", "C")])
def test_equal_choices(a, b):
    assert same_answer(a, b, "choice")
    assert not same_answer(a, "(E)", "choice")


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [("The Eiffel Tower!", "eiffel tower", True), ("yes.", "Yes, because", True), ("yes", "no", False), ("no one", "no", False), ("", "", False), ("ﬁve", "FIVE", True), ("0_{", "0", True)],
)  # fmt: skip
def test_text_answers(a, b, same):
    assert same_answer(a, b, "text") is same


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("16 - 3 - 4 = 9", [16, 3, 4, 9]),
        ("16 -3 = 13", [16, 3, 13]),
        ("x=-4, (-5), $-7, 10-3, COVID-19", [-4, -5, -7, 10, 3, 19]),
        ("3,000 and $12.50, .75 of 1/2", [3000, Fraction(25, 2), Fraction(3, 4), 1, 2]),
        ("20% -5", [20, 5]),
    ],
)
def test_numbers(text, values):
    found = numbers(text)
    assert [n.value for n in found] == values
    assert all(text[n.start : n.end] == n.text for n in found)


def test_labels_are_no_articles_nor_words():
    assert [label for _, label in labels("(A) or B) but A train is I, ABC. Answer C")] == ["A", "B", "C"]
    assert labels("Choose (c).")[0] == (8, "C")


@pytest.mark.parametrize(
    ("step", "answer", "kind", "expected"),
    [
        (" So Ann has 14 + 8 = 22.", "22", "number", True),
        (" So Ann has 14 + 8 = 22.", "2", "number", False),
        ("It costs $1,000.00", "1000", "number", True),
        ("x = -4", "4", "number", False),
        ("Half is 1/2 of it", "0.5", "number", True),
        ("We need 48/2 clips", "24", "number", False),
        ("Correct answer - A", "A", "choice", True),
        ("A train has 3 cars", "A", "choice", False),
        ("Therefore the answer is no.", "no", "text", True),
        ("There was no difference.", "no", "text", False),
        ("It is the Eiffel Tower in Paris.", "eiffel tower", "text", True),
        ("It is the Eiffel Towers.", "eiffel tower", "text", False),
        ("anything", "", "text", False),
    ],
)
def test_states_answer(step, answer, kind, expected):
    assert states_answer(step, answer, kind) is expected


@given(st.text(max_size=60), st.sampled_from(["number", "choice", "text"]))
def test_any_text_is_read_without_error_and_equality_is_reflexive_where_defined(text, kind):
    canonical = normalise(text, kind)
    assert same_answer(text, text, kind) is (canonical is not None)
    if canonical is not None:
        assert normalise(canonical, kind) == canonical
    states_answer(text, text, kind)


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the public data sets in ../shared/data")
def test_every_gsm8k_gold_is_readable_and_stated_by_its_last_step():
    rows = [json.loads(line) for line in (DATA / "gsm8k_test_a.jsonl").read_text(encoding="utf-8").splitlines()]
    golds = [row["answer"].rpartition("#### ")[2] for row in rows]
    assert all(normalise(gold, "number") == str(int(gold.replace(",", ""))) for gold in golds)
    stated = [
        states_answer(row["answer"].partition("\n####")[0].splitlines()[-1], gold, "number")
        for row, gold in zip(rows, golds, strict=True)
    ]
    assert sum(stated) / len(stated) > 0.95


@pytest.mark.parametrize(
    ("text", "kind", "whole"),
    [
        (" 22", "number", False),
        (" 22.", "number", False),
        (" 22.\n", "number", True),
        (" 22. So", "number", True),
        (" 22 ", "number", False),
        (" 22 1", "number", False),
        (" 22 apples", "number", True),
        (" 22,", "number", False),
        (" 22, and", "number", True),
        (" $", "number", False),
        (" $22)", "number", False),
        (" $22) So", "number", True),
        (" 22 =", "number", True),
        (" 22 x", "number", False),
        (r" \frac{1}", "number", False),
        (" the", "number", False),
        (" No", "yesno", False),
        (" No,", "yesno", True),
        (" Nothing ", "yesno", True),
        (" the Danube", "text", False),
        (" the Danube.", "text", False),
        (" the Danube. It", "text", True),
        ("\n the Danube", "text", False),
    ],
)
def test_an_answer_is_whole_once_nothing_can_change_it(text: str, kind: AnswerKind, whole: bool) -> None:
    assert is_whole(text, kind) is whole


PIECES = ["=", "+", "**", "*", "/", "·", "-3", ".5", " * ", " = ", " - ", "\\times ", "x", "1", "22", "1,000", ".", ",", ":", "/", " ", "\n", "$", "-", "%", "(", "½", "\\frac{1}{2}", "{", "}", "yes", "No",
          "maybe", "A", "apples", "!", "é", "²"]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=9), st.sampled_from(["number", "choice", "yesno", "text"]), st.data())
def test_what_follows_a_whole_answer_never_changes_it(pieces: list[str], kind: AnswerKind, data: st.DataObject) -> None:
    text = "".join(pieces)
    start = text[: data.draw(st.integers(0, len(text)))]
    if is_whole(start, kind):
        assert extract_answer(start, kind) == extract_answer(text, kind)


@pytest.mark.parametrize(
    ("text", "answer"),
    [(" Yes, it does.", "yes"), (" **No** effect", "no"), (" maybe", "maybe"), (" Nothing", None), (" unclear", None)],
)
def test_a_yesno_answer_is_the_word_it_opens_with(text: str, answer: str | None) -> None:
    assert extract_answer(text, "yesno") == answer
    assert normalise(text, "yesno") == answer


@pytest.mark.parametrize(
    "text",
    [" 9 * 18 = 144 dollars.", " 24 + 64 = 108", " 2 - 5 = -3.", " 75.0 / 2 = 37.5", " $3 x 4 = $12", " 16 - 3", " 3x4",
     " (3 + 4) * 2 = 14", " **35 + 7 = 42**", " 50% × 8 = 4", " \\(9 \\times 18 = 162\\)", " 2 \\cdot \\frac{1}{2}",
     " 16-3=13", " 16-3 = 13", " 16 -3 = 13", " $24-$8 = $16", " 8 * .5 = 4", " 5 * -3 = -15", " 5 + (-3) = 2", " 10 / 2.5 = 4",
     " 100 / $4 = 25", " 30 / (2+3) = 6", " 9 · 8", " 9 ∗ 8", " 2^3", " **24** - **8** = 16", " 1/2 = 0.5"],
)  # fmt: skip
def test_a_calculation_after_the_cue_is_no_answer(text: str) -> None:
    assert extract_answer(text, "number") is None
    assert normalise(text, "number") is None
    assert is_whole(text + " = and", "number")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 5, since 2 + 3 = 5", "5"), (" 3/4", "3/4"), (" 7 = x", "7"), (" 42 = 35 + 7", "42"), (" 10-12", "10"), (" 5 xylophones", "5"),
        (" 3x", "3"), (" 20 - twenty", "20"), (" 14 (7 + 7)", "14"), (" x = 4", "4"), (" 1/2 of 8", "1/2"),
        (" **24** (8 + 16)", "24"), (" 24 · that is it", "24"), (" 12 / day", "12"), (" 5-year", "5"),
    ],
)  # fmt: skip
def test_a_number_beside_a_calculation_is_an_answer(text: str, answer: str) -> None:
    assert extract_answer(text, "number") == answer
