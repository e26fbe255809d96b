"""What is installed and shipped: releases with their hashes, known vulnerabilities, licences."""

from __future__ import annotations

import csv
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(ROOT / "experiments"), *sys.path])
    return importlib.import_module


# hashes


def test_the_locks_name_the_releases_of_the_constraints_each_once_with_hashes(script: Any) -> None:
    """All but torch, whose builds lie in different places."""
    locked = script("lock").locked
    use, dev = locked(ROOT / "use.lock"), locked(ROOT / "dev.lock")
    assert not set(use) & set(dev)
    pinned = locked(ROOT / "constraints.txt")
    assert pinned.pop("torch")
    assert {**use, **dev} == pinned
    for part in ("use.lock", "dev.lock"):
        text = (ROOT / part).read_text()
        for entry in re.split(r"^(?=\w)", text.partition("\n")[2], flags=re.MULTILINE)[1:]:
            assert re.fullmatch(r"[\w.-]+==[\w.+]+( \\\n    --hash=sha256:[0-9a-f]{64})+\n", entry), entry
        assert "://" not in text


def test_the_locks_hold_all_that_the_package_requires_and_nothing_else(script: Any) -> None:
    lock = script("lock")
    of_its_builds = re.compile("torch|nvidia-.*|cuda-.*|triton")
    use, dev = (set(lock.locked(ROOT / f"{part}.lock")) for part in ("use", "dev"))
    needed, for_all = lock.needed(), lock.needed(["dev"])
    assert {name for name in needed if not of_its_builds.fullmatch(name)} == use - {lock.WITHOUT_ITS_OWN}
    assert {name for name in for_all if not of_its_builds.fullmatch(name)} - use == dev


# vulnerabilities


def advisory(number: int, *events: dict[str, str], **more: Any) -> dict[str, Any]:
    ranges = [{"type": "ECOSYSTEM", "events": list(events)}] if events else []
    package = {"name": "My.Package", "ecosystem": "PyPI"}
    versions = more.pop("versions", [])
    affected = [{"package": package, "ranges": ranges, "versions": versions}]
    return {"id": f"PYSEC-2026-{number}", "details": "Bad\nthings.", "affected": affected, **more}


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A git repository with one folder a package."""
    since = {"introduced": "0"}
    rows = [
        advisory(1, since, {"fixed": "2.10"}, aliases=["CVE-2026-1"]),
        advisory(2, since, {"fixed": "2.9"}),
        advisory(3, {"introduced": "2.9.1"}, {"fixed": "3"}),
        advisory(4, since, {"last_affected": "2.9"}),
        advisory(5, since, {"last_affected": "2.8"}),
        advisory(6, since, {"fixed": "1.5"}, {"introduced": "2.0"}),
        advisory(7, versions=["2.9"]),
        advisory(8, versions=["2.90"]),
        advisory(9, since, withdrawn="2026-01-01T00:00:00Z"),
        advisory(10, since, {"last_affected": "2.6.0-NA"}),
        advisory(11),
    ]
    folder = tmp_path / "vulns" / "my-package"
    folder.mkdir(parents=True)
    for row in rows:
        (folder / f"{row['id']}.yaml").write_text(yaml.safe_dump(row))
    (tmp_path / "vulns" / "other").mkdir()
    (tmp_path / "vulns" / "other" / "PYSEC-2026-12.yaml").write_text(yaml.safe_dump(advisory(12, since)))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    return tmp_path


def test_versions_are_affected_where_listed_or_in_a_range_and_what_cannot_be_decided_is_said(
    script: Any, database: Path
) -> None:
    found = script("audit").audit(database, {"my_package": "2.9", "another": "1"})
    numbers = {kind: [int(row["id"].rpartition("-")[2]) for row in found[kind]] for kind in ("affected", "undecided")}
    assert {kind: sorted(some) for kind, some in numbers.items()} == {"affected": [1, 4, 6, 7], "undecided": [10, 11]}
    assert found["advisories"] == {"affected": 4, "not affected": 4, "undecided": 2, "withdrawn": 1}
    assert found["packages"] == {"my-package": "2.9", "another": "1"}
    first = next(row for row in found["affected"] if row["id"] == "PYSEC-2026-1")
    assert (first["aliases"], first["fixed_in"], first["summary"]) == (["CVE-2026-1"], ["2.10"], "Bad things.")
    assert first["judged"] == "not judged yet"
    assert len(found["database"]["commit"]) == 40


def test_the_kept_audit_is_of_these_releases_and_every_finding_is_judged(script: Any) -> None:
    kept = json.loads((RESULTS / "audit.json").read_text())
    assert kept["packages"] == script("lock").locked(ROOT / "constraints.txt")
    assert [row["id"] for row in kept["affected"] + kept["undecided"] if row["judged"] == "not judged yet"] == []


# licences


def test_every_release_and_every_shipped_weight_has_a_licence(script: Any) -> None:
    with (RESULTS / "licences.csv").open() as file:
        rows = list(csv.DictReader(file))
    pinned = {row["name"]: row["version"] for row in rows if row["version"]}
    assert pinned == dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert [row["name"] for row in rows if row["licence"].startswith("not ")] == []
    named = {row["name"].split(" ")[0] for row in rows if not row["version"]}
    shipped = {str(path.parent.relative_to(ROOT)) for path in (ROOT / "cotfaith_mech").rglob("*.safetensors")}
    assert shipped
    assert [folder for folder in shipped if not any(folder.startswith(f"{place}/") for place in named)] == []
