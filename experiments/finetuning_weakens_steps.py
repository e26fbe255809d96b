"""Does fine-tuning weaken how reasoning steps influence answers? From training to figure:

    python experiments/finetuning_weakens_steps.py run experiments/finetuning_smollm2.yaml \\
        --keep experiments/results/finetuning_smollm2
    python experiments/finetuning_weakens_steps.py draw experiments/finetuning_smollm2.yaml \\
        experiments/results/finetuning_smollm2 --readme README.md

`run` trains each condition and seed (finetune.py) and studies it against the base: all behavioural tests on the
problems' own chains, the base's and its own; knockout, patching, attribution, mediation, write x read on the first; a
copy test; for `layers` conditions cross-model patching layer by layer. What is done is not done again, so a killed run
goes on; finished pairs are kept, compacted, under --keep. `draw` needs no model: merged estimates, figures, and the
README's section, from what was kept.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from finetune import Recipe, make, recipes

from cotfaith_mech.conclude import estimate, silent
from cotfaith_mech.config import SUPPLIED, StudyConfig, parse_config
from cotfaith_mech.datasets_io import read_problems
from cotfaith_mech.errors import CotfaithError
from cotfaith_mech.records import RunDirectory
from cotfaith_mech.study import measure_study

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)
BASE, TUNED = "base", "tuned"
KINDS = ("runs", "copy", "layers")
LEFT_OUT = ("attribution",)
"""Measures that are not kept: a number a head, layer and step, nine tenths of all; their estimates are."""


def pair_config(config: dict[str, Any], recipe: Recipe, adapter: Path, kind: str) -> StudyConfig:
    """The study of one fine-tune against the base: `runs`, `copy` or `layers`."""
    part = {"runs": config["study"], "copy": config["copy"], "layers": config["layers"]["study"]}[kind]
    inside = {"mechanism": kind != "copy"}
    base = {"name": BASE, "model": recipe.model, "adapter": recipe.start} | inside
    tuned = {"name": TUNED, "model": recipe.model, "adapter": str(adapter)} | inside
    if kind == "runs" and recipe.condition not in config["arms"]:
        part = part | {"authors": [SUPPLIED]}
    labels = {"condition": recipe.condition, "training_seed": recipe.seed}
    primary = [text.partition("@")[0] for text in config["primary"]]
    return parse_config({"readers": [base, tuned], "labels": labels, "primary": primary, **part})


def by_layers(config: dict[str, Any], recipe: Recipe) -> bool:
    """Whether layers are exchanged one by one, which takes half an hour a pair on two cores."""
    return recipe.condition in config["layers"]["conditions"] and recipe.seed <= config["layers"]["seeds"]


def assert_apart(config: dict[str, Any], recipe: Recipe) -> None:
    """No question that is trained on is studied; raises CotfaithError otherwise."""
    from finetune import question, training_problems

    if recipe.random_like:
        return
    asked = {problem.question for problem in read_problems(config["study"]["problems"], None, 0)[0]}
    asked |= {text.split(" (Record")[0] for text in asked}
    shared = asked & {question(recipe, problem).split(" (Record")[0] for problem in training_problems(recipe)}
    if shared:
        raise CotfaithError(f"{recipe.name} would be trained on a question of the study: {min(shared)!r}.")


def share_base(done: RunDirectory, new: RunDirectory, authors: tuple[str, ...]) -> None:
    """Give `new` what the base did in `done`: its chains, and its units on chains that are not the other reader's."""
    rows = [row for row in done.read_chains() if row["author"] in authors and row["author"] != TUNED]
    if not (new.path / "chains.jsonl").exists():
        new.write_chains(rows)
        for row in done.read_exclusions():
            if row["reader"] == BASE:
                new.add_exclusion(**row)
    known = {row["chain_id"] for row in rows}
    (new.path / "records").mkdir(exist_ok=True)
    for meta in done.read_unit_meta():
        source = done.path / "records" / f"{meta['unit']}.parquet"
        if meta["reader"] == BASE and meta["chain_id"] in known and not (new.path / "records" / source.name).exists():
            shutil.copyfile(source, new.path / "records" / f"{source.name}.tmp")
            (new.path / "records" / f"{source.name}.tmp").rename(new.path / "records" / source.name)


def studied(config: StudyConfig, folder: Path) -> RunDirectory:
    """The run of `config` in `folder`, whole, with estimates; `cotfaith report` makes its figures and page."""
    finished = sorted(folder.parent.glob("*/estimates.parquet"))
    if finished and not (folder / "estimates.parquet").exists():
        new = RunDirectory.create(folder, config.model_dump(mode="json"))
        share_base(RunDirectory(finished[0].parent), new, config.all_authors)
    run = measure_study(config, folder, silent)
    estimate(run)
    return run


@app.command()
def run(
    config_file: Annotated[Path, typer.Argument(help="YAML: training, conditions, study, copy, layers, primary.")],
    out: Annotated[Path, typer.Option(help="Adapters and run directories.")] = Path("runs/finetuning"),
    keep: Annotated[Path | None, typer.Option(help="Also keep each finished pair here, compacted.")] = None,
    only: Annotated[str | None, typer.Option(help="One condition.")] = None,
    seed: Annotated[int | None, typer.Option(help="One training seed.")] = None,
) -> None:
    """Train and study every condition and seed that is not done yet."""
    config = yaml.safe_load(config_file.read_text())
    for recipe in recipes(config):
        if seed not in (None, recipe.seed) or only not in (None, recipe.condition):
            continue
        assert_apart(config, recipe)
        for kind in KINDS:
            if kind == "layers" and not by_layers(config, recipe):
                continue
            folder = out / kind / recipe.name
            if keep is not None and (keep / kind / recipe.name / "training_card.json").exists():
                continue
            adapter = make(recipe, out / "adapters")
            print(f"{kind} {recipe.name}", flush=True)
            done = studied(pair_config(config, recipe, adapter, kind), folder)
            if keep is not None:
                done.compacted(keep / kind / recipe.name, without=LEFT_OUT)
                shutil.copyfile(adapter / "training_card.json", keep / kind / recipe.name / "training_card.json")


@app.command()
def draw(
    config_file: Annotated[Path, typer.Argument(help="The study's YAML.")],
    kept: Annotated[Path, typer.Argument(help="What `run --keep` wrote.")],
    readme: Annotated[Path | None, typer.Option(help="Also put the section between its marks in this file.")] = None,
) -> None:
    """Merged estimates, figures and the README's section, without a model."""
    from finetuning_results import draw as draw_results

    for path in draw_results(kept, config_file, readme):
        print(path)


if __name__ == "__main__":
    app()
