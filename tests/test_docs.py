"""The documentation builds without a warning and needs no network, and whatever it shows runs: Python, commands, studies.

A Python block runs in the namespace of its page; a text block right behind it is what it prints. One that cannot run
here says so, and why, in the title that the page shows. Names of records and scores are held to those of a real run.
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from cotfaith_mech.cli import app
from cotfaith_mech.config import parse_config
from cotfaith_mech.outcomes import mediated, outcomes, recovered
from cotfaith_mech.records import UNITS
from cotfaith_mech.study import measure_study
from tests.fake_run import write_fake_run

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FENCE = re.compile(r"^```(\w+)(?: title=\"(.*)\")?\n(.*?)^```$\n?", re.MULTILINE | re.DOTALL)
NUMBER = r"-?\d+\.\d+"
NOT_RUN = "Not run in the tests: "


@dataclass
class Block:
    """A fenced block: its language, title, text and line, and the text block that stands right behind it."""

    language: str
    title: str
    text: str
    line: int
    prints: str | None = None


def blocks(page: Path) -> list[Block]:
    text, found, end = page.read_text(), [], -1
    for match in FENCE.finditer(text):
        block = Block(match[1], match[2] or "", match[3], text[: match.start()].count("\n") + 2)
        if block.language == "text" and found and not text[end : match.start()].strip():
            found[-1].prints = block.text
        found.append(block)
        end = match.end()
    return found


def named(page: Path) -> str:
    return str(page.relative_to(DOCS))


def of(*languages: str) -> list:
    chosen = [(page, block) for page in PAGES for block in blocks(page) if block.language in languages]
    return [pytest.param(page, block, id=f"{named(page)}:{block.line}") for page, block in chosen]


def run_page(page: Path) -> list[tuple[Block, str]]:
    """Every Python block of the page that runs, with what it prints."""
    space, printed = {"__name__": "__docs__"}, []
    for block in blocks(page):
        if block.language == "python" and not block.title.startswith(NOT_RUN):
            out = io.StringIO()
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            with contextlib.redirect_stdout(out):
                exec(code, space)
            printed.append((block, "\n".join(line.rstrip() for line in out.getvalue().splitlines())))
    return printed


def assert_same(printed: str, shown: str, where: str) -> None:
    """Word by word; numbers may differ by one in the last of the two digits shown, as between processors."""
    words = printed.split(), shown.split()
    assert [re.sub(NUMBER, "0.00", word) for word in words[0]] == [re.sub(NUMBER, "0.00", word) for word in words[1]], (
        where
    )
    numbers = [[float(word) for word in some if re.fullmatch(NUMBER, word)] for some in words]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.011), where


def with_python() -> list:
    marks = {"index.md": [pytest.mark.smollm2]}
    chosen = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]
    return [pytest.param(page, id=named(page), marks=marks.get(named(page), [])) for page in chosen]


@pytest.mark.parametrize("page", with_python())
def test_python_prints_what_the_page_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_fake_run(tmp_path / "runs" / "demo")
    for block, printed in run_page(page):
        assert_same(printed, block.prints or "", f"{named(page)}, line {block.line}")


def test_a_block_that_does_not_run_says_why():
    titled = [block for page in PAGES for block in blocks(page) if block.language == "python" and block.title]
    assert titled
    assert all(block.title.startswith(NOT_RUN) and len(block.title) > len(NOT_RUN) + 9 for block in titled)


@pytest.mark.parametrize(("page", "block"), of("yaml"))
def test_studies_are_valid(page, block):
    parse_config(yaml.safe_load(block.text))


VERBS: Any = typer.main.get_command(app)


def commands() -> list:
    lines = []
    for page in PAGES:
        for block in blocks(page):
            shown = block.text.replace("\\\n", " ").splitlines() if block.language in ("bash", "console") else []
            lines += [(named(page), line.removeprefix("$ ")) for line in shown if re.match(r"(\$ )?cotfaith ", line)]
    return lines


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_exist_with_their_options(page, line):
    """Parsed by the application itself, which refuses unknown verbs and options, and not invoked."""
    _, verb, *arguments = shlex.split(line, comments=True)
    VERBS.commands[verb].make_context(verb, arguments, parent=VERBS.make_context("cotfaith", [verb]))


def test_an_option_that_does_not_exist_would_be_found():
    with pytest.raises(Exception, match="No such option"):
        test_commands_exist_with_their_options("", "cotfaith demo --no-such-option")


# names of records and scores


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All that can be measured of one problem of two organisms; no conclusion is drawn, no picture made."""
    config = {
        "readers": [{"name": "A", "model": "organism:mix_100"}, {"name": "B", "model": "organism:mix_000"}],
        "problems": "organism:mix_050:2:7:3",
        "battery": "full",
        "continue_tokens": 8,
        "draws": 2,
        "cross_model": True,
        "crosscheck_cells": 0,
        "primary": [],
    }
    return measure_study(parse_config(config), tmp_path_factory.mktemp("docs") / "run")


NOT_OF_ORGANISMS = {
    ("conflict", "record_agree"),
    ("conflict", "record_absent"),
    ("conflict", "record_contradict"),
    ("conflict", "carried"),
    ("control", "norm_matched/*"),
    ("knockout", "*_window_*"),
    ("mistake", "propagated"),
    ("options", "chain"),
    ("options", "no_chain"),
    ("patching", "noise/*"),
}
"""Variants that the run's problems cannot have: choices, other conflicts, calculations, sources beside the twin."""
METRICS_ELSEWHERE = {"label_mass", "p_answer_se"}
SCORES_ELSEWHERE = {"label_mass", "chains_written", "mistake_propagated/aoc_mean", "mistake_propagated/follows"}


def cells(page: Path, section: str, header: str) -> list[list[list[str]]]:
    """Of each row of the table under `section`, the names in code of each cell."""
    _, found, rest = page.read_text().partition(f"\n## {section}\n")
    table = re.search(rf"^\| {header} \|.*\n\|[-|]+\n((?:\|.*\n)+)", rest, re.MULTILINE) if found else None
    rows = table[1].splitlines() if table else []
    shown = [[cell.replace("*(empty)*", "``") for cell in row.strip("|").split("|")] for row in rows]
    return [[re.findall(r"`([^`]*)`", cell) for cell in row] for row in shown]


def documented() -> set[tuple[str, str, str]]:
    rows = [row for page in PAGES for row in cells(page, "Records", "measure")]
    return {(m, v, metric) for row in rows for m in row[0] for v in row[1] for metric in row[2]}


def matches(known: tuple[str, str, str], pattern: tuple[str, str, str]) -> bool:
    return (known[0], known[2]) == (pattern[0], pattern[2]) and fnmatchcase(known[1], pattern[1])


def test_every_record_is_documented_and_every_documented_record_exists(run):
    table, patterns = run.read_records(), documented()
    known = set(table[["measure", "variant", "metric"]].itertuples(index=False, name=None))
    assert len(known) > 250
    assert [row for row in sorted(known) if not any(matches(row, pattern) for pattern in patterns)] == []
    expected = [p for p in patterns if p[:2] not in NOT_OF_ORGANISMS and p[2] not in METRICS_ELSEWHERE]
    assert [p for p in sorted(expected) if not any(matches(row, p) for row in known)] == []
    assert {pattern[:2] for pattern in patterns} >= NOT_OF_ORGANISMS
    assert [p for p in sorted(patterns - set(expected)) if any(matches(row, p) for row in known)] == []
    assert {metric for _, _, metric in patterns} == set(UNITS)


def test_every_score_is_documented_and_every_documented_score_exists(run):
    records, chains = run.read_records(), {row["chain_id"]: row for row in run.read_chains()}
    known = {
        name
        for found in (outcomes(records, chains), recovered(records, chains), mediated(records))
        for name in found["name"]
    }
    known |= {f"bridge/mistake~knockout/{score}" for score in ("top1", "top1_chance", "rho", "rho_within")}
    known |= {f"bridge/mistake~knockout/rho_{score}" for score in ("partial", "position", "is_last")}
    patterns = {name for page in PAGES for row in cells(page, "Scores", "estimate") for name in row[0]}
    assert len(known) > 150
    undocumented = [name for name in sorted(known) if not any(fnmatchcase(name, p) for p in patterns)]
    assert [name for name in undocumented if not re.fullmatch(r"patching/.*/layer\d+|options/.*", name)] == []
    absent = {pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in known)}
    assert absent == SCORES_ELSEWHERE


# the site


class Assets(HTMLParser):
    """What a page loads by itself; links that a reader may follow are not."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "link") and (values.get("rel") or "") not in ("next", "prev"):
            self.loaded += [value for name in ("src", "href") if (value := values.get(name))]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_has_every_page_and_loads_nothing_from_elsewhere(site):
    assert {str(path.relative_to(site)) for path in site.rglob("*.html")} >= {
        str(page.relative_to(DOCS).with_suffix(".html")) for page in PAGES
    }
    for path in site.rglob("*.html"):
        assets = Assets()
        assets.feed(path.read_text())
        assert assets.loaded
        assert [asset for asset in assets.loaded if re.match(r"(https?:)?//", asset)] == []
    for path in site.rglob("*.css"):
        assert re.findall(r"url\([\"']?(?:https?:)?//", path.read_text()) == []


def test_reference_pages_hold_every_command_key_and_name(site):
    import cotfaith_mech

    pages = {name: (site / "reference" / f"{name}.html").read_text() for name in ("commands", "config", "python")}
    assert [verb for verb in VERBS.commands if f"cotfaith {verb}" not in pages["commands"]] == []
    assert [name for name in cotfaith_mech.__all__ if f'id="cotfaith_mech.{name}"' not in pages["python"]] == []
    assert "keep_on_cpu" in pages["config"]
    assert not [text for text in pages.values() if "<!-- " + "commands" in text or "\x08" in text]


def test_a_study_key_without_a_meaning_stops_the_build():
    generated = runpy.run_path(str(DOCS / "generated.py"))
    meanings = yaml.safe_load((DOCS / "study_keys.yaml").read_text())
    meanings["StudyConfig"].pop("dtype")
    with pytest.raises(KeyError, match="dtype"):
        generated["_keys"](generated["StudyConfig"], meanings["StudyConfig"])
