"""One chain read by one reader, the unit of work: what its name rests on, and what is measured of it.

A unit is named by a content hash and draws its seeds from content, so that order, number of workers and resuming do not
matter. What cannot be measured is written down with it, in the same move.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from .authoring import is_read, problem_for
from .behaviour import measure_behaviour
from .chains import Chain
from .config import Mechanism, ReaderConfig, StudyConfig
from .contrast import AnswerContrast
from .errors import CotfaithError, EndpointError
from .knockout import ALL_EDGES, KnockoutPlan, measure_knockout
from .measured import Measured
from .mediation import measure_cmi, measure_mediation
from .paraphrasers import Paraphrases
from .patching import PatchPlan, measure_patching
from .problems import Problem
from .records import Record, RunDirectory, unit_id
from .sampling import no_room
from .variants import BehaviourPlan

if TYPE_CHECKING:
    from .model import TextReader
    from .reading import ChainReader, Trunk

SWAP_DONORS = 1
"""Other problems whose chains are swapped in, per chain."""
PATCH_DONORS = 8
"""Other problems whose chains are patched from, or averaged, per chain."""


def open_chain(config: StudyConfig, model: TextReader, chain: Chain, problem: Problem) -> ChainReader:
    """`model` having read `chain`: on a trunk, or through its endpoint."""
    from .endpoint import AskedChain, Endpoint
    from .model import Model
    from .reading import Trunk

    if isinstance(model, Endpoint):
        return AskedChain.of(model, chain, problem.kind, problem.labels, config.min_label_mass)
    assert isinstance(model, Model)
    return Trunk.of(model, chain, problem.kind, problem.labels, problem.gold, config.min_label_mass)


@dataclasses.dataclass(frozen=True)
class Unit:
    """One chain for one reader: the prompt is rendered by the reader's own template."""

    name: str
    problem: Problem
    chain: Chain
    paraphrases: Paraphrases

    @property
    def problem_id(self) -> str:
        return self.chain.problem_id


def units_of(
    config: StudyConfig, reader: ReaderConfig, model: TextReader, problems: Sequence[Problem], run: RunDirectory
) -> list[Unit]:
    """The units of `reader`, each named by all that its records rest on."""
    apart = {"readers", "problems", "limit", "primary", "crosscheck_cells", "keep_on_cpu", "authors"}
    apart |= {"mechanism_authors", "cross_model", "labels"}
    plan = config.model_dump(mode="json", exclude=apart)
    # as the run was begun with it: an old one has the whole path of a model in the home folder
    plan["paraphraser"] = run.read_manifest()["config"].get("paraphraser", plan["paraphraser"])
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
            units.append(Unit(name, problem, chain, made))
    return units


def measure_unit(
    config: StudyConfig,
    reader: ReaderConfig,
    model: TextReader,
    units: Sequence[Unit],
    number: int,
    fits: Fits,
    run: RunDirectory,
) -> None:
    """Measure one of `units` and write it down, with what was left out of it and why; nothing where it is on disk.

    Raises EndpointError where the reader's endpoint gives no answers: the unit stays to be done."""
    unit = units[number]
    if run.has_unit(unit.name):
        return
    try:
        trunk = open_chain(config, model, unit.chain, unit.problem)
        measured, failed = measured_of(config, reader, trunk, unit, donors_of(units, number, fits))
    except EndpointError:
        raise
    except CotfaithError as error:
        run.leave_out_unit(unit.name, exclusions_of(unit.chain, reader.name, "measure", [str(error)]))
        return
    left_out = exclusions_of(unit.chain, reader.name, "measure", failed)
    left_out += exclusions_of(unit.chain, reader.name, "edit", measured.exclusions)
    run.write_unit(unit.name, measured.records, _meta(reader.name, trunk, measured), left_out)


Fits = Callable[[int], bool]
"""Whether the chain of the unit of this number can be shown to the reader."""


def fitting(model: TextReader, units: Sequence[Unit]) -> Fits:
    """Fits of `model`, looked at once a unit."""
    return cache(lambda number: not no_room(model, units[number].chain.text, 0))


def donors_of(units: Sequence[Unit], number: int, fits: Fits) -> list[Chain]:
    """Chains of the unit's author to other problems that the reader can be shown, those that follow it first."""
    own = units[number].chain
    others = (i % len(units) for i in range(number + 1, number + len(units)))
    of_author = ((i, units[i].chain) for i in others if units[i].chain.author == own.author)
    found = (chain for i, chain in of_author if chain.problem_id != own.problem_id and fits(i))
    return list(islice(found, PATCH_DONORS))


def measured_of(
    config: StudyConfig, reader: ReaderConfig, trunk: ChainReader, unit: Unit, donors: Sequence[Chain]
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
        except EndpointError:
            raise
        except CotfaithError as error:
            failed.append(f"{name}: {error}")
            continue
        measured.records += part.records
        measured.exclusions += part.exclusions
    measured.exclusions += undefined_in(measured)
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


def undefined_in(measured: Measured) -> list[str]:
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


def _meta(reader: str, trunk: ChainReader, measured: Measured) -> dict[str, Any]:
    from .reading import Trunk

    return {
        "reader": reader,
        "chain_id": trunk.chain.chain_id,
        "answer": trunk.chain.answer.strip(),
        "edits": measured.texts,
        "tokens": _step_tokens(trunk) if isinstance(trunk, Trunk) else None,
    }


def _step_tokens(trunk: Trunk) -> list[list[str]]:
    """The text of each token of each step, as the reader's tokenizer splits it."""
    return [[trunk.model.decode([token]) for token in trunk.run.tokens[start:end]] for start, end in trunk.spans.steps]


def exclusions_of(chain: Chain, reader: str, stage: str, reasons: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of exclusions of a chain that `reader` read."""
    place = {"problem_id": chain.problem_id, "chain_id": chain.chain_id, "reader": reader, "stage": stage}
    return [place | {"reason": reason} for reason in reasons]
