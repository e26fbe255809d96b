"""One measured number is a Record; a RunDirectory keeps them on disk, one parquet file per finished unit of work.

1. A unit is one (reader, chain) under one plan; its name is a hash of the three, so the same work has the same name.
2. Whatever is written goes to a temporary name in the same folder, is flushed to the disk, and is renamed: a file with
   its final name is whole. A killed run therefore resumes to the same table as an unkilled one, row for row.
3. The long table is the concatenation of the unit files in the order of their names.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from .disk import (
    make_folder,
    plain,
    read_carried,
    read_gzip,
    read_jsonl,
    read_parquet,
    write_atomically,
    write_json,
    write_jsonl,
)
from .errors import CotfaithError
from .locks import PREFIX, lock
from .privacy import shared
from .stats import Estimate

SCHEMA = pa.schema(
    [
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("chain_id", pa.string(), nullable=False),
        pa.field("author", pa.string(), nullable=False),
        pa.field("reader", pa.string(), nullable=False),
        pa.field("measure", pa.string(), nullable=False),
        pa.field("variant", pa.string(), nullable=False),
        pa.field("step", pa.int64()),
        pa.field("site", pa.string()),
        pa.field("layer", pa.int64()),
        pa.field("head", pa.int64()),
        pa.field("position", pa.int64()),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        pa.field("n_tokens", pa.int64()),
        pa.field("seed", pa.int64()),
    ]
)
COLUMNS = tuple(SCHEMA.names)

MEASURES = (
    "baseline",
    "early_termination",
    "filler",
    "paraphrase",
    "mistake",
    "shuffle",
    "swap",
    "conflict",
    "options",
    "decision_trace",
    "patching",
    "mediation",
    "cross_model",
    "knockout",
    "attribution",
    "attribution_patching",
    "control",
)

_OF_UNIT = {
    "probability": "p_answer p_answer_se p_answer_base p_answer_source p_gold p_implied p_chain p_question p_other "
    "p_first label_mass delta_p weight tv cmi d_chain d_control y_qc y_qc' y_q'c y_q'c' pnie tnie pnde tnde te "
    "interaction",
    "nats": "logp_answer delta_logp entropy entropy_first kl",
    "logits": "logit_diff logit_diff_base logit_diff_source delta_logit_diff contribution remainder completeness_error "
    "estimate screen exact_top exact_random",
    "0 or 1": "correct same answered says_source says_implied says_chain says_question is_top",
    "residual norm": "norm",
    "largest of all metrics": "max_abs_diff",
}
UNITS = {metric: unit for unit, metrics in _OF_UNIT.items() for metric in metrics.split()}
"""Unit of each metric; total variation and the mediation index, 0 to 1, count as probabilities."""

WITHOUT_ANSWER_STEPS = "without_answer_steps"
"""Ends the variant of a test that was run on the chain without the steps that state the answer."""

CONTINUED = "continued"
"""The variant of a test whose later steps the reader wrote itself, after the edited ones."""

_ESTIMATES = pa.schema(
    [
        ("name", pa.string()),
        ("arm", pa.string()),
        ("n_problems", pa.int64()),
        ("value", pa.float64()),
        ("ci_low", pa.float64()),
        ("ci_high", pa.float64()),
        ("p", pa.float64()),
        ("method", pa.string()),
    ]
)
_META_KEY = b"cotfaith"
_AT_ONCE = 5000
"""How many unit files are held while they are copied."""
_ALL, _KEPT_META = "all.parquet", "units.json.gz"
_EXCLUDED = ("problem_id", "chain_id", "reader", "stage", "reason")
_EXCLUSIONS = "exclusions"
_LEFT_OUT = "left_out"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measured number with all its coordinates; unused coordinates are None, an undefined value is NaN.

    `n_tokens` is the length of the token sequence that was read. Raises CotfaithError on a measure not in MEASURES.
    """

    problem_id: str
    chain_id: str
    author: str
    reader: str
    measure: str
    variant: str = ""
    step: int | None = None
    site: str | None = None
    layer: int | None = None
    head: int | None = None
    position: int | None = None
    metric: str
    value: float
    n_tokens: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise CotfaithError(f"Unknown measure {self.measure!r}; use one of {', '.join(MEASURES)}.")


def arrow_table(records: Iterable[Record]) -> pa.Table:
    """The long table of `records`, of SCHEMA."""
    columns = list(zip(*map(attrgetter(*COLUMNS), records), strict=True)) or [()] * len(COLUMNS)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def as_frame(table: pa.Table) -> pd.DataFrame:
    """A table of SCHEMA in pandas; integers that may be null are Int64."""
    return table.to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)


def unit_id(reader_identity: Any, chain_id: str, plan: Any) -> str:
    """Content hash naming one unit of work; `reader_identity` and `plan` are any JSON-like values."""
    content = json.dumps(plain([reader_identity, chain_id, plan]), sort_keys=True, allow_nan=False)
    return hashlib.sha256(content.encode()).hexdigest()[:20]


class RunDirectory:
    """A run on disk. `RunDirectory(path)` opens one that exists, `RunDirectory.create` begins or resumes one."""

    def __init__(self, path: str | Path) -> None:
        """Raises CotfaithError when `path` holds no manifest.json."""
        self.path = Path(path)
        if not self._manifest.is_file():
            raise CotfaithError(
                f"{self.path} is not a run directory: it has no manifest.json; "
                "give a folder written by `cotfaith study` or `cotfaith demo`."
            )

    @classmethod
    def create(cls, path: str | Path, config: Mapping[str, Any]) -> RunDirectory:
        """Begin a run of `config` in `path`, or resume it there.

        A run that got no further than its manifest (a mistyped name, say) is begun anew. Raises CotfaithError naming
        the first differing key when the folder holds a run of another config, and when the folder holds other things
        or cannot be written.
        """
        path = Path(path)
        if not cls.check(path, config):
            make_folder(path)
            with lock(path / f"{PREFIX}-manifest", wait=True):
                if not cls.check(path, config):
                    with lock(path / PREFIX):
                        write_json(path / "manifest.json", {"config": shared(config)})
        return cls(path)

    @classmethod
    def check(cls, path: Path, config: Mapping[str, Any]) -> bool:
        """Whether `path` holds a run of `config`; raises what `create` raises where another thing is there."""
        entries = [entry.name for entry in path.iterdir()] if path.is_dir() else []
        there = [name for name in entries if not name.endswith(".tmp") and not name.startswith(PREFIX)]
        if (path / "records" / _KEPT_META).is_file():
            raise CotfaithError(
                f"{path} is a kept copy with all records in one file, which no run resumes; choose a new output folder."
            )
        if not (path / "manifest.json").is_file():
            if there:
                raise CotfaithError(f"{path} holds files but no run; choose a new or empty output folder.")
            return False
        difference = _differing_key(shared(cls(path).read_manifest().get("config")), shared(plain(config)))
        if difference and there != ["manifest.json"]:
            raise CotfaithError(f"{path} holds a run of another config: {difference}; choose a new output folder.")
        return difference is None

    @property
    def _manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def figures(self) -> Path:
        """Folder of the figures, made on first use."""
        folder = self.path / "figures"
        make_folder(folder)
        return folder

    def has_unit(self, unit: str) -> bool:
        """Whether the unit is finished."""
        return self._unit(unit).is_file()

    def _unit(self, unit: str) -> Path:
        return self.path / "records" / f"{unit}.parquet"

    def n_units(self) -> int:
        """How many units are finished, those that were left out among them."""
        return len(self._units())

    def write_unit(
        self,
        unit: str,
        records: Iterable[Record],
        meta: Mapping[str, Any],
        exclusions: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Write one finished unit in one move; `meta` (JSON-like) and what was left out of it, rows as of
        `read_exclusions`, travel in the file's schema metadata."""
        content = {"unit": unit, **meta} | ({_EXCLUSIONS: shared(exclusions)} if exclusions else {})
        encoded = json.dumps(plain(content), allow_nan=False).encode()
        table = arrow_table(records).replace_schema_metadata({_META_KEY: encoded})
        write_atomically(self._unit(unit), lambda file: pq.write_table(table, file))

    def leave_out_unit(self, unit: str, exclusions: Sequence[Mapping[str, Any]]) -> None:
        """Write down that a unit cannot be measured, and why; it counts as finished."""
        self.write_unit(unit, [], {_LEFT_OUT: True}, exclusions)

    def _units(self) -> list[Path]:
        return sorted(path for path in (self.path / "records").glob("*.parquet") if not path.name.startswith("."))

    def read_records(self) -> pd.DataFrame:
        """The long table of all finished units, columns COLUMNS; integers that may be null are Int64."""
        return as_frame(pa.concat_tables([SCHEMA.empty_table(), *self._tables()]))

    def _tables(self) -> Iterator[pa.Table]:
        """The long table in pieces of _AT_ONCE units."""
        units = self._units()
        for start in range(0, len(units), _AT_ONCE):
            pieces = (read_parquet(path, SCHEMA) for path in units[start : start + _AT_ONCE])
            yield pa.concat_tables([piece.replace_schema_metadata(None) for piece in pieces])

    def read_unit_meta(self) -> list[dict[str, Any]]:
        """The JSON object each measured unit was written with, in the order of `read_records`."""
        return [
            {name: value for name, value in meta.items() if name != _EXCLUSIONS}
            for meta in self._metas()
            if not meta.get(_LEFT_OUT)
        ]

    def _metas(self) -> list[dict[str, Any]]:
        kept = self.path / "records" / _KEPT_META
        if kept.is_file():
            content = read_gzip(kept)
            try:
                return json.loads(content)
            except (ValueError, RecursionError) as error:
                raise CotfaithError(f"{kept} is not whole ({error}); copy the kept run again.") from error
        return [read_carried(path, _META_KEY) for path in self._units()]

    def compacted(self, path: str | Path, without: Sequence[str] = ()) -> RunDirectory:
        """A copy in `path`, all records in one file, a tenth of the size: to keep, draw and conclude from again, not
        to resume. Measures `without` are left out, which the manifest says; so are figures and report, made from it."""
        path = Path(path)
        if path.resolve() == self.path.resolve():
            raise CotfaithError(f"{path} is the run itself; choose another folder for the copy.")
        if any(file.name != _ALL for file in (path / "records").glob("*.parquet")):
            raise CotfaithError(
                f"{path} holds units of a run, beside which all would count twice; choose a new folder."
            )
        options: dict[str, Any] = {"compression": "zstd", "compression_level": 19, "use_byte_stream_split": ["value"]}
        options["use_dictionary"] = [name for name in COLUMNS if name != "value"]

        def write(file: BinaryIO) -> None:
            with pq.ParquetWriter(file, SCHEMA, **options) as writer:
                for table in self._tables():
                    kept = [measure not in without for measure in table["measure"].to_pylist()]
                    writer.write_table(table.filter(pa.array(kept, pa.bool_())) if without else table)

        beside = ("chains.jsonl", "exclusions.jsonl", "estimates.parquet")
        half_written = [(path / "records").glob(".*.tmp")]
        half_written += [path.glob(f".{name}.*.tmp") for name in (*beside, "manifest.json")]
        for file in chain.from_iterable(half_written):
            file.unlink()
        write_atomically(path / "records" / _ALL, write)
        metas = gzip.compress(json.dumps(self._metas(), allow_nan=False).encode(), 9, mtime=0)
        write_atomically(path / "records" / _KEPT_META, lambda file: file.write(metas))
        for name in beside:
            if (self.path / name).is_file():
                content = (self.path / name).read_bytes()
                write_atomically(path / name, lambda file, content=content: file.write(content))
        write_json(path / "manifest.json", self.read_manifest() | {"records_left_out": list(without)})
        return RunDirectory(path)

    def write_chains(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """One chain per line: `Chain.to_json()` and the study's own keys."""
        write_jsonl(self.path / "chains.jsonl", rows)

    def read_chains(self) -> list[dict[str, Any]]:
        """What `write_chains` wrote; `Chain.from_json` makes a Chain of a row."""
        return read_jsonl(self.path / "chains.jsonl")

    def add_exclusion(self, **row: str | None) -> None:
        """Put down one thing that was left out, as `add_exclusions` does."""
        self.add_exclusions([row])

    def add_exclusions(self, rows: Iterable[Mapping[str, str | None]]) -> None:
        """Put down what was left out of the study beside its units (those have their own), and why: rows as of
        `read_exclusions`, absent keys None; the same twice is one line."""
        with self._exclusions() as known:
            kept = {tuple(row.values()): row for row in known}
            for given in rows:
                row = shared({name: given.get(name) for name in _EXCLUDED})
                kept.setdefault(tuple(row.values()), row)
            known[:] = kept.values()

    def withdraw_exclusions(self, **found: str) -> None:
        """Strike out what `add_exclusions` put down with all these values: it could be measured after all."""
        with self._exclusions() as known:
            known[:] = [row for row in known if not shared(found).items() <= row.items()]

    @contextmanager
    def _exclusions(self) -> Iterator[list[dict[str, Any]]]:
        """The rows of exclusions.jsonl, to be changed while no other process does."""
        with lock(self.path / f"{PREFIX}-{_EXCLUSIONS}", wait=True):
            rows = self.read_exclusions(of_units=False)
            n = len(rows)
            yield rows
            if len(rows) != n:
                write_jsonl(self.path / "exclusions.jsonl", rows)

    def read_exclusions(self, *, of_units: bool = True) -> list[dict[str, Any]]:
        """What was left out: `problem_id chain_id reader stage reason` a row, those of units behind the others; empty
        where nothing was. Those of units stand in each one's file, and are read with `of_units` alone."""
        path = self.path / "exclusions.jsonl"
        rows = read_jsonl(path) if path.is_file() else []
        if of_units:
            rows += [row for meta in self._metas() for row in meta.get(_EXCLUSIONS, [])]
        return list({tuple(row.values()): row for row in rows}.values())

    def write_estimates(self, estimates: Sequence[Estimate]) -> None:
        """Write all estimates; a note is kept behind the method, after '; '."""
        rows = [asdict(estimate) for estimate in estimates]
        for row in rows:
            row["method"] = "; ".join(part for part in (row["method"], row.pop("note")) if part)
        table = pa.Table.from_pylist(rows, schema=_ESTIMATES)
        write_atomically(self.path / "estimates.parquet", lambda file: pq.write_table(table, file))

    def read_estimates(self) -> list[Estimate]:
        """Every Estimate of the run, in the order written; CotfaithError where none was written yet."""
        rows = read_parquet(self.path / "estimates.parquet", _ESTIMATES).to_pylist()
        for row in rows:
            row["method"], _, row["note"] = row["method"].partition("; ")
        return [Estimate(**row) for row in rows]

    @contextmanager
    def writing(self, shard: tuple[int, int] | None = None) -> Iterator[None]:
        """Keep other processes from writing here; shards (number, of how many) let each other in, each number once.

        What killed processes left half written is deleted. Raises CotfaithError where another process is writing.
        """
        folders = (self.path, self.path / "records", self.path / "figures")
        if linked := next((folder for folder in folders[1:] if folder.is_symlink()), None):
            raise CotfaithError(
                f"{linked} is a symbolic link, and a run writes to its own folders; put a folder there."
            )
        with ExitStack() as stack:
            stack.enter_context(lock(self.path / PREFIX, shared=shard is not None))
            if shard is None:
                for folder in folders:
                    for half_written in folder.glob(".*.tmp"):
                        half_written.unlink()
            else:
                stack.enter_context(lock(self.path / f"{PREFIX}-shard-{shard[0]}-of-{shard[1]}"))
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One shard at a time; the others wait."""
        with lock(self.path / f"{PREFIX}-alone", wait=True):
            yield

    def update_manifest(self, changes: Mapping[str, Any]) -> None:
        """Replace parts of the manifest in one move; numbers that are not finite become null."""
        with lock(self.path / f"{PREFIX}-manifest", wait=True):
            write_json(self._manifest, self.read_manifest() | shared(changes))

    def pin(self, name: str, value: Any) -> None:
        """Write down what the run's numbers rest on, once; CotfaithError when it is something else by now.

        Units of other weights or other data would stand beside the old ones and be averaged with them.
        """
        with lock(self.path / f"{PREFIX}-manifest", wait=True):
            manifest = self.read_manifest()
            pinned = manifest.get("pinned", {})
            difference = _differing_key(shared(pinned.get(name, plain(value))), shared(plain(value)), name)
            if difference is not None:
                raise CotfaithError(
                    f"{self.path} holds results of other inputs: {difference}; choose a new output folder or delete it."
                )
            if name not in pinned:
                write_json(self._manifest, manifest | {"pinned": pinned | {name: shared(value)}})

    def read_manifest(self) -> dict[str, Any]:
        """Config, models with weight hashes, versions, seeds, device, checks; CotfaithError where it is not whole."""
        try:
            manifest = json.loads(self._manifest.read_text("utf-8"))
            if isinstance(manifest, dict):
                return manifest
            raise ValueError("it holds no object")
        except OSError as error:
            raise CotfaithError(f"Cannot read {self._manifest} ({error.strerror}); was the run moved?") from error
        except (ValueError, RecursionError) as error:
            raise CotfaithError(f"{self._manifest} is not whole JSON ({error}); delete it and run again.") from error


def _differing_key(old: Any, new: Any, prefix: str = "") -> str | None:
    """Dotted name of the first key at which two JSON values differ, None where they are equal."""
    if old == new:
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return next(found for i, (a, b) in pairs if (found := _differing_key(a, b, f"{prefix}[{i}]")))
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return f"{prefix or 'config'} is {old!r} there, {new!r} here"
    keys = sorted(old.keys() | new.keys())
    name = f"{prefix}." if prefix else ""
    for key in keys:
        if key in old and key in new:
            if found := _differing_key(old[key], new[key], name + key):
                return found
        else:
            there, here = (repr(side[key]) if key in side else "nothing" for side in (old, new))
            return f"{name}{key} is {there} there, {here} here"
    return None
