"""Tiny random models of every family, with pairwise distinct dimensions, and a tiny real tokenizer made in code."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cotfaith_mech.backends.weights import Weights, hash_parameters

ARCHITECTURES = ("llama-mha", "llama-gqa", "llama-mqa", "qwen2", "mistral", "gemma2")
SENTENCES = [
    "Ann has 14 + 8 = 22 marbles. Bob has 31 - 5 = 26 marbles.",
    "So Ann has 22. The answer is 26, and the record says 90.",
    "user assistant How many does she have? Therefore it is (A) or (B).",
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@lru_cache
def tokenizer() -> Any:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=331,
        special_tokens=["<bos>", "<eos>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(SENTENCES, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )
    fast.chat_template = TEMPLATE
    return fast


def tiny(architecture: str, seed: int = 0) -> Weights:
    """Random float32 weights, scaled so that attention is not uniform and logits differ by order 1.

    llama-mha and qwen2 have non-zero biases, the first on the output projection too.
    """
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": 337,
        "hidden_size": 48,
        "intermediate_size": 52,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": {"llama-mha": 6, "llama-mqa": 1}.get(architecture, 3),
        "head_dim": 8,
        "max_position_embeddings": 96,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "tie_word_embeddings": False,
    }
    if architecture == "mistral":
        model = transformers.MistralForCausalLM(transformers.MistralConfig(**shape, sliding_window=7))
    elif architecture == "qwen2":
        model = transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(**{k: v for k, v in shape.items() if k != "head_dim"})
        )
    elif architecture == "gemma2":
        config = transformers.Gemma2Config(
            **shape, sliding_window=7, query_pre_attn_scalar=8, attn_logit_softcapping=20.0, final_logit_softcapping=9.0
        )
        config._attn_implementation = "eager"
        model = transformers.Gemma2ForCausalLM(config)
    else:
        config = transformers.LlamaConfig(**shape, attention_bias=architecture == "llama-mha")
        model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
            elif "bias" in name:
                parameter.normal_(0, 0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model = model.eval().requires_grad_(False)
    return Weights(f"tiny-{architecture}", model, tokenizer(), hash_parameters(model))
