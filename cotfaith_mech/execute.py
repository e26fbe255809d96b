"""A study run or planned as the command line asks: bars or none, and what is printed in the end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .interrupts import resumable
from .progress import shown

if TYPE_CHECKING:
    from .config import StudyConfig


def execute(
    config: StudyConfig,
    out: Path,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
    shard: tuple[int, int] | None = None,
    crew: Mapping[str, Any] | None = None,
) -> None:
    """Run `config` in the run directory `out`, or with `dry_run` print what that would take; a shard of it, or with a
    `crew` (scale.Crew) on a Ray cluster."""
    if dry_run:
        show_plan(config, out, quiet, as_json)
        return
    with shown(quiet or as_json) as progress, resumable(out):
        if crew is not None:
            from .scale import Crew, run_study_on_ray

            run = run_study_on_ray(config, out, Crew(**crew), progress)
        else:
            from .study import run_study

            run = run_study(config, out, progress, shard)
    if shard is not None:
        told = {"run": str(run.path), "shard": shard[0] + 1, "of": shard[1], "units": run.n_units()}
        typer.echo(json.dumps(told) if as_json else _told_of_shard(told, quiet))
        return
    if as_json:
        manifest = run.read_manifest()
        summary = {key: manifest.get(key) for key in ("counts", "checks", "conclusion", "timings")}
        estimates = [vars(estimate) for estimate in run.read_estimates()]
        typer.echo(json.dumps({"run": str(run.path), **summary, "estimates": estimates}, default=str))
    elif quiet:
        typer.echo(run.path / "report.html")
    else:
        from rich.console import Console

        from .summary import print_summary

        print_summary(Console(), run)


def _told_of_shard(told: Mapping[str, Any], quiet: bool) -> str:
    if quiet:
        return told["run"]
    return (
        f"Shard {told['shard']} of {told['of']} is measured; {told['run']} holds {told['units']} units. When all are "
        "done, the same command without --shard concludes."
    )


def show_plan(config: StudyConfig, out: Path, quiet: bool, as_json: bool, *, measure: bool = True) -> None:
    """Print what `config` would take in `out`; without `measure` chains alone are written."""
    from .plan import plan_study

    with shown(quiet or as_json) as progress:
        plan = plan_study(config, out, measure=measure, progress=progress)
    if as_json:
        typer.echo(json.dumps(asdict(plan)))
    elif quiet:
        to_do = sum(part.units - part.finished for part in plan.parts)
        typer.echo(f"{to_do} units to do, {plan.seconds:.0f} s, {plan.memory_gb:.1f} GB")
    else:
        from rich.console import Console

        from .summary import print_plan

        print_plan(Console(), plan)
