"""Several runs of one study side by side: training seeds, conditions, model sizes.

Each run holds a base and its fine-tunes on the same problems and says by its `labels` what it is. Runs whose labels
differ in `training_seed` alone are one group. Per group and estimate: the mean of the seeds' values with Student's t
over seeds, which speaks of training seeds on these problems; a group of one seed keeps its own interval over problems
and its note says that it speaks of these checkpoints. Groups are compared seed by seed means (Welch's t).
Source: MEASURES 'Comparing a model with its fine-tune' (every seed shown, t over seed means, at least 5 for a claim).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.stats
from jaxtyping import Float

from .compare import AT_CHANCE, primary_name
from .errors import CotfaithError
from .privacy import shared
from .records import RunDirectory
from .stats import LEVEL, Estimate, adjusted

SEED = "training_seed"
ENOUGH_SEEDS = 5
"""From here on a sentence may be about fine-tuning; below it is about these checkpoints."""


@dataclass(frozen=True)
class Merged:
    """An estimate of one group: `group` names its labels, `seeds` has the value of each training seed, by seed."""

    group: str
    estimate: Estimate
    seeds: Mapping[str, float]

    @property
    def alike(self) -> bool:
        """Several seeds of one value: their variance, and so an interval over seeds, cannot be told."""
        return len(self.seeds) > 1 and bool(np.ptp(list(self.seeds.values())) < 1e-9)


def group_of(labels: Mapping[str, Any]) -> str:
    """The labels without the training seed, as text."""
    return ", ".join(str(value) for name, value in labels.items() if name != SEED) or "study"


def merged(runs: Sequence[RunDirectory], primary: Sequence[str] = ()) -> list[Merged]:
    """Every estimate, group by group in the order of `runs`; `primary` endpoints (with the arm's end,
    as 'filler/change@/supplied', where chains of several authors were read) get Holm's p over each group's.

    Raises CotfaithError where two runs have the same labels, or rest on other problems or another base.
    """
    _check(runs)
    groups: dict[str, dict[str, dict[tuple[str, str], Estimate]]] = {}
    for run in runs:
        labels = labels_of(run)
        found = {(e.name, e.arm): e for e in run.read_estimates()}
        groups.setdefault(group_of(labels), {})[str(labels.get(SEED, ""))] = found
    rows = [row for name, seeds in groups.items() for row in _of_group(name, seeds)]
    return _with_holm(rows, [endpoint(runs[0], text) for text in primary])


def labels_of(run: RunDirectory) -> dict[str, Any]:
    return dict(run.read_manifest().get("config", {}).get("labels") or {})


def _check(runs: Sequence[RunDirectory]) -> None:
    seen: dict[str, str] = {}
    first: dict[str, dict[str, Any]] = {}
    for run in runs:
        if not (run.path / "estimates.parquet").is_file():
            raise CotfaithError(f"{run.path} has no estimates yet; run `cotfaith report {run.path}` first.")
        labels = labels_of(run)
        key = str(sorted(labels.items()))
        if key in seen:
            raise CotfaithError(
                f"{run.path} and {seen[key]} have the same labels {labels}; give each run its own `labels` in its "
                "study file."
            )
        seen[key] = str(run.path)
        manifest = run.read_manifest()
        what = _same_for_all(manifest)
        name = group_of(labels)
        others = first.setdefault(name, what)
        for key in sorted({*others, *what}):
            if others.get(key) != what.get(key):
                raise CotfaithError(
                    f"{run.path} differs from the other runs of {name!r} in its {key}: {what.get(key)!r}, not "
                    f"{others.get(key)!r}; give it a label of its own, or run it alike."
                )


def _same_for_all(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What runs of one group must share: problems, base, and how it was measured."""
    config = dict(manifest.get("config") or {})
    readers = config.pop("readers", None) or [{}]
    config.pop("labels", None)
    pinned = manifest.get("pinned") or {}
    base = pinned.get(f"reader {readers[0].get('name')}")
    return shared({"problems": pinned.get("data"), "base": base, **config})


def _of_group(name: str, seeds: Mapping[str, Mapping[tuple[str, str], Estimate]]) -> Iterator[Merged]:
    for key in dict.fromkeys(key for found in seeds.values() for key in found):
        own = {seed: found[key] for seed, found in seeds.items() if key in found and np.isfinite(found[key].value)}
        if own:
            values = {seed: estimate.value for seed, estimate in own.items()}
            yield Merged(name, _over_seeds(list(own.values())), values)


def _over_seeds(own: Sequence[Estimate]) -> Estimate:
    """Mean over seeds with Student's t; `n_problems` is the fewest of any seed."""
    values, n = np.array([estimate.value for estimate in own]), len(own)
    if n == 1:
        note = ", ".join(filter(None, ("one training seed: these checkpoints", own[0].note)))
        return replace(own[0], note=note)
    low, high, p = student(values)
    few = "" if n >= ENOUGH_SEEDS else f"{n} training seeds: these checkpoints"
    floor = sum(AT_CHANCE in estimate.note for estimate in own)
    few = ", ".join(filter(None, (few, f"{floor} of {n} seeds: {AT_CHANCE}" if floor else "")))
    fewest = min(estimate.n_problems for estimate in own)
    return Estimate(own[0].name, own[0].arm, fewest, float(values.mean()), low, high, p, f"t over {n} seeds", few)


def student(values: Float[np.ndarray, " seed"]) -> tuple[float, float, float]:
    """95% interval of the mean and p of 'it is 0'; all values alike give width 0, and p 1 where they are 0, else 0."""
    error = values.std(ddof=1) / np.sqrt(len(values))
    mean = float(values.mean())
    if error < 1e-12:
        return mean, mean, float(abs(mean) < 1e-12)
    half = scipy.stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * error
    return mean - half, mean + half, float(2 * scipy.stats.t.sf(abs(mean) / error, len(values) - 1))


def contrast(rows: Sequence[Merged], group: str, control: str, name: str, arm: str) -> Estimate | None:
    """`group` minus `control` in one estimate, Welch's t over their seeds; None where either has fewer than two."""
    found = {row.group: row for row in rows if (row.estimate.name, row.estimate.arm) == (name, arm)}
    if not {group, control} <= set(found) or min(len(found[one].seeds) for one in (group, control)) < 2:
        return None
    one, other = (np.array(list(found[key].seeds.values())) for key in (group, control))
    value = float(one.mean() - other.mean())
    method = f"Welch's t over {len(one)} and {len(other)} seeds"
    problems = min(found[key].estimate.n_problems for key in (group, control))
    if one.std() + other.std() < 1e-12:
        return Estimate(name, arm, problems, value, value, value, float(abs(value) < 1e-12), method)
    test: Any = scipy.stats.ttest_ind(one, other, equal_var=False)
    low, high = test.confidence_interval(LEVEL)
    return Estimate(name, arm, problems, value, float(low), float(high), float(test.pvalue), method)


def endpoint(run: RunDirectory, text: str) -> tuple[str, str]:
    """Name and arm of a primary endpoint written 'filler/change@/supplied' (after @ the end of the arm's name), of the
    second reader against the first, or of a single reader."""
    base, *tuned = (reader["name"] for reader in run.read_manifest()["config"]["readers"])
    name, _, end = text.partition("@")
    return primary_name(name), f"{tuned[0]}-{base}{end}" if tuned else f"{base}{end}"


def _with_holm(rows: Sequence[Merged], primary: Sequence[tuple[str, str]]) -> list[Merged]:
    wanted = set(primary)
    done = []
    for group in dict.fromkeys(row.group for row in rows):
        own = [row for row in rows if row.group == group]
        chosen = [row for row in own if (row.estimate.name, row.estimate.arm) in wanted]
        missing = len(wanted) - len(chosen)
        holm = adjusted([row.estimate.p for row in chosen] + [np.nan] * missing, "holm")
        notes = dict(zip(map(id, chosen), holm, strict=False))
        for row in own:
            if id(row) in notes:
                said = f"Holm p {notes[id(row)]:.4g} over {len(wanted)} primary endpoints"
                estimate = replace(row.estimate, note=", ".join(filter(None, (said, row.estimate.note))))
                row = replace(row, estimate=estimate)
            done.append(row)
    return done
