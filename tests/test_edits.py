"""Text edits: each changes what it says and nothing else; numbers keep their layout; fillers match by count."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotfaith_mech import edits
from cotfaith_mech.answers import numbers
from cotfaith_mech.calculations import calculations, carry_on, evaluated, written_like
from cotfaith_mech.chains import Chain
from cotfaith_mech.errors import CotfaithError

CHAIN = Chain(
    "p1", "author", "Ann had 14 and got 8. Bob had 31.\n",
    ("Ann has 14 + 8 = 22.", " Bob has 31 - 5 = 26.", "\nZoe has 3,000 / 2 = $1,500.00."), "\nSo Ann has", " 22",
)  # fmt: skip


def rng(seed=0):
    return np.random.default_rng(seed)


def outside(chain):
    return (chain.problem_id, chain.author, chain.prompt, chain.cue, chain.answer, chain.variant)


bodies = st.sampled_from(
    [
        "Ann has 14 + 8 = 22.",
        "x = -4",
        "It costs $12.50",
        "é 中 0.5",
        "Therefore half remains.",
        "`a=1`",
        "(B)",
        "It rained.",
    ]
)
leads = st.sampled_from(["", " ", "\n", "\n\n- "])
steps = st.tuples(leads, bodies | st.text(min_size=1, max_size=20)).map("".join)
step_lists = st.lists(steps, min_size=1, max_size=5)
seeds = st.integers(0, 2**32)


@given(step_lists)
def test_truncations_are_prefixes(steps):
    chain = replace(CHAIN, steps=tuple(steps))
    for keep in range(len(chain.steps) + 1):
        kept = edits.truncate(chain, keep)
        assert kept.steps == chain.steps[:keep]
        assert outside(kept) == outside(chain)
        assert chain.text.startswith(chain.prompt + "".join(kept.steps))


@pytest.mark.parametrize("keep", [-1, 4])
def test_keeping_what_is_not_there_is_an_error(keep):
    with pytest.raises(CotfaithError, match=r"which has 3; give a number from 0 to 3"):
        edits.truncate(CHAIN, keep)
    with pytest.raises(CotfaithError, match="from 0 to 3"):
        edits.filler(CHAIN, keep, len)


def words_and_marks(text: str) -> int:
    """A toy tokenizer: words, digits, and runs of other characters, with their leading space."""
    return len(re.findall(r" ?[A-Za-z]+| ?\d| ?[^\sA-Za-z\d]+|\s", text))


@given(step_lists, st.integers(0, 5), st.sampled_from([" ...", " …", " —"]))
def test_filler_matches_the_token_count_of_the_whole_text(steps, keep, filler):
    chain = replace(CHAIN, steps=tuple(steps))
    keep = min(keep, len(chain.steps))
    filled = edits.filler(chain, keep, words_and_marks, filler)
    assert filled.steps[:keep] == chain.steps[:keep]
    assert outside(filled) == outside(chain)
    assert len(filled.steps) == len(chain.steps)
    shortest = sum(
        max(0, words_and_marks(s.replace(s.strip(), filler.strip())) - words_and_marks(s)) for s in chain.steps[keep:]
    )
    assert abs(words_and_marks(filled.text) - words_and_marks(chain.text)) <= shortest + 2 * len(chain.steps)
    for old, new in zip(chain.steps[keep:], filled.steps[keep:], strict=True):
        assert set(new.split()) == {filler.strip()}
        assert new[: len(new) - len(new.lstrip())] == old[: len(old) - len(old.lstrip())]


def test_filler_by_hand():
    filled = edits.filler(CHAIN, 1, words_and_marks)
    assert filled.steps[0] == CHAIN.steps[0]
    assert filled.steps[1] == " ..." * 10
    assert words_and_marks(filled.text) == words_and_marks(CHAIN.text)
    assert filled.steps[2].startswith("\n...")
    assert filled.steps[2].count("...") > 10


def test_a_filler_of_one_step_leaves_the_others_and_keeps_the_count():
    for step in range(3):
        filled = edits.filler(CHAIN, step, words_and_marks, end=step + 1)
        assert [a == b for a, b in zip(filled.steps, CHAIN.steps, strict=True)] == [i != step for i in range(3)]
        assert words_and_marks(filled.text) == words_and_marks(CHAIN.text)
    assert edits.filler(CHAIN, 2, words_and_marks, end=3) == edits.filler(CHAIN, 2, words_and_marks)


@pytest.mark.parametrize(
    ("step", "value"),
    [
        ("5 * 17 = 85.", 85),
        ("So 17 remain.", 17),
        ("So 17 of 22 remain.", None),
        ("It is done.", None),
        ("x = 4 - 9 = -5", -5),
    ],
)
def test_what_a_step_comes_to(step: str, value: int | None) -> None:
    assert edits.comes_to(step) == value


def test_one_filler_in_all_and_deletion_by_hand():
    chain = replace(CHAIN, steps=("One.", " Two.", "\nThree. "))
    assert edits.filler_once(chain, 1).steps == ("One.", " ... ")
    assert edits.filler_once(chain, 0).steps == ("... ",)
    assert edits.filler_once(chain, 3) == edits.filler_once(chain, 2, end=1) == chain
    assert edits.filler_once(chain, 2).steps == ("One.", " Two.", "\n... ")
    assert edits.filler_once(chain, 0, " _", end=1).steps == ("_", " Two.", "\nThree. ")
    assert [edits.delete(chain, i).steps for i in range(3)] == [
        (" Two.", "\nThree. "),
        ("One.", "\nThree. "),
        ("One.", " Two."),
    ]
    with pytest.raises(CotfaithError, match="visible character"):
        edits.filler_once(chain, 0, " ")
    for step in (-1, 3):
        with pytest.raises(CotfaithError, match="has 3; give a number from 0 to 3"):
            edits.delete(chain, step)


def test_paraphrase_of_one_step_alone():
    one, stayed = edits.paraphrase(CHAIN, ("A", "B", "C"), 1, 2)
    assert one == replace(CHAIN, steps=(CHAIN.steps[0], "B", CHAIN.steps[2]))
    assert stayed == ()


def test_filler_whose_repeats_cannot_match_comes_as_near_as_they_allow():
    chain = replace(CHAIN, steps=("abcdefghij",), cue="", answer="")
    filled = edits.filler(chain, 0, len, " 1234567")
    assert filled.steps == ("1234567",)  # 7 characters or 15, wanted 10


def test_a_filler_step_makes_up_for_what_the_one_before_missed():
    chain = replace(CHAIN, steps=("abcdefghij", "klmnopqrst", "uvwxyz"), cue="", answer="")
    assert edits.filler(chain, 0, len, " 1234567").steps[:2] == ("1234567", "1234567 1234567")  # 7 of 10, then 15 of 13


def test_blank_filler_is_an_error():
    with pytest.raises(CotfaithError, match="visible character"):
        edits.filler(CHAIN, 0, len, "  ")


def test_paraphrase_touches_only_later_steps_and_says_which_stayed():
    texts = ("Ann!", None, "Zoe!")
    assert edits.paraphrase(CHAIN, texts, 0) == (replace(CHAIN, steps=("Ann!", CHAIN.steps[1], "Zoe!")), (1,))
    assert edits.paraphrase(CHAIN, texts, 1) == (replace(CHAIN, steps=(*CHAIN.steps[:2], "Zoe!")), (1,))
    assert edits.paraphrase(CHAIN, ("", "", "Zoe!"), 0, 1) == (CHAIN, (0,))
    assert edits.paraphrase(CHAIN, texts, 3) == (CHAIN, ())
    with pytest.raises(CotfaithError, match="2 paraphrases for the 3 steps of 'p1'"):
        edits.paraphrase(CHAIN, texts[:2], 0)
    with pytest.raises(CotfaithError, match="from 0 to 3"):
        edits.paraphrase(CHAIN, texts, 0, 4)


@pytest.mark.parametrize(
    ("step", "old"),
    [
        ("Ann has 14 + 8 = 22 apples in 2 days.", "22"),
        ("16 - 3 - 4 = 9", "9"),
        ("They get $12.50", "12.50"),
        ("so x = -4", "4"),
        ("A total of 3,000 people", "3,000"),
        ("It is 1/2", "2"),
        ("Water is H2O, 7 l.", "7"),
        ("the 21st of 30", "30"),
        ("2. She adds 5", "5"),
        ("\n22.", "22"),
        ("0.5 litres", "0.5"),
    ],
)
def test_mistake_alters_the_stated_result_and_keeps_its_layout(step, old):
    chain = replace(CHAIN, steps=("First.", step))
    for seed in range(30):
        made = edits.mistake(chain, 1, rng(seed))
        assert made is not None
        assert made.old == old
        assert made.new != old
        assert re.sub(r"\d", "#", made.new) == re.sub(r"\d", "#", old)
        assert made.new[0] != "0" or old[0] == "0"
        assert made.chain.steps[0] == "First."
        prefix = step[: step.rindex(old)]
        assert made.chain.steps[1] == prefix + made.new + step[len(prefix) + len(old) :]


def test_mistake_collides_with_no_number_of_the_chain_the_question_or_avoid():
    chain = replace(CHAIN, prompt="3 4 5 -6\n", steps=("1 + 1 = 2",), answer=" 7")
    assert {edits.mistake(chain, 0, rng(s), {"8"}).new for s in range(20)} == {"9"}
    full = replace(chain, prompt="3 4 5 6 8 9\n")
    assert edits.mistake(full, 0, rng()) is None
    assert edits.mistake(replace(full, steps=("10 is 1 + 1 = 2",)), 0, rng()).old == "10"
    assert edits.mistake(replace(full, steps=("1 + 1 = 2, half of it",)), 0, rng()).old == "half"


@given(step_lists, seeds)
def test_mistake_changes_exactly_one_step_and_keeps_digit_counts(steps, seed):
    chain = replace(CHAIN, steps=tuple(steps))
    for j in range(len(chain.steps)):
        made = edits.mistake(chain, j, rng(seed))
        if made is None:
            assert not [n for n in numbers(chain.steps[j]) if re.search(r"[=$]\s?$", chain.steps[j][: n.start])]
            continue
        changed = [i for i, (a, b) in enumerate(zip(chain.steps, made.chain.steps, strict=True)) if a != b]
        assert changed == [j] == [made.step]
        assert outside(made.chain) == outside(chain)
        if made.old[0].isdigit():
            assert [len(n.text) for n in numbers(chain.steps[j])] == [len(n.text) for n in numbers(made.chain.steps[j])]
            assert Fraction(made.old.replace(",", "")) != Fraction(made.new.replace(",", ""))


@pytest.mark.parametrize(
    ("step", "pattern"),
    [
        (" Half of it is left.", r" (Third|Quarter) of it is left\."),
        ("He ate three.", r"He ate (?!three)[a-z]+\."),
        ("Correct answer - A", r"Correct answer - [B-E]"),
        ("So it was Ann who left.", r"So it was Bob who left\."),
    ],
)
def test_steps_without_a_number_get_another_word_label_or_name(step, pattern):
    chain = replace(CHAIN, steps=(step,), prompt="Ann and Bob met.")
    made = edits.mistake(chain, 0, rng(3))
    assert made is not None
    assert re.fullmatch(pattern, made.chain.steps[0])


def test_nothing_to_alter_is_none_and_no_such_step_is_an_error():
    chain = replace(CHAIN, steps=("and so it goes.",))
    assert edits.mistake(chain, 0, rng()) is None
    assert edits.mistake_all(chain, rng()) is None
    with pytest.raises(CotfaithError, match="has no step 3"):
        edits.mistake(CHAIN, 3, rng())


def test_mistake_all_alters_every_step_that_can_be():
    chain = replace(CHAIN, steps=(*CHAIN.steps, " and so it goes."))
    wrong = edits.mistake_all(chain, rng(1), frozenset({"77"}))
    assert wrong is not None
    assert [a != b for a, b in zip(chain.steps, wrong.steps, strict=True)] == [True, True, True, False]
    results = [numbers(step)[-1].value for step in wrong.steps[:3]]
    assert not set(results) & {n.value for n in numbers(chain.text)} | ({77} & set(results))


@given(step_lists, seeds)
def test_shuffle_permutes_bodies_and_leaves_separators(steps, seed):
    chain = replace(CHAIN, steps=tuple(steps))
    shuffled = edits.shuffle(chain, rng(seed))
    bodies = [s.strip() for s in chain.steps]
    if shuffled is None:
        assert len(set(bodies)) < 2
        return
    assert [s.strip() for s in shuffled.steps] != bodies
    assert Counter(s.strip() for s in shuffled.steps) == Counter(bodies)
    assert [s[: len(s) - len(s.lstrip())] for s in shuffled.steps] == [
        s[: len(s) - len(s.lstrip())] for s in chain.steps
    ]
    assert outside(shuffled) == outside(chain)


def test_shuffle_reaches_every_other_order():
    orders = {edits.shuffle(CHAIN, rng(s)).steps for s in range(60)}
    assert len(orders) == 5
    assert CHAIN.steps not in orders


def test_swap_takes_the_donors_steps_and_keeps_the_edges():
    chain = replace(CHAIN, steps=("A.", " B.\n"))
    donor = Chain("p2", "other", "Else?", (" One.", "\nTwo.", " Three."), " cue", " 9")
    swapped = edits.swap(chain, donor)
    assert swapped.steps == ("One.", "\nTwo.", " Three.\n")
    assert outside(swapped) == outside(chain)


def test_swap_refuses_the_same_problem_and_an_empty_donor():
    with pytest.raises(CotfaithError, match="another problem"):
        edits.swap(CHAIN, CHAIN)
    with pytest.raises(CotfaithError, match="with 0 steps"):
        edits.swap(CHAIN, Chain("p2", "a", "Q", (), "c"))


def test_edits_repeat_with_their_generator():
    assert edits.mistake(CHAIN, 1, rng(4)) == edits.mistake(CHAIN, 1, rng(4))
    assert edits.shuffle(CHAIN, rng(4)) == edits.shuffle(CHAIN, rng(4))
    assert "old='26'" in repr(edits.mistake(CHAIN, 1, rng(4)))


def test_a_mistake_of_the_same_token_count_by_hand():
    chain = replace(CHAIN, prompt="", steps=("7 + 2 = 9 of five",), cue="", answer="")

    def count(text: str) -> int:
        """Every digit but 7, 2, 9 and 4 takes two tokens, a word other than 'five' and 'nine' five more."""
        return len(text) + sum(c in "013568" for c in text) + 5 * (re.search("five|nine", text) is None)

    assert {edits.mistake(chain, 0, rng(s), count_tokens=count).new for s in range(20)} == {"4"}
    full = replace(chain, prompt="4\n")  # no digit is free that takes one token: a word of the same count
    assert {edits.mistake(full, 0, rng(s), count_tokens=count).new for s in range(20)} == {"nine"}
    assert edits.mistake(full, 0, rng(), count_tokens=lambda text: int(text == full.text)) is None


@pytest.mark.parametrize(
    ("step", "altered", "differs"),
    [
        ("It is 22.", "It is 23.", True),
        ("It is 1,000.", "It is 1000.0", False),
        ("So  it rained", "so it RAINED!", False),
        ("He ate half.", "He ate a third.", True),
        ("Take (B).", "Take (C).", True),
        ("x = 4", "x = -4", True),
    ],
)
def test_whether_two_steps_say_different_things(step, altered, differs):
    assert edits.is_altered(step, altered) is differs


CLIPS = Chain(
    "p3", "author", "Natalia sold 48 clips in April and half as many in May.\n",
    ("Natalia sold 48/2 = 24 clips in May, so 24.", " Altogether 48 + 24 = 72 clips.", "\nThe 24 and 48 make 72."), "\nAnswer:", " 72",
)  # fmt: skip


def wrong_clips(new="31", old="24"):
    """48/2 = 31 in the place of 24."""
    start = CLIPS.steps[0].index(old)
    altered = CLIPS.steps[0][:start] + new + CLIPS.steps[0][start + len(old) :]
    return edits.Mistake(replace(CLIPS, steps=(altered, *CLIPS.steps[1:])), 0, start, old, new)


def test_a_mistake_is_carried_on_by_hand():
    chain, values = edits.propagate(wrong_clips())
    assert chain.steps == (
        "Natalia sold 48/2 = 31 clips in May, so 31.", " Altogether 48 + 31 = 79 clips.", "\nThe 31 and 48 make 79.",
    )  # fmt: skip
    assert outside(chain) == outside(CLIPS)
    assert values == {24: 31, 72: 79}
    assert edits.carried_answer(CLIPS.answer, values) == " 79"
    made = edits.mistake(CLIPS, 0, rng(2))
    assert (made.old, made.step, made.start) == ("24", 0, CLIPS.steps[0].index("24"))
    assert edits.propagate(made)[1] == {24: int(made.new), 72: 48 + int(made.new)}


def test_a_mistake_that_cannot_be_carried_on():
    alone = wrong_clips()
    assert edits.propagate(replace(alone, chain=replace(alone.chain, steps=("48/2 = 31", " Yes.")), start=7)) is None
    assert edits.propagate(replace(alone, old="Natalia", new="Bob")) is None
    negative = replace(alone.chain, steps=(alone.chain.steps[0], " 30 - 24 = 6 left."))
    assert edits.propagate(replace(alone, chain=negative)) is None
    thirds = replace(alone.chain, steps=(alone.chain.steps[0], " 24 / 3 = 8 each."))
    assert edits.propagate(replace(alone, chain=thirds)) is None


@pytest.mark.parametrize(
    ("answer", "carried"),
    [
        (" 72", " 79"),
        (" $72.00 in all", " $79.00 in all"),
        (" -72", " -79"),
        (" 24", None),
        (" none", None),
        ("", None),
    ],
)
def test_the_answer_a_changed_chain_comes_to(answer, carried):
    assert edits.carried_answer(answer, {Fraction(72): Fraction(79)}) == carried


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("$1,200 ÷ 4 = $300", [("$1,200 ÷ 4 ", "300")]),
        ("(5 + 3) * 2 = 16", [("(5 + 3) * 2 ", "16")]),
        ("2 x (3 − 1) = 4.0", [("2 x (3 − 1) ", "4.0")]),
        ("3*3=9*60=540", [("3*3", "9"), ("9*60", "540")]),
        ("48/2 = <<48/2=24>>24", [("48/2", "24")]),
        ("**14 + 8 = 22**", [("14 + 8 ", "22")]),
        ("He has 5.\n- 14 + 8 = 22", [("14 + 8 ", "22")]),
        ("2. 14 + 8 = 22", [("14 + 8 ", "22")]),
        ("Add 3, 14 + 8 = 22", [("14 + 8 ", "22")]),
        ("so (14 + 8 = 22)", [("14 + 8 ", "22")]),
        ("tax $14 + $8 = $22", [("$14 + $8 ", "22")]),
        ("5 - 14 = -9", [("5 - 14 ", "9")]),
        ("-5 + 14 = 9", [("-5 + 14 ", "9")]),
        ("14 + 8 = 23", []),
        ("x + 14 + 8 = 22", []),
        ("2 + 14 + 8 = 22", []),
        ("x = 22", []),
        ("8 / 0 = 8", []),
    ],
)
def test_right_calculations_by_hand(text, found):
    assert [(text[c.start : c.equals], c.result.text) for c in calculations(text)] == found
    assert carry_on(text, {}) == (text, {})


@pytest.mark.parametrize(
    ("text", "changed", "carried"),
    [
        ("$1,200 ÷ 4 = $300 and 300", {1200: 1600}, "$1,600 ÷ 4 = $400 and 400"),
        ("(5 + 3) * 2 = 16", {3: 7}, "(5 + 7) * 2 = 24"),
        ("3*3=9*60=540", {3: 5}, "5*5=25*60=1500"),
        ("14 + 8 = 23, then 14", {14: 15}, "15 + 8 = 23, then 15"),
        ("20 + 2 = 22, so 22", {22: 31}, "20 + 2 = 22, so 22"),
        ("- **14 + 8 = 22**", {14: 15}, "- **15 + 8 = 23**"),
        ("5 / 2 = 2.5", {5: 9}, "9 / 2 = 4.5"),
        ("7 - 3 = 4", {3: 7}, "7 - 7 = 0"),
        ("5 - 14 = -9", {5: 6}, "6 - 14 = -8"),
        ("5 - 14 = -9", {5: 20}, None),
        ("10 - 3 = 7", {10: 2}, None),
        ("9 / 3 = 3", {9: 10}, None),
        ("24,5001 of 7", {5001: 500}, None),
        ("7 + 1 = 8", {}, "7 + 1 = 8"),
        ("2. Add 2 to H2O on the 2nd\nStep 2: 3x2 = 6", {2: 4}, "2. Add 4 to H2O on the 2nd\nStep 2: 3x4 = 12"),
        ("#### 2", {2: 4}, "#### 4"),
    ],
)
def test_values_carried_on_by_hand(text, changed, carried):
    found = carry_on(text, {Fraction(a): Fraction(b) for a, b in changed.items()})
    assert (found and found[0]) == carried


def test_values_as_people_write_them():
    assert evaluated("$1,200 ÷ (4 − 1)") == 400
    assert [evaluated(text) for text in ("1 +", "a", "1 // 2", "2 ** 3", "", "9" * 5000)] == [None] * 6
    assert written_like("3,000.00", Fraction(12345, 2)) == "6,172.50"
    assert written_like("7", Fraction(1, 4)) == "0.25"
    assert written_like("7", Fraction(1, 3)) is None
    assert written_like("0.1000000000", Fraction(12345678901201, 100)) == "123456789012.0100000000"


def test_labels_are_renamed_all_at_once():
    swapped = {"A": "B", "B": "C", "C": "A"}
    assert edits.relabel("(A) or b, not (B) or (c). Answer: C", swapped) == "(B) or b, not (C) or (a). Answer: A"
    assert edits.relabel("C) is right", swapped) == "A) is right"
    assert edits.relabel("Hepatitis B, C", swapped) is None
    assert edits.relabel("A train", swapped) == "A train"


@pytest.mark.parametrize(
    ("step", "altered"),
    [
        (
            " it is effective in most of them",
            {" it is ineffective in most of them", " it is effective in least of them"},
        ),
        (" Higher doses", {" Lower doses"}),
        (" nothing else to say", None),
    ],
)
def test_a_step_without_number_or_entity_says_the_opposite(step, altered):
    chain = replace(CHAIN, steps=(step,))
    made = [edits.mistake(chain, 0, rng(seed)) for seed in range(12)]
    assert (made == [None] * 12) if altered is None else ({m.chain.steps[0] for m in made} == altered)
