"""Problems from the built-in generators, from files in their publishers' formats, from Inspect logs and from the hub.

1. The source names generator, file or hub data set; a file is JSONL, a JSON list, PubMedQA's id -> object, CSV with
   a header (CosmosQA), or a log of Inspect (.eval, or its .json).
2. `formats` finds the format from the rows and makes a Problem of each, laid out by a prompt template.
3. Each row becomes a Problem, or an exclusion with its reason; nothing is dropped silently.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from .arithmetic import copy_problems, people_problems, word_problems
from .errors import CotfaithError
from .formats import TEMPLATES, Entry, Format, Origin, Row, check_template, detect, of_row
from .inspect_logs import is_log, read_log
from .organisms.rules import organism_problems
from .problems import HALF_PAIR, Problem

_GENERATORS = {"people": people_problems, "arithmetic": word_problems, "copy": copy_problems}
_HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?::([\w.-]+))??(?::([\w.-]+))?")


def read_problems(
    source: str, limit: int | None = None, seed: int | None = None, template: str | None = None
) -> tuple[list[Problem], list[dict[str, str]]]:
    """Problems of `source`, and what was left out as `{"problem_id", "row", "reason"}`.

    `source`: 'people:16', 'arithmetic:24' or 'organism:mix_050:16' (built-in generators; 'people:16:7' fixes the
    seed), a file, or a hub name 'owner/name', 'owner/name:split', 'owner/name:config:split' (split 'test' where none is
    given). `limit` keeps that many problems: the first ones, or with a `seed` random ones in file order; rows that were
    not looked at are no exclusions. `template` lays out the question from {context}, {question} and {choices} in place
    of the format's own (`formats.TEMPLATES`); generators and chains of a run come with their whole text and take none.
    Raises CotfaithError when the source is not found, no row has a known format, or the template does not suit.
    """
    if limit is not None and limit < 1:
        raise CotfaithError(f"limit={limit} would leave no problem; give 1 or more, or leave it out.")
    if template is not None:
        check_template(template)
    if source.split(":")[0] in (*_GENERATORS, "organism") and not Path(source).exists():
        return _generated(source, seed)[:limit], []
    path = Path(os.path.expanduser(source))
    entries = _file_entries(path) if path.is_file() else _hub_entries(source)
    form = detect([entry.row for entry in entries if entry.row is not None], source)
    return _collect(entries, form, Path(source).stem, template, limit, seed)


def _generated(source: str, seed: int | None) -> list[Problem]:
    if source.startswith("organism:"):
        match = re.fullmatch(r"organism:([\w-]+):(\d+)(?::(\d+))?(?::(\d+))?", source)
        if match is None or int(match[2]) < 1:
            raise CotfaithError(
                f"{source!r} asks for no problems; write it like 'organism:mix_050:16', 'organism:mix_050:16:7' (with "
                "seed) or 'organism:mix_050:16:7:4' (with 4 steps)."
            )
        return organism_problems(
            match[1], int(match[2]), int(match[3] or seed or 0), None if match[4] is None else int(match[4])
        )
    match = re.fullmatch(r"(\w+):(\d+)(?::(\d+))?", source)
    if match is None or int(match[2]) < 1:
        raise CotfaithError(f"{source!r} asks for no problems; write it like 'people:16' or 'people:16:7' (with seed).")
    return _GENERATORS[match[1]](int(match[2]), seed=int(match[3] or seed or 0))


def _collect(
    entries: Sequence[Entry], form: Format, stem: str, template: str | None, limit: int | None, seed: int | None
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
        result = _read(entry, form, stem, template)
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
    printable = [{key: HALF_PAIR.sub("\ufffd", text) for key, text in row.items()} for row in left_out]
    return [problems[i] for i in sorted(problems)], printable


def _read(entry: Entry, form: Format, stem: str, template: str | None) -> Problem | str:
    """The problem of one row, or why there is none; without a template it has that of its own family."""
    if entry.row is None:
        return entry.fault
    form = of_row(form, entry.row)
    template = TEMPLATES[form.family] if template is None else template
    problem = form.problem(entry.row, Origin(entry.problem_id, stem, template))
    if isinstance(problem, Problem):
        for name, value in asdict(problem).items():
            if HALF_PAIR.search(json.dumps(value, ensure_ascii=False)):
                return f"half a surrogate pair stands in its {name}, which no tokenizer reads"
    return problem


def _file_entries(path: Path) -> list[Entry]:
    if path.suffix == ".eval":
        return read_log(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CotfaithError(
            f"{path} is not UTF-8 text (byte {error.start}); give JSON, JSONL or CSV in UTF-8."
        ) from error
    if path.suffix == ".csv":
        return _csv_entries(text, path)
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        whole = None
    if is_log(whole):
        return read_log(path)
    if isinstance(whole, dict) and whole and all(isinstance(value, dict) for value in whole.values()):
        return [Entry(f"id {key}", f"{path.stem}-{key}", _lowered(value)) for key, value in whole.items()]
    if isinstance(whole, dict):
        return [_entry("line 1", f"{path.stem}-1", whole)]
    if isinstance(whole, list):
        return [_entry(f"item {i}", f"{path.stem}-{i}", value) for i, value in enumerate(whole, 1)]
    return _line_entries(text, path)


def _csv_entries(text: str, path: Path) -> list[Entry]:
    """Rows below the header; a row of another length than the header is a fault."""
    try:
        rows = list(csv.reader(StringIO(text, newline="")))
    except csv.Error as error:
        raise CotfaithError(f"{path} is no CSV that can be read ({error}); give JSONL, or shorter fields.") from error
    if len(rows) < 2:
        raise CotfaithError(f"{path} has no row below a header; give the column names in the first row.")
    entries = []
    for number, row in enumerate(rows[1:], 1):
        place, problem_id = f"row {number}", f"{path.stem}-{number}"
        if len(row) == len(rows[0]):
            entries.append(Entry(place, problem_id, dict(zip(rows[0], row, strict=True))))
        elif row:
            fault = f"has {len(row)} fields, and the header has {len(rows[0])}"
            entries.append(Entry(place, problem_id, None, fault))
    return entries


def _line_entries(text: str, path: Path) -> list[Entry]:
    entries = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place, problem_id = f"line {number}", f"{path.stem}-{number}"
        try:
            entries.append(_entry(place, problem_id, json.loads(line)))
        except json.JSONDecodeError as error:
            entries.append(Entry(place, problem_id, None, f"not JSON ({error.msg}, column {error.colno})"))
        except RecursionError:
            entries.append(Entry(place, problem_id, None, "nested too deep to be read"))
        except ValueError as error:
            entries.append(Entry(place, problem_id, None, f"not to be read ({error})"))
    if not entries:
        raise CotfaithError(f"{path} is empty; give one JSON object a line.")
    if all(entry.row is None for entry in entries):
        raise CotfaithError(f"{path}, {entries[0].place}: {entries[0].fault}; give one JSON object a line.")
    return entries


def _entry(place: str, problem_id: str, value: Any) -> Entry:
    if isinstance(value, dict):
        return Entry(place, problem_id, value)
    return Entry(place, problem_id, None, f"holds a {type(value).__name__}, not an object")


def _lowered(row: Row) -> Row:
    return {key.lower(): value for key, value in row.items()}


def _hub_entries(source: str) -> list[Entry]:
    match = _HUB_NAME.fullmatch(source)
    if match is None or source.endswith((".json", ".jsonl", ".csv", ".eval")):
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
    return [Entry(f"row {i}", f"{stem}-{i}", dict(row)) for i, row in enumerate(rows, 1)]
