"""Tidy tables that the figures and the report draw from: Records in, one small table per picture out.

1. Every table is averaged within a problem first, then over problems: the problem is the statistical unit.
2. Steps of a chain may stand in any order, so step tables are aligned by role: the step the answer rests on
   (`true step`) against the mean of the `other steps`; chains without a known true step have `all steps`.
3. Bands are percentile bootstrap intervals of the mean over problems, pointwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from .bridge import DISAGREEMENT
from .compare import primary_name
from .metrics import entropy_drop, infogain
from .outcomes import MAIN_VARIANT, Table, mid_layer, patched_steps
from .stats import Estimate

CURVES = ("early_termination", "filler", "paraphrase")
ROLES = ("true step", "other steps", "all steps")
BAND_DRAWS = 1000


@dataclass(frozen=True)
class Effect:
    """One way to weigh a step: its name in tables, its name for readers, its unit, and what a positive value means."""

    key: str
    label: str
    unit: str
    meaning: str


EFFECTS = (
    Effect("knockout", "attention knockout", "probability", "probability the answer loses when the cue cannot see it"),
    Effect("mistake", "mistake in the step", "total variation", "how far a mistake in it moves the answer"),
    Effect("patch", "patch at a middle layer", "logits", "logit difference restored by the source's activations"),
    Effect("direct", "direct contribution", "logits", "logits the heads carry from it straight to the answer"),
    Effect("infogain", "InfoGain of the step", "nats", "log-probability the gold answer gains when it is shown"),
    Effect("entropy_drop", "entropy drop of the step", "nats", "how far the answer becomes certain when it is shown"),
)


def one_author(
    records: Table, chains: Sequence[dict[str, Any]], config: dict[str, Any]
) -> tuple[Table, list[dict[str, Any]]]:
    """Records and chains of one author, where a run has several: a picture of one reader's scores must not mix whose
    chains it read. The one whose chains were opened, else the first."""
    authors = list(dict.fromkeys(str(chain["author"]) for chain in chains))
    if len(authors) < 2:
        return records, list(chains)
    names = {reader["name"] for reader in config.get("readers") or []}
    wanted = (config.get("mechanism_authors") or config.get("authors") or authors)[0]
    own = wanted if wanted in authors else next((author for author in authors if author not in names), authors[0])
    return records[records["author"] == own], [chain for chain in chains if chain["author"] == own]


def steps_of(chains: Sequence[dict[str, Any]]) -> Table:
    """One row per step of each chain: `chain_id step role`."""
    rows = []
    for chain in chains:
        true = chain.get("true_step")
        for step in range(len(chain["steps"])):
            role = "all steps" if true is None else "true step" if step == true else "other steps"
            rows.append({"chain_id": chain["chain_id"], "step": step, "role": role})
    frame: Table = pd.DataFrame(rows, columns=["chain_id", "step", "role"])
    return frame.astype({"step": "Int64"})


def select(records: Table, measure: str, metric: str, variant: str | None = None) -> Table:
    """The records of one measure and metric (and variant)."""
    keep = (records["measure"] == measure) & (records["metric"] == metric)
    if variant is not None:
        keep &= records["variant"] == variant
    return records[keep]


def band(values: Float[np.ndarray, "problem"], draws: int = BAND_DRAWS) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean of `values`; NaN where fewer than two are given."""
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return float("nan"), float("nan")
    rows = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[rows].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def curves(records: Table, chains: Sequence[dict[str, Any]]) -> Table:
    """Share of unchanged answers over the fraction of the chain kept.

    Returns `reader measure x value low high n`. Chains of unequal length are interpolated to a common grid of
    fractions; equal ones keep their own points. Each problem counts once.
    """
    lengths = {chain["chain_id"]: len(chain["steps"]) for chain in chains}
    grid = _fraction_grid(set(lengths.values()))
    rows = []
    for measure in CURVES:
        found = select(records, measure, "same", MAIN_VARIANT[measure]).dropna(subset=["step"])
        found = found[found["chain_id"].isin(list(lengths))]
        for reader, of_reader in found.groupby("reader"):
            curve = np.array([_curve(one, lengths, grid) for _, one in of_reader.groupby("problem_id")])
            rows += _curve_rows(str(reader), measure, grid, curve)
    return pd.DataFrame(rows, columns=["reader", "measure", "x", "value", "low", "high", "n"])


def _fraction_grid(lengths: set[int]) -> Float[np.ndarray, "x"]:
    n = lengths.pop() if len(lengths) == 1 else 10
    return np.arange(n + 1) / n


def _curve(records: Table, lengths: dict[str, int], grid: Float[np.ndarray, "x"]) -> Float[np.ndarray, "x"]:
    """One problem's curve at `grid`: mean over its chains; NaN outside the fractions that were measured."""
    rows = []
    chain_ids, step, value = (records[name].to_numpy() for name in ("chain_id", "step", "value"))
    for chain in dict.fromkeys(chain_ids):
        own = chain_ids == chain
        kept, place, count = np.unique(step[own].astype(float), return_inverse=True, return_counts=True)
        means = np.bincount(place, value[own].astype(float)) / count
        rows.append(np.interp(grid, kept / lengths[str(chain)], means, left=np.nan, right=np.nan))
    return np.mean(rows, axis=0)


def _curve_rows(
    reader: str, measure: str, grid: Float[np.ndarray, "x"], curve: Float[np.ndarray, "problem x"]
) -> list[dict[str, Any]]:
    rows = []
    for x, values in zip(grid, curve.T, strict=True):
        n = int((~np.isnan(values)).sum())
        if n:
            low, high = band(values)
            value = float(np.nanmean(values))
            row = {"reader": reader, "measure": measure, "x": x, "value": value, "low": low, "high": high, "n": n}
            rows.append(row)
    return rows


def trace(records: Table, chains: Sequence[dict[str, Any]]) -> Table:
    """Mean lens probability of a*'s first visible token: `reader layer x value n`, x the fraction of the chain kept.

    Chains of unequal length are interpolated as in `curves`; each problem counts once.
    """
    lengths = {chain["chain_id"]: len(chain["steps"]) for chain in chains}
    found = select(records, "decision_trace", "p_answer", "logit_lens")
    found = found[found["chain_id"].isin(list(lengths))]
    grid = _fraction_grid({lengths[chain] for chain in found["chain_id"].unique()} or {1})
    rows = []
    for (reader, layer), of_layer in found.groupby(["reader", "layer"]):
        curve = np.array([_curve(one, lengths, grid) for _, one in of_layer.groupby("problem_id")])
        rows += [
            {"reader": str(reader), "layer": int(layer), "x": x, "value": float(value), "n": len(curve)}
            for x, value in zip(grid, curve.mean(0), strict=True)
        ]
    return pd.DataFrame(rows, columns=["reader", "layer", "x", "value", "n"])


def patches(records: Table) -> Table:
    """Patching cells as effects: `reader problem_id chain_id variant site layer step effect gap`.

    effect = logit difference of the edited run minus that of the base run (logits); gap = source minus base, so
    that the sum of effects over the sum of gaps is the recovered share.
    """
    cells = patched_steps(records)
    cells = cells.assign(effect=cells["value"] - cells["base"], gap=cells["source"] - cells["base"])
    return cells.drop(columns=["author", "value", "base", "source"])


def chain_maps(records: Table, chain: dict[str, Any]) -> Iterator[tuple[str, str, Table]]:
    """Of one chain, every variant patched by single heads at steps ("heads") or by single tokens ("tokens"): the
    variant, which of the two, and `reader site layer head step position effect`, in logits."""
    own = records[(records["chain_id"] == chain["chain_id"]) & (records["measure"] == "patching")]
    for variant, rows in own.groupby("variant"):
        cells = rows[(rows["metric"] == "logit_diff") & rows["layer"].notna()]
        references = rows[rows["metric"] == "logit_diff_base"]
        joint = references[references["step"].isna()].groupby("reader")["value"].mean()
        of_step = references[references["step"].notna()].groupby(["reader", "step"])["value"].mean()
        where = list(zip(cells["reader"], cells["step"], strict=True))
        base = [of_step.get(at) if at in of_step.index else joint.get(at[0], np.nan) for at in where]
        cells = cells.assign(effect=cells["value"] - base)
        heads = cells["head"].notna() & cells["step"].notna() & cells["position"].isna()
        tokens = cells["head"].isna() & cells["position"].notna()
        for draw, chosen in (("heads", heads), ("tokens", tokens)):
            if chosen.any():
                yield str(variant), draw, cells[chosen]


def aligned_patches(records: Table, chains: Sequence[dict[str, Any]]) -> Table:
    """Mean patching effect by role of the step: `reader variant role layer site effect low high recovered n`."""
    of_problem = _patches_of_problems(records, chains)
    keys = ["reader", "variant", "role", "layer", "site"]
    table = of_problem.groupby(keys, as_index=False).agg(
        effect=("effect", "mean"),
        low=("effect", _low),
        high=("effect", _high),
        gap=("gap", "mean"),
        n=("effect", "size"),
    )
    table["recovered"] = table["effect"] / table["gap"].where(table["gap"] != 0)
    return table.drop(columns="gap")


def patch_differences(records: Table, chains: Sequence[dict[str, Any]], readers: Sequence[str]) -> Table:
    """Mean difference of the patching effect to the first reader's on the same problem, in the columns of
    `aligned_patches` without `site` and `recovered`; `reader` is the other one."""
    of_problem = _patches_of_problems(records, chains)
    keys = ["variant", "role", "layer"]
    base = of_problem[of_problem["reader"] == readers[0]]
    both = of_problem[of_problem["reader"] != readers[0]].merge(base, on=[*keys, "problem_id"], suffixes=("", "_base"))
    both["effect"] -= both["effect_base"]
    return both.groupby(["reader", *keys], as_index=False).agg(
        effect=("effect", "mean"), low=("effect", _low), high=("effect", _high), n=("effect", "size")
    )


def _patches_of_problems(records: Table, chains: Sequence[dict[str, Any]]) -> Table:
    cells = patches(records).merge(steps_of(chains), on=["chain_id", "step"])
    keys = ["reader", "variant", "role", "layer", "site", "problem_id"]
    return cells.groupby(keys, as_index=False)[["effect", "gap"]].mean()


def _low(values: Any) -> float:
    return band(values.to_numpy(float))[0]


def _high(values: Any) -> float:
    return band(values.to_numpy(float))[1]


def conflict(records: Table) -> Table:
    """Mean probability of each party's answer: `reader variant p_chain p_question p_other n`."""
    found = records[(records["measure"] == "conflict") & records["metric"].isin(["p_chain", "p_question", "p_other"])]
    keys = ["reader", "variant", "problem_id", "metric"]
    of_step = found.groupby([*keys, "step"], dropna=False)["value"].mean()
    of_problem = of_step.groupby(keys).mean().unstack("metric")
    of_problem = of_problem.reindex(columns=["p_chain", "p_question", "p_other"])
    grouped = of_problem.groupby(["reader", "variant"])
    return grouped.mean().assign(n=grouped.size()).reset_index()


def knockout(records: Table, chains: Sequence[dict[str, Any]]) -> Table:
    """Probability lost by the answer: `reader role problem_id value`; the role `random` is the control."""
    masked = select(records, "knockout", "delta_p", "masked").merge(steps_of(chains), on=["chain_id", "step"])
    control = select(records, "knockout", "delta_p", "masked_random").assign(role="random")
    both: Table = pd.concat([masked, control], ignore_index=True)
    return both.groupby(["reader", "role", "problem_id"], as_index=False)["value"].mean()


def knockout_matrix(records: Table, chain: dict[str, Any]) -> Table:
    """Probability lost by the answer when part i of a chain cannot see step j: `reader row step value`.

    Row i is step i, row n the cue and the answer.
    """
    own = records[(records["chain_id"] == chain["chain_id"]) & (records["measure"] == "knockout")]
    own = own[(own["metric"] == "delta_p") & own["step"].notna()]
    row = own["variant"].str.extract(r"^masked_from_step_(\d+)$")[0].astype(float)
    table = own.assign(row=row.where(own["variant"] != "masked", len(chain["steps"]))).dropna(subset=["row"])
    return table[["reader", "row", "step", "value"]].astype({"row": int, "step": int})


def cross_model(records: Table) -> Table:
    """Mean P(chain's answer) with one layer of the other model: `reader into rows layer value low high n`.

    Rows without a layer are the whole models' own values: `into` names the model, `rows` is "own". The conflict is the
    one whose layers were exchanged; each problem counts once.
    """
    columns = ["reader", "into", "rows", "layer", "value", "low", "high", "n"]
    found = select(records, "cross_model", "p_chain")
    if found.empty:
        return pd.DataFrame(columns=columns)
    cells = [variant.split("/") for variant in found["variant"]]
    names = {"write_base_read_base": ("base", "own"), "write_tuned_read_tuned": ("tuned", "own")}
    into = [names.get(cell[-1], (cell[1].removeprefix("into_"), cell[-1])) for cell in cells]
    found = found.assign(
        conflict=[cell[0] for cell in cells], into=[one for one, _ in into], rows=[one for _, one in into]
    )
    own = found["rows"] == "own"
    keys = found["problem_id"].astype(str) + "/" + found["conflict"]
    found = found[keys.isin(keys[found["layer"].notna()]) & (own | found["layer"].notna())]
    rows = []
    for (reader, into, part, layer), one in found.groupby(["reader", "into", "rows", "layer"], dropna=False):
        values = one.groupby("problem_id")["value"].mean().to_numpy(float)
        low, high = band(values)
        rows.append((reader, into, part, layer, float(values.mean()), low, high, len(values)))
    return pd.DataFrame(rows, columns=columns)


def attribution(records: Table, chains: Sequence[dict[str, Any]]) -> Table:
    """Mean direct logit contribution of each head from the true step: `reader layer head value n`."""
    found = select(records, "attribution", "contribution", "direct").dropna(subset=["step", "layer", "head"])
    found = found.merge(steps_of(chains), on=["chain_id", "step"])
    found = found[found["role"] == "true step"]
    of_problem = found.groupby(["reader", "layer", "head", "problem_id"], as_index=False)["value"].mean()
    return of_problem.groupby(["reader", "layer", "head"], as_index=False).agg(
        value=("value", "mean"), n=("problem_id", "nunique")
    )


def step_effects(records: Table) -> Table:
    """Every measured effect of every single step: `effect reader problem_id chain_id step value` (keys of EFFECTS).

    The patch is the denoising one (noising where no other exists) at the middle of the recorded layers; the direct
    contribution is summed over heads and layers; InfoGain and entropy drop come from the early-termination curve.
    """
    keys = ["reader", "problem_id", "chain_id", "step"]
    masked = select(records, "knockout", "delta_p", "masked")
    mistake = select(records, "mistake", "tv", "local")
    direct = select(records, "attribution", "contribution", "direct").dropna(subset=["step", "layer"])
    tables = {
        "knockout": masked.groupby(keys)["value"].mean(),
        "mistake": mistake.groupby(keys)["value"].mean(),
        "patch": _middle_patch(patches(records), keys),
        "direct": direct.groupby(keys)["value"].sum(min_count=1),
        "infogain": _gains(select(records, "early_termination", "p_gold", ""), keys, infogain),
        "entropy_drop": _gains(select(records, "early_termination", "entropy", ""), keys, entropy_drop),
    }
    frames = [table.reset_index(name="value").assign(effect=name) for name, table in tables.items() if len(table)]
    columns = ["effect", *keys, "value"]
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)


def _middle_patch(cells: Table, keys: list[str]) -> Table:
    if cells.empty:
        return pd.Series(dtype=float)
    main = cells.groupby("chain_id")["variant"].agg(main_patch)
    cells = cells[cells["variant"] == cells["chain_id"].map(main)]
    cells = cells[cells["layer"] == mid_layer(cells["layer"].tolist())]
    return cells.groupby(keys)["effect"].mean()


def main_patch(variants: Any) -> str:
    """The variant that stands for patching where one is shown: denoising before noising, the plainest of each."""
    return min(variants, key=lambda variant: (variant.count("/"), variant))


def _gains(curves: Table, keys: list[str], score: Callable[[Any], Any]) -> Table:
    """`score` of each chain's curve over kept steps 0..n: one value a step, NaN where it has none."""
    parts = []
    for unit, curve in curves.groupby(keys[:-1]):
        points = curve.groupby("step")["value"].mean()
        if points.index.tolist() == list(range(len(points))) and len(points) > 1:
            index = pd.MultiIndex.from_tuples([(*unit, step) for step in range(len(points) - 1)], names=keys)
            parts.append(pd.Series(score(points.to_numpy(float)), index))
    return pd.concat(parts).dropna() if parts else pd.Series(dtype=float)


def bridge(records: Table) -> Table:
    """Behaviour against mechanism per step: `reader problem_id chain_id step mistake knockout`."""
    effects = step_effects(records)
    keys = ["reader", "problem_id", "chain_id", "step"]
    wide = effects.pivot_table(index=keys, columns="effect", values="value").reset_index()
    if not {"mistake", "knockout"} <= set(wide.columns):
        return pd.DataFrame(columns=[*keys, "mistake", "knockout"])
    return wide[[*keys, "mistake", "knockout"]].dropna()


def disagreements(manifest: dict[str, Any]) -> Table:
    """The chains that bridge.py found to disagree, kept in the manifest; knockout first, then the largest behaviour."""
    table: Table = pd.DataFrame(manifest.get("disagreements") or [], columns=list(DISAGREEMENT))
    order = table.assign(other=table["mechanism"] != "knockout")
    return order.sort_values(["other", "behaviour"], ascending=[True, False], ignore_index=True)[list(DISAGREEMENT)]


def readers_of(config: dict[str, Any], records: Table) -> list[str]:
    """Readers with records, in the config's order (the first is the one the others are compared with)."""
    named = [reader["name"] if isinstance(reader, dict) else str(reader) for reader in config.get("readers") or []]
    found = set(records["reader"])
    return [name for name in named if name in found] + sorted(found - set(named))


def present(readers: Sequence[str], table: Table) -> list[str]:
    """The readers that `table` has rows of, in their order."""
    found = set(table["reader"])
    return [reader for reader in readers if reader in found]


def differences(readers: Sequence[str], table: Table) -> list[tuple[str, str]]:
    """Every other reader of `table` against the first of all, the untuned one: [(B, A), (C, A)]."""
    found = present(readers, table)
    return [(reader, readers[0]) for reader in found if readers[0] in found and reader != readers[0]]


def tuned_reader(arm: str, readers: Sequence[str]) -> str | None:
    """B of a difference arm "B-A" or "B-A/author"; None for the arm of a single reader."""
    pairs = {f"{reader}-{readers[0]}": reader for reader in readers[1:]}
    return next((reader for pair, reader in pairs.items() if arm == pair or arm.startswith(pair + "/")), None)


def primary_differences(
    estimates: Sequence[Estimate], config: dict[str, Any], readers: Sequence[str]
) -> list[Estimate]:
    """Differences of the endpoints fixed beforehand in the config, in its order; without any, every tested one."""
    compared = [estimate for estimate in estimates if tuned_reader(estimate.arm, readers)]
    fixed = [primary_name(name) for name in config.get("primary") or []]
    named = fixed or [estimate.name for estimate in compared if np.isfinite(estimate.p)]
    order = {name: rank for rank, name in enumerate(dict.fromkeys(named))}
    return sorted((e for e in compared if e.name in order), key=lambda e: order[e.name])
