"""A study: readers x problems x tests, from one config to one run directory.

1. Every problem gets a chain of each author (authoring.py). 2. The unit of work is one (reader, chain):
idempotent, named by a content hash, written atomically; a rerun computes only what is missing. 3. Every reader's run
cross-checks itself against TransformerLens and nnsight. 4. Estimates, figures and report come from the records alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import time
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .authoring import missing_of, see_to_chains, see_to_paraphrases
from .conclude import ALL, Progress, conclude, silent, why_empty
from .config import SUPPLIED, ReaderConfig, StudyConfig
from .datasets_io import read_problems
from .errors import CotfaithError
from .jobs import Job, PairJob, ReaderJob, info_of, load, pairs_of, pin
from .problems import Problem
from .records import RunDirectory

if TYPE_CHECKING:
    from .model import TextReader

PACKAGES = ("cotfaith-mech", "torch", "transformers", "transformer-lens", "nnsight", "peft", "numpy", "scipy")


def run_study(
    config: StudyConfig, out: str | Path, progress: Progress = silent, shard: tuple[int, int] | None = None
) -> RunDirectory:
    """Run what is missing of `config` in the run directory `out`, then estimate, draw and report; of a shard (number,
    of how many) its units alone are measured, and nothing is concluded."""
    run = measure_study(config, out, progress, shard)
    if shard is None:
        with run.writing():
            conclude(run, progress)
    return run


def measure_study(
    config: StudyConfig, out: str | Path, progress: Progress = silent, shard: tuple[int, int] | None = None
) -> RunDirectory:
    """The records of what is missing of `config` in the run directory `out`, and nothing concluded from them.

    A shard measures the units whose name falls to it; several write one directory at a time, and the chains are written
    by whichever comes first. Raises CotfaithError where another process writes there."""
    run = RunDirectory.create(out, config.model_dump(mode="json"))
    with run.writing(shard):
        with run.alone():
            problems, manifest = begin(config, run)
            held = write_chains_of(config, problems, run, progress)
        for reader in config.readers:
            started, n_units = time.perf_counter(), run.n_units()
            job = ReaderJob(config, reader, held(reader, "reader"), problems, run)
            rows = _run_reader(job, run, progress, shard)
            note_reader(
                manifest,
                run,
                reader.name,
                info_of(job.model),
                rows,
                time.perf_counter() - started,
                run.n_units() > n_units,
            )
        del held
        if shard is None:
            write_manifest(run, manifest)
        _run_pairs(config, problems, run, progress, shard)
    return run


class Held:
    """The model loaded last, kept until another is asked for; pinned, in each role it is asked for, by the hashes of
    its weights and of its text side."""

    def __init__(self, config: StudyConfig, run: RunDirectory, progress: Progress) -> None:
        self._config, self._run, self._progress = config, run, progress
        self._of: ReaderConfig | None = None
        self._model: TextReader | None = None

    def __call__(self, reader: ReaderConfig, role: str) -> TextReader:
        name = {"name": reader.name}
        if self._model is None or self._of is None or self._of.model_copy(update=name) != reader:
            self._model = None
            (self._model,) = (load(self._config, one) for one in self._progress([reader], f"load {reader.name}"))
            self._of = reader
        pin(self._run, f"{role} {reader.name}", info_of(self._model))
        return self._model


def write_chains_of(config: StudyConfig, problems: Sequence[Problem], run: RunDirectory, progress: Progress) -> Held:
    """Chains of every author and their paraphrases, where they are missing; and the model that was used last.
    CotfaithError where there is no chain at all, or where they are others than units were measured on."""
    held, by_name = Held(config, run, progress), {reader.name: reader for reader in config.readers}
    for author in config.all_authors:
        if missing_of(author, problems, run):
            load_author = partial(held, by_name.get(author, config.readers[0]), "reader")
            see_to_chains(config, author, load_author, problems, run, progress)
    if not run.read_chains():
        raise CotfaithError(f"{config.problems!r} gave no chain to read: {why_empty(run)}.")
    see_to_paraphrases(config, problems, run, held, progress)
    run.pin("chains", {"sha256": _hash([[row["chain_id"], row.get("paraphrases")] for row in run.read_chains()])})
    return held


def _run_reader(
    job: ReaderJob, run: RunDirectory, progress: Progress, shard: tuple[int, int] | None
) -> list[dict[str, Any]]:
    """Measure every unit that is not on disk; the rows of the cross-check, made anew if any was missing."""
    known = job.known_checks()
    if known and all(map(run.has_unit, job.names)):
        return known
    for number in progress(_share(job, shard), job.label):
        job.measure(number)
    return job.check(progress) if shard is None else []


def _share(job: Job, shard: tuple[int, int] | None) -> list[int]:
    """Numbers of the units that fall to the shard by their names; without one, all."""
    number, n = shard or (0, 1)
    return [i for i, name in enumerate(job.names) if int(name, 16) % n == number]


def _run_pairs(
    config: StudyConfig,
    problems: Sequence[Problem],
    run: RunDirectory,
    progress: Progress,
    shard: tuple[int, int] | None,
) -> None:
    """Cross-model patching of every tuned reader with the first."""
    base: TextReader | None = None
    for reader in pairs_of(config):
        job = PairJob(config, reader, problems, run)
        missing = [number for number in _share(job, shard) if not run.has_unit(job.names[number])]
        if missing:
            try:
                base = job.load(base)
            except CotfaithError as error:
                leave_out_pair(run, reader, error)
                continue
            for number in progress(missing, job.label):
                job.measure(number)
        take_back_pair(run, job)


def leave_out_pair(run: RunDirectory, reader: ReaderConfig, error: CotfaithError) -> None:
    run.add_exclusion(problem_id=ALL, reader=reader.name, stage="measure", reason=f"cross-model: {error}")


def take_back_pair(run: RunDirectory, job: PairJob) -> None:
    """Where every unit of the pair is there, the reason that another try gave holds no more."""
    if all(map(run.has_unit, job.names)):
        run.withdraw_exclusions(problem_id=ALL, reader=job.readers[1].name, stage="measure")


def note_reader(
    manifest: dict[str, Any],
    run: RunDirectory,
    name: str,
    info: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    spent: float,
    did: bool,
) -> None:
    """Put a reader's model, checks and seconds into the manifest; an earlier run's seconds where nothing was done."""
    before = run.read_manifest().get("timings", {})
    manifest["models"][name] = info
    manifest["checks"] += rows
    manifest["timings"][name] = round(spent, 1) if did else before.get(name, round(spent, 1))


def generate_chains(config: StudyConfig, out: str | Path, progress: Progress = silent) -> RunDirectory:
    """Let the first reader of `config` write chains into `out`/chains.jsonl, and measure nothing."""
    run = RunDirectory.create(out, config.model_dump(mode="json"))
    with run.writing():
        problems, manifest = begin(config, run)
        model = Held(config, run, progress)(config.readers[0], "reader")
        see_to_chains(config, config.readers[0].name, lambda: model, problems, run, progress)
        manifest["models"][config.readers[0].name] = info_of(model)
        manifest["counts"] = {
            "problems": len(problems),
            "chains": len(run.read_chains()),
            "exclusions": len(run.read_exclusions()),
        }
        write_manifest(run, manifest)
    return run


def write_manifest(run: RunDirectory, manifest: dict[str, Any]) -> None:
    """`manifest` with the device the models were on and the most memory that any process at work on it has held, in
    GB."""
    from .backends.memory import peak_memory_gb

    models = list(manifest["models"].values())
    device = models[0]["device"] + f" ({platform.processor() or platform.machine()})" * (models[0]["device"] == "cpu")
    known = run.read_manifest().get("peak_memory_gb", {})
    peak = known | {name: max(value, known.get(name, 0.0)) for name, value in peak_memory_gb().items()}
    run.update_manifest(manifest | {"device": device, "peak_memory_gb": peak})


def begin(config: StudyConfig, run: RunDirectory) -> tuple[list[Problem], dict[str, Any]]:
    """The problems (what was left out is on disk), and the manifest so far."""
    if not RunDirectory.check(run.path, config.model_dump(mode="json")):
        raise CotfaithError(f"{run.path} was begun with another config a moment ago; choose another output folder.")
    problems, shown, left_out = problems_of(config)
    pin_inputs(problems, run)
    run.add_exclusions({"stage": "read"} | row for row in left_out)
    worked = {"stage": "few_shot", "reason": "shown as a worked example"}
    run.add_exclusions(worked | {"problem_id": problem.problem_id} for problem in shown)
    if "conflict" in config.tests and not any(p.conflicts or p.kind == "number" for p in problems):
        reason = "conflict: there is none for answers that are no numbers; the generators alone make their own"
        run.add_exclusion(problem_id=ALL, stage="edit", reason=reason)
    if not problems:
        raise CotfaithError(f"{config.problems!r} gave no usable problem: {why_empty(run)}.")
    manifest = {
        "versions": _versions(),
        "models": {},
        "seeds": {"study": config.seed},
        "dtype": config.dtype,
        "timings": {},
        "checks": [],
    }
    return problems, manifest


def pin_inputs(problems: Sequence[Problem], run: RunDirectory) -> None:
    """CotfaithError where the run was begun with other problems, or by another version of this package."""
    run.pin("software", {"cotfaith-mech": metadata.version("cotfaith-mech")})
    source = run.read_manifest()["config"]["problems"]
    run.pin("data", {"source": source, "sha256": _hash([dataclasses.asdict(one) for one in problems])})


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def problems_of(config: StudyConfig) -> tuple[list[Problem], list[Problem], list[dict[str, str]]]:
    """The problems of the study, those shown as worked examples, and what was left out in reading them."""
    from .sampling import few_shot

    problems, left_out = read_problems(config.problems, config.limit, config.seed, config.template)
    if config.all_authors == (SUPPLIED,):
        return problems, [], left_out
    problems, shown = few_shot(problems, config.generation.few_shot)
    return problems, shown, left_out


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()}
