"""A reader that has its tokenizer, its config and no weights: it computes nothing and counts what would be computed.

Measurements run on it as they are, so the plan of a study counts the same texts, cells and records as the study. What
a reader would say is not known: it is taken to be sure of whatever answer is forced, so drafts are never rejected.
FLOPs: 2 a weight and token, 4 x heads x d_head a pair of a query and a key it sees, prefix included; the unembedding of
every position read; a backward pass counts as a forward. Activations are zeros that take no memory.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import CotfaithError
from ..model import Branch, CachedRun, DirectPath, Ids, Readout, Reduce, Then
from ..sites import ActivationEdit, Site
from .huggingface import HuggingFaceModel
from .hybrid import Hybrid
from .weights import Weights, locate

PLACEHOLDER = " So far there are 12 + 3 = 15 of them."
"""Stands for a step that is yet to be written."""
_TEXT_SIDE = ["*.json", "*.model", "*.txt", "*.jinja"]


@dataclass
class Tally:
    """What was asked of a reader: rows of passes by kind, FLOPs, tokens written one by one (in batches, each of which
    reads all weights once), the longest text, and the most tokens of base runs held at once."""

    rows: Counter[str] = field(default_factory=Counter)
    flops: float = 0.0
    decoded: int = 0
    longest: int = 0
    held: int = 0
    most_held: int = 0

    def hold(self, tokens: int) -> None:
        self.held += tokens
        self.most_held = max(self.most_held, self.held)


class CountedModel(HuggingFaceModel):
    """See the module's text. `device` is where the real reader would be."""

    def __init__(self, weights: Weights, device: str) -> None:
        super().__init__(weights)
        self.info = replace(self.info, device=device)
        self.tally = Tally()
        modules = self.layout.layers[0].layer
        self._a_token = 2 * sum(p.numel() for p in modules.parameters() if p.ndim == 2)
        self._a_pair = 4 * self.info.n_heads * self.info.d_head
        self._a_logit = 2 * self.info.vocab * self.info.d_model
        self.n_parameters = sum(p.numel() for p in weights.model.parameters())

    def count_pass(self, start: int, end: int, n_layers: int | None = None, n_logits: int = 0) -> None:
        """One row of the tokens from `start` to `end` - 1 through `n_layers` layers (None: all)."""
        layers = self.info.n_layers if n_layers is None else n_layers
        pairs = (end * (end + 1) - start * (start + 1)) // 2
        self.tally.flops += layers * ((end - start) * self._a_token + pairs * self._a_pair) + n_logits * self._a_logit
        self.tally.longest = max(self.tally.longest, end)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(()).expand(shape)

    def cached_run(self, tokens: Sequence[int]) -> CachedRun:
        return CountedRun(self, tuple(tokens), 0)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        begun: Sequence[str] | None = None,
        max_new_tokens: int,
        temperature: float = 0.0,
        seeds: Sequence[int] = (),
    ) -> list[str]:
        """As many placeholders as `max_new_tokens` hold: no reader writes more."""
        starts = [""] * len(prompts) if begun is None else begun
        for prompt, start in zip(prompts, starts, strict=True):
            n = self.count(prompt + start)
            self.count_pass(0, n + max_new_tokens, n_logits=max_new_tokens)
        self.tally.rows["texts written"] += len(prompts)
        self.tally.decoded += max_new_tokens if prompts else 0
        return [PLACEHOLDER * max(1, max_new_tokens // self.count(PLACEHOLDER))] * len(prompts)

    def direct_path(
        self, z: Float[Tensor, "layer head d_head"], final: Float[Tensor, "d_model"], token: int, foil: int
    ) -> DirectPath:
        return DirectPath(torch.zeros_like(z), self.zeros(len(z)), torch.zeros_like(final))

    def written_norm(self, layer: int, v: Float[Tensor, "*key head d_head"]) -> Float[Tensor, "*key head"]:
        return self.zeros(*v.shape[:-1])

    def lens(self, resid: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any vocab"]:
        self.tally.flops += resid[..., 0].numel() * self._a_logit
        return self.zeros(*resid.shape[:-1], self.info.vocab)


class CountedRun:
    """A CachedRun of zeros that shares its first `shared` tokens with one already made."""

    accelerated = True

    def __init__(self, model: CountedModel, tokens: Ids, shared: int) -> None:
        self.model, self.tokens = model, tokens
        model.tally.rows["base runs"] += 1
        model.count_pass(shared, len(tokens), n_logits=1)
        model.tally.hold(len(tokens))

    def __del__(self) -> None:
        self.model.tally.hold(-len(self.tokens))

    def logits(self, n_logits: int) -> Float[Tensor, "read vocab"]:
        return self.model.zeros(n_logits, self.model.info.vocab)

    def read(self, sites: Sequence[Site], first: int = 0) -> Mapping[Site, Float[Tensor, "pos *width"]]:
        if any(site.kind not in ("resid_pre", "resid_post", "v") for site in sites):
            self.model.count_pass(first, len(self.tokens), n_logits=1)
        return {site: self._state(site, first) for site in sites}

    def _state(self, site: Site, first: int) -> Tensor:
        info, n = self.model.info, len(self.tokens) - first
        if site.kind == "pattern":
            return self.model.zeros(info.n_heads, n, len(self.tokens))
        if site.kind in ("z", "q", "k", "v"):
            return self.model.zeros(n, info.n_heads if site.kind in ("z", "q") else info.n_kv_heads, info.d_head)
        return self.model.zeros(n, info.d_model)

    def sibling(self, tokens: Sequence[int]) -> CachedRun:
        return CountedRun(self.model, tuple(tokens), _shared(self.tokens, tuple(tokens)))

    def spliced(self, donor: CachedRun, first: int, end: int) -> CachedRun:
        tokens = (*self.tokens[:first], *donor.tokens[first:end], *self.tokens[end:])
        return CountedRun(self.model, tokens, end)

    def edited(
        self, cells: Sequence[Sequence[ActivationEdit]], *, n_logits: int, reduce: Reduce
    ) -> Float[Tensor, "cell metric"]:
        for cell in cells:
            start, layer = min(p for e in cell for p in e.positions), min(e.site.layer for e in cell)
            self.model.count_pass(start, len(self.tokens), self.model.info.n_layers - layer, n_logits)
        self.model.tally.rows["patched or cut cells"] += len(cells)
        return reduce(self.logits(n_logits)[None]).expand(len(cells), -1)

    def heads_within(
        self, layer: int, cells: Sequence[Sequence[ActivationEdit]]
    ) -> Float[Tensor, "cell pos head d_head"]:
        for _ in cells:
            self.model.count_pass(0, len(self.tokens), 1)
        return self.model.zeros(len(cells), *self._state(Site("z", layer), 0).shape)

    def head_gradients(
        self, position: int, layers: Sequence[int], scales: Sequence[float], readout: Readout
    ) -> tuple[Float[Tensor, "layer scale head d_head"], Float[Tensor, "layer scale"]]:
        info, rows = self.model.info, len(layers) * len(scales)
        for layer in layers:
            for _ in range(2 * len(scales)):
                self.model.count_pass(position, position + 1, info.n_layers - layer, 1)
        self.model.tally.rows["gradient passes"] += rows
        return (
            self.model.zeros(len(layers), len(scales), info.n_heads, info.d_head),
            self.model.zeros(len(layers), len(scales)),
        )

    def site_gradients(
        self, sites: Sequence[Site], readout: Readout, *, n_logits: int, dropped: Sequence[int | None] = (None,)
    ) -> Iterator[Mapping[Site, Float[Tensor, "pos head d_head"]]]:
        self.model.count_pass(0, len(self.tokens), n_logits=n_logits)
        for _ in dropped:
            self.model.count_pass(0, len(self.tokens), n_logits=n_logits)
            self.model.tally.rows["gradient passes"] += 1
            yield {site: self._state(site, 0) for site in sites}

    def branches(
        self, branches: Sequence[Branch], *, reduce: Callable[[Tensor, int], Tensor], then: Then | None = None
    ) -> list[Tensor]:
        """Every distinct prefix counts once, as the engine computes it; of what variants go on with, what is new."""
        self.model.tally.rows["edited texts"] += len(branches)
        before = self.tokens
        for branch in sorted(branches, key=lambda branch: branch.tokens):
            known = max(_shared(before, branch.tokens), _shared(self.tokens, branch.tokens))
            self.model.count_pass(known, len(branch.tokens), n_logits=branch.n_logits)
            before = branch.tokens
        for index, branch in enumerate(branches):
            following: Branch | None = branch
            while then and following is not None:
                following = then(index, self._agreeing(following))
                if following is not None:
                    new = following.n_logits
                    self.model.count_pass(len(following.tokens) - new, len(following.tokens), n_logits=new)
        return [reduce(self.logits(branch.n_logits), index) for index, branch in enumerate(branches)]

    def _agreeing(self, branch: Branch) -> Ids:
        """The likeliest token after each position read: what the branch has there, and at its end nothing more."""
        stop = min(self.model.stop_tokens)
        return (*branch.tokens[len(branch.tokens) - branch.n_logits + 1 :], stop)


def _shared(one: Ids, other: Ids) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def load_counted(name: str, adapter: str | None, dtype: str, device: str, weights_hash: str) -> CountedModel:
    """Tokenizer and config of the model `name`, and that its adapter is there; of the hub's files nothing else is
    downloaded, and nothing kept. Raises what `load` raises for names that do not exist."""
    import transformers

    name, plus, within = name.partition("+")
    if plus and adapter:
        raise CotfaithError(f"{name!r} names an adapter already, and adapter={adapter!r} was given too; drop one.")
    adapter = within or adapter
    with tempfile.TemporaryDirectory() as scratch:
        if adapter is not None and not (_folder(adapter, scratch) / "adapter_config.json").exists():
            raise CotfaithError(f"{adapter!r} holds no adapter_config.json; give a folder saved by peft.")
        folder = _folder(name, scratch)
        if not (folder / "config.json").exists():
            raise CotfaithError(f"{name!r} holds no config.json; give a folder saved by save_pretrained or a hub id.")
        config = transformers.AutoConfig.from_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return CountedModel(Weights(name, model.eval(), tokenizer, weights_hash, adapter), device)


def _folder(name: str, scratch: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    if Path(name).is_dir() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        return locate(name)
    with suppress(errors.LocalEntryNotFoundError):
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_TEXT_SIDE, local_files_only=True))
    with suppress(OSError, errors.HfHubHTTPError, errors.HFValidationError):
        place = Path(scratch) / name.replace("/", "--")
        huggingface_hub.snapshot_download(name, allow_patterns=_TEXT_SIDE, local_dir=place, etag_timeout=5)
        return place
    return locate(name)


class CountedHybrid(Hybrid):
    """A hybrid of models without weights: whatever layer is exchanged, the same is computed."""

    def __init__(self, model: CountedModel) -> None:
        self.model = model

    @contextmanager
    def with_layer(self, layer: int) -> Iterator[HuggingFaceModel]:
        yield self.model
