"""Results as one pandas table, for the user's own analysis and for CSV and Parquet.

A row is a Record with the unit of its metric beside it, so a CSV file explains itself; what holds for the whole table
is in `DataFrame.attrs`, which pandas keeps in the schema metadata of a Parquet file and reads back from it.
"""

from __future__ import annotations

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


def table(results: Results | list[Estimate]) -> Table:
    """Results as a pandas.DataFrame.

    `results`: what a `measure_` function gives, a RunDirectory, or Records: a column for each field of Record, and
    `unit` ('probability', 'nats', 'logits', '0 or 1', …). Integers that may be absent are Int64. `attrs` hold the
    exclusions and, of a run, its config, models, versions, seeds, device and dtype. Estimates (`run.read_estimates()`)
    give a column for each of their fields. Written out by pandas itself:

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
    if rows and isinstance(rows[0], Estimate):
        return pd.DataFrame([vars(row) for row in rows])
    return _with_units(as_frame(arrow_table(rows)), {})  # pyright: ignore[reportArgumentType]


def _with_units(frame: Table, about: dict[str, Any]) -> Table:
    frame = frame.assign(unit=frame["metric"].map(UNITS).astype(frame["metric"].dtype))
    frame.attrs = about
    return frame
