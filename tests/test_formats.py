"""Publishers' rows, prompt templates, supplied reasoning and paraphrases, option orders, samples of Inspect logs."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cotfaith_mech.arithmetic import people_problems
from cotfaith_mech.chains import Chain
from cotfaith_mech.datasets_io import read_problems
from cotfaith_mech.errors import CotfaithError
from cotfaith_mech.formats import TEMPLATES
from cotfaith_mech.inspect_logs import log_entries
from cotfaith_mech.problems import Conflict, Problem, choice_listing

THINK = "\nThink step by step."
PLAIN = {"question": "How many legs has a spider?", "answer": 8}
COSMOS = {
    "id": "3Q9S##q1_a1",
    "context": "I left my umbrella on the bus.\nIt rained all evening.",
    "question": "What may have happened to me ?",
    "answer0": "I got wet .",
    "answer1": "I bought a bus .",
    "answer2": "None of the above choices .",
    "answer3": "I sold an umbrella .",
    "label": "0",
}
MEDQA = {
    "question": "Which vitamin does a sailor with bleeding gums lack?",
    "answer": "Vitamin C",
    "options": {"A": "Vitamin A", "B": "Vitamin B12", "C": "Vitamin C", "D": "Vitamin D"},
    "meta_info": "step1",
    "answer_idx": "C",
}
ARC = {
    "id": "Mercury_7",
    "question": {
        "stem": "Which one is a planet?",
        "choices": [{"text": "Sun", "label": "A"}, {"text": "Moon", "label": "B"}, {"text": "Mars", "label": "C"}],
    },
    "answerKey": "C",
}
ARC_HUB = {
    "id": "NYSED_3",
    "question": "Which one is a planet?",
    "choices": {"text": ["Sun", "Moon", "Mars", "Io"], "label": ["1", "2", "3", "4"]},
    "answerKey": "3",
}
MMLU = {
    "question": "How many primes are even?",
    "subject": "number_theory",
    "choices": ["1", "2", "3", "0"],
    "answer": 0,
}
GSM8K = {"question": "What is 1 + 1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}
AQUA = {"question": "1 + 1?", "options": ["A)1", "B)2"], "rationale": "One more than one. Two.", "correct": "B"}
SOLUTION = {"question": "1 + 1?", "ground_truth": "1+1=2\nA: 2", "m": {"solution": "It is 3.\nA: 3"}}
PUBMEDQA = {
    "question": "Is it?",
    "context": {"contexts": ["c1", "c2"]},
    "long_answer": "It is.",
    "final_decision": "yes",
}


@pytest.fixture
def read(tmp_path):
    def read(*rows, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return read_problems(str(path), **options)

    return read


@pytest.fixture
def one(read):
    def one(row, **options):
        (problem,), left_out = read(row, **options)
        assert left_out == []
        return problem

    return one


@pytest.fixture
def reason(read):
    """Why the changed row is left out of a file whose first row is good."""

    def reason(row, change):
        problems, left_out = read(row, row | {"id": "other"} | change)
        assert len(problems) == len(left_out) == 1
        return left_out[0]["reason"]

    return reason


# CosmosQA


@pytest.mark.parametrize(("label", "gold"), [("0", "A"), (0, "A"), ("3", "D"), (1, "B")])
def test_cosmosqa(one, label, gold):
    problem = one(COSMOS | {"label": label})
    assert (problem.gold, problem.kind, problem.problem_id) == (gold, "choice", "3Q9S##q1_a1")
    assert problem.question == (
        "I left my umbrella on the bus.\nIt rained all evening.\nWhat may have happened to me ?\n"
        "A) I got wet .\nB) I bought a bus .\nC) None of the above choices .\nD) I sold an umbrella ." + THINK
    )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"label": -1}, "no gold answer: its label is -1"),
        ({"label": "-1"}, "no gold answer: its label is -1"),
        ({"label": None}, "the label is ''; expected 0, 1, 2 or 3"),
        ({"label": 4}, "the label is '4'"),
        ({"context": " "}, "the context is missing or empty"),
        ({"answer2": None}, "choice C is empty"),
        ({"answer2": "I got wet ."}, "'I got wet .' stands more than once"),
    ],
)
def test_cosmosqa_row_without_problem(reason, change, why):
    assert why in reason(COSMOS, change)


def test_cosmosqa_index_is_no_text_of_a_choice(one):
    options = {f"answer{i}": text for i, text in enumerate("3210")}
    assert one(COSMOS | options | {"label": 1}).gold == "B"


def test_cosmosqa_as_published_in_csv(tmp_path):
    path = tmp_path / "valid.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerows([COSMOS, COSMOS.values(), [], ["short"], (COSMOS | {"id": "other", "label": "1"}).values()])
    problems, left_out = read_problems(str(path))
    assert [problem.gold for problem in problems] == ["A", "B"]
    assert problems[0].question.startswith("I left my umbrella on the bus.\nIt rained all evening.\n")
    assert [row["reason"] for row in left_out] == ["row 3: has 1 fields, and the header has 8"]


def test_csv_without_rows_is_an_error(tmp_path):
    (tmp_path / "x.csv").write_text("question,answer\n")
    with pytest.raises(CotfaithError, match="no row below a header"):
        read_problems(str(tmp_path / "x.csv"))


# MedQA


def test_medqa(one):
    problem = one(MEDQA)
    assert (problem.gold, problem.choices[2]) == ("C", "Vitamin C")
    assert problem.question.endswith("lack?\nA) Vitamin A\nB) Vitamin B12\nC) Vitamin C\nD) Vitamin D" + THINK)


@pytest.mark.parametrize(
    "change",
    [
        {"options": dict(reversed(MEDQA["options"].items()))},
        {"options": [{"key": key, "value": value} for key, value in MEDQA["options"].items()]},
        {"options": MEDQA["options"] | {"E": None}},
        {"answer_idx": "Vitamin C"},
        {"answer_idx": None},
    ],
)
def test_medqa_in_its_other_shapes_is_the_same_problem(one, change):
    assert one(MEDQA | change) == one(MEDQA)


def test_medqa_label_goes_before_a_choice_of_that_text(one):
    blood = {"A": "B", "B": "AB", "C": "O", "D": "A"}
    assert one(MEDQA | {"options": blood, "answer_idx": "A", "answer": "B"}).gold == "A"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"answer_idx": None, "answer": None}, "the answer is missing or empty"),
        ({"answer_idx": "E"}, "the answer 'E' is none of the choices A, B, C, D"),
        ({"options": {"one": "x", "two": "y"}}, "labelled 'ONE', 'TWO'; expected A, B, … or 1, 2, …"),
        ({"options": [{"key": "A", "value": "x"}, {"key": "A", "value": "y"}]}, "the labels of the choices are A, A"),
        ({"options": ["x", {"key": "A", "value": "x"}]}, "the choices are labelled '', 'A'"),
        ({"options": {}}, "labelled not at all"),
        ({"options": {"A": "x", "B": ["y"]}, "answer_idx": "A"}, "choice B is empty"),
    ],
)
def test_medqa_row_without_problem(reason, change, why):
    assert why in reason(MEDQA, change)


# ARC, CommonsenseQA, OpenBookQA


def test_arc_as_published(one):
    problem = one(ARC)
    assert (problem.gold, problem.problem_id) == ("C", "Mercury_7")
    assert problem.question == "Which one is a planet?\nA) Sun\nB) Moon\nC) Mars" + THINK


def test_arc_labels_in_digits_become_letters(one):
    problem = one(ARC_HUB)
    assert (problem.gold, problem.choices) == ("C", ("Sun", "Moon", "Mars", "Io"))
    assert "\nC) Mars\nD) Io" in problem.question


def test_openbookqa_of_the_hub(monkeypatch):
    row = {key: value for key, value in ARC_HUB.items() if key != "question"} | {"question_stem": "Which planet?"}
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [row])
    (problem,), left_out = read_problems("allenai/openbookqa:main:test")
    assert problem.question.startswith("Which planet?\nA) Sun")
    assert (problem.gold, problem.problem_id, left_out) == ("C", "NYSED_3", [])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"answerKey": ""}, "the answer is missing or empty"),
        ({"answerKey": "5"}, "the answer '5' is none of the choices 1, 2, 3, 4"),
        ({"choices": {"text": ["Sun"], "label": ["1", "2"]}}, "labelled not at all"),
        ({"choices": None}, "labelled not at all"),
        ({"question": " "}, "the question is missing or empty"),
    ],
)
def test_arc_row_without_problem(reason, change, why):
    assert why in reason(ARC_HUB, change)


# MMLU, and whole numbers as answers of plain rows


def test_mmlu_answer_is_an_index_even_where_it_is_the_text_of_another_choice(one):
    problem = one(MMLU)
    assert (problem.gold, problem.choices) == ("A", ("1", "2", "3", "0"))
    assert problem.question.endswith("D) 0" + THINK)
    assert one(MMLU | {"answer": 3}).gold == "D"


def test_mmlu_index_out_of_range(reason):
    assert "the answer '4' is none of the choices A, B, C, D" in reason(MMLU, {"answer": 4})


@pytest.mark.parametrize(("choices", "answer", "gold"), [(["six", "eight"], 1, "B"), (["1", "0"], 1, "A")])
def test_plain_whole_number_is_an_index_where_it_is_no_text_of_a_choice(one, choices, answer, gold):
    assert one(PLAIN | {"choices": choices, "answer": answer}).gold == gold


@pytest.mark.parametrize("options", [["pear", "fig"], ["A) pear", "B) fig"]])
@pytest.mark.parametrize("more", [{}, {"steps": ["It is green."]}, {"choices": None}])
def test_plain_options_are_choices(one, options, more):
    row = {"question": "Which?", "answer": "B"} | more
    problem = one(row | {"options": options})
    assert (problem.kind, problem.gold, problem.choices) == ("choice", "B", ("pear", "fig"))
    assert problem.question == "Which?\nA) pear\nB) fig"
    assert problem == one(row | {"choices": options}) == one(row | {"options": options, "choices": options})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"options": "six eight"}, "no list of texts"),
        ({"options": []}, "0 choices"),
        ({"options": ["6", "7"]}, "the answer '8' is none of the choices A, B"),
        ({"options": ["6", "8"], "choices": ["8", "6"]}, "choices and options differ"),
    ],
)
def test_plain_options_that_give_no_problem(reason, change, why):
    assert why in reason(PLAIN, change)


@pytest.mark.parametrize("rows", [(GSM8K, PLAIN), (PLAIN, GSM8K)])
def test_gsm8k_and_plain_rows_in_one_file(read, rows):
    problems, left_out = read(*rows, PLAIN | {"choices": ["6", "8"], "steps": ["Eight."]})
    math, plain = (problems[rows.index(row)] for row in (GSM8K, PLAIN))
    assert left_out == []
    assert (math.gold, math.question, math.steps) == ("2", "What is 1 + 1?" + THINK, ("1+1=2",))
    assert (plain.gold, plain.question) == ("8", "How many legs has a spider?")
    assert (problems[2].gold, problems[2].steps) == ("B", ("Eight.",))
    assert [p.question[:1] for p in read(*rows, template="?{question}")[0]] == ["?", "?"]


def test_a_row_without_answer_among_gsm8k_rows_is_an_exclusion(reason):
    assert "the answer is missing or empty" in reason(GSM8K, {"answer": None})
    assert "the answer is missing or empty" in reason(GSM8K, {"answer": "1+1=2\n####"})


# Templates


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (GSM8K, "What is 1 + 1?" + THINK),
        (PUBMEDQA, "c1\nc2\nIs it?\nThink step by step, then answer yes, no or maybe."),
        (PLAIN, "How many legs has a spider?"),
        (PLAIN | {"choices": ["6", "8"]}, "How many legs has a spider?\nA) 6\nB) 8"),
    ],
)
def test_default_template_of_the_family(one, row, text):
    assert one(row).question == text


def test_own_template(one):
    template = "Read.\n{context}\n\nQ: {question}\n{choices}\nEnd with \\boxed{} or {{x}}.\n"
    text = "Read.\nI left my umbrella on the bus.\nIt rained all evening.\n\nQ: What may have happened to me ?\nA) I got wet ."
    question = one(COSMOS, template=template).question
    assert question.startswith(text)
    assert question.endswith("\nD) I sold an umbrella .\nEnd with \\boxed{} or {x}.\n")


@pytest.mark.parametrize(("answer", "gold"), [("yes", "yes"), ("No", "no"), (" maybe ", "maybe")])
def test_yes_no_and_maybe_are_their_own_labels(one, answer, gold):
    problem = one({"question": "Is it?", "answer": answer})
    assert (problem.kind, problem.gold, problem.labels) == ("yesno", gold, ("yes", "no", "maybe"))
    assert problem.question == "Is it?"
    assert one({"question": "Is it?", "answer": answer, "choices": [answer.strip(), "x"]}).kind == "choice"


def test_a_decision_that_is_none_of_the_three_is_left_out(read):
    _, left_out = read(PUBMEDQA, PUBMEDQA | {"final_decision": "perhaps"})
    assert "'perhaps'; expected yes, no, maybe" in left_out[0]["reason"]


def test_empty_field_takes_its_line_with_it(one):
    problem = one(PLAIN, template="{context}\n{question}\n{choices}\nAnswer, please.\n{choices}")
    assert problem.question == "How many legs has a spider?\nAnswer, please."
    assert one(PLAIN, template="Text: {context}\n{question}").question == "Text: \nHow many legs has a spider?"


@pytest.mark.parametrize("text", ["What is \\frac{1}{2} of {x}?", "Is {choices} {question} {0} {{a}} }{?", "{context}"])
def test_braces_of_the_data_survive(one, text):
    row = PLAIN | {"question": text, "choices": ["\\frac{1}{2}", "{question}"], "answer": "B"}
    listing = "A) \\frac{1}{2}\nB) {question}"
    assert one(row).question == f"{text}\n{listing}"
    assert one(row, template="{choices}\n{question}").question == f"{listing}\n{text}"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("Think.", "has no {question}; put it"),
        ("{{question}}", "has no {question}; put it"),
        ("{question} {answer}", "unknown field {answer}; known are {context}, {question}, {choices}"),
        ("{question} \\frac{1}{2}", "unknown field {1}"),
        ("{context} {question}", "no {choices}, but the problem '3Q9S##q1_a1' has one; add {choices}"),
        ("{question} {choices}", "no {context}, but the problem '3Q9S##q1_a1' has one; add {context}"),
    ],
)
def test_template_that_does_not_suit_is_an_error(read, template, why):
    with pytest.raises(CotfaithError) as caught:
        read(COSMOS, template=template)
    assert why in str(caught.value)


def chain_row(**change):
    chain = Chain("q-7", "A", "<prompt>", ("One two. ", " Three =\n4."), "\nSo it is", " B")
    row = {"question": " Which?\nA) 3\nB) 4\nThink.\n", "gold": "B", "kind": "choice", "choices": ["3", "4"]}
    return chain.to_json() | row | change


def test_chains_of_a_run_and_generators_are_never_templated(one):
    problem = one(chain_row(), template="Q: {question}")
    assert problem.question == " Which?\nA) 3\nB) 4\nThink.\n"
    assert read_problems("people:2", template="Q: {question}") == (people_problems(2, 0), [])
    with pytest.raises(CotfaithError, match="unknown field"):
        read_problems("people:2", template="{question}{task}")


def test_every_family_has_a_template_that_holds_what_it_may_need():
    assert set(TEMPLATES) == {"math", "choice", "passage", "abstract", "plain"}
    assert all("{question}" in template for template in TEMPLATES.values())


# Supplied reasoning


@pytest.mark.parametrize("key", ["steps", "chain", "reasoning"])
def test_reasoning_as_text_under_each_name_is_kept_and_segmented(one, key):
    text = "Four a side. So the answer is two fours.\n4 * 2 = 8.\n#### 8"
    problem = one(PLAIN | {key: text})
    assert problem.steps == ("Four a side.", " So the answer is two fours.", "\n4 * 2 = 8.", "\n#### 8")
    assert "".join(problem.steps) == text


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"steps": ["a"], "chain": "b"}, "steps and chain are given; expected one of steps, chain, reasoning"),
        ({"chain": "a", "reasoning": "b"}, "chain and reasoning are given"),
        ({"chain": ["a"]}, "chain is no text"),
        ({"reasoning": 5}, "reasoning is no text"),
        ({"steps": "a", "paraphrases": [["b"]]}, "steps is no list"),
        ({"paraphrases": [["b"]]}, "steps is no list"),
        (
            {"steps": ["a", "b"], "paraphrases": [["c", "d"], ["e"]]},
            "draw 2 of the paraphrases has 1 items for 2 steps",
        ),
        ({"steps": ["a"], "paraphrases": ["b"]}, "no list of draws"),
        ({"steps": ["a"], "paraphrases": "b"}, "no list of draws"),
        ({"steps": ["a"], "paraphrases": [[" "]]}, "draw 1 of the paraphrases holds a blank"),
        ({"steps": ["a"], "paraphrases": [[3]]}, "something that is no text"),
        ({"steps": ["a"], "paraphrases": [["\ud800"]]}, "half a surrogate pair"),
    ],
)
def test_reasoning_that_gives_no_problem(reason, change, why):
    assert why in reason(PLAIN, change)


PUBLISHED = (GSM8K, SOLUTION, AQUA, PUBMEDQA, COSMOS, MEDQA, ARC, ARC_HUB, MMLU)


@pytest.mark.parametrize("row", PUBLISHED)
@pytest.mark.parametrize("key", ["steps", "chain", "reasoning"])
def test_own_reasoning_goes_before_the_publishers(one, row, key):
    own = replace(one(row), steps=("Mine.", " So it is."), author="supplied", cue="\nSo")
    assert one(row | {key: "Mine. So it is.", "cue": "So "}) == own


@pytest.mark.parametrize("row", PUBLISHED)
def test_own_paraphrases_of_a_published_row(one, row):
    problem = one(row | {"steps": ["Mine.", "So."], "paraphrases": [["My own.", None]]})
    assert (problem.steps, problem.paraphrases) == (("Mine.", "\nSo."), (("My own.", None),))


@pytest.mark.parametrize("row", PUBLISHED)
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"steps": ["a"], "chain": "b"}, "steps and chain are given"),
        ({"reasoning": ["a"]}, "reasoning is no text"),
        ({"steps": ["a", " "]}, "a step is blank"),
        ({"steps": ["a\ud800"]}, "half a surrogate pair"),
        ({"cue": 5}, "cue is 5"),
        ({"paraphrases": [["b"]]}, "steps is no list"),
        ({"steps": ["a"], "paraphrases": [["b", "c"]]}, "draw 1 of the paraphrases has 2 items for 1 steps"),
    ],
)
def test_own_reasoning_of_a_published_row_that_gives_no_problem(reason, row, change, why):
    assert why in reason(row, change)


@pytest.mark.parametrize("row", PUBLISHED)
def test_blank_reasoning_leaves_the_publishers(one, row):
    assert one(row | {"steps": [], "chain": " ", "reasoning": None, "cue": "", "paraphrases": None}) == one(row)


def test_the_publishers_worked_text_is_the_default(one):
    worked = {"2": ("1+1=2",), "B": ("One more than one.", " Two."), "yes": ("It is.",), "A": ()}
    problems = [one(row) for row in (GSM8K, AQUA, PUBMEDQA, MMLU)]
    assert {problem.gold: problem.steps for problem in problems} == worked


def test_a_name_without_reasoning_does_not_count(one):
    assert one(PLAIN | {"steps": None, "chain": "Four.", "reasoning": ""}).steps == ("Four.",)


def test_plain_paraphrases_fit_in_the_place_of_their_steps(one):
    row = {
        "steps": ["Four a side.", "4 * 2 = 8.", "  So eight. "],
        "paraphrases": [["On a side, four. ", None, "Eight."]],
    }
    problem = one(PLAIN | row)
    assert problem.steps == ("Four a side.", "\n4 * 2 = 8.", "  So eight.")
    assert problem.paraphrases == (("On a side, four.", None, "  Eight."),)
    assert one(PLAIN | {"steps": ["Four."]}).paraphrases == ()


@pytest.mark.parametrize(
    "wrap", [lambda d: d, lambda d: {"paraphraser": "rules", "draws": d, "rejected": {"0": "same"}}]
)
def test_paraphrases_of_a_run_are_kept_to_the_character(one, wrap):
    draws = [[" Two one.\n", None], ["One, two.", "\n4."]]
    assert one(chain_row(paraphrases=wrap(draws))).paraphrases == ((" Two one.\n", None), ("One, two.", "\n4."))


def test_damaged_paraphrases_of_a_run_are_an_exclusion(reason):
    assert "draw 1 of the paraphrases has 1 items for 2 steps" in reason(chain_row(), {"paraphrases": [["a"]]})
    assert "no list of draws" in reason(chain_row(), {"paraphrases": {"paraphraser": "rules"}})
    assert "no list of draws" in reason(chain_row(), {"paraphrases": {"draws": "a"}})


# Options in another order


@given(st.data())
def test_reordered(data):
    choices = data.draw(st.lists(st.text(min_size=1), min_size=2, max_size=8, unique=True))
    n = len(choices)
    stem, tail = data.draw(st.text()), data.draw(st.sampled_from(["", THINK]))
    gold = data.draw(st.integers(0, n - 1))
    question = f"{stem}\n{choice_listing(choices)}{tail}"
    assume(question.count(choice_listing(choices)) == 1)
    problem = Problem("p", question, "ABCDEFGH"[gold], "s", kind="choice", choices=tuple(choices))
    order = data.draw(st.permutations(range(n)))
    other = problem.reordered(order)
    assert other is not None
    assert other.choices[other.labels.index(other.gold)] == choices[gold]
    assert [choices.index(choice) for choice in other.choices] == list(order)
    assert other.question == f"{stem}\n{choice_listing(other.choices)}{tail}"
    inverse = [list(order).index(k) for k in range(n)]
    assume(other.question.count(choice_listing(other.choices)) == 1)
    assert other.reordered(inverse) == problem


def test_reordered_by_hand_drops_the_chain():
    conflict = Conflict("v", "q", ("s",), "A", "B")
    problem = Problem("p", "Which?\nA) x\nB) y\nC) z" + THINK, "A", "s", kind="choice", choices=("x", "y", "z"))
    worked = replace(
        problem, steps=("It is A.",), twin_steps=("B.",), twin_answer="B", true_step=0, conflicts=(conflict,),
        paraphrases=(("A it is.",),),
    )  # fmt: skip
    turned = replace(problem, question="Which?\nA) z\nB) x\nC) y" + THINK, choices=("z", "x", "y"), gold="B")
    assert worked.reordered([2, 0, 1]) == turned


@pytest.mark.parametrize(
    "change",
    [
        {"question": "Which?"},
        {"question": "A) x\nB) y\nWhich?\nA) x\nB) y"},
        {"gold": "C"},
        {"kind": "yesno", "gold": "x"},
    ],
)
def test_reordered_is_none_where_it_cannot_be_done(change):
    problem = Problem("p", "Which?\nA) x\nB) y", "A", "s", kind="choice", choices=("x", "y"))
    assert replace(problem, **change).reordered([1, 0]) is None


@pytest.mark.parametrize("order", [[0], [0, 0], [1, 2], [0, 1, 2]])
def test_an_order_that_is_no_permutation_is_an_error(order):
    problem = Problem("p", "Which?\nA) x\nB) y", "A", "s", kind="choice", choices=("x", "y"))
    with pytest.raises(CotfaithError, match="no permutation of the 2 choices"):
        problem.reordered(order)


# Inspect logs: objects shaped as inspect_ai's EvalLog and EvalSample


def message(content):
    parts = [content] if isinstance(content, str) else [part.text for part in content if part.type == "text"]
    return SimpleNamespace(content=content, text="\n".join(parts))


def part(kind, text, **more):
    return SimpleNamespace(type=kind, **{"reasoning" if kind == "reasoning" else "text": text}, **more)


def output(content, error=None):
    choices = [] if content is None else [SimpleNamespace(message=message(content))]
    return SimpleNamespace(choices=choices, completion=choices[0].message.text if choices else "", error=error)


def sample(content="Four a side.\nTwice four.\n\nANSWER: B", **change):
    fields = {
        "id": "spider", "epoch": 1, "input": "Legs of a spider?", "choices": ["six", "eight"], "target": "B",
        "error": None, "output": output(content),
    }  # fmt: skip
    return SimpleNamespace(**fields | change)


def log(*samples):
    return SimpleNamespace(eval=SimpleNamespace(model="mockllm/model"), samples=list(samples))


@pytest.fixture
def read_log(monkeypatch, tmp_path):
    """What `read_problems` makes of a log whose reader gives `samples`."""

    def read_log(*samples, name="log.eval", text=""):
        reader = SimpleNamespace(read_eval_log=lambda path, resolve_attachments: log(*samples))
        monkeypatch.setitem(sys.modules, "inspect_ai.log", reader)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return read_problems(str(tmp_path / name))

    return read_log


def test_sample_of_a_log(read_log):
    (problem,), left_out = read_log(sample())
    assert (problem.problem_id, problem.gold, problem.author) == ("spider", "B", "mockllm/model")
    assert problem.question == "Legs of a spider?\nA) six\nB) eight"
    assert (problem.steps, left_out) == (("Four a side.", "\nTwice four."), [])


def test_log_in_json(read_log):
    text = json.dumps({"version": 2, "status": "success", "eval": {}, "samples": []})
    assert len(read_log(sample(), name="log.json", text=text)[0]) == 1


def test_reasoning_content_is_the_chain_and_the_text_beside_it_is_not(read_log):
    content = [part("reasoning", "I count. Eight.", redacted=False), part("text", "Said aloud.\nANSWER: B")]
    assert read_log(sample(content))[0][0].steps == ("I count.", " Eight.")


@pytest.mark.parametrize(
    ("completion", "steps"),
    [
        ("Answer: unclear yet.\nTwice four.\n**Final answer:** 8\nBye.", ("Answer: unclear yet.", "\nTwice four.")),
        ("Twice four.\n#### 8", ("Twice four.",)),
        ("The answer is twice four.", ("The answer is twice four.",)),
        ("ANSWER: B", ()),
    ],
)
def test_completion_up_to_its_last_answer_line_is_the_chain(read_log, completion, steps):
    assert read_log(sample(completion))[0][0].steps == steps


def test_messages_as_input_and_several_accepted_targets(read_log):
    asked = [message("Be brief."), message([part("text", "1 + 1?")])]
    (problem,), _ = read_log(sample(input=asked, choices=None, target=["2", "two"], id=7))
    assert (problem.question, problem.gold, problem.kind) == ("Be brief.\n1 + 1?", "2", "number")
    assert problem.problem_id == "7"


def test_target_is_a_label_before_it_is_a_text(read_log):
    (problem,), _ = read_log(sample(choices=["B", "A"], target=["A"]))
    assert (problem.choices, problem.gold) == (("B", "A"), "A")


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (sample(epoch=2), "later epoch"),
        (sample(error=SimpleNamespace(message="boom")), "ended in an error: boom"),
        (sample(output=output("x", error="refused")), "the model's output is an error: refused"),
        (sample(invalidation=SimpleNamespace(reason="leak")), "marked as invalid"),
        (sample(None), "no output"),
        (sample(" "), "no output"),
        (sample([part("reasoning", "gAAA", redacted=True), part("text", "8")]), "reasoning is redacted"),
        (sample(input=[message([part("image", "")])]), "no text"),
        (sample(target=["A", "B"]), "2 choices are right"),
        (sample(target=""), "answer is missing"),
        (sample(target="C"), "'C' is none of the choices"),
    ],
)
def test_sample_without_problem_is_an_exclusion(read_log, other, why):
    problems, left_out = read_log(sample(id="good"), other)
    assert [problem.problem_id for problem in problems] == ["good"]
    assert why in left_out[0]["reason"]
    assert left_out[0]["row"] == f"sample spider, epoch {other.epoch}"


def test_log_without_any_answered_sample_is_an_error(read_log):
    with pytest.raises(CotfaithError, match="it holds no sample"):
        read_log()
    with pytest.raises(CotfaithError, match="the model gave no output"):
        read_log(sample(None))
    assert log_entries(SimpleNamespace(eval=SimpleNamespace(model="m"), samples=None)) == []


def test_log_that_cannot_be_read_is_an_error(monkeypatch, tmp_path):
    path = tmp_path / "log.eval"
    path.write_bytes(b"cut")

    def read_eval_log(path, resolve_attachments):
        raise ValueError("File is not\na zip file")

    monkeypatch.setitem(sys.modules, "inspect_ai.log", SimpleNamespace(read_eval_log=read_eval_log))
    with pytest.raises(CotfaithError, match=r"cannot read .*log\.eval: File is not a zip file; give"):
        read_problems(str(path))
    monkeypatch.setitem(sys.modules, "inspect_ai.log", None)
    with pytest.raises(CotfaithError, match=r"pip install 'cotfaith-mech\[inspect\]'"):
        read_problems(str(path))
