"""What a study would do, without doing it: counts, forwards, time and memory, and what is on disk already.

1. The study's own code runs in a scratch folder on readers that have a tokenizer, a config and no weights
   (backends/counted.py), on up to SAMPLED chains of each reader; the others count as the mean of these.
2. Units are exact. So are records where every reader gives the gold answer after every chain; a chain that it does not
   answer is left out and costs its first reading alone.
3. Time is FLOPs by the rate of matrix products, measured here and now, of which the engine gets SHARE; tokens written
   one by one by the rate at which weights are read. Endpoints are counted in requests: their time is the server's.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .authoring import missing_of, see_to_chains, see_to_paraphrases
from .backends.counted import CountedHybrid, CountedModel, Tally, load_counted
from .backends.memory import MAX_TOKENS
from .chains import Chain
from .conclude import Progress, silent
from .config import ReaderConfig, StudyConfig
from .crossmodel import BASE, TUNED, Pair, measure_cross_model
from .endpoint import AskedChain, Endpoint, Request
from .errors import CotfaithError
from .jobs import check_layers
from .paraphrasers import by_model
from .problems import Problem
from .reading import ChainReader, Trunk
from .records import Record, RunDirectory, unit_id
from .replies import Reply
from .study import begin
from .units import Unit, donors_of, fitting, measured_of, units_of

SAMPLED, REASONS = 4, 5
SHARE = 0.8
"""Of the rate of large matrix products, what the engine reaches in patching (`cotfaith bench`: .8 to .97)."""
LOAD_SECONDS, CHECK_SECONDS, CONCLUDE_SECONDS = 4.0, 18.0, 12.0
"""To load a reader; to check it against TransformerLens and nnsight; to import the libraries and to estimate, draw and
report. CPU seconds of one core (AMD EPYC, Zen 4) with SmolLM2."""
PROCESS_BYTES = 0.7e9
"""What the libraries hold before any model."""


class CountedEndpoint(Endpoint):
    """An endpoint that is asked nothing: requests are counted, and every reply is empty."""

    tally: Tally

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        self.tally.rows["requests"] += len(requests)
        return [Reply("") for _ in requests]


@dataclass(frozen=True)
class Part:
    """One reader at one job. `records` by measure and `forwards` by kind are those of what is still to do, `decoded`
    are tokens written one by one; memory is the most that may be held, in GB (10^9 bytes)."""

    name: str
    units: int
    finished: int
    records: dict[str, int]
    forwards: dict[str, int]
    flops: float
    decoded: int
    seconds: float
    memory_gb: float


@dataclass(frozen=True)
class Plan:
    """What is to do: `chains` are all that will be read, `to_write` those that a reader has yet to write. `reasons` of
    the exclusions, at most REASONS of them, with how often each was given, the most frequent first."""

    run: str
    problems: int
    chains: int
    to_write: int
    exclusions: int
    reasons: dict[str, int]
    parts: tuple[Part, ...]
    seconds: float
    memory_gb: float
    rests_on: tuple[str, ...]


def plan_study(config: StudyConfig, out: Path, *, measure: bool = True, progress: Progress = silent) -> Plan:
    """The plan of `config` in the run directory `out`, which is read and not touched; without `measure` only chains are
    written. Raises what the study would raise before its first pass."""
    with tempfile.TemporaryDirectory() as scratch:
        RunDirectory.check(out, config.model_dump(mode="json"))
        on_disk = RunDirectory(out) if (out / "manifest.json").is_file() else None
        for name in ("manifest.json", "chains.jsonl", "exclusions.jsonl") if on_disk else ():
            if (out / name).is_file():
                shutil.copy(out / name, scratch)
        try:
            run = RunDirectory.create(scratch, config.model_dump(mode="json"))
            problems, _ = begin(config, run)
        except CotfaithError as error:
            raise CotfaithError(str(error).replace(scratch, str(out))) from error
        planner = _Planner(config, run, problems, on_disk)
        to_write = planner.write()
        if measure:
            planner.paraphrase()
            for reader in progress(config.readers, "count"):
                planner.measure(reader)
            planner.cross()
        reasons = Counter(row["reason"] for row in run.read_exclusions())
        return Plan(
            run=str(out),
            problems=len(problems),
            chains=len(run.read_chains()),
            to_write=to_write,
            exclusions=reasons.total(),
            reasons=dict(reasons.most_common(REASONS)),
            parts=tuple(planner.parts),
            seconds=sum(part.seconds for part in planner.parts) + CONCLUDE_SECONDS * measure,
            memory_gb=max((part.memory_gb for part in planner.parts), default=0.0),
            rests_on=tuple(planner.rests_on(to_write, measure)),
        )


class _Planner:
    """Runs the parts of a study on readers without weights, and keeps what each comes to."""

    def __init__(
        self, config: StudyConfig, run: RunDirectory, problems: Sequence[Problem], on_disk: RunDirectory | None
    ) -> None:
        self.config, self.run, self.problems, self.on_disk = config, run, problems, on_disk
        self.by_id = {problem.problem_id: problem for problem in problems}
        self.parts: list[Part] = []
        self.rates: tuple[float, float] | None = None
        self.sampled = False
        named = None if config.device == "auto" else config.device
        self.device = named or ("cuda" if torch.cuda.is_available() else "cpu")

    def load(self, reader: ReaderConfig) -> CountedModel | CountedEndpoint:
        """The reader without weights; its hash is what the run has pinned, so that its units have their names."""
        if reader.endpoint is not None:
            endpoint = CountedEndpoint(
                reader.model,
                reader.endpoint,
                api_key_env=reader.api_key_env,
                samples=reader.samples,
                check_sampling=False,
            )
            endpoint.tally = Tally()
            return endpoint
        pinned = self.run.read_manifest()["pinned"].get(f"reader {reader.name}", {"weights": "not loaded"})
        model = load_counted(reader.model, reader.adapter, self.config.dtype, self.device, pinned["weights"])
        check_layers(self.config, reader, model)
        return model

    def write(self) -> int:
        """Chains of every author, placeholders where a reader is to write them; how many of these."""
        readers, written = {reader.name: reader for reader in self.config.readers}, 0
        for author in self.config.all_authors:
            if missing := missing_of(author, self.problems, self.run):
                model = self.load(readers.get(author, self.config.readers[0]))
                see_to_chains(self.config, author, lambda model=model: model, self.problems, self.run, silent)
                if author in readers:
                    written += len(missing)
                    self.add(f"{author} writes", model, len(missing), 0)
        return written

    def paraphrase(self) -> None:
        """Wordings by rules in place of a model's, whose tries count as if all were needed."""
        author = self.config.paraphraser
        if isinstance(author, ReaderConfig):
            missing = [row for row in self.run.read_chains() if "paraphrases" not in row]
            if missing:
                model = self.load(author)
                for row in missing:
                    by_model(model, row["steps"], self.config.draws, 0)
                self.add(f"{author.name} rephrases", model, len(missing), 0)
            author = "rules"
        rules = self.config.model_copy(update={"paraphraser": author})
        see_to_paraphrases(rules, self.problems, self.run, lambda reader, _: self.load(reader), silent)

    def measure(self, reader: ReaderConfig) -> None:
        model = self.load(reader)
        units = units_of(self.config, reader, model, self.problems, self.run)
        open_ = [number for number, unit in enumerate(units) if not self.is_done(unit.name)]
        records: Counter[str] = Counter()
        chosen = self.sample(open_)
        for number in chosen:
            records.update(record.measure for record in self.records_of(reader, model, units, number))
        mechanistic = any(other.mechanism for other in self.config.readers)
        checked = bool(self.config.crosscheck_cells) and (reader.mechanism or not mechanistic) and not reader.endpoint
        scale = len(open_) / max(len(chosen), 1)
        fixed = CHECK_SECONDS * checked if open_ else 0.0
        self.add(f"reader {reader.name}", model, len(units), len(units) - len(open_), records, scale, fixed)

    def records_of(
        self, reader: ReaderConfig, model: CountedModel | CountedEndpoint, units: Sequence[Unit], number: int
    ) -> list[Record]:
        """What the unit measures where the reader gives the gold answer."""
        unit = units[number]
        chain = unit.chain.with_answer(f" {unit.problem.gold}")
        kind, labels = unit.problem.kind, unit.problem.labels
        trunk: ChainReader
        try:
            if isinstance(model, CountedEndpoint):
                trunk = AskedChain.of(model, chain, kind, labels)
                model.tally.rows["requests"] += 1
            else:
                trunk = Trunk.of(model, chain, kind, labels)
            donors = donors_of(units, number, fitting(model, units))
            return measured_of(self.config, reader, trunk, unit, donors)[0].records
        except CotfaithError:
            return []

    def cross(self) -> None:
        """Pairs of the first reader and each other one."""
        first, *others = self.config.readers
        rows = [row for row in self.run.read_chains() if self.config.opens(row["author"])]
        for reader in others if self.config.cross_model else ():
            if not reader.mechanism:
                continue
            base, tuned = self.load(first), self.load(reader)
            if isinstance(base, CountedEndpoint) or isinstance(tuned, CountedEndpoint):
                continue
            names = [unit_id([first.name, reader.name], row["chain_id"], ["cross_model"]) for row in rows]
            open_ = [number for number, name in enumerate(names) if not self.is_done(name)]
            tuned.tally = base.tally
            pair = Pair({BASE: base, TUNED: tuned}, {BASE: CountedHybrid(base), TUNED: CountedHybrid(tuned)})
            records: Counter[str] = Counter()
            chosen, layers = self.sample(open_), self.config.cross_model is True
            for number in chosen:
                chain = Chain.from_json(rows[number])
                found = measure_cross_model(pair, self.by_id[chain.problem_id], chain, reader.name, layers=layers)
                records.update(record.measure for record in found.records)
            name, scale = f"{first.name} x {reader.name}", len(open_) / max(len(chosen), 1)
            self.add(name, base, len(rows), len(rows) - len(open_), records, scale, models=2)

    def is_done(self, unit: str) -> bool:
        return self.on_disk is not None and self.on_disk.has_unit(unit)

    def sample(self, numbers: Sequence[int]) -> list[int]:
        """All, or SAMPLED at equal distances."""
        if len(numbers) <= SAMPLED:
            return list(numbers)
        self.sampled = True
        return [numbers[i] for i in np.linspace(0, len(numbers) - 1, SAMPLED).round().astype(int).tolist()]

    def add(
        self,
        name: str,
        model: CountedModel | CountedEndpoint,
        units: int,
        finished: int,
        records: Counter[str] | None = None,
        scale: float = 1.0,
        fixed: float = 0.0,
        models: int = 1,
    ) -> None:
        """Put down a part whose sampled units left their traces in the model's tally; all are `scale` times as many."""
        tally, records = model.tally, records or Counter()
        flops, decoded = tally.flops * scale, round(tally.decoded * scale)
        seconds, memory = 0.0, 0.0
        if isinstance(model, CountedModel) and finished < units:
            self.rates = self.rates or machine_rates(model, self.device)
            products, reads = self.rates
            reading = decoded * model.n_parameters * _itemsize(model) / reads
            seconds = models * LOAD_SECONDS + fixed + flops / (products * SHARE) + reading
            memory = memory_bytes(model, models) / 1e9
        self.parts.append(
            Part(
                name=name,
                units=units,
                finished=finished,
                records={measure: round(n * scale) for measure, n in sorted(records.items())},
                forwards={kind: round(n * scale) for kind, n in sorted(tally.rows.items())},
                flops=flops,
                decoded=decoded,
                seconds=seconds,
                memory_gb=memory,
            )
        )

    def rests_on(self, to_write: int, measure: bool) -> list[str]:
        said = []
        if self.rates:
            said.append(
                f"{self.rates[0] / 1e9:.0f} GFLOP/s in matrix products, measured now on {self.device}, of which the "
                f"engine gets {SHARE:.0%}; beside that {LOAD_SECONDS:.0f} s to load a reader, {CHECK_SECONDS:.0f} s to "
                f"check it against other engines and {CONCLUDE_SECONDS:.0f} s for the report, as on one CPU core."
            )
        if measure:
            said.append("Every reader is taken to give the gold answer; a chain it does not answer costs less.")
        if any(reader.endpoint for reader in self.config.readers):
            said.append("Endpoints: requests are counted, not their time; listed log-probabilities make them fewer.")
        if any(reader.backend == "ndif" for reader in self.config.readers):
            said.append("NDIF: passes are counted as if made here; the time of requests is not known.")
        if to_write:
            most = self.config.generation.max_new_tokens
            said.append(f"Chains yet to be written are taken to be as long as they may be, {most} tokens.")
        if self.sampled:
            said.append(f"Records, forwards and time are those of {SAMPLED} chains a reader, scaled to all.")
        return said


def machine_rates(model: CountedModel, device: str, seconds: float = 0.4) -> tuple[float, float]:
    """FLOP/s of products of 512 tokens with a weight of the model's width, and bytes/s of the weights read for one."""
    width, dtype = model.info.d_model, getattr(torch, model.info.dtype)
    weight = torch.ones(4 * width, width, dtype=dtype, device=device)
    per_pass = {
        n: _seconds_a_product(torch.ones(n, width, dtype=dtype, device=device), weight, seconds) for n in (512, 1)
    }
    flops = 2 * 512 * weight.numel() / per_pass[512]
    return flops, weight.numel() * weight.element_size() / per_pass[1]


def _seconds_a_product(rows: Any, weight: Any, seconds: float) -> float:
    def synchronised() -> float:
        if weight.is_cuda:
            torch.cuda.synchronize(weight.device)
        return time.perf_counter()

    torch.mm(rows, weight.T)
    started, n = synchronised(), 0
    while synchronised() - started < seconds:
        torch.mm(rows, weight.T)
        n += 1
    return (synchronised() - started) / n


def memory_bytes(model: CountedModel, models: int) -> float:
    """Weights, what base runs keep (residual stream and K/V of every layer), and a pass of all the room there is."""
    info, size = model.info, _itemsize(model)
    a_token = ((info.n_layers + 1) * info.d_model + 2 * info.n_layers * info.n_kv_heads * info.d_head) * size
    room = MAX_TOKENS * (1 if info.device == "cpu" else 8) * model.room.bytes_a_token
    return PROCESS_BYTES + models * model.n_parameters * size + model.tally.most_held * a_token + room


def _itemsize(model: CountedModel) -> int:
    return getattr(torch, model.info.dtype).itemsize
