"""The text side that all in-process backends share: identity, encoding, chat template, generation."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from ..chains import Encoding
from ..errors import CotfaithError
from ..model import BackendName, DirectPath, ModelInfo
from ..problems import HALF_PAIR
from ..seeds import check_seeds
from .hooks import Layout, check_residual_stream
from .weights import Weights

_TURN = re.compile(r"\s*[<\[].+[>\]]\s*")
"""A token that a template opens or closes a turn by, also where the tokenizer does not declare it special."""


def rendered(tokenizer: Any, question: str) -> str:
    """Chat template up to where the assistant's turn begins; without a template BOS + question + newline."""
    if not question.strip():
        raise CotfaithError("The question is empty; give one with text.")
    if tokenizer.chat_template is None:
        return (tokenizer.bos_token or "") + question + "\n"
    turns = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


class TextSide:
    """Encode, decode, render and generate with the model's own tokenizer and template."""

    def __init__(self, weights: Weights, backend: BackendName) -> None:
        if not weights.tokenizer.is_fast:
            raise CotfaithError(
                f"{weights.name!r} has a slow tokenizer, which gives no character offsets; "
                "convert it to a fast one (tokenizer.json)."
            )
        self.weights = weights
        self.layout = Layout.of(weights.model)
        check_residual_stream(weights.model, self.layout)
        self.windows = tuple(modules.window for modules in self.layout.layers)
        self.tokenizer = weights.tokenizer
        stops = weights.model.generation_config.eos_token_id or self.tokenizer.eos_token_id
        self.stop_tokens = frozenset(stops if isinstance(stops, list) else [stops])
        shown = set(self.tokenizer(self.render("?"), add_special_tokens=False)["input_ids"])
        self._special_ids = set(self.tokenizer.all_special_ids)
        for i, token in self.tokenizer.added_tokens_decoder.items():
            if token.special or (i in shown and _TURN.fullmatch(token.content)):
                self._special_ids.add(i)
        written = self.tokenizer.convert_ids_to_tokens(list(range(len(self.tokenizer))))
        self.digit_tokens = tuple(i for i, token in enumerate(written) if token and token[0] in "0123456789")
        config = weights.model.config.get_text_config()
        parameter = next(weights.model.parameters())
        n_heads = config.num_attention_heads
        self.info = ModelInfo(
            name=weights.name,
            backend=backend,
            architecture=type(weights.model).__name__,
            n_layers=config.num_hidden_layers,
            n_heads=n_heads,
            n_kv_heads=getattr(config, "num_key_value_heads", None) or n_heads,
            d_model=config.hidden_size,
            d_head=getattr(config, "head_dim", None) or config.hidden_size // n_heads,
            vocab=config.vocab_size,
            context=config.max_position_embeddings,
            dtype=str(parameter.dtype).removeprefix("torch."),
            device=str(parameter.device),
            weights_hash=weights.weights_hash,
            text_hash=_text_hash(self.tokenizer),
            adapter=weights.adapter,
        )

    def encode(self, text: str) -> Encoding:
        """Ids and character offsets of the whole text; no special token is added.

        Raises CotfaithError where the text is longer than the context, and where it holds other special tokens than
        the template writes around a question: one that stands in the data would act as special. What the tokenizer
        does not declare special (`<think>` of reasoning models, which write it in their chains) is text.
        """
        if HALF_PAIR.search(text):
            raise CotfaithError("The text holds half a surrogate pair, which no tokenizer reads; take it out.")
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = tuple(out["input_ids"])
        special = self._special(text, ids, out["offset_mapping"])
        if special and [token for token, _ in special] != self._frame:
            pairs = zip_longest(special, self._frame[: len(special)])
            strange = next((one for one, own in pairs if one[0] != own), special[-1])
            raise CotfaithError(
                f"The text holds {strange[1]!r}, a special token of {self.info.name!r} beside those of its template: "
                "it would act as one; take it out of question and chain."
            )
        if len(ids) > self.info.context:
            raise CotfaithError(
                f"The text has {len(ids)} tokens, but {self.info.name!r} reads at most {self.info.context}; shorten it."
            )
        return Encoding(ids, tuple((int(a), int(b)) for a, b in out["offset_mapping"]))

    def _special(self, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> list[tuple[int, str]]:
        """The special tokens of an encoded text, each with how it stands there; an unknown character is none."""
        unknown = self.tokenizer.unk_token
        found = [(token, text[a:b]) for token, (a, b) in zip(ids, offsets, strict=True) if token in self._special_ids]
        return [one for one in found if one[0] != self.tokenizer.unk_token_id or one[1].strip() == unknown]

    @cached_property
    def _frame(self) -> list[int]:
        """The special tokens that the template writes around a question."""
        text = self.render("?")
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [token for token, _ in self._special(text, out["input_ids"], out["offset_mapping"])]

    def count(self, text: str) -> int:
        return len(self.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids))

    def render(self, question: str) -> str:
        """See `rendered`."""
        return rendered(self.tokenizer, question)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        begun: Sequence[str] | None = None,
        max_new_tokens: int,
        temperature: float = 0.0,
        seeds: Sequence[int] = (),
    ) -> list[str]:
        """Continuations in one left-padded batch. See `Model.generate`."""
        check_seeds(seeds, prompts, temperature)
        if not prompts:
            return []
        texts = prompts if begun is None else [prompt + start for prompt, start in zip(prompts, begun, strict=True)]
        encoded = [self.encode(text).ids for text in texts]
        width = max(map(len, encoded))
        device = self.info.device
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in encoded], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded], device=device)
        plain = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
        out = self._continued(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            logits_processor=[_Draws(temperature, seeds)] if temperature else [],
            **plain,
        )
        return self.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)

    def _continued(self, **settings: Any) -> Int[Tensor, "batch pos"]:
        """Prompts and what the model writes after them, by its own `generate`."""
        return self.weights.model.generate(**settings)

    @torch.no_grad()
    def direct_path(
        self, z: Float[Tensor, "layer head d_head"], final: Float[Tensor, "d_model"], token: int, foil: int
    ) -> DirectPath:
        """See `Model.direct_path`; reads the output projections, norms and unembedding of the model itself."""
        unembedding = self.layout.unembed.weight.float()
        direction = (unembedding[token] - unembedding[foil]).to(final.device) * _frozen_scale(self.layout.norm, final)
        into_z, biases = [], []
        for modules, z_layer in zip(self.layout.layers, z, strict=True):
            projection, towards = modules.attention.o_proj, direction
            if modules.attn_out is not modules.attention:
                raw = projection(z_layer.flatten().to(projection.weight.dtype)).float().to(final.device)
                towards = direction * _frozen_scale(modules.attn_out, raw)
            into_z.append((towards @ projection.weight.float().to(final.device)).view_as(z_layer))
            none = torch.zeros_like(direction)
            biases.append(towards @ (none if projection.bias is None else projection.bias.float().to(final.device)))
        return DirectPath(torch.stack(into_z), torch.stack(biases), direction)

    @torch.no_grad()
    def written_norm(self, layer: int, v: Float[Tensor, "*key head d_head"]) -> Float[Tensor, "*key head"]:
        """See `Model.written_norm`; by the Gram matrix of each head's columns of the output projection."""
        weight = self.layout.layers[layer].attention.o_proj.weight.float().unflatten(1, v.shape[-2:])
        gram = einsum(weight, weight, "d_model head a, d_model head b -> head a b").to(v.device)
        return einsum(v, gram, v, "... head a, head a b, ... head b -> ... head").clamp_min(0).sqrt()

    @torch.no_grad()
    def lens(self, resid: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any vocab"]:
        """See `Model.lens`."""
        weight = self.layout.unembed.weight
        logits = self.layout.unembed(self.layout.norm(resid.to(weight.device, weight.dtype))).float().cpu()
        cap = getattr(self.weights.model.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def uncapped(self, logit: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """See `Model.uncapped`."""
        cap = getattr(self.weights.model.config.get_text_config(), "final_logit_softcapping", None)
        return logit if cap is None else torch.atanh(logit / cap) * cap


class _Draws:
    """Leaves of each row's logits one token, drawn by the row's own seed, so that greedy decoding takes it."""

    def __init__(self, temperature: float, seeds: Sequence[int]) -> None:
        self._temperature = temperature
        self._rows = [np.random.default_rng(seed) for seed in seeds]

    def __call__(self, ids: Tensor, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, "batch vocab"]:
        above = logits.double()
        below = ((above - above.max(-1, keepdim=True).values) / self._temperature).softmax(-1).cumsum(-1)
        if not below[:, -1].isfinite().all():
            raise CotfaithError(
                "The model's logits are not numbers, so nothing is drawn; see whether its weights are whole."
            )
        draws = torch.tensor([[row.random()] for row in self._rows], dtype=below.dtype, device=below.device)
        drawn = torch.searchsorted(below, draws * below[:, -1:], right=True)
        return torch.full_like(logits, -torch.inf).scatter(1, drawn, 0.0)


def _text_hash(tokenizer: Any) -> str:
    """Names how text becomes tokens: the chat template, and the ids of a probe with digits, marks and other scripts."""
    probe = tokenizer("\n3 × 1,000.5 = «Übung» - 東京, isn't it?\n", add_special_tokens=False)["input_ids"]
    return hashlib.sha256(repr((tokenizer.chat_template, probe)).encode()).hexdigest()[:16]


def _frozen_scale(norm: Any, x: Float[Tensor, "d_model"]) -> Float[Tensor, "d_model"]:
    """The diagonal g with norm(x) = g * x, for a root-mean-square norm with its scale frozen at `x`.

    The norm's own forward gives it: of a vector of ones it is its weight. Refuses a norm that is not of this kind.
    """
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    dtype = norm.weight.dtype
    weight = norm(torch.ones_like(x, dtype=dtype)).float().to(x.device) * (1 + eps) ** 0.5
    scale = weight * (x.square().mean() + eps).rsqrt()
    expected = norm(x.to(dtype)).float().to(x.device)
    tolerance = (1e-4 if dtype == torch.float32 else 2e-2) * expected.abs().max()
    if (scale * x - expected).abs().max() > tolerance:
        raise CotfaithError(f"{type(norm).__name__} is not a root-mean-square norm; direct contributions need one.")
    return scale
