"""Results as one pandas table, for the user's own analysis and for CSV and Parquet.

A row is a Record with the unit of its metric beside it, so a CSV file explains itself; what holds for the whole table
is in `DataFrame.attrs`, which pandas keeps in the schema metadata of a Parquet file and reads back from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import pandas as pd

from .measured import Measured
from .outcomes import Table
from .records import UNITS, Record, RunDirectory, arrow_table, as_frame
from .stats import Estimate

Results = Measured | RunDirectory | Iterable[Record]
ABOUT = ("config", "models", "versions", "seeds", "device", "dtype")
"""Parts of a run's manifest that go with its table."""

_OF_ESTIMATES = {
    "share of problems": "accuracy answered_no_chain same_answer_no_chain chains_written decorative load_bearing "
    "encoded_or_fragile unstable undecided",
    "probability": "change dependence",
    "nats a step": "logp_gain entropy_drop",
    "area, 0 to 1": "aoc aoc_mean aoc_correct",
    "share of the chain": "convergence_step",
    "share of the depth": "decided_layer decided_layer_no_chain",
    "share of the effect": "recovered pnie_share tnie_share true_step_share largest_random_share",
    "rank correlation": "rho rho_is_last rho_partial rho_position rho_within screen_rank",
    "share of chains": "top1 top1_chance",
}
ESTIMATE_UNITS = {name: unit for unit, names in _OF_ESTIMATES.items() for name in names.split()}


def unit_of_estimate(name: str) -> str | None:
    """The unit of the estimate of this name, as of 'knockout/true_step/delta_p | both_correct'; None where unknown."""
    plain = re.sub(r"(@[^/]*|/layer\d+)$", "", name.split(" | ")[0])
    metric = plain.rpartition("/")[2]
    unit = ESTIMATE_UNITS.get(metric) or UNITS.get(metric)
    return "share of problems" if unit == "0 or 1" else unit


def table(results: Results | list[Estimate]) -> Table:
    """Results as a pandas.DataFrame.

    `results`: what a `measure_` function gives, a RunDirectory, or Records: a column for each field of Record, and
    `unit` ('probability', 'nats', 'logits', '0 or 1', …). Integers that may be absent are Int64. `attrs` hold the
    exclusions and, of a run, its config, models, versions, seeds, device and dtype. Estimates (`run.read_estimates()`)
    give a column for each of their fields and their `unit`. Written out by pandas itself:

        cm.table(results).to_parquet("results.parquet")     # pandas.read_parquet gives an equal table, attrs too
        cm.table(results).to_csv("results.csv", index=False)

    Raises CotfaithError when a run directory holds a file that is not whole.
    """
    if isinstance(results, RunDirectory):
        manifest = results.read_manifest()
        about = {key: manifest[key] for key in ABOUT if key in manifest}
        return _with_units(results.read_records(), about | {"exclusions": results.read_exclusions()})
    if isinstance(results, Measured):
        return _with_units(as_frame(arrow_table(results.records)), {"exclusions": list(results.exclusions)})
    rows = list(results)
    estimates = [row for row in rows if isinstance(row, Estimate)]
    if estimates:
        return pd.DataFrame([vars(row) | {"unit": unit_of_estimate(row.name)} for row in estimates])
    return _with_units(as_frame(arrow_table(rows)), {})  # pyright: ignore[reportArgumentType]


def _with_units(frame: Table, about: dict[str, Any]) -> Table:
    frame = frame.assign(unit=frame["metric"].map(UNITS).astype(frame["metric"].dtype))
    frame.attrs = about
    return frame
