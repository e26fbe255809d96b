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

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from finetune import CARD, Recipe, make, question, recipes, training_problems

from cotfaith_mech.conclude import estimate, silent
from cotfaith_mech.config import StudyConfig, parse_config
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
        part = part | {"authors": part["authors"][:1]}
    labels = {"condition": recipe.condition, "training_seed": recipe.seed}
    primary = [text.partition("@")[0] for text in config["primary"]]
    return parse_config({"readers": [base, tuned], "labels": labels, "primary": primary, **part})


def by_layers(config: dict[str, Any], recipe: Recipe) -> bool:
    """Whether layers are exchanged one by one, which takes half an hour a pair on two cores."""
    return recipe.condition in config["layers"]["conditions"] and recipe.seed <= config["layers"]["seeds"]


def assert_apart(config: dict[str, Any], recipe: Recipe) -> None:
    """No question that is trained on is studied; raises CotfaithError otherwise."""
    if recipe.random_like:
        return
    studies = (config["study"], config["copy"], config["layers"]["study"])
    asked = {
        problem.question.split(" (Record")[0]
        for study in studies
        for problem in read_problems(study["problems"], study.get("limit"), study.get("seed", 0))[0]
    }
    shared = asked & {question(recipe, problem).split(" (Record")[0] for problem in training_problems(recipe)}
    if shared:
        raise CotfaithError(f"{recipe.name} would be trained on a question of the study: {min(shared)!r}.")


def share_base(done: RunDirectory, new: RunDirectory, authors: tuple[str, ...]) -> None:
    """Give `new` what the base did in `done`: its chains, and its units on chains that are not the other reader's."""
    rows = [row for row in done.read_chains() if row["author"] in authors and row["author"] != TUNED]
    known = {row["chain_id"] for row in rows}
    if not (new.path / "chains.jsonl").exists():
        new.write_chains(rows)
        for row in done.read_exclusions():
            if row["reader"] == BASE and (row["chain_id"] in known or row["stage"] == "chain"):
                new.add_exclusion(**row)
    (new.path / "records").mkdir(exist_ok=True)
    pinned = done.read_manifest()["pinned"]
    new.pin(f"reader {BASE}", pinned[f"reader {BASE}"])
    for meta in done.read_unit_meta():
        source = done.path / "records" / f"{meta['unit']}.parquet"
        if meta["reader"] == BASE and meta["chain_id"] in known and not (new.path / "records" / source.name).exists():
            shutil.copyfile(source, new.path / "records" / f"{source.name}.tmp")
            (new.path / "records" / f"{source.name}.tmp").rename(new.path / "records" / source.name)


def studied(config: StudyConfig, folder: Path) -> RunDirectory:
    """The run of `config` in `folder`, whole, with estimates; `cotfaith report` makes its figures and page."""
    plain = config.model_dump(mode="json")
    finished = [RunDirectory(path.parent) for path in sorted(folder.parent.glob("*/estimates.parquet"))]
    alike = [run for run in finished if _of_base(run.read_manifest()["config"]) == _of_base(plain)]
    if alike and not (folder / "estimates.parquet").exists():
        share_base(alike[0], RunDirectory.create(folder, plain), config.all_authors)
    run = measure_study(config, folder, silent)
    estimate(run)
    return run


def _of_base(config: dict[str, Any]) -> dict[str, Any]:
    """What of a study's config the base's units rest on."""
    apart = ("readers", "authors", "labels", "primary")
    return {name: value for name, value in config.items() if name not in apart} | {"base": config["readers"][0]}


def is_kept(recipe: Recipe, config: StudyConfig, folder: Path) -> bool:
    """Whether `folder` keeps this pair; CotfaithError where what it keeps was trained or studied otherwise."""
    if not (folder / CARD).exists():
        return False
    kept, wanted = RunDirectory(folder).read_manifest()["config"], config.model_dump(mode="json")
    apart = {"adapter": None}
    for one in (kept, wanted):
        one["readers"] = [reader | apart for reader in one["readers"]]
    trained, asked = json.loads((folder / CARD).read_text())["recipe"], recipe.model_dump()
    for what, old, new in (("trained", trained, asked), ("studied", kept, wanted)):
        differing = [key for key, value in new.items() if old.get(key) != value]
        if differing:
            raise CotfaithError(
                f"{folder} was {what} with {differing[0]}: {old.get(differing[0])!r}, not {new[differing[0]]!r}; "
                "delete it, or give another --keep."
            )
    return True


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
            study = pair_config(config, recipe, out / "adapters" / recipe.name, kind)
            if keep is not None and is_kept(recipe, study, keep / kind / recipe.name):
                continue
            adapter = make(recipe, out / "adapters")
            print(f"{kind} {recipe.name}", flush=True)
            done = studied(study, folder)
            if keep is not None:
                done.compacted(keep / kind / recipe.name, without=LEFT_OUT)
                shutil.copyfile(adapter / CARD, keep / kind / recipe.name / CARD)


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
