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
from cotfaith_mech.chains import Chain
from cotfaith_mech.errors import CotfaithError
from cotfaith_mech.paraphrase import Paraphrase, rephrase

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


def test_one_filler_a_step_and_deletion_by_hand():
    chain = replace(CHAIN, steps=("One.", " Two.", "\nThree. "))
    assert edits.filler_once(chain, 1).steps == ("One.", " ...", "\n... ")
    assert edits.filler_once(chain, 0, " _", end=1).steps == ("_", " Two.", "\nThree. ")
    assert [edits.delete(chain, i).steps for i in range(3)] == [
        (" Two.", "\nThree. "),
        ("One.", "\nThree. "),
        ("One.", " Two."),
    ]
    with pytest.raises(CotfaithError, match="visible character"):
        edits.filler_once(chain, 0, " ")
    with pytest.raises(CotfaithError, match="has 3; give a number from 0 to 3"):
        edits.delete(chain, 3)


def test_paraphrase_of_one_step_alone():
    one, unchanged = edits.paraphrase_from(CHAIN, 1, rng(), rephrase, end=2)
    assert unchanged == 0
    assert [a == b for a, b in zip(one.steps, CHAIN.steps, strict=True)] == [True, False, True]


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


def test_paraphrase_from_touches_only_later_steps_and_counts_what_stayed():
    def shout(step, _):
        return Paraphrase(None, ("no",)) if "Bob" in step else Paraphrase(step.upper())

    chain, unchanged = edits.paraphrase_from(CHAIN, 1, rng(), shout)
    assert chain.steps == (CHAIN.steps[0], CHAIN.steps[1], CHAIN.steps[2].upper())
    assert unchanged == 1
    assert edits.paraphrase_from(CHAIN, 3, rng(), shout) == (CHAIN, 0)
    real, unchanged = edits.paraphrase_from(CHAIN, 0, rng(), rephrase)
    assert unchanged == 0
    assert all(a != b for a, b in zip(real.steps, CHAIN.steps, strict=True))


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
