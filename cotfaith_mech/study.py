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
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .authoring import missing_of, see_to_chains, see_to_paraphrases
from .chains import Chain
from .conclude import ALL, Progress, conclude, silent, why_empty
from .config import SUPPLIED, ReaderConfig, StudyConfig
from .datasets_io import read_problems
from .errors import CotfaithError
from .problems import Problem
from .records import RunDirectory, unit_id
from .units import Unit, exclusions_of, measure_unit, open_chain, undefined_in, units_of

if TYPE_CHECKING:
    from .crosscheck import Sample
    from .model import TextReader

PACKAGES = ("cotfaith-mech", "torch", "transformers", "transformer-lens", "nnsight", "peft", "numpy", "scipy")


def run_study(config: StudyConfig, out: str | Path, progress: Progress = silent) -> RunDirectory:
    """Run what is missing of `config` in the run directory `out`, then estimate, draw and report."""
    run = measure_study(config, out, progress)
    conclude(run, progress)
    return run


def measure_study(config: StudyConfig, out: str | Path, progress: Progress = silent) -> RunDirectory:
    """The records of what is missing of `config` in the run directory `out`, and nothing concluded from them."""
    run, problems, manifest = begin(config, out)
    held = _write(config, problems, run, progress)
    for reader in config.readers:
        started, n_units = time.perf_counter(), run.n_units()
        manifest["models"][reader.name] = dataclasses.asdict(held(reader, "reader").info)
        manifest["checks"] += _run_reader(config, reader, held(reader, "reader"), problems, run, progress)
        spent = round(time.perf_counter() - started, 1)
        known = run.read_manifest().get("timings", {}).get(reader.name, spent)
        manifest["timings"][reader.name] = spent if run.n_units() > n_units else known
    del held
    _write_manifest(run, manifest)
    if config.cross_model:
        _run_pairs(config, problems, run, progress)
    return run


class _Held:
    """The model loaded last, kept until another is asked for; pinned, in each role it is asked for, by the hashes of
    its weights and of its text side."""

    def __init__(self, config: StudyConfig, run: RunDirectory, progress: Progress) -> None:
        self._run, self._load = run, lambda reader: _load(config, reader, progress)
        self._of: ReaderConfig | None = None
        self._model: TextReader | None = None

    def __call__(self, reader: ReaderConfig, role: str) -> TextReader:
        name = {"name": reader.name}
        if self._model is None or self._of is None or self._of.model_copy(update=name) != reader:
            self._model = None
            self._model, self._of = self._load(reader), reader
        info = self._model.info
        self._run.pin(f"{role} {reader.name}", {"weights": info.weights_hash, "text": info.text_hash})
        return self._model


def _write(config: StudyConfig, problems: Sequence[Problem], run: RunDirectory, progress: Progress) -> _Held:
    """Chains of every author and their paraphrases, where they are missing; and the model that was used last."""
    held, by_name = _Held(config, run, progress), {reader.name: reader for reader in config.readers}
    for author in config.all_authors:
        if missing_of(author, problems, run):
            see_to_chains(
                config, author, held(by_name.get(author, config.readers[0]), "reader"), problems, run, progress
            )
    see_to_paraphrases(config, problems, run, held, progress)
    return held


def _run_pairs(config: StudyConfig, problems: Sequence[Problem], run: RunDirectory, progress: Progress) -> None:
    """Cross-model patching of every tuned reader with the first; what is on disk is left alone. Two models are held."""
    base: TextReader | None = None
    first, *others = config.readers
    rows = [row for row in run.read_chains() if config.opens(row["author"])]
    for reader in others:
        names = [unit_id([first.name, reader.name], row["chain_id"], ["cross_model"]) for row in rows]
        missing = [(name, row) for name, row in zip(names, rows, strict=True) if not run.has_unit(name)]
        if reader.mechanism and missing:
            base = base or _load(config, first, progress)
            tuned = _load(config, reader, progress)
            try:
                pair = ((first.name, base), (reader.name, tuned))
                _run_pair(problems, pair, missing, run, progress, layers=config.cross_model is True)
            except CotfaithError as error:
                run.add_exclusion(problem_id=ALL, reader=reader.name, stage="measure", reason=f"cross-model: {error}")
            del tuned


def _run_pair(
    problems: Sequence[Problem],
    both: tuple[tuple[str, TextReader], tuple[str, TextReader]],
    missing: Sequence[tuple[str, dict[str, Any]]],
    run: RunDirectory,
    progress: Progress,
    *,
    layers: bool,
) -> None:
    from .crossmodel import Pair, measure_cross_model

    (first, base), (reader, tuned) = both
    by_id, pair = {problem.problem_id: problem for problem in problems}, Pair.of(base, tuned)
    for name, row in progress(missing, f"{first} x {reader}"):
        chain = Chain.from_json(row)
        try:
            measured = measure_cross_model(pair, by_id[chain.problem_id], chain, reader, layers=layers)
        except CotfaithError as error:
            reasons = [f"cross-model patching: {error}"]
            run.leave_out_unit(name, exclusions_of(chain, reader, "measure", reasons))
            continue
        left_out = exclusions_of(chain, reader, "edit", [*measured.exclusions, *undefined_in(measured)])
        run.write_unit(name, measured.records, {"reader": reader, "chain_id": chain.chain_id, "edits": []}, left_out)


def generate_chains(config: StudyConfig, out: str | Path, progress: Progress = silent) -> RunDirectory:
    """Let the first reader of `config` write chains into `out`/chains.jsonl, and measure nothing."""
    run, problems, manifest = begin(config, out)
    model = _Held(config, run, progress)(config.readers[0], "reader")
    see_to_chains(config, config.readers[0].name, model, problems, run, progress)
    manifest["models"][config.readers[0].name] = dataclasses.asdict(model.info)
    manifest["counts"] = {
        "problems": len(problems),
        "chains": len(run.read_chains()),
        "exclusions": len(run.read_exclusions()),
    }
    _write_manifest(run, manifest)
    return run


def _write_manifest(run: RunDirectory, manifest: dict[str, Any]) -> None:
    """`manifest` with the device the models were on, what the run has pinned, and the most memory that any process at
    work on it has held, in GB."""
    from .backends.memory import peak_memory_gb

    before = run.read_manifest()
    models = list(manifest["models"].values())
    manifest["device"] = models[0]["device"] + f" ({platform.processor() or platform.machine()})" * (
        models[0]["device"] == "cpu"
    )
    known = before.get("peak_memory_gb", {})
    peak = known | {name: max(value, known.get(name, 0.0)) for name, value in peak_memory_gb().items()}
    run.write_manifest(manifest | {"pinned": before.get("pinned", {}), "peak_memory_gb": peak})


def begin(config: StudyConfig, out: str | Path) -> tuple[RunDirectory, list[Problem], dict[str, Any]]:
    """The run directory, the problems (what was left out is on disk), and the manifest so far."""
    from .sampling import few_shot

    plain = config.model_dump(mode="json")
    run = RunDirectory.create(out, plain)
    problems, left_out = read_problems(config.problems, config.limit, config.seed, config.template)
    shown: list[Problem] = []
    if config.all_authors != (SUPPLIED,):
        problems, shown = few_shot(problems, config.generation.few_shot)
    content = json.dumps([dataclasses.asdict(problem) for problem in problems], sort_keys=True)
    run.pin("software", {"cotfaith-mech": metadata.version("cotfaith-mech")})
    run.pin("data", {"source": config.problems, "sha256": hashlib.sha256(content.encode()).hexdigest()})
    run.add_exclusions({"stage": "read"} | row for row in left_out)
    worked = {"stage": "few_shot", "reason": "shown as a worked example"}
    run.add_exclusions(worked | {"problem_id": problem.problem_id} for problem in shown)
    if "conflict" in config.tests and not any(p.conflicts or p.kind == "number" for p in problems):
        reason = "conflict: there is none for answers that are no numbers; the generators alone make their own"
        run.add_exclusion(problem_id=ALL, stage="edit", reason=reason)
    if not problems:
        raise CotfaithError(f"{config.problems!r} gave no usable problem: {why_empty(run)}.")
    manifest = {
        "config": plain,
        "pinned": {},
        "versions": _versions(),
        "models": {},
        "seeds": {"study": config.seed},
        "dtype": config.dtype,
        "timings": {},
        "checks": [],
    }
    return run, problems, manifest


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()}


def _load(config: StudyConfig, reader: ReaderConfig, progress: Progress) -> TextReader:
    """The reader's model or endpoint."""
    (model,) = (_loaded(config, reader) for reader in progress([reader], f"load {reader.name}"))
    n_layers = getattr(model.info, "n_layers", None)
    if n_layers and (absent := [layer for layer in config.patch_layers or () if not 0 <= layer < n_layers]):
        raise CotfaithError(
            f"patch_layers names {absent}, but {reader.name!r} has layers 0 to {n_layers - 1}; name these."
        )
    return model


def _loaded(config: StudyConfig, reader: ReaderConfig) -> TextReader:
    if reader.endpoint is not None:
        from .endpoint import Endpoint

        how = reader.model_dump(include={"api_key_env", "concurrency", "samples", "check_sampling"})
        return Endpoint(reader.model, reader.endpoint, **how)
    from .model import load

    return load(
        reader.model,
        adapter=reader.adapter,
        backend=reader.backend,
        device=config.device,
        dtype=config.dtype,
        keep_on_cpu=config.keep_on_cpu,
    )


def _run_reader(
    config: StudyConfig,
    reader: ReaderConfig,
    model: TextReader,
    problems: Sequence[Problem],
    run: RunDirectory,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Measure every unit of `reader` that is not on disk; the rows of its cross-check, made anew if any was missing."""

    units = units_of(config, reader, model, problems, run)
    checked = [row for row in run.read_manifest().get("checks", []) if row["check"] in _check_names(reader.name)]
    if checked and all(row["passed"] for row in checked) and all(run.has_unit(unit.name) for unit in units):
        return checked
    for number in progress(range(len(units)), f"reader {reader.name}"):
        measure_unit(config, reader, model, units, number, run)
    return _check(config, reader, model, units, progress)


def _check(
    config: StudyConfig, reader: ReaderConfig, model: TextReader, units: Sequence[Unit], progress: Progress
) -> list[dict[str, Any]]:
    """Rows of the cross-check of `model` on two chains drawn from the study's seed."""
    from .crosscheck import check_engines, sample_cells
    from .reading import Trunk

    mechanistic = any(other.mechanism for other in config.readers)
    if not config.crosscheck_cells or reader.endpoint or (mechanistic and not reader.mechanism):
        return []
    samples: list[Sample] = []
    for number in sorted(np.random.default_rng(config.seed).permutation(len(units))[:2].tolist()):
        try:
            trunk = open_chain(config, model, units[number].chain, units[number].problem)
        except CotfaithError:
            continue
        assert isinstance(trunk, Trunk)
        rng = np.random.default_rng([config.seed, number])
        samples.append(sample_cells(trunk, units[number].problem, config.crosscheck_cells, rng))
    rows = check_engines(samples[0].trunk.model, samples, progress) if samples else []
    return [row | {"check": f"{row['check']}/{reader.name}"} for row in rows]


def _check_names(reader: str) -> list[str]:
    from .crosscheck import BACKENDS

    return [f"crosscheck/{backend}/{reader}" for backend in BACKENDS]
