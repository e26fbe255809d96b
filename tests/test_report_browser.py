"""The report in a real browser: what a person hovers, clicks, filters, links to and saves; nothing leaves the file."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from cotfaith_mech import views
from cotfaith_mech.figures import draw_figures
from cotfaith_mech.records import RunDirectory
from cotfaith_mech.report import build_merged, build_report
from cotfaith_mech.stats import Estimate

from .fake_run import write_fake_run
from .test_merge import kept
from .test_report import HOSTILE

CHROMIUM = shutil.which("chromium")
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
N_CHAINS = 9
pytestmark = pytest.mark.skipif(
    CHROMIUM is None and "CI" not in os.environ, reason="no chromium on this machine: apt-get install chromium"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = write_fake_run(tmp_path_factory.mktemp("runs") / "demo", n_problems=N_CHAINS)
    draw_figures(run)
    build_report(run)
    return run


class Watched:
    """A page that notes whatever a report must never do: ask for something, complain, or open a dialogue."""

    def __init__(
        self, browser: Browser, path: Path, fragment: str = "", *, shows: str = "#chain-steps tr", **context: Any
    ) -> None:
        self.page: Page = browser.new_context(**{"viewport": WIDE, **context}).new_page()
        self.wrong: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: self.wrong.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.url = path.resolve().as_uri() + fragment
        self.page.goto(self.url)
        expect(self.page.locator(shows).first).to_be_visible()

    def outside(self) -> list[str]:
        own = self.url.split("#")[0]
        return [url for url in self.requests if not url.startswith(("data:", "blob:", own))]


@pytest.fixture
def watched(browser: Browser, run: RunDirectory) -> Iterator[Watched]:
    watched = Watched(browser, run.path / "report.html")
    yield watched
    watched.page.context.close()
    assert watched.wrong == []
    assert watched.outside() == []


def open_section(page: Page, name: str) -> None:
    page.evaluate("name => document.getElementById(name).scrollIntoView()", name)
    expect(page.locator(f"#{name} .main-svg").first).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["1280", "390"])
def test_every_chart_is_drawn_quietly_and_nothing_is_wider_than_the_page(
    browser: Browser, run: RunDirectory, viewport: Any, scheme: Any
) -> None:
    watched = Watched(browser, run.path / "report.html", viewport=viewport, color_scheme=scheme)
    page = watched.page
    for name in page.eval_on_selector_all("section", "nodes => nodes.map(node => node.id)"):
        page.evaluate("name => document.getElementById(name).scrollIntoView({behavior: 'instant'})", name)
    for place in page.locator("main [data-chart]").all():
        place.scroll_into_view_if_needed()
        expect(place.locator(".main-svg").first).to_be_attached()
    assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    ink = page.evaluate("getComputedStyle(document.querySelector('#curves .xtick text')).fill")
    bright = [sum(map(int, text[4:-1].split(","))) / 765 for text in (ground, ink)]
    assert (bright[0] > 0.9 and bright[1] < 0.2) if scheme == "light" else (bright[0] < 0.2 and bright[1] > 0.8)
    assert watched.wrong == []
    assert watched.outside() == []
    page.context.close()


def test_changing_to_dark_redraws_what_is_there(watched: Watched) -> None:
    open_section(watched.page, "curves")
    watched.page.emulate_media(color_scheme="dark")
    tick = watched.page.locator("#curves .xtick text").first
    expect(tick).to_have_css("fill", "rgb(232, 230, 225)")


def test_hover_on_a_map_tells_value_interval_and_site(watched: Watched, run: RunDirectory) -> None:
    open_section(watched.page, "patching")
    watched.page.locator("#patching .nsewdrag").first.hover(position={"x": 5, "y": 5})
    hover = watched.page.locator("#patching .hoverlayer").first
    expect(hover).to_contain_text("true step")
    cells = views.aligned_patches(run.read_records(), run.read_chains()).set_index(
        ["reader", "variant", "role", "layer"]
    )
    cell = cells.loc["A", "denoise", "true step", 0]
    expect(hover).to_contain_text(f"95% [{cell.low:+.3f}, {cell.high:+.3f}], {N_CHAINS} problems")
    expect(hover).to_contain_text("blocks.0.hook_resid_pre")
    expect(hover).to_contain_text(f"{cell.effect:+.3f}")


def test_a_point_of_the_bridge_opens_its_chain(watched: Watched) -> None:
    page = watched.page
    open_section(page, "bridge")
    point = page.locator("#bridge .scatterlayer .point").nth(17)
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    named = page.locator("#bridge .hoverlayer text.nums").first.text_content() or ""
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    expect(page.locator("#chain-name")).to_have_text(f"{named.split(',')[0]}, chain of gold")
    assert "chain=" in page.url


def test_disagreements_stand_before_the_scatter_and_open_their_chain(watched: Watched) -> None:
    page = watched.page
    link = page.locator("#bridge table a").first
    link.click()
    expect(page.locator("#chain-name")).to_contain_text("p03")
    expect(page.locator("#chain-gold")).to_contain_text("behaviour and mechanism disagree (B)")
    assert page.locator("#pick-reader").input_value() == "B"
    order = "(a, b) => a.compareDocumentPosition(b) & Node.DOCUMENT_POSITION_FOLLOWING"
    assert page.evaluate(
        f"({order})(document.querySelector('#bridge table'), document.querySelector('#bridge figure'))"
    )


def test_a_link_opens_its_chain_reader_and_effect(browser: Browser, run: RunDirectory) -> None:
    chain = run.read_chains()[7]
    fragment = f"#chain={chain['chain_id']}&reader=C&effect=mistake"
    watched = Watched(browser, run.path / "report.html", fragment)
    expect(watched.page.locator("#chain-name")).to_have_text(f"{chain['problem_id']}, chain of gold")
    expect(watched.page.locator("#chain-question")).to_have_text(chain["question"])
    picked = [watched.page.locator(f"#pick-{name}").input_value() for name in ("reader", "effect")]
    assert picked == ["C", "mistake"]
    expect(watched.page.locator("#chain")).to_be_focused()
    assert watched.wrong == []
    watched.page.context.close()


def listed(page: Page, column: int) -> list[str]:
    return page.locator(f"#chain-list tr td:nth-child({column})").all_text_contents()


def test_chains_are_sorted_and_filtered_by_an_effect(watched: Watched, run: RunDirectory) -> None:
    page = watched.page
    effects = views.step_effects(run.read_records())
    own = effects[(effects.effect == "knockout") & (effects.reader == "B")]
    sizes = own.groupby("problem_id")["value"].agg(lambda values: values.abs().max()).sort_values(ascending=False)
    page.locator("#pick-reader").select_option("B")
    page.locator("#pick-order").select_option("down")
    assert listed(page, 1) == list(sizes.index)
    limit = float(sizes.iloc[3] + sizes.iloc[4]) / 2
    page.locator("#least").fill(str(limit))
    assert listed(page, 1) == list(sizes.index[:4])
    assert page.locator("#chain-count").text_content() == f"4 of {N_CHAINS} chains"
    page.locator("#least").fill("")
    page.locator("#pick-order").select_option("up")
    assert listed(page, 1) == list(sizes.index[::-1])
    page.locator("#search").fill("P07")
    assert listed(page, 1) == ["p07"]
    page.locator("#search").fill("")
    page.locator("#pick-kind").select_option("apart")
    assert sorted(listed(page, 1)) == ["p01", "p03"]


def many_chains(folder: Path, n: int) -> Path:
    """The page of a run of `n` chains and no records."""
    chain = {"question": "How many?", "prompt": "", "cue": "So", "answer": " 4", "author": "gold"}
    run = RunDirectory.create(folder / "run", {"readers": ["A"]})
    rows = [{"problem_id": f"p{i}", "chain_id": f"c{i}", "steps": ["2 + 2 = 4."]} for i in range(n)]
    run.write_chains([chain | row for row in rows])
    return build_report(run)


def test_a_long_list_opens_in_pages(browser: Browser, tmp_path: Path) -> None:
    watched = Watched(browser, many_chains(tmp_path, 55), "#chain=c54")
    expect(watched.page.locator("#chain-name")).to_have_text("p54, chain of gold")
    assert len(listed(watched.page, 1)) == 50
    watched.page.locator("#more").click()
    assert listed(watched.page, 1) == [f"p{i}" for i in range(55)]
    expect(watched.page.locator("#more")).to_be_hidden()
    assert watched.wrong == []
    watched.page.context.close()


def test_the_chain_view_by_keyboard(watched: Watched) -> None:
    page = watched.page
    page.keyboard.press("j")
    expect(page.locator("#chain-name")).to_contain_text("p01")
    page.keyboard.press("j")
    expect(page.locator("#chain-name")).to_contain_text("p02")
    page.keyboard.press("k")
    expect(page.locator("#chain-name")).to_contain_text("p01")
    page.locator("#search").focus()
    page.keyboard.press("j")
    expect(page.locator("#chain-name")).to_contain_text("p01")
    page.locator("#search").fill("")
    page.locator("#chain-list a").nth(4).focus()
    page.keyboard.press("Enter")
    expect(page.locator("#chain-name")).to_contain_text("p04")


def test_tokens_arrows_and_edits_of_a_chain(watched: Watched, run: RunDirectory) -> None:
    page, chain = watched.page, run.read_chains()[0]
    words = chain["steps"][0].split(" ")
    token = page.locator("#chain-steps tr").first.locator(".token").nth(1)
    assert token.get_attribute("title") == f'token 2 of {len(words)}: "{words[1]} "'
    effects = views.step_effects(run.read_records())
    own = effects[(effects.effect == "direct") & (effects.reader == "A")]
    sums = own[own.chain_id == chain["chain_id"]].sort_values("step")["value"]
    titles = page.locator(".arrows path title").all_text_contents()
    assert titles == [f"step {j + 1}: {value:.3f} logits straight to the answer" for j, value in enumerate(sums)]
    widths = [float(path.get_attribute("stroke-width") or "0") for path in page.locator(".arrows path[stroke]").all()]
    assert sorted(range(4), key=widths.__getitem__) == sorted(range(4), key=sums.abs().tolist().__getitem__)
    page.locator("#chain-edits summary", has_text="Mistake").click()
    expect(page.locator("#chain-edits mark")).to_have_text([chain["steps"][1].replace("=", "= 1"), " ..." * 20])
    expect(page.locator("#chain-heads .main-svg").first).to_be_attached()


def test_a_figure_is_saved_as_png_pdf_and_csv(watched: Watched, run: RunDirectory, tmp_path: Path) -> None:
    page = watched.page
    open_section(page, "patching")
    saved = {}
    for kind in ("PNG", "PDF", "CSV"):
        with page.expect_download() as download:
            page.locator("#patching .save button", has_text=kind).first.click()
        saved[kind] = tmp_path / download.value.suggested_filename
        download.value.save_as(saved[kind])
    picture = imread(saved["PNG"])
    assert picture.shape[0] > 400
    assert picture[..., :3].std() > 0.05
    assert picture[0, 0, :3].min() == 1
    assert saved["PDF"].read_bytes() == (run.figures / "patching_denoise.pdf").read_bytes()
    rows = list(csv.DictReader(saved["CSV"].read_text().splitlines()))
    cells = views.aligned_patches(run.read_records(), run.read_chains())
    own = cells[(cells.reader == "A") & (cells.variant == "denoise")].set_index(["role", "layer"])["effect"]
    assert {(row["row"], int(row["layer"])): pytest.approx(float(row["value"]), rel=1e-4) for row in rows} == dict(own)


def test_the_curves_csv_holds_the_intervals(watched: Watched, run: RunDirectory, tmp_path: Path) -> None:
    open_section(watched.page, "curves")
    with watched.page.expect_download() as download:
        watched.page.locator("#curves .save button", has_text="CSV").first.click()
    download.value.save_as(tmp_path / "curve.csv")
    rows = list(csv.DictReader((tmp_path / "curve.csv").read_text().splitlines()))
    curves = views.curves(run.read_records(), run.read_chains())
    own = curves[curves.measure == "early_termination"]
    found = [[float(row[key]) for key in ("interval_low", "interval_high", "problems")] for row in rows]
    assert found == [pytest.approx(row, abs=1e-4) for row in own[["low", "high", "n"]].to_numpy(float).tolist()]
    assert [row["series"] for row in rows] == own["reader"].tolist()


def saved(page: Page, button: Locator, folder: Path) -> Path:
    with page.expect_download() as download:
        button.click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def test_a_figure_without_a_paper_version_is_saved_as_a_pdf_of_itself(watched: Watched, tmp_path: Path) -> None:
    buttons = watched.page.locator("#chain-maps figure").nth(1).locator(".save button")
    expect(watched.page.locator("#chain-maps .main-svg").nth(1)).to_be_attached()
    pdf, png = (saved(watched.page, buttons.filter(has_text=kind), tmp_path) for kind in ("PDF", "PNG"))
    assert pdf.stem == png.stem
    found = pdf.read_bytes()
    picture = imread(io.BytesIO(found[found.index(b"\xff\xd8") :]), format="jpeg") / 255
    drawn = imread(png)[..., :3]
    assert picture.shape == drawn.shape
    assert abs(picture - drawn).mean() < 0.01
    assert drawn.std() > 0.05
    start = int(found.split(b"startxref\n")[1].split(b"\n")[0])
    rows = found[start:].split(b"\n")[3:8]
    assert [found[int(row[:10]) :].split(b"\n")[0] for row in rows] == [b"%d 0 obj" % n for n in range(1, 6)]


def test_saved_maps_of_chains_have_names_of_their_own_and_say_what_each_cell_is(
    watched: Watched, run: RunDirectory, tmp_path: Path
) -> None:
    names, chains = [], run.read_chains()
    for number in (0, 1):
        watched.page.locator("#chain-list a").nth(number).click()
        expect(watched.page.locator("#chain-name")).to_contain_text(chains[number]["problem_id"])
        for button in watched.page.locator("#chain-maps .save button", has_text="CSV").all():
            names.append(saved(watched.page, button, tmp_path))
    assert len({path.name for path in names}) == len(names) == 2 * 2 * 3
    row = next(csv.DictReader(names[0].read_text().splitlines()))
    assert list(row) == ["step", "layer", "value", "unit", "ci_low", "ci_high", "n", "recovered", "site", "text"]
    assert (row["unit"], row["site"], row["text"]) == (
        "logits",
        "blocks.0.hook_resid_pre",
        chains[0]["steps"][0].strip(),
    )


def test_the_saved_cells_of_a_mean_map_carry_interval_number_and_recovery(
    watched: Watched, run: RunDirectory, tmp_path: Path
) -> None:
    open_section(watched.page, "patching")
    button = watched.page.locator("#patching .save button", has_text="CSV").first
    rows = list(csv.DictReader(saved(watched.page, button, tmp_path).read_text().splitlines()))
    cells = views.aligned_patches(run.read_records(), run.read_chains())
    own = cells[(cells.reader == "A") & (cells.variant == "denoise")].set_index(["role", "layer"])
    for row in rows:
        one = own.loc[row["row"], int(row["layer"])]
        found = [float(row[name]) for name in ("ci_low", "ci_high", "n", "recovered")]
        assert found == pytest.approx([one["low"], one["high"], N_CHAINS, one["recovered"]], rel=1e-4)
        assert (row["unit"], row["site"]) == ("logits", one["site"])
    assert len(rows) == len(own)


def test_the_saved_forest_counts_its_problems(watched: Watched, tmp_path: Path) -> None:
    open_section(watched.page, "primary")
    button = watched.page.locator("#primary .save button", has_text="CSV")
    rows = list(csv.DictReader(saved(watched.page, button, tmp_path).read_text().splitlines()))
    assert [row["problems"] for row in rows] == ["6"] * 6


def test_a_link_to_a_chain_that_is_not_there_says_so(browser: Browser, run: RunDirectory) -> None:
    watched = Watched(browser, run.path / "report.html", "#chain=nosuch")
    missing = watched.page.locator("#chain-missing")
    expect(missing).to_have_text("The chain “nosuch” is not in this report.")
    expect(missing).to_be_visible()
    watched.page.locator("#chain-list a").nth(1).click()
    expect(missing).to_be_hidden()
    watched.page.context.close()


def test_arrows_are_explained_only_where_they_are_drawn(browser: Browser, run: RunDirectory, tmp_path: Path) -> None:
    for path, n_arrows in ((run.path / "report.html", 1), (many_chains(tmp_path, 1), 0)):
        watched = Watched(browser, path)
        assert watched.page.locator(".arrows").count() == n_arrows
        assert watched.page.get_by_text("Arrows: direct contribution").is_visible() == bool(n_arrows)
        watched.page.context.close()


def test_no_text_of_a_chart_is_cut_off_on_a_narrow_screen(browser: Browser, tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run")
    run.write_estimates(
        [replace(estimate, arm=f"{estimate.arm}/supplied by base") for estimate in run.read_estimates()]
    )
    watched = Watched(browser, build_report(run), viewport=NARROW)
    places = watched.page.locator("main [data-chart]").all()
    for place in places:
        place.scroll_into_view_if_needed()
        expect(place.locator(".main-svg").first).to_be_attached()
        frame = place.bounding_box()
        assert frame is not None
        for title in place.locator(".xtitle, .ytitle, .xtick text, .ytick text, .legendtext").all():
            box = title.bounding_box()
            assert box is not None
            assert box["x"] >= frame["x"] - 1, title.text_content()
            assert box["x"] + box["width"] <= frame["x"] + frame["width"] + 1, title.text_content()
    watched.page.context.close()


@pytest.fixture(scope="module")
def merged_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, runs = tmp_path_factory.mktemp("merged"), []
    for condition in ("answers", "chains"):
        for seed, value in ((1, -0.5), (2, -0.3)):
            one = kept(folder, condition, seed, value)
            manifest = one.read_manifest()
            one.update_manifest(manifest | {"config": manifest["config"] | {"primary": ["filler/change"]}})
            one.write_chains([{"author": "supplied", "problem_id": "p"}])
            more = [Estimate(f"knockout/step{i}", "tuned", 9, 0.1, 0.0, 0.2, 0.5, "x") for i in range(3)]
            one.write_estimates([*one.read_estimates(), *more])
            runs.append(one)
    return build_merged(runs, [], folder / "out")


@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["1280", "390"])
def test_the_merged_page_draws_filters_and_saves(
    browser: Browser, merged_page: Path, viewport: Any, tmp_path: Path
) -> None:
    watched = Watched(browser, merged_page, shows="#primary .main-svg", viewport=viewport)
    page = watched.page
    assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
    assert page.locator("nav a").evaluate_all("nodes => nodes.every(a => document.querySelector(a.hash))")
    assert page.locator("table").evaluate_all("nodes => nodes.every(node => node.closest('.scroll'))")
    rows = list(csv.DictReader(saved(page, page.get_by_role("button", name="CSV"), tmp_path).read_text().splitlines()))
    means = {row["series"]: (row["tuned minus base"], row["problems"]) for row in rows if row["label"] == ""}
    assert means == {"answers": ("-0.4", "9"), "chains": ("-0.4", "9")}
    assert [row["tuned minus base"] for row in rows if row["label"] == "seed 1"] == ["-0.5", "-0.5"]
    pdf = saved(page, page.get_by_role("button", name="PDF"), tmp_path)
    assert pdf.read_bytes() == (merged_page.parent / "forest.pdf").read_bytes()
    page.locator("#filter").fill("knockout chains")
    assert page.locator("#filter-count").text_content() == "3 estimates"
    assert page.locator("tr.estimate:visible").count() == 3
    page.emulate_media(color_scheme="dark")
    expect(page.locator("#primary .xtick text").first).to_have_css("fill", "rgb(232, 230, 225)")
    assert watched.wrong == []
    assert watched.outside() == []
    page.context.close()


def test_printing_shows_what_the_screen_folds(watched: Watched) -> None:
    watched.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    for place in watched.page.locator("main [data-chart]").all():
        expect(place.locator(".main-svg").first).to_be_attached()
    assert watched.page.locator("details:not([open])").count() == 0
    watched.page.emulate_media(media="print")
    expect(watched.page.locator("nav")).to_be_hidden()


def test_estimates_are_filtered(watched: Watched) -> None:
    page = watched.page
    page.locator("#filter").fill("knockout B-A")
    assert page.locator("#filter-count").text_content() == "2 estimates"
    names = page.locator("#estimates tr.estimate:visible td:first-child").all_text_contents()
    assert sorted(names) == ["bridge/mistake~knockout/top1", "knockout/true_step/delta_p | both_correct"]


def test_hostile_texts_stay_texts(browser: Browser, tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "hostile", hostile=HOSTILE)
    watched = Watched(browser, build_report(run))
    page = watched.page
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    for place in page.locator("main [data-chart]").all():
        expect(place.locator(".main-svg").first).to_be_attached()
    expect(page.locator("#chain-question")).to_contain_text("onerror=alert(1)")
    assert page.locator("img").count() == 0
    assert page.locator("script:not([type])").count() == 3
    assert watched.wrong == []
    assert watched.outside() == []
    page.context.close()


def test_a_chain_is_unpacked_only_when_it_is_opened(watched: Watched) -> None:
    """What a chain costs is paid when it is looked at: blocks are not touched before."""
    page = watched.page
    page.evaluate(
        "() => { window.read = []; document.querySelectorAll('.chain-data').forEach((node, i) => "
        "Object.defineProperty(node, 'textContent', { get: () => { window.read.push(i); return node.firstChild.data; } })); }"
    )
    page.locator("#chain-list a").nth(8).click()
    expect(page.locator("#chain-name")).to_contain_text("p08")
    page.locator("#chain-list a").nth(3).click()
    expect(page.locator("#chain-name")).to_contain_text("p03")
    page.locator("#chain-list a").nth(8).click()
    expect(page.locator("#chain-name")).to_contain_text("p08")
    assert page.evaluate("window.read") == [8, 3]
