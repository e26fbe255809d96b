"""RUN/report.html from a run directory: one page, no network, no model.

1. Tables and charts come from views.py and charts.py; texts reach the page through jinja2 with autoescape, or inside
   compressed JSON blocks, and the page's scripts only ever set them as text.
2. A content security policy admits exactly the page's own scripts and style sheet, by their hashes: whatever slips into
   the text can neither run nor load nor send anything, and no text is read as markup (trusted types).
3. The text comes before the scripts, so it is on the screen before plotly.js is read; a chain's block is unpacked when
   the chain is opened.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import plotly.offline
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .. import views
from ..certificate import doubts, in_words, shipped
from ..compare import BOTH_CORRECT, CORRECT_WITHOUT_CHAIN, UNDECIDED, holm_p
from ..disk import write_atomically
from ..figure_style import file_name
from ..metrics import CELLS
from ..outcomes import Table
from ..records import RunDirectory
from ..stats import Estimate
from . import charts, maps
from .chain_view import block, chain_data, effect_scales

HERE = Path(__file__).parent
Row = TypeVar("Row")
VARIANT_WORDS = {
    "denoise": "denoising: the true chain's activations put into the run on altered numbers; blue restores the answer",
    "noise": "noising: altered numbers' activations put into the run on the true chain; red takes the answer away",
}
HEADLINES = ("accuracy", "dependence", "infogain/logp_gain")
"""Shown in every stratum beside the primary outcomes."""
STRATA = ("", BOTH_CORRECT, CORRECT_WITHOUT_CHAIN)
"""Ends of an estimate's name: all problems, those all readers get right, those right without the chain."""
BOLD = "font-weight:bold"
"""The style attribute that plotly gives to what stands in <b>."""
PDF_OF = {"trace": "decision_trace"}
"""The paper figure of a section where it has another name."""


def build_report(run: RunDirectory) -> Path:
    """Write RUN/report.html from the run's records, estimates and manifest; returns its path."""
    page = environment().get_template("report.html.j2").render(_context(run))
    return write_page(page, run.path / "report.html")


def write_page(page: str, path: Path) -> Path:
    """Write `page` in one move; gives its path."""
    write_atomically(path, lambda file: file.write(page.encode("utf-8", "replace")))
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
    text = f"{value:.1e}" if small else f"{value:.{digits}f}"
    return "−" + text[1:] if text.startswith("-") else text


def signed(value: Any) -> str:
    return number(value) if value is None or pd.isna(value) or value < 0 else "+" + number(value)


def p_value(value: float) -> str:
    return "–" if pd.isna(value) else "< .001" if value < 0.001 else f"{value:.3f}".removeprefix("0")


def _context(run: RunDirectory) -> dict[str, Any]:
    manifest, records, chains = run.read_manifest(), run.read_records(), run.read_chains()
    config = manifest.get("config") or {}
    authors = list(dict.fromkeys(str(chain["author"]) for chain in chains))
    of_all = records, chains
    records, chains = views.one_author(records, chains, config)
    several = len(authors) > 1 or bool(config.get("authors"))
    end = f"/{chains[0]['author']}" if several and chains else ""
    readers = views.readers_of(config, records)
    estimates = run.read_estimates() if (run.path / "estimates.parquet").is_file() else []
    apart = views.disagreements(manifest)
    own_apart = apart[apart["chain_id"].isin([chain["chain_id"] for chain in chains])]
    sections = _sections(records, chains, readers, own_apart)
    sections["curves"] = _curves_by_author(*of_all, readers, authors)
    sections["beside"] = _beside(estimates, readers)
    primary = views.primary_differences(estimates, config, readers)
    shown = [estimate for estimate in primary if np.isfinite(estimate.value)]
    sections["forest"] = [charts.forest_chart(shown, readers)] if shown else []
    numbered = _numbered(sections, str(chains[0]["author"]) if chains else "")
    known = shipped()
    index, blocks = chain_data(run, *of_all, readers, apart)
    return {
        **shell("charts", "chains", rules=heights(numbered) + _reader_rules(readers)),
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
        "strata": _strata(primary, estimates, readers),
        "estimates": by_outcome(estimates, lambda estimate: estimate.name),
        "sections": sections,
        "mediated": _mediated(estimates),
        "variant_words": VARIANT_WORDS,
        "disagreements": json.loads(own_apart.to_json(orient="records")),
        "chains": chains,
        "exclusions": run.read_exclusions(),
        "paraphrases": manifest.get("paraphrases"),
        "manifest": json.dumps(manifest, indent=2, ensure_ascii=False),
        "blocks": blocks,
        "pdfs": _pdfs(run, numbered),
        "page_data": block(
            {
                "charts": {chart["id"]: chart for chart in numbered},
                "chains": index,
                "effects": effect_scales(of_all[0]),
                "readers": readers,
                "scale": maps.RDBU,
            }
        ),
    }


def _curves_by_author(
    records: Table, chains: list[dict[str, Any]], readers: list[str], authors: list[str]
) -> dict[str, list[dict[str, Any]]]:
    """The three tests' curves, of each author's chains by itself; authors without curves are left out."""
    found = {}
    for author in authors:
        own = records[records["author"] == author], [chain for chain in chains if chain["author"] == author]
        found[author] = charts.curve_charts(views.curves(*own), readers)
    return {author: drawn for author, drawn in found.items() if drawn}


def _beside(estimates: list[Estimate], readers: list[str]) -> list[dict[str, Any]]:
    """Dependence and InfoGain of each reader and author, one beside the other."""
    asked = (
        (
            "dependence",
            "Dependence: does altering the chain alter the answer?",
            "total variation,<br>mistakes − paraphrase",
        ),
        ("infogain/logp_gain", "InfoGain: does the chain inform about the gold answer?", "nats a step"),
    )
    drawn = []
    for name, title, unit in asked:
        own = [e for e in estimates if e.name == name and e.arm.split("/")[0] in readers and np.isfinite(e.value)]
        if own:
            drawn.append(charts.levels_chart(own, readers, title, unit))
    return drawn


def _mediated(estimates: list[Estimate]) -> dict[str, dict[str, Estimate]]:
    """`{effect: {arm: estimate}}` of the mediation on all problems, without the worlds the effects are made of."""
    rows: dict[str, dict[str, Estimate]] = {}
    for e in estimates:
        if re.fullmatch(r"mediation/[^/]+/(?!y_)\w+", e.name):
            rows.setdefault(e.name.removeprefix("mediation/"), {})[e.arm] = e
    return rows


def _strata(primary: list[Estimate], estimates: list[Estimate], readers: list[str]) -> list[dict[str, Any]]:
    """A row an outcome and difference: its estimate on all problems and in each stratum, None where there is none."""
    by_key = {(e.name, e.arm): e for e in estimates}
    names = dict.fromkeys([*HEADLINES, *(estimate.name.split(" | ")[0] for estimate in primary)])
    arms = dict.fromkeys(e.arm for e in estimates if views.tuned_reader(e.arm, readers))
    rows = []
    for name in names:
        for arm in arms:
            found = [by_key.get((name + end, arm)) for end in STRATA]
            if any(e is not None and np.isfinite(e.value) for e in found):
                rows.append({"name": name, "arm": arm, "strata": found})
    return rows


def _pdfs(run: RunDirectory, numbered: list[dict[str, Any]]) -> dict[str, str]:
    """`{file name: base64}` of the paper figures that a chart of the page names, where they have been drawn."""
    paths = {name: run.figures / f"{name}.pdf" for name in sorted({chart["pdf"] for chart in numbered} - {""})}
    return {name: as_base64(path) for name, path in paths.items() if path.is_file()}


def as_base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def heights(drawn: Sequence[dict[str, Any]]) -> str:
    """A rule for the place of each chart, which is as high before it is drawn."""
    return "".join(f'[data-chart="{chart["id"]}"] {{ height: {chart["height"]}px; }}\n' for chart in drawn)


def _reader_rules(readers: Sequence[str]) -> str:
    """The readers' colours, and how many columns the chain view has."""
    dots = [
        f".readers li:nth-child({n}) .dot {{ background: {charts.colour(readers, one)}; }}\n"
        for n, one in enumerate(readers, 1)
    ]
    return "".join(dots) + f".stage {{ --readers: {len(readers)}; }}\n"


def shell(*names: str, rules: str = "") -> dict[str, Any]:
    """What every page is made of: its style with the page's own `rules`, plotly.js and the scripts of `names`, and the
    policy that admits them.

    `unused_styles`: ids of style sheets that plotly.js adds as it loads, for maps of the earth, unless they are there.
    """
    texts = [plotly.offline.get_plotlyjs(), *((HERE / f"{name}.js").read_text("utf-8") for name in names)]
    scripts, style = [_clean(text) for text in texts], _clean((HERE / "report.css").read_text("utf-8") + rules)
    return {
        "policy": _policy(scripts, style),
        "scripts": [Markup(script) for script in scripts],
        "style": Markup(style),
        "unused_styles": re.findall(r'getElementById\("([0-9a-f]{64})"\)', texts[0]),
    }


def _clean(text: str) -> str:
    """A script or style sheet with the line ends a parser would give it; its hash is taken of the same text."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    assert not re.search("</(script|style)", text, re.IGNORECASE)
    return text


def _policy(scripts: Sequence[str], style: str) -> str:
    """Nothing is loaded or sent; what runs and the style sheet are named by hash.

    plotly adds an empty style sheet, which it fills by calls, and sets style attributes to nothing or to BOLD: these
    are named too. Pictures are drawn from data and saved from blobs.
    """
    return (
        f"default-src 'none'; connect-src 'none'; frame-src 'none'; object-src 'none'; worker-src 'none'; "
        f"script-src {_hashes(scripts)}; require-trusted-types-for 'script'; trusted-types default; "
        f"style-src-elem {_hashes([style, ''])}; style-src-attr 'unsafe-hashes' {_hashes(['', BOLD])}; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _hashes(texts: Sequence[str]) -> str:
    digests = [hashlib.sha256(text.encode()).digest() for text in texts]
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


def _verdicts(manifest: dict[str, Any]) -> list[str]:
    """The sentences of what was concluded; those of pairs without values only where there is no other."""
    found = manifest.get("conclusion") or []
    sentences = [found] if isinstance(found, str) else [str(sentence) for sentence in found]
    return [sentence for sentence in sentences if not sentence.endswith(UNDECIDED)] or sentences[:1]


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
        rows.append({"name": reader, "model": " + ".join(parts), "accuracy": accuracy.get(reader + end, "")})
    return rows


def _sections(records: Table, chains: list[dict[str, Any]], readers: list[str], apart: Table) -> dict[str, Any]:
    """The charts of each section; an empty list where the run has no such records."""
    cells = views.aligned_patches(records, chains)
    triple, losses = views.conflict(records), views.knockout(records, chains)
    heads, points = views.attribution(records, chains), views.bridge(records)
    gaps = views.patch_differences(records, chains, readers) if len(cells) else cells
    variants = [(str(variant), of_variant) for variant, of_variant in cells.groupby("variant")]
    return {
        "conflict": [charts.conflict_chart(triple, readers)] if len(triple) else [],
        "trace": maps.trace_charts(views.trace(records, chains), readers),
        "patching": {
            variant: maps.patching_charts(of_variant, gaps[gaps["variant"] == variant], readers)
            for variant, of_variant in variants
        },
        "knockout": [charts.knockout_chart(losses, readers)] if len(losses) else [],
        "attribution": maps.attribution_charts(heads, readers) if len(heads) else {"charts": [], "limit": 1.0},
        "cross_model": charts.cross_model_charts(views.cross_model(records), readers),
        "bridge": [charts.bridge_chart(points, apart, readers)] if len(points) else [],
    }


def _numbered(sections: dict[str, Any], author: str) -> list[dict[str, Any]]:
    """Every chart of `sections`, each given the id that ties it to its place in the page, and its paper figure.

    Paper figures are of the chains of `author`; curves of others' chains have none.
    """
    found: list[dict[str, Any]] = []
    for name, section in sections.items():
        groups = section if name in ("patching", "curves") else {"": section}
        for key, group in groups.items():
            for chart in group["charts"] if isinstance(group, dict) else group:
                chart["id"] = f"{name}-{len(found)}"
                chart["pdf"] = file_name(f"patching_{key}" if name == "patching" else PDF_OF.get(name, name))
                if name == "curves" and key != author:
                    chart["pdf"] = ""
                found.append(chart)
    return found


def _primary_rows(primary: list[Estimate], estimates: list[Estimate], readers: list[str]) -> list[dict[str, Any]]:
    """A row an endpoint: its value of every reader, then its differences with interval and Holm's p."""
    by_key = {(estimate.name, estimate.arm): estimate for estimate in estimates}
    rows = []
    for name in dict.fromkeys(estimate.name for estimate in primary):
        own = [estimate for estimate in primary if estimate.name == name]
        own = [estimate for estimate in own if estimate.n_problems] or own
        alone = [by_key.get((name, reader)) for reader in readers]
        differences = [{**asdict(estimate), "holm": holm_p(estimate)} for estimate in own]
        rows.append({"name": name, "readers": alone, "differences": differences})
    return rows


def by_outcome(rows: Sequence[Row], name: Callable[[Row], str]) -> dict[str, list[Row]]:
    """`rows` by the first part of the estimate's name."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(name(row).split("/")[0].split(" | ")[0], []).append(row)
    return groups
