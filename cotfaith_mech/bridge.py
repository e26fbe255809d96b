"""Do behaviour and mechanism name the same steps? (MEASURES.md, 'The bridge'.)

1. Behaviour b_j: mean total variation over the mistakes drawn in step j, later steps kept.
2. Mechanism m_j, three kinds: `knockout` (probability lost when the cue cannot see step j), `patch` (how far a patch
   of step j at the layer named beforehand, donated by the chain's twin, moves the answer's probability), `direct`
   (logits all heads carry from step j). None is the text edit in another dress: those identities are engine tests.
3. Effects that do not pass the 95th percentile of their control are ties: random prompt positions for the knockout, a
   norm-matched random direction for the patch. The direct contribution has no control.
4. Top-1 agreement against its chance; Spearman within chains of at least 5 steps, and pooled; beside the pooled rho
   what position alone and 'is the last step' alone reach, and the partial rho given those, length and confidence.
5. Intervals resample problems; p shuffles behaviour within chains.
6. Chains where the two name different steps are listed: a researcher reads that list first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
from jaxtyping import Bool, Float, Int
from numpy.random import Generator

from .outcomes import Chains, Table, mid_layer, patched_steps
from .records import WITHOUT_ANSWER_STEPS
from .stats import Estimate, cluster_estimate, mean_estimate, within_chain_p

MECHANISMS = ("knockout", "patch", "direct")
MIN_STEPS_FOR_RHO = 5
MIN_DRAWS = 5
CONTROL_QUANTILE = 0.95
LARGE = 0.5
SILENT = f" | {WITHOUT_ANSWER_STEPS}"
KEYS = ["reader", "problem_id", "chain_id", "step"]
DISAGREEMENT = (
    "reader",
    "problem_id",
    "chain_id",
    "mechanism",
    "step_behaviour",
    "step_mechanism",
    "behaviour",
    "effect",
    "reason",
)


def bridge(
    records: Table,
    chains: Sequence[Mapping[str, Any]],
    readers: Sequence[str],
    rng: Generator,
    layer: int | None = None,
) -> tuple[list[Estimate], pd.DataFrame]:
    """Estimates `bridge/mistake~<mechanism>/<score>` of each reader, and the table of disagreeing chains.

    `layer` is the patched layer to use, the middle one of those patched by default. Where a chain row lists
    `answer_steps` (steps that state the answer), everything is given a second time without them.
    """
    by_id = {row["chain_id"]: row for row in chains}
    table = step_table(records, by_id, layer)
    estimates: list[Estimate] = []
    lists = []
    for reader in readers:
        for mechanism in MECHANISMS:
            rows = table[table["reader"] == reader].dropna(subset=["mistake", mechanism])
            if rows.empty:
                continue
            estimates += _scores(rows, reader, mechanism, "", rng)
            if rows["states_answer"].any():
                kept = rows[~rows["states_answer"]]
                estimates += _scores(kept, reader, mechanism, SILENT, rng)
            lists += [_disagreement(chain, mechanism) for _, chain in rows.groupby("chain_id")]
    found = [row for row in lists if row is not None]
    return estimates, pd.DataFrame(found, columns=list(DISAGREEMENT))


# 1.-3. one row a step


def step_table(records: Table, chains: Chains, layer: int | None = None) -> Table:
    """One row a (reader, chain, step), sorted: behaviour `mistake`, mechanisms (ties already 0), covariates.

    Covariates: position (0 first, 1 last), is_last, characters, n_tokens, confidence (p of a*). A column without
    records is NaN.
    """
    mistake = _select(records, "mistake", "tv", "local")
    masked, random = (_select(records, "knockout", "delta_p", variant) for variant in ("masked", "masked_random"))
    control = records[(records["measure"] == "control") & (records["metric"] == "delta_p")]
    norm_matched = _twin_else_filler(control, "norm_matched")
    columns = {
        "knockout": _above_control(_per_step(masked, "knockout"), random),
        "patch": _above_control(_patch_effects(records, layer), norm_matched.assign(value=norm_matched["value"].abs())),
        "direct": _direct_contributions(records),
    }
    table = _per_step(mistake, "mistake")
    for steps in columns.values():
        table = table.merge(steps, on=KEYS, how="left")
    per_chain = {
        "draws": mistake.groupby(KEYS)["value"].size().groupby(KEYS[:3]).min(),
        "n_tokens": mistake.groupby(KEYS[:3])["n_tokens"].mean(),
        "confidence": _select(records, "baseline", "p_answer", "").groupby(KEYS[:3])["value"].mean(),
    }
    for column, values in per_chain.items():
        table = table.join(values.astype(float).rename(column), on=KEYS[:3])
    return _with_covariates(table.sort_values(KEYS, ignore_index=True), chains)


def _select(records: Table, measure: str, metric: str, variant: str) -> Table:
    rows = (records["measure"] == measure) & (records["metric"] == metric) & (records["variant"] == variant)
    return records[rows]


def _per_step(rows: Table, column: str) -> Table:
    return rows.groupby(KEYS)["value"].mean().rename(column).reset_index()


def _patch_effects(records: Table, layer: int | None) -> Table:
    """|p(a*) after the noising patch - p(a*) of the base run| at one layer, by the twin or, without one, by filler."""
    edited = patched_steps(records, "p_answer")
    edited = _twin_else_filler(edited, "noise")
    if not edited.empty:
        edited = edited[edited["layer"] == (mid_layer(edited["layer"]) if layer is None else layer)]
    return _per_step(edited.assign(value=(edited["value"] - edited["base"]).abs()), "patch")


def _direct_contributions(records: Table) -> Table:
    rows = _select(records, "attribution", "contribution", "direct")
    rows = rows[rows["step"].notna() & rows["layer"].notna()]
    return rows.groupby(KEYS)["value"].sum().rename("direct").reset_index()


def _twin_else_filler(rows: Table, variant: str) -> Table:
    """The rows of `variant`, and those by filler of chains that have none of it."""
    chosen = rows[rows["variant"] == variant]
    filled = rows[rows["variant"] == f"{variant}/filler"]
    return pd.concat([chosen, filled[~filled["chain_id"].isin(chosen["chain_id"])]])


def _above_control(steps: Table, control: Table) -> Table:
    """Effects (the last column) not above their reader's control become 0: ties. No control, no ties."""
    column = steps.columns[-1]
    floor = control.groupby("reader")["value"].quantile(CONTROL_QUANTILE).clip(lower=0)
    above = ~(steps[column] <= steps["reader"].map(floor).astype(float))
    return steps.assign(**{column: steps[column].where(above, 0.0)})


def _with_covariates(table: Table, chains: Chains) -> Table:
    rows = [chains.get(chain, {}) for chain in table["chain_id"]]
    steps = table["step"].astype(int).tolist()
    last = [len(row["steps"]) - 1 if row else np.nan for row in rows]
    return table.assign(
        position=[step / n if n else 0.0 for step, n in zip(steps, last, strict=True)],
        is_last=[float(step == n) for step, n in zip(steps, last, strict=True)],
        characters=[float(len(row["steps"][step])) if row else np.nan for step, row in zip(steps, rows, strict=True)],
        states_answer=[step in row.get("answer_steps", ()) for step, row in zip(steps, rows, strict=True)],
    )


# 4.-5. scores of one reader and one mechanism


def _scores(rows: Table, reader: str, mechanism: str, suffix: str, rng: Generator) -> list[Estimate]:
    """All scores of `rows`, the steps of one reader's chains, sorted by chain."""
    rows = rows.reset_index(drop=True)
    stem = f"bridge/mistake~{mechanism}/"
    few = rows["draws"].min() < MIN_DRAWS if len(rows) else False
    note = f"some chain has fewer than {MIN_DRAWS} mistakes in a step" if few else ""
    estimates = [
        *_top1(rows, mechanism, rng),
        _rho_within(rows, mechanism, rng),
        *_pooled(rows, mechanism, rng),
    ]
    return [
        replace(e, name=f"{stem}{e.name}{suffix}", arm=reader, note=", ".join(filter(None, (note, e.note))))
        for e in estimates
    ]


def _long_enough(rows: Table, n_steps: int) -> Table:
    return rows[rows.groupby("chain_id")["step"].transform("size") >= n_steps].reset_index(drop=True)


def _starts(rows: Table) -> Int[np.ndarray, " chain"]:
    """First row of each chain; the rows of a chain stand together."""
    chain = rows["chain_id"].to_numpy()
    return np.flatnonzero(np.r_[True, chain[1:] != chain[:-1]]) if len(chain) else np.zeros(0, int)


def agreement(
    behaviour: Float[np.ndarray, " row"], effect: Float[np.ndarray, " row"], starts: Int[np.ndarray, " chain"]
) -> Float[np.ndarray, " chain"]:
    """Chance that the largest of each agree, a chain at a time, when ties are broken at random; 0 or 1 without ties."""
    tops = [_tops(values, starts) for values in (behaviour, effect)]
    common, *sizes = (np.add.reduceat(mask, starts, dtype=float) for mask in (tops[0] & tops[1], *tops))
    return common / (sizes[0] * sizes[1])


def _tops(values: Float[np.ndarray, " row"], starts: Int[np.ndarray, " chain"]) -> Bool[np.ndarray, " row"]:
    lengths = np.diff(np.r_[starts, len(values)])
    return values >= np.repeat(np.maximum.reduceat(values, starts), lengths) - 1e-12


def _top1(rows: Table, mechanism: str, rng: Generator) -> list[Estimate]:
    rows = _long_enough(rows, 2)
    if rows.empty:
        reason = "no chain has two steps"
        return [_undefined(name, reason) for name in ("top1", "top1_chance")]
    behaviour, effect, starts = rows["mistake"].to_numpy(float), rows[mechanism].to_numpy(float), _starts(rows)
    problems = rows["problem_id"].to_numpy()[starts]
    p = within_chain_p(
        behaviour, rows["chain_id"].to_numpy(), lambda b: float(agreement(b, effect, starts).mean()), rng
    )
    lengths = np.diff(np.r_[starts, len(rows)])
    by_problem = pd.DataFrame({"found": agreement(behaviour, effect, starts), "chance": 1 / lengths}).groupby(problems)
    means: Table = by_problem.mean()
    top1 = mean_estimate("top1", "", means["found"].to_numpy(float), rng)
    chance = mean_estimate("top1_chance", "", means["chance"].to_numpy(float), rng)
    return [replace(top1, p=p, method=f"{top1.method}, p within-chain permutation"), chance]


def _undefined(name: str, reason: str) -> Estimate:
    return Estimate(name, "", 0, np.nan, np.nan, np.nan, np.nan, "none", reason)


def _rho_within(rows: Table, mechanism: str, rng: Generator) -> Estimate:
    """Mean of the chains' own Spearman rho; a chain in which either side is one tie has none and is left out."""
    rows = _long_enough(rows, MIN_STEPS_FOR_RHO)
    groups = [chain for _, chain in rows.groupby("chain_id") if (chain[["mistake", mechanism]].nunique() > 1).all()]
    if not groups:
        return _undefined("rho_within", f"no chain has {MIN_STEPS_FOR_RHO} steps that differ on both sides")
    rows = pd.concat(groups, ignore_index=True)
    behaviour, effect = (
        np.concatenate([_standard_ranks(chain[column].to_numpy(float)) for chain in groups])
        for column in ("mistake", mechanism)
    )
    starts = _starts(rows)

    def rhos(b: Float[np.ndarray, " row"]) -> Float[np.ndarray, " chain"]:
        return np.add.reduceat(b * effect, starts)

    p = within_chain_p(behaviour, rows["chain_id"].to_numpy(), lambda b: float(rhos(b).mean()), rng)
    means: Table = pd.Series(rhos(behaviour)).groupby(rows["problem_id"].to_numpy()[starts]).mean()
    estimate = mean_estimate("rho_within", "", means.to_numpy(float), rng)
    return replace(estimate, p=p, method=f"{estimate.method}, p within-chain permutation")


def _standard_ranks(values: Float[np.ndarray, " row"]) -> Float[np.ndarray, " row"]:
    """Ranks with mean 0 and norm 1, so that the product sum of two is Spearman's rho; NaN where all are one tie."""
    ranks = scipy.stats.rankdata(values)
    ranks = ranks - ranks.mean()
    norm = np.linalg.norm(ranks)
    return ranks / norm if norm > 1e-9 else np.full(len(ranks), np.nan)


def spearman(x: Float[np.ndarray, " row"], y: Float[np.ndarray, " row"]) -> float:
    """Spearman's rho; NaN where either side is one tie."""
    return float(_standard_ranks(x) @ _standard_ranks(y))


def _residual_ranks(
    values: Float[np.ndarray, "row side"], covariates: Float[np.ndarray, "row covariate"]
) -> Float[np.ndarray, "row side"]:
    """What of the ranks of each column of `values` the ranks of `covariates` do not give linearly, scaled to norm 1."""
    n, sides = values.shape
    ranks = scipy.stats.rankdata(np.column_stack([values, covariates]), axis=0)
    design = np.column_stack([np.ones(n), ranks[:, sides:]])
    residual = ranks[:, :sides] - design @ np.linalg.lstsq(design, ranks[:, :sides])[0]
    norm = np.linalg.norm(residual, axis=0)
    return np.where(norm > 1e-9 * n, residual / np.maximum(norm, 1e-300), np.nan)


def partial_spearman(
    x: Float[np.ndarray, " row"], y: Float[np.ndarray, " row"], covariates: Float[np.ndarray, "row covariate"]
) -> float:
    """Spearman's rho of x and y given the covariates: correlation of the residuals of their ranks."""
    residuals = _residual_ranks(np.column_stack([x, y]), covariates)
    return float(residuals[:, 0] @ residuals[:, 1])


def _pooled(rows: Table, mechanism: str, rng: Generator) -> list[Estimate]:
    """rho over all steps, what position alone and is-last alone reach with behaviour, and the partial rho."""
    if len(rows) < 3:
        return [
            _undefined(name, "fewer than three steps") for name in ("rho", "rho_position", "rho_is_last", "rho_partial")
        ]
    behaviour, effect = rows["mistake"].to_numpy(float), rows[mechanism].to_numpy(float)
    position, is_last = rows["position"].to_numpy(float), rows["is_last"].to_numpy(float)
    covariates = rows[["position", "is_last", "characters", "n_tokens", "confidence"]].astype(float)
    given = covariates.dropna(axis=1)
    matrix = given.to_numpy(float)
    residuals = _residual_ranks(np.column_stack([behaviour, effect]), matrix)
    chains = rows["chain_id"].to_numpy()
    scores: list[tuple[str, Callable[[Int[np.ndarray, " row"]], float], float, str]] = [
        (
            "rho",
            lambda i: spearman(behaviour[i], effect[i]),
            within_chain_p(_standard_ranks(behaviour), chains, _dot(_standard_ranks(effect)), rng),
            "",
        ),
        ("rho_position", lambda i: spearman(behaviour[i], position[i]), np.nan, "position alone"),
        ("rho_is_last", lambda i: spearman(behaviour[i], is_last[i]), np.nan, "'is the last step' alone"),
        (
            "rho_partial",
            lambda i: partial_spearman(behaviour[i], effect[i], matrix[i]),
            within_chain_p(residuals[:, 0], chains, _dot(residuals[:, 1]), rng),
            "given " + ", ".join(given.columns),
        ),
    ]
    labels = rows["problem_id"].tolist()
    estimates = [cluster_estimate(name, "", labels, score, p, note) for name, score, p, note in scores]
    return [replace(e, method=f"{e.method}, p within-chain permutation") if np.isfinite(e.p) else e for e in estimates]


def _dot(fixed: Float[np.ndarray, " row"]) -> Callable[[Float[np.ndarray, " row"]], float]:
    return lambda values: float(values @ fixed)


# 6. where they disagree


def _disagreement(chain: Table, mechanism: str) -> dict[str, Any] | None:
    """A row for the list when one chain's behaviour and mechanism name different steps, else None."""
    chain = chain.reset_index(drop=True)
    behaviour, effect = chain["mistake"], chain[mechanism]
    if len(chain) < 2:
        return None
    silent = effect.max() <= 0
    apart = agreement(behaviour.to_numpy(float), effect.to_numpy(float), np.zeros(1, int))[0] == 0
    if silent and behaviour.max() >= LARGE:
        reason = "mistakes move the answer, no mechanism effect is above its control"
    elif apart and not silent:
        reason = "different steps"
    else:
        return None
    first = chain.iloc[0]
    return {
        **{key: first[key] for key in KEYS[:3]},
        "mechanism": mechanism,
        "step_behaviour": int(chain["step"][behaviour.idxmax()]),
        "step_mechanism": None if silent else int(chain["step"][effect.idxmax()]),
        "behaviour": float(behaviour.max()),
        "effect": float(effect.max()),
        "reason": reason,
    }
