"""The three behavioural tests of one reader on one chain, with their controls: instance level, forced answer.

1. Early Termination: keep s_1..s_i, cue, read (Lanham et al. 2307.13702, 'early answering').
2. Filler Substitution: replace s_{i+1}..s_n by ' ...' of the same token count.
3. Paraphrasing: rephrase s_{i+1}..s_n, then force the answer (the seed note's protocol).
4. Controls: mistake (one number altered, later steps kept; and one in every step), shuffle, swap with another
   problem's chain.
5. Conflict: question and chain imply different answers; which of them does the reader give?
Change is total variation between answer distributions on {a*, gold, rest} before and after the edit: exact when the
reader is sure of a* before it, a lower bound otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from . import edits
from .answers import same_answer
from .chains import Chain
from .measured import Measured
from .metrics import total_variation
from .paraphrase import rephrase
from .problems import Conflict, Problem
from .reading import Reading, Trunk

Test = Literal["early_termination", "filler", "paraphrase", "mistake", "shuffle", "swap", "conflict"]


@dataclass(frozen=True)
class BehaviourPlan:
    """Which tests, and how many draws of each random edit."""

    tests: tuple[Test, ...] = ("early_termination", "filler", "paraphrase", "mistake", "shuffle", "swap", "conflict")
    draws: int = 5
    curve_draws: int = 1


@dataclass(frozen=True)
class Variant:
    """An edited chain with the coordinates of its record."""

    measure: str
    variant: str
    chain: Chain
    step: int | None = None
    seed: int | None = None


def measure_behaviour(
    trunk: Trunk, problem: Problem, reader: str, plan: BehaviourPlan, *, donors: Sequence[Chain] = (), seed: int = 0
) -> Measured:
    """All records of the behavioural tests of `reader` on the chain of `trunk`; edits are drawn from `seed`."""
    measured = Measured(trunk.chain, reader)
    answers = list(dict.fromkeys([trunk.chain.answer, f" {problem.gold}"]))
    variants = list(_variants(trunk, problem, plan, donors, seed, measured.exclusions))
    conflicts = problem.conflicts if "conflict" in plan.tests else ()
    opposed = [_opposed(trunk, conflict) for conflict in conflicts]
    readings = trunk.read([(chain, answers) for chain in (trunk.chain, *(v.chain for v in variants))] + opposed)
    base, *edited = (dict(zip(answers, row, strict=True)) for row in readings[: 1 + len(variants)])
    _add_baseline(measured, problem, base)
    for variant, read in zip(variants, edited, strict=True):
        _add_variant(measured, problem, variant, base, read)
    for conflict, row in zip(conflicts, readings[1 + len(variants) :], strict=True):
        _add_conflict(measured, conflict, *row)
    return measured


def _add_baseline(measured: Measured, problem: Problem, base: Mapping[str, Reading]) -> None:
    answer = measured.chain.answer
    own = base[answer]
    correct = float(answer in _right(problem, base))
    values = {"p_answer": own.p, "logp_answer": own.logp, "correct": correct, "entropy_first": own.entropy}
    if problem.kind == "choice":
        values["label_mass"] = own.label_mass
    measured.add("baseline", "", values, own.n_tokens)


def _right(problem: Problem, answers: Iterable[str]) -> list[str]:
    return [answer for answer in answers if same_answer(answer, problem.gold, problem.kind)]


def _add_variant(
    measured: Measured, problem: Problem, variant: Variant, base: Mapping[str, Reading], read: Mapping[str, Reading]
) -> None:
    mine = read[measured.chain.answer]
    before, after = (np.array([reading.p for reading in r.values()]) for r in (base, read))
    values = {
        "same": float(mine.greedy),
        "correct": float(any(read[answer].greedy for answer in _right(problem, read))),
        "p_answer": mine.p,
        "p_gold": read[f" {problem.gold}"].p,
        "tv": float(total_variation(before, after)),
        "entropy": mine.entropy,
    }
    where = {"step": variant.step, "seed": variant.seed}
    measured.add(variant.measure, variant.variant, values, mine.n_tokens, **where)
    measured.texts.append(_text(variant, mine))


def _add_conflict(measured: Measured, conflict: Conflict, by_chain: Reading, by_question: Reading) -> None:
    values = {
        "p_chain": by_chain.p,
        "p_question": by_question.p,
        "p_other": max(0.0, 1 - by_chain.p - by_question.p),
        "says_chain": float(by_chain.greedy),
        "says_question": float(by_question.greedy),
    }
    measured.add("conflict", conflict.variant, values, by_chain.n_tokens)


def _variants(
    trunk: Trunk, problem: Problem, plan: BehaviourPlan, donors: Sequence[Chain], seed: int, left_out: list[str]
) -> Iterable[Variant]:
    chain, n = trunk.chain, len(trunk.chain.steps)
    if "early_termination" in plan.tests:
        for keep in range(n + 1):
            yield Variant("early_termination", "", edits.truncate(chain, keep), keep)
    if "filler" in plan.tests:
        for keep in range(n):
            filled = edits.filler(chain, keep, lambda text: len(trunk.model.encode(text).ids))
            yield Variant("filler", "matched", filled, keep)
    if "paraphrase" in plan.tests:
        for keep in range(n):
            for draw in range(plan.draws if keep == 0 else plan.curve_draws):
                rng = np.random.default_rng([seed, 1, keep, draw])
                rephrased, unchanged = edits.paraphrase_from(chain, keep, rng, rephrase)
                if unchanged == n - keep:
                    left_out.append(f"paraphrase from step {keep}, draw {draw}: no valid paraphrase of any step")
                    continue
                yield Variant("paraphrase", "cumulative", rephrased, keep, draw)
    avoid = frozenset({problem.gold})
    if "mistake" in plan.tests:
        for step in range(n):
            for draw in range(plan.draws):
                mistake = edits.mistake(chain, step, np.random.default_rng([seed, 2, step, draw]), avoid)
                if mistake is None:
                    left_out.append(f"mistake in step {step}, draw {draw}: nothing to alter")
                    continue
                yield Variant("mistake", "local", mistake.chain, step, draw)
        for draw in range(plan.draws):
            wrong = edits.mistake_all(chain, np.random.default_rng([seed, 3, draw]), avoid)
            if wrong is None:
                left_out.append(f"mistake in all steps, draw {draw}: nothing to alter")
                continue
            yield Variant("mistake", "all", wrong, seed=draw)
    if "shuffle" in plan.tests:
        shuffled = edits.shuffle(chain, np.random.default_rng([seed, 4]))
        if shuffled is None:
            left_out.append("shuffle: fewer than two distinct steps")
        else:
            yield Variant("shuffle", "all", shuffled, seed=0)
    if "swap" in plan.tests:
        for draw, donor in enumerate(donors):
            yield Variant("swap", "all", edits.swap(chain, donor), seed=draw)


def _opposed(trunk: Trunk, conflict: Conflict) -> tuple[Chain, list[str]]:
    """The chain of a conflict under its question, and what chain and question answer."""
    prompt = trunk.model.render(conflict.question)
    chain = replace(trunk.chain, prompt=prompt, steps=conflict.steps, variant=conflict.variant)
    return chain, [f" {conflict.chain_answer}", f" {conflict.question_answer}"]


def _text(variant: Variant, reading: Reading) -> dict[str, Any]:
    return {
        "measure": variant.measure,
        "variant": variant.variant,
        "step": variant.step,
        "seed": variant.seed,
        "steps": list(variant.chain.steps),
        "answer": variant.chain.answer.strip() if reading.greedy else None,
        "p_answer": reading.p,
    }
