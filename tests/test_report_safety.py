"""The report as an attacker's target, in a real browser: text from models, data sets, names and links stays text; and
were markup to slip in, the page's policy lets it neither run nor load nor send anything."""

from __future__ import annotations

import base64
import csv
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from playwright.sync_api import Browser, Page, expect

from cotfaith_mech import views
from cotfaith_mech.chains import Chain
from cotfaith_mech.figure_style import file_name
from cotfaith_mech.notebook import ChainView, Heatmap
from cotfaith_mech.records import Record, RunDirectory
from cotfaith_mech.report import build_merged, build_report
from cotfaith_mech.report.charts import CONTROLS, label
from cotfaith_mech.stats import Estimate

from . import fake_run
from .test_report_browser import Watched, browser, pytestmark, saved

__all__ = ["browser", "pytestmark"]

HOSTILE = (
    "</script></style></title><img src=x onerror=\"window.pwned=1\"><a href='javascript:window.pwned=2'>a</a>"
    '<b>b</b>" onmouseover="window.pwned=3" {{7*7}}{% raw %}${7*7}%{y}&lt;i&gt;\u202e\u001b[31m<!--\u2028'
)
"""Short enough for a name that is shown in full."""
TEXTS = HOSTILE + (
    "<script>window.pwned=4</script><svg/onload=window.pwned=5><iframe srcdoc='<script>parent.pwned=6</script>'></iframe>"
    "<style>*{display:none}</style><base href='http://127.0.0.1:9/'><form action='http://127.0.0.1:9/'><!--"
    "]]><extra>%{customdata[0]}</extra>expression(window.pwned=7)url(http://127.0.0.1:9/a.png)'};window.pwned=8;//"
)
PLAIN = " of plain words, as long as names are"
DANGEROUS = (
    "script, style, img, iframe, object, embed, base, form, link, meta, foreignObject, video, audio, "
    "a:not([href^='#']), svg a, [onerror], [onload], [onmouseover], [srcdoc], [href^=javascript]"
)
SLOW = 60_000
"""Milliseconds that all charts of a page may take on a busy machine."""
Words = Callable[[str], str]
NAMES = {"A": "reader A", "B": "=reader B", "C": "@reader C", "gold": "an author", "SmolLM2-135M-Instruct": "a model"}
NAMES |= {"demo": "a data set", "different steps": "a reason", "jackknife t": "a method", "24 cells": "a detail"}
NAMES |= {"record_agree": "a variant"} | {name: name for name in ("self_patch", "noise")}
GROWN = re.compile(r"p\d\d|[0-9a-f]{12,}|blocks\..*|Holm p.*|Between.*")
"""Problem and chain ids, sites, notes and sentences: whatever code does not look for."""


PLACES = (
    "reader A", "=reader B", "@reader C", "an author", "a model", "an adapter", "a reason", "a method", "noise",
    "a variant", "a detail", "self_patch", "p00", "p01", "blocks.0.hook_resid_pre", "an estimate", "a mediator",
    "an arm", "a note", "left out problem_id", "left out reader", "left out stage", "left out reason", "judged", "at .25",
    "at .5", "at .75", "a paraphraser", "a try", "a check", "a data set", "a package", "a version",
)  # fmt: skip
"""Where a page shows a name or a note of the run; the last three in its manifest, as JSON."""


def renamed(value: Any, words: Words) -> Any:
    """`value` with every name and text in it as `words(...)` has it."""
    if isinstance(value, dict):
        return {words(NAMES[k]) if k in NAMES else k: renamed(one, words) for k, one in value.items()}
    if isinstance(value, list | tuple):
        return [renamed(one, words) for one in value]
    if not isinstance(value, str):
        return value
    if value in ("B-A", "C-A"):
        return f"{renamed(value[0], words)}-{renamed(value[2], words)}"
    return words(NAMES.get(value, value)) if value in NAMES or GROWN.fullmatch(value) else value


def more_records(row: dict[str, Any]) -> Iterator[Record]:
    """What the fake run has no records of: the decision trace and exchanged layers."""
    where = {name: row[name] for name in ("problem_id", "chain_id", "author", "reader")}
    for layer, step in ((0, 0), (0, 1), (1, 0), (1, 1)):
        yield Record(
            **where,
            measure="decision_trace",
            metric="p_answer",
            variant="logit_lens",
            layer=layer,
            step=step,
            value=0.5,
        )
        for into in ("base", "tuned"):
            variant = f"record_agree/into_{into}/chain_rows"
            yield Record(**where, measure="cross_model", metric="p_chain", variant=variant, layer=layer, value=0.5)
    yield Record(
        **where, measure="cross_model", metric="p_chain", variant="record_agree/write_base_read_base", value=0.5
    )


def write_run(path: Path, words: Words, texts: str) -> RunDirectory:
    """The fake run with `words(place)` in every place where a name or a note stands, `texts` in every text."""
    plain = fake_run.write_fake_run(path.parent / f"{len(texts)}", hostile=texts, n_problems=4)
    manifest = renamed(plain.read_manifest(), words)
    for reader in manifest["config"]["readers"]:
        reader["adapter"] = words("an adapter")
    run = RunDirectory.create(path, manifest["config"])
    run.write_chains(renamed(plain.read_chains(), words))
    records = plain.read_records()
    for meta in plain.read_unit_meta():
        own = records[(records["reader"] == meta["reader"]) & (records["chain_id"] == meta["chain_id"])]
        rows = [{k: None if pd.isna(v) else v for k, v in row.items()} for row in own.to_dict("records")]
        found = [Record(**renamed(row, words)) for row in rows]
        run.write_unit(meta["unit"], [*found, *more_records(asdict(found[0]))], renamed(meta, words))
    estimates = [Estimate(**renamed(asdict(estimate), words)) for estimate in plain.read_estimates()]
    for name in (words("an estimate"), f"mediation/{words('a mediator').replace('/', '∕')}/te", "items", "copy"):
        estimates.append(Estimate(name, words("an arm"), 4, 0.5, 0.4, 0.6, 0.5, words("a method"), words("a note")))
    run.write_estimates(estimates)
    left_out = {name: words(f"left out {name}") for name in ("problem_id", "reader", "stage", "reason")}
    run.add_exclusion(**left_out)
    verdict = {"arm": words("judged"), "0.25": words("at .25"), "0.5": words("at .5"), "0.75": words("at .75")}
    paraphrases = {"paraphraser": words("a paraphraser"), "wanted": 3, "valid": 1, "rejected": {words("a try"): 2}}
    failed = {"check": words("a check"), "value": 1.0, "threshold": 0.1, "passed": False, "detail": words("a detail")}
    run.update_manifest(
        manifest
        | {"verdicts": [verdict], "paraphrases": paraphrases, "versions": {words("a package"): words("a version")}}
        | {"checks": [*manifest["checks"], failed]}
    )
    for stem in ("curves", file_name(f"patching_{words('noise')}")):
        (run.figures / f"{stem}.pdf").write_bytes(b"%PDF of " + stem.encode())
    return run


def hostile_words(place: str) -> str:
    return place + HOSTILE


def plain_words(place: str) -> str:
    return place + PLAIN


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """The fake run with fewer layers and heads: what is said here does not need them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_run, "LAYERS", (0, 15))
        patch.setattr(fake_run, "N_HEADS", 3)
        yield


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, small: None) -> RunDirectory:
    run = write_run(tmp_path_factory.mktemp("runs") / "run", hostile_words, TEXTS)
    build_report(run)
    return run


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, small: None) -> RunDirectory:
    run = write_run(tmp_path_factory.mktemp("runs") / "run", plain_words, PLAIN)
    build_report(run)
    return run


def bare(text: str) -> str:
    """The text without white space, which wrapping moves, as charts show its control characters."""
    return "".join(text.translate(CONTROLS).split())


def walked(page: Page) -> str:
    """All that the page shows when every chart is drawn and hovered over, and a chain opened."""
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    page.locator("#chain-list a").nth(1).evaluate("node => node.click()")
    expect(page.locator("#chain-list tr").nth(1)).to_have_attribute("aria-current", "true", timeout=SLOW)
    charts, seen = page.locator(".chart"), []
    expect(page.locator(".chart:not(:has(.main-svg))")).to_have_count(0, timeout=SLOW)
    for i in range(charts.count()):
        seen += charts.nth(i).evaluate(HOVER)
    titles = page.eval_on_selector_all("main [title]", "nodes => nodes.map((node) => node.title)")
    return bare("".join([*seen, *titles, page.locator("body").text_content() or ""]))


HOVER = """async (chart) => {
  const found = [chart.textContent];
  for (const [number, trace] of chart.data.entries()) {
    if (trace.hoverinfo === "skip") continue;
    if (trace.type === "heatmap") Plotly.Fx.hover(chart, { xval: 0, yval: 0 }, "xy");
    else Plotly.Fx.hover(chart, [{ curveNumber: number, pointNumber: 0 }]);
    found.push(chart.querySelector(".hoverlayer").textContent);
  }
  return found;
}"""


def dangerous(page: Page) -> dict[str, int]:
    """How many elements there are of each kind that could run or load something, or hide the rest."""
    return page.evaluate(
        "list => Object.fromEntries(list.split(', ').map(one => [one, document.querySelectorAll(one).length]))",
        DANGEROUS,
    )


@pytest.fixture(scope="module")
def ordinary(browser: Browser, plain: RunDirectory) -> dict[str, int]:
    """What `dangerous` counts on the page of plain words."""
    page = Watched(browser, plain.path / "report.html").page
    walked(page)
    found = dangerous(page)
    page.context.close()
    return found


@pytest.mark.parametrize("unguarded", [False, True], ids=["as it is", "without its policy"])
def test_every_hostile_text_is_shown_and_none_becomes_an_element(
    browser: Browser, hostile: RunDirectory, ordinary: dict[str, int], unguarded: bool
) -> None:
    """The twin of plain words has as many elements of each kind; without the policy, escaping alone must do it."""
    fragment = "#chain=<img src=x onerror=window.pwned=9>&reader=__proto__&effect=<b>"
    watched = Watched(browser, hostile.path / "report.html", fragment, bypass_csp=unguarded)
    page = watched.page
    expect(page.locator("#chain-missing")).to_have_text(
        "The chain “<img src=x onerror=window.pwned=9>” is not in this report."
    )
    shown = walked(page)
    other = {place: json.dumps(hostile_words(place), ensure_ascii=False)[1:-1] for place in PLACES[-3:]}
    other["a mediator"] = hostile_words("a mediator").replace("/", "∕")
    assert [place for place in PLACES if bare(other.get(place, hostile_words(place))) not in shown] == []
    assert bare(TEXTS) in shown
    assert dangerous(page) == ordinary
    assert page.evaluate("window.pwned") is None
    assert watched.wrong == []
    assert watched.outside() == []
    page.context.close()


def test_what_a_person_saves_and_clicks_of_hostile_texts_is_inert(
    browser: Browser, hostile: RunDirectory, tmp_path: Path
) -> None:
    """No cell is a formula, no file leaves its folder, a picture's title is the text and no markup, and a
    point of the bridge names its reader as it is called."""
    watched = Watched(browser, hostile.path / "report.html")
    page = watched.page
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    cells = []
    for place in ("#knockout", "#conflict", "#bridge", "#patching", "#chain-maps"):
        path = saved(page, page.locator(f"{place} .save button", has_text="CSV").first, tmp_path)
        assert re.fullmatch(r"[\w.-]+\.csv", path.name)
        cells += [cell for row in csv.reader(path.read_text().splitlines()) for cell in row]
    assert "'" + bare(hostile_words("=reader B")) in [bare(cell) for cell in cells]
    assert "'" + bare(hostile_words("@reader C")) in [bare(cell) for cell in cells]
    assert [cell for cell in cells if re.match(r"[=+@-]", cell) and not re.fullmatch(r"[+-][\d.e-]+", cell)] == []
    assert any(cell.startswith("-0.") for cell in cells)
    paper = saved(page, page.locator("#patching figure:nth-child(1) .save button", has_text="PDF").last, tmp_path)
    assert paper.read_bytes() == b"%PDF of " + file_name(f"patching_{hostile_words('noise')}").encode()
    page.evaluate(
        "() => { const chart = document.querySelector('#bridge .chart'), data = chart.data[1]; "
        "chart.emit('plotly_click', { points: [{ data, customdata: data.customdata[0] }] }); }"
    )
    expect(page.locator("#pick-reader")).to_have_value(hostile_words("=reader B"))
    page.evaluate("Plotly.downloadImage = (picture) => { window.asked = picture; }")
    page.locator("#chain-maps .save button", has_text="PNG").first.click()
    title = page.evaluate(
        "async () => { const node = document.body.appendChild(document.createElement('div')); "
        "await Plotly.newPlot(node, asked.data, asked.layout, { displayModeBar: false }); return node.querySelector('.gtitle').textContent; }"
    )
    assert bare(title) == bare("reader " + hostile_words("reader A"))
    assert page.evaluate("window.pwned") is None
    assert watched.wrong == []
    assert watched.outside() == []
    page.context.close()


def in_order(page: Page, place: str) -> bool:
    """Whether the last text of the place runs from left to right."""
    return page.locator(place).first.evaluate(
        """(node) => {
          const text = [...node.childNodes].findLast((one) => one.nodeType === 3 && one.data.trim());
          const left = [...text.data.trimEnd()].map((_, i) => {
            const range = document.createRange();
            range.setStart(text, i);
            range.setEnd(text, i + 1);
            return range.getBoundingClientRect();
          });
          return left.every((box, i) => !i || box.top > left[i - 1].top || box.left >= left[i - 1].left);
        }"""
    )


def test_a_name_that_turns_the_direction_of_writing_turns_nothing_but_itself(browser: Browser, tmp_path: Path) -> None:
    run = fake_run.write_fake_run(tmp_path / "plain", n_problems=4)
    turned = RunDirectory.create(tmp_path / "turned", run.read_manifest()["config"])
    turned.write_chains([row | {"gold": "\u202e12", "author": "\u202eme"} for row in run.read_chains()])
    manifest = run.read_manifest()
    manifest["config"]["readers"] = [{"name": name, "model": "\u202emodel"} for name in fake_run.READERS]
    turned.write_estimates([*run.read_estimates(), Estimate("accuracy", "A", 4, 0.75, 0.5, 1.0, 0.5, "x")])
    turned.update_manifest(manifest | {"disagreements": []})
    for unit, meta in enumerate(run.read_unit_meta()):
        base = {"chain_id": meta["chain_id"], "reader": meta["reader"], "author": "\u202eme", "measure": "baseline"}
        turned.write_unit(f"{unit}", [Record(**base, problem_id="p", metric="correct", value=1.0)], meta)
    watched = Watched(browser, build_report(turned))
    for place in (".readers li .soft", "#chain-name", "#chain-gold"):
        assert in_order(watched.page, place), place
    watched.page.context.close()


def test_names_that_mean_something_to_a_browser_or_a_chart_are_names(browser: Browser, tmp_path: Path) -> None:
    """Every object has a member "constructor"; a number or a date on an axis would be drawn at its value."""
    names = ["constructor", "__proto__", "A", "7", "8", "1e3", "2024-01-01"]
    run = RunDirectory.create(tmp_path / "run", {"readers": names})
    chain = Chain("p", "gold", "How many?", (" 2 + 2 = 4.",), "\nSo", " 4").to_json()
    run.write_chains([chain])
    keys = {"problem_id": "p", "chain_id": chain["chain_id"], "author": "gold"}
    effect = Record(**keys, reader="A", measure="knockout", metric="delta_p", variant="masked", step=0, value=0.5)
    for name in names:
        rows = [Record(**keys, reader=name, measure="baseline", metric="correct", value=1.0)]
        edit = {"measure": "filler", "variant": "", "step": None, "seed": None, "steps": [" ..."], "answer": "5"}
        meta = {"reader": name, "chain_id": chain["chain_id"], "answer": "4", "edits": [edit]} if name == "A" else {}
        run.write_unit(name.strip("_"), [*rows, *([effect] if name == "A" else [])], meta)
    run.write_estimates([Estimate("dependence", name, 4, 0.5, 0.4, 0.6, 0.5, "x") for name in names[2:]])
    watched = Watched(browser, build_report(run), f"#chain={chain['chain_id']}&reader=constructor")
    page = watched.page
    expect(page.locator("#pick-reader")).to_have_value("constructor")
    expect(page.locator("#chain-steps tr").last.locator("td.n")).to_have_text(["–", "–", "4", "–", "–", "–", "–"])
    page.locator("#chain-edits summary").click()
    expect(page.locator("#chain-edits tr").last.locator("td.n")).to_have_text(
        ["all", "–", "–", "–", "5", "–", "–", "–", "–"]
    )
    page.locator("#strata .chart").scroll_into_view_if_needed()
    expect(page.locator("#strata .ytick text").nth(4)).to_be_attached()
    assert sorted(page.locator("#strata .ytick text").all_text_contents()) == sorted(names[2:])
    assert watched.wrong == []
    page.context.close()


def test_an_estimate_called_like_a_method_has_no_doubt_against_it(hostile: RunDirectory) -> None:
    assert "built-in method" not in (hostile.path / "report.html").read_text("utf-8")


def test_labels_are_cut_by_characters_and_show_what_a_picture_cannot_hold() -> None:
    assert label("漢" * 300).replace("<br>", "") == "漢" * 238 + " …"
    assert label("%{y} \x1b[31m\uffff") == "%&#123;y} ␛[31m\ufffd"


def test_a_paper_figure_is_looked_for_in_its_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "private.pdf").write_bytes(b"%PDF private")
    chain, variant = Chain("p", "gold", "How many?", (" 2 + 2 = 4.",), "\nSo", " 4").to_json(), "x/../../../private"
    run = RunDirectory.create(tmp_path / "run", {"readers": ["A"]})
    run.write_chains([chain])
    (run.figures / "patching_x").mkdir()
    cell = {"problem_id": "p", "chain_id": chain["chain_id"], "author": "gold", "reader": "A", "variant": variant}
    rows = [Record(**cell, measure="patching", metric="logit_diff", step=0, layer=0, site="s", value=1.0)]
    for end in ("base", "source"):
        rows.append(Record(**cell, measure="patching", metric=f"logit_diff_{end}", value=0.0))
    run.write_unit("unit", rows, {})
    page = build_report(run).read_text("utf-8")
    assert "x/../../../private" in page
    assert base64.b64encode(b"%PDF private").decode() not in page


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> dict[Words, Path]:
    """The page of two runs merged, and its twin of plain words."""
    found = {}
    for words in (hostile_words, plain_words):
        folder = tmp_path_factory.mktemp("merged")
        runs = []
        for seed, value in ((1, -0.5), (2, -0.3)):
            config = {
                "readers": [
                    {"name": words(name), "model": words("a model"), "adapter": words("ad")}
                    for name in ("base", "tuned")
                ],
                "labels": {"condition": words("a group"), "training_seed": words(f"seed {seed}")},
                "primary": ["filler/change"],
            }
            # a file's name ends at 255 bytes
            run = RunDirectory.create(folder / words(f"run {seed}").replace("/", "∕")[:200], config)
            run.write_chains([{"author": words("an author"), "problem_id": "p"}])
            arm = f"{words('tuned')}-{words('base')}/{words('an author')}"
            names = ("filler/change | both_correct", words("an estimate"))
            run.write_estimates(
                [Estimate(name, arm, 9, value, value - 1, value + 1, 0.5, words("a method")) for name in names]
            )
            run.add_exclusion(problem_id="p", stage=words("a stage"), reason=words("a reason"))
            runs.append(run)
        found[words] = build_merged(runs, [Path(words("not run").replace("/", "∕"))], folder / "out")
    return found


def test_hostile_names_of_merged_runs_stay_names(browser: Browser, merged: dict[Words, Path]) -> None:
    found = {}
    for words, unguarded in ((hostile_words, False), (hostile_words, True), (plain_words, False)):
        fragment = "#<img src=x onerror=window.pwned=1>"
        watched = Watched(browser, merged[words], fragment, shows="#primary .main-svg", bypass_csp=unguarded)
        page = watched.page
        seen = page.locator(".chart").evaluate(HOVER)
        shown = bare("".join([*seen, page.locator("body").text_content() or ""]))
        places = ["a model", "ad", "a group", "seed 1", "an estimate", "a stage", "a reason", "tuned", "base"]
        assert [place for place in places if bare(words(place)) not in shown] == []
        assert bare(words("run 1").replace("/", "∕")[:200]) in shown
        found[words, unguarded] = dangerous(page)
        assert page.evaluate("window.pwned") is None
        assert watched.wrong == []
        assert watched.outside() == []
        page.context.close()
    assert len({tuple(counted.items()) for counted in found.values()}) == 1


def test_a_notebook_shows_hostile_chains_and_maps_as_text(browser: Browser) -> None:
    """A notebook has no policy: escaping alone must do it."""
    found = {}
    for words in (hostile_words, plain_words):
        steps = tuple(words(f"step {j}") for j in range(2))
        chain = Chain(words("a problem"), "a", words("a question"), steps, words("a cue"), words("an answer"))
        effect = views.Effect("knockout", words("an effect"), words("a unit"), words("a meaning"))
        parts = [chain, ChainView(chain, words("a reader"), effect, pd.Series([0.1, np.nan]))]
        parts.append(Heatmap(chain, words("a reader"), words("a variant"), pd.DataFrame([[0.1], [0.2]], columns=[0])))
        page = browser.new_page()
        page.set_content("<!doctype html><title>notebook</title>" + "".join(part._repr_html_() for part in parts))
        page.locator("td, div").last.wait_for()
        shown = bare(page.locator("body").text_content() or "")
        places = [
            "a problem",
            "a question",
            "step 1",
            "a cue",
            "an answer",
            "an effect",
            "a unit",
            "a meaning",
            "a reader",
        ]
        assert [place for place in [*places, "a variant"] if bare(words(place)) not in shown] == []
        found[words] = dangerous(page)
        assert page.evaluate("window.pwned") is None
        page.close()
    assert found[hostile_words] == found[plain_words]


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A server on this machine, and what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        do_POST = do_GET  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


SLIPPED = {
    "script-src-elem": "<script>window.pwned=1</script><script src='URL/a.js'></script><script type=module>import 'URL/b.js'</script>",
    "script-src-attr": "<img src='data:,' onerror='window.pwned=2'><svg onload='window.pwned=3'></svg>",
    "style-src-elem": "<style>body { display: none }</style><link rel=stylesheet href='URL/a.css'>",
    "style-src-attr": "<div style='position:fixed;inset:0;background:url(URL/b.png)'>covers all</div>",
    "img-src": "<img src='URL/a.png'><picture><source srcset='URL/c.png'><img></picture>",
    "media-src": "<video src='URL/a.mp4' autoplay></video>",
    "frame-src": "<iframe src='URL/a.html'></iframe><iframe srcdoc='<script>parent.pwned=4</script>'></iframe>",
    "object-src": "<object data='URL/a.swf'></object><embed src='URL/b.swf'>",
    "base-uri": "<base href='URL/'>",
    "form-action": "<form id=slipped action='URL/form' method=post><input name=a value=b></form>",
}
"""Markup as it would stand in the file if escaping failed, by the directive that must stop it."""


def test_were_markup_to_slip_into_the_file_it_neither_runs_nor_loads_nor_sends(
    browser: Browser, plain: RunDirectory, tmp_path: Path, server: tuple[str, list[str]]
) -> None:
    address, asked = server
    text = (plain.path / "report.html").read_text("utf-8")
    slipped = "".join(SLIPPED.values()).replace("URL", address)
    (tmp_path / "slipped.html").write_text(text.replace("<main>", f"<main>{slipped}"), "utf-8")
    page = browser.new_context().new_page()
    page.add_init_script(NOTE)
    page.goto((tmp_path / "slipped.html").as_uri())
    expect(page.locator("#chain-steps tr").first).to_be_visible()
    page.evaluate("document.getElementById('slipped').submit()")
    page.wait_for_timeout(300)
    stopped = page.evaluate("window.stopped")
    assert set(stopped) == set(SLIPPED)
    assert page.evaluate("window.pwned") is None
    assert page.evaluate("document.baseURI") == page.url
    assert asked == []
    page.context.close()


NOTE = "window.stopped = []; document.addEventListener('securitypolicyviolation', (e) => stopped.push(e.effectiveDirective));"
SINKS = {
    "eval": ("eval('window.pwned=1')", "require-trusted-types-for"),
    "function": ("new Function('window.pwned=2')()", "require-trusted-types-for"),
    "timer": ("setTimeout('window.pwned=3', 0)", "require-trusted-types-for"),
    "html": ("document.body.innerHTML += '<img src=x onerror=window.pwned=4>'", "require-trusted-types-for"),
    "parsed": ("new DOMParser().parseFromString('<b>x</b>', 'text/html')", "require-trusted-types-for"),
    "script": (
        "{ const s = document.createElement('script'); s.textContent = 'window.pwned=5'; document.body.append(s); }",
        "require-trusted-types-for",
    ),
    "link": (
        "{ const a = document.createElement('a'); a.href = 'javascript:window.pwned=6'; document.body.append(a); a.click(); }",
        "script-src-elem",
    ),
    "fetch": ("fetch('URL/fetch').catch(() => 0)", "connect-src"),
    "beacon": ("navigator.sendBeacon('URL/beacon', 'x')", "connect-src"),
    "socket": ("new WebSocket('URL/socket'.replace('http', 'ws'))", "connect-src"),
    "picture": ("new Image().src = 'URL/picture.png'", "img-src"),
    "font": ("new FontFace('f', 'url(URL/font.woff)').load().catch(() => 0)", "font-src"),
    "worker": ("new Worker(URL.createObjectURL(new Blob([''])))", "require-trusted-types-for"),
    "base": ("{ const b = document.createElement('base'); b.href = 'URL/'; document.head.append(b); }", "base-uri"),
    "form": (
        "{ const f = document.createElement('form'); f.action = 'URL/form'; f.method = 'post'; document.body.append(f); f.submit(); }",
        "form-action",
    ),
    "frame": (
        "{ const f = document.createElement('iframe'); f.src = 'URL/frame'; document.body.append(f); }",
        "frame-src",
    ),
    "style": (
        "{ const s = document.createElement('style'); s.append('*{color:red}'); document.head.append(s); }",
        "style-src-elem",
    ),
}
"""What a script of the page could be misled to do, and the directive that must stop it."""


def test_the_pages_own_scripts_cannot_be_misled_to_run_or_send_text(
    browser: Browser, plain: RunDirectory, server: tuple[str, list[str]]
) -> None:
    address, asked = server
    page = browser.new_context().new_page()
    page.add_init_script(NOTE)
    page.goto((plain.path / "report.html").as_uri())
    expect(page.locator("#chain-steps tr").first).to_be_visible()
    assert page.evaluate("window.stopped") == []
    found = {}
    for name, (code, _) in SINKS.items():
        code = code.replace("'URL/", f"'{address}/").replace("(URL/", f"({address}/")
        found[name] = page.evaluate(
            f"() => new Promise((done) => setTimeout(() => {{ stopped.length = 0; try {{ {code} }} catch (error) {{ 0; }} "
            "setTimeout(() => done(stopped[0]), 50); }, 0))"
        )
    assert found == {name: directive for name, (_, directive) in SINKS.items()}
    assert page.evaluate("window.pwned") is None
    assert page.evaluate("document.baseURI") == page.url
    assert asked == []
    page.context.close()
