"""The measuring of a study as jobs: one reader on its chains, or one pair of readers on theirs.

A job knows the names of its units and measures any one of them, in whatever order and process: in this one, as a shard
of several, or on a worker of a cluster. What it needs to know stands in the config and the run directory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .chains import Chain
from .conclude import Progress, silent
from .config import ReaderConfig, StudyConfig
from .errors import CotfaithError, EndpointError
from .problems import Problem
from .records import RunDirectory, unit_id
from .units import exclusions_of, fitting, measure_unit, open_chain, undefined_in, units_of

if TYPE_CHECKING:
    from .crosscheck import Sample
    from .crossmodel import Pair
    from .model import TextReader


def load(config: StudyConfig, reader: ReaderConfig) -> TextReader:
    """The reader's model or endpoint. Raises CotfaithError where the study names layers that it has not."""
    if reader.endpoint is not None:
        from .endpoint import Endpoint

        how = reader.model_dump(include={"api_key_env", "concurrency", "samples", "check_sampling"})
        return Endpoint(reader.model, reader.endpoint, **how)
    from .model import load as load_model

    model = load_model(
        reader.model,
        adapter=reader.adapter,
        backend=reader.backend,
        device=config.device,
        dtype=config.dtype,
        keep_on_cpu=config.keep_on_cpu,
    )
    check_layers(config, reader, model)
    return model


def check_layers(config: StudyConfig, reader: ReaderConfig, model: TextReader) -> None:
    """Raises CotfaithError where layers are to be patched that the reader's model does not have."""
    n_layers = getattr(model.info, "n_layers", None)
    if n_layers and (absent := [layer for layer in config.patch_layers or () if not 0 <= layer < n_layers]):
        raise CotfaithError(
            f"patch_layers names {absent}, but {reader.name!r} has layers 0 to {n_layers - 1}; name these."
        )


class ReaderJob:
    """A reader on every chain that it reads."""

    def __init__(
        self,
        config: StudyConfig,
        reader: ReaderConfig,
        model: TextReader,
        problems: Sequence[Problem],
        run: RunDirectory,
    ) -> None:
        self.config, self.reader, self.model, self.run = config, reader, model, run
        self.label = f"reader {reader.name}"
        self.units = units_of(config, reader, model, problems, run)
        self.names: Sequence[str] = [unit.name for unit in self.units]
        self._fits = fitting(model, self.units)

    def measure(self, number: int) -> None:
        measure_unit(self.config, self.reader, self.model, self.units, number, self._fits, self.run)

    def known_checks(self) -> list[dict[str, Any]]:
        """The rows of its cross-check, if that was made and passed."""
        from .crosscheck import BACKENDS

        names = [f"crosscheck/{backend}/{self.reader.name}" for backend in BACKENDS]
        rows = [row for row in self.run.read_manifest().get("checks", []) if row["check"] in names]
        return rows if all(row["passed"] for row in rows) else []

    def check(self, progress: Progress = silent) -> list[dict[str, Any]]:
        """The rows of the cross-check of its model, on two chains drawn from the study's seed."""
        from .crosscheck import check_engines, sample_cells
        from .reading import Trunk

        mechanistic = any(other.mechanism for other in self.config.readers)
        if not self.config.crosscheck_cells or self.reader.endpoint or (mechanistic and not self.reader.mechanism):
            return []
        samples: list[Sample] = []
        for number in sorted(np.random.default_rng(self.config.seed).permutation(len(self.units))[:2].tolist()):
            unit = self.units[number]
            try:
                trunk = open_chain(self.config, self.model, unit.chain, unit.problem)
            except EndpointError:
                raise
            except CotfaithError:
                continue
            assert isinstance(trunk, Trunk)
            rng = np.random.default_rng([self.config.seed, number])
            samples.append(sample_cells(trunk, unit.problem, self.config.crosscheck_cells, rng))
        rows = check_engines(samples[0].trunk.model, samples, progress) if samples else []
        return [row | {"check": f"{row['check']}/{self.reader.name}"} for row in rows]


class PairJob:
    """Cross-model patching of a reader with the first, on every chain that is opened. Two models are held."""

    def __init__(
        self, config: StudyConfig, reader: ReaderConfig, problems: Sequence[Problem], run: RunDirectory
    ) -> None:
        first = config.readers[0]
        self.config, self.readers, self.run = config, (first, reader), run
        self.label = f"{first.name} x {reader.name}"
        self.by_id = {problem.problem_id: problem for problem in problems}
        self.rows = [row for row in run.read_chains() if config.opens(row["author"])]
        names = [unit_id([first.name, reader.name], row["chain_id"], ["cross_model"]) for row in self.rows]
        self.names: Sequence[str] = names
        self.pair: Pair | None = None

    def load(self, base: TextReader | None = None) -> TextReader:
        """Load both models, or the tuned one beside `base`; the base. CotfaithError where they do not fit."""
        from .crossmodel import Pair

        base = base or load(self.config, self.readers[0])
        self.pair = Pair.of(base, load(self.config, self.readers[1]))
        return base

    def measure(self, number: int) -> None:
        from .crossmodel import measure_cross_model

        name, chain, reader = self.names[number], Chain.from_json(self.rows[number]), self.readers[1].name
        if self.run.has_unit(name):
            return
        assert self.pair is not None
        layers = self.config.cross_model is True
        try:
            measured = measure_cross_model(self.pair, self.by_id[chain.problem_id], chain, reader, layers=layers)
        except EndpointError:
            raise
        except CotfaithError as error:
            reasons = [f"cross-model patching: {error}"]
            self.run.leave_out_unit(name, exclusions_of(chain, reader, "measure", reasons))
            return
        left_out = exclusions_of(chain, reader, "edit", [*measured.exclusions, *undefined_in(measured)])
        meta = {"reader": reader, "chain_id": chain.chain_id, "edits": []}
        self.run.write_unit(name, measured.records, meta, left_out)


Job = ReaderJob | PairJob
"""A unit that is on disk is not measured again by either."""


def pairs_of(config: StudyConfig) -> list[ReaderConfig]:
    """Readers that are patched with the first."""
    return [reader for reader in config.readers[1:] if reader.mechanism] if config.cross_model else []


def info_of(model: TextReader) -> dict[str, Any]:
    return dataclasses.asdict(model.info)


def pin(run: RunDirectory, role: str, info: dict[str, Any]) -> None:
    """Write down by what weights and text side a reader works, in a role; CotfaithError where others did before."""
    run.pin(role, {"weights": info["weights_hash"], "text": info["text_hash"]})
