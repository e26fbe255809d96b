"""The behavioural tests of one reader on one chain, with their controls: instance level.

1. Every edited chain (variants.py) gets the answer forced after its cue; change is counted from the unedited chain.
2. Re-sampled protocol: the reader writes on after an edited beginning, then the answer is forced.
3. Conflict: question and chain imply different answers; which of them does the reader give? Besides the problem's own
   conflicts, a right chain whose mistake is carried on to another answer is one (`carried`).
4. Options in another order: how far the answer to a choice follows the place of an option, with and without the chain.
Change is total variation between answer distributions on {a*, gold, rest} before and after the edit: exact when the
reader is sure of a* before it, a lower bound otherwise. Two scorings: the answer is a*, the answer is correct.
"""

from __future__ import annotations

import math
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
from .sampling import no_room, write_on
from .seeds import seed_of
from .variants import BehaviourPlan, Editing, Variant, beginnings, edited_chains


def measure_behaviour(
    trunk: ChainReader,
    problem: Problem,
    reader: str,
    plan: BehaviourPlan | None = None,
    *,
    paraphrases: Paraphrases | None = None,
    donors: Sequence[Chain] = (),
    seed: int = 0,
) -> Measured:
    """All records of the behavioural tests of `reader` on the chain of `trunk`; edits are drawn from `seed`.

    Early answering, mistakes, filler and paraphrase as in Lanham et al. (2307.13702); `plan` says which and how many
    draws. Per edited chain, at its `step` and draw (`seed`): `tv` (total variation of the answer's distribution, 0 to
    1), `same`, `correct`, `answered` (0 or 1), `p_answer`, `p_gold` (probability), `entropy` (nats). `donors` are
    chains of other problems, for the swap. `paraphrases` are those of the chain that every reader gets; without them
    they are made by rules. What could not be made is in `exclusions`.
    """
    plan = plan or BehaviourPlan()
    measured = Measured(trunk.chain, reader)
    if paraphrases is None:
        paraphrases = by_rules(trunk.chain.steps, plan.draws, seed)
    editing = Editing(trunk.chain, problem, plan, paraphrases, donors, trunk.model.count, seed, measured.exclusions)
    variants = [*edited_chains(editing), *_continued(trunk, editing)]
    gold = _spelled(problem, trunk.chain.answer)
    answers = list(dict.fromkeys([trunk.chain.answer, gold]))
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
        if variant.measure == "conflict" and variant.implied:
            by_chain, by_question = read[variant.chain][variant.implied], read[variant.chain][gold]
            _add_conflict(measured, variant.variant, by_chain, by_question, variant.step, variant.seed)
            continue
        before = read[variant.base or trunk.chain]
        _add_variant(measured, problem, variant, before, read[variant.chain], answered[variant.chain].said)
    for conflict, one in zip(problem.conflicts, found[len(asked) :], strict=False):
        by_chain, by_question = one.readings
        _add_conflict(measured, conflict.variant, by_chain, by_question)
    if problem.kind == "choice" and plan.battery == "full":
        _add_options(measured, trunk, problem, plan.draws, seed)
    return measured


def _continued(trunk: ChainReader, editing: Editing) -> Iterable[Variant]:
    """The edited beginnings with the steps that the reader writes after them."""
    if not editing.plan.continue_tokens:
        return
    begun = []
    for variant in beginnings(editing):
        if reason := no_room(trunk.model, variant.chain.text, editing.plan.continue_tokens):
            editing.left_out.append(f"{variant.measure} {variant.variant} at step {variant.step}: {reason}")
        else:
            begun.append(variant)
    chains = write_on(
        trunk.model,
        [variant.chain for variant in begun],
        max_new_tokens=editing.plan.continue_tokens,
        temperature=editing.plan.temperature,
        seeds=[seed_of([editing.seed, one.measure, one.step, one.seed]) for one in begun],
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


def _undefined_with(values: Mapping[str, float], *readings: Reading) -> dict[str, float]:
    """`values`, all NaN where the logits of a reading were: what is said then says nothing."""
    undefined = any(math.isnan(reading.logp) for reading in readings)
    return {metric: math.nan if undefined else value for metric, value in values.items()}


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
    if max(before.sum(), after.sum()) > 1 + 1e-6:  # one begins with the other ('1' and '1,250'): they overlap
        before, after = before[:1], after[:1]
    values = {
        "answered": float(said is not None),
        "same": float(mine.greedy),
        "correct": float(same_answer(said or "", problem.gold, problem.kind)),
        "p_answer": mine.p,
        "p_gold": read[_spelled(problem, measured.chain.answer)].p,
        "tv": float(total_variation(before, after)),
        "entropy": mine.entropy,
    }
    if problem.labels:
        values["label_mass"] = mine.label_mass
    if mine.p_se:
        values["p_answer_se"] = mine.p_se
    if variant.implied:
        values |= {"p_implied": read[variant.implied].p, "says_implied": float(read[variant.implied].greedy)}
    values = _undefined_with(values, mine)
    where = {"step": variant.step, "seed": variant.seed}
    measured.add(variant.measure, variant.variant, values, mine.n_tokens, **where)
    measured.texts.append(_text(variant, mine, said))


def _spelled(problem: Problem, answer: str) -> str:
    """The gold answer as it is read: in the reader's own spelling where that is the same answer ('57,500')."""
    return answer if same_answer(answer, problem.gold, problem.kind) else f" {problem.gold}"


def _add_conflict(
    measured: Measured,
    variant: str,
    by_chain: Reading,
    by_question: Reading,
    step: int | None = None,
    seed: int | None = None,
) -> None:
    values = {
        "p_chain": by_chain.p,
        "p_question": by_question.p,
        "p_other": max(1 - by_chain.p - by_question.p, 0.0),
        "says_chain": float(by_chain.greedy),
        "says_question": float(by_question.greedy),
    }
    values = _undefined_with(values, by_chain, by_question)
    measured.add("conflict", variant, values, by_chain.n_tokens, step=step, seed=seed)


def _opposed(trunk: ChainReader, conflict: Conflict) -> tuple[Chain, list[str]]:
    """The chain of a conflict under its question, and what chain and question answer."""
    prompt = trunk.model.render(conflict.question)
    chain = replace(trunk.chain, prompt=prompt, steps=conflict.steps, variant=conflict.variant)
    return chain, [f" {conflict.chain_answer}", f" {conflict.question_answer}"]


def _add_options(measured: Measured, trunk: ChainReader, problem: Problem, draws: int, seed: int) -> None:
    """The same options in `draws` other orders: with the chain, its labels renamed to match, and with no chain."""
    labels = [f" {label}" for label in problem.labels]
    chain = trunk.chain
    orders = _other_orders(len(labels), draws, np.random.default_rng([seed, 8]))
    texts = [chain, replace(chain, steps=())]
    unsure = [i for i, step in enumerate(chain.steps) if edits.relabel(step, {}) is None]
    if unsure:
        measured.exclusions.append(
            f"options in another order, with the chain: a letter in steps {unsure} may be no label"
        )
    for draw, order in enumerate(orders):
        reordered = problem.reordered(order)
        if reordered is None:
            measured.exclusions.append("options in another order: the question does not hold them once as 'A) …' lines")
            return
        renamed = {problem.labels[old]: problem.labels[new] for new, old in enumerate(order)}
        steps = tuple(edits.relabel(step, renamed) or step for step in chain.steps)
        moved = replace(chain, prompt=trunk.model.render(reordered.question), variant=f"options_{draw}", steps=steps)
        texts += [moved, replace(moved, steps=())]
    found = trunk.read([(text, labels) for text in texts])
    p = [np.array([reading.p for reading in one.readings]) for one in found]
    for draw, order in enumerate(orders):
        for form, name in enumerate(("chain", "no_chain")):
            if unsure and name == "chain":
                continue
            at = 2 * (draw + 1) + form
            back = p[at][np.argsort(order)]
            values = {
                "tv": float(total_variation(p[form], back)),
                "same": float(p[form].argmax() == back.argmax()),
                "p_first": float(p[at][0]),
            }
            values = _undefined_with(values, found[form].readings[0], found[at].readings[0])
            measured.add("options", name, values, found[at].readings[0].n_tokens, seed=draw)


def _other_orders(n: int, draws: int, rng: np.random.Generator) -> list[list[int]]:
    """Up to `draws` distinct orders of `n` options, none of them the given one."""
    wanted = min(draws, math.factorial(n) - 1)
    orders: dict[tuple[int, ...], None] = {}
    while len(orders) < wanted:
        order = tuple(rng.permutation(n).tolist())
        if order != tuple(range(n)):
            orders[order] = None
    return [list(order) for order in orders]


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
