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
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .authoring import is_read, missing_of, problem_for, see_to_chains, see_to_paraphrases
from .behaviour import measure_behaviour
from .chains import Chain
from .conclude import ALL, Progress, conclude, silent, why_empty
from .config import SUPPLIED, Mechanism, ReaderConfig, StudyConfig
from .contrast import AnswerContrast
from .datasets_io import read_problems
from .errors import CotfaithError, EndpointError
from .knockout import ALL_EDGES, KnockoutPlan, measure_knockout
from .measured import Measured
from .mediation import measure_cmi, measure_mediation
from .paraphrasers import Paraphrases
from .patching import PatchPlan, measure_patching
from .problems import Problem
from .records import Record, RunDirectory, unit_id
from .variants import BehaviourPlan

if TYPE_CHECKING:
    from .crosscheck import Sample
    from .model import TextReader
    from .reading import ChainReader, Trunk

SWAP_DONORS = 1
"""Other problems whose chains are swapped in, per chain."""
PATCH_DONORS = 8
"""Other problems whose chains are patched from, or averaged, per chain."""

PACKAGES = ("cotfaith-mech", "torch", "transformers", "transformer-lens", "nnsight", "peft", "numpy", "scipy")


def run_study(config: StudyConfig, out: str | Path, progress: Progress = silent) -> RunDirectory:
    """Run what is missing of `config` in the run directory `out`, then estimate, draw and report."""
    run = measure_study(config, out, progress)
    conclude(run, progress)
    return run


def measure_study(config: StudyConfig, out: str | Path, progress: Progress = silent) -> RunDirectory:
    """The records of what is missing of `config` in the run directory `out`, and nothing concluded from them."""
    run, problems, manifest = _begin(config, out)
    held = _write(config, problems, run, progress)
    for reader in config.readers:
        started, n_units = time.perf_counter(), len(run.read_unit_meta())
        manifest["models"][reader.name] = dataclasses.asdict(held(reader, "reader").info)
        manifest["checks"] += _run_reader(config, reader, held(reader, "reader"), problems, run, progress)
        spent = round(time.perf_counter() - started, 1)
        known = run.read_manifest().get("timings", {}).get(reader.name, spent)
        manifest["timings"][reader.name] = spent if len(run.read_unit_meta()) > n_units else known
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
            _exclude(run, chain, reader, "measure", f"cross-model patching: {error}")
            continue
        for reason in [*measured.exclusions, *_undefined(measured)]:
            _exclude(run, chain, reader, "edit", reason)
        meta = {"unit": name, "reader": reader, "chain_id": chain.chain_id, "edits": []}
        run.write_unit(name, measured.records, meta)


def generate_chains(config: StudyConfig, out: str | Path, progress: Progress = silent) -> RunDirectory:
    """Let the first reader of `config` write chains into `out`/chains.jsonl, and measure nothing."""
    run, problems, manifest = _begin(config, out)
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


def _begin(config: StudyConfig, out: str | Path) -> tuple[RunDirectory, list[Problem], dict[str, Any]]:
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
    for row in left_out:
        run.add_exclusion(problem_id=row["problem_id"], stage="read", reason=row["reason"])
    for problem in shown:
        run.add_exclusion(problem_id=problem.problem_id, stage="few_shot", reason="shown as a worked example")
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


def _opened(config: StudyConfig, model: TextReader, chain: Chain, problem: Problem) -> ChainReader:
    """`model` having read `chain`: on a trunk, or through its endpoint."""
    from .endpoint import AskedChain, Endpoint
    from .model import Model
    from .reading import Trunk

    if isinstance(model, Endpoint):
        return AskedChain.of(model, chain, problem.kind, problem.labels, config.min_label_mass)
    assert isinstance(model, Model)
    return Trunk.of(model, chain, problem.kind, problem.labels, problem.gold, config.min_label_mass)


@dataclasses.dataclass(frozen=True)
class _Unit:
    """One chain for one reader: the prompt is rendered by the reader's own template."""

    name: str
    problem: Problem
    chain: Chain
    paraphrases: Paraphrases

    @property
    def problem_id(self) -> str:
        return self.chain.problem_id


def _units(
    config: StudyConfig, reader: ReaderConfig, model: TextReader, problems: Sequence[Problem], run: RunDirectory
) -> list[_Unit]:
    """The units of `reader`, each named by all that its records rest on."""
    apart = {"readers", "problems", "limit", "primary", "crosscheck_cells", "keep_on_cpu", "authors"}
    apart |= {"mechanism_authors", "cross_model", "labels"}
    plan = config.model_dump(mode="json", exclude=apart)
    identity = [reader.name, model.info.weights_hash, reader.mechanism, reader.tests]
    by_id = {problem.problem_id: problem for problem in problems}
    units = []
    for row in run.read_chains():
        if row["problem_id"] in by_id and is_read(config, reader.name, row["author"]):
            problem = problem_for(by_id[row["problem_id"]], row["author"])
            chain = dataclasses.replace(Chain.from_json(row), prompt=model.render(problem.question))
            paraphrases = row.get("paraphrases")
            opened = config.opens(row["author"])
            name = unit_id([*identity, opened], chain.chain_id, [plan, dataclasses.asdict(problem), paraphrases])
            made = Paraphrases.from_json(paraphrases) if paraphrases else Paraphrases("none", (), {})
            units.append(_Unit(name, problem, chain, made))
    return units


def _run_reader(
    config: StudyConfig,
    reader: ReaderConfig,
    model: TextReader,
    problems: Sequence[Problem],
    run: RunDirectory,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Measure every unit of `reader` that is not on disk; the rows of its cross-check, made anew if any was missing."""
    from .crosscheck import check_engines, sample_cells
    from .reading import Trunk

    units = _units(config, reader, model, problems, run)
    checked = [row for row in run.read_manifest().get("checks", []) if row["check"] in _check_names(reader.name)]
    if checked and all(row["passed"] for row in checked) and all(run.has_unit(unit.name) for unit in units):
        return checked
    mechanistic = any(other.mechanism for other in config.readers)
    checked_here = bool(config.crosscheck_cells) and (reader.mechanism or not mechanistic) and not reader.endpoint
    samples: list[Sample] = []
    chosen = set(np.random.default_rng(config.seed).permutation(len(units))[:2].tolist()) if checked_here else set()
    for number, unit in enumerate(progress(units, f"reader {reader.name}")):
        if run.has_unit(unit.name) and number not in chosen:
            continue
        try:
            trunk = _opened(config, model, unit.chain, unit.problem)
            if not run.has_unit(unit.name):
                donors = _donors(units, number)
                measured, failed = _measure(config, reader, trunk, unit, donors)
                for reason in failed:
                    _exclude(run, unit.chain, reader.name, "measure", reason)
                for reason in measured.exclusions:
                    _exclude(run, unit.chain, reader.name, "edit", reason)
                run.write_unit(unit.name, measured.records, _meta(unit.name, reader.name, trunk, measured))
        except EndpointError:
            raise
        except CotfaithError as error:
            _exclude(run, unit.chain, reader.name, "measure", str(error))
            continue
        if number in chosen and isinstance(trunk, Trunk):
            rng = np.random.default_rng([config.seed, number])
            samples.append(sample_cells(trunk, unit.problem, config.crosscheck_cells, rng))
    rows = check_engines(samples[0].trunk.model, samples, progress) if samples else []
    return [row | {"check": f"{row['check']}/{reader.name}"} for row in rows]


def _donors(units: Sequence[_Unit], number: int) -> list[Chain]:
    """Chains of the unit's author to other problems, those that follow it first."""
    own = units[number].chain
    others = [unit.chain for unit in [*units[number + 1 :], *units[:number]]]
    found = [one for one in others if one.author == own.author and one.problem_id != own.problem_id]
    return found[:PATCH_DONORS]


def _check_names(reader: str) -> list[str]:
    from .crosscheck import BACKENDS

    return [f"crosscheck/{backend}/{reader}" for backend in BACKENDS]


def _measure(
    config: StudyConfig, reader: ReaderConfig, trunk: ChainReader, unit: _Unit, donors: Sequence[Chain]
) -> tuple[Measured, list[str]]:
    """All records of a unit, and why a part of them could not be measured."""
    from .reading import Trunk

    plan = BehaviourPlan(
        config.tests if reader.tests is None else reader.tests,
        config.draws,
        config.battery,
        config.continue_tokens,
        config.generation.temperature,
        config.equal_length,
    )
    seed = int(trunk.chain.chain_id[:8], 16) ^ config.seed
    measured = measure_behaviour(
        trunk, unit.problem, reader.name, plan, paraphrases=unit.paraphrases, donors=donors[:SWAP_DONORS], seed=seed
    )
    parts = {}
    if isinstance(trunk, Trunk) and config.opens(trunk.chain.author):
        parts = _mechanism(config, reader, trunk, unit.problem, donors, seed)
    failed = []
    for name, measure in parts.items():
        try:
            part = measure()
        except CotfaithError as error:
            failed.append(f"{name}: {error}")
            continue
        measured.records += part.records
        measured.exclusions += part.exclusions
    measured.exclusions += _undefined(measured)
    return measured, failed


def _mechanism(
    config: StudyConfig, reader: ReaderConfig, trunk: Trunk, problem: Problem, donors: Sequence[Chain], seed: int
) -> dict[Mechanism, Callable[[], Measured]]:
    """What is measured inside the reader, by name (StudyConfig.mechanisms_of)."""
    from .attribution import measure_attribution
    from .attribution_patching import measure_attribution_patching
    from .trace import measure_trace

    full, name = config.battery == "full", reader.name
    plan = KnockoutPlan(ALL_EDGES, ("masked", "zeroed")) if full and reader.mechanism else KnockoutPlan()
    heads = PatchPlan(config.patch_layers, ("denoise",), ("z",), by_head=True)
    cut = KnockoutPlan(("heads",), ("zeroed",))
    named = AnswerContrast.named
    parts: dict[Mechanism, Callable[[], Measured]] = {
        "knockout": lambda: measure_knockout(trunk, name, plan, seed=seed),
        "decision_trace": lambda: measure_trace(trunk, name),
        "patching": lambda: measure_patching(trunk, problem, name, config.patches, donors=donors, seed=seed),
        "attribution": lambda: measure_attribution(trunk, problem, name, full=full),
        "mediation": lambda: measure_mediation(trunk, problem, name),
        "mediation_index": lambda: measure_cmi(trunk, donors, name, seed=seed),
        "head_patching": lambda: measure_patching(trunk, problem, name, heads, controls=False, seed=seed),
        "attribution_patching": lambda: measure_attribution_patching(trunk, problem, name, seed=seed),
        "head_knockout": lambda: measure_knockout(
            trunk, name, cut, contrast=named(trunk, problem.twin_answer), seed=seed
        ),
    }
    return {part: parts[part] for part in config.mechanisms_of(reader)}


def _undefined(measured: Measured) -> list[str]:
    """What is NaN or infinite: a reason for each measure, variant and metric, with the coordinates of every value."""
    places: dict[str, list[str]] = {}
    for record in measured.records:
        if not np.isfinite(record.value):
            what = f"{record.measure} {record.variant} {record.metric}: value is {record.value}"
            places.setdefault(what, []).append(_where(record))
    return [f"{what} at {'; '.join(where)}" for what, where in places.items()]


def _where(record: Record) -> str:
    names = ("step", "layer", "head", "position", "seed")
    found = {name: value for name in names if (value := getattr(record, name)) is not None}
    return " ".join(f"{name} {value}" for name, value in found.items()) or "no step or layer"


def _meta(unit: str, reader: str, trunk: ChainReader, measured: Measured) -> dict[str, Any]:
    from .reading import Trunk

    return {
        "unit": unit,
        "reader": reader,
        "chain_id": trunk.chain.chain_id,
        "answer": trunk.chain.answer.strip(),
        "edits": measured.texts,
        "tokens": _step_tokens(trunk) if isinstance(trunk, Trunk) else None,
    }


def _step_tokens(trunk: Trunk) -> list[list[str]]:
    """The text of each token of each step, as the reader's tokenizer splits it."""
    return [[trunk.model.decode([token]) for token in trunk.run.tokens[start:end]] for start, end in trunk.spans.steps]


def _exclude(run: RunDirectory, chain: Chain, reader: str, stage: str, reason: str) -> None:
    run.add_exclusion(problem_id=chain.problem_id, chain_id=chain.chain_id, reader=reader, stage=stage, reason=reason)
