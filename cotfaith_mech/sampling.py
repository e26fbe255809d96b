"""Chains: taken from the problem's worked steps, or written by a model, in batches with its own chat template."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import replace

from .chains import Chain, segment
from .errors import CotfaithError, EndpointError
from .model import TextReader
from .problems import Problem
from .seeds import seed_of

BATCH = 8
FEW_SHOT = "Solve each problem step by step.\n\n"


def supplied_chain(model: TextReader, problem: Problem) -> Chain:
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
    model: TextReader,
    problems: Sequence[Problem],
    author: str,
    *,
    done: Container[str] = (),
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    max_steps: int = 40,
) -> Iterator[tuple[Problem, Chain | None, str]]:
    """Chains that `model` writes itself, with the reason where there is none (`None` in place of the chain).

    A draw's seed follows from `seed` and the problem's id. Problems are taken in fixed batches, so that not even
    rounding depends on which problem ids are `done`. What the model writes from its own answer cue on is cut off, so
    that the cue can be put there.
    """
    for first in range(0, len(problems), BATCH):
        batch = problems[first : first + BATCH]
        if all(problem.problem_id in done for problem in batch):
            continue
        prompts = {problem.problem_id: model.render(problem.question) for problem in batch}
        refused = {name: no_room(model, prompt, max_new_tokens) for name, prompt in prompts.items()}
        fitting = [name for name, reason in refused.items() if not reason]
        seeds = [seed_of([seed, name]) for name in fitting]
        texts = generate_each(model, [prompts[name] for name in fitting], max_new_tokens, temperature, seeds)
        written = dict(zip(fitting, texts, strict=True))
        for problem in batch:
            name = problem.problem_id
            if name in done:
                continue
            text = written.get(name, CotfaithError(refused[name]))
            if isinstance(text, CotfaithError):
                yield problem, None, str(text)
                continue
            steps = _steps(text, problem.cue, max_steps)
            chain = Chain(name, author, prompts[name], steps, problem.cue) if steps else None
            yield problem, chain, "" if steps else f"{author!r} wrote no reasoning step, but {text[:80]!r}"


def generate_each(
    model: TextReader, prompts: Sequence[str], max_new_tokens: int, temperature: float, seeds: Sequence[int]
) -> list[str | CotfaithError]:
    """What `model` writes after each prompt, or why it refuses that one: a batch with a refusal is asked one by one.

    Raises EndpointError, which concerns them all."""
    try:
        return [*model.generate(prompts, max_new_tokens=max_new_tokens, temperature=temperature, seeds=seeds)]
    except EndpointError:
        raise
    except CotfaithError as error:
        if len(prompts) == 1:
            return [error]
    alone = zip(prompts, seeds, strict=True)
    return [generate_each(model, [prompt], max_new_tokens, temperature, [seed])[0] for prompt, seed in alone]


def _steps(written: str, cue: str, max_steps: int) -> tuple[str, ...]:
    """Steps of what was written before the cue."""
    return segment(written.split(cue.strip())[0].rstrip(), max_steps)


def write_on(
    model: TextReader,
    chains: Sequence[Chain],
    *,
    max_new_tokens: int,
    temperature: float,
    seeds: Sequence[int],
    max_steps: int = 40,
) -> list[Chain]:
    """Each chain with the steps that `model` writes after its own, up to the cue or `max_new_tokens` tokens, drawn by
    its own seed where the temperature is not 0.

    A chain that leaves no room for them in the model's context is its caller's to leave out (`no_room`).
    """
    longer = []
    for first in range(0, len(chains), BATCH):
        batch = chains[first : first + BATCH]
        texts = model.generate(
            [chain.prompt for chain in batch],
            begun=["".join(chain.steps) for chain in batch],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seeds=seeds[first : first + BATCH],
        )
        pairs = zip(batch, texts, strict=True)
        longer += [replace(c, steps=(*c.steps, *_steps(text, c.cue, max_steps))) for c, text in pairs]
    return longer


def no_room(model: TextReader, prompt: str, max_new_tokens: int) -> str:
    """Why `prompt` leaves no room for what is to be written; empty where it does."""
    if model.info.context is None:
        return ""
    try:
        n_tokens = model.count(prompt)
    except CotfaithError as error:
        return str(error)
    if n_tokens + max_new_tokens <= model.info.context:
        return ""
    return (
        f"the prompt has {n_tokens} tokens and {max_new_tokens} more are to be written, but {model.info.name!r} reads "
        f"at most {model.info.context}; shorten it or ask for fewer"
    )
