"""Shards and a real Ray cluster of two nodes on this machine: workers and a node are killed, and the records are those of
one process, bit for bit where each process has as many threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch

from cotfaith_mech import jobs, scale, units
from cotfaith_mech.config import StudyConfig, parse_config
from cotfaith_mech.errors import CotfaithError, EndpointError
from cotfaith_mech.options import shard_of
from cotfaith_mech.records import RunDirectory
from cotfaith_mech.scale import Crew, measure_on_ray
from cotfaith_mech.study import measure_study, run_study

EXPERIMENTS = Path(__file__).parent.parent / "experiments"

STUDY = {
    "readers": [{"name": name, "model": "organism:mix_100"} for name in ("base", "tuned")],
    "problems": "organism:mix_100:6:7",
    "tests": ["filler", "paraphrase", "conflict"],
    "draws": 2,
    "mechanisms": ["knockout"],
    "cross_model": "write_read",
    "crosscheck_cells": 0,
}


@pytest.fixture(scope="module")
def config() -> StudyConfig:
    return parse_config(STUDY)


@pytest.fixture(scope="module")
def alone(config: StudyConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunDirectory]:
    """The study in one process of one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield measure_study(config, tmp_path_factory.mktemp("scale") / "alone")
    torch.set_num_threads(threads)


def same(run: RunDirectory, other: RunDirectory) -> None:
    pd.testing.assert_frame_equal(run.read_records(), other.read_records(), check_exact=True)
    assert run.read_exclusions() == other.read_exclusions()
    assert run.read_unit_meta() == other.read_unit_meta()
    assert run.read_chains() == other.read_chains()


def test_fifty_kills_lose_nothing_and_add_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(EXPERIMENTS / "kill_study.py"), "--kills", "50"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert '"kills": 50' in ended.stdout
    assert '"equal": true' in ended.stdout


def test_shards_in_any_order_make_the_whole(alone: RunDirectory, config: StudyConfig, tmp_path: Path) -> None:
    """Each measures units of its own, none nothing, and the last call finds nothing left to do."""
    units = []
    for number in (2, 0, 1):
        run = run_study(config, tmp_path / "run", shard=(number, 3))
        units.append(run.n_units())
    assert 0 < units[0] < units[1] < units[2] == alone.n_units()
    assert not (run.path / "report.html").exists()
    before = {path: path.stat().st_mtime_ns for path in (run.path / "records").iterdir()}
    same(measure_study(config, run.path), alone)
    assert {path: path.stat().st_mtime_ns for path in (run.path / "records").iterdir()} == before


def test_a_shard_is_written_by_one_process_and_shards_keep_a_whole_study_out(
    alone: RunDirectory, config: StudyConfig
) -> None:
    with alone.writing((0, 3)):
        with pytest.raises(CotfaithError, match="being written by"), alone.writing():
            pass
        with pytest.raises(CotfaithError, match="being written by process"), alone.writing((0, 3)):
            pass
        with alone.writing((1, 3)):
            pass
    with alone.writing():
        with pytest.raises(CotfaithError, match=f"being written by process {os.getpid()} on"):
            measure_study(config, alone.path)
        with pytest.raises(CotfaithError, match="being written by process"), alone.writing((0, 3)):
            pass
    with alone.writing():
        pass


@pytest.mark.parametrize("text", ["3", "0/4", "5/4", "1/0", "a/b", "-1/2", "1/2/3"])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(CotfaithError, match="write I/N with I from 1 to N"):
        shard_of(text)
    assert shard_of("3/16") == (2, 16)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes on loopback, the head with one core and the other with two; workers as urgent as the tests beside."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    made.second = made.add_node(num_cpus=2)
    ray.init(address=made.address, logging_level="ERROR", log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def a_worker() -> int:
    """The process of a worker that is at a unit."""
    for _ in range(3000):
        for process in psutil.process_iter(["cmdline"]):
            if (process.info["cmdline"] or [])[:1] == ["ray::Worker.measure"]:
                return process.pid
        time.sleep(0.01)
    raise AssertionError("no worker was seen at a unit")


@pytest.mark.filterwarnings("ignore")
def test_a_worker_and_a_node_die_and_the_records_are_those_of_one_process(
    cluster: Any, alone: RunDirectory, config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker at a unit of the first reader, and at the second reader's the node with two of the three workers."""
    finished, deaths = [], []
    count = scale._Gang._count_death

    def counted(gang: Any, number: int | None, where: str, error: Exception) -> None:
        deaths.append(where)
        count(gang, number, where, error)

    monkeypatch.setattr(scale._Gang, "_count_death", counted)

    def progress(items: Any, label: str) -> Iterator[Any]:
        for item in items:
            yield item
            finished.append(label)
            if len(finished) == 2:
                os.kill(a_worker(), signal.SIGKILL)
            if len(finished) == 8:
                cluster.remove_node(cluster.second)

    run = measure_on_ray(config, tmp_path / "run", Crew(workers=3), progress)
    assert len(finished) == alone.n_units()
    assert len(deaths) >= 2
    same(run, alone)
    assert set(run.read_manifest()["models"]) == {"base", "tuned"}
    with pytest.raises(CotfaithError, match="A worker needs"):
        measure_on_ray(config, tmp_path / "more", Crew(gpus=64.0))


def fails(error: type[CotfaithError]) -> Any:
    def fail(*_: Any, **__: Any) -> Any:
        raise error("gone for now")

    return fail


def test_a_server_that_fails_within_a_mechanism_leaves_the_unit_to_be_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: StudyConfig
) -> None:
    monkeypatch.setattr(units, "_mechanism", lambda *_: {"knockout": fails(EndpointError)})
    with pytest.raises(EndpointError, match="gone for now"):
        measure_study(config, tmp_path / "run")
    assert RunDirectory(tmp_path / "run").n_units() == 0


def test_what_ends_the_measuring_of_a_pair_is_no_reason_to_leave_it_out(
    alone: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: StudyConfig
) -> None:
    """A full disk, say: the study stops, and the same command does the rest."""
    with monkeypatch.context() as patched:
        patched.setattr(jobs.PairJob, "measure", fails(CotfaithError))
        with pytest.raises(CotfaithError, match="gone for now"):
            measure_study(config, tmp_path / "run")
    same(measure_study(config, tmp_path / "run"), alone)


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: StudyConfig) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(CotfaithError, match=r"cotfaith-mech\[ray\]"):
        measure_on_ray(config, tmp_path / "run", Crew())
