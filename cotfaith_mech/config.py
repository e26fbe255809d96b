"""A whole study as one YAML file; an unknown key is an error that names the nearest one."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import CotfaithError
from .patching import Direction, PatchPlan, Source
from .sites import SiteKind
from .variants import Battery, BehaviourPlan, Test

PRIMARY = (
    "same_answer_no_chain",
    "conflict/record_agree/p_chain",
    "conflict/record_agree/p_question",
    "conflict/record_agree/p_other",
    "knockout/true_step/delta_p",
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ReaderConfig(_Strict):
    """A model that reads chains: hub id, local folder, or `name+adapter`; `tests` instead of the study's, if given.

    With an `endpoint` (base URL of an OpenAI-compatible server) `model` is its name there and text is all it shows; the
    key is in the environment variable `api_key_env`, and `samples` replies are drawn where it gives no probabilities
    (`check_sampling`: after a look whether it samples at all).
    """

    name: str = Field(min_length=1)
    model: str
    adapter: str | None = None
    backend: Literal["huggingface", "transformer_lens", "nnsight"] = "huggingface"
    mechanism: bool = True
    tests: tuple[Test, ...] | None = None
    endpoint: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = Field(default=8, ge=1)
    samples: int = Field(default=20, ge=2)
    check_sampling: bool = True

    @model_validator(mode="after")
    def _shows_text_alone(self) -> ReaderConfig:
        if self.endpoint and (self.mechanism or self.adapter):
            raise ValueError(
                f"{self.name!r} is an endpoint, which shows text alone, but patching, attribution and adapters need a "
                "model in this process; set mechanism: false, drop the adapter, and use `cotfaith test`"
            )
        return self


class GenerationConfig(_Strict):
    """How chains are written: tokens at most, temperature (0 is greedy), worked examples shown before each question."""

    max_new_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    few_shot: int = Field(default=0, ge=0)


class StudyConfig(_Strict):
    """A whole study. The first reader is the base that the others are compared with.

    `keep_on_cpu`: what base runs keep lies on the CPU while passes run on the device, for long chains on a small GPU.
    """

    readers: tuple[ReaderConfig, ...] = Field(min_length=1)
    problems: str
    limit: int | None = None
    template: str | None = None
    chains: Literal["supplied", "generate"] = "supplied"
    generation: GenerationConfig = GenerationConfig()
    paraphraser: Literal["rules", "supplied"] | ReaderConfig = "rules"
    tests: tuple[Test, ...] = BehaviourPlan().tests
    battery: Battery = "core"
    draws: int = Field(5, ge=1)
    continue_tokens: int = Field(0, ge=0)
    equal_length: bool = False
    min_label_mass: float = Field(0.5, ge=0, le=1)
    patch_layers: Annotated[tuple[int, ...], Field(min_length=1)] | None = None
    patch_directions: tuple[Direction, ...] = ("noise", "denoise")
    patch_sites: Annotated[tuple[SiteKind, ...], Field(min_length=1)] = ("resid_pre",)
    patch_parts: Annotated[tuple[str, ...], Field(min_length=1)] = ("step",)
    patch_sources: Annotated[tuple[Source, ...], Field(min_length=1)] | None = None
    patch_by_head: bool = False
    patch_window: int = Field(1, ge=1)
    attribution: bool = True
    cross_model: bool = False
    crosscheck_cells: int = Field(4, ge=0)
    primary: tuple[str, ...] = PRIMARY
    seed: int = 0
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    keep_on_cpu: bool = False

    @property
    def patches(self) -> PatchPlan:
        return PatchPlan(
            self.patch_layers,
            self.patch_directions,
            self.patch_sites,
            self.patch_parts,
            self.patch_sources,
            self.patch_by_head,
            self.patch_window,
        )

    @model_validator(mode="after")
    def _patches_exist(self) -> StudyConfig:
        try:
            _ = self.patches
        except CotfaithError as error:
            raise ValueError(str(error).rstrip(".")) from error
        return self

    @model_validator(mode="after")
    def _readers_differ(self) -> StudyConfig:
        names = [reader.name for reader in self.readers]
        if len(set(names)) < len(names):
            raise ValueError(f"two readers are named {max(names, key=names.count)!r}; give each its own name")
        if self.cross_model and not (self.readers[0].mechanism and any(one.mechanism for one in self.readers[1:])):
            raise ValueError(
                "cross_model compares the first reader with others, all with mechanism: true; give two such"
            )
        return self


def load_config(path: str | Path) -> StudyConfig:
    """Read a YAML study; an unknown key is an error that names the nearest one."""
    try:
        data = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise CotfaithError(f"Cannot read the study {str(path)!r}: {error}.") from error
    if not isinstance(data, dict):
        raise CotfaithError(f"{str(path)!r} holds no mapping of keys; begin with 'readers:' and 'problems:'.")
    return parse_config(data)


def parse_config(data: dict[str, Any]) -> StudyConfig:
    try:
        return StudyConfig.model_validate(data)
    except ValidationError as error:
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        where = ".".join(str(part) for part in first["loc"])
        known = [name for part in (StudyConfig, ReaderConfig, GenerationConfig) for name in part.model_fields]
        near = difflib.get_close_matches(where.rpartition(".")[2], known, 1)
        hint = f"; did you mean {near[0]!r}?" if first["type"] == "extra_forbidden" and near else ""
        raise CotfaithError(
            f"Study{f' key {where!r}' if where else ''}: {first['msg'].removeprefix('Value error, ')}{hint}."
        ) from error
