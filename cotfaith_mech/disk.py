"""Files that are whole or not there, and what is told of one that is spoilt.

What is written goes to a temporary name in the same folder, is flushed to the disk, and is renamed.
"""

from __future__ import annotations

import errno
import gzip
import json
import math
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .errors import CotfaithError

MOST_BYTES = 2**30
"""Of a compressed file, unpacked."""


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: numpy scalars and arrays unpacked, paths as text, non-finite floats None."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value


def make_folder(folder: Path) -> None:
    """The folder and those above it, where they are missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CotfaithError(f"Cannot make folder {folder} ({error.strerror}); choose a path you may write.") from error


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file that takes the place of `path` in one move, also where that is a symbolic link."""
    make_folder(path.parent)
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
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    except OSError as error:
        remedy = "choose a folder you may write"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "free some space and give the same command again, what was finished is kept"
        raise CotfaithError(f"Cannot write {path} ({error.strerror}); {remedy}.") from error


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(plain(value), indent=1, allow_nan=False)
    write_atomically(path, lambda file: file.write(text.encode()))


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows)
    write_atomically(path, lambda file: file.write(text.encode()))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
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


def read_parquet(path: Path, schema: pa.Schema) -> pa.Table:
    """The table in `path`, with what its schema carries; CotfaithError where that has other columns than `schema`, or
    the file is not whole."""
    with _opened(path) as file:
        found = file.schema_arrow
        if found.names != schema.names or found.types != schema.types:
            raise CotfaithError(f"{path} has columns {found.names}, expected {schema.names}; delete it and run again.")
        table = file.read()
        table.validate(full=True)
        return table


def read_carried(path: Path, key: bytes) -> Any:
    """The JSON value that the schema of the parquet file `path` carries under `key`; the table is not read."""
    with _opened(path) as file:
        return json.loads((file.schema_arrow.metadata or {})[key])


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    if not path.is_file():
        raise CotfaithError(f"{path} does not exist; run the study that writes it first.")
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except CotfaithError:
        raise
    except (OSError, ValueError, KeyError, RecursionError, pa.ArrowException) as error:
        raise CotfaithError(f"{path} is not a whole parquet file ({error}); delete it and run again.") from error


def read_gzip(path: Path) -> bytes:
    """What the file unpacks to; CotfaithError where that is more than MOST_BYTES, or it is no whole gzip file."""
    try:
        with gzip.open(path) as file:
            content = file.read(MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise CotfaithError(f"{path} is not a whole gzip file ({error}); copy it again.") from error
    if len(content) > MOST_BYTES:
        raise CotfaithError(f"{path} unpacks to more than {MOST_BYTES} bytes; give a kept run as it was written.")
    return content
