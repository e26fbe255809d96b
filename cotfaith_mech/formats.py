"""Rows in their publishers' formats, as Problems, and the prompt template of each family of formats.

1. The format follows from the keys and the shape of the rows: the first one of the table that any row has. GSM8K's
   rows and plain ones may stand in one file; '####' in the answer tells them apart, row by row.
2. A row becomes a Problem, or the reason why it gives none. Reasoning, cue and paraphrases of its own go before the
   publisher's worked text, in every format.
3. Choices are listed as 'A) …' lines in the order of their publisher's labels, and the gold answer is the label; yes,
   no and maybe are their own labels and are not listed.
4. The template lays out context, question and choices; a chain of a run holds its whole text already.
Formats: github.com/openai/grade-school-math (and its example model solutions), github.com/google-deepmind/AQuA,
github.com/pubmedqa/pubmedqa, wilburone.github.io/cosmos (Huang et al. 1909.00277), github.com/jind11/MedQA (Jin et al.
2009.13081), allenai.org/data/arc (Clark et al. 1803.05457; so too tau-nlp.org/commonsenseqa and
allenai.org/data/open-book-qa), github.com/hendrycks/test (MMLU, Hendrycks et al. 2009.03300; as in hub rows).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from .answers import UNSIGNED, normalise
from .chains import segment
from .errors import CotfaithError
from .problems import LABELS, AnswerKind, Problem, choice_listing

CUE = "\nSo the answer is"
TEMPLATES = {
    "math": "{question}\nThink step by step.",
    "choice": "{question}\n{choices}\nThink step by step.",
    "passage": "{context}\n{question}\n{choices}\nThink step by step.",
    "abstract": "{context}\n{question}\nThink step by step, then answer yes, no or maybe.",
    "plain": "{question}\n{choices}",
}
Row = dict[str, Any]
YESNO = ("yes", "no", "maybe")
_REASONING = ("steps", "chain", "reasoning")
_FIELDS = ("context", "question", "choices")
_TOKEN = re.compile(r"\{\{|\}\}|\{(\w+)\}")
_NUMBER = re.compile(
    r"[-+−–]?([$€£¥]\s?[-−–]?)?"
    rf"((\d+\s+(?=\d+[/⁄]))?{UNSIGNED}(\s?[/⁄]\s?\d+)?|\d*\s?[¼-¾⅐-⅞])\s?%?"
)


@dataclass(frozen=True)
class Entry:
    """One row as found: where it stood, the id it would have, and the object or why there is none."""

    place: str
    problem_id: str
    row: Row | None
    fault: str = ""


@dataclass(frozen=True)
class Origin:
    """What a row does not say itself: the id it has where it names none, its source, the template of its text."""

    problem_id: str
    source: str
    template: str


Parser = Callable[[Row, Origin], Problem | str]
"""A Problem, or why the row gives none."""


@dataclass(frozen=True)
class Format:
    """A publisher's rows: the keys they have, their family in TEMPLATES, and what else tells them from other rows.

    `own` says whether reasoning of a row's own is looked for; where it is not, `parse` reads everything. It is handed
    None for a key that the row lacks.
    """

    name: str
    keys: tuple[str, ...]
    family: str
    parse: Parser
    mark: Callable[[Row], bool] = lambda row: True
    own: bool = True

    def holds(self, row: Row) -> bool:
        return all(key in row for key in self.keys) and self.mark(row)

    def problem(self, row: Row, origin: Origin) -> Problem | str:
        problem = self.parse(dict.fromkeys(self.keys) | row, origin)
        return _with_own_reasoning(row, problem) if self.own and isinstance(problem, Problem) else problem


def detect(rows: Sequence[Row], source: str) -> Format:
    """The first format that any row has; raises CotfaithError where there is none."""
    for form in _FORMATS:
        if any(form.holds(row) for row in rows):
            return form
    keys = ", ".join(sorted(rows[0])) if rows and rows[0] else "none"
    known = "; ".join(f"{form.name}: {', '.join(form.keys)}" for form in _FORMATS)
    raise CotfaithError(f"{source} has rows of no known format; keys found: {keys}; keys expected: {known}.")


def of_row(form: Format, row: Row) -> Format:
    """The format of `row` in rows of `form`: `form` itself, but GSM8K and plain JSONL are told apart row by row."""
    mixed = _FORMATS[-2:]
    return next((other for other in mixed if other.holds(row)), mixed[-1]) if form in mixed else form


# Templates


def check_template(template: str) -> None:
    """Raise CotfaithError when `template` has no {question} or a field that is not known; '{{' and '}}' are braces."""
    found = _fields(template)
    unknown = sorted(found - set(_FIELDS))
    if unknown:
        raise CotfaithError(
            f"The template has the unknown field {{{unknown[0]}}}; known are {{context}}, {{question}}, {{choices}}. "
            "Write {{ and }} for braces."
        )
    if "question" not in found:
        raise CotfaithError(f"The template {template!r} has no {{question}}; put it where the question belongs.")


def _fields(template: str) -> set[str]:
    return {match[1] for match in _TOKEN.finditer(template) if match[1]}


def _filled(origin: Origin, context: str, question: str, choices: str) -> str:
    """The template with its fields put in; a field that is empty and alone on its line takes the line with it.

    Raises CotfaithError when the template has no place for a context or choices that the problem has.
    """
    template, values = origin.template, {"context": context, "question": question, "choices": choices}
    for name, value in values.items():
        if value and name not in _fields(template):
            raise CotfaithError(
                f"The template {template!r} has no {{{name}}}, but the problem {origin.problem_id!r} has one; "
                f"add {{{name}}}."
            )
        if not value:
            template = re.sub(rf"\n\{{{name}\}}(?=\n|\Z)|\A\{{{name}\}}\n", "", template)
    return _TOKEN.sub(lambda match: values[match[1]] if match[1] else match[0][0], template)


# Rows of each format


def _gsm8k(row: Row, origin: Origin) -> Problem | str:
    worked, _, gold = _text(row, "answer").rpartition("####")
    return _annotated_problem(row, origin, gold, worked)


def _annotated_problem(row: Row, origin: Origin, gold: str, worked: str) -> Problem | str:
    """GSM8K's calculator annotations `<<48/2=24>>` are taken out of the chain, thousands separators of the gold."""
    steps = re.sub(r"<<[^<>]*>>", "", worked)
    if "<<" in steps:
        return "an annotation '<<' is never closed"
    return _problem(origin, _text(row, "question"), gold.replace(",", ""), steps)


def _model_solution(row: Row, origin: Origin) -> Problem | str:
    """The chain is the model's `solution` without its answer line, right or wrong; the gold is the publisher's."""
    authors = [key for key, value in row.items() if isinstance(value, dict) and "solution" in value]
    if len(authors) != 1:
        return f"expected the solution of one model, found {len(authors)}: {', '.join(authors) or 'none'}"
    mark, gold = _text(row, "ground_truth").rpartition("\nA: ")[1:]
    if not mark:
        return "ground_truth has no 'A: gold' line"
    worked = re.sub(r"\nA: [^\n]*\s*$", "", _text(row[authors[0]], "solution"))
    problem = _annotated_problem(row, origin, gold, worked)
    return problem if isinstance(problem, str) else replace(problem, author=authors[0])


def _chain_of_run(row: Row, origin: Origin) -> Problem | str:
    """A line of a run's chains.jsonl: the question is the whole text; it and the steps are kept to the character."""
    kind, choices, steps, cue = row["kind"], row.get("choices") or [], row["steps"], _text(row, "cue")
    if kind not in get_args(AnswerKind) or not cue or not all(_is_texts(part) for part in (steps, choices)):
        return "no chain as a run writes it: expected kind, cue, and lists of texts under steps and choices"
    supplied = row.get("paraphrases")
    paraphrases = _draws(supplied.get("draws", supplied) if isinstance(supplied, dict) else supplied, len(steps))
    if isinstance(paraphrases, str):
        return paraphrases
    named = Origin(_text(row, "problem_id") or origin.problem_id, _text(row, "source") or origin.source, "{question}")
    problem = _problem(named, _text(row, "question"), _text(row, "gold"), "")
    if isinstance(problem, str):
        return problem
    true_step, twin_answer = row.get("true_step"), row.get("twin_answer")
    problem = replace(
        problem,
        question=_text(row, "question"),
        kind=kind,
        choices=tuple(choices),
        steps=tuple(steps),
        author=_text(row, "author") or "supplied",
        cue=cue,
        paraphrases=paraphrases,
        true_step=true_step if _is_index(true_step) and true_step in range(len(steps)) else None,
        twin_answer=twin_answer if isinstance(twin_answer, str) and twin_answer.strip() else None,
    )
    return _misread(problem) or problem


def _misread(problem: Problem) -> str:
    """Why the gold answer is none of its kind; empty where it is one."""
    if problem.kind == "number" and normalise(problem.gold, "number") is None:
        return f"the kind is number, and the gold answer {problem.gold!r} cannot be read as one"
    if problem.kind in ("choice", "yesno") and problem.gold not in problem.labels:
        labels = ", ".join(problem.labels) or "none"
        return f"the kind is {problem.kind}, and the gold answer {problem.gold!r} is none of its labels: {labels}"
    return ""


def _aqua(row: Row, origin: Origin) -> Problem | str:
    rationale, correct = _text(row, "rationale"), _text(row, "correct")
    return _problem(origin, _text(row, "question"), correct, rationale, options=row["options"] or [])


def _pubmedqa(row: Row, origin: Origin) -> Problem | str:
    """Contexts and question, answered by yes, no or maybe; the abstract's conclusion (LONG_ANSWER) is the chain."""
    nested = row.get("context")
    contexts = row.get("contexts", nested.get("contexts", ()) if isinstance(nested, dict) else ())
    question, gold, steps = _text(row, "question"), _text(row, "final_decision"), _text(row, "long_answer")
    if gold.strip().lower() not in ("", *YESNO):
        return f"the answer is {gold!r}; expected {', '.join(YESNO)}"
    if not isinstance(contexts, list | tuple):
        return f"contexts is {str(contexts)[:40]!r}; expected a list of texts"
    return _problem(origin, question, gold, steps, context="\n".join(map(str, contexts)))


def _cosmosqa(row: Row, origin: Origin) -> Problem | str:
    """The label is an index; the test split has -1 in its place."""
    label, options = _text(row, "label"), [_text(row, f"answer{i}") for i in range(4)]
    if label == "-1":
        return "the row has no gold answer: its label is -1"
    if re.fullmatch("[0-3]", label) is None:
        return f"the label is {label!r}; expected 0, 1, 2 or 3"
    if not _text(row, "context").strip():
        return "the context is missing or empty"
    named, context = _named(row, origin), _text(row, "context")
    return _problem(named, _text(row, "question"), "", "", context=context, options=options, index=int(label))


def _medqa(row: Row, origin: Origin) -> Problem | str:
    gold = _text(row, "answer_idx") or _text(row, "answer")
    return _choice(_named(row, origin), _text(row, "question"), row.get("options"), gold)


def _arc(row: Row, origin: Origin) -> Problem | str:
    """The publisher's rows nest stem and choices under `question`, the hub's do not."""
    inner = row["question"] if isinstance(row.get("question"), dict) else row
    question = _text(inner, "stem") or _text(inner, "question") or _text(inner, "question_stem")
    return _choice(_named(row, origin), question, inner.get("choices"), _text(row, "answerKey"))


def _mmlu(row: Row, origin: Origin) -> Problem | str:
    """The answer is an index, even where it equals the text of another choice."""
    gold, index = ("", row["answer"]) if _is_index(row.get("answer")) else (_text(row, "answer"), None)
    return _problem(
        _named(row, origin), _text(row, "question"), gold, "", options=row.get("choices") or [], index=index
    )


def _plain(row: Row, origin: Origin) -> Problem | str:
    """A whole number as the answer is the index of a choice, from 0, where it is none of their texts."""
    options = [row[key] for key in ("choices", "options") if row.get(key) is not None]
    if len(options) > 1 and options[0] != options[1]:
        return "choices and options differ; expected one of them"
    index = row["answer"] if _is_index(row.get("answer")) else None
    listed, question, answer = options[0] if options else None, _text(row, "question"), _text(row, "answer")
    return _problem(_named(row, origin), question, answer, "", options=listed, index=index)


def _sample_of_log(row: Row, origin: Origin) -> Problem | str:
    """A sample as `inspect_logs` hands it over: plain, and the steps are by the log's model."""
    problem = _plain(row, origin)
    return problem if isinstance(problem, str) else replace(problem, author=row["inspect_model"])


def _is_labelled(options: Any) -> bool:
    return isinstance(options, dict) or (isinstance(options, list) and any(isinstance(item, dict) for item in options))


_FORMATS = (
    Format("chains of a run", ("chain_id", "question", "gold", "kind", "steps"), "plain", _chain_of_run, own=False),
    Format("sample of an Inspect log", ("inspect_model", "question", "answer"), "plain", _sample_of_log),
    Format("GSM8K model solutions", ("question", "ground_truth"), "math", _model_solution),
    Format("AQuA", ("question", "options", "correct"), "choice", _aqua),
    Format("PubMedQA", ("question", "final_decision"), "abstract", _pubmedqa),
    Format("CosmosQA", ("context", "question", *(f"answer{i}" for i in range(4)), "label"), "passage", _cosmosqa),
    Format("MedQA", ("question", "options"), "choice", _medqa, lambda row: _is_labelled(row["options"])),
    Format("ARC", ("question", "answerKey"), "choice", _arc, lambda row: isinstance(row["question"], dict)),
    Format("ARC on the hub", ("choices", "answerKey"), "choice", _arc, lambda row: _is_labelled(row["choices"])),
    Format("MMLU", ("question", "subject", "choices", "answer"), "choice", _mmlu, lambda row: _is_index(row["answer"])),
    Format("GSM8K", ("question", "answer"), "math", _gsm8k, lambda row: "####" in _text(row, "answer")),
    Format("plain JSONL", ("question", "answer"), "plain", _plain),
)


# What the formats share


def _problem(
    origin: Origin,
    question: str,
    gold: str,
    steps: str,
    *,
    context: str = "",
    options: Any = None,
    index: int | None = None,
) -> Problem | str:
    """The Problem after the checks that all formats share, or why there is none; `index` is as in `_labelled`."""
    context, question, gold = context.strip(), question.strip(), gold.strip()
    if not question:
        return "the question is missing or empty"
    if not gold and index is None:
        return "the answer is missing or empty"
    worked = _tiled(steps)
    choices: tuple[str, ...] = ()
    if options is not None:
        labelled = _labelled(options, gold, index)
        if isinstance(labelled, str):
            return labelled
        choices, gold = labelled
    text = _filled(origin, context, question, choice_listing(choices))
    kind: AnswerKind = "choice" if choices else "number" if _is_number(gold) else "text"
    if options is None and gold.lower() in YESNO:
        kind, choices, gold = "yesno", YESNO, gold.lower()
    return Problem(origin.problem_id, text, gold, origin.source, kind=kind, choices=choices, steps=worked, cue=CUE)


def _with_own_reasoning(row: Row, problem: Problem) -> Problem | str:
    """The problem with the row's own reasoning, cue and paraphrases where it has them, or what is wrong with them.

    The reasoning stands under `steps` (a list, or one text), or as one text under `chain` or `reasoning`. A text is
    kept as it is, with a cue or a '#### 42' line that it may hold.
    """
    given = [key for key in _REASONING if row.get(key) and str(row[key]).strip()]
    steps, cue = row[given[0]] if given else "", row.get("cue") or CUE
    if len(given) > 1:
        return f"{' and '.join(given)} are given; expected one of steps, chain, reasoning"
    if not isinstance(cue, str) or not cue.strip():
        return f"cue is {cue!r}; expected text such as 'So the answer is'"
    if given and given != ["steps"] and not isinstance(steps, str):
        return f"{given[0]} is no text"
    if not isinstance(steps, str) and not _is_texts(steps):
        return "steps is neither a text nor a list of texts"
    if isinstance(steps, list) and not all(step.strip() for step in steps):
        return "a step is blank"
    paraphrases = _draws(row.get("paraphrases"), len(steps) if isinstance(steps, list) else None)
    if isinstance(paraphrases, str):
        return paraphrases
    if given:
        problem = replace(problem, steps=_tiled(steps), author=row.get("inspect_model", "supplied"))
    return replace(problem, cue=_separated(cue).rstrip(), paraphrases=_fitted(paraphrases, problem.steps))


def _choice(origin: Origin, question: str, options: Any, gold: str) -> Problem | str:
    """A problem whose choices come with labels of their own, letters or numbers; `gold` is a label or a choice's text.

    They stand in the order of their labels: a publisher's A, B, … stay what they are, and 1, 2, … become A, B, ….
    """
    pairs = [(_written(label).strip().upper(), _written(text)) for label, text in _pairs(options)]
    labels = [label for label, _ in pairs]
    if not pairs or not all(re.fullmatch(r"[A-Z]|\d{1,2}", label) for label in labels):
        return f"the choices are labelled {', '.join(map(repr, labels)) or 'not at all'}; expected A, B, … or 1, 2, …"
    if len(set(labels)) < len(labels):
        return f"the labels of the choices are {', '.join(labels)}; expected each once"
    pairs.sort(key=lambda pair: (len(pair[0]), pair[0]))
    labels, texts = [label for label, _ in pairs], [text for _, text in pairs]
    gold = gold.strip()
    if gold.upper() in labels:
        return _problem(origin, question, "", "", options=texts, index=labels.index(gold.upper()))
    if gold and gold not in [text.strip() for text in texts]:
        return f"the answer {gold!r} is none of the choices {', '.join(labels)}"
    return _problem(origin, question, gold, "", options=texts)


def _pairs(options: Any) -> list[tuple[Any, Any]]:
    """Label and text of each choice: [{label|key, text|value}], {text: [...], label: [...]}, or {label: text}.

    A column of the hub has every label in every row; a missing choice is None there.
    """
    if isinstance(options, list):
        rows = [item if isinstance(item, dict) else {} for item in options]
        return [(row.get("label", row.get("key")), row.get("text", row.get("value"))) for row in rows]
    if not isinstance(options, dict):
        return []
    texts, labels = options.get("text"), options.get("label")
    if isinstance(texts, list) and isinstance(labels, list):
        return list(zip(labels, texts, strict=True)) if len(texts) == len(labels) else []
    return [(label, text) for label, text in options.items() if text is not None]


def _labelled(options: Any, gold: str, index: int | None) -> tuple[tuple[str, ...], str] | str:
    """Choices without their 'A)' and the label of the gold one, or what is wrong with them.

    `gold` is a label or a choice's text; where it is neither, or empty, `index` counts the choices from 0.
    """
    if not _is_texts(options):
        return "the choices are no list of texts"
    if not 2 <= len(options) <= len(LABELS):
        return f"{len(options)} choices; expected 2 to {len(LABELS)}"
    marked = [re.match(r"\s*([A-Z])\)", option) for option in options]
    if any(marked):
        written = [mark[1] if mark else "none" for mark in marked]
        if written != list(LABELS[: len(options)]):
            return f"the choices are labelled {', '.join(written)}; expected A, B, … in order"
        options = [option.split(")", 1)[1] for option in options]
    choices = tuple(option.strip() for option in options)
    if "" in choices:
        return f"choice {LABELS[choices.index('')]} is empty"
    if len(set(choices)) < len(choices):
        twice = next(choice for choice in choices if choices.count(choice) > 1)
        return f"the choice {twice!r} stands more than once, so its label is ambiguous"
    labels = LABELS[: len(choices)]
    if gold in choices:
        return choices, labels[choices.index(gold)]
    if len(gold) == 1 and gold in labels:
        return choices, gold
    if index is not None and 0 <= index < len(choices):
        return choices, labels[index]
    return f"the answer {gold or str(index)!r} is none of the choices {', '.join(labels)}"


def _tiled(steps: str | list[str]) -> tuple[str, ...]:
    """Steps whose separators belong to the step that follows; a text is segmented, a list is kept as listed."""
    if isinstance(steps, str):
        return segment(steps.strip())
    return tuple(_separated(step.rstrip()) if place else step.strip() for place, step in enumerate(steps))


def _draws(draws: Any, n_steps: int | None) -> tuple[tuple[str | None, ...], ...] | str:
    """Supplied paraphrases, or what is wrong with them; `n_steps` is None where the steps were not listed."""
    if draws is None or draws == []:
        return ()
    if n_steps is None:
        return "paraphrases are given, but steps is no list; give one step an item"
    if not isinstance(draws, list) or not all(isinstance(draw, list) for draw in draws):
        return "paraphrases is no list of draws, each a list with a text or null a step"
    for place, draw in enumerate(draws, 1):
        if len(draw) != n_steps:
            return f"draw {place} of the paraphrases has {len(draw)} items for {n_steps} steps"
        if not all(text is None or (isinstance(text, str) and text.strip()) for text in draw):
            return f"draw {place} of the paraphrases holds a blank or something that is no text"
    return tuple(tuple(draw) for draw in draws)


def _fitted(draws: tuple[tuple[str | None, ...], ...], steps: tuple[str, ...]) -> tuple[tuple[str | None, ...], ...]:
    """The paraphrases, each with the whitespace in front of its step, so that it fits in its place."""
    leads = [step[: len(step) - len(step.lstrip())] for step in steps]
    return tuple(
        tuple(None if text is None else lead + text.strip() for lead, text in zip(leads, draw, strict=True))
        for draw in draws
    )


def _separated(piece: str) -> str:
    return piece if piece[:1].isspace() else f"\n{piece}"


def _named(row: Row, origin: Origin) -> Origin:
    return replace(origin, problem_id=_text(row, "id") or origin.problem_id)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_number(gold: str) -> bool:
    """Whether the whole text is one number; '5 apples' is a text."""
    return _NUMBER.fullmatch(gold) is not None and normalise(gold, "number") is not None


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _text(row: Row, key: str) -> str:
    """The text under `key`, as in `_written`; empty where it is missing."""
    return _written(row.get(key))


def _written(value: Any) -> str:
    """A text itself, a finite number written out; empty for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return ""
    return str(value)
