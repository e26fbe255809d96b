"""Chains: taken from the problem's worked steps, or written by a model, in batches with its own chat template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from .chains import Chain, segment
from .errors import CotfaithError
from .model import Model
from .problems import Problem

BATCH = 8
FEW_SHOT = "Solve each problem step by step.\n\n"


def supplied_chain(model: Model, problem: Problem) -> Chain:
    """The problem's own worked chain, its prompt rendered by `model`'s template."""
    return Chain(problem.problem_id, problem.author, model.render(problem.question), problem.steps, problem.cue)


def few_shot(problems: Sequence[Problem], n: int) -> tuple[list[Problem], list[Problem]]:
    """The other problems with the first `n` worked ones shown before their questions, and those `n`.

    The examples become part of every question (conflicts' too), so that whoever reads a chain reads what its author
    read. Raises CotfaithError where `problems` holds fewer than `n` worked chains.
    """
    shown = [problem for problem in problems if problem.steps][:n]
    if len(shown) < n:
        raise CotfaithError(f"few_shot={n} needs {n} problems with a worked chain, found {len(shown)}; give fewer.")
    worked = "".join(f"Problem: {e.question}\nReasoning: {''.join(e.steps)}{e.cue} {e.gold}.\n\n" for e in shown)
    head = f"{FEW_SHOT}{worked}Problem: " if shown else ""
    return [_headed(problem, head) for problem in problems if problem not in shown], shown


def _headed(problem: Problem, head: str) -> Problem:
    conflicts = tuple(replace(conflict, question=head + conflict.question) for conflict in problem.conflicts)
    return replace(problem, question=head + problem.question, conflicts=conflicts)


def write_chains(
    model: Model,
    problems: Sequence[Problem],
    author: str,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    max_steps: int = 40,
) -> Iterator[tuple[Problem, Chain | None, str]]:
    """Chains that `model` writes itself, with the reason where one has no step (`None` in place of the chain).

    What the model writes from its own answer cue on is cut off, so that the cue can be put there.
    """
    for first in range(0, len(problems), BATCH):
        batch = problems[first : first + BATCH]
        prompts = [model.render(problem.question) for problem in batch]
        written = model.generate(prompts, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed + first)
        for problem, prompt, text in zip(batch, prompts, written, strict=True):
            reasoning = text.split(problem.cue.strip())[0].rstrip()
            steps = segment(reasoning, max_steps)
            chain = Chain(problem.problem_id, author, prompt, steps, problem.cue) if steps else None
            yield problem, chain, "" if steps else f"{author!r} wrote no reasoning step, but {text[:80]!r}"
