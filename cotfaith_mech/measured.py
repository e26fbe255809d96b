"""What one measurement of one unit gives: records, edited texts for the chain view, and what was left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .chains import Chain
from .records import Record


@dataclass(repr=False)
class Measured:
    """Collects the records of `reader` on `chain`; `exclusions` are reasons, one a line."""

    chain: Chain
    reader: str
    records: list[Record] = field(default_factory=list)
    texts: list[dict[str, Any]] = field(default_factory=list)
    exclusions: list[str] = field(default_factory=list)

    def add(self, measure: str, variant: str, values: Mapping[str, float], n_tokens: int, **where: Any) -> None:
        """One record per metric in `values`, all at the coordinates `where`."""
        self.records += [
            Record(
                problem_id=self.chain.problem_id,
                chain_id=self.chain.chain_id,
                author=self.chain.author,
                reader=self.reader,
                measure=measure,
                variant=variant,
                metric=metric,
                value=value,
                n_tokens=n_tokens,
                **where,
            )
            for metric, value in values.items()
        ]

    def __repr__(self) -> str:
        counts = f"{len(self.records)} records, {len(self.texts)} texts, {len(self.exclusions)} left out"
        return f"Measured({self.reader} on {self.chain.problem_id}: {counts})"
