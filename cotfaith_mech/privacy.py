"""What of a machine and its user is kept out of what a run writes: the home folder, which is written `~`, and secrets.

A text that is data (a question, a chain, a reply) is never altered for a path in it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

_SECRET_NAME = re.compile(r"[?&;][^=&;#]*(?:key|token|secret|pass|sig|auth|credential)[^=&;#]*=", re.IGNORECASE)


def from_home(text: str) -> str:
    """`text` with `~` in place of the user's home folder, wherever a path in it begins so; `os.path.expanduser` leads
    back."""
    for home in _homes():
        text = re.sub(rf"(?<![\w.~-]){re.escape(home)}(?!\w|[.-]\w)", "~", text)
    return text


def _homes() -> list[str]:
    """The home folder as it is named, and as it lies on the disk; none where it is the root, or unknown."""
    home = os.path.expanduser("~").rstrip("/")
    return list(dict.fromkeys([home, os.path.realpath(home)])) if home.startswith("/") else []


def shared(value: Any) -> Any:
    """A JSON-like value with every text in it as of `from_home`."""
    if isinstance(value, str | os.PathLike):
        return from_home(os.fspath(value))
    if isinstance(value, Mapping):
        return {key: shared(item) for key, item in value.items()}
    return [shared(item) for item in value] if isinstance(value, list | tuple) else value


def at_home(value: Any) -> Any:
    """A JSON-like value with the user's home folder in place of a `~` that begins a text: for processes of another
    home."""
    if isinstance(value, str):
        return os.path.expanduser(value) if value.startswith("~/") else value
    if isinstance(value, Mapping):
        return {key: at_home(item) for key, item in value.items()}
    return [at_home(item) for item in value] if isinstance(value, list | tuple) else value


def holds_secret(address: str) -> bool:
    """Whether a web address has a user, a password, or what looks like a key in its query."""
    return "@" in address or bool(_SECRET_NAME.search(address))


def without_password(text: str) -> str:
    """`text` with `***` in place of user and password of the addresses in it."""
    return re.sub(r"(?<=://)[^\s/]*@", "***@", text)
