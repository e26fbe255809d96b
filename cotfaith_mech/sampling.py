"""Chains: taken from the problem's worked steps, or written by a model, in batches with its own chat template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .chains import Chain, segment
from .model import Model
from .problems import Problem

FEW_SHOT = "Solve each problem step by step.\n\n"


def supplied_chain(model: Model, problem: Problem, author: str = "supplied") -> Chain:
    """The problem's own worked chain, its prompt rendered by `model`'s template."""
    return Chain(problem.problem_id, author, model.render(problem.question), problem.steps, problem.cue)


def write_chains(
    model: Model,
    problems: Sequence[Problem],
    author: str,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    examples: Sequence[Problem] = (),
    batch_size: int = 8,
    max_steps: int = 40,
) -> Iterator[tuple[Problem, Chain | None, str]]:
    """Chains that `model` writes itself, with the reason where one has no step (`None` in place of the chain).

    What the model writes from its own answer cue on is cut off, so that the cue can be put there. `examples` are worked
    problems shown before the question (few-shot).
    """
    shown = "".join(f"Problem: {e.question}\nReasoning: {''.join(e.steps)}{e.cue} {e.gold}.\n\n" for e in examples)
    head = FEW_SHOT + shown + "Problem: " if examples else ""
    for first in range(0, len(problems), batch_size):
        batch = problems[first : first + batch_size]
        prompts = [model.render(head + problem.question) for problem in batch]
        written = model.generate(prompts, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed + first)
        for problem, prompt, text in zip(batch, prompts, written, strict=True):
            reasoning = text.split(problem.cue.strip())[0].rstrip()
            steps = segment(reasoning, max_steps)
            chain = Chain(problem.problem_id, author, prompt, steps, problem.cue) if steps else None
            yield problem, chain, "" if steps else f"{author!r} wrote no reasoning step, but {text[:80]!r}"
