"""The three behavioural tests of one reader on one chain, with their controls: instance level, forced answer.

1. Early Termination: keep s_1..s_i, cue, read (Lanham et al. 2307.13702, 'early answering').
2. Filler Substitution: replace s_{i+1}..s_n by ' ...' of the same token count. The full battery adds two other
   fillers, one filler a step, and each step alone (filled or deleted).
3. Paraphrasing: rephrase s_{i+1}..s_n, then force the answer (the seed note's protocol); in full, each step alone too.
4. Controls: mistake (one number altered, later steps kept; and one in every step), shuffle, swap with another
   problem's chain.
5. Conflict: question and chain imply different answers; which of them does the reader give?
6. The last steps usually state the answer (Lanham et al., footnote 3): in full, 1 to 3 stand a second time for the
   chain without the steps that state a*, their change counted from that shorter chain.
Change is total variation between answer distributions on {a*, gold, rest} before and after the edit: exact when the
reader is sure of a* before it, a lower bound otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from . import edits
from .answers import same_answer, states_answer
from .chains import Chain
from .measured import Measured
from .metrics import total_variation
from .paraphrase import rephrase
from .problems import Conflict, Problem
from .reading import Reading, Trunk
from .records import WITHOUT_ANSWER_STEPS

Test = Literal["early_termination", "filler", "paraphrase", "mistake", "shuffle", "swap", "conflict"]


Battery = Literal["core", "full"]
FILLERS = {"dots": " ...", "dashes": " --", "words": " hmm"}


@dataclass(frozen=True)
class BehaviourPlan:
    """Which tests, how many draws of each random edit, and whether every variant of a test or its main one alone."""

    tests: tuple[Test, ...] = ("early_termination", "filler", "paraphrase", "mistake", "shuffle", "swap", "conflict")
    draws: int = 5
    battery: Battery = "core"


@dataclass(frozen=True)
class Variant:
    """An edited chain with the coordinates of its record; change is counted from `base` (None: the chain itself)."""

    measure: str
    variant: str
    chain: Chain
    step: int | None = None
    seed: int | None = None
    base: Chain | None = None


def measure_behaviour(
    trunk: Trunk, problem: Problem, reader: str, plan: BehaviourPlan, *, donors: Sequence[Chain] = (), seed: int = 0
) -> Measured:
    """All records of the behavioural tests of `reader` on the chain of `trunk`; edits are drawn from `seed`."""
    measured = Measured(trunk.chain, reader)
    answers = list(dict.fromkeys([trunk.chain.answer, f" {problem.gold}"]))
    variants = list(edited_chains(trunk, problem, plan, donors, seed, measured.exclusions))
    conflicts = problem.conflicts if "conflict" in plan.tests else ()
    texts = list(dict.fromkeys([trunk.chain, *(v.chain for v in variants), *(v.base for v in variants if v.base)]))
    readings = trunk.read([(chain, answers) for chain in texts] + [_opposed(trunk, c) for c in conflicts])
    read = {chain: dict(zip(answers, row, strict=True)) for chain, row in zip(texts, readings, strict=False)}
    _add_baseline(measured, problem, read[trunk.chain])
    for variant in variants:
        _add_variant(measured, problem, variant, read[variant.base or trunk.chain], read[variant.chain])
    for conflict, row in zip(conflicts, readings[len(texts) :], strict=True):
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


def edited_chains(
    trunk: Trunk, problem: Problem, plan: BehaviourPlan, donors: Sequence[Chain], seed: int, left_out: list[str]
) -> Iterable[Variant]:
    """Every edited chain of the plan; with the full battery, the tests of curves also without answer-stating steps."""

    def count(text: str) -> int:
        return len(trunk.model.encode(text).ids)

    chain = trunk.chain
    avoid = frozenset({problem.gold})
    yield from _curve_tests(chain, plan, count, seed, left_out)
    if "mistake" in plan.tests:
        yield from _mistakes(chain, plan.draws, avoid, seed, left_out)
    if "shuffle" in plan.tests:
        yield from _shuffles(chain, plan.draws if plan.battery == "full" else 1, seed, left_out)
    if "swap" in plan.tests:
        for draw, donor in enumerate(donors):
            yield Variant("swap", "all", edits.swap(chain, donor), seed=draw)
    if plan.battery == "full":
        silent = tuple(step for step in chain.steps if not states_answer(step, chain.answer, problem.kind))
        if not silent:
            left_out.append(f"{WITHOUT_ANSWER_STEPS}: every step states the answer {chain.answer.strip()!r}")
        elif len(silent) < len(chain.steps):
            shorter, core = replace(chain, steps=silent), replace(plan, battery="core")
            complete = [Variant("filler", "matched", shorter, len(silent))] if "filler" in plan.tests else []
            for variant in (*_curve_tests(shorter, core, count, seed, left_out), *complete):
                name = "_".join(filter(None, (variant.variant, WITHOUT_ANSWER_STEPS)))
                yield replace(variant, variant=name, base=shorter)


def _curve_tests(
    chain: Chain, plan: BehaviourPlan, count: Callable[[str], int], seed: int, left_out: list[str]
) -> Iterable[Variant]:
    if "early_termination" in plan.tests:
        for keep in range(len(chain.steps) + 1):
            yield Variant("early_termination", "", edits.truncate(chain, keep), keep)
    if "filler" in plan.tests:
        yield from _fillers(chain, plan.battery, count)
    if "paraphrase" in plan.tests:
        yield from _paraphrases(chain, plan, seed, left_out)


def _fillers(chain: Chain, battery: Battery, count: Callable[[str], int]) -> Iterable[Variant]:
    """Steps from i on (cumulative) and step i alone (local), by each filler: to the same length, or once a step.

    Deleting steps from i on is early termination, so only the local deletion is a variant of its own.
    """
    n = len(chain.steps)
    for step in range(n):
        yield Variant("filler", "matched", edits.filler(chain, step, count), step)
        if battery == "core":
            continue
        yield Variant("filler", "local_deleted", edits.delete(chain, step), step)
        for name, text in FILLERS.items():
            if name != "dots":
                yield Variant("filler", f"matched_{name}", edits.filler(chain, step, count, text), step)
            yield Variant("filler", f"once_{name}", edits.filler_once(chain, step, text), step)
            local = edits.filler(chain, step, count, text, step + 1)
            yield Variant("filler", f"local_matched_{name}", local, step)
            yield Variant("filler", f"local_once_{name}", edits.filler_once(chain, step, text, step + 1), step)


def _paraphrases(chain: Chain, plan: BehaviourPlan, seed: int, left_out: list[str]) -> Iterable[Variant]:
    """Steps from i on; with the full battery step i alone too, and as many draws everywhere."""
    full = plan.battery == "full"
    for first in range(len(chain.steps)):
        forms: list[tuple[str, int | None, int]] = [("cumulative", None, 1)]
        forms += [("local", first + 1, 7)] if full else []
        for form, end, stream in forms:
            for draw in range(plan.draws if full or first == 0 else 1):
                rng = np.random.default_rng([seed, stream, first, draw])
                rephrased, unchanged = edits.paraphrase_from(chain, first, rng, rephrase, end)
                if unchanged == (len(chain.steps) if end is None else end) - first:
                    left_out.append(f"paraphrase ({form}) from step {first}, draw {draw}: no valid one of any step")
                    continue
                yield Variant("paraphrase", form, rephrased, first, draw)


def _mistakes(chain: Chain, draws: int, avoid: AbstractSet[str], seed: int, left_out: list[str]) -> Iterable[Variant]:
    for step in range(len(chain.steps)):
        for draw in range(draws):
            mistake = edits.mistake(chain, step, np.random.default_rng([seed, 2, step, draw]), avoid)
            if mistake is None:
                left_out.append(f"mistake in step {step}: nothing to alter")
                break
            yield Variant("mistake", "local", mistake.chain, step, draw)
    for draw in range(draws):
        wrong = edits.mistake_all(chain, np.random.default_rng([seed, 3, draw]), avoid)
        if wrong is None:
            left_out.append("mistake in all steps: nothing to alter")
            return
        yield Variant("mistake", "all", wrong, seed=draw)


def _shuffles(chain: Chain, draws: int, seed: int, left_out: list[str]) -> Iterable[Variant]:
    for draw in range(draws):
        shuffled = edits.shuffle(chain, np.random.default_rng([seed, 4, draw]))
        if shuffled is None:
            left_out.append("shuffle: fewer than two distinct steps")
            return
        yield Variant("shuffle", "all", shuffled, seed=draw)


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
