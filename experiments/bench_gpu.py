"""One full step x layer profile of a Llama-3-8B-shaped model on a GPU: python experiments/bench_gpu.py --json OUT

Random bf16 weights of the published shape, made on the device: nothing is downloaded. A chain of 600 tokens has 12
steps; a cell replaces resid_pre of one layer at all tokens of one step by what another chain has there.
Measured: the engine on all 384 cells, its share of the card's own matmul rate (one large square product, in the same
run), peak memory, waits of the host inside a sweep, and TransformerLens, nnsight and plain hooks on a sample of the
same cells. Each round times all of them; ratios are of medians. Differences are beside the largest effect of a cell.
`--tiny` runs the same on a small float32 model on the CPU, where rates and goals mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from cotfaith_mech.backends.huggingface import HuggingFaceModel
from cotfaith_mech.backends.weights import Weights
from cotfaith_mech.bench_cells import BenchChain
from cotfaith_mech.bench_patching import Work, peers_of, timed, top_two_difference, work_of
from cotfaith_mech.model import CachedRun, Reduce, same_weights

LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "max_position_embeddings": 8192,
}
TINY = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 337,
    "max_position_embeddings": 128,
}
GOALS = {"ratio_to_transformer_lens": 20.0, "share_of_matmul_rate": 0.5, "seconds_at_most": 10.0}


def random_model(shape: dict[str, Any], device: str, dtype: torch.dtype) -> HuggingFaceModel:
    """A Llama of `shape` with random weights, made on `device`; its tokenizer knows the digits alone."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**shape, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    words = {"<bos>": 0, "<eos>": 1} | {str(digit): 2 + digit for digit in range(10)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>", unk_token="<eos>"
    )
    return HuggingFaceModel(Weights("random-llama", model.eval().requires_grad_(False), tokenizer, "random, seed 0"))


def random_chain(vocab: int, n_tokens: int, n_steps: int) -> BenchChain:
    """`n_tokens` random tokens: a prompt and a cue of one step's length each, and `n_steps` equal steps between them.

    The twin differs in one token of each step.
    """
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, vocab, (n_tokens,), generator=generator)
    edges = torch.linspace(0, n_tokens, n_steps + 3).round().int().tolist()
    steps = tuple(pairwise(edges[1:-1]))
    twin = tokens.clone()
    for first, end in steps:
        twin[(first + end) // 2] = (twin[(first + end) // 2] + 7) % vocab
    return BenchChain(tuple(tokens.tolist()), tuple(twin.tolist()), steps, (edges[-2], edges[-1]))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--tokens", type=int, default=None, help="default 600 (tiny: 56)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sample", type=int, default=32, help="cells of each peer a round")
    asked = parser.parse_args(arguments)
    if not asked.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device is at hand; give --tiny for a small model on the CPU")
    device, dtype = ("cpu", torch.float32) if asked.tiny else ("cuda", torch.bfloat16)
    model = random_model(TINY if asked.tiny else LLAMA_3_8B, device, dtype)
    chain = random_chain(model.info.vocab, asked.tokens or (56 if asked.tiny else 600), 12)
    found = profile(model, chain, asked.rounds, asked.sample)
    asked.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: value for key, value in found.items() if key != "peers"}, indent=1))


def profile(model: HuggingFaceModel, chain: BenchChain, rounds: int, sample: int) -> dict[str, Any]:
    """Everything that is measured, and whether each goal is met; seconds are medians of `rounds`."""
    backends = {name: same_weights(model, name) for name in ("transformer_lens", "nnsight")}
    work = work_of(model, "patch_layer_step", chain, sample, float("inf"))
    run = model.cached_run(chain.tokens)
    reduce = top_two_difference(run)
    base = float(reduce(run.logits(1)[None])[0, 0])
    peers = peers_of(model, backends, work, reduce)
    times: dict[str, list[float]] = {"ours": [], **{name: [] for name in peers}}
    results: dict[str, torch.Tensor] = {}
    engine_memory = 0
    sweep(run, work, reduce)
    for _ in range(rounds):
        reset_peak(model.info.device)
        results["ours"] = timed(times["ours"], lambda: sweep(run, work, reduce))
        engine_memory = max(engine_memory, peak(model.info.device))
        for name, patch in peers.items():
            ask = lambda patch=patch: patch(work.cells(work.few)).flatten()  # noqa: E731
            results[name] = timed(times[name], ask).float().cpu()
    found = {
        **setting(model, chain, work),
        "rounds": rounds,
        "ours_s": statistics.median(times["ours"]),
        "cells_per_s": len(work.flops) / statistics.median(times["ours"]),
        "base_run_s": statistics.median(base_runs(model, chain, rounds)),
        "flops": sum(work.flops),
        "matmul_flops_per_s": square_matmul_rate(model.info.device),
        "peak_memory_bytes": engine_memory,
        "host_waits_in_a_sweep": host_waits(model.info.device, run, work, reduce),
        "largest_effect": float((results["ours"] - base).abs().max()),
        "peers": [peer_row(name, work, times, results) for name in peers],
    }
    found["share_of_matmul_rate"] = found["flops"] / found["ours_s"] / found["matmul_flops_per_s"]
    return {**found, "goals": goals(found)}


def sweep(run: CachedRun, work: Work, reduce: Reduce) -> torch.Tensor:
    return run.edited(work.of.cells, n_logits=1, reduce=reduce).flatten()


def setting(model: HuggingFaceModel, chain: BenchChain, work: Work) -> dict[str, Any]:
    """What was measured on: device, versions, shape, chain."""
    name = torch.cuda.get_device_name() if model.info.device.startswith("cuda") else "cpu"
    libraries = ("torch", "transformers", "transformer-lens", "nnsight")
    shape = ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_head", "vocab")
    return {
        "device": name,
        "dtype": model.info.dtype,
        "versions": {library: version(library) for library in libraries},
        "shape": {name: getattr(model.info, name) for name in shape},
        "tokens": len(chain.tokens),
        "steps": len(chain.steps),
        "cells": len(work.flops),
    }


def peer_row(name: str, work: Work, times: dict[str, list[float]], results: dict[str, torch.Tensor]) -> dict[str, Any]:
    peer_s = statistics.median(times[name]) * len(work.flops) / len(work.few)
    return {
        "peer": name,
        "cells_timed": len(work.few),
        "peer_s": peer_s,
        "ratio": peer_s / statistics.median(times["ours"]),
        "max_abs_diff": float((results[name] - results["ours"][work.few]).abs().max()),
    }


def goals(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each goal with what was reached; `met` is None on the CPU, where none of them is about anything."""
    reached = {
        "ratio_to_transformer_lens": next(r["ratio"] for r in found["peers"] if r["peer"] == "transformer_lens"),
        "share_of_matmul_rate": found["share_of_matmul_rate"],
        "seconds_at_most": found["ours_s"] + found["base_run_s"],
    }
    rows = {}
    for name, goal in GOALS.items():
        met = reached[name] <= goal if name == "seconds_at_most" else reached[name] >= goal
        rows[name] = {"goal": goal, "reached": reached[name], "met": None if found["device"] == "cpu" else met}
    return rows


def base_runs(model: HuggingFaceModel, chain: BenchChain, rounds: int) -> list[float]:
    """Seconds of the base run itself, which a profile needs once for itself and once for its source."""
    times: list[float] = []
    for _ in range(rounds):
        timed(times, lambda: model.cached_run(chain.tokens).logits(1))
    return [2 * seconds for seconds in times]


def square_matmul_rate(device: str) -> float:
    """FLOPs a second of a large square product in the dtype of the weights, median of 10 after a warm-up."""
    n, dtype = (8192, torch.bfloat16) if device.startswith("cuda") else (512, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times: list[float] = []
    for _ in range(13):
        timed(times, lambda: a @ b)
    return 2 * n**3 / statistics.median(times[3:])


def host_waits(device: str, run: CachedRun, work: Work, reduce: Reduce) -> int | None:
    """How often the host waited for the device in one sweep, its last copy included; None without a GPU."""
    if not device.startswith("cuda"):
        return None
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            sweep(run, work, reduce)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in seen)


def reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()


def peak(device: str) -> int:
    """Most bytes of the device's memory in use since the last reset, weights included; 0 on the CPU."""
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else 0


if __name__ == "__main__":
    main()
