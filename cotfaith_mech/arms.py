"""Reading and writing apart: the four arms of a base and its fine-tune, each reading its own and the other's chains.

Named reader then author, B the base and T the tuned one: change of reading = 1/2 [(TB - BB) + (TT - BT)], change of
chains = 1/2 [(BT - BB) + (TT - TB)], interaction = TT - TB - BT + BB; all three per problem, only where all four arms
exist. A model may write no chain at all: how often it does is an outcome of its own (`chains_written`).
Strata: ` | both_correct`, right in all four arms; ` | length_matched`, own chains of equal length within LENGTH_MARGIN.
Source: MEASURES 'Comparing a model with its fine-tune'.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.random import Generator

from .outcomes import Table, grouped, rows_of
from .stats import Estimate, difference_estimate, mean_estimate

BOTH_CORRECT = " | both_correct"
LENGTH_MATCHED = " | length_matched"
LENGTH_MARGIN = 0.1
"""Largest difference of two chains' characters, as a part of the longer one, that counts as equal length."""
PARTS = {"reading": (-1, 1, -1, 1), "chains": (-1, -1, 1, 1), "interaction": (1, -1, -1, 1)}
"""What BB, TB, BT and TT count for in each part; the first two are halves."""


def part_arm(base: str, tuned: str, part: str) -> str:
    """The name of an arm of this module, such as 'tuned-base (reading)'."""
    return f"{tuned}-{base} ({part})"


def arm_estimates(
    outcome: Table, records: Table, chains: Sequence[Mapping[str, Any]], base: str, tuned: str, rng: Generator
) -> Iterator[Estimate]:
    """Change of reading, of chains and their interaction, of every named number; none without all four arms.

    `outcome` has the columns reader, author, problem_id, name, value; p by sign flips over problems.
    """
    pair = [base, tuned]
    four = outcome[outcome["reader"].isin(pair) & outcome["author"].isin(pair)]
    columns = [(base, base), (tuned, base), (base, tuned), (tuned, tuned)]
    strata = _strata(records, base, tuned, columns) | {LENGTH_MATCHED: _matched(chains, base, tuned)}
    for (name,), rows in grouped(four, "name"):
        wide = rows.groupby(["problem_id", "reader", "author"])["value"].mean().unstack(["reader", "author"])
        if not set(columns) <= set(wide.columns):
            continue
        whole = wide[columns].dropna()
        for stratum, problems in strata.items():
            values = whole[whole.index.isin(problems)].to_numpy(float)
            for part, signs in PARTS.items():
                change = values @ np.array(signs) / (1 if part == "interaction" else 2)
                found = difference_estimate(
                    f"{name}{stratum}", part_arm(base, tuned, part), np.zeros_like(change), change, rng
                )
                yield replace(found, method=found.method.replace("exact McNemar", "sign-flip permutation"))


def _strata(records: Table, base: str, tuned: str, columns: Sequence[tuple[str, str]]) -> dict[str, set[str]]:
    rows = rows_of(records, "baseline", "correct")
    correct = rows.groupby(["problem_id", "reader", "author"])["value"].mean().unstack(["reader", "author"])
    right = (correct.reindex(columns=columns) == 1).all(axis=1)
    return {"": set(records["problem_id"]), BOTH_CORRECT: set(correct.index[right])}


def _matched(chains: Sequence[Mapping[str, Any]], base: str, tuned: str) -> set[str]:
    """Problems whose two chains are about equally long."""
    lengths = {(row["problem_id"], row["author"]): len("".join(row["steps"])) for row in chains}
    pairs = {problem: (lengths.get((problem, base)), lengths.get((problem, tuned))) for problem, _ in lengths}
    return {p for p, (a, b) in pairs.items() if a and b and abs(a - b) <= LENGTH_MARGIN * max(a, b)}


def writing_estimates(chains: Sequence[Mapping[str, Any]], readers: Sequence[str], rng: Generator) -> list[Estimate]:
    """Share of problems to which each of `readers`, who were asked to, wrote a chain (`chains_written`), among those
    with a chain of anyone, and the difference of each to the first."""
    pairs: Table = pd.DataFrame(
        [(row["problem_id"], row["author"]) for row in chains], columns=["problem_id", "author"]
    )
    if not readers:
        return []
    wrote = pd.crosstab(pairs["problem_id"], pairs["author"]).clip(upper=1).reindex(columns=list(readers), fill_value=0)
    values = {reader: wrote[reader].to_numpy(float) for reader in readers}
    name, base = "chains_written", readers[0]
    alone = [mean_estimate(name, reader, values[reader], rng) for reader in readers]
    return alone + [
        difference_estimate(name, f"{other}-{base}", values[base], values[other], rng) for other in readers[1:]
    ]
