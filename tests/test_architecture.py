"""Data flows one way and imports follow it; heavy libraries stay behind the Model boundary."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cotfaith_mech"

ORDER = [
    "errors interrupts markup locks disk privacy replies seeds",
    "problems chains sites metrics stats answers certificate",
    "arithmetic organisms calculations paraphrase records formats",
    "edits datasets_io inspect_logs model interop",
    "paraphrasers backends measured sampling reading",
    "variants endpoint",
    "behaviour contrast trace",
    "patching knockout mediation crossmodel",
    "config attribution attribution_patching crosscheck outcomes bench bench_cells bench_patching doctor",
    "arms tables",
    "compare bridge",
    "merge",
    "views figure_style chain_figures figures notebook",
    "merged_figures",
    "report",
    "conclude",
    "authoring progress",
    "units",
    "jobs",
    "study",
    "validation plan scale",
    "summary",
    "options execute",
    "cli",
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names.split()}
NO_TORCH = [
    "errors",
    "privacy",
    "replies",
    "problems",
    "chains",
    "sites",
    "metrics",
    "stats",
    "answers",
    "certificate",
    "arithmetic",
    "organisms",
    "paraphrase",
    "disk",
    "records",
    "edits",
    "formats",
    "inspect_logs",
    "datasets_io",
    "calculations",
    "paraphrasers",
    "variants",
    "outcomes",
    "compare",
    "bridge",
    "views",
    "figure_style",
    "chain_figures",
    "figures",
    "report",
    "markup",
    "tables",
    "notebook",
]
LIBRARIES = {"transformers", "transformer_lens", "nnsight", "peft"}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> tuple[set[str], set[str]]:
    """Rooms of this package, and top-level libraries, that the module imports when it is loaded or run."""
    rooms, libraries = set(), set()
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            libraries |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            libraries.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.level == depth:
            rooms |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return rooms, libraries


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    assert room(path) in RANK, f"{room(path)} has no place in the order: give it one"
    rooms, libraries = imports(path)
    above = {other for other in rooms if RANK[other] > RANK[room(path)]}
    allowed = {"backends"} if room(path) == "model" else set()
    assert above <= allowed
    if room(path) != "backends":
        assert not libraries & LIBRARIES


@pytest.mark.parametrize("name", NO_TORCH)
def test_statistics_and_text_need_no_torch(name: str) -> None:
    code = f"import sys, cotfaith_mech.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_loads_no_heavy_library() -> None:
    code = "import sys, cotfaith_mech.cli; sys.exit(any(m in sys.modules for m in ('torch', 'pandas', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
