"""Whose chains are read: they come with the problems, or readers of the study write them; and who reads whose.

With one author every reader reads its chains. With several, a reader reads those that came with the problems, the first
reader's and its own, and the first reader reads all: for a base and its fine-tune the arms BB, TT, TB and BT.
What a problem brings that rests on its own chain (twin, true step, conflicts) holds for that chain alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from .answers import states_answer
from .chains import Chain
from .conclude import Progress
from .config import SUPPLIED, ReaderConfig, StudyConfig
from .model import TextReader
from .paraphrasers import by_model, by_rules, supplied
from .problems import Problem
from .records import RunDirectory
from .sampling import supplied_chain, write_chains

Load = Callable[[ReaderConfig, str], TextReader]
"""Loads a reader in a role of the run."""


def problem_for(problem: Problem, author: str) -> Problem:
    """The problem as it stands beside a chain of `author`: what rests on another chain is left out."""
    if author == problem.author:
        return problem
    return replace(problem, steps=(), twin_steps=(), true_step=None, paraphrases=(), conflicts=())


def is_read(config: StudyConfig, reader: str, author: str) -> bool:
    """Whether `reader` reads chains of `author`, an author being a reader's name or another one's (supplied)."""
    names = [one.name for one in config.readers]
    return len(config.all_authors) == 1 or reader == names[0] or author in (reader, names[0]) or author not in names


def missing_of(author: str, problems: Sequence[Problem], run: RunDirectory) -> list[Problem]:
    """Problems without a chain of `author` (SUPPLIED: of their own) and without a reason why there is none."""
    known = run.read_chains() if (run.path / "chains.jsonl").exists() else []
    done = {(row["problem_id"], row["author"]) for row in known}
    left_out = run.read_exclusions(of_units=False)
    done |= {(row["problem_id"], row["reader"]) for row in left_out if row["stage"] == "chain"}
    own = [(problem, problem.author if author == SUPPLIED else author) for problem in problems]
    return [problem for problem, name in own if (problem.problem_id, name) not in done]


def see_to_chains(
    config: StudyConfig,
    author: str,
    load: Callable[[], TextReader],
    problems: Sequence[Problem],
    run: RunDirectory,
    progress: Progress,
) -> None:
    """See that chains.jsonl has one chain of `author` a problem, its model loaded where there is one to make; what
    cannot be had is an exclusion."""
    missing = missing_of(author, problems, run)
    rows = {(row["problem_id"], row["author"]): row for row in run.read_chains()} if _begun(run) else {}
    order = {problem.problem_id: place for place, problem in enumerate(problems)}
    left_out: list[dict[str, Any]] = []

    def save() -> None:
        run.add_exclusions(left_out)
        run.write_chains(sorted(rows.values(), key=lambda row: order.get(row["problem_id"], -1)))

    def leave_out(problem: Problem, name: str, reason: str) -> None:
        left_out.append({"problem_id": problem.problem_id, "reader": name, "stage": "chain", "reason": reason})

    if author == SUPPLIED:
        for problem in missing:
            if problem.steps:
                chain = supplied_chain(load(), problem)
                rows[problem.problem_id, problem.author] = chain_row(problem, chain)
            else:
                leave_out(
                    problem, problem.author, "the problem comes without a chain; use --generate, or chains: generate"
                )
    elif missing:
        options = config.generation.model_dump(exclude={"few_shot"})
        done = {problem.problem_id for problem in problems} - {problem.problem_id for problem in missing}
        written = write_chains(load(), problems, author, done=done, seed=config.seed, **options)
        with _saving(save) as now_and_then:
            for problem, (_, chain, reason) in zip(progress(missing, f"{author} writes chains"), written, strict=True):
                if chain is None:
                    leave_out(problem, author, reason)
                else:
                    rows[problem.problem_id, author] = chain_row(problem_for(problem, author), chain)
                now_and_then()
    save()


@contextmanager
def _saving(save: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """What to call after each piece of work: it saves as often as a tenth of the time allows. All is saved in the end,
    whatever ends it; after a kill, what was not saved is made again, the same."""
    ended, cost = -math.inf, 0.0

    def now_and_then() -> None:
        nonlocal ended, cost
        started = time.monotonic()
        if started - ended >= 9 * cost:
            save()
            ended = time.monotonic()
            cost = ended - started

    try:
        yield now_and_then
    finally:
        save()


def _begun(run: RunDirectory) -> bool:
    return (run.path / "chains.jsonl").exists()


def chain_row(problem: Problem, chain: Chain) -> dict[str, Any]:
    """A row of chains.jsonl: the chain and what its problem says of it."""
    return chain.to_json() | {
        "question": problem.question,
        "gold": problem.gold,
        "kind": problem.kind,
        "choices": list(problem.choices),
        "source": problem.source,
        "answer_steps": [i for i, s in enumerate(chain.steps) if states_answer(s, problem.gold, problem.kind)],
        "true_step": problem.true_step,
        "twin_answer": problem.twin_answer,
    }


def see_to_paraphrases(
    config: StudyConfig, problems: Sequence[Problem], run: RunDirectory, load: Load, progress: Progress
) -> None:
    """Put paraphrases beside every chain in chains.jsonl that has none yet: the same ones for every reader."""
    tests = [config.tests if reader.tests is None else reader.tests for reader in config.readers]
    rows = run.read_chains()
    missing = [row for row in rows if "paraphrases" not in row]
    if not missing or not any("paraphrase" in chosen for chosen in tests):
        return
    author = load(config.paraphraser, "paraphraser") if isinstance(config.paraphraser, ReaderConfig) else None
    by_id = {problem.problem_id: problem for problem in problems}
    without: list[dict[str, Any]] = []

    def save() -> None:
        run.add_exclusions(without)
        run.write_chains(rows)

    with _saving(save) as now_and_then:
        for row in progress(missing, "paraphrase chains"):
            seed = int(row["chain_id"][:8], 16) ^ config.seed
            if author is not None:
                row["paraphrases"] = by_model(author, row["steps"], config.draws, seed).to_json()
                now_and_then()
            elif config.paraphraser == "rules":
                row["paraphrases"] = by_rules(row["steps"], config.draws, seed).to_json()
            else:
                problem = problem_for(by_id[row["problem_id"]], row["author"])
                row["paraphrases"] = supplied(row["steps"], problem.paraphrases).to_json()
                if not row["paraphrases"]["draws"]:
                    reason = "paraphraser: supplied, but the problem comes with none; add `paraphrases` to its row"
                    without.append({"problem_id": row["problem_id"], "stage": "paraphrase", "reason": reason})
