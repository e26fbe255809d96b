"""Samples of an Inspect log as rows: what was asked, the target, and the reasoning that the log's model wrote.

1. The log is read by Inspect's own reader, so that every version of the file format is read; the library is an extra.
2. A sample of the first epoch becomes a row of `formats`' plain kind; other epochs are repetitions of the same problem.
3. The chain is the model's reasoning content, else the text it wrote up to its answer line ('ANSWER: B').
Format: inspect.aisi.org.uk/eval-logs.html (EvalLog, EvalSample).
"""

from __future__ import annotations

import re
import zlib
from importlib import import_module
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from .errors import CotfaithError
from .formats import Entry, Row
from .problems import LABELS

_ANSWER_LINE = re.compile(r"^[\W_]*(?:final\s+)?answer\W*:.*|^[\W_]*#### .*", re.IGNORECASE | re.MULTILINE)

MOST_BYTES = 2 * 2**30
"""Of a log, unpacked."""

UNREADABLE = (
    ValueError,
    LookupError,
    OSError,
    EOFError,
    TypeError,
    AttributeError,
    RuntimeError,
    BadZipFile,
    zlib.error,
)
"""What the zip, JSON and pydantic layers of Inspect's reader raise on a log that is not whole."""


def is_log(whole: Any) -> bool:
    """Whether a JSON value is a log that Inspect wrote with log_format='json'."""
    return isinstance(whole, dict) and {"version", "status", "eval"} <= whole.keys()


def read_log(path: Path) -> list[Entry]:
    """The samples of the log at `path`; raises CotfaithError without inspect-ai, or when no sample gives a row."""
    try:
        library = import_module("inspect_ai.log")
    except ImportError as error:
        raise CotfaithError(
            f"{path} is a log of Inspect, and inspect-ai is not installed; "
            "install the extra: pip install 'cotfaith-mech[inspect]'."
        ) from error
    _check_size(path)
    try:
        log = library.read_eval_log(str(path), resolve_attachments=True)
    except UNREADABLE as error:
        raise CotfaithError(
            f"Inspect cannot read {path}: {' '.join(str(error).split())[:200]}; give a log that it wrote to the end."
        ) from error
    entries = log_entries(log)
    if all(entry.row is None for entry in entries):
        why = entries[0].fault if entries else "it holds no sample"
        raise CotfaithError(f"No sample of {path} can be used: {why}; give a log with answered samples.")
    return entries


def _check_size(path: Path) -> None:
    """Raises CotfaithError where the log would unpack to more than MOST_BYTES, by what its table of contents says."""
    try:
        with ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except UNREADABLE:
        return
    if unpacked > MOST_BYTES:
        raise CotfaithError(
            f"{path} holds {path.stat().st_size} bytes that unpack to {unpacked}, and at most {MOST_BYTES} are "
            "unpacked; give a log with fewer samples."
        )


def log_entries(log: Any) -> list[Entry]:
    """One entry a sample of `log`, an EvalLog."""
    return [_entry(sample, log.eval.model) for sample in log.samples or []]


def _entry(sample: Any, model: str) -> Entry:
    place, named = f"sample {sample.id}, epoch {sample.epoch}", str(sample.id)
    fault = _fault(sample)
    if fault:
        return Entry(place, named, None, fault)
    row: Row = {
        "id": named,
        "question": sample.input if isinstance(sample.input, str) else "\n".join(m.text for m in sample.input),
        "choices": sample.choices,
        "answer": _target(sample),
        "steps": _reasoning(sample.output),
        "inspect_model": model,
    }
    return Entry(place, named, row)


def _fault(sample: Any) -> str:
    """Why `sample` gives no row; empty where it gives one."""
    output = sample.output
    if sample.epoch != 1:
        return "a repetition of the sample in a later epoch; one chain a problem is read"
    if sample.error is not None:
        return f"the sample ended in an error: {sample.error.message}"
    if getattr(sample, "invalidation", None) is not None:
        return "the sample was marked as invalid in the log"
    if output.error:
        return f"the model's output is an error: {output.error}"
    parts = _contents(output)
    if not output.completion.strip() and not any(part.type == "reasoning" for part in parts):
        return "the model gave no output"
    if any(part.type == "reasoning" and part.redacted for part in parts):
        return "the reasoning is redacted, so the log does not hold the chain"
    if not isinstance(sample.input, str) and any(part.type != "text" for m in sample.input for part in _parts(m)):
        return "the input holds something that is no text"
    if sample.choices and not isinstance(sample.target, str) and len(sample.target) > 1:
        return f"{len(sample.target)} choices are right; expected one"
    return ""


def _parts(message: Any) -> list[Any]:
    """The content objects of a message; a text alone has none."""
    return [] if isinstance(message.content, str) else list(message.content)


def _contents(output: Any) -> list[Any]:
    return _parts(output.choices[0].message) if output.choices else []


def _target(sample: Any) -> str:
    """The target, the first of several accepted ones; a label as the text of its choice, which no other choice has."""
    targets = [sample.target] if isinstance(sample.target, str) else sample.target
    target = targets[0].strip() if targets else ""
    labels = LABELS[: len(sample.choices or [])]
    return sample.choices[labels.index(target)] if len(target) == 1 and target in labels else target


def _reasoning(output: Any) -> str:
    """The reasoning content, else the completion before its last answer line, and without what follows it."""
    reasoning = [part.reasoning for part in _contents(output) if part.type == "reasoning"]
    if reasoning:
        return "\n".join(reasoning)
    lines = list(_ANSWER_LINE.finditer(output.completion))
    return output.completion[: lines[-1].start()] if lines else output.completion
