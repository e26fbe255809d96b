"""The edited chains of the behavioural tests: text alone, each with the coordinates of its record.

1. Early Termination: keep s_1..s_i. 2. Filler Substitution: replace s_{i+1}..s_n by ' ...' of the same token count; in
full also by two other fillers, by one filler in all, and each step alone (filled or deleted). 3. Paraphrasing: rephrase
s_{i+1}..s_n; in full also each step alone. 4. Controls: mistake (in one step with later steps kept or, in full and as
the conflict of problems without one of their own, carried on through them; in every step), shuffle, swap with another
problem's chain.
5. The last steps usually state the answer (Lanham et al. 2307.13702, footnote 3): in full, 1 to 3 stand a second time
for the chain without the steps that state a*, their change counted from that shorter chain.
6. Beginnings that the reader writes on from (the re-sampled protocol of Lanham et al. for mistakes and paraphrase): the
first i steps as they are (the control), the first i rephrased, the first i with a mistake in the last of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from . import edits
from .answers import numbers, same_answer, states_answer
from .chains import Chain
from .errors import check_words
from .paraphrasers import Paraphrases
from .problems import Problem
from .records import CONTINUED, WITHOUT_ANSWER_STEPS

Test = Literal["early_termination", "filler", "paraphrase", "mistake", "shuffle", "swap", "conflict"]
Battery = Literal["core", "full"]
FILLERS = {"dots": " ...", "dashes": " --", "words": " hmm"}


@dataclass(frozen=True)
class BehaviourPlan:
    """Which tests, how many draws of each random edit, and whether every variant of a test or its main one alone.

    `continue_tokens`: how many tokens at most the reader writes on after an edited beginning; 0 leaves that out.
    `equal_length`: mistakes keep the number of tokens, so that positions stay aligned.
    """

    tests: tuple[Test, ...] = ("early_termination", "filler", "paraphrase", "mistake", "shuffle", "swap", "conflict")
    draws: int = 5
    battery: Battery = "core"
    continue_tokens: int = 0
    temperature: float = 0.0
    equal_length: bool = False

    def __post_init__(self) -> None:
        check_words("tests", self.tests, get_args(Test))
        check_words("battery", (self.battery,), get_args(Battery))


@dataclass(frozen=True)
class Variant:
    """An edited chain with the coordinates of its record; change is counted from `base` (None: the chain itself).

    `implied` is the answer that the edited chain comes to, where its edit says which.
    """

    measure: str
    variant: str
    chain: Chain
    step: int | None = None
    seed: int | None = None
    base: Chain | None = None
    implied: str | None = None


@dataclass(frozen=True)
class Editing:
    """What the edits of one chain need: its problem, paraphrases, donors for swap, a token counter, and the seed.

    `left_out` takes the reasons why an edit was not made.
    """

    chain: Chain
    problem: Problem
    plan: BehaviourPlan
    paraphrases: Paraphrases
    donors: Sequence[Chain]
    count: Callable[[str], int]
    seed: int
    left_out: list[str]

    def rng(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *stream])

    def has(self, test: Test) -> bool:
        return test in self.plan.tests

    def mistake(self, step: int, draw: int) -> edits.Mistake | None:
        """The same alteration of `step` wherever it is shown: alone, carried on, or to write on from."""
        return edits.mistake(self.chain, step, self.rng(2, step, draw), {self.problem.gold}, self._count_kept())

    def mistake_in_all(self, draw: int) -> Chain | None:
        return edits.mistake_all(self.chain, self.rng(3, draw), {self.problem.gold}, self._count_kept())

    def _count_kept(self) -> Callable[[str], int] | None:
        return self.count if self.plan.equal_length else None


def edited_chains(editing: Editing) -> Iterable[Variant]:
    """Every edited chain of the plan; with the full battery, the tests of curves also without answer-stating steps.

    Draws that came out alike count once: an interval over copies would be too narrow.
    """
    seen: set[tuple[str, str, int | None, Chain]] = set()
    repeats: Counter[str] = Counter()
    for variant in _all_edits(editing):
        key = (variant.measure, variant.variant, variant.step, variant.chain)
        if variant.seed is not None and key in seen:
            where = "" if variant.step is None else f" at step {variant.step}"
            repeats[f"{variant.measure} {variant.variant}{where}"] += 1
            continue
        seen.add(key)
        yield variant
    editing.left_out.extend(
        f"{name}: {n} {'draw repeats an earlier one and is' if n == 1 else 'draws repeat an earlier one and are'} "
        "not counted"
        for name, n in repeats.items()
    )


def _all_edits(editing: Editing) -> Iterable[Variant]:
    yield from _curve_tests(editing)
    if editing.has("mistake"):
        yield from _mistakes(editing)
    if editing.has("conflict") and not editing.problem.conflicts and editing.problem.kind == "number":
        yield from _conflicts(editing)
    if editing.has("shuffle"):
        yield from _shuffles(editing)
    if editing.has("swap"):
        if not editing.donors:
            editing.left_out.append("swap: there is no chain of another problem to put in")
        for draw, donor in enumerate(editing.donors):
            yield Variant("swap", "all", edits.swap(editing.chain, donor), seed=draw)
    if editing.plan.battery == "full":
        yield from _without_answer_steps(editing)


def _without_answer_steps(editing: Editing) -> Iterable[Variant]:
    chain = editing.chain
    silent = [i for i, step in enumerate(chain.steps) if not states_answer(step, chain.answer, editing.problem.kind)]
    if not silent:
        editing.left_out.append(f"{WITHOUT_ANSWER_STEPS}: every step states the answer {chain.answer.strip()!r}")
    elif len(silent) < len(chain.steps):
        shorter = replace(chain, steps=tuple(chain.steps[i] for i in silent))
        draws = tuple(tuple(draw[i] for i in silent) for draw in editing.paraphrases.draws)
        core = replace(editing.plan, battery="core")
        again = replace(editing, chain=shorter, plan=core, paraphrases=replace(editing.paraphrases, draws=draws))
        complete = [Variant("filler", "matched", shorter, len(silent))] if editing.has("filler") else []
        for variant in (*_curve_tests(again), *complete):
            name = "_".join(filter(None, (variant.variant, WITHOUT_ANSWER_STEPS)))
            yield replace(variant, variant=name, base=shorter)


def _curve_tests(editing: Editing) -> Iterable[Variant]:
    if editing.has("early_termination"):
        for keep in range(len(editing.chain.steps) + 1):
            yield Variant("early_termination", "", edits.truncate(editing.chain, keep), keep)
    if editing.has("filler"):
        yield from _fillers(editing.chain, editing.plan.battery, editing.count)
    if editing.has("paraphrase"):
        yield from _paraphrases(editing)


def _fillers(chain: Chain, battery: Battery, count: Callable[[str], int]) -> Iterable[Variant]:
    """Steps from i on (cumulative) and step i alone (local), by each filler: to the same length, or once in all.

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


def _paraphrases(editing: Editing) -> Iterable[Variant]:
    """Steps from i on; with the full battery step i alone too, and as many draws everywhere."""
    chain, full = editing.chain, editing.plan.battery == "full"
    for draw, texts in enumerate(editing.paraphrases.draws):
        if kept := [i for i, text in enumerate(texts) if text is None]:
            editing.left_out.append(f"paraphrase, draw {draw}: steps {kept} have no valid one and stay as they are")
        for first in range(len(chain.steps)):
            if full or first == 0 or draw == 0:
                rephrased, unchanged = edits.paraphrase(chain, texts, first)
                if len(unchanged) < len(chain.steps) - first:
                    yield Variant("paraphrase", "cumulative", rephrased, first, draw)
            if full and texts[first] is not None:
                yield Variant("paraphrase", "local", edits.paraphrase(chain, texts, first, first + 1)[0], first, draw)


def _mistakes(editing: Editing) -> Iterable[Variant]:
    left_out = editing.left_out
    for step in range(len(editing.chain.steps)):
        mistakes: list[edits.Mistake] = []
        for draw in range(editing.plan.draws):
            made = editing.mistake(step, draw)
            if made is None:
                left_out.append(f"mistake in step {step}: nothing to alter")
                break
            mistakes.append(made)
            yield Variant("mistake", "local", made.chain, step, draw)
        if editing.plan.battery == "full" and mistakes:
            yield from _propagated(editing, mistakes)
    for draw in range(editing.plan.draws):
        wrong = editing.mistake_in_all(draw)
        if wrong is None:
            left_out.append("mistake in all steps: nothing to alter")
            return
        yield Variant("mistake", "all", wrong, seed=draw)


def _propagated(editing: Editing, mistakes: Sequence[edits.Mistake]) -> Iterable[Variant]:
    """The mistakes of a step carried on through the later ones, with the answer the chain then comes to."""
    not_carried = []
    for draw, made in enumerate(mistakes):
        if (carried := _carried(editing, made)) is None:
            not_carried.append(draw)
        else:
            chain, implied = carried
            yield Variant("mistake", "propagated", chain, made.step, draw, implied=implied)
    if not_carried:
        reason = "no later step takes it up, a result could not be written, or the length would change"
        editing.left_out.append(f"mistake in step {mistakes[0].step}, draws {not_carried}, not carried on: {reason}")


def _carried(editing: Editing, made: edits.Mistake) -> tuple[Chain, str | None] | None:
    """The chain with `made` carried on, and the answer it then comes to where it came to a* before."""
    carried = edits.propagate(made)
    if carried is None:
        return None
    chain, values = carried
    if editing.plan.equal_length and editing.count(chain.text) != editing.count(editing.chain.text):
        return None
    return chain, edits.carried_answer(editing.chain.answer, values) if _ends_in_answer(editing) else None


def _ends_in_answer(editing: Editing) -> bool:
    """Whether the step the answer rests on (where unknown: the last with a number) comes to a*."""
    chain, true_step = editing.chain, editing.problem.true_step
    steps = [chain.steps[true_step]] if true_step is not None else [step for step in chain.steps if numbers(step)]
    result = edits.comes_to(steps[-1]) if steps else None
    return result is not None and same_answer(str(result), chain.answer, editing.problem.kind)


def _conflicts(editing: Editing) -> Iterable[Variant]:
    """Mistakes carried on to another answer: the question still has the gold one, the chain no longer."""
    answer, gold, made_any = editing.chain.answer, editing.problem.gold, False
    if not same_answer(answer, gold, "number") or not _ends_in_answer(editing):
        editing.left_out.append(f"conflict: question, chain and reader ({answer.strip()}) do not agree on {gold}")
        return
    for step in range(len(editing.chain.steps)):
        for draw in range(editing.plan.draws):
            made = editing.mistake(step, draw)
            carried = made and _carried(editing, made)
            if carried and (implied := carried[1]) is not None:
                made_any = True
                yield Variant("conflict", "carried", carried[0], step, draw, implied=implied)
    if not made_any:
        editing.left_out.append("conflict: no mistake can be carried on to another answer")


def _shuffles(editing: Editing) -> Iterable[Variant]:
    for draw in range(editing.plan.draws if editing.plan.battery == "full" else 1):
        shuffled = edits.shuffle(editing.chain, editing.rng(4, draw))
        if shuffled is None:
            editing.left_out.append("shuffle: fewer than two distinct steps")
            return
        yield Variant("shuffle", "all", shuffled, seed=draw)


def beginnings(editing: Editing) -> Iterable[Variant]:
    """Chains that end after some edited steps, for the reader to write on: one draw where it writes greedily.

    The step is the number of steps kept, for a mistake the index of the altered step, which is the last one kept.
    """
    chain = editing.chain
    for draw in range(editing.plan.draws if editing.plan.temperature else 1):
        for keep in range(len(chain.steps) + 1):
            start = edits.truncate(chain, keep)
            if editing.has("early_termination"):
                yield Variant("early_termination", CONTINUED, start, keep, draw)
            if editing.has("paraphrase") and keep and draw < len(editing.paraphrases.draws):
                rephrased, unchanged = edits.paraphrase(start, editing.paraphrases.draws[draw][:keep], 0)
                if len(unchanged) < keep:
                    yield Variant("paraphrase", CONTINUED, rephrased, keep, draw)
            if editing.has("mistake") and keep:
                made = editing.mistake(keep - 1, draw)
                if made is not None:
                    yield Variant("mistake", CONTINUED, edits.truncate(made.chain, keep), keep - 1, draw)
