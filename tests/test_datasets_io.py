from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest

from cotfaith_mech.arithmetic import people_problems, word_problems
from cotfaith_mech.chains import Chain
from cotfaith_mech.datasets_io import read_problems
from cotfaith_mech.errors import CotfaithError
from cotfaith_mech.formats import CUE

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
PLAIN = {"question": "How many legs has a spider?", "answer": 8}


def published(name):
    if not DATA.is_dir():
        pytest.skip(f"the public data sets are not at {DATA}")
    return str(DATA / name)


@cache
def published_problems(name):
    return read_problems(published(name))


@pytest.fixture
def written(tmp_path):
    def write(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
        return str(path)

    return write


def only(source):
    """The one problem of a source that has no exclusion."""
    (problem,), left_out = read_problems(source)
    assert left_out == []
    return problem


def reason(written, row):
    """Why `row` is left out of a file whose other row is good."""
    problems, left_out = read_problems(written(PLAIN, row))
    assert len(problems) == len(left_out) == 1
    assert left_out[0]["row"] == "line 2"
    assert left_out[0]["problem_id"] == "rows-2"
    return left_out[0]["reason"]


# Publishers' formats


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "n_problems", "n_left_out", "kind"),
    [
        ("gsm8k_train.jsonl", 7473, 0, "number"),
        ("gsm8k_test_a.jsonl", 660, 0, "number"),
        ("gsm8k_model_solutions_6b.jsonl", 658, 2, "number"),
        ("aqua_dev.jsonl", 253, 1, "choice"),
        ("pubmedqa_a.json", 500, 0, "yesno"),
    ],
)
def test_every_published_row_is_a_problem_or_an_exclusion(name, n_problems, n_left_out, kind):
    problems, left_out = published_problems(name)
    assert (len(problems), len(left_out)) == (n_problems, n_left_out)
    assert {problem.kind for problem in problems} == {kind}
    assert len({problem.problem_id for problem in problems}) == n_problems
    assert not any("<<" in step or "####" in step for problem in problems for step in problem.steps)
    assert all(problem.steps for problem in problems)


@pytest.mark.data
def test_gsm8k_by_hand():
    problems, _ = published_problems("gsm8k_train.jsonl")
    clips = problems[0]
    assert clips.question.startswith("Natalia sold clips to 48 of her friends")
    assert clips.question.endswith("altogether in April and May?\nThink step by step.")
    assert clips.steps == (
        "Natalia sold 48/2 = 24 clips in May.",
        "\nNatalia sold 48+24 = 72 clips altogether in April and May.",
    )
    assert (clips.gold, clips.cue, clips.problem_id) == ("72", "\nSo the answer is", "gsm8k_train-1")
    assert not any("," in problem.gold for problem in problems)
    assert sum(problem.gold == "1080" for problem in problems) > 0


@pytest.mark.data
def test_gsm8k_chain_is_the_answer_field_without_annotations():
    """Oracle: taking annotations out bracket by bracket gives the same text as the steps joined."""
    rows = [json.loads(line) for line in Path(published("gsm8k_test_a.jsonl")).read_text(encoding="utf-8").splitlines()]
    problems, _ = published_problems("gsm8k_test_a.jsonl")
    for row, problem in zip(rows, problems, strict=True):
        pieces = row["answer"].split("####")[0].strip().split("<<")
        assert "".join(problem.steps) == "".join([pieces[0], *(piece.split(">>", 1)[1] for piece in pieces[1:])])


@pytest.mark.data
def test_model_solutions_keep_the_models_chain_and_the_publishers_gold():
    problems, left_out = published_problems("gsm8k_model_solutions_6b.jsonl")
    ducks = problems[0]
    assert (ducks.gold, ducks.author) == ("18", "6b_finetuning")
    assert ducks.steps[-1] == "\nShe has 13 ducks eggs and she sells 2 each day so she makes 13 * 2 = $26"
    assert not any(step.strip().startswith("A: ") for problem in problems for step in problem.steps)
    assert [row["row"] for row in left_out] == ["line 151", "line 154"]
    assert all("never closed" in row["reason"] for row in left_out)


@pytest.mark.data
def test_aqua_by_hand():
    problems, left_out = published_problems("aqua_dev.jsonl")
    ship = problems[1]
    assert ship.choices == ("100 m", "150 m", "200 m", "250 m", "300 m")
    assert ship.gold == "D"
    assert ship.question.endswith(
        "What is its length?\nA) 100 m\nB) 150 m\nC) 200 m\nD) 250 m\nE) 300 m\nThink step by step."
    )
    assert left_out[0]["row"] == "line 93"
    assert "'Rs 7925' stands more than once" in left_out[0]["reason"]


@pytest.mark.data
def test_pubmedqa_by_hand():
    problems, _ = published_problems("pubmedqa_a.json")
    golds = [problem.gold for problem in problems]
    assert [golds.count(word) for word in ("yes", "no", "maybe")] == [265, 172, 63]
    flight = next(problem for problem in problems if problem.problem_id.endswith("-10135926"))
    assert flight.labels == ("yes", "no", "maybe")
    assert flight.question.startswith("Patients transported by helicopter often require")
    assert flight.question.endswith("helicopter environment?\nThink step by step, then answer yes, no or maybe.")


# Generators


def chain_row(**change):
    chain = Chain("q-7", "A", "<prompt>", ("One two. ", " Three =\n4."), "\nSo it is", " B")
    question = "Which?\nA) 3\nB) 4"
    row = {"question": question, "gold": "B", "kind": "choice", "choices": ["3", "4"], "source": "aqua"}
    return chain.to_json() | row | change


def test_chains_of_a_run_come_back_as_they_were_written(written):
    problem = only(written(chain_row()))
    assert (problem.problem_id, problem.question, problem.gold) == ("q-7", "Which?\nA) 3\nB) 4", "B")
    assert (problem.steps, problem.author, problem.cue) == (("One two. ", " Three =\n4."), "A", "\nSo it is")
    assert (problem.kind, problem.labels) == ("choice", ("A", "B"))


@pytest.mark.parametrize("change", [{"kind": "tree"}, {"cue": ""}, {"steps": "One."}, {"choices": [3]}])
def test_a_damaged_chain_of_a_run_is_an_exclusion(written, change):
    problems, left_out = read_problems(written(chain_row(), chain_row(**change)))
    assert len(problems) == 1
    assert "no chain as a run writes it" in left_out[0]["reason"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"gold": "C"}, "the kind is choice, and the gold answer 'C' is none of its labels: A, B"),
        ({"gold": "4"}, "'4' is none of its labels"),
        ({"choices": None}, "'B' is none of its labels: none"),
        ({"kind": "yesno", "choices": ["yes", "no", "maybe"]}, "'B' is none of its labels: yes, no, maybe"),
        ({"kind": "number", "choices": []}, "the kind is number, and the gold answer 'B' cannot be read as one"),
        ({"kind": "number", "gold": "10:30"}, "'10:30' cannot be read as one"),
    ],
)
def test_gold_of_a_run_that_is_none_of_its_kind_is_an_exclusion(written, change, why):
    problems, left_out = read_problems(written(chain_row(), chain_row(**{"problem_id": "other"} | change)))
    assert len(problems) == 1
    assert why in left_out[0]["reason"]


@pytest.mark.parametrize(("kind", "gold"), [("number", "-2 1/4"), ("number", "$5"), ("text", "Paris"), ("yesno", "no")])
def test_gold_of_a_run_in_each_kind(written, kind, gold):
    choices = ["yes", "no", "maybe"] if kind == "yesno" else []
    problem = only(written(chain_row(kind=kind, gold=gold, choices=choices)))
    assert (problem.kind, problem.gold, problem.choices) == (kind, gold, tuple(choices))


@pytest.mark.parametrize("missing", ["kind", "steps", "cue"])
def test_another_row_among_chains_of_a_run_is_an_exclusion(written, missing):
    row = {key: value for key, value in chain_row(problem_id="other").items() if key != missing}
    problems, left_out = read_problems(written(chain_row(), row))
    assert len(problems) == 1
    assert "no chain as a run writes it" in left_out[0]["reason"]


@pytest.mark.parametrize(
    ("true_step", "twin_answer", "kept"),
    [
        (1, "A", (1, "A")),
        (0, " 7", (0, " 7")),
        (None, None, (None, None)),
        (2, "", (None, None)),
        (-1, 3, (None, None)),
        (True, " ", (None, None)),
        ("1", ["A"], (None, None)),
    ],
)
def test_true_step_and_twin_answer_of_a_run_come_back_where_they_are_valid(written, true_step, twin_answer, kept):
    problem = only(written(chain_row(true_step=true_step, twin_answer=twin_answer)))
    assert (problem.true_step, problem.twin_answer) == kept


def test_generators_by_name():
    assert read_problems("people:3") == (people_problems(3, 0), [])
    assert read_problems("people:3", seed=5) == (people_problems(3, 5), [])
    assert read_problems("people:3:7", seed=5) == (people_problems(3, 7), [])
    assert read_problems("arithmetic:4", limit=2) == (word_problems(4, 0)[:2], [])


@pytest.mark.parametrize("source", ["people", "people:", "people:0", "arithmetic:many", "people:3:x"])
def test_generator_names_are_checked(source):
    with pytest.raises(CotfaithError, match=r"write it like 'people:16'"):
        read_problems(source)


# Plain JSONL


def test_plain_row_in_full(written):
    row = PLAIN | {"id": "spider", "steps": ["Four a side. ", "4 * 2 = 8."], "cue": "So it has "}
    problem = only(written(row))
    assert problem.problem_id == "spider"
    assert problem.steps == ("Four a side.", "\n4 * 2 = 8.")
    assert (problem.cue, problem.gold, problem.kind) == ("\nSo it has", "8", "number")


def test_plain_steps_as_text_are_segmented_and_tile(written):
    problem = only(written(PLAIN | {"steps": " Four a side.  Two sides.\nSo 4 * 2 = 8.\n"}))
    assert problem.steps == ("Four a side.", "  Two sides.", "\nSo 4 * 2 = 8.")
    assert problem.cue == CUE


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        *((number, "number") for number in ("$1,000.50", "-3", 2.5, "3/4", "1 1/2", "½", "1½", "-2 1/4", "1,250.50")),
        *((number, "number") for number in ("$12.50", "50%", "-$5", "$-5", "−4", ".5", "1⁄2", "1,000/3", "£ 5")),
        *((text, "text") for text in ("12 apples", "Paris", "1e3", "Room 5", "10:30", "1 2", "2-3", "- 5", "1/0")),
        *((text, "text") for text in ("1,25", "1,25/3", "1/2/3", "1 1 / 2", "2020-01-01", "$", "9" * 5000)),
    ],
)
def test_kind_follows_from_the_answer(written, answer, kind):
    assert only(written(PLAIN | {"answer": answer})).kind == kind


@pytest.mark.parametrize(
    ("choices", "answer", "label"),
    [
        (["A)six", "B) eight"], "B", "B"),
        (["six", "eight"], "eight", "B"),
        (["B", "A"], "A", "B"),
    ],
)
def test_choices(written, choices, answer, label):
    problem = only(written(PLAIN | {"choices": choices, "answer": answer}))
    assert (problem.kind, problem.gold) == ("choice", label)
    assert problem.choices == tuple(choice.split(")")[-1].strip() for choice in choices)
    assert f"\nB) {problem.choices[1]}" in problem.question


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"question": "  "}, "question is missing or empty"),
        ({"question": None}, "question is missing or empty"),
        ({"answer": ""}, "answer is missing or empty"),
        ({"answer": True}, "answer is missing or empty"),
        ({"answer": float("nan")}, "answer is missing or empty"),
        ({"steps": 5}, "steps is neither a text nor a list of texts"),
        ({"steps": ["one", " "]}, "a step is blank"),
        ({"cue": " "}, "cue is ' '"),
        ({"question": "half \ud800"}, "half a surrogate pair"),
        ({"choices": ["six"]}, "1 choices; expected 2 to 26"),
        ({"choices": []}, "0 choices"),
        ({"choices": "six eight"}, "no list of texts"),
        ({"choices": ["six", "eight"]}, "the answer '8' is none of the choices A, B"),
        ({"choices": ["six", "six"], "answer": "A"}, "'six' stands more than once"),
        ({"choices": ["A) six", "C) eight"], "answer": "A"}, "labelled A, C; expected A, B"),
        ({"choices": ["A) six", "eight"], "answer": "A"}, "labelled A, none"),
        ({"choices": ["A) ", "B) eight"], "answer": "B"}, "choice A is empty"),
        ({"choices": ["six", "eight"], "answer": "C"}, "the answer 'C' is none of the choices"),
    ],
)
def test_bad_row_is_an_exclusion_with_its_reason(written, change, why):
    assert why in reason(written, PLAIN | change)


def test_unreadable_line_among_good_ones_is_an_exclusion(written):
    assert reason(written, '{"question": "cut').startswith("line 2: not JSON (")
    assert "holds a list, not an object" in reason(written, "[1, 2]")


def test_line_numbers_count_blank_lines_and_line_separators_in_texts(written):
    problems, left_out = read_problems(
        written(PLAIN | {"question": "a b"}, "", "oops", json.dumps(PLAIN, ensure_ascii=False))
    )
    assert [problem.problem_id for problem in problems] == ["rows-1", "rows-4"]
    assert left_out[0]["row"] == "line 3"


def test_repeated_id_is_an_exclusion(written):
    problems, left_out = read_problems(written(PLAIN | {"id": "x"}, PLAIN | {"id": "y"}, PLAIN | {"id": "x"}))
    assert [problem.problem_id for problem in problems] == ["x", "y"]
    assert "the id 'x' stands more than once" in left_out[0]["reason"]


def test_row_without_gold_line_among_gsm8k_rows_is_plain(written):
    source = written({"question": "q?", "answer": "1+1=<<1+1=2>>2\n#### 2"}, {"question": "q2?", "answer": "two"})
    problems, left_out = read_problems(source)
    assert [(problem.steps, problem.gold) for problem in problems] == [(("1+1=2",), "2"), ((), "two")]
    assert left_out == []


def test_angle_brackets_in_plain_steps_are_no_annotation(written):
    assert only(written(PLAIN | {"steps": ["1 << 3 = 8."]})).steps == ("1 << 3 = 8.",)


def test_aqua_row_without_options_is_an_exclusion(written):
    good = {"question": "q?", "options": ["A)1", "B)2"], "rationale": "r", "correct": "B"}
    problems, left_out = read_problems(written(good, good | {"options": None}))
    assert problems[0].gold == "B"
    assert "0 choices" in left_out[0]["reason"]
    assert "0 choices" in read_problems(written(good, {"question": "q?", "correct": "B"}))[1][0]["reason"]


def test_json_list(written):
    problems, left_out = read_problems(written(json.dumps([PLAIN, 3, PLAIN], indent=1), name="rows.json"))
    assert [problem.problem_id for problem in problems] == ["rows-1", "rows-3"]
    assert left_out[0]["row"] == "item 2"


# Files that are no data set


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a poem\nof two lines", r"rows.jsonl, line 1: not JSON .*give one JSON object a line"),
        ("\n\n[1", r"line 3: not JSON"),
        ("", r"is empty; give one JSON object a line"),
        (
            '{"prompt": "x", "label": 3}',
            r"no known format; keys found: label, prompt; keys expected: .*plain JSONL: question, answer",
        ),
        ("[1, 2]", r"keys found: none"),
    ],
)
def test_file_without_problems_is_an_error(written, text, why):
    with pytest.raises(CotfaithError, match=why):
        read_problems(written(text))


def test_bytes_are_an_error(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"question": "\xff"}')
    with pytest.raises(CotfaithError, match="not UTF-8 text \\(byte 14\\)"):
        read_problems(str(path))


@pytest.mark.parametrize("source", ["missing.jsonl", "folder/missing.jsonl", "./a/b/c", "gsm8k"])
def test_missing_file_is_an_error(source):
    with pytest.raises(CotfaithError, match=r"No file .*hub name like 'openai/gsm8k:main:test'"):
        read_problems(source)


# Limit and seed


def test_limit_keeps_the_first_or_a_seeded_sample_in_file_order(written):
    source = written(*(PLAIN | {"id": f"p{i:02}"} for i in range(30)))
    first = [p.problem_id for p in read_problems(source, limit=7)[0]]
    drawn = [p.problem_id for p in read_problems(source, limit=7, seed=1)[0]]
    assert first == [f"p{i:02}" for i in range(7)]
    assert drawn == sorted(drawn) != first
    assert drawn == [p.problem_id for p in read_problems(source, limit=7, seed=1)[0]]
    assert len(read_problems(source, seed=1)[0]) == 30
    with pytest.raises(CotfaithError, match="limit=0"):
        read_problems(source, limit=0)


def test_limit_counts_problems_not_rows(written):
    problems, left_out = read_problems(written("oops", PLAIN, PLAIN, "oops"), limit=2)
    assert (len(problems), len(left_out)) == (2, 1)


# The hub, without a network


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("openai/gsm8k:main:train", ("openai/gsm8k", "main", "train")),
        ("qiaojin/PubMedQA:train", ("qiaojin/PubMedQA", None, "train")),
        ("deepmind/aqua_rat", ("deepmind/aqua_rat", None, "test")),
    ],
)
def test_hub_name_configuration_and_split(monkeypatch, source, asked):
    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        return [{"question": "q?", "answer": "1+1=<<1+1=2>>2\n#### 2"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    problem = only(source)
    assert calls == [asked]
    assert problem.problem_id == f"{asked[0].split('/')[1]}-{asked[2]}-1"
    assert problem.gold == "2"


def test_hub_layout_of_pubmedqa(monkeypatch):
    row = {
        "question": "Is it?",
        "context": {"contexts": ["c1", "c2"]},
        "long_answer": "It is.",
        "final_decision": "yes",
    }
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [row])
    problem = only("qiaojin/PubMedQA:pqa_labeled:train")
    assert problem.question == "c1\nc2\nIs it?\nThink step by step, then answer yes, no or maybe."
    assert (problem.gold, problem.kind, problem.steps) == ("yes", "yesno", ("It is.",))


@pytest.mark.parametrize("failure", [ConnectionError("Couldn't reach\nthe hub"), ValueError("Config name is missing")])
def test_hub_out_of_reach_is_one_sentence(monkeypatch, failure):
    def load_dataset(*_, **__):
        raise failure

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(CotfaithError, match=r"'openai/gsm8k' \(configuration 'main', split 'test'\)") as caught:
        read_problems("openai/gsm8k:main:test")
    assert "\n" not in str(caught.value)
