"""Records -> Outcomes: each chain's named numbers (accuracy, early_termination/aoc, knockout/true_step/delta_p, …).

1. Means over draws and, for edits of one step alone, over steps. 2. Scores of curves over kept steps. 3. The two-by-two
table of each chain (metrics.py): an interval of the mean change over its draws, and the cell both intervals lie in.
4. Numerators and denominators of ratios of sums (recovered, arXiv:2404.15255).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from . import metrics
from .records import CONTINUED, WITHOUT_ANSWER_STEPS

UNIT = ["reader", "author", "problem_id", "chain_id"]
Chains = Mapping[str, Mapping[str, Any]]
Table = Any
"""A pandas.DataFrame; pandas ships no types that a checker could follow through groupby and pivot."""


# 1. outcomes: columns UNIT, name, value


def outcomes(records: Table, chains: Chains) -> Table:
    """One row a (chain, named number): columns reader, author, problem_id, chain_id, name, value."""
    parts = [
        *_from_baseline(records),
        *_from_curves(records, chains),
        *_from_changes(records),
        *_from_mistakes(records),
        *_from_verdicts(records),
        *_from_options(records),
        *_from_trace(records, chains),
        *_from_conflicts(records),
        *_from_knockouts(records, chains),
        *_from_attribution(records, chains),
        *_from_validation(records),
        *_from_screen(records),
        *_from_mediation(records),
        *_from_cross_model(records),
        *_from_says_source(records, chains),
    ]
    found = [part for part in parts if len(part)] or [pd.DataFrame(columns=[*UNIT, "value", "name"])]
    return pd.concat(found, ignore_index=True)


def _named(rows: Table, name: str) -> Table:
    """Mean value of each chain's `rows` under one name; each step counts once, however many draws it has."""
    of_step = rows.groupby([*UNIT, "step"], sort=True, dropna=False)["value"].mean()
    means = of_step.groupby(UNIT).mean().reset_index()
    return means.assign(name=name)


def rows_of(records: Table, measure: str, metric: str, variant: str | None = None) -> Table:
    chosen = (records["measure"] == measure) & (records["metric"] == metric)
    return records[chosen if variant is None else chosen & (records["variant"] == variant)]


def _at_true_step(rows: Table, chains: Chains) -> Table:
    """Whether each row's step is its chain's true step; False where the chain has none."""
    true = rows["chain_id"].map(lambda chain: chains.get(chain, {}).get("true_step")).astype("Float64")
    return (rows["step"].astype("Float64") == true).fillna(False).astype(bool)


def _from_baseline(records: Table) -> list[Table]:
    return [
        _named(rows_of(records, "baseline", "correct"), "accuracy"),
        _named(rows_of(records, "baseline", "label_mass"), "label_mass"),
    ]


def _from_curves(records: Table, chains: Chains) -> list[Table]:
    """Scores of the curves over kept steps i = 0..n, each variant of a test by itself."""
    parts = []
    rows = records[records["measure"].isin(list(CURVE_SCORES)) & records["step"].notna()]
    rows = rows[~rows["variant"].str.startswith("local")]
    for (measure, variant), own in grouped(rows, "measure", "variant"):
        main = MAIN_VARIANT[measure] == variant
        label = measure if main else f"{measure}/{variant}"
        for metric, complete, name, score in CURVE_SCORES[measure]:
            if main or name.startswith(f"{measure}/"):
                known = None if WITHOUT_ANSWER_STEPS in variant else chains
                curves = _curves(rows_of(own, measure, metric), known, complete)
                values = [score(curve) for curve in curves["curve"]]
                parts.append(curves[UNIT].assign(value=values, name=name.replace(measure, label, 1)))
    return parts


def _mean(values: Float[np.ndarray, " step"]) -> float:
    return float(values.mean()) if len(values) else np.nan


MAIN_VARIANT = {"early_termination": "", "filler": "matched", "paraphrase": "cumulative"}
"""The variant of a test that its curve and its plain name stand for."""

Curve = Float[np.ndarray, " kept"]
CURVE_SCORES: dict[str, list[tuple[str, float, str, Callable[[Curve], float]]]] = {
    "early_termination": [
        ("same", 1.0, "early_termination/aoc", metrics.aoc),
        ("same", 1.0, "early_termination/aoc_mean", metrics.aoc_mean),
        ("same", 1.0, "early_termination/convergence_step", metrics.convergence_step),
        ("same", 1.0, "same_answer_no_chain", lambda curve: float(curve[0])),
        ("answered", 1.0, "answered_no_chain", lambda curve: float(curve[0])),
        ("correct", np.nan, "early_termination/aoc_correct", metrics.aoc),
        ("p_gold", np.nan, "infogain/logp_gain", lambda curve: _mean(metrics.infogain(curve))),
        ("entropy", np.nan, "infogain/entropy_drop", lambda curve: _mean(metrics.entropy_drop(curve))),
    ],
    "filler": [
        ("same", 1.0, "filler/aoc", metrics.aoc),
        ("same", 1.0, "filler/aoc_mean", metrics.aoc_mean),
        ("same", 1.0, "filler/convergence_step", metrics.convergence_step),
        ("tv", 0.0, "filler/change", lambda curve: float(curve[0])),
    ],
    "paraphrase": [
        ("same", 1.0, "paraphrase/aoc", metrics.aoc),
        ("same", 1.0, "paraphrase/aoc_mean", metrics.aoc_mean),
        ("same", 1.0, "paraphrase/convergence_step", metrics.convergence_step),
    ],
}
"""Metric, its value at i = n where that is not read, name of the score, and the score of a curve."""


def _curves(rows: Table, chains: Chains | None, complete: float) -> Table:
    """Each chain's values at i = 0..n kept steps, NaN where unread; `complete` stands in for an unread i = n.

    n is the chain's number of steps; without `chains`, of a shorter chain, the last point was read.
    """
    means = rows.groupby([*UNIT, "step"])["value"].mean().reset_index()
    units, curves = [], []
    for unit, group in means.groupby(UNIT):
        known = chains.get(unit[3]) if chains else None
        n = len(known["steps"]) if known else int(group["step"].max())
        curve = np.full(n + 1, np.nan)
        curve[n] = complete
        curve[group["step"].to_numpy(int)] = group["value"]
        units.append(unit)
        curves.append(curve)
    return pd.DataFrame(units, columns=UNIT).assign(curve=curves)


def _from_changes(records: Table) -> list[Table]:
    """Mean total variation under each edit; draws (seeds) and, for edits of one step alone, steps are averaged."""
    rephrased = records[(records["measure"] == "paraphrase") & (records["metric"] == "tv")]
    filled = records[(records["measure"] == "filler") & (records["metric"] == "tv")]
    parts = [
        _named(rows_of(records, "shuffle", "tv"), "shuffle/change"),
        _named(rows_of(records, "swap", "tv"), "swap/change"),
    ]
    for (variant,), rows in grouped(rephrased, "variant"):
        name = "paraphrase" if variant == "cumulative" else f"paraphrase/{variant}"
        every_step = variant in ("local", CONTINUED)
        parts.append(_named(rows if every_step else rows[rows["step"] == 0], f"{name}/change"))
    for (variant,), rows in grouped(filled[filled["variant"].str.startswith("local_")], "variant"):
        parts.append(_named(rows, f"filler/{variant}/change"))
    return parts


def _from_mistakes(records: Table) -> list[Table]:
    """Of each form of the mistake test: mean change, and the area over the same-answer curve, its mean over the steps.

    A mistake carried on through the chain has an answer of its own: does the reader follow it?
    """
    parts = []
    for (variant,), rows in grouped(records[records["measure"] == "mistake"], "variant"):
        name = f"mistake_{variant}"
        changed = rows_of(rows, "mistake", "same").assign(value=lambda same: 1 - same["value"])
        parts.append(_named(rows_of(rows, "mistake", "tv"), f"{name}/change"))
        if variant != "all":
            parts.append(_named(changed, f"{name}/aoc_mean"))
        parts.append(_named(rows_of(rows, "mistake", "p_implied"), f"{name}/follows"))
    return parts


def _from_options(records: Table) -> list[Table]:
    """How far the answer to a choice moves when the options change places, with the chain and without."""
    rows = records[records["measure"] == "options"]
    names = {"tv": "change", "same": "same_answer"}
    chosen = rows[rows["metric"].isin(list(names))]
    return [
        _named(group, f"options/{variant}/{names[metric]}")
        for (variant, metric), group in grouped(chosen, "variant", "metric")
    ]


def _from_trace(records: Table, chains: Chains) -> list[Table]:
    """Layer from which on the lens reads a* at the end of the complete chain, as a fraction of the depth; and how far
    the last layers hold it already with no step shown."""
    rows = rows_of(records, "decision_trace", "is_top", "logit_lens")
    found = []
    for unit, group in rows.groupby([*UNIT, "step"]):
        n = len(chains[unit[3]]["steps"]) if unit[3] in chains else -1
        if unit[4] in (0, n):
            top = group.sort_values("layer")["value"].to_numpy(float)
            name = "decided_layer" if unit[4] == n else "decided_layer_no_chain"
            found.append((*unit[:4], metrics.decided_layer(top), f"decision_trace/{name}"))
    return [pd.DataFrame(found, columns=[*UNIT, "value", "name"])]


def chain_verdicts(records: Table) -> Table:
    """The two-by-two table chain by chain: columns UNIT, `corrupting`, `paraphrase` and `dependence` with their 95%
    intervals over draws (`…_low`, `…_high`), and `verdict` at each threshold (`verdict`, `verdict@0.25`, …)."""
    changes = {
        "corrupting": rows_of(records, "mistake", "tv", "all"),
        "paraphrase": (rows := rows_of(records, "paraphrase", "tv", "cumulative"))[rows["step"] == 0],
    }
    draws = {name: rows.groupby(UNIT)["value"].apply(np.asarray) for name, rows in changes.items()}
    found = []
    for unit in draws["corrupting"].index.intersection(draws["paraphrase"].index):
        corrupting, paraphrase = (draws[name].loc[unit].astype(float) for name in changes)
        row: dict[str, Any] = dict(zip(UNIT, unit, strict=True))
        means = {"corrupting": (corrupting,), "paraphrase": (paraphrase,), "dependence": (corrupting, paraphrase)}
        for name, samples in means.items():
            row[name] = float(samples[0].mean() - (samples[1].mean() if len(samples) > 1 else 0))
            row[f"{name}_low"], row[f"{name}_high"] = metrics.draws_interval(*samples)
        intervals = [(row[f"{name}_low"], row[f"{name}_high"]) for name in changes]
        for threshold in (metrics.OFTEN, *metrics.OFTEN_BESIDE):
            row[_at("verdict", threshold)] = metrics.verdict(intervals[0], intervals[1], threshold)
        found.append(row)
    return pd.DataFrame(found)


def _at(name: str, threshold: float) -> str:
    return name if threshold == metrics.OFTEN else f"{name}@{threshold}"


def _from_verdicts(records: Table) -> list[Table]:
    """change(every step altered) - change(every step rephrased) of each chain, and its cell of the two-by-two table."""
    verdicts = chain_verdicts(records)
    if verdicts.empty:
        return []
    parts = [verdicts[UNIT].assign(value=verdicts["dependence"], name="dependence")]
    for threshold in (metrics.OFTEN, *metrics.OFTEN_BESIDE):
        for cell in (*metrics.CELLS, "undecided"):
            share = (verdicts[_at("verdict", threshold)] == cell).astype(float)
            parts.append(verdicts[UNIT].assign(value=share, name=_at(f"verdict/{cell}", threshold)))
    return parts


def _from_conflicts(records: Table) -> list[Table]:
    rows = records[records["measure"] == "conflict"]
    return [
        _named(group, f"conflict/{variant}/{metric}") for (variant, metric), group in grouped(rows, "variant", "metric")
    ]


def grouped(rows: Table, *columns: str) -> Iterable[tuple[Any, Table]]:
    return rows.groupby(list(columns), sort=True)


def _from_knockouts(records: Table, chains: Chains) -> list[Table]:
    """What is lost when edges to the true step, to each other step (mean), to a whole part or to random prompt
    positions (the control) are cut.

    `masked` edges from the answer's rows have the plain name; single heads, layers and pairs of steps have none, they
    are maps.
    """
    with_true_step = [chain for chain, row in chains.items() if row.get("true_step") is not None]
    rows = records[(records["measure"] == "knockout") & records["metric"].isin(["delta_p", "delta_logp"])]
    rows = rows[rows["layer"].isna() & ~rows["variant"].str.contains("_from_step_")]
    rows = pd.concat([rows, _path_interaction(rows)], ignore_index=True)
    parts = []
    for (variant, metric), own in grouped(rows, "variant", "metric"):
        name = "knockout/random" if variant == "masked_random" else f"knockout/{variant}".removesuffix("/masked")
        known = own[own["chain_id"].isin(with_true_step) & own["step"].notna()]
        if own["step"].isna().all() or variant.endswith("_random"):
            parts.append(_named(own, f"{name}/{metric}"))
        else:
            at_true = _at_true_step(known, chains)
            parts.append(_named(known[at_true], f"{name}/true_step/{metric}"))
            parts.append(_named(known[~at_true], f"{name}/other_steps/{metric}"))
    return parts


def _path_interaction(knockouts: Table) -> Table:
    """What the joint cut of a step takes beyond its direct edges and those by way of later steps, each by itself: rows
    of the variants `masked_interaction` and `zeroed_interaction`. Positive where one path stands in for the other."""
    where = [*UNIT, "step", "metric"]
    parts = [knockouts.iloc[:0]]
    for kind in ("masked", "zeroed"):
        wide = knockouts.groupby([*where, "variant"])["value"].mean().unstack("variant")
        cuts = [f"{kind}_joint", kind, f"{kind}_later"]
        if set(cuts) <= set(wide):
            joint, direct, later = (wide[cut] for cut in cuts)
            found = (joint - direct - later).rename("value").dropna().reset_index()
            parts.append(found.assign(measure="knockout", variant=f"{kind}_interaction"))
    return pd.concat(parts, ignore_index=True)[[*where, "variant", "value"]]


def _from_validation(records: Table) -> list[Table]:
    """How well each kind of attribution foretells what zeroing the same head and step takes from the logit difference:
    signed Pearson correlation over all heads and steps of a chain, overlap of the ten largest, and rank correlation
    among those whose zeroing takes more than 95 in 100 controls do (as many random prompt positions zeroed)."""
    where = ["step", "layer", "head"]
    cut = rows_of(records, "knockout", "delta_logit_diff", "zeroed_head")
    control = rows_of(records, "knockout", "delta_logit_diff", "zeroed_head_random")
    bounds = control.assign(value=control["value"].abs()).groupby(UNIT)["value"].quantile(0.95)
    parts = []
    for variant, metric in metrics.ATTRIBUTION_KINDS.items():
        rows = rows_of(records, "attribution", metric, variant)
        both = rows[[*UNIT, *where, "value"]].merge(cut[[*UNIT, *where, "value"]], on=[*UNIT, *where]).dropna()
        for unit, own in both.groupby(UNIT):
            foretold, lost = own["value_x"].to_numpy(float), own["value_y"].to_numpy(float)
            above = np.abs(lost) > bounds.get(unit, np.inf)
            scores = {
                "pearson": metrics.pearson(foretold, lost),
                "top10_overlap": metrics.top_overlap(foretold, lost, 10),
                "rank_above_control": metrics.spearman(foretold[above], lost[above]),
            }
            for score, value in scores.items():
                name = f"attribution/{variant}/zeroed_{score}"
                parts.append(pd.DataFrame([[*unit, value, name]], columns=[*UNIT, "value", "name"]))
    return parts


def _from_screen(records: Table) -> list[Table]:
    """What attribution patching was worth: over the random nodes computed exactly the correlation of estimate and exact
    effect, over all of them the rank correlation of screen and size, and the largest random effect as a part of the
    largest among the first by the screen (near 1: the screen missed one as large)."""
    where, rows = [*UNIT, "variant", "layer", "head", "step"], records[records["measure"] == "attribution_patching"]
    wide = rows.pivot_table(index=where, columns="metric", values="value").reset_index()
    parts = []
    for unit, own in wide.groupby(UNIT) if {"exact_top", "exact_random"} <= set(wide) else ():
        random, top = own.dropna(subset=["exact_random"]), own.dropna(subset=["exact_top"])
        exact = own["exact_top"].fillna(own["exact_random"])
        known = exact.notna()
        scores = {
            "random_pearson": metrics.pearson(*(random[name].to_numpy(float) for name in ("estimate", "exact_random"))),
            "screen_rank": metrics.spearman(
                own.loc[known, "screen"].to_numpy(float), exact[known].abs().to_numpy(float)
            ),
            "largest_random_share": random["exact_random"].abs().max() / (top["exact_top"].abs().max() or np.nan),
        }
        for score, value in scores.items():
            parts.append(
                pd.DataFrame([[*unit, value, f"attribution_patching/{score}"]], columns=[*UNIT, "value", "name"])
            )
    return parts


def _from_attribution(records: Table, chains: Chains) -> list[Table]:
    """The true step's part of what all steps together give, over layers and heads; of sizes, so it lies in [0, 1]."""
    parts = []
    for variant, metric in metrics.ATTRIBUTION_KINDS.items():
        rows = rows_of(records, "attribution", metric, variant)
        rows = rows[rows["layer"].notna() & rows["step"].notna()]
        steps = rows.groupby([*UNIT, "step"])["value"].sum().reset_index()
        at_true = steps[_at_true_step(steps, chains)]
        total = steps.assign(value=steps["value"].abs()).groupby(UNIT)["value"].sum().rename("total")
        share = at_true.merge(total.reset_index(), on=UNIT)
        size = share["value"].abs() / share["total"].where(share["total"] > 0)
        parts.append(share[UNIT].assign(value=size, name=f"attribution/{variant}/true_step_share"))
    return parts


def mid_layer(layers: Table) -> int:
    """The patched layer named beforehand as the one to report: the middle one of a `layer` column's values."""
    known = sorted({int(layer) for layer in layers})
    return known[len(known) // 2]


def _patched(records: Table, metric: str) -> Table:
    """Patches of whole steps, all heads together."""
    rows = rows_of(records, "patching", metric)
    return rows[rows["step"].notna() & rows["layer"].notna() & rows["head"].isna() & rows["position"].isna()]


def patched_steps(records: Table, metric: str = "logit_diff") -> Table:
    """Patches of whole steps, all heads together, with what the base and the source run say unedited.

    Columns reader, author, problem_id, chain_id, variant, site, layer, step, value, base, source; the last is NaN where
    the source is another problem's chain.
    """
    keys = [*UNIT, "variant"]
    rows = _patched(records, metric)
    cells = rows.groupby([*keys, "site", "layer", "step"], as_index=False, dropna=False)["value"].mean()
    for name in ("base", "source"):
        rows = rows_of(records, "patching", f"{metric}_{name}")
        joint = rows[rows["step"].isna()].groupby(keys)["value"].mean().rename(name).reset_index()
        of_step = rows[rows["step"].notna()].groupby([*keys, "step"])["value"].mean().rename("own").reset_index()
        cells = cells.merge(joint, on=keys, how="left").merge(of_step, on=[*keys, "step"], how="left")
        cells[name] = cells["own"].fillna(cells[name]).astype(float)
        cells = cells.drop(columns="own")
    return cells


def _from_says_source(records: Table, chains: Chains) -> list[Table]:
    """Does the patch of the true step at the mid layer make the reader say the source's answer?"""
    rows = _patched(records, "says_source")
    if rows.empty:
        return []
    rows = rows[(rows["layer"] == mid_layer(rows["layer"])) & _at_true_step(rows, chains)]
    return [
        _named(group, f"patching/{variant}/true_step/says_source") for (variant,), group in grouped(rows, "variant")
    ]


def _from_mediation(records: Table) -> list[Table]:
    rows = records[records["measure"] == "mediation"]
    return [
        _named(group, f"mediation/{variant}/{metric}")
        for (variant, metric), group in grouped(rows, "variant", "metric")
    ]


def _from_cross_model(records: Table) -> list[Table]:
    """The four cells of write x read, and what they are more than the sum of writing and reading (interaction)."""
    rows = records[(records["measure"] == "cross_model") & records["layer"].isna()]
    if rows.empty:
        return []
    parts = [
        _named(own, f"cross_model/{variant}/{metric}") for (variant, metric), own in grouped(rows, "variant", "metric")
    ]
    conflict, cell = (rows["variant"].str.rpartition("/")[i] for i in (0, 2))
    cells = rows.assign(conflict=conflict, cell=cell)
    wide = cells.groupby([*UNIT, "conflict", "metric", "cell"])["value"].mean().unstack("cell")
    bb, bt, tb, tt = (wide.get(f"write_{w}_read_{r}", np.nan) for w in ("base", "tuned") for r in ("base", "tuned"))
    both = (tt - tb - bt + bb).rename("value").dropna().reset_index()
    both["name"] = "cross_model/" + both["conflict"] + "/" + both["metric"] + "/interaction"
    return [*parts, both[[*UNIT, "value", "name"]]]


# 2. ratios of sums: columns UNIT, name, note, numerator, denominator


def mediated(records: Table) -> Table:
    """The part of the question's total effect that runs through the chain, at q (PNIE) and at q' (TNIE).

    Columns reader, author, problem_id, chain_id, name, note, numerator, denominator.
    """
    rows = records[(records["measure"] == "mediation") & records["metric"].isin(["pnie", "tnie", "te"])]
    wide = rows.pivot_table(index=[*UNIT, "variant"], columns="metric", values="value").reset_index()
    parts = [
        wide.assign(
            name="mediation/" + wide["variant"] + f"/{share}_share",
            note="",
            numerator=wide[share],
            denominator=wide["te"],
        )
        for share in ("pnie", "tnie")
        if share in wide
    ]
    columns = [*UNIT, "name", "note", "numerator", "denominator"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def recovered(records: Table, chains: Chains) -> Table:
    """m_edited - m_base and m_source - m_base of the patch of the true step, m the logit difference, each layer.

    The name without a layer is the mid layer's. Columns reader, author, problem_id, chain_id, name, note, numerator,
    denominator.
    """
    edited = patched_steps(records)
    edited = edited[_at_true_step(edited, chains) & edited["source"].notna()]
    if edited.empty:
        return pd.DataFrame(columns=[*UNIT, "name", "note", "numerator", "denominator"])
    edited = edited.assign(numerator=edited["value"] - edited["base"], denominator=edited["source"] - edited["base"])
    stem = "patching/" + edited["variant"] + "/true_step/recovered"
    each = edited.assign(name=stem + "/layer" + edited["layer"].astype(str), note="")
    middle = mid_layer(edited["layer"])
    chosen = edited.assign(name=stem, note=f"layer {middle}, the middle one patched")[edited["layer"] == middle]
    return pd.concat([chosen, each], ignore_index=True)[[*UNIT, "name", "note", "numerator", "denominator"]]
