"""A study: readers x problems x tests, from one config to one run directory.

1. Every problem gets one chain (supplied, or written by the first reader). 2. The unit of work is one (reader, chain):
idempotent, named by a content hash, written atomically; a rerun computes only what is missing. 3. Every reader's run
cross-checks itself against TransformerLens and nnsight. 4. Estimates, figures and report come from the records alone.
"""

from __future__ import annotations

import dataclasses
import difflib
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .behaviour import BehaviourPlan, measure_behaviour
from .bridge import bridge
from .chains import Chain
from .compare import conclusion, estimates_of
from .datasets_io import read_problems
from .errors import CotfaithError
from .figures import draw_figures
from .measured import Measured
from .patching import PatchPlan, measure_knockout, measure_patching
from .problems import Problem
from .records import Record, RunDirectory, unit_id
from .report import build_report

PRIMARY = (
    "same_answer_no_chain",
    "conflict/record_agree/p_chain",
    "conflict/record_agree/p_question",
    "conflict/record_agree/p_other",
    "knockout/true_step/delta_p",
)
SWAP_DONORS = 2
"""Other problems whose chains are swapped in, per chain."""

PACKAGES = ("cotfaith-mech", "torch", "transformers", "transformer-lens", "nnsight", "peft", "numpy", "scipy")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ReaderConfig(_Strict):
    """A model that reads chains: hub id, local folder, or `name+adapter`."""

    name: str
    model: str
    adapter: str | None = None
    backend: Literal["huggingface", "transformer_lens", "nnsight"] = "huggingface"
    mechanism: bool = True


class StudyConfig(_Strict):
    """A whole study. The first reader is the base that the others are compared with."""

    readers: tuple[ReaderConfig, ...] = Field(min_length=1)
    problems: str
    limit: int | None = None
    chains: Literal["supplied", "generate"] = "supplied"
    tests: tuple[str, ...] = BehaviourPlan().tests
    draws: int = Field(5, ge=1)
    patch_layers: tuple[int, ...] | None = None
    patch_directions: tuple[str, ...] = ("noise", "denoise")
    attribution: bool = True
    crosscheck_cells: int = 4
    primary: tuple[str, ...] = PRIMARY
    seed: int = 0
    device: str | None = None
    dtype: str = "float32"


def load_config(path: str | Path) -> StudyConfig:
    """Read a YAML study; an unknown key is an error that names the nearest one."""
    try:
        data = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise CotfaithError(f"Cannot read the study {str(path)!r}: {error}.") from error
    if not isinstance(data, dict):
        raise CotfaithError(f"{str(path)!r} holds no mapping of keys; begin with 'readers:' and 'problems:'.")
    return parse_config(data)


def parse_config(data: dict[str, Any]) -> StudyConfig:
    try:
        return StudyConfig.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        known = [*StudyConfig.model_fields, *ReaderConfig.model_fields]
        near = difflib.get_close_matches(str(first["loc"][-1]), known, 1)
        hint = f"; did you mean {near[0]!r}?" if first["type"] == "extra_forbidden" and near else ""
        raise CotfaithError(f"Study key {where!r}: {first['msg']}{hint}") from error


Progress = Callable[[Sequence[Any], str], Iterable[Any]]


def run_study(config: StudyConfig, out: str | Path, progress: Progress = lambda items, label: items) -> RunDirectory:
    """Run what is missing of `config` in the run directory `out`, then estimate, draw and report."""
    plain = config.model_dump(mode="json")
    run = RunDirectory.create(out, plain)
    problems, left_out = read_problems(config.problems, limit=config.limit, seed=config.seed)
    for row in left_out:
        run.add_exclusion(problem_id=row["problem_id"], chain_id=None, reader=None, stage="read", reason=row["reason"])
    if not problems:
        raise CotfaithError(f"{config.problems!r} gave no usable problem; exclusions.jsonl says why.")
    manifest: dict[str, Any] = {"config": plain, "versions": _versions(), "models": {}, "timings": {}, "checks": []}
    for reader in config.readers:
        started = time.perf_counter()
        manifest["models"][reader.name] = _run_reader(config, reader, problems, run, manifest["checks"], progress)
        manifest["timings"][reader.name] = round(time.perf_counter() - started, 1)
    manifest |= {
        "seeds": {"study": config.seed},
        "device": platform.processor() or platform.machine(),
        "dtype": config.dtype,
    }
    run.write_manifest(manifest)
    conclude(run)
    return run


def conclude(run: RunDirectory) -> Path:
    """Estimates, figures and report of a run directory from its records; needs no model. Gives the report's path."""
    manifest = run.read_manifest()
    config = parse_config(manifest["config"])
    records, chains = run.read_records(), run.read_chains()
    names = [reader.name for reader in config.readers]
    estimates = estimates_of(records, chains, names, config.primary, np.random.default_rng(config.seed))
    bridges, disagreements = bridge(records, chains, names, np.random.default_rng(config.seed + 1))
    run.write_estimates([*estimates, *bridges])
    manifest["checks"] = [c for c in manifest["checks"] if not c["check"].startswith("records/")] + _record_checks(
        records
    )
    manifest["counts"] = {
        "problems": int(records.problem_id.nunique()),
        "units": len(run.read_unit_meta()),
        "records": len(records),
        "exclusions": len(run.read_exclusions()),
    }
    manifest["disagreements"] = disagreements.to_dict("records")
    manifest["conclusion"] = [conclusion(estimates, names[0], tuned) for tuned in names[1:]]
    run.write_manifest(manifest)
    draw_figures(run)
    return build_report(run)


def _record_checks(records: Any) -> list[dict[str, Any]]:
    checks = []
    for measure, metric, name, threshold in (
        ("control", "max_abs_diff", "self_patch", 0.0),
        ("attribution", "completeness_error", "direct contributions sum to the logit difference", 1e-2),
    ):
        values = records[(records.measure == measure) & (records.metric == metric)].value
        if len(values):
            worst = float(values.max())
            row = {"check": f"records/{name}", "value": worst, "threshold": threshold, "passed": worst <= threshold}
            checks.append({**row, "detail": f"largest of {len(values)}"})
    return checks


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()}


def _run_reader(
    config: StudyConfig,
    reader: ReaderConfig,
    problems: Sequence[Problem],
    run: RunDirectory,
    checks: list[dict[str, Any]],
    progress: Progress,
) -> dict[str, Any]:
    from .crosscheck import check_engines, sample_cells
    from .model import load
    from .reading import Trunk

    model = load(
        reader.model, adapter=_adapter(reader), backend=reader.backend, device=config.device, dtype=config.dtype
    )
    chains = _chains(config, model, problems, run, reader)
    donors = list(chains.values())
    plan = config.model_dump(mode="json", exclude={"readers", "problems", "limit", "primary", "crosscheck_cells"})
    samples = []
    chosen = set(np.random.default_rng(config.seed).permutation(len(problems))[:2].tolist())
    for number, problem in enumerate(progress(problems, f"reader {reader.name}")):
        chain = chains.get(problem.problem_id)
        if chain is None:
            continue
        unit = unit_id([reader.name, model.info.weights_hash, reader.mechanism], chain.chain_id, plan)
        if run.has_unit(unit) and number not in chosen:
            continue
        try:
            trunk = Trunk.of(model, chain, problem.kind, problem.labels)
            if not run.has_unit(unit):
                others = [d for d in donors if d.problem_id != problem.problem_id][:SWAP_DONORS]
                measured = _measure(config, reader, trunk, problem, others)
                for reason in measured.exclusions:
                    _exclude(run, chain, reader.name, "edit", reason)
                run.write_unit(unit, measured.records, _meta(unit, reader.name, trunk, measured))
            if number in chosen and reader.mechanism and config.crosscheck_cells:
                rng = np.random.default_rng([config.seed, number])
                samples.append(sample_cells(trunk, problem, config.crosscheck_cells, rng))
        except CotfaithError as error:
            _exclude(run, chain, reader.name, "measure", str(error))
    if any(samples):
        for check in check_engines(model, [sample for sample in samples if sample is not None]):
            checks.append(check | {"check": f"{check['check']}/{reader.name}"})
    return dataclasses.asdict(model.info)


def _adapter(reader: ReaderConfig) -> str | None:
    """`package:a` names an adapter that ships with this package."""
    if reader.adapter is not None and reader.adapter.startswith("package:"):
        return str(Path(__file__).parent / "adapters" / reader.adapter.removeprefix("package:"))
    return reader.adapter


def _chains(
    config: StudyConfig, model: Any, problems: Sequence[Problem], run: RunDirectory, reader: ReaderConfig
) -> dict[str, Chain]:
    """One chain per problem: on disk already, supplied, or written by the first reader."""
    from .sampling import supplied_chain, write_chains

    known = {row["problem_id"]: row for row in run.read_chains()} if (run.path / "chains.jsonl").exists() else {}
    chains: dict[str, Chain] = {}
    for problem in problems:
        if problem.problem_id in known:
            chain = Chain.from_json(known[problem.problem_id])
            chains[problem.problem_id] = dataclasses.replace(chain, prompt=model.render(problem.question))
    missing = [problem for problem in problems if problem.problem_id not in chains]
    if config.chains == "generate":
        for problem, chain, reason in write_chains(model, missing, reader.name, seed=config.seed):
            if chain is None:
                run.add_exclusion(
                    problem_id=problem.problem_id, chain_id=None, reader=reader.name, stage="generate", reason=reason
                )
            else:
                chains[problem.problem_id] = chain
    else:
        for problem in missing:
            if problem.steps:
                chains[problem.problem_id] = supplied_chain(model, problem)
            else:
                run.add_exclusion(
                    problem_id=problem.problem_id,
                    chain_id=None,
                    reader=None,
                    stage="chain",
                    reason="the problem comes without a chain; use chains: generate",
                )
    if missing:
        run.write_chains(
            _chain_row(problem, chains[problem.problem_id]) for problem in problems if problem.problem_id in chains
        )
    return chains


def _chain_row(problem: Problem, chain: Chain) -> dict[str, Any]:
    return chain.to_json() | {
        "question": problem.question,
        "gold": problem.gold,
        "kind": problem.kind,
        "true_step": problem.true_step,
        "twin_answer": problem.twin_answer,
    }


def _measure(
    config: StudyConfig, reader: ReaderConfig, trunk: Any, problem: Problem, donors: Sequence[Chain]
) -> Measured:
    from .attribution import measure_attribution

    plan = BehaviourPlan(config.tests, config.draws)
    seed = int(trunk.chain.chain_id[:8], 16) ^ config.seed
    measured = measure_behaviour(trunk, problem, reader.name, plan, donors=donors, seed=seed)
    patch_plan = PatchPlan(config.patch_layers, config.patch_directions)
    parts = [measure_knockout(trunk, reader.name, patch_plan, seed=seed)]
    if reader.mechanism:
        parts.append(measure_patching(trunk, problem, reader.name, patch_plan, seed=seed))
    if reader.mechanism and config.attribution:
        parts.append(measure_attribution(trunk, problem, reader.name))
    for part in parts:
        measured.records += part.records
        measured.exclusions += part.exclusions
    bad = [record for record in measured.records if not np.isfinite(record.value)]
    measured.exclusions += [f"{_where(record)}: value is {record.value}" for record in bad]
    return measured


def _where(record: Record) -> str:
    return f"{record.measure} {record.variant} step {record.step} layer {record.layer} {record.metric}"


def _meta(unit: str, reader: str, trunk: Any, measured: Measured) -> dict[str, Any]:
    return {
        "unit": unit,
        "reader": reader,
        "chain_id": trunk.chain.chain_id,
        "answer": trunk.chain.answer.strip(),
        "edits": measured.texts,
    }


def _exclude(run: RunDirectory, chain: Chain, reader: str, stage: str, reason: str) -> None:
    run.add_exclusion(problem_id=chain.problem_id, chain_id=chain.chain_id, reader=reader, stage=stage, reason=reason)
