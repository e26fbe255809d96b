"""RUN/report.html from a run directory: one page, no network, no model.

1. Tables and charts come from views.py and charts.py; texts reach the page through jinja2 with autoescape, or inside
   one JSON block whose markup characters are escaped, and the page's script only ever sets them as text.
2. A content security policy admits exactly the two scripts of the page, by their hashes: whatever slips into the
   text can neither run nor load anything.
3. The text comes before the scripts, so it is on the screen before plotly.js is read.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.offline
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .. import views
from ..certificate import doubts, in_words, shipped
from ..compare import holm_p
from ..metrics import CELLS
from ..outcomes import Table
from ..records import RunDirectory
from ..stats import Estimate
from . import charts

HERE = Path(__file__).parent
VARIANT_WORDS = {
    "denoise": "denoising: the true chain's activations put into the run on altered numbers; blue restores the answer",
    "noise": "noising: altered numbers' activations put into the run on the true chain; red takes the answer away",
}
TEST_WORDS = {
    "early_termination": "Early termination",
    "filler": "Filler",
    "paraphrase": "Paraphrase",
    "mistake": "Mistake",
    "shuffle": "Shuffle",
    "swap": "Another problem's chain",
    "conflict": "Conflict",
}


def build_report(run: RunDirectory) -> Path:
    """Write RUN/report.html from the run's records, estimates and manifest; returns its path."""
    page = environment().get_template("report.html.j2").render(_context(run))
    return write_page(page, run.path / "report.html")


def write_page(page: str, path: Path) -> Path:
    """Write `page` in one move; gives its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(".report.html.tmp")
    temporary.write_bytes(page.encode("utf-8", "replace"))
    os.replace(temporary, path)
    return path


def environment() -> Environment:
    loader = FileSystemLoader(HERE)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "signed": signed, "p": p_value}
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    return environment


def number(value: Any, digits: int = 3) -> str:
    """A number for a table; a dash where it is undefined."""
    if value is None or pd.isna(value):
        return "–"
    if value == 0:
        return "0"
    small = value != 0 and abs(value) < 10**-digits
    return f"{value:.1e}" if small else f"{value:.{digits}f}".replace("-", "−")


def signed(value: Any) -> str:
    return number(value) if value is None or pd.isna(value) or value < 0 else "+" + number(value)


def p_value(value: float) -> str:
    return "–" if pd.isna(value) else "< .001" if value < 0.001 else f"{value:.3f}".removeprefix("0")


def _context(run: RunDirectory) -> dict[str, Any]:
    manifest, records, chains = run.read_manifest(), run.read_records(), run.read_chains()
    config = manifest.get("config") or {}
    authors = list(dict.fromkeys(str(chain["author"]) for chain in chains))
    records, chains = views.one_author(records, chains, config)
    several = len(authors) > 1 or bool(config.get("authors"))
    end = f"/{chains[0]['author']}" if several and chains else ""
    readers = views.readers_of(config, records)
    estimates = run.read_estimates() if (run.path / "estimates.parquet").is_file() else []
    apart = views.disagreements(manifest)
    apart = apart[apart["chain_id"].isin([chain["chain_id"] for chain in chains])]
    sections = _sections(records, chains, readers, apart)
    primary = views.primary_differences(estimates, config, readers)
    shown = [estimate for estimate in primary if np.isfinite(estimate.value)]
    sections["forest"] = [charts.forest_chart(shown, readers)] if shown else []
    known = shipped()
    scripts = {"plotly_js": plotly.offline.get_plotlyjs(), "page_js": (HERE / "report.js").read_text("utf-8")}
    return {
        "policy": _policy(scripts.values()),
        **{name: Markup(_clean(text)) for name, text in scripts.items()},
        "style": Markup((HERE / "report.css").read_text("utf-8")),
        "title": " · ".join(readers),
        "readers": _reader_rows(readers, config, manifest, estimates, end),
        "n_problems": records["problem_id"].nunique(),
        "other_authors": [author for author in authors if author != chains[0]["author"]] if chains else [],
        "verdicts": _verdicts(manifest),
        "two_by_two": _two_by_two(manifest, estimates),
        "checks": manifest.get("checks") or [],
        "certificate": in_words(known),
        "doubts": doubts(known),
        "failed": [check for check in manifest.get("checks") or [] if not check.get("passed")],
        "primary": _primary_rows(primary, estimates, [reader + end for reader in readers]),
        "estimates": _estimate_groups(estimates),
        "sections": sections,
        "mediated": [estimate for estimate in estimates if estimate.name.startswith("mediation/")],
        "variant_words": VARIANT_WORDS,
        "disagreements": json.loads(apart.to_json(orient="records")),
        "chains": chains,
        "exclusions": run.read_exclusions(),
        "paraphrases": manifest.get("paraphrases"),
        "manifest": json.dumps(manifest, indent=2, ensure_ascii=False),
        "page_data": {
            "charts": {chart["id"]: chart for chart in _numbered(sections)},
            "chains": _chain_views(run, records, chains, readers),
            "effects": _effect_scales(records),
            "readers": readers,
            "scale": charts.RDBU,
        },
    }


def _clean(script: str) -> str:
    """The script with the line ends a parser would give it; its hash is taken of the same text."""
    text = script.replace("\r\n", "\n").replace("\r", "\n")
    assert "</script" not in text.lower()
    return text


def _policy(scripts: Any) -> str:
    digests = [hashlib.sha256(_clean(script).encode()).digest() for script in scripts]
    sources = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {sources}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _verdicts(manifest: dict[str, Any]) -> list[str]:
    found = manifest.get("conclusion") or []
    return [found] if isinstance(found, str) else [str(sentence) for sentence in found]


def _two_by_two(manifest: dict[str, Any], estimates: list[Estimate]) -> list[dict[str, Any]]:
    """A row an arm: its pooled verdict at each threshold, and the share of its chains in each cell at .5."""
    found = {(e.name, e.arm): e.value for e in estimates}
    rows = []
    for row in manifest.get("verdicts") or []:
        pooled = [str(row[at]).replace("_", " ") for at in ("0.25", "0.5", "0.75")]
        shares = [found.get((f"verdict/{cell}", row["arm"])) for cell in (*CELLS, "undecided")]
        rows.append({"arm": row["arm"], "pooled": pooled, "shares": shares})
    return rows


def _reader_rows(
    readers: list[str], config: dict[str, Any], manifest: dict[str, Any], estimates: list[Estimate], end: str
) -> list[dict[str, str]]:
    accuracy = {
        e.arm: f"{number(e.value, 2)} right of {e.n_problems} problems" for e in estimates if e.name == "accuracy"
    }
    models = manifest.get("models") or {}
    named = {row["name"]: row for row in config.get("readers") or [] if isinstance(row, dict)}
    rows = []
    for reader in readers:
        info, own = models.get(reader) or {}, named.get(reader) or {}
        parts = [str(part) for part in (own.get("model") or info.get("name"), own.get("adapter")) if part]
        row = {"name": reader, "model": " + ".join(parts), "colour": charts.colour(readers, reader)}
        rows.append(row | {"accuracy": accuracy.get(reader + end, "")})
    return rows


def _sections(records: Table, chains: list[dict[str, Any]], readers: list[str], apart: Table) -> dict[str, Any]:
    """The charts of each section; an empty list where the run has no such records."""
    cells = views.aligned_patches(records, chains)
    triple, losses = views.conflict(records), views.knockout(records, chains)
    heads, points = views.attribution(records, chains), views.bridge(records)
    variants = [(str(variant), of_variant) for variant, of_variant in cells.groupby("variant")]
    return {
        "conflict": [charts.conflict_chart(triple, readers)] if len(triple) else [],
        "curves": charts.curve_charts(views.curves(records, chains), readers),
        "trace": charts.trace_charts(views.trace(records, chains), readers),
        "patching": {variant: charts.patching_charts(of_variant, readers) for variant, of_variant in variants},
        "knockout": [charts.knockout_chart(losses, readers)] if len(losses) else [],
        "attribution": charts.attribution_charts(heads, readers) if len(heads) else {"charts": [], "limit": 1.0},
        "cross_model": charts.cross_model_charts(views.cross_model(records), readers),
        "bridge": [charts.bridge_chart(points, apart, readers)] if len(points) else [],
    }


def _numbered(sections: dict[str, Any]) -> list[dict[str, Any]]:
    """Every chart of `sections`, each given the id that ties it to its place in the page."""
    found: list[dict[str, Any]] = []
    for name, section in sections.items():
        groups = section if name == "patching" else {"": section}
        for key, group in groups.items():
            for chart in group["charts"] if isinstance(group, dict) else group:
                chart["id"] = f"{name}{key}-{len(found)}"
                found.append(chart)
    return found


def _primary_rows(primary: list[Estimate], estimates: list[Estimate], readers: list[str]) -> list[dict[str, Any]]:
    """A row an endpoint: its value of every reader, then its differences with interval and Holm's p."""
    by_key = {(estimate.name, estimate.arm): estimate for estimate in estimates}
    rows = []
    for name in dict.fromkeys(estimate.name for estimate in primary):
        own = [estimate for estimate in primary if estimate.name == name]
        alone = [by_key.get((name, reader)) for reader in readers]
        differences = [{**asdict(estimate), "holm": holm_p(estimate)} for estimate in own]
        rows.append({"name": name, "readers": alone, "differences": differences})
    return rows


def _estimate_groups(estimates: list[Estimate]) -> dict[str, list[Estimate]]:
    groups: dict[str, list[Estimate]] = {}
    for estimate in estimates:
        groups.setdefault(estimate.name.split("/")[0].split(" | ")[0], []).append(estimate)
    return groups


def _effect_scales(records: Table) -> list[dict[str, Any]]:
    effects = views.step_effects(records)
    scales = []
    for effect in views.EFFECTS:
        values = effects.loc[effects["effect"] == effect.key, "value"]
        if len(values):
            scales.append({**asdict(effect), "limit": charts.limit_of(values)})
    return scales


def _chain_views(
    run: RunDirectory, records: Table, chains: list[dict[str, Any]], readers: list[str]
) -> list[dict[str, Any]]:
    """What the chain view shows of each chain: texts, answers, step effects, its own maps, the edited texts."""
    effects, cells = views.step_effects(records), views.patches(records)
    metas = [meta for meta in run.read_unit_meta() if "answer" in meta]
    rows = []
    for chain in chains:
        own = [meta for meta in metas if meta.get("chain_id") == chain["chain_id"]]
        maps = cells[cells["chain_id"] == chain["chain_id"]]
        row = {key: chain.get(key) for key in ("chain_id", "problem_id", "question", "gold", "cue", "true_step")}
        row |= {"steps": list(chain["steps"]), "answers": {meta["reader"]: meta.get("answer") for meta in own}}
        row["effects"] = _effects_of(effects[effects["chain_id"] == chain["chain_id"]], len(chain["steps"]))
        row["maps"] = {str(v): charts.chain_charts(one, chain, readers) for v, one in maps.groupby("variant")}
        row["edits"] = _edits_of(own)
        rows.append(row)
    return rows


def _effects_of(effects: Table, n_steps: int) -> dict[str, dict[str, list[float | None]]]:
    """`{effect: {reader: [value of each step]}}`."""
    found: dict[str, dict[str, list[float | None]]] = {}
    for (effect, reader), one in effects.groupby(["effect", "reader"]):
        values = one.groupby("step")["value"].mean().reindex(range(n_steps))
        found.setdefault(str(effect), {})[str(reader)] = charts.numbers(values)
    return found


def _edits_of(metas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The edited texts of all tests, each once, with the answer each reader gave to it."""
    found: dict[str, dict[str, Any]] = {}
    for meta in metas:
        for edit in meta.get("edits") or []:
            where = {key: edit.get(key) for key in ("measure", "variant", "step", "seed", "steps")}
            row = found.setdefault(json.dumps(where), {**where, "answers": {}})
            row["test"] = TEST_WORDS.get(edit["measure"], edit["measure"])
            row["answers"][meta["reader"]] = edit.get("answer")
    return list(found.values())
