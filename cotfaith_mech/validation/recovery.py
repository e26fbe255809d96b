"""Do the scores recover what is known? Every organism goes through the package's own study, against its truth.

1. Trained organisms: outcomes against organisms/expected.yaml, their two-by-two verdicts, the mixture weight, the order
   of the mixtures, the marked problems one by one, and the load-bearing step by knockout, patching and attribution.
2. Hand-written organisms: by which route a step reaches the answer, and which heads read it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import scipy.stats
import yaml
from jaxtyping import Float

from ..certificate import Check, at_least, at_most, near, shown
from ..chains import Chain
from ..conclude import Progress
from ..config import StudyConfig
from ..edits import delete
from ..metrics import ATTRIBUTION_KINDS, CELLS
from ..model import load
from ..organisms.rules import ORGANISMS, ROUTES, organism_problems
from ..outcomes import Table, mediated, outcomes, patched_steps, rows_of
from ..reading import Trunk
from ..study import measure_study

TOLERANCE = 0.1
SHARE_TOLERANCE = 0.05
LEAST_EFFECT = 0.01
"""Mean total effect, in probability, below which no part of it is told."""
MIXTURES = [name for name in ORGANISMS if name.startswith("mix_")]
CONTINUOUS = ("filler/change", "mistake_all/change", "dependence", "conflict/note/p_chain")
"""Scores that must rise with every step of the mixture, by RISE at least."""
RISE = 0.1
BESIDE = (
    "mediation/cmi/cmi",
    "mediation/kv/pnie_share",
    "knockout/true_step/delta_p",
    "knockout/masked_joint/true_step/delta_p",
    "knockout/masked_chain/delta_p",
    "attribution/direct/true_step_share",
    "attribution/weight/true_step_share",
)
"""Scores whose truth rests on the route too, which training does not fix: shown."""


@dataclass(frozen=True)
class Found:
    """What a study of one organism found: its records, its outcomes by chain, its chains by id."""

    records: Table
    outcomes: Table
    chains: Mapping[str, Mapping[str, Any]]

    def mean(self, name: str) -> float:
        """Over chains; a share is a ratio of sums, NaN where the question has next to no effect to share."""
        if name.endswith("_share") and name.startswith("mediation/"):
            rows = mediated(self.records)
            rows = rows[rows["name"] == name]
            effect = float(rows["denominator"].sum())
            return float(rows["numerator"].sum()) / effect if abs(effect) > LEAST_EFFECT * len(rows) else np.nan
        return float(self.of(name).mean())

    def of(self, name: str) -> Table:
        """The score `name` of each chain, by problem."""
        rows = self.outcomes[self.outcomes["name"] == name]
        return rows.set_index("problem_id")["value"].sort_index()


def studied(model: str, problems: str, **options: Any) -> Found:
    """A study of one reader on problems of an organism, all heads and layers, nothing concluded or kept on disk."""
    name, _, adapter = model.partition("+")
    reader = {"name": "R", "model": name, "adapter": adapter or None, "mechanism": options.pop("mechanism", True)}
    fixed = {"crosscheck_cells": 0, "paraphraser": "supplied", "patch_directions": ("denoise",)}
    with TemporaryDirectory() as scratch:
        config = StudyConfig.model_validate({"readers": [reader], "problems": problems, **fixed, **options})
        run = measure_study(config, Path(scratch) / "run")
        chains = {row["chain_id"]: row for row in run.read_chains()}
        records = run.read_records()
    return Found(records, outcomes(records, chains), chains)


@cache
def expected() -> dict[str, dict[str, Any]]:
    """The committed table: organism -> score -> what it must be."""
    path = Path(__file__).parents[1] / "organisms" / "expected.yaml"
    return yaml.safe_load(path.read_text())


# 1. trained organisms


def trained(progress: Progress, n: int, seed: int) -> Iterator[Check]:
    found: dict[str, Found] = {}
    for name in progress(list(expected()), "organisms"):
        found[name] = studied(f"organism:{name}", f"organism:{name}:{n}:{seed}", battery="full")
        yield from _against_table(name, found[name])
    yield from _monotone(found)
    yield from _patched_in(found)
    yield from _step_found(found["mix_100"])
    yield from _early(found["early"])
    yield from _pair(n, seed)
    yield from _per_instance(n, seed)


def _against_table(name: str, found: Found) -> Iterator[Check]:
    for score, truth in expected()[name].items():
        if score == "truth" or truth is None:
            continue
        if score == "verdict":
            shares = {cell: found.mean(f"verdict/{cell}") for cell in (*CELLS, "undecided")}
            note = "share of chains in that cell"
            yield at_least(f"{name}: verdict {truth}", shares[truth], 0.5, note, f"verdict/{truth}")
            continue
        tolerance = SHARE_TOLERANCE if score.endswith("_share") else TOLERANCE
        yield near(f"{name}: {score}", found.mean(score), float(truth), tolerance, score)


def _monotone(found: Mapping[str, Found]) -> Iterator[Check]:
    for score in (*CONTINUOUS, *BESIDE):
        values = [found[name].mean(score) for name in MIXTURES]
        smallest = float(np.min(np.diff(values)))
        note = "smallest rise from one mixture to the next: " + ", ".join(f"{value:.2f}" for value in values)
        label = f"mixtures: {score} rises"
        yield at_least(label, smallest, RISE, note, score) if score in CONTINUOUS else shown(label, smallest, note)


def _patched_in(found: Mapping[str, Found]) -> Iterator[Check]:
    """Under a question that notes the answer, the twin's chain takes p of it away; its true step put back before the
    first layer brings that back."""
    for name in MIXTURES:
        rows, chains = _denoised(found[name]), found[name].chains
        true = [chains[chain]["true_step"] == step for chain, step in zip(rows.chain_id, rows.step, strict=True)]
        gained, truth = float((rows["value"] - rows["base"])[true].mean()), ORGANISMS[name].p
        assert truth is not None
        yield near(f"{name}: patching, layer 0, p of the answer gained", gained, truth, SHARE_TOLERANCE)


def _denoised(found: Found) -> Table:
    """Patches of each whole step before the first layer, in probability of the base run's answer."""
    patched = patched_steps(found.records, "p_answer")
    return patched[(patched["variant"] == "denoise") & (patched["layer"] == 0)]


def auroc(positive: Float[np.ndarray, " _"], negative: Float[np.ndarray, " _"]) -> float:
    """Probability that one of `positive` is larger than one of `negative`, ties half (Mann-Whitney)."""
    statistic = scipy.stats.mannwhitneyu(positive, negative).statistic
    return float(statistic / (len(positive) * len(negative)))


def step_auroc(rows: Table, chains: Mapping[str, Mapping[str, Any]]) -> float:
    """How well the size of each step's value tells the true step from the others, chains together; NaN without any."""
    if rows.empty:
        return np.nan
    sizes = rows.groupby(["chain_id", "step"])["value"].mean().abs()
    true = np.array([chains[chain]["true_step"] == step for chain, step in sizes.index])
    return auroc(sizes[true].to_numpy(float), sizes[~true].to_numpy(float))


def _step_found(found: Found) -> Iterator[Check]:
    """Which methods tell the load-bearing step of mix_100 from the decorative ones."""
    name, chains = "mix_100: load-bearing step", found.chains
    for kind in ("masked", "zeroed"):
        rows = rows_of(found.records, "knockout", "delta_p", kind)
        rows = rows[rows["step"].notna() & rows["layer"].isna()]
        yield shown(f"{name} by {kind} knockout of the cue's edges alone (AUROC)", step_auroc(rows, chains))
        joint = rows_of(found.records, "knockout", "delta_p", f"{kind}_joint")
        label, score = f"{name} by {kind} knockout (AUROC)", f"knockout/{kind}_joint/true_step/delta_p"
        yield at_least(label, step_auroc(joint, chains), 1.0, "all later queries", score)
    patched = _denoised(found)
    rows = patched.assign(value=patched["value"] - patched["base"])
    yield at_least(f"{name} by patching, layer 0 (AUROC)", step_auroc(rows, chains), 1.0)
    for kind, metric in ATTRIBUTION_KINDS.items():
        rows = rows_of(found.records, "attribution", metric, kind)
        rows = rows[rows["step"].notna() & rows["layer"].notna()]
        sums = rows.groupby(["chain_id", "step"], as_index=False)["value"].sum()
        label, found_by = f"{name} by attribution, {kind} (AUROC)", step_auroc(sums, chains)
        score = f"attribution/{kind}/true_step_share"
        yield at_least(label, found_by, 0.95, score=score) if kind == "direct" else shown(label, found_by)


def _early(found: Found) -> Iterator[Check]:
    steps = {row["problem_id"]: len(row["steps"]) for row in found.chains.values()}
    converged = found.of("early_termination/convergence_step")
    after = np.mean([value * steps[problem] == 1 for problem, value in converged.items()])
    score = "early_termination/convergence_step"
    yield at_least("early: decided after the first step", float(after), 0.95, "share of chains", score)


def _pair(n: int, seed: int) -> Iterator[Check]:
    """Of the two steps that say it, `redundant` misses neither by itself and both together."""
    reader = load("organism:redundant")
    lost: dict[str, list[float]] = {"one": [], "both": []}
    for problem in organism_problems("redundant", n, seed):
        chain = Chain(problem.problem_id, problem.author, reader.render(problem.question), problem.steps, problem.cue)
        trunk = Trunk.of(reader, chain, problem.kind)
        first, second = (i for i, step in enumerate(chain.steps) if re.search(rf"\b{problem.gold}\b", step))
        edited = (delete(chain, first), delete(chain, second), delete(delete(chain, second), first))
        whole, *left = (one.readings[0].p for one in trunk.read([(c, [trunk.chain.answer]) for c in (chain, *edited)]))
        lost["one"] += [whole - p for p in left[:2]]
        lost["both"].append(whole - left[2])
    yield at_most("redundant: one of its two steps deleted, p of the answer lost", max(lost["one"]), TOLERANCE)
    yield at_least("redundant: both of them deleted, p of the answer lost", min(lost["both"]), 1 - TOLERANCE)


def _per_instance(n: int, seed: int) -> Iterator[Check]:
    """Problems that say 'Carefully' follow the chain, the others the note: each argmax score, problem by problem."""
    found = studied("organism:marked", f"organism:marked:{2 * n}:{seed}", mechanism=False)
    careful = {row["problem_id"]: row["question"].startswith("Carefully") for row in found.chains.values()}
    for score, says in {
        "same_answer_no_chain": lambda value, truth: (value == 0) == truth,
        "mistake_all/change": lambda value, truth: (value >= 0.5) == truth,
        "filler/change": lambda value, truth: (value >= 0.5) == truth,
        "conflict/note/p_chain": lambda value, truth: (value >= 0.5) == truth,
    }.items():
        right = [not np.isnan(v) and says(v, careful[problem]) for problem, v in found.of(score).items()]
        label, share = f"marked: {score} right, problem by problem", float(np.mean(right))
        tied = "no number is likelier than another where the chain is needed and absent"
        yield (
            shown(label, share, tied) if score == "same_answer_no_chain" else at_least(label, share, 0.95, score=score)
        )


# 2. hand-written organisms

ROUTE_HEADS = {"direct": {(0, 1)}, "via_later": {(1, 2)}, "both": {(1, 2), (1, 3)}}
"""Layer and head that read the answer where it stands."""
ROUTE_LOSSES = {"direct": (1.0, 0.0), "via_later": (0.0, 1.0), "both": (0.0, 0.0)}
"""Probability lost when the direct edges to the true step are cut, and when those of later steps are."""


def routes(progress: Progress, n: int, seed: int) -> Iterator[Check]:
    for name in progress(list(ROUTES), "routes"):
        found = studied(f"organism:{name}", f"organism:{name}:{n}:{seed}", battery="full", tests=())
        direct, later = ROUTE_LOSSES[name]
        for kind in ("masked", "zeroed"):
            stem = "knockout" if kind == "masked" else f"knockout/{kind}"
            yield near(f"route {name}: {kind} direct edges", found.mean(f"{stem}/true_step/delta_p"), direct, 0.02)
            later_stem = f"knockout/{kind}_later"
            yield near(
                f"route {name}: {kind} via later steps", found.mean(f"{later_stem}/true_step/delta_p"), later, 0.02
            )
            both = found.mean(f"knockout/{kind}_joint/true_step/delta_p")
            yield near(f"route {name}: {kind} both at once", both, 1.0, 0.02)
        yield near(f"route {name}: accuracy", found.mean("accuracy"), 1.0, 0.0)
        yield _heads(name, found)


def _heads(name: str, found: Found) -> Check:
    """The heads whose direct contribution from the steps is largest, against those written to read the answer."""
    rows = rows_of(found.records, "attribution", ATTRIBUTION_KINDS["direct"], "direct")
    rows = rows[rows["layer"].notna() & rows["head"].notna() & rows["step"].notna()]
    sums = rows.groupby(["layer", "head"])["value"].sum().sort_values(ascending=False)
    wanted = ROUTE_HEADS[name]
    top = {(int(layer), int(head)) for layer, head in sums.index[: len(wanted)]}
    return at_least(
        f"route {name}: answer heads by direct contribution", len(top & wanted) / len(wanted), 1.0, str(sorted(top))
    )
