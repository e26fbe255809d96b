"""Fine-tune a reader with LoRA or QLoRA: python experiments/finetune.py experiments/finetuning_smollm2.yaml

One condition is one way to train (answers alone, chains, another domain, …) and is trained once a seed. Data are
problems of the package's generators or readers, in the reader's own chat template; the loss is on the completion alone
(TRL's SFTTrainer, PEFT's LoRA). An adapter that the fine-tune starts from is merged first, and stacked into the saved
one, so that each folder is a plain PEFT adapter of the base model with a training_card.json beside it.
A finished adapter is not trained again; a killed training goes on from its last checkpoint, if its recipe is the same.
`random_like: CONDITION` trains nothing: a random delta with, module by module, the norm of that condition's.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import datasets
import peft
import torch
import transformers
import yaml
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from cotfaith_mech.backends.text import rendered
from cotfaith_mech.backends.weights import load_weights, locate
from cotfaith_mech.datasets_io import read_problems
from cotfaith_mech.errors import CotfaithError
from cotfaith_mech.problems import Problem

TRAINED = "trained"
CARD = "training_card.json"


class Recipe(BaseModel):
    """How one adapter is made. `problems`: a source of `cotfaith test -p`, for a generator without number and seed
    ('people', 'organism:mix_100'); `questions: bare` leaves out what a generator's question records of the answer;
    `lora_rank` is that of the delta, next to the rank of `start`. With `quantize` the base is held in 4 bit (QLoRA;
    needs a GPU)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    condition: str
    seed: int
    model: str
    start: str | None = None
    problems: str = ""
    template: str | None = None
    questions: Literal["as_given", "bare"] = "as_given"
    completion: Literal["answer", "chain"] = "answer"
    random_like: str | None = None
    lora_rank: int = Field(8, ge=1)
    lora_alpha: int = 16
    steps: int = Field(80, ge=1)
    batch: int = Field(8, ge=1)
    accumulate: int = Field(1, ge=1)
    lr: float = 1e-3
    max_tokens: int = 1024
    quantize: bool = False

    @property
    def name(self) -> str:
        return f"{self.condition}-{self.seed}"

    @property
    def n_examples(self) -> int:
        return self.steps * self.batch * self.accumulate


def recipes(config: Mapping[str, Any]) -> list[Recipe]:
    """One recipe a condition and seed, seeds outermost: a study cut short has every condition equally often. A
    condition's keys go before those of `training`, which all share."""
    wanted = [(name, dict(keys)) for name, keys in config["conditions"].items()]
    seeds = {name: keys.pop("seeds") for name, keys in wanted}
    return [
        Recipe(condition=name, seed=seed, **config["training"] | keys)
        for seed in range(1, max(seeds.values()) + 1)
        for name, keys in wanted
        if seed <= seeds[name]
    ]


# 1. data


def training_problems(recipe: Recipe) -> list[Problem]:
    """As many problems as the training reads once, fewer where the source has fewer (it is then read again)."""
    data_seed = 1000 + recipe.seed
    generated = recipe.problems.isidentifier() or recipe.problems.startswith("organism:")
    source = f"{recipe.problems}:{recipe.n_examples}:{data_seed}" if generated else recipe.problems
    problems, left_out = read_problems(source, recipe.n_examples, data_seed, recipe.template)
    usable = [problem for problem in problems if problem.steps or recipe.completion == "answer"]
    if not usable:
        reason = left_out[0]["reason"] if left_out else "none has a worked chain; take completion: answer"
        raise CotfaithError(f"{recipe.problems!r} gave nothing to train {recipe.name} on: {reason}.")
    return usable


def question(recipe: Recipe, problem: Problem) -> str:
    if recipe.questions == "as_given":
        return problem.question
    bare = [conflict.question for conflict in problem.conflicts if conflict.variant == "record_absent"]
    if not bare:
        raise CotfaithError(f"{problem.problem_id!r} knows no bare question; take questions: as_given.")
    return bare[0]


def examples(recipe: Recipe, tokenizer: Any, problems: list[Problem]) -> list[dict[str, list[int]]]:
    """Token ids and labels (-100 before the completion), encoded whole as a reader encodes them; the turn ends."""
    rows = []
    for problem in problems:
        steps = "".join(problem.steps) if recipe.completion == "chain" else ""
        prompt = rendered(tokenizer, question(recipe, problem))
        text = f"{prompt}{steps}{problem.cue} {problem.gold}.{tokenizer.eos_token}"
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        labels = [token if start >= len(prompt) else -100 for token, (start, _) in zip(ids, offsets, strict=True)]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


# 2. training


class CompletionTrainer(SFTTrainer):
    """TRL's trainer with logits, by far the largest tensor, only where a completion's token is predicted."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"]
        first = int((labels != -100).any(0).nonzero()[0])
        kept = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        outputs = model(**kept, use_cache=False, logits_to_keep=labels.shape[1] - first + 1)
        logits = outputs.logits[:, :-1].float().flatten(0, 1)
        total = torch.nn.functional.cross_entropy(logits, labels[:, first:].flatten(), reduction="sum")
        loss = total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def base_model(recipe: Recipe, start: Path | None) -> tuple[Any, Any]:
    """Model, the start merged into it, and tokenizer; on the GPU where there is one."""
    if not recipe.quantize:
        on_gpu = torch.cuda.is_available()
        device, dtype = ("cuda", "bfloat16") if on_gpu else ("cpu", "float32")
        weights = load_weights(recipe.model, adapter=start and str(start), device=device, dtype=dtype)
        return weights.model, weights.tokenizer
    if start is not None or not torch.cuda.is_available():
        raise CotfaithError("QLoRA (quantize: true) needs a GPU and starts from a model without an adapter.")
    folder = locate(recipe.model)
    four_bit = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bit, device_map="cuda")
    return peft.prepare_model_for_kbit_training(model), transformers.AutoTokenizer.from_pretrained(folder)


def train(recipe: Recipe, folder: Path, start: Path | None) -> dict[str, Any]:
    """Train and save the adapter below `folder`; what the card says of it."""
    model, tokenizer = base_model(recipe, start)
    found = examples(recipe, tokenizer, training_problems(recipe))
    rows = [row for row in found if len(row["input_ids"]) <= recipe.max_tokens]
    scratch, on_gpu = folder / "checkpoints", torch.cuda.is_available()
    arguments = SFTConfig(
        output_dir=str(scratch),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch,
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.lr,
        lr_scheduler_type="linear",
        warmup_steps=min(5, recipe.steps // 4),
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_length=recipe.max_tokens,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        gradient_checkpointing=on_gpu,
        save_steps=max(1, recipe.steps // 4),
        save_total_limit=1,
        logging_steps=max(1, recipe.steps // 20),
        seed=recipe.seed,
        report_to="none",
    )
    lora = peft.LoraConfig(
        r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    torch.manual_seed(recipe.seed)
    trainer = CompletionTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora,
    )
    began = time.time()
    trainer.train(resume_from_checkpoint=any(scratch.glob("checkpoint-*")))
    trained: Any = trainer.model
    trained.save_pretrained(str(folder / TRAINED))
    shutil.rmtree(scratch)
    return {
        "data": {
            "n_examples": len(rows),
            "left_out_as_too_long": len(found) - len(rows),
            "tokens": sum(len(row["input_ids"]) for row in rows),
            "completion_tokens": sum(label != -100 for row in rows for label in row["labels"]),
            "sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        },
        "loss": [round(row["loss"], 4) for row in trainer.state.log_history if "loss" in row],
        "seconds": round(time.time() - began),
        "device": torch.cuda.get_device_name() if on_gpu else f"cpu, {torch.get_num_threads()} threads, float32",
    }


# 3. adapters as tensors


def _read(folder: Path) -> tuple[dict[str, torch.Tensor], float]:
    """Tensors of an adapter, and the factor its delta B A is scaled by."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return load_file(folder / "adapter_model.safetensors"), config["lora_alpha"] / config["r"]


def _pairs(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
    """Names of A `[rank, in]` and B `[out, rank]` of each module."""
    for name in sorted(tensors):
        if ".lora_A." in name:
            yield name, name.replace(".lora_A.", ".lora_B.")


def stack(start: Path | None, delta: Path, folder: Path) -> None:
    """An adapter whose delta is the sum of both, in bfloat16: ranks side by side, factors put into B."""
    new, factor = _read(delta)
    old, old_factor = _read(start) if start else ({}, 0.0)
    if old and set(old) != set(new):
        raise CotfaithError(f"{start} and {delta} adapt different modules; train the same ones.")
    stacked = {}
    for a, b in _pairs(new):
        stacked[a] = torch.cat([old[a].float(), new[a].float()] if old else [new[a].float()], 0).bfloat16()
        parts = [old[b].float() * old_factor, new[b].float() * factor] if old else [new[b].float() * factor]
        stacked[b] = torch.cat(parts, 1).bfloat16()
    rank = len(next(iter(stacked.values())))
    config = json.loads((delta / "adapter_config.json").read_text())
    save_file(stacked, folder / "adapter_model.safetensors", {"format": "pt"})
    text = json.dumps(config | {"r": rank, "lora_alpha": rank}, indent=1, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n")


def randomised(like: Path, folder: Path, seed: int) -> dict[str, Any]:
    """A random delta saved below `folder`, module by module of the Frobenius norm of the one trained below `like`."""
    tensors, factor = _read(like / TRAINED)
    generator = torch.Generator()
    generator.manual_seed(seed)
    drawn, norms = {}, []
    for a, b in _pairs(tensors):
        old = frobenius(tensors[a].float(), tensors[b].float())
        drawn[a] = torch.randn(tensors[a].shape, generator=generator)
        drawn[b] = torch.randn(tensors[b].shape, generator=generator)
        drawn[b] *= old / frobenius(drawn[a], drawn[b])
        norms.append(factor * old)
    (folder / TRAINED).mkdir(parents=True, exist_ok=True)
    save_file(drawn, folder / TRAINED / "adapter_model.safetensors", {"format": "pt"})
    shutil.copy(like / TRAINED / "adapter_config.json", folder / TRAINED)
    return {"norm_of": like.name, "modules": len(norms), "frobenius": round(sum(n**2 for n in norms) ** 0.5, 4)}


def frobenius(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of B A, from A `[rank, in]` and B `[out, rank]`."""
    return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())


# 4. one adapter after the other


def make(recipe: Recipe, out: Path) -> Path:
    """The folder of the recipe's adapter; made now if it is not there yet. Raises CotfaithError where the folder
    holds an adapter of another recipe."""
    folder = out / recipe.name
    card = folder / CARD
    if card.is_file():
        made = json.loads(card.read_text())["recipe"]
        differing = [key for key, value in recipe.model_dump().items() if made.get(key) != value]
        if differing:
            key = differing[0]
            raise CotfaithError(
                f"{folder} holds an adapter with {key}: {made.get(key)!r}, not {getattr(recipe, key)!r}; "
                "choose another --out or delete the folder."
            )
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    begun = folder / "recipe.json"
    if not begun.is_file() or json.loads(begun.read_text()) != recipe.model_dump():
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        begun.write_text(json.dumps(recipe.model_dump()) + "\n")
    start = locate(recipe.start) if recipe.start else None
    if recipe.random_like is None:
        told = train(recipe, folder, start)
    else:
        told = randomised(out / f"{recipe.random_like}-{recipe.seed}", folder, recipe.seed)
    stack(start, folder / TRAINED, folder)
    digest = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    libraries = ("torch", "transformers", "peft", "trl", "cotfaith-mech")
    told |= {
        "adapter_sha256": digest,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in libraries},
    }
    temporary = card.with_suffix(".tmp")
    temporary.write_text(json.dumps({"recipe": recipe.model_dump(), **told}, indent=1) + "\n")
    os.replace(temporary, card)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML with `training` and `conditions`")
    parser.add_argument("--out", type=Path, default=Path("runs/adapters"), help="one folder an adapter")
    parser.add_argument("--only", help="one condition")
    parser.add_argument("--seed", type=int, help="one seed")
    given = parser.parse_args()
    for recipe in recipes(yaml.safe_load(given.config.read_text())):
        if given.only in (None, recipe.condition) and given.seed in (None, recipe.seed):
            print(f"{recipe.name}: {make(recipe, given.out)}", flush=True)


if __name__ == "__main__":
    main()
