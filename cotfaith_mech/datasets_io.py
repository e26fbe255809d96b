"""Problems from the built-in generators, from files in their publishers' formats, and from the hub.

1. The source names generator, file or hub data set; a file is JSONL, a JSON list, or PubMedQA's id -> object.
2. The format follows from the content: GSM8K, GSM8K's example model solutions, AQuA-RAT, PubMedQA, the chains.jsonl
   of a run (`cotfaith generate`), plain JSONL.
3. Each row becomes a Problem, or an exclusion with its reason; nothing is dropped silently.
4. Choices are written into the question as 'A) …' lines and the gold answer is the label.
Formats: github.com/openai/grade-school-math, github.com/google-deepmind/AQuA, github.com/pubmedqa/pubmedqa.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from .arithmetic import people_problems, word_problems
from .chains import segment
from .errors import CotfaithError
from .problems import AnswerKind, Problem

CUE = "\nSo the answer is"
Row = dict[str, Any]
_GENERATORS = {"people": people_problems, "arithmetic": word_problems}
_HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?::([\w.-]+))??(?::([\w.-]+))?")
_HALF_PAIR = re.compile("[\ud800-\udfff]")
_NUMBER = re.compile(r"[-+−]?[$€£]?\s?(\d[\d,]*(\.\d+)?|\.\d+)\s?%?")


@dataclass(frozen=True)
class _Entry:
    """One row as found: where it stood, the id it would have, and the object or why there is none."""

    place: str
    problem_id: str
    row: Row | None
    fault: str = ""


def read_problems(
    source: str, limit: int | None = None, seed: int | None = None
) -> tuple[list[Problem], list[dict[str, str]]]:
    """Problems of `source`, and what was left out as `{"problem_id", "row", "reason"}`.

    `source`: 'people:16' or 'arithmetic:24' (built-in generators; 'people:16:7' fixes the seed), a file, or a hub
    name 'owner/name', 'owner/name:split', 'owner/name:config:split' (split 'test' where none is given). `limit` keeps
    that many problems: the first ones, or with a `seed` random ones in file order; rows that were not looked at are
    no exclusions. Raises CotfaithError when the source is not found or no row has a known format.
    """
    if limit is not None and limit < 1:
        raise CotfaithError(f"limit={limit} would leave no problem; give 1 or more, or leave it out.")
    if source.split(":")[0] in _GENERATORS and not Path(source).exists():
        return _generated(source, seed)[:limit], []
    entries = _file_entries(Path(source)) if Path(source).is_file() else _hub_entries(source)
    parse = _detect([entry.row for entry in entries if entry.row is not None], source).parse
    return _collect(entries, parse, Path(source).stem, limit, seed)


def _generated(source: str, seed: int | None) -> list[Problem]:
    match = re.fullmatch(r"(\w+):(\d+)(?::(\d+))?", source)
    if match is None or int(match[2]) < 1:
        raise CotfaithError(f"{source!r} asks for no problems; write it like 'people:16' or 'people:16:7' (with seed).")
    return _GENERATORS[match[1]](int(match[2]), seed=int(match[3] or seed or 0))


def _collect(
    entries: Sequence[_Entry], parse: Parser, source: str, limit: int | None, seed: int | None
) -> tuple[list[Problem], list[dict[str, str]]]:
    order: Iterable[int] = range(len(entries))
    if limit is not None and seed is not None:
        order = np.random.default_rng(seed).permutation(len(entries)).tolist()
    problems: dict[int, Problem] = {}
    faults: dict[int, str] = {}
    ids: set[str] = set()
    for index in order:
        if len(problems) == limit:
            break
        entry = entries[index]
        result = entry.fault if entry.row is None else parse(entry.row, entry.problem_id, source)
        if isinstance(result, Problem) and result.problem_id in ids:
            result = f"the id {result.problem_id!r} stands more than once; ids name the statistical unit"
        if isinstance(result, Problem):
            problems[index] = result
            ids.add(result.problem_id)
        else:
            faults[index] = result
    left_out = [
        {"problem_id": entries[i].problem_id, "row": entries[i].place, "reason": f"{entries[i].place}: {faults[i]}"}
        for i in sorted(faults)
    ]
    return [problems[i] for i in sorted(problems)], left_out


def _file_entries(path: Path) -> list[_Entry]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CotfaithError(f"{path} is not UTF-8 text (byte {error.start}); give JSON or JSONL in UTF-8.") from error
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        whole = None
    if isinstance(whole, dict) and whole and all(isinstance(value, dict) for value in whole.values()):
        return [_Entry(f"id {key}", f"{path.stem}-{key}", _lowered(value)) for key, value in whole.items()]
    if isinstance(whole, dict):
        return [_entry("line 1", f"{path.stem}-1", whole)]
    if isinstance(whole, list):
        return [_entry(f"item {i}", f"{path.stem}-{i}", value) for i, value in enumerate(whole, 1)]
    return _line_entries(text, path)


def _line_entries(text: str, path: Path) -> list[_Entry]:
    entries = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place, problem_id = f"line {number}", f"{path.stem}-{number}"
        try:
            entries.append(_entry(place, problem_id, json.loads(line)))
        except json.JSONDecodeError as error:
            entries.append(_Entry(place, problem_id, None, f"not JSON ({error.msg}, column {error.colno})"))
    if not entries:
        raise CotfaithError(f"{path} is empty; give one JSON object a line.")
    if all(entry.row is None for entry in entries):
        raise CotfaithError(f"{path}, {entries[0].place}: {entries[0].fault}; give one JSON object a line.")
    return entries


def _entry(place: str, problem_id: str, value: Any) -> _Entry:
    if isinstance(value, dict):
        return _Entry(place, problem_id, value)
    return _Entry(place, problem_id, None, f"holds a {type(value).__name__}, not an object")


def _lowered(row: Row) -> Row:
    return {key.lower(): value for key, value in row.items()}


def _hub_entries(source: str) -> list[_Entry]:
    match = _HUB_NAME.fullmatch(source)
    if match is None or source.endswith((".json", ".jsonl")):
        raise CotfaithError(
            f"No file {source!r}; give an existing file, a hub name like 'openai/gsm8k:main:test', "
            "'people:16' or 'arithmetic:24'."
        )
    import datasets

    name, config, split = match[1], match[2], match[3] or "test"
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:
        raise CotfaithError(
            f"The data set {name!r} (configuration {config or 'default'!r}, split {split!r}) could not be had: "
            f"{' '.join(str(error).split())}; check name, configuration and split, or download it and give the file."
        ) from error
    stem = f"{name.split('/')[1]}-{split}"
    return [_Entry(f"row {i}", f"{stem}-{i}", dict(row)) for i, row in enumerate(rows, 1)]


Parser = Callable[[Row, str, str], Problem | str]
"""Row, problem id, source -> Problem, or why the row gives none."""


@dataclass(frozen=True)
class _Format:
    name: str
    keys: tuple[str, ...]
    parse: Parser

    def holds(self, row: Row) -> bool:
        return all(key in row for key in self.keys)


def _detect(rows: Sequence[Row], source: str) -> _Format:
    """The first format that any row has; a question and answer with '####' in any answer is GSM8K."""
    for form in _FORMATS:
        found = [row for row in rows if form.holds(row)]
        if found and (form.parse is not _gsm8k or any("####" in str(row["answer"]) for row in found)):
            return form
    keys = ", ".join(sorted(rows[0])) if rows and rows[0] else "none"
    known = "; ".join(f"{form.name}: {', '.join(form.keys)}" for form in _FORMATS)
    raise CotfaithError(f"{source} has rows of no known format; keys found: {keys}; keys expected: {known}.")


def _gsm8k(row: Row, problem_id: str, source: str) -> Problem | str:
    worked, mark, gold = _text(row, "answer").rpartition("####")
    if not mark:
        return "the answer has no '#### gold' line"
    return _annotated_problem(row, problem_id, source, gold, worked)


def _annotated_problem(row: Row, problem_id: str, source: str, gold: str, worked: str) -> Problem | str:
    """GSM8K's calculator annotations `<<48/2=24>>` are taken out of the chain, thousands separators of the gold."""
    steps = re.sub(r"<<[^<>]*>>", "", worked)
    if "<<" in steps:
        return "an annotation '<<' is never closed"
    return _problem(problem_id, source, _text(row, "question"), gold.replace(",", ""), steps)


def _model_solution(row: Row, problem_id: str, source: str) -> Problem | str:
    """The chain is the model's `solution` without its answer line, right or wrong; the gold is the publisher's."""
    authors = [key for key, value in row.items() if isinstance(value, dict) and "solution" in value]
    if len(authors) != 1:
        return f"expected the solution of one model, found {len(authors)}: {', '.join(authors) or 'none'}"
    mark, gold = _text(row, "ground_truth").rpartition("\nA: ")[1:]
    if not mark:
        return "ground_truth has no 'A: gold' line"
    worked = re.sub(r"\nA: [^\n]*\s*$", "", _text(row[authors[0]], "solution"))
    problem = _annotated_problem(row, problem_id, source, gold, worked)
    return problem if isinstance(problem, str) else replace(problem, author=authors[0])


def _chain_of_run(row: Row, problem_id: str, source: str) -> Problem | str:
    """A line of a run's chains.jsonl: the question holds its choices already; steps are kept character by character."""
    kind, choices, steps, cue = row["kind"], row.get("choices") or [], row["steps"], _text(row, "cue")
    if kind not in get_args(AnswerKind) or not cue or not all(_is_texts(part) for part in (steps, choices)):
        return "no chain as a run writes it: expected kind, cue, and lists of texts under steps and choices"
    named, author = _text(row, "problem_id") or problem_id, _text(row, "author") or "supplied"
    problem = _problem(named, _text(row, "source") or source, _text(row, "question"), _text(row, "gold"), "")
    if isinstance(problem, str):
        return problem
    return replace(problem, kind=kind, choices=tuple(choices), steps=tuple(steps), cue=cue, author=author)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _aqua(row: Row, problem_id: str, source: str) -> Problem | str:
    rationale, correct = _text(row, "rationale"), _text(row, "correct")
    return _problem(problem_id, source, _text(row, "question"), correct, rationale, options=row["options"] or [])


def _pubmedqa(row: Row, problem_id: str, source: str) -> Problem | str:
    """Contexts and question, choices yes, no, maybe; the abstract's conclusion (LONG_ANSWER) is the chain."""
    nested = row.get("context")
    contexts = row.get("contexts", nested.get("contexts", ()) if isinstance(nested, dict) else ())
    asked = _text(row, "question")
    question = "\n".join([*map(str, contexts), asked]) if asked else ""
    gold = _text(row, "final_decision")
    return _problem(problem_id, source, question, gold, _text(row, "long_answer"), options=["yes", "no", "maybe"])


def _plain(row: Row, problem_id: str, source: str) -> Problem | str:
    steps, cue = row.get("steps") or "", row.get("cue") or CUE
    if not isinstance(cue, str) or not cue.strip():
        return f"cue is {cue!r}; expected text such as 'So the answer is'"
    if not isinstance(steps, str) and not _is_texts(steps):
        return "steps is neither a text nor a list of texts"
    if isinstance(steps, list) and not all(step.strip() for step in steps):
        return "a step is blank"
    named = _text(row, "id") or problem_id
    question, answer = _text(row, "question"), _text(row, "answer")
    return _problem(named, source, question, answer, steps, options=row.get("choices"), cue=cue)


_FORMATS = (
    _Format("chains of a run", ("chain_id", "question", "gold", "kind", "steps"), _chain_of_run),
    _Format("GSM8K model solutions", ("question", "ground_truth"), _model_solution),
    _Format("AQuA", ("question", "options", "correct"), _aqua),
    _Format("PubMedQA", ("question", "final_decision"), _pubmedqa),
    _Format("GSM8K", ("question", "answer"), _gsm8k),
    _Format("plain JSONL", ("question", "answer"), _plain),
)


def _problem(
    problem_id: str,
    source: str,
    question: str,
    gold: str,
    steps: str | list[str],
    *,
    options: Any = None,
    cue: str = CUE,
) -> Problem | str:
    """The Problem after the checks that all formats share, or why there is none."""
    question, gold = question.strip(), gold.strip()
    if not question:
        return "the question is missing or empty"
    if not gold:
        return "the answer is missing or empty"
    worked = _tiled(steps)
    if _HALF_PAIR.search("".join((question, gold, cue, *worked))):
        return "the text holds half a surrogate pair, which no tokenizer reads"
    choices: tuple[str, ...] = ()
    if options is not None:
        labelled = _labelled(options, gold)
        if isinstance(labelled, str):
            return labelled
        choices, gold = labelled
        question += "".join(f"\n{label}) {choice}" for label, choice in zip(_LABELS, choices, strict=False))
    kind = "choice" if choices else "number" if _NUMBER.fullmatch(gold) else "text"
    cue = _separated(cue).rstrip()
    return Problem(problem_id, question, gold, source, kind=kind, choices=choices, steps=worked, cue=cue)


_LABELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _labelled(options: Any, gold: str) -> tuple[tuple[str, ...], str] | str:
    """Choices without their 'A)' and the label of `gold` (a label or a choice's text), or what is wrong with them."""
    if not _is_texts(options):
        return "the choices are no list of texts"
    if not 2 <= len(options) <= len(_LABELS):
        return f"{len(options)} choices; expected 2 to {len(_LABELS)}"
    marked = [re.match(r"\s*([A-Z])\)", option) for option in options]
    if any(marked):
        written = [mark[1] if mark else "none" for mark in marked]
        if written != list(_LABELS[: len(options)]):
            return f"the choices are labelled {', '.join(written)}; expected A, B, … in order"
        options = [option.split(")", 1)[1] for option in options]
    choices = tuple(option.strip() for option in options)
    if "" in choices:
        return f"choice {_LABELS[choices.index('')]} is empty"
    if len(set(choices)) < len(choices):
        twice = next(choice for choice in choices if choices.count(choice) > 1)
        return f"the choice {twice!r} stands more than once, so its label is ambiguous"
    labels = _LABELS[: len(choices)]
    if gold in choices:
        return choices, labels[choices.index(gold)]
    if len(gold) == 1 and gold in labels:
        return choices, gold
    return f"the answer {gold!r} is none of the choices {', '.join(labels)}"


def _tiled(steps: str | list[str]) -> tuple[str, ...]:
    """Steps whose separators belong to the step that follows; a text is segmented, a list is kept as listed."""
    if isinstance(steps, str):
        return segment(steps.strip())
    return tuple(_separated(step.rstrip()) if place else step.strip() for place, step in enumerate(steps))


def _separated(piece: str) -> str:
    return piece if piece[:1].isspace() else f"\n{piece}"


def _text(row: Row, key: str) -> str:
    """The text under `key`, finite numbers written out; empty where it is missing or something else."""
    value = row.get(key)
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return ""
    return str(value)
