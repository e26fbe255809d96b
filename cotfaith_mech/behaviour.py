"""The behavioural tests of one reader on one chain, with their controls: instance level.

1. Every edited chain (variants.py) gets the answer forced after its cue; change is counted from the unedited chain.
2. Re-sampled protocol: the reader writes on after an edited beginning, then the answer is forced.
3. Conflict: question and chain imply different answers; which of them does the reader give?
4. Options in another order: how far the answer to a choice follows the place of an option, with and without the chain.
Change is total variation between answer distributions on {a*, gold, rest} before and after the edit: exact when the
reader is sure of a* before it, a lower bound otherwise. Two scorings: the answer is a*, the answer is correct.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from . import edits
from .answers import same_answer
from .chains import Chain
from .measured import Measured
from .metrics import total_variation
from .paraphrasers import Paraphrases, by_rules
from .problems import Conflict, Problem
from .reading import ChainReader, Reading
from .sampling import write_on
from .variants import BehaviourPlan, Editing, Variant, beginnings, edited_chains


def measure_behaviour(
    trunk: ChainReader,
    problem: Problem,
    reader: str,
    plan: BehaviourPlan,
    *,
    paraphrases: Paraphrases | None = None,
    donors: Sequence[Chain] = (),
    seed: int = 0,
) -> Measured:
    """All records of the behavioural tests of `reader` on the chain of `trunk`; edits are drawn from `seed`.

    `paraphrases` are those of the chain that every reader gets; without them they are made by rules.
    """
    measured = Measured(trunk.chain, reader)
    if paraphrases is None:
        paraphrases = by_rules(trunk.chain.steps, plan.draws, seed)
    editing = Editing(trunk.chain, problem, plan, paraphrases, donors, trunk.model.count, seed, measured.exclusions)
    variants = [*edited_chains(editing), *_continued(trunk, editing)]
    answers = list(dict.fromkeys([trunk.chain.answer, f" {problem.gold}"]))
    conflicts = [_opposed(trunk, conflict) for conflict in problem.conflicts] if "conflict" in plan.tests else []
    bases = [trunk.chain, *(variant.base for variant in variants if variant.base)]
    asked = {chain: list(answers) for chain in bases}
    for variant in variants:
        known = asked.setdefault(variant.chain, list(answers))
        known += [variant.implied] if variant.implied and variant.implied not in known else []
    found = trunk.read([*asked.items(), *conflicts])
    answered = dict(zip(asked, found, strict=False))
    read = {chain: dict(zip(asked[chain], one.readings, strict=True)) for chain, one in answered.items()}
    _add_baseline(measured, problem, read[trunk.chain])
    for variant in variants:
        before = read[variant.base or trunk.chain]
        _add_variant(measured, problem, variant, before, read[variant.chain], answered[variant.chain].said)
    for conflict, one in zip(problem.conflicts, found[len(asked) :], strict=False):
        _add_conflict(measured, conflict, *one.readings)
    if problem.kind == "choice" and plan.battery == "full":
        _add_options(measured, trunk, problem, plan.draws, seed)
    return measured


def _continued(trunk: ChainReader, editing: Editing) -> Iterable[Variant]:
    """The edited beginnings with the steps that the reader writes after them."""
    if not editing.plan.continue_tokens:
        return
    begun = list(beginnings(editing))
    chains = write_on(
        trunk.model,
        [variant.chain for variant in begun],
        max_new_tokens=editing.plan.continue_tokens,
        temperature=editing.plan.temperature,
        seed=editing.seed,
    )
    for variant, chain in zip(begun, chains, strict=True):
        yield replace(variant, chain=chain)


def _add_baseline(measured: Measured, problem: Problem, read: Mapping[str, Reading]) -> None:
    own = read[measured.chain.answer]
    correct = float(same_answer(measured.chain.answer, problem.gold, problem.kind))
    values = {"p_answer": own.p, "logp_answer": own.logp, "correct": correct, "entropy_first": own.entropy}
    if problem.labels:
        values["label_mass"] = own.label_mass
    if own.p_se:
        values["p_answer_se"] = own.p_se
    measured.add("baseline", "", values, own.n_tokens)


def _add_variant(
    measured: Measured,
    problem: Problem,
    variant: Variant,
    base: Mapping[str, Reading],
    read: Mapping[str, Reading],
    said: str | None,
) -> None:
    mine = read[measured.chain.answer]
    shared = [answer for answer in base if answer in read]
    before, after = (np.array([r[answer].p for answer in shared]) for r in (base, read))
    values = {
        "same": float(mine.greedy),
        "correct": float(same_answer(said or "", problem.gold, problem.kind)),
        "p_answer": mine.p,
        "p_gold": read[f" {problem.gold}"].p,
        "tv": float(total_variation(before, after)),
        "entropy": mine.entropy,
    }
    if problem.labels:
        values["label_mass"] = mine.label_mass
    if mine.p_se:
        values["p_answer_se"] = mine.p_se
    if variant.implied:
        values |= {"p_implied": read[variant.implied].p, "says_implied": float(read[variant.implied].greedy)}
    where = {"step": variant.step, "seed": variant.seed}
    measured.add(variant.measure, variant.variant, values, mine.n_tokens, **where)
    measured.texts.append(_text(variant, mine, said))


def _add_conflict(measured: Measured, conflict: Conflict, by_chain: Reading, by_question: Reading) -> None:
    values = {
        "p_chain": by_chain.p,
        "p_question": by_question.p,
        "p_other": max(0.0, 1 - by_chain.p - by_question.p),
        "says_chain": float(by_chain.greedy),
        "says_question": float(by_question.greedy),
    }
    measured.add("conflict", conflict.variant, values, by_chain.n_tokens)


def _opposed(trunk: ChainReader, conflict: Conflict) -> tuple[Chain, list[str]]:
    """The chain of a conflict under its question, and what chain and question answer."""
    prompt = trunk.model.render(conflict.question)
    chain = replace(trunk.chain, prompt=prompt, steps=conflict.steps, variant=conflict.variant)
    return chain, [f" {conflict.chain_answer}", f" {conflict.question_answer}"]


def _add_options(measured: Measured, trunk: ChainReader, problem: Problem, draws: int, seed: int) -> None:
    """The same options in `draws` other orders: with the chain, its labels renamed to match, and with no chain."""
    labels = [f" {label}" for label in problem.labels]
    chain = trunk.chain
    orders: list[list[int]] = []
    texts = [chain, replace(chain, steps=())]
    for draw in range(draws):
        order = np.random.default_rng([seed, 8, draw]).permutation(len(labels)).tolist()
        reordered = problem.reordered(order)
        if reordered is None:
            measured.exclusions.append("options in another order: the question does not hold them once as 'A) …' lines")
            return
        renamed = {problem.labels[old]: problem.labels[new] for new, old in enumerate(order)}
        steps = tuple(edits.relabel(step, renamed) for step in chain.steps)
        moved = replace(chain, prompt=trunk.model.render(reordered.question), variant=f"options_{draw}", steps=steps)
        texts += [moved, replace(moved, steps=())]
        orders.append(order)
    found = trunk.read([(text, labels) for text in texts])
    p = [np.array([reading.p for reading in one.readings]) for one in found]
    for draw, order in enumerate(orders):
        for form, name in enumerate(("chain", "no_chain")):
            at = 2 * (draw + 1) + form
            back = p[at][np.argsort(order)]
            values = {
                "tv": float(total_variation(p[form], back)),
                "same": float(p[form].argmax() == back.argmax()),
                "p_first": float(p[at][0]),
            }
            measured.add("options", name, values, found[at].readings[0].n_tokens, seed=draw)


def _text(variant: Variant, reading: Reading, said: str | None) -> dict[str, Any]:
    return {
        "measure": variant.measure,
        "variant": variant.variant,
        "step": variant.step,
        "seed": variant.seed,
        "steps": list(variant.chain.steps),
        "answer": said,
        "p_answer": reading.p,
    }
