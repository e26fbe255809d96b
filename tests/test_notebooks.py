"""The notebooks run from top to bottom, and what is committed of them is small and names no machine."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_there_are_five_and_each_says_what_the_reader_will_be_able_to_do():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]
    for path in NOTEBOOKS:
        first = nbformat.read(path, 4).cells[0].source
        assert first.startswith("# ")
        assert "After this page you can" in first


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_executed_small_and_names_no_machine(path):
    text = path.read_text()
    assert len(text) < 120_000
    assert "/home/" not in text
    assert "site-packages" not in text
    assert outputs(nbformat.read(path, 4))


@pytest.mark.smollm2
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path):
    notebook = nbformat.read(path, 4)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    kinds = {kind for output in outputs(notebook) for kind in output.get("data", {})}
    assert kinds >= ({"image/png"} if path.name[:2] == "03" else {"text/html"})
