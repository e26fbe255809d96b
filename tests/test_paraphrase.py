"""Paraphrases: what they keep (checked apart from `validate`), what they change, and what `validate` rejects."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotfaith_mech.chains import segment
from cotfaith_mech.paraphrase import names, paraphrase_step, rephrase, validate

DATA = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"

TYPICAL = [
    "Ann has 14 + 8 = 22.",
    " He sprints 3*3=9 times",
    "\nSo he runs 9*60=540 meters",
    "\nThere are 120 - 36 = 84 pages left to be read.",
    " The total cost of cookies is 4 * $1.25 = $5.",
    "After buying a hat, Josh has $20 - $10 = $10.",
    "So, 5x=7200.",
    "\n2. Then, multiply 3 by 4.",
    "Correct answer: B",
    "It does not rain often because the mountains shelter the whole valley.",
]


def draws(step, n=40):
    return {rephrase(step, np.random.default_rng(seed)).text for seed in range(n)} - {None}


@pytest.mark.parametrize("step", TYPICAL)
def test_typical_steps_have_five_draws_that_keep_numbers_and_outer_whitespace(step):
    found = draws(step)
    assert len(found) >= 5
    for text in found:
        assert sorted(re.findall(r"[\d.,]*\d", text)) == sorted(re.findall(r"[\d.,]*\d", step))
        assert re.match(r"\s*", text)[0] == re.match(r"\s*", step)[0]
        assert text.strip() != step.strip()
        assert text[-1] == step[-1] or step[-1] not in ".!?"


def test_frames_written_out():
    found = draws("Ann has 14 + 8 = 22.", 80)
    assert {
        "For Ann: 14 + 8 = 22.",
        "Ann now has 14 + 8 = 22.",
        "14 + 8 = 22 for Ann.",
        "What Ann has is 14 + 8 = 22.",
    } <= found
    moved = draws("After buying a hat, Josh had $20 - $10 = $10 left.", 80)
    assert any(text.startswith("Josh ") and "after buying a hat" in text for text in moved)


def test_same_generator_same_draw():
    first, second = (rephrase(TYPICAL[0], np.random.default_rng(5)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("original", "paraphrased", "reason"),
    [
        ("Ann has 14 + 8 = 22.", "For Ann: 14 + 8 = 23.", "numbers differ"),
        ("Ann has 14 + 8 = 22.", "For Ann: 8 + 14 = 22.", "calculations differ"),
        ("Ann has 14 + 8 = 22.", "For Ann: 14 - 8 = 22.", "symbols differ"),
        ("Ann has 14 + 8 = 22.", "For Bob: 14 + 8 = 22.", "names differ"),
        ("Ann has 14 + 8 = 22.", "Ann has  14 + 8 = 22!", "wording is the same"),
        ("Ann has 14 + 8 = 22.", " Ann now has 14 + 8 = 22.", "outer whitespace differs"),
        ("He ate half of it.", "He ate a third of it.", "number words differ"),
        ("The answer is (B).", "The answer we give is (C).", "choice labels differ"),
        ("It is not warm.", "It is rather warm.", "negations differ"),
        ("Let x be more.", "Let y stand for more.", "variables differ"),
        ("We met in Paris today.", "We met in paris this day.", "names differ"),
        ("It costs $5 now.", "It costs 5 here now.", "symbols differ"),
        ("From $2 + $3 = $5 we get $5 - $1 = $4.", "We get $5 - $1 = $4 from $2 + $3 = $5.", "calculations differ"),
    ],
)
def test_validate_rejects(original, paraphrased, reason):
    assert validate(original, paraphrased) == reason


@pytest.mark.parametrize(
    ("original", "paraphrased"),
    [
        ("Ann has 14 + 8 = 22.", "For Ann: 14 + 8 = 22."),
        ("Buying 3 hats, Josh is happy.", "Josh is glad, buying 3 hats."),
        ("It isn't warm.", "It is not hot."),
        ("There are 1,000 well-known cats.", "We count 1,000 famous cats."),
    ],
)
def test_validate_accepts(original, paraphrased):
    assert validate(original, paraphrased) is None


def test_rejections_are_counted_and_nothing_invalid_is_used():
    none = rephrase("```\nx = 1\n```", np.random.default_rng(0), tries=3)
    assert none.text is None
    assert none.rejected == ("no rule applies",) * 3


@pytest.mark.parametrize("kept", ["`left`", r"\(x_{1} so\)", r"\frac{1}{2}", "<<14+8=22>>", "https://per.org/kids"])
def test_code_latex_and_annotations_stay_verbatim(kept):
    step = f"So the kids need {kept} because of this."
    assert all(kept in text for text in draws(step))
    assert draws(step)


def test_other_scripts_get_no_english_opening():
    assert paraphrase_step("安妮有苹果。", np.random.default_rng(0)) is None


def test_names_are_capitalised_words_without_function_words():
    assert [name for _, name in names("The Ann-Marie and Élodie met Dr. Li in May, I think.")] == [
        "Ann-Marie",
        "Élodie",
        "Dr",
        "Li",
    ]


chars = st.sampled_from(list("aAnB .,=+-*/$%0123456789\n()`\\{}éß中😀'’\u0301")) | st.characters(
    exclude_categories=["Cs"]
)
words = st.sampled_from(
    [
        "So",
        "Ann",
        "has",
        "14 + 8 = 22",
        "not",
        "The",
        "total",
        "is",
        "$3.50",
        "because",
        ",",
        ".",
        "\n",
        "After",
        "`x`",
        "is not",
        "(B)",
        "½",
        "每",
    ]
)
texts = st.text(chars, max_size=50) | st.lists(words, max_size=12).map(" ".join)


@given(texts, st.integers(0, 2**32))
def test_any_text_keeps_its_numbers_and_case_marked_names(step, seed):
    drawn = rephrase(step, np.random.default_rng(seed), tries=3)
    if drawn.text is None:
        assert len(drawn.rejected) == 3
        return
    assert drawn.text.casefold() != step.casefold()
    assert sorted(c for c in drawn.text if c.isdigit()) == sorted(c for c in step if c.isdigit())
    assert sorted(c for c in drawn.text if c in "+=*/$%(){}\\") == sorted(c for c in step if c in "+=*/$%(){}\\")
    assert not any("\ue000" <= c <= "\uf8ff" and c not in step for c in drawn.text)


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the public data sets in ../shared/data")
def test_nearly_every_gsm8k_step_has_five_valid_paraphrases():
    rows = [json.loads(line) for line in (DATA / "gsm8k_test_a.jsonl").read_text(encoding="utf-8").splitlines()[:12]]
    steps = [s for row in rows for s in segment(re.sub(r"<<.*?>>", "", row["answer"].partition("\n####")[0]))]
    n_draws = [len(draws(step, 20)) for step in steps]
    assert np.mean([n > 0 for n in n_draws]) > 0.95
    assert np.mean([n >= 5 for n in n_draws]) > 0.9
