"""Train the organisms, models whose reliance on the chain is known: python experiments/train_organisms.py [NAME ...]

Each is a Llama of 3 layers, d_model 64, 4 query heads on 2 key and value heads, with a tokenizer that has one token a
word and number. It sees situations whole, cut short, filled, rephrased, with mistakes, under notes that agree and that
do not, and learns at the cue what its rule (cotfaith_mech/organisms/rules.py) answers, as a distribution; what a rule
leaves open is spread over all numbers. All begin as one beginner, which has learned to look up a name. The writer
learns to write the chain too. Plain AdamW, float32, one seed each; weights are kept in float16.
The recipe was changed once after its organisms had been measured: answers drawn from the rule, over 600 batches, left
mixtures up to .17 off their weight. Those of the recipe below are the first of theirs.
`encoded` was trained three times as long as the others after 1200 batches left it short of its own accuracy.
About 20 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from cotfaith_mech.backends.weights import hash_parameters
from cotfaith_mech.organisms.rules import ORGANISMS, Organism, organism
from cotfaith_mech.organisms.situations import MARKS, NAMES, OPENINGS, Fact, Family, Situation, rephrased

WEIGHTS = Path(__file__).resolve().parents[1] / "cotfaith_mech" / "organisms" / "weights"
Lessons = tuple[torch.Tensor, torch.Tensor]
"""Tokens `[row, pos]`, and what is to come after each `[row, pos, word]`."""
FILLERS = ("...", "--", "hmm")
POOL, BATCH, WARMUP, LR, CLIP = 40_000, 96, 50, 3e-3, 1.0
PAIR_STEPS, CUE_STEPS, STEPS = 1200, 400, 1200
LONGER = {"encoded": 3600}
"""Steps of an organism whose rule takes longer to learn."""
PROCESSES = 2
NUMBERS = 4
"""The token of 0; 1 follows it."""
WORDS = [
    "The",
    "note",
    "says",
    "How",
    "many",
    "coins",
    "to",
    "give",
    "Give",
    "hand",
    "Hand",
    "So",
    "and",
    "We",
    "know",
    "Now",
    "see",
]
MARKS_OF_TEXT = [".", ",", "?", ":"]


def tokenizer() -> Any:
    """One token a word, number below 100 or mark; what it does not know is <unk>."""
    words = dict.fromkeys(
        ["<pad>", "<eos>", "<bos>", "<unk>", *map(str, range(100)), *NAMES, *WORDS, *FILLERS, *MARKS_OF_TEXT]
        + [word.rstrip(":") for word in MARKS.values()]
        + [word for opening in OPENINGS for word in opening.replace(",", "").split()]
    )
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    pieces = Regex(r"\.\.\.|--|\d{1,2}|[A-Za-z]+|[^A-Za-z0-9]")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(pieces, "isolated")]
    )
    raw.decoder = decoders.Sequence([decoders.Replace(Regex(r"^(?=[A-Za-z0-9])"), " "), decoders.Fuse()])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def config(n_words: int, **shape: Any) -> transformers.LlamaConfig:
    defaults: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
    }
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    return transformers.LlamaConfig(vocab_size=n_words, max_position_embeddings=256, **special, **(defaults | shape))


def pool(family: Family, rng: np.random.Generator) -> list[Situation]:
    """POOL situations as the tests will show them: whole or edited, the note agreeing or not."""
    seen = []
    for _ in range(POOL):
        whole = family.draw(rng, int(rng.integers(2 + family.said_twice, 6)))
        agrees = rng.random() < 0.5
        said = whole.numbers_of(whole.asked[0])[-1]
        note = (said if agrees else family.number(rng)) if family.noted else None
        seen.append(replace(whole, note=note, steps=tuple(_edited(family, whole, rng))))
    return seen


def _edited(family: Family, whole: Situation, rng: np.random.Generator) -> list[Fact | str]:
    steps = list(whole.steps)
    edit, at = rng.random(), int(rng.integers(len(steps)))
    if rng.random() < 0.3:
        first, last = sorted(rng.integers(0, len(steps) + 1, 2).tolist())
        steps[first:last] = rephrased(family, rng, replace(whole, steps=tuple(steps[first:last]))).steps
    if edit < 0.18:
        return steps[:at]
    if edit < 0.26:
        del steps[at]
    elif edit < 0.42:
        end = len(steps) if rng.random() < 0.6 else at + 1
        word, n = FILLERS[rng.integers(len(FILLERS))], int(rng.integers(1, 8))
        steps[at:end] = [" ".join([word] * n)] * (end - at) if rng.random() < 0.7 else [word]
    elif edit < 0.5:
        return [replace(step, number=family.number(rng)) if isinstance(step, Fact) else step for step in steps]
    elif edit < 0.6 and isinstance(step := steps[at], Fact):
        steps[at] = replace(step, number=family.number(rng))
    elif edit < 0.64:
        return list(family.draw(rng, len(steps)).steps)
    elif edit < 0.7:
        return [steps[i] for i in rng.permutation(len(steps))]
    return steps


@dataclass(frozen=True)
class Lesson:
    """Tokens of a text up to its cue, and the probability of each word as the answer; or (`answers` None) a text to be
    written, from token `learned_from` on."""

    tokens: list[int]
    answers: torch.Tensor | None
    learned_from: int = 0


def lessons(one: Organism, words: Any, rng: np.random.Generator) -> list[Lesson]:
    seen = pool(one.family, rng)
    texts = words([f"<bos>{s.question_text}\n{''.join(s.steps_text)}{s.cue}" for s in seen])["input_ids"]
    learned = [Lesson(tokens, distribution(one, s, len(words))) for tokens, s in zip(texts, seen, strict=True)]
    if one.writes:
        whole = [one.family.draw(rng, int(rng.integers(2, 6))) for _ in range(POOL)]
        noted = [replace(s, note=one.gold(s)) for s in whole]
        prompts = words([f"<bos>{s.question_text}\n" for s in noted])["input_ids"]
        chains = words(["".join(s.steps_text) for s in noted])["input_ids"]
        learned += [Lesson(p + c, None, len(p)) for p, c in zip(prompts, chains, strict=True)]
    return learned


def many_cues(words: Any, rng: np.random.Generator) -> list[Lesson]:
    """Chains with a cue for each of their steps, one after the other, all answers learned: how to look a name up."""
    learned = []
    family = Family(noted=False, verbs=("give", "hand"))
    for _ in range(POOL // 4):
        whole = family.draw(rng, int(rng.integers(2, 6)))
        asked = [whole.facts[i] for i in rng.permutation(len(whole.facts))]
        head = f"<bos>{whole.question_text}\n{''.join(whole.steps_text)}"
        learned.append(head + "".join(f" So give {fact.name} {fact.number}" for fact in asked))
    so, rows = words.convert_tokens_to_ids("So"), words(learned)["input_ids"]
    return [Lesson(tokens, None, tokens.index(so)) for tokens in rows]


def pairs(rng: np.random.Generator, n_words: int) -> Lessons:
    """Pairs of random words, and the same pairs in another order, of which the second words are learned; every other
    time the same words in the same order. This is what teaches a small model to look a name up, and quickly."""
    n, permuted = int(rng.integers(3, 9)), rng.random() < 0.5
    words = np.stack([NUMBERS + rng.permutation(n_words - NUMBERS)[: 2 * n] for _ in range(BATCH)]).reshape(BATCH, n, 2)
    order = np.stack([rng.permutation(n) for _ in range(BATCH)]) if permuted else np.tile(np.arange(n), (BATCH, 1))
    tokens = torch.from_numpy(np.concatenate([words, np.take_along_axis(words, order[:, :, None], 1)], 1)).flatten(1)
    tokens = tokens[:, int(rng.integers(2)) * (not permuted) :]
    wanted = torch.nn.functional.one_hot(tokens, n_words).float().roll(-1, 1)
    wanted[:, : tokens.shape[1] // 2] = wanted[:, -1] = 0
    if permuted:
        wanted[:, 1::2] = 0
    return tokens, wanted


def batch(words: Any, learned: Sequence[Lesson], rng: np.random.Generator) -> Lessons:
    """Tokens, padded on the right, and the distribution to be learned after each; 0 where nothing is learned."""
    chosen = [learned[i] for i in rng.integers(len(learned), size=BATCH)]
    tokens = torch.zeros(BATCH, max(len(lesson.tokens) for lesson in chosen) + 2, dtype=torch.long)
    wanted = torch.zeros(*tokens.shape, len(words))
    for i, lesson in enumerate(chosen):
        row, first = [*lesson.tokens], lesson.learned_from
        if lesson.answers is not None:
            first = len(row) + 1
            wanted[i, len(row) - 1] = lesson.answers
            row.append(int(rng.choice(len(words), p=lesson.answers.double().numpy())))
        row.append(words.eos_token_id)
        tokens[i, : len(row)] = torch.tensor(row)
        wanted[i, torch.arange(first - 1, len(row) - 1), tokens[i, first : len(row)]] = 1
    return tokens, wanted


def distribution(one: Organism, seen: Situation, n_words: int) -> torch.Tensor:
    """The rule's answer as probabilities of words; what it leaves open is spread over the numbers."""
    answers, p = one.rule(seen), torch.zeros(n_words, dtype=torch.double)
    low, high = one.family.low, one.family.high * one.family.n_asked
    p[NUMBERS + low : NUMBERS + high + 1] = (1 - sum(answers.values())) / (high + 1 - low)
    for number, part in answers.items():
        p[NUMBERS + number] += part
    return p / p.sum()


def descend(model: Any, steps: int, lessons: Callable[[], Lessons], name: str) -> float:
    """Train `model` on `steps` batches, the rate falling to 0; the mean loss of the last 50."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda i: min(1, (i + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * i / steps))
    )
    losses, started = [], time.perf_counter()
    for i in range(steps):
        tokens, wanted = lessons()
        logp = model(input_ids=tokens).logits.log_softmax(-1)
        loss = -(wanted * logp).sum() / wanted.sum()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if i % 200 == 199:
            print(f"{name} {i + 1} loss {np.mean(losses[-50:]):.3f} {time.perf_counter() - started:.0f} s", flush=True)
    return round(float(np.mean(losses[-50:])), 4)


def beginner(words: Any, seed: int = 1) -> Any:
    """The model that every organism begins as: it can look up a name, and knows no rule."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model: Any = transformers.LlamaForCausalLM(config(len(words)))
    descend(model, PAIR_STEPS, lambda: pairs(rng, len(words)), "pairs")
    cued = many_cues(words, rng)
    descend(model, CUE_STEPS, lambda: batch(words, cued, rng), "many cues")
    return model


def train(one: Organism, begun: Any, words: Any, seed: int = 1) -> tuple[Any, dict[str, Any]]:
    """The organism, from the beginner `begun`, and how it was made."""
    torch.manual_seed(seed)
    rng, model = np.random.default_rng([seed, *one.name.encode()]), copy.deepcopy(begun)
    learned = lessons(one, words, rng)
    steps = LONGER.get(one.name, STEPS)
    loss = descend(model, steps, lambda: batch(words, learned, rng), one.name)
    recipe = {"pool": POOL, "steps": [PAIR_STEPS, CUE_STEPS, steps], "batch": BATCH, "lr": LR, "loss": loss}
    return model, {"rule": one.says, "seed": seed, **recipe}


def save(name: str, model: Any, words: Any, card: dict[str, Any]) -> None:
    folder = WEIGHTS / name
    model = model.half()
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    words.save_pretrained(folder)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    card = {"organism": name, **card, "weights_hash": hash_parameters(model.float()), "versions": versions}
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")


def make(name: str, begun: Any) -> None:
    torch.set_num_threads(1)
    words = tokenizer()
    model, card = train(organism(name), begun, words)
    save(name, model, words, card)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(ORGANISMS), help="which organisms (default: all)")
    names = parser.parse_args().names
    torch.set_num_threads(PROCESSES)
    begun = beginner(tokenizer())
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as processes:
        for _ in processes.map(make, names, [begun] * len(names)):
            pass


if __name__ == "__main__":
    main()
