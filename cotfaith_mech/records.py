"""One measured number is a Record; a RunDirectory keeps them on disk, one parquet file per finished unit of work.

1. A unit is one (reader, chain) under one plan; its name is a hash of the three, so the same work has the same name.
2. Whatever is written goes to a temporary name in the same folder, is flushed to the disk, and is renamed: a file with
   its final name is whole. A killed run therefore resumes to the same table as an unkilled one, row for row.
3. The long table is the concatenation of the unit files in the order of their names.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from .errors import CotfaithError
from .locks import PREFIX, lock
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
_KEPT_META = "units.json.gz"
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
    columns = list(zip(*map(astuple, records), strict=True)) or [()] * len(COLUMNS)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def as_frame(table: pa.Table) -> pd.DataFrame:
    """A table of SCHEMA in pandas; integers that may be null are Int64."""
    return table.to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)


def unit_id(reader_identity: Any, chain_id: str, plan: Any) -> str:
    """Content hash naming one unit of work; `reader_identity` and `plan` are any JSON-like values."""
    content = json.dumps(_plain([reader_identity, chain_id, plan]), sort_keys=True, allow_nan=False)
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
            _write_json(path / "manifest.json", {"config": config})
        return cls(path)

    @classmethod
    def check(cls, path: Path, config: Mapping[str, Any]) -> bool:
        """Whether `path` holds a run of `config`; raises what `create` raises where another thing is there."""
        entries = [entry.name for entry in path.iterdir()] if path.is_dir() else []
        there = [name for name in entries if not name.endswith(".tmp") and not name.startswith(PREFIX)]
        if not (path / "manifest.json").is_file():
            if there:
                raise CotfaithError(f"{path} holds files but no run; choose a new or empty output folder.")
            return False
        difference = _differing_key(cls(path).read_manifest().get("config"), _plain(config))
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
        _make_folder(folder)
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
        content = {"unit": unit, **meta} | ({_EXCLUSIONS: list(exclusions)} if exclusions else {})
        encoded = json.dumps(_plain(content), allow_nan=False).encode()
        table = arrow_table(records).replace_schema_metadata({_META_KEY: encoded})
        _write_atomically(self._unit(unit), lambda file: pq.write_table(table, file))

    def leave_out_unit(self, unit: str, exclusions: Sequence[Mapping[str, Any]]) -> None:
        """Write down that a unit cannot be measured, and why; it counts as finished."""
        self.write_unit(unit, [], {_LEFT_OUT: True}, exclusions)

    def _units(self) -> list[Path]:
        return sorted(path for path in (self.path / "records").glob("*.parquet") if not path.name.startswith("."))

    def read_records(self) -> pd.DataFrame:
        """The long table of all finished units, columns COLUMNS; integers that may be null are Int64."""
        tables = [_read_parquet(path, SCHEMA).replace_schema_metadata(None) for path in self._units()]
        return as_frame(pa.concat_tables(tables) if tables else SCHEMA.empty_table())

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
            return json.loads(gzip.decompress(kept.read_bytes()))
        return [_unit_meta(path) for path in self._units()]

    def compacted(self, path: str | Path, without: Sequence[str] = ()) -> RunDirectory:
        """A copy in `path`, all records in one file, a tenth of the size: to keep, draw and conclude from again, not
        to resume. Measures `without` are left out, which the manifest says; so are figures and report, made from it."""
        path = Path(path)
        table = pa.concat_tables([_read_parquet(unit, SCHEMA).replace_schema_metadata(None) for unit in self._units()])
        table = table.filter(pa.array([measure not in without for measure in table["measure"].to_pylist()], pa.bool_()))
        options: dict[str, Any] = {"compression": "zstd", "compression_level": 19, "use_byte_stream_split": ["value"]}
        options["use_dictionary"] = [name for name in table.column_names if name != "value"]
        _write_atomically(path / "records" / "all.parquet", lambda file: pq.write_table(table, file, **options))
        metas = gzip.compress(json.dumps(self._metas(), allow_nan=False).encode(), 9, mtime=0)
        _write_atomically(path / "records" / _KEPT_META, lambda file: file.write(metas))
        for name in ("chains.jsonl", "exclusions.jsonl", "estimates.parquet"):
            if (self.path / name).is_file():
                content = (self.path / name).read_bytes()
                _write_atomically(path / name, lambda file, content=content: file.write(content))
        _write_json(path / "manifest.json", self.read_manifest() | {"records_left_out": list(without)})
        return RunDirectory(path)

    def write_chains(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """One chain per line: `Chain.to_json()` and the study's own keys."""
        _write_jsonl(self.path / "chains.jsonl", rows)

    def read_chains(self) -> list[dict[str, Any]]:
        """What `write_chains` wrote; `Chain.from_json` makes a Chain of a row."""
        return _read_jsonl(self.path / "chains.jsonl")

    def add_exclusion(self, **row: str | None) -> None:
        """Put down one thing that was left out, as `add_exclusions` does."""
        self.add_exclusions([row])

    def add_exclusions(self, rows: Iterable[Mapping[str, str | None]]) -> None:
        """Put down what was left out of the study beside its units (those have their own), and why: rows as of
        `read_exclusions`, absent keys None; the same twice is one line."""
        known = self._common_exclusions()
        kept = {tuple(row.values()): row for row in known}
        for given in rows:
            row = {name: given.get(name) for name in _EXCLUDED}
            kept.setdefault(tuple(row.values()), row)
        if len(kept) > len(known):
            _write_jsonl(self.path / "exclusions.jsonl", kept.values())

    def _common_exclusions(self) -> list[dict[str, Any]]:
        path = self.path / "exclusions.jsonl"
        return _read_jsonl(path) if path.is_file() else []

    def read_exclusions(self) -> list[dict[str, Any]]:
        """What was left out: `problem_id chain_id reader stage reason` a row, those of units behind the others; empty
        where nothing was."""
        of_units = [row for meta in self._metas() for row in meta.get(_EXCLUSIONS, [])]
        return list({tuple(row.values()): row for row in [*self._common_exclusions(), *of_units]}.values())

    def write_estimates(self, estimates: Sequence[Estimate]) -> None:
        """Write all estimates; a note is kept behind the method, after '; '."""
        rows = [asdict(estimate) for estimate in estimates]
        for row in rows:
            row["method"] = "; ".join(part for part in (row["method"], row.pop("note")) if part)
        table = pa.Table.from_pylist(rows, schema=_ESTIMATES)
        _write_atomically(self.path / "estimates.parquet", lambda file: pq.write_table(table, file))

    def read_estimates(self) -> list[Estimate]:
        """Every Estimate of the run, in the order written; CotfaithError where none was written yet."""
        rows = _read_parquet(self.path / "estimates.parquet", _ESTIMATES).to_pylist()
        for row in rows:
            row["method"], _, row["note"] = row["method"].partition("; ")
        return [Estimate(**row) for row in rows]

    @contextmanager
    def writing(self, shard: tuple[int, int] | None = None) -> Iterator[None]:
        """Keep other processes from writing here; shards (number, of how many) let each other in, each number once.

        What killed processes left half written is deleted. Raises CotfaithError where another process is writing.
        """
        with ExitStack() as stack:
            stack.enter_context(lock(self.path / PREFIX, shared=shard is not None))
            if shard is None:
                for folder in (self.path, self.path / "records", self.path / "figures"):
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
            _write_json(self._manifest, self.read_manifest() | dict(changes))

    def pin(self, name: str, value: Any) -> None:
        """Write down what the run's numbers rest on, once; CotfaithError when it is something else by now.

        Units of other weights or other data would stand beside the old ones and be averaged with them.
        """
        with lock(self.path / f"{PREFIX}-manifest", wait=True):
            manifest = self.read_manifest()
            pinned = manifest.get("pinned", {})
            difference = _differing_key(pinned.get(name, _plain(value)), _plain(value), name)
            if difference is not None:
                raise CotfaithError(
                    f"{self.path} holds results of other inputs: {difference}; choose a new output folder or delete it."
                )
            if name not in pinned:
                _write_json(self._manifest, manifest | {"pinned": pinned | {name: value}})

    def read_manifest(self) -> dict[str, Any]:
        """Config, models with weight hashes, versions, seeds, device, checks; CotfaithError where it is not whole."""
        try:
            manifest = json.loads(self._manifest.read_text("utf-8"))
            if isinstance(manifest, dict):
                return manifest
            raise ValueError("it holds no object")
        except (ValueError, RecursionError) as error:
            raise CotfaithError(f"{self._manifest} is not whole JSON ({error}); delete it and run again.") from error


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: numpy scalars and arrays unpacked, paths as text, non-finite floats None."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value


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
    absent = "nothing"
    return next(
        found for key in keys if (found := _differing_key(old.get(key, absent), new.get(key, absent), name + key))
    )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CotfaithError(f"Cannot make folder {folder} ({error.strerror}); choose a path you may write.") from error


def _write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    _make_folder(path.parent)
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        remedy = "choose a folder you may write"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "free some space and give the same command again, what was finished is kept"
        raise CotfaithError(f"Cannot write {path} ({error.strerror}); {remedy}.") from error


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(_plain(value), indent=1, allow_nan=False)
    _write_atomically(path, lambda file: file.write(text.encode()))


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(_plain(row), allow_nan=False) + "\n" for row in rows)
    _write_atomically(path, lambda file: file.write(text.encode()))


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise CotfaithError(f"{path} does not exist; run the study that writes it first.")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line:
            continue
        try:
            rows.append(json.loads(line.decode()))
        except (ValueError, RecursionError) as error:
            raise CotfaithError(
                f"{path} line {number} is not JSON ({error}); delete the line and run again."
            ) from error
        if not isinstance(rows[-1], dict):
            raise CotfaithError(f"{path} line {number} holds no JSON object; delete the line and run again.")
    return rows


def _parquet_schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _not_whole(path, error) from error


def _unit_meta(path: Path) -> dict[str, Any]:
    try:
        return json.loads((_parquet_schema(path).metadata or {})[_META_KEY])
    except (KeyError, ValueError) as error:
        raise _not_whole(path, error) from error


def _not_whole(path: Path, error: Exception) -> CotfaithError:
    return CotfaithError(f"{path} is not a whole parquet file ({error}); delete it and run again.")


def _read_parquet(path: Path, schema: pa.Schema) -> pa.Table:
    if not path.is_file():
        raise CotfaithError(f"{path} does not exist; run the study that writes it first.")
    found = _parquet_schema(path)
    if found.names != schema.names or found.types != schema.types:
        raise CotfaithError(f"{path} has columns {found.names}, expected {schema.names}; delete it and run again.")
    try:
        table = pq.read_table(path)
        table.validate(full=True)
        return table
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _not_whole(path, error) from error
