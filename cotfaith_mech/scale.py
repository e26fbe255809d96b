"""A study's units on the workers of a Ray cluster, which share a file system with this process (extra `ray`).

1. Each worker holds one reader, takes unit after unit and writes each by itself; this process writes the rest.
2. A worker or node that dies loses the units it was at: others do them again, which gives the same records, since a
   unit's seeds and name follow from its content. A unit that ends MOST_DEATHS workers stops the study with its name.
3. Readers come one after the other, so that a cluster of n GPUs holds n copies of one model at a time.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from .conclude import Progress, conclude, silent
from .config import ReaderConfig, StudyConfig, parse_config
from .errors import CotfaithError
from .jobs import Job, PairJob, ReaderJob, info_of, load, pairs_of, pin
from .privacy import at_home
from .records import RunDirectory
from .study import (
    begin,
    leave_out_pair,
    note_reader,
    pin_inputs,
    problems_of,
    take_back_pair,
    write_chains_of,
    write_manifest,
)

MOST_DEATHS = 3


class DeathsError(CotfaithError):
    """Workers die again and again, of which a later run may know nothing."""


@dataclass(frozen=True)
class Crew:
    """How many workers a study has (None: as many as the cluster has room for), and what each holds of a node."""

    address: str | None = None
    workers: int | None = None
    cpus: float = 1
    gpus: float = 0

    def __post_init__(self) -> None:
        if min(self.cpus, self.gpus) < 0 or not self.cpus + self.gpus:
            raise CotfaithError(f"A worker of {self.cpus:g} CPUs and {self.gpus:g} GPUs has no place; give it a share.")


class Worker:
    """What runs on a node: one job, in the run directory `out`. Its methods are called from afar.

    Nothing may fail in __init__: an error there reaches the caller as the worker's death, and not as itself.
    """

    def __init__(self, config: dict[str, Any], out: str) -> None:
        self.given, self.out = config, out
        self.job: Job | None = None

    def _open(self) -> None:
        try:
            self.run = RunDirectory(self.out)
        except CotfaithError as error:
            raise CotfaithError(
                f"A worker does not see the run directory {self.out}; give --out on a file system that all nodes share."
            ) from error
        self.config = parse_config(self.given)
        self.problems = problems_of(self.config)[0]
        pin_inputs(self.problems, self.run)

    def write_chains(self) -> None:
        self._open()
        write_chains_of(self.config, self.problems, self.run, silent)

    def take(self, name: str, pair: bool) -> list[str]:
        """Load what the job of a reader, or of its pair with the first, needs; the names of its units."""
        self._open()
        reader = next(one for one in self.config.readers if one.name == name)
        if pair:
            self.job = PairJob(self.config, reader, self.problems, self.run)
            self.job.load()
        else:
            model = load(self.config, reader)
            pin(self.run, f"reader {name}", info_of(model))
            self.job = ReaderJob(self.config, reader, model, self.problems, self.run)
        return list(self.job.names)

    def measure(self, number: int) -> int:
        assert self.job is not None
        self.job.measure(number)
        return number

    def check(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """What the reader's model is, and the rows of its cross-check."""
        assert isinstance(self.job, ReaderJob)
        return info_of(self.job.model), self.job.known_checks() or self.job.check()


def run_study_on_ray(config: StudyConfig, out: str | Path, crew: Crew, progress: Progress = silent) -> RunDirectory:
    """Run what is missing of `config` on a Ray cluster, then estimate, draw and report here."""
    run = measure_on_ray(config, out, crew, progress)
    with run.writing():
        conclude(run, progress)
    return run


def measure_on_ray(config: StudyConfig, out: str | Path, crew: Crew, progress: Progress = silent) -> RunDirectory:
    """The records of what is missing of `config`, equal to those of `measure_study`. Raises CotfaithError without Ray,
    where the cluster has no room for a worker, and what a worker raises."""
    plain = config.model_dump(mode="json")
    run = RunDirectory.create(out, plain)
    with run.writing(), _Cluster(crew) as cluster:
        problems, manifest = begin(config, run)
        hands = (at_home(plain), str(run.path.resolve()))
        cluster.write_chains(hands)
        for reader in config.readers:
            started, n_units = time.perf_counter(), run.n_units()
            with cluster.gang(hands, reader, pair=False) as gang:
                gang.meet()
                gang.measure(run, progress, f"reader {reader.name}")
                info, rows = gang.check()
            note_reader(manifest, run, reader.name, info, rows, time.perf_counter() - started, run.n_units() > n_units)
        write_manifest(run, manifest)
        for reader in pairs_of(config):
            job = PairJob(config, reader, problems, run)
            if not all(map(run.has_unit, job.names)):
                with cluster.gang(hands, reader, pair=True) as gang:
                    try:
                        gang.meet()
                    except DeathsError:
                        raise
                    except CotfaithError as error:
                        leave_out_pair(run, reader, error)
                        continue
                    gang.measure(run, progress, job.label)
            take_back_pair(run, job)
    return run


class _Cluster:
    """Ray, begun or joined, and left again."""

    def __init__(self, crew: Crew) -> None:
        try:
            self.ray = import_module("ray")
        except ImportError as error:
            raise CotfaithError("--ray needs Ray; install the extra: pip install 'cotfaith-mech[ray]'.") from error
        self.crew, self.began = crew, False

    def __enter__(self) -> _Cluster:
        if not self.ray.is_initialized():
            quiet = {"logging_level": "ERROR", "log_to_driver": False, "include_dashboard": False}
            if self.crew.address not in (None, "local"):
                quiet = {"address": self.crew.address, "logging_level": "ERROR", "log_to_driver": False}
            try:
                self.ray.init(**quiet)
            except (ConnectionError, ValueError, RuntimeError) as error:
                why = " ".join(str(error).split())[:120]
                raise CotfaithError(
                    f"No Ray cluster answers at {self.crew.address!r} ({why}); start one with `ray start --head`, or "
                    "give --ray local."
                ) from error
            self.began = True
        room = self.room()
        self.workers = self.crew.workers or room
        return self

    def __exit__(self, *_: object) -> None:
        if self.began:
            self.ray.shutdown()

    def room(self) -> int:
        """How many workers fit on the cluster at once, each on one node."""
        needs = {name: need for name, need in {"CPU": self.crew.cpus, "GPU": self.crew.gpus}.items() if need}
        has = [{name: node["Resources"].get(name, 0) for name in needs} for node in self.ray.nodes() if node["Alive"]]
        n = sum(int(min(node[name] / need for name, need in needs.items())) for node in has)
        if n < 1:
            raise CotfaithError(f"A worker needs {needs}, and the nodes of the cluster have {has}; ask for less.")
        return n

    def start(self, config: dict[str, Any], out: str) -> Any:
        options = {"num_cpus": self.crew.cpus, "num_gpus": self.crew.gpus, "max_restarts": 0}
        return self.ray.remote(**options)(Worker).remote(config, out)

    def end(self, worker: Any) -> None:
        self.ray.kill(worker)

    def write_chains(self, hands: tuple[dict[str, Any], str]) -> None:
        """Let a worker write the chains, another where it dies."""
        for death in range(1, MOST_DEATHS + 1):
            writer = self.start(*hands)
            try:
                self.ask(writer.write_chains.remote())
                return
            except self.ray.exceptions.RayActorError as error:
                if death == MOST_DEATHS:
                    raise _died("the study", "while writing chains") from error
            finally:
                self.end(writer)

    def ask(self, what: Any) -> Any:
        """The answer to a call; an error that a worker raised is raised as itself."""
        try:
            return self.ray.get(what)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from error

    def gang(self, hands: tuple[dict[str, Any], str], reader: ReaderConfig, *, pair: bool) -> _Gang:
        return _Gang(self, hands, (reader.name, pair))


class _Gang:
    """Workers at one job: one that says what there is to do, then as many as that needs."""

    def __init__(self, cluster: _Cluster, hands: tuple[dict[str, Any], str], task: tuple[str, bool]) -> None:
        self.cluster, self.hands, self.task = cluster, hands, task
        self.calls: dict[Any, tuple[Any, int | None]] = {}
        """What is awaited of which worker: the unit of this number, or (None) that it has loaded its job."""
        self.idle: list[Any] = []
        self.todo: deque[int] = deque()
        self.deaths: Counter[int | None] = Counter()
        """Of workers at each unit, and (None) of those that were loading since one of them last got through."""
        self.names: Sequence[str] = ()

    def __enter__(self) -> _Gang:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in [*self.idle, *(worker for worker, _ in self.calls.values())]:
            self.cluster.end(worker)

    def measure(self, run: RunDirectory, progress: Progress, label: str) -> None:
        """Do every unit that is not on disk."""
        self.todo.extend(number for number, name in enumerate(self.names) if not run.has_unit(name))
        n = len(self.todo)
        self._give(self.idle.pop())
        for _ in range(min(self.cluster.workers, n) - 1):
            self._hire()
        for _ in progress(range(n), label):
            self._finish_one()

    def check(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The model and its cross-check, as one of the workers finds them."""
        while True:
            if not self.idle:
                self.meet()
            try:
                return self.cluster.ask(self.idle[-1].check.remote())
            except self.cluster.ray.exceptions.RayActorError as error:
                self.idle.pop()
                self._count_death(None, "in the cross-check", error)

    def meet(self) -> None:
        """Learn the names of the units, as the first worker that has loaded its job says."""
        while True:
            worker = self.cluster.start(*self.hands)
            try:
                self.names = self.cluster.ask(worker.take.remote(*self.task))
            except self.cluster.ray.exceptions.RayActorError as error:
                self._count_death(None, "while loading", error)
                continue
            self.idle.append(worker)
            return

    def _hire(self) -> None:
        worker = self.cluster.start(*self.hands)
        self.calls[worker.take.remote(*self.task)] = (worker, None)

    def _give(self, worker: Any) -> None:
        """The next unit to a worker that is free, which idles where there is none."""
        if self.todo:
            number = self.todo.popleft()
            self.calls[worker.measure.remote(number)] = (worker, number)
        else:
            self.idle.append(worker)

    def _finish_one(self) -> None:
        """Wait until one unit is done; a dead worker's goes back to the others, and another worker takes its place."""
        while True:
            if not self.calls:
                self._hire()
            (ready,), _ = self.cluster.ray.wait(list(self.calls), num_returns=1)
            worker, number = self.calls.pop(ready)
            try:
                self.cluster.ask(ready)
            except self.cluster.ray.exceptions.RayActorError as error:
                self._count_death(number, "while loading" if number is None else f"at unit {self.names[number]}", error)
                if number is not None:
                    self.todo.appendleft(number)
                self._hire()
                continue
            self._give(worker)
            if number is not None:
                return
            del self.deaths[None]

    def _count_death(self, number: int | None, where: str, error: Exception) -> None:
        """Raises DeathsError at too many: at one unit, or in loading while no other worker is at a unit (a node takes
        all that load on it along)."""
        self.deaths[number] += 1
        others_work = number is None and any(unit is not None for _, unit in self.calls.values())
        if self.deaths[number] >= MOST_DEATHS and not others_work:
            raise _died(repr(self.task[0]), where) from error


def _died(of: str, where: str) -> DeathsError:
    return DeathsError(
        f"{MOST_DEATHS} workers of {of} died {where} (out of memory?); give each more of a node with --gpus or --cpus, "
        "and the same command again: finished units are kept."
    )
