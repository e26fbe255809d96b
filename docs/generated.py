"""What the site takes from the package, so that it cannot drift: commands, study keys, public names, certificate.

A page holds a mark such as `<!-- commands -->`, which is replaced when the site is built.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

import cotfaith_mech
from cotfaith_mech.certificate import in_words, shipped
from cotfaith_mech.config import GenerationConfig, ReaderConfig, StudyConfig
from cotfaith_mech.records import UNITS


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs calls this with the text of every page."""
    return re.sub(r"^<!-- (\w+) -->$", lambda mark: GENERATORS[mark[1]](), markdown, flags=re.MULTILINE)


def commands() -> str:
    """Every command with its options, as Typer itself writes them."""
    module = [sys.executable, "-m", "typer", "cotfaith_mech.cli", "utils", "docs", "--name", "cotfaith"]
    written = subprocess.run(module, capture_output=True, text=True, check=True).stdout
    written = re.sub(r"\*\*Commands\*\*:.*?(?=\n## )", "", written.partition("\n")[2], flags=re.DOTALL)
    return re.sub(r"^\x08\n((?:.+\n)+)", r"```text\n\1```\n", written, flags=re.MULTILINE)


def study() -> str:
    """The keys of a study file; what each means stands in study_keys.yaml, which must name them all and no others."""
    meanings = yaml.safe_load((Path(__file__).parent / "study_keys.yaml").read_text())
    return "\n\n".join(
        _keys(model, meanings[model.__name__]) for model in (StudyConfig, ReaderConfig, GenerationConfig)
    )


def _keys(model: Any, meanings: dict[str, str]) -> str:
    if unlike := set(model.model_fields) ^ set(meanings):
        raise KeyError(f"docs/study_keys.yaml and {model.__name__} differ in: {', '.join(sorted(unlike))}")
    properties = model.model_json_schema()["properties"]
    lines = [f"## {TITLES[model.__name__]}", "", "| key | meaning | takes | default |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        default = "**required**" if field.is_required() else f"`{_shown(field.default)}`"
        takes = " or ".join(dict.fromkeys(_takes(properties[name]))).replace("|", "\\|")
        lines.append(f"| `{name}` | {meanings[name]} | {takes} | {default} |")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, GenerationConfig):
        return "{}"
    return value if isinstance(value, str) else json.dumps(value)


def _takes(schema: dict[str, Any]) -> Iterator[str]:
    """What a key takes, in words, from its JSON schema."""
    if options := schema.get("anyOf"):
        for option in options:
            yield from _takes(option)
    elif "$ref" in schema:
        yield REFERENCES[schema["$ref"].rpartition("/")[2]]
    elif "enum" in schema:
        yield ", ".join(f"`{value}`" for value in schema["enum"])
    elif "const" in schema:
        yield f"`{schema['const']}`"
    elif schema.get("type") == "array":
        inner = " or ".join(dict.fromkeys(_takes(schema["items"])))
        yield f"a list of {PLURALS.get(inner, inner)}"
    else:
        bounds = {"minimum": "at least ", "maximum": "at most ", "exclusiveMinimum": "above "}
        limits = ", ".join(f"{words}{schema[key]:g}" for key, words in bounds.items() if key in schema)
        yield KINDS[schema["type"]] + (f", {limits}" if limits else "")


def names() -> str:
    """A block of mkdocstrings for each public name."""
    return "\n\n".join(f"::: cotfaith_mech.{name}" for name in cotfaith_mech.__all__)


def units() -> str:
    """The unit of every metric."""
    by_unit: dict[str, list[str]] = {}
    for metric, unit in UNITS.items():
        by_unit.setdefault(unit, []).append(f"`{metric}`")
    rows = [f"| {unit} | {', '.join(metrics)} |" for unit, metrics in by_unit.items()]
    return "\n".join(["| unit | metrics |", "|---|---|", *rows])


def certificate() -> str:
    """What the shipped certificate says: in a sentence, then the measured value of each score of the mixtures."""
    known = shipped()
    assert known is not None
    mixtures = {f"mix_{p:03d}": p / 100 for p in (0, 25, 50, 75, 100)}
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for check in known["checks"]:
        organism, _, score = check["check"].partition(": ")
        numbers = re.search(r"measured (\S+), truth (\S+)", check["note"])
        if organism in mixtures and numbers:
            found.setdefault(score, {})[organism] = numbers[1].rstrip(","), numbers[2].rstrip(",")
    lines = [in_words(known), "", "| score | " + " | ".join(f"p = {p:g}" for p in mixtures.values()) + " |"]
    lines.append("|---" * (len(mixtures) + 1) + "|")
    for score, row in found.items():
        cells = ["{} ({})".format(*row[name]) if name in row else "–" for name in mixtures]
        lines.append(f"| `{score}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def throughput_assumed() -> str:
    """What the model of throughput rests on."""
    rows = [(f"`{name}`", f"{one['value']:g}", one["from"]) for name, one in _throughput()["assumed"].items()]
    return _table(("what", "value", "from"), rows)


def throughput_units() -> str:
    """Counts and seconds of each measure of one unit, and of the unit."""
    known, rows = _throughput(), []
    for unit in known["units"]:
        place = f"{unit['steps']} steps, {unit['tokens']} tokens"
        for name, one in unit["measures"].items():
            work = (f"{one['layer_calls']:,}", f"{one['token_layers']:,}", f"{one['tflop']:.2f}")
            plan, texts = f"{one['tflop_of_the_plan']:.2f}", f"{one['texts_and_records_s']:.2f}"
            rows.append((place, name, *work, plan, texts, *(f"{one[key]:.2f}" for key in unit["unit"])))
        whole = (f"**{seconds:.2f}**" for seconds in unit["unit"].values())
        rows.append((place, f"**a unit** (the first {len(known['core'])}, written)", "", "", "", "", "", *whole))
    shares = (key.replace("s_at_", "s at ") for key in known["cluster"])
    head = ("chain", "measure", "layer calls", "token-layers", "TFLOP", "plan, TFLOP", "texts and records, s", *shares)
    return _table(head, rows)


def throughput_cluster() -> str:
    """Units an hour on each number of GPUs."""
    low, high = _throughput()["cluster"].values()
    rows = [
        (
            f"{one['units']:,}",
            str(one["gpus"]),
            f"{one['loading_s']:g}",
            *(f"{some['measuring_h'] * 60:.1f}" for some in (one, two)),
            *(f"{some['units_an_hour']:,}" for some in (one, two)),
            f"{one['idle_in_the_last_round']:.1%}",
            *(f"{some['files_a_second']:g}" for some in (one, two)),
        )
        for one, two in zip(low, high, strict=True)
    ]
    twice = [
        f"{name}, {share}" for name in ("minutes", "units an hour", "files a second") for share in ("20 %", "40 %")
    ]
    return _table(("units", "GPUs", "loading, s", *twice[:4], "idle in the last round", *twice[4:]), rows)


def throughput_ends() -> str:
    """At how many GPUs the driver has no time left."""
    known = _throughput()
    full = " and ".join(f"{gpus:,} GPUs at {key[5:]}" for key, gpus in known["driver_is_full_at_gpus"].items())
    a_unit = known["assumed"]["driver_s_a_unit"]["value"] * 1e3
    return f"- **The driver.** At {a_unit:g} ms a unit it is full with {full}; shards (`--shard i/n`) have no driver."


def throughput_validation() -> str:
    """The model at this machine's rates beside what was measured."""
    found = _throughput()["validation"]
    said = (
        f"{found['model']}, {found['threads']} thread, CPU seconds, medians of {found['rounds']}, at rates measured in "
        f"the same run: products {found['flops'] / 1e9:.0f} GFLOP/s, weights {found['bytes_s'] / 1e9:.1f} GB/s, "
        f"{found['host_s_a_layer'] * 1e3:.2f} ms of the host a layer."
    )
    core = [row for row in found["measures"] if row["measure"] in _throughput()["core"]]
    off = sum(row["measured_s"] for row in core) / sum(row["modelled_s"] for row in core)
    keys = ("steps", "tokens", "measure", "modelled_s", "measured_s", "ratio")
    rows = [tuple(str(row[key]) for key in keys) for row in found["measures"]]
    table = _table([key.replace("_s", ", s") for key in keys], rows)
    return f"{said}\n\n{table}\n\nWhat a study measures by default took {off:.2f} times what the model says."


def _throughput() -> dict[str, Any]:
    return json.loads((Path(__file__).parent.parent / "experiments" / "results" / "throughput.json").read_text())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


TITLES = {"StudyConfig": "The study", "ReaderConfig": "A reader", "GenerationConfig": "`generation`"}
KINDS = {
    "string": "text",
    "integer": "a number",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
    "object": "names and values",
}
REFERENCES = {"ReaderConfig": "[a reader](#a-reader)", "GenerationConfig": "[these keys](#generation)"}
PLURALS = {"text": "texts", "a number": "numbers", "[a reader](#a-reader)": "[readers](#a-reader)"}
GENERATORS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "study": study,
    "names": names,
    "units": units,
    "certificate": certificate,
    "throughput_assumed": throughput_assumed,
    "throughput_units": throughput_units,
    "throughput_cluster": throughput_cluster,
    "throughput_ends": throughput_ends,
    "throughput_validation": throughput_validation,
}
