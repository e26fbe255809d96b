"""Who may write a run directory: locks between processes of one machine, or of several that share a file system.

They are flock's: whatever ends a process frees what it held, so no lock outlives a kill.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .errors import CotfaithError

PREFIX = ".lock"
"""How the names of lock files begin."""


@contextmanager
def lock(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold the lock of the file `path`, `shared` with others that ask for it so.

    Raises CotfaithError, naming the process that holds it, where it is held, unless told to `wait` for it.
    """
    import fcntl

    with _opened(path) as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise CotfaithError(
                f"{path.parent} is being written by {holder}; wait until it ends, or choose another output folder."
            ) from error
        except OSError as error:
            told = f"{path.parent} lies on a file system without locks ({error.strerror}): let one process write it"
            warnings.warn(told, stacklevel=3)
            yield
            return
        if shared:
            yield
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _opened(path: Path) -> IO[str]:
    """The file, made where it is missing; a symbolic link is refused: what it leads to would be emptied."""
    try:
        return open(path, "a+", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))
    except OSError as error:
        if path.is_symlink():
            raise CotfaithError(f"{path} is a symbolic link, and a lock is a file of its own; delete it.") from error
        raise CotfaithError(f"Cannot write {path} ({error.strerror}); choose a folder you may write.") from error
