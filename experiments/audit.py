"""Known vulnerabilities of every package in constraints.txt, from a copy of PyPA's advisory database (no network).

    git clone --bare https://github.com/pypa/advisory-database advisories
    python experiments/audit.py advisories > experiments/results/audit.json

The copy is a git repository, with or without a work tree. As OSV says, a version is affected where an advisory lists it
or has it in a range of type ECOSYSTEM; withdrawn advisories are only counted. One that has neither, or a range whose
ends are no versions, stands under `undecided`. What each of both means for this package is JUDGED by hand.

The kept result is of the fork westonsteimel/advisory-database-pypa; what was published after its date is not in it.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
_PAST_TORCH_2_7 = (
    "Last seen affected in 2.5 to 2.7.1, which the entry writes as no version (2.6.0-cu124, 2.6.0-NA); 2.13.0 is "
    "later. The function named is called nowhere in this package, and no data reach it."
)
JUDGED = {f"PYSEC-2025-{number}": _PAST_TORCH_2_7 for number in (189, 190, 192, 193, 194, 195, 196, 197, 210)}
"""Of advisories by id: whether what they describe can be reached through this package."""

Standing = Literal["affected", "not affected", "undecided", "withdrawn"]


def audit(database: Path, pins: Mapping[str, str]) -> dict[str, Any]:
    """What the database knows of the packages `pins`, name to version."""
    pinned: dict[str, str] = {canonicalize_name(name): version for name, version in pins.items()}
    found: dict[Standing, list[dict[str, Any]]] = {
        standing: [] for standing in ("affected", "not affected", "undecided", "withdrawn")
    }
    for name, advisory in advisories(database):
        if name in pinned:
            found[standing(advisory, name, pinned[name])].append(_row(advisory, name, pinned[name]))
    commit, date = _git(database, "log", "-1", "--format=%H %cI").decode().split()
    return {
        "database": {"commit": commit, "date": date},
        "packages": pinned,
        "advisories": {standing: len(rows) for standing, rows in found.items()},
        "affected": found["affected"],
        "undecided": found["undecided"],
    }


def advisories(database: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every advisory of the newest commit, with the package in whose folder it lies, in the order of their paths."""
    with tarfile.open(fileobj=io.BytesIO(_git(database, "archive", "HEAD", "vulns"))) as archive:
        for member in archive:
            if member.name.endswith(".yaml") and (file := archive.extractfile(member)):
                yield canonicalize_name(Path(member.name).parent.name), yaml.load(file, yaml.CBaseLoader)


def standing(advisory: Mapping[str, Any], name: str, version: str) -> Standing:
    """Where `version` of the package stands."""
    if "withdrawn" in advisory:
        return "withdrawn"
    entries = [entry for entry in advisory["affected"] if canonicalize_name(entry["package"]["name"]) == name]
    listed = {listed for entry in entries for listed in entry.get("versions", ())}
    ranges = _ranges(entries)
    try:
        if version in listed or any(_within(one["events"], Version(version)) for one in ranges):
            return "affected"
    except InvalidVersion:
        return "undecided"
    return "not affected" if listed or ranges else "undecided"


def _ranges(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [one for entry in entries for one in entry.get("ranges", ()) if one["type"] == "ECOSYSTEM"]


def _within(events: Sequence[Mapping[str, str]], version: Version) -> bool:
    """The last event that `version` has passed decides."""
    inside = False
    for at, kind in sorted((Version(at), kind) for event in events for kind, at in event.items()):
        if version > at or (version == at and kind != "last_affected"):
            inside = kind == "introduced"
    return inside


def _row(advisory: Mapping[str, Any], name: str, version: str) -> dict[str, Any]:
    events = [event for one in _ranges(advisory["affected"]) for event in one["events"]]
    return {
        "package": name,
        "version": version,
        "id": advisory["id"],
        "aliases": advisory.get("aliases", []),
        "fixed_in": [event["fixed"] for event in events if "fixed" in event],
        "summary": " ".join((advisory.get("summary") or advisory.get("details", "")).split())[:300],
        "judged": JUDGED.get(advisory["id"], "not judged yet"),
    }


def _git(database: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(database), *arguments], capture_output=True, check=True).stdout


def main() -> None:
    rows = (line.partition("==") for line in CONSTRAINTS.read_text().split())
    found = audit(Path(sys.argv[1]), {name: version for name, _, version in rows})
    json.dump(found, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
