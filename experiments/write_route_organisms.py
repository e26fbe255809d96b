"""Write the organisms whose route to the answer is known, by hand: python experiments/write_route_organisms.py

Training fixes what goes in and what comes out, not the route; these weights fix the route. Two layers, no MLP, four
query heads on two key and value heads. In the text 'Give Bob 47 coins. We know. So' a head looks from one kind of
token (know, So) at one other kind (a number, know) with nearly all its attention, and copies what it reads; every other
token looks at the first one, where nothing stands:
  direct     layer 0 head 1: So <- number
  via_later  layer 0 head 0: know <- number, then layer 1 head 2: So <- know
  both       layer 0 head 0: know <- number, then layer 1 head 2: So <- know and head 3: So <- number
A number is a unit vector, its tens digit and its ones digit in equal parts; So and know are unit vectors. Every norm
of a unit vector in 64 dimensions multiplies it by 8. The rotary embedding turns one pair of dimensions alone, which no
head uses (base 1e200). What follows from this is worked out in tests/test_organisms.py. Takes seconds.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
import transformers
from train_organisms import NUMBERS, config, save, tokenizer

from cotfaith_mech.organisms.rules import ROUTES

D_HEAD = 40
NUMBER, COPY, OUT = 0, 20, 40
"""First of the 20 dimensions (tens, ones) of a number's token, of its copy at 'know', and of what is answered."""
SO, KNOW, BOS, OTHER = 60, 61, 62, 63
"""Dimensions of their tokens; OTHER is that of every word without one of its own."""
SHARP = 40.0
"""Score of the attended key; all others have 0."""
UNEMBED = 8.0
SEES_NUMBER, SEES_KNOW, SEES_BOS = 1, 2, 3
"""Dimensions of keys and queries that find a number, 'know', and the first token, where there is nothing to read."""
WHO = {"So": SO, "know": KNOW, "<bos>": BOS}
HEADS = {
    "direct": [(0, 1, "So", SEES_NUMBER)],
    "via_later": [(0, 0, "know", SEES_NUMBER), (1, 2, "So", SEES_KNOW)],
    "both": [(0, 0, "know", SEES_NUMBER), (1, 2, "So", SEES_KNOW), (1, 3, "So", SEES_NUMBER)],
}
"""Layer, head, who looks, at what."""


def digits(number: int) -> list[int]:
    return [number // 10, 10 + number % 10]


def written(route: str, words: Any) -> Any:
    """The model of that route, float32."""
    shape = {"num_hidden_layers": 2, "head_dim": D_HEAD, "intermediate_size": 8, "rms_norm_eps": 1e-12}
    rope = {"rope_type": "default", "rope_theta": 1e200}
    model: Any = transformers.LlamaForCausalLM(config(len(words), rope_parameters=rope, **shape))
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0 if "norm" in name else 0.0)
    embed, unembed = model.model.embed_tokens.weight, model.lm_head.weight
    embed[:, OTHER] = 1
    for word, dim in WHO.items():
        embed[words.convert_tokens_to_ids(word)] = torch.eye(64)[dim]
    for number in range(100):
        embed[NUMBERS + number, OTHER] = 0
        for place in digits(number):
            embed[NUMBERS + number, NUMBER + place] = 1 / sqrt(2)
            unembed[NUMBERS + number, OUT + place] = UNEMBED / sqrt(2)
    unembed[words.eos_token_id, NUMBER : NUMBER + 20] = UNEMBED / sqrt(2)
    for block in model.model.layers:
        _idle(block.self_attn)
    for layer, head, who, sees in HEADS[route]:
        _attend(model.model.layers[layer].self_attn, head, who, sees)
    return model


def _idle(attention: Any) -> None:
    """Every token looks at the first one with every head."""
    query = torch.zeros(64)
    query[[SO, KNOW, OTHER]] = 1
    query[NUMBER : NUMBER + 20] = 1 / sqrt(2)
    for head in range(4):
        attention.q_proj.weight[head * D_HEAD + SEES_BOS] = query * SHARP * sqrt(D_HEAD) / 64
    for group in range(2):
        attention.k_proj.weight[group * D_HEAD + SEES_BOS, BOS] = 1


def _attend(attention: Any, head: int, who: str, sees: int) -> None:
    """`who` gives score SHARP to what `sees` finds, and copies a number, or the copy of one, from there."""
    group, first = head // 2, head * D_HEAD
    attention.q_proj.weight[first + SEES_BOS, WHO[who]] = 0
    attention.q_proj.weight[first + sees, WHO[who]] = SHARP * sqrt(D_HEAD) / 64
    keys, values = (
        projection.weight[group * D_HEAD : (group + 1) * D_HEAD] for projection in (attention.k_proj, attention.v_proj)
    )
    keys[SEES_NUMBER, NUMBER : NUMBER + 20] = 1 / sqrt(2)
    keys[SEES_KNOW, KNOW] = 1
    for i in range(20):
        values[i, NUMBER + i] = values[20 + i, COPY + i] = 1
        read = first + i + (20 if sees == SEES_KNOW else 0)
        attention.o_proj.weight[(COPY if who == "know" else OUT) + i, read] = 1 / 8


def main() -> None:
    words = tokenizer()
    with torch.no_grad():
        for one in ROUTES.values():
            save(one.name, written(one.name, words), words, {"rule": one.says, "seed": None})


if __name__ == "__main__":
    main()
