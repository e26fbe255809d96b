"""The report as a parser sees it: nothing a model wrote is markup or code, and every section holds the run's numbers."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cotfaith_mech import views
from cotfaith_mech.records import RunDirectory
from cotfaith_mech.report import build_report, maps
from cotfaith_mech.report import charts as report_charts
from cotfaith_mech.report.build import number, p_value

from .fake_run import LAYERS, N_PROBLEMS, N_STEPS, READERS, write_fake_run

HOSTILE = "</script><img src=x onerror=alert(1)><script>alert(2)</script>{{7*7}}{% raw %}<!--\u2028]]>&amp;\"'"


class Page(HTMLParser):
    """Tags, attributes, scripts and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self._raw = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._raw = tag in ("script", "style")
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self._raw = False

    def handle_data(self, data: str) -> None:
        if self._raw and self.scripts:
            attributes, text = self.scripts.pop()
            self.scripts.append((attributes, text + data))
        elif not self._raw:
            self.text += data

    @property
    def running(self) -> list[str]:
        return [text for attributes, text in self.scripts if attributes.get("type") != "text/plain"]

    @property
    def data(self) -> dict[str, Any]:
        return unpacked(next(text for attributes, text in self.scripts if attributes.get("id") == "page-data"))

    @property
    def chains(self) -> list[dict[str, Any]]:
        return [unpacked(text) for attributes, text in self.scripts if attributes.get("class") == "chain-data"]

    @property
    def policy(self) -> str:
        return next(a["content"] or "" for tag, a in self.tags if a.get("http-equiv") == "Content-Security-Policy")


def unpacked(block: str) -> dict[str, Any]:
    return json.loads(gzip.decompress(base64.b64decode(block)))


def page_of(run: RunDirectory) -> Page:
    return Page(build_report(run).read_text("utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return write_fake_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def page(run: RunDirectory) -> Page:
    return page_of(run)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(write_fake_run(tmp_path_factory.mktemp("runs") / "hostile", hostile=HOSTILE))


def test_hostile_text_stays_text(page: Page, hostile: Page) -> None:
    assert sorted({tag for tag, _ in hostile.tags}) == sorted({tag for tag, _ in page.tags})
    assert not [
        tag for tag, attributes in hostile.tags if tag == "img" or any(name.startswith("on") for name in attributes)
    ]
    assert len(hostile.scripts) == len(page.scripts)
    assert HOSTILE in hostile.text
    assert all(HOSTILE in chain["question"] for chain in hostile.chains)
    assert "{{7*7}}" in hostile.text


def test_the_text_stands_before_what_takes_time_to_read(run: RunDirectory) -> None:
    page = build_report(run).read_text("utf-8")
    assert page.index("</main>") < page.index("chain-data") < page.rindex("plotly.js v")


def test_hostile_text_reaches_plotly_without_its_markup(hostile: Page) -> None:
    chart = hostile.chains[0]["maps"]["denoise"]["charts"][0]
    drawn = "".join(cell for row in chart["data"][0]["text"] for cell in row)
    assert "<img" not in drawn
    assert "&lt;img" in drawn


def test_the_policy_admits_exactly_the_scripts_of_the_page(page: Page) -> None:
    hashes = {f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in page.running}
    directives = dict(part.strip().split(" ", 1) for part in page.policy.split(";"))
    assert set(directives["script-src"].split()) == hashes
    assert len(hashes) == 3
    assert directives["default-src"] == "'none'"


def test_the_page_asks_for_nothing_from_outside(page: Page) -> None:
    links = [a[key] or "" for _, a in page.tags for key in ("src", "href") if key in a]
    assert links
    assert all(link.startswith("#") for link in links)
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "base", "form")]


def test_every_chart_has_its_place_and_every_place_its_chart(page: Page) -> None:
    places = [attributes["data-chart"] for _, attributes in page.tags if "data-chart" in attributes]
    assert sorted(filter(None, places)) == sorted(page.data["charts"])
    assert len(places) == 1 + 1 + 3 + 1 + 2 * 5 + 1 + 3 + 1


def test_maps_are_centred_at_zero_and_hold_the_difference(page: Page) -> None:
    charts = {
        chart["title"]: chart["data"][0] for chart in page.data["charts"].values() if chart["pdf"] == "patching_denoise"
    }
    assert list(charts) == ["reader A", "reader B", "reader C", "B − A", "C − A"]
    assert all(trace["zmin"] == -trace["zmax"] for trace in charts.values())
    assert charts["reader A"]["zmax"] == charts["B − A"]["zmax"]
    gap = np.array(charts["reader B"]["z"]) - np.array(charts["reader A"]["z"])
    np.testing.assert_allclose(charts["B − A"]["z"], gap, atol=1e-3)
    assert "blocks.5.hook_resid_pre" in charts["B − A"]["text"][0][1]


def test_the_cells_of_a_map_carry_unit_interval_number_and_recovery(run: RunDirectory, page: Page) -> None:
    charts = {chart["title"]: chart for chart in page.data["charts"].values() if chart["pdf"] == "patching_denoise"}
    cells = views.aligned_patches(run.read_records(), run.read_chains())
    own = cells[(cells.reader == "B") & (cells.variant == "denoise")].set_index(["role", "layer"])
    one = own.loc["other steps", LAYERS[2]]
    found = {name: values[1][2] for name, values in charts["reader B"]["cells"].items()}
    assert found.pop("site") == "blocks.10.hook_resid_pre"
    expected = {"ci_low": one["low"], "ci_high": one["high"], "n": N_PROBLEMS, "recovered": one["recovered"]}
    assert found == pytest.approx(expected, rel=1e-4)
    assert charts["reader B"]["unit"] == "logits"
    assert charts["B − A"]["cells"]["n"] == [[N_PROBLEMS] * len(LAYERS)] * 2


def test_a_probability_is_drawn_from_zero_to_one() -> None:
    rows = [{"reader": "A", "layer": layer, "x": x, "value": 0.9, "n": 4} for layer in (0, 1) for x in (0.0, 0.5, 1.0)]
    (chart,) = maps.trace_charts(pd.DataFrame(rows), ["A"])
    (trace,) = chart["data"]
    assert (trace["zmin"], trace["zmax"]) == (0, 1.0)
    assert trace["colorbar"]["title"]["text"] == "probability"
    assert trace["colorscale"][0] == [0, maps.BLUES[0]]
    assert chart["cells"]["n"] == [[4, 4]] * 3
    (effects,) = maps.attribution_charts(pd.DataFrame(rows).rename(columns={"x": "head"}), ["A"])["charts"]
    assert (effects["data"][0]["zmin"], effects["data"][0]["zmax"]) == (-0.9, 0.9)
    assert effects["data"][0]["colorbar"]["title"]["text"] == "logits"


def test_the_paper_figure_stands_under_the_chains_it_was_drawn_of_alone(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", authors=("gold", "A"))
    run.figures.mkdir(exist_ok=True)
    (run.figures / "curves.pdf").write_bytes(b"%PDF of gold")
    page = page_of(run)
    curves = [chart for name, chart in page.data["charts"].items() if name.startswith("curves")]
    assert [chart["pdf"] for chart in curves] == ["curves"] * 3 + [""] * 3
    assert page.text.index("Chains of gold") < page.text.index("Chains of A")
    kept = {a["data-pdf"]: base64.b64decode(text) for a, text in page.scripts if "data-pdf" in a}
    assert kept == {"curves": b"%PDF of gold"}


def test_maps_of_chains_are_saved_under_names_of_their_own(page: Page) -> None:
    groups = [group for chain in page.chains for group in (*chain["maps"].values(), chain["heads"])]
    names = [f"{chart['id']} {chart['title']}" for group in groups for chart in group["charts"]]
    assert len(names) == len(set(names)) == N_PROBLEMS * 3 * len(READERS)


def test_every_difference_of_the_forest_says_on_how_many_problems_it_rests(page: Page) -> None:
    (forest,) = (chart for name, chart in page.data["charts"].items() if name.startswith("forest"))
    assert [row[2] for trace in forest["data"] for row in trace["customdata"]] == [N_PROBLEMS] * 6


def test_the_chain_view_has_steps_effects_answers_and_edits(run: RunDirectory, page: Page) -> None:
    chains = page.data["chains"]
    assert [chain["chain_id"] for chain in page.chains] == [chain["chain_id"] for chain in chains]
    assert len(chains) == N_PROBLEMS
    assert {effect["key"] for effect in page.data["effects"]} == {"knockout", "mistake", "patch", "direct"}
    records = run.read_records()
    for chain in chains:
        assert all(len(values[reader]) == N_STEPS for values in chain["effects"].values() for reader in READERS)
        assert set(chain["answers"]) == set(READERS)
    rows = records[
        (records.chain_id == chains[2]["chain_id"]) & (records.reader == "B") & (records.variant == "masked")
    ]
    expected = rows[rows.metric == "delta_p"].sort_values("step")["value"]
    np.testing.assert_allclose(chains[2]["effects"]["knockout"]["B"], expected, rtol=1e-4)


def test_an_edit_all_readers_saw_stands_once_with_every_answer(page: Page) -> None:
    edits = page.chains[0]["edits"]
    assert [edit["test"] for edit in edits] == ["Early termination", "Mistake", "Filler"]
    assert all(set(edit["answers"]) == set(READERS) for edit in edits)
    assert edits[0]["answers"]["A"] == " 17"


def test_verdict_primary_outcomes_exclusions_and_manifest_are_on_the_page(page: Page) -> None:
    assert "bypass, the answer moves from the chain to the question" in page.text
    assert "−0.780" in page.text
    assert "[−0.910, −0.650]" in page.text
    assert ".012" in page.text
    assert "the chain has no step" in page.text
    assert '"study": 7' in page.text


def test_a_failed_check_stands_above_everything(tmp_path: Path, page: Page) -> None:
    failed = page_of(write_fake_run(tmp_path / "run", checks_pass=False))
    alert, title = (
        next(i for i, (tag, a) in enumerate(failed.tags) if test(tag, a))
        for test in (lambda t, a: a.get("role") == "alert", lambda t, a: t == "h1")
    )
    assert alert < title
    assert "transformer_lens: found 0.400, allowed 1.0e-04" in failed.text
    assert not [a for _, a in page.tags if a.get("role") == "alert"]


def test_a_run_of_one_reader_without_estimates_says_not_compared(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", {"readers": ["A"]})
    run.write_chains([])
    text = page_of(run).text
    assert "Not compared" in text
    assert "This run carries no checks." in text
    assert "Nothing was left out." in text


def test_building_twice_gives_the_same_page(run: RunDirectory) -> None:
    first = build_report(run).read_bytes()
    assert build_report(run).read_bytes() == first
    assert not list(run.path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (float("nan"), "–"), (None, "–"), (3e-5, "3.0e-05"), (-0.25, "−0.250")]
)
def test_numbers_in_tables(value: float | None, text: str) -> None:
    assert number(value) == text


def test_p_values_in_tables() -> None:
    assert [p_value(p) for p in (0.0004, 0.0312, float("nan"))] == ["< .001", ".031", "–"]


def test_numbers_in_charts_are_json() -> None:
    assert report_charts.numbers([1, np.float64(0.1234567), float("nan"), None, float("inf")]) == [
        1.0,
        0.12346,
        None,
        None,
        None,
    ]


def test_labels_escape_and_wrap() -> None:
    assert report_charts.label("<b>a</b> & b") == "&lt;b&gt;a&lt;/b&gt; &amp; b"
    assert report_charts.label("one two", width=4) == "one<br>two"
    assert report_charts.label("word " * 200).endswith("…")


def test_exchanged_layers_are_charted_in_both_directions() -> None:
    """One chart a direction: two parts of the rows with their bands, and a dash for each model as it is."""
    rows = [
        {
            "reader": "B",
            "into": into,
            "rows": part,
            "layer": layer,
            "value": 0.1 * layer,
            "low": 0.0,
            "high": 1.0,
            "n": 4,
        }
        for into in ("base", "tuned")
        for part in ("chain_rows", "cue_rows")
        for layer in (0, 1, 2)
    ]
    own = {"rows": "own", "layer": np.nan, "low": np.nan, "high": np.nan, "n": 4, "reader": "B"}
    table = pd.DataFrame([*rows, {**own, "into": "base", "value": 0.9}, {**own, "into": "tuned", "value": 0.4}])
    drawn = report_charts.cross_model_charts(table, ["A", "B"])
    assert [chart["title"] for chart in drawn] == ["one layer of A in B", "one layer of B in A"]
    for chart, dashes in zip(drawn, ([0.4, 0.9], [0.9, 0.4]), strict=True):
        lines = [trace for trace in chart["data"] if trace.get("line", {}).get("dash") == "dash"]
        assert [trace["y"][0] for trace in lines] == dashes
        assert [trace["x"] for trace in lines] == [[0, 2], [0, 2]]
        assert len(chart["data"]) == 2 * 3 + 2
