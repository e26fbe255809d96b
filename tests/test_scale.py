"""Shards and a real Ray cluster of two nodes on this machine: workers and a node are killed, and the records are those of
one process, bit for bit where each process has as many threads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch

from cotfaith_mech import jobs, scale, units
from cotfaith_mech.chains import Chain
from cotfaith_mech.config import StudyConfig, load_config, parse_config
from cotfaith_mech.errors import CotfaithError, EndpointError
from cotfaith_mech.options import shard_of
from cotfaith_mech.records import RunDirectory
from cotfaith_mech.scale import Crew, measure_on_ray
from cotfaith_mech.study import begin, measure_study, problems_of, run_study

from .tiny_study import write_tiny_study

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


def test_the_load_script_runs_the_code_of_a_study() -> None:
    command = [sys.executable, str(EXPERIMENTS / "load_units.py"), "--units", "20"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(ended.stdout)
    assert (found["units"], found["query_rows"]) == (20, 20)


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


def test_seeds_and_names_follow_from_content_and_not_from_place(tmp_path: Path) -> None:
    """Fewer problems, in another order: the same units, and what needs no other problem's chain has the same records."""
    path = write_tiny_study(tmp_path, 4, tests=["filler", "paraphrase", "shuffle"], draws=2, mechanisms=["knockout"])
    whole = measure_study(load_config(path), tmp_path / "whole")
    rows = (tmp_path / "rows.jsonl").read_text().split("\n")
    (tmp_path / "rows.jsonl").write_text("\n".join([rows[3], rows[1]]))
    part = measure_study(load_config(path), tmp_path / "part")
    names = {run: {file.name for file in (run.path / "records").iterdir()} for run in (whole, part)}
    assert len(names[part]) == 2
    assert names[part] < names[whole]
    records = whole.read_records()
    assert records.seed.nunique() > 1
    of_part = records[records.problem_id.isin(["p1", "p3"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(part.read_records(), of_part, check_exact=True)


def test_a_run_that_has_just_begun_makes_no_way_for_another_config(config: StudyConfig, tmp_path: Path) -> None:
    """While its first process loads a model there is nothing but a manifest; shards would mix, a whole study conclude by
    the other's config."""
    given = config.model_dump(mode="json")
    for shard in (None, (0, 3)):
        run = RunDirectory.create(tmp_path / "run", given)
        with run.writing(shard), pytest.raises(CotfaithError, match="being written by"):
            measure_study(config.model_copy(update={"draws": 3}), run.path, shard=(1, 3))
        assert run.read_manifest()["config"] == given
    RunDirectory.create(run.path, given | {"draws": 3})
    with run.writing((0, 3)), pytest.raises(CotfaithError, match="begun with another config a moment ago"):
        begin(config, run)


def test_chains_that_changed_between_two_starts_are_refused(config: StudyConfig, tmp_path: Path) -> None:
    """Units of the old ones would be averaged with those of the new."""
    run = measure_study(config, tmp_path / "run", shard=(0, 3))
    rows = run.read_chains()
    run.write_chains(rows[:-1])
    run = measure_study(config, run.path, shard=(1, 3))
    assert run.read_chains() == rows
    chain = replace(Chain.from_json(rows[0]), steps=("Another step.",))
    run.write_chains([rows[0] | chain.to_json(), *rows[1:]])
    with pytest.raises(CotfaithError, match=r"other inputs: chains\.sha256 is"):
        measure_study(config, run.path, shard=(2, 3))


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
    """The worker that writes the chains, one at a unit of the first reader, and at the second reader's the node with two
    of the three workers."""
    started, finished, deaths = [], [], []
    count = scale._Gang._count_death

    start = scale._Cluster.start

    def dying(made: Any, *hands: Any) -> Any:
        started.append(start(made, *hands))
        if len(started) == 1:
            made.end(started[0])
        return started[-1]

    def counted(gang: Any, number: int | None, where: str, error: Exception) -> None:
        deaths.append(where)
        count(gang, number, where, error)

    monkeypatch.setattr(scale._Gang, "_count_death", counted)
    monkeypatch.setattr(scale._Cluster, "start", dying)

    def progress(items: Any, label: str) -> Iterator[Any]:
        for item in items:
            yield item
            finished.append(label)
            if len(finished) == 2:
                os.kill(a_worker(), signal.SIGKILL)
            if len(finished) == 8:
                cluster.remove_node(cluster.second)

    for crew in (Crew(gpus=64.0), Crew(cpus=3.0), Crew(workers=2, cpus=3.0)):
        with pytest.raises(CotfaithError, match=r"A worker needs .*'CPU': 2"):
            measure_on_ray(config, tmp_path / "more", crew)
    run = measure_on_ray(config, tmp_path / "run", Crew(workers=3), progress)
    assert len(finished) == alone.n_units()
    assert len(deaths) >= 2
    same(run, alone)
    assert set(run.read_manifest()["models"]) == {"base", "tuned"}


def test_what_a_worker_finds_amiss_is_raised_by_its_methods(
    alone: RunDirectory, config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as it is made: Ray would tell of a death. No file system in common; other problems than the run's."""
    plain = config.model_dump(mode="json")
    lost, misled = scale.Worker(plain, str(tmp_path / "absent")), scale.Worker(plain, str(alone.path))
    monkeypatch.setattr(scale, "problems_of", lambda _: (problems_of(config)[0][1:],))
    for worker, told in ((lost, "on a file system that all nodes share"), (misled, r"other inputs: data\.sha256 is")):
        for call in (worker.write_chains, lambda worker=worker: worker.take("base", False)):
            with pytest.raises(CotfaithError, match=told):
                call()


def test_workers_may_die_in_loading_while_another_is_at_a_unit() -> None:
    """A node that goes takes all that load on it along."""
    gang: Any = scale._Gang(object.__new__(scale._Cluster), ({}, ""), ("A", False))
    gang.calls = {"call": ("worker", 4)}
    for _ in range(9):
        gang._count_death(None, "while loading", RuntimeError())
    gang.calls = {"call": ("worker", None)}
    with pytest.raises(CotfaithError, match="3 workers of 'A' died while loading"):
        gang._count_death(None, "while loading", RuntimeError())


@pytest.mark.parametrize(("cpus", "gpus"), [(0.0, 0.0), (-1.0, 1.0), (1.0, -0.5)])
def test_a_worker_without_a_share_of_a_node_is_refused(cpus: float, gpus: float) -> None:
    with pytest.raises(CotfaithError, match="give it a share"):
        Crew(cpus=cpus, gpus=gpus)


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
