"""Paraphrases: what they keep (checked apart from `validate`), what they change, and what `validate` rejects."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotfaith_mech import paraphrasers
from cotfaith_mech.chains import segment
from cotfaith_mech.errors import CotfaithError
from cotfaith_mech.paraphrase import names, paraphrase_step, rephrase, validate
from cotfaith_mech.paraphrasers import Paraphrases, by_model, by_rules, supplied

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


STEPS = ("Ann has 14 + 8 = 22.", " 14 + 8 = 22", "\nBob has 5 left. ")


def test_rule_paraphrases_are_one_a_step_and_count_rejections():
    made = by_rules(STEPS, 3, 7)
    assert [len(draw) for draw in made.draws] == [3, 3, 3]
    assert made == by_rules(STEPS, 3, 7) != by_rules(STEPS, 3, 8)
    for draw in made.draws:
        assert all(text is None or validate(step, text) is None for step, text in zip(STEPS, draw, strict=True))
    code = by_rules(["```\nx\n```"], 2, 0)
    assert code == Paraphrases("rules", ((None,), (None,)), {"no rule applies": 16})
    assert Paraphrases.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_supplied_paraphrases_by_hand():
    made = supplied(
        STEPS,
        [
            ["For Ann: 14 + 8 = 22.", None, "\nBob has 6 left over. "],
            ["Ann has 14 + 8 = 22.", "", "Now Bob has 5 left."],
        ],
    )
    assert made == Paraphrases(
        "supplied",
        (("For Ann: 14 + 8 = 22.", None, None), (None, None, None)),
        {"numbers differ": 1, "outer whitespace differs": 1, "wording is the same": 1},
    )
    with pytest.raises(CotfaithError, match="A draw holds 2 paraphrases for 3 steps"):
        supplied(STEPS, [["a", "b"]])


class Writer:
    """A reader that writes what it is told for each step, the next wording at each further try; keeps what it was shown."""

    info = SimpleNamespace(name="writer", context=None)

    def __init__(self, wordings):
        self.wordings = wordings
        self.calls = []

    def render(self, question):
        return f"<user>{question}<assistant>"

    def count(self, text):
        return len(text.split())

    def generate(self, prompts, *, begun=None, max_new_tokens, temperature=0.0, seeds=()):
        written = []
        for prompt in prompts:
            body = prompt.removeprefix(f"<user>{paraphrasers.INSTRUCTION}").removesuffix("<assistant>")
            said = self.wordings[body]
            written.append(said.pop(0) if len(said) > 1 else said[0])
        self.calls.append((list(prompts), max_new_tokens, temperature, seeds))
        return written


def test_a_model_words_one_step_at_a_time_and_only_what_failed_is_tried_again():
    writer = Writer(
        {
            "Ann has 14 + 8 = 22.": [
                "Ann has 23.",
                "For Bob: 14 + 8 = 22.",
                'Rewritten sentence: "For Ann: 14 + 8 = 22."\n\nI kept it.',
            ],
            "Bob has 5 left.": ["  What Bob still has is 5.\n"],
        }
    )
    made = by_model(writer, STEPS, 1, 40)
    assert made.paraphraser == "writer"
    assert made.draws == (("For Ann: 14 + 8 = 22.", None, "\nWhat Bob still has is 5. "),)
    assert made.rejected == {"names differ": 1, "numbers differ": 1}
    shown = [
        [writer.render(paraphrasers.INSTRUCTION + body) for body in bodies]
        for bodies in (["Ann has 14 + 8 = 22.", "Bob has 5 left."], ["Ann has 14 + 8 = 22."])
    ]
    assert [call[0] for call in writer.calls] == [shown[0], shown[1], shown[1]]
    assert [call[1] for call in writer.calls] == [2 * 7 + 16] * 3
    assert {call[2] for call in writer.calls} == {paraphrasers.TEMPERATURE}
    seeds = [seed for call in writer.calls for seed in call[3]]
    assert len(set(seeds)) == len(seeds) == 4


def test_a_model_that_never_writes_a_valid_wording_is_asked_so_often_and_no_more():
    writer = Writer({"Bob has 5 left.": ["Bob has 6 left over."]})
    made = by_model(writer, STEPS[2:], 2, 0)
    assert made == Paraphrases("writer", ((None,), (None,)), {"numbers differ": 2 * paraphrasers.TRIES})
    assert len(writer.calls) == paraphrasers.TRIES
    assert all(len(call[0]) == 2 for call in writer.calls)


def test_many_wordings_are_asked_for_in_batches():
    writer = Writer({"Bob has 5 left.": ["What Bob still has is 5."]})
    made = by_model(writer, STEPS[2:], 19, 0)
    assert made.draws == (("\nWhat Bob still has is 5. ",),) * 19
    assert [len(call[0]) for call in writer.calls] == [16, 3]
    assert len({seed for call in writer.calls for seed in call[3]}) == 19


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ('"For Ann: 22."', "For Ann: 22."),
        ("“For Ann: 22.”", "For Ann: 22."),
        ('"No," said Ann, "22"', '"No," said Ann, "22"'),
        ("Rewritten sentence: For Ann: 22.", "For Ann: 22."),
        ("Here is the rewritten sentence:\nFor Ann: 22.\n\nNote: done.", "For Ann: 22."),
        ("Here's a paraphrased version: 'tis 22.", "'tis 22."),
        ("The total: 22.", "The total: 22."),
    ],
)
def test_what_a_model_wrote_is_cleaned(written, text):
    writer = Writer({"It is 22.": [written]})
    by_model(writer, ["It is 22."], 1, 0)
    assert paraphrasers._cleaned(written) == text


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the public data sets in ../shared/data")
def test_nearly_every_gsm8k_step_has_five_valid_paraphrases():
    rows = [json.loads(line) for line in (DATA / "gsm8k_test_a.jsonl").read_text(encoding="utf-8").splitlines()[:12]]
    steps = [s for row in rows for s in segment(re.sub(r"<<.*?>>", "", row["answer"].partition("\n####")[0]))]
    n_draws = [len(draws(step, 20)) for step in steps]
    assert np.mean([n > 0 for n in n_draws]) > 0.95
    assert np.mean([n >= 5 for n in n_draws]) > 0.9


def test_what_is_longer_than_any_sentence_stays_and_takes_no_time() -> None:
    """The patterns backtrack on it: a run of 1,900 digits took ten seconds."""
    long = f"The answer is {'word ' * 300}or C."
    assert paraphrase_step(long, np.random.default_rng(0)) is None
    drawn = {paraphrase_step(f"Then Ann has 3 nuts. {long}", np.random.default_rng(seed)) for seed in range(8)} - {None}
    assert drawn
    assert all(text.endswith(long) for text in drawn)
