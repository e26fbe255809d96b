"""Views against hand-worked and brute-force numbers; figures: which are drawn, hostile text, what the pictures hold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cotfaith_mech import figure_style, figures, views
from cotfaith_mech.bridge import DISAGREEMENT
from cotfaith_mech.chain_figures import chain_figure, heads_figure, tokens_figure
from cotfaith_mech.merge import Merged
from cotfaith_mech.merged_figures import seeds_figure
from cotfaith_mech.records import COLUMNS, RunDirectory
from cotfaith_mech.stats import Estimate

from .fake_run import LAYERS, N_STEPS, READERS, write_fake_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return write_fake_run(tmp_path_factory.mktemp("runs") / "demo")


def table(*rows: dict[str, object]) -> pd.DataFrame:
    frame = pd.DataFrame([{"variant": "", "author": "gold", **row} for row in rows]).reindex(columns=COLUMNS)
    return frame.astype({"step": "Int64", "layer": "Int64", "head": "Int64", "seed": "Int64"})


def chain(name: str, n_steps: int, true_step: int | None) -> dict[str, object]:
    return {"chain_id": name, "problem_id": name, "steps": [f" s{i}." for i in range(n_steps)], "true_step": true_step}


def test_a_problem_with_many_draws_counts_once_in_a_curve() -> None:
    base = {"reader": "A", "measure": "paraphrase", "variant": "cumulative", "metric": "same", "step": 0}
    draws = [{**base, "problem_id": "p", "chain_id": "p", "value": 1.0, "seed": s} for s in range(9)]
    other = {**base, "variant": "local", "problem_id": "q", "chain_id": "q", "value": 1.0, "seed": 0}
    records = table(*draws, {**base, "problem_id": "q", "chain_id": "q", "value": 0.0, "seed": 0}, other)
    curve = views.curves(records, [chain("p", 3, 0), chain("q", 3, 1)])
    assert curve[["x", "value", "n"]].values.tolist() == [[0.0, 0.5, 2]]


def test_chains_of_unequal_length_meet_on_fractions() -> None:
    rows = [
        {"reader": "A", "measure": "filler", "variant": "matched", "metric": "same", "problem_id": p, "chain_id": p, "step": i, "value": float(i == n)}
        for p, n in (("p", 2), ("q", 5))
        for i in range(n + 1)
    ]  # fmt: skip
    curve = views.curves(table(*rows), [chain("p", 2, 0), chain("q", 5, 1)]).set_index("x")["value"]
    assert curve[0.5] == pytest.approx(0.0)
    assert curve[0.9] == pytest.approx((0.8 + 0.5) / 2)
    assert curve[1.0] == 1.0


def test_patch_effects_are_aligned_by_role_and_recovered_is_a_ratio_of_sums() -> None:
    base = {"reader": "A", "measure": "patching", "variant": "noise"}
    cell = {**base, "metric": "logit_diff", "layer": 3, "site": "blocks.3.hook_resid_pre"}
    rows = []
    for name, source, edited in (("p", -1.0, [1.0, -1.0, 1.0]), ("q", -7.0, [-3.0, 1.0, 0.0])):
        at = {"problem_id": name, "chain_id": name}
        rows += [{**cell, **at, "step": step, "value": value} for step, value in enumerate(edited)]
        rows += [{**base, **at, "metric": "logit_diff_base", "value": 1.0}]
        rows += [{**base, **at, "metric": "logit_diff_source", "value": source}]
    found = views.aligned_patches(table(*rows), [chain("p", 3, 1), chain("q", 3, 0)]).set_index("role")
    assert found.loc["true step", "effect"] == pytest.approx((-2 - 4) / 2)
    assert found.loc["other steps", "effect"] == pytest.approx((0 + (0 - 1) / 2) / 2)
    assert found.loc["true step", "recovered"] == pytest.approx(6 / 10)


def test_chains_without_a_true_step_keep_their_own_role() -> None:
    assert set(views.steps_of([chain("p", 2, None)])["role"]) == {"all steps"}


def test_step_effects_against_loops_over_the_table(run: RunDirectory) -> None:
    records = run.read_records()
    effects = views.step_effects(records).set_index(["effect", "reader", "problem_id", "step"])["value"]
    rows = records[(records.reader == "B") & (records.problem_id == "p02") & (records.step == 1)]
    tv = [r.value for r in rows.itertuples() if (r.measure, r.variant, r.metric) == ("mistake", "local", "tv")]
    direct = [r.value for r in rows.itertuples() if r.measure == "attribution" and r.metric == "contribution"]
    patch = [r.value for r in rows.itertuples() if r.measure == "patching" and r.variant == "denoise" and r.layer == 15]
    assert effects["mistake", "B", "p02", 1] == pytest.approx(sum(tv) / len(tv))
    assert effects["direct", "B", "p02", 1] == pytest.approx(sum(direct))
    assert effects["patch", "B", "p02", 1] == pytest.approx(patch[0] + 3)


def test_cross_model_curves_by_hand() -> None:
    """Two problems; the second conflict, whose layers were not exchanged, and the mixed cells stay out."""
    rows = []
    for problem, shift in (("p", 0.0), ("q", 0.2)):
        key = {"reader": "B", "problem_id": problem, "chain_id": problem, "measure": "cross_model", "metric": "p_chain"}
        for name, value in (
            ("write_base_read_base", 0.8),
            ("write_tuned_read_tuned", 0.2),
            ("write_base_read_tuned", 9.0),
        ):
            rows += [
                {**key, "variant": f"{conflict}/{name}", "value": value + shift} for conflict in ("agree", "absent")
            ]
        for layer in range(2):
            where = {**key, "layer": layer}
            rows.append({**where, "variant": "agree/into_tuned/chain_rows", "value": layer / 2 + shift})
            rows.append({**where, "variant": "agree/into_base/cue_rows", "value": 0.5 + shift})
    frame = table(*rows)
    frame["layer"] = frame["layer"].astype("Int64")
    found = {
        (r.into, r.rows, None if pd.isna(r.layer) else int(r.layer)): (r.value, r.n)
        for r in views.cross_model(frame).itertuples()
    }
    assert {name: value for name, (value, _) in found.items()} == pytest.approx(
        {
            ("base", "own", None): 0.9,
            ("tuned", "own", None): 0.3,
            ("tuned", "chain_rows", 0): 0.1,
            ("tuned", "chain_rows", 1): 0.6,
            ("base", "cue_rows", 0): 0.6,
            ("base", "cue_rows", 1): 0.6,
        }
    )
    assert {n for _, n in found.values()} == {2}


def test_the_knockout_matrix_has_a_row_for_each_step_and_one_for_the_answer() -> None:
    key = {"reader": "A", "problem_id": "p", "chain_id": "p", "measure": "knockout", "metric": "delta_p"}
    rows = [{**key, "variant": "masked", "step": j, "value": j / 10} for j in range(3)]
    rows += [
        {**key, "variant": f"masked_from_step_{i}", "step": j, "value": i + j / 10} for i in range(3) for j in range(i)
    ]
    rows += [
        {**key, "variant": v, "step": 0, "value": 7.0} for v in ("masked_later", "masked_random", "zeroed_from_step_1")
    ]
    found = views.knockout_matrix(table(*rows), {**chain("p", 3, 1), "chain_id": "p"})
    assert {(r.row, r.step): r.value for r in found.itertuples()} == pytest.approx(
        {(1, 0): 1.0, (2, 0): 2.0, (2, 1): 2.1, (3, 0): 0.0, (3, 1): 0.1, (3, 2): 0.2}
    )


def test_a_conflict_counts_each_step_once_however_many_draws_it_has() -> None:
    where = {"reader": "A", "problem_id": "p", "chain_id": "c", "measure": "conflict", "variant": "carried"}
    rows = [{**where, "metric": m, "step": s, "seed": d, "value": v}
            for m in ("p_chain", "p_question", "p_other") for s, d, v in ((0, 0, 0.6), (0, 1, 0.6), (0, 2, 0.6), (1, 0, 0.0))]  # fmt: skip
    assert views.conflict(table(*rows))["p_chain"].tolist() == pytest.approx([0.3])


def test_infogain_of_a_step_by_hand() -> None:
    """p(gold) = .1, .2, .8 after 0, 1, 2 steps; a chain with an unread point has none, and p = 0 gives no number."""
    key = {"reader": "A", "measure": "early_termination", "variant": ""}
    rows = []
    for problem, curve in (("p", (0.1, 0.2, 0.8)), ("q", (0.3, None, 0.6)), ("r", (0.0, 0.5, 0.25))):
        for step, p in enumerate(curve):
            if p is not None:
                where = {"problem_id": problem, "chain_id": f"c-{problem}", "step": step, **key}
                rows += [{**where, "metric": "p_gold", "value": p}, {**where, "metric": "entropy", "value": 2 - p}]
    effects = views.step_effects(table(*rows)).set_index(["effect", "problem_id", "step"])["value"]
    assert effects["infogain"].to_dict() == pytest.approx(
        {("p", 0): np.log(2), ("p", 1): np.log(4), ("r", 1): np.log(0.5)}
    )
    assert effects["entropy_drop"]["p"].tolist() == pytest.approx([0.1, 0.6])


def test_the_random_control_never_mixes_with_the_steps(run: RunDirectory) -> None:
    found = views.knockout(run.read_records(), run.read_chains())
    means = found.groupby(["reader", "role"])["value"].mean()
    assert means["A", "true step"] > 0.5
    assert abs(means["A", "random"]) < 0.05
    assert abs(means["A", "other steps"]) < 0.1


def test_band_covers_the_mean_and_is_undefined_for_one_problem() -> None:
    low, high = views.band(np.array([0.0, 1.0, 1.0, np.nan]))
    assert 0 <= low < 2 / 3 < high <= 1
    assert all(math.isnan(end) for end in views.band(np.array([0.3])))


@pytest.mark.parametrize(("arm", "tuned"), [("B-A", "B"), ("C-A/gold", "C"), ("A", None), ("C-B", None)])
def test_difference_arms_are_told_from_readers(arm: str, tuned: str | None) -> None:
    assert views.tuned_reader(arm, ["A", "B", "C"]) == tuned


def test_a_reader_with_a_hyphen_is_no_difference() -> None:
    assert views.tuned_reader("Llama-8B", ["Llama-8B", "Llama-8B-ft"]) is None
    assert views.tuned_reader("Llama-8B-ft-Llama-8B", ["Llama-8B", "Llama-8B-ft"]) == "Llama-8B-ft"


def test_every_figure_is_written_as_png_and_pdf_even_with_hostile_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fonttype: int
) -> None:
    monkeypatch.setitem(figures.STYLE, "savefig.dpi", 60)
    monkeypatch.setitem(figures.STYLE, "pdf.fonttype", fonttype)
    run = write_fake_run(tmp_path / "run", hostile=" $x_{$ \\frac <b>漢😀\u0007</b> %d")
    names = {path.name for path in figures.draw_figures(run)}
    stems = ["curves", "patching_denoise", "patching_noise", "forest", "conflict", "bridge", "knockout", "attribution"]
    maps = ("patching_chain_{}", "patching_heads_{}_denoise_z_head", "patching_tokens_{}_denoise_token")
    stems += [name.format(problem) for problem in ("p03", "p01", "p00") for name in maps]
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf")}
    assert all((run.figures / name).stat().st_size > 2000 for name in names)
    assert (run.figures / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_pdf_holds_its_fonts_as_text_that_journals_take(tmp_path: Path, fonttype: int) -> None:
    """TrueType: some refuse a page with outlines (Type 3)."""
    with matplotlib.rc_context(figures.STYLE | {"pdf.fonttype": fonttype}):
        figure = Figure()
        figure.text(0.5, 0.5, "Δ knockout")
        _, pdf = figure_style.save_figure(figure, tmp_path / "one")
    assert b"/CIDFontType2" in pdf.read_bytes()
    assert b"/Type3" not in pdf.read_bytes()


def test_names_in_the_forest_are_drawn_without_what_the_font_lacks(tmp_path: Path) -> None:
    """A missing glyph is a warning, which fails."""
    estimate = Estimate("dependence", "B\x1b-A", 4, 0.5, 0.4, 0.6, 0.5, "x")
    merged = Merged("group\x1b", estimate, {"1": 0.4, "2": 0.6})
    for figure in (figures.forest_figure([estimate], ["A", "B"]), seeds_figure([merged], ["group\x1b"])):
        figure.savefig(tmp_path / "forest.png")


def test_a_long_name_of_a_figure_is_cut_and_told_apart() -> None:
    stems = {figure_style.file_name("漢" * 300 + end) for end in "ab"}
    assert len(stems) == 2
    assert all(len(f"{stem}.png".encode()) < 255 for stem in stems)
    assert figure_style.file_name("../x/y.z") == "___x_y_z"


def test_a_run_without_mechanism_draws_only_what_it_has(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", {"readers": ["A"]})
    run.write_chains([])
    assert figures.draw_figures(run) == []


def test_maps_share_limits_symmetric_around_zero(run: RunDirectory) -> None:
    cells = views.aligned_patches(run.read_records(), run.read_chains())
    cells = cells[cells["variant"] == "denoise"]
    with matplotlib.rc_context(figures.STYLE):
        figure = figures.patching_figure(cells, list(READERS))
    maps = [
        axis.collections[0]
        for axis in figure.axes
        if axis.collections and axis.get_visible() and axis.get_title(loc="left")
    ]
    assert len(maps) == 2 * len(READERS) - 1
    assert {image.get_clim() for image in maps} == {(-cells["effect"].abs().max(), cells["effect"].abs().max())}
    array = maps[0].get_array()
    assert array is not None
    assert array.shape == (2, len(LAYERS))
    assert array[0, 0] == pytest.approx(
        cells.query("reader == 'A' and role == 'true step' and layer == 0")["effect"].item()
    )


LONG = ("base_of_the_study_20", "answers_shortcut_200", "chains-of-the-base20", "AnotherDomain0123456")


def boxes(figure: Figure, texts: list[Any]) -> list[Any]:
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    return [text.get_window_extent(renderer) for text in texts]


@pytest.mark.parametrize("n", [2, 3, 4])
def test_titles_of_neighbouring_panels_do_not_meet(run: RunDirectory, n: int) -> None:
    names, chains = list(LONG[:n]), run.read_chains()
    records = run.read_records().drop(columns="reader")
    records = pd.concat([records[run.read_records()["reader"] == "A"].assign(reader=name) for name in names])
    cells = views.aligned_patches(records, chains)
    triple, heads = views.conflict(records), views.attribution(records, chains)
    patched = views.patches(records)
    own = patched[(patched["chain_id"] == chains[0]["chain_id"]) & (patched["variant"] == "noise")]
    apart = pd.DataFrame(columns=list(DISAGREEMENT))
    with matplotlib.rc_context(figures.STYLE):
        drawn = [
            figures.patching_figure(cells[cells["variant"] == "noise"], names),
            figures.bridge_figure(views.bridge(records), apart, names),
            figures.knockout_figure(views.knockout(records, chains), names),
            figures.attribution_figure(heads, names),
            figures.conflict_figure(triple, names),
            figures.chain_figure(own, chains[0], names),
        ]
        for figure in drawn:
            titles = [axis._left_title for axis in figure.axes if axis.get_visible() and axis.get_title(loc="left")]
            assert len(titles) >= n or figure is drawn[4]
            found = boxes(figure, titles)
            assert not [(i, j) for j, b in enumerate(found) for i, a in enumerate(found[:j]) if a.overlaps(b)]
            assert max(box.x1 for box in found) <= figure.bbox.x1
            assert max(box.y1 for box in found) <= figure.bbox.y1


def test_every_ring_of_the_bridge_is_named_or_counted(run: RunDirectory) -> None:
    points = views.bridge(run.read_records())
    points = points[points["reader"] == "B"].reset_index(drop=True)
    chosen = points.groupby("chain_id").head(1)
    apart = chosen.assign(mechanism="knockout", step_behaviour=chosen["step"])[
        ["reader", "chain_id", "problem_id", "mechanism", "step_behaviour"]
    ]
    with matplotlib.rc_context(figures.STYLE):
        figure = figures.bridge_figure(points, apart, ["B"])
        (axis,) = figure.axes
        labels = [text for text in axis.texts if text.get_alpha() != 0]
        assert labels[0].get_text() == "6 disagree, 2 not named"
        assert sorted(text.get_text() for text in labels[1:]) == sorted(apart["problem_id"][:4])
        found = boxes(figure, labels)
    assert not [(i, j) for j, b in enumerate(found) for i, a in enumerate(found[:j]) if a.overlaps(b)]
    highest = axis.transData.transform((0, points["knockout"].max()))[1]
    assert min(box.y0 for box in found) > highest


def test_a_reader_without_mechanism_leaves_no_empty_map(run: RunDirectory) -> None:
    cells = views.aligned_patches(run.read_records(), run.read_chains())
    cells = cells[(cells["variant"] == "denoise") & (cells["reader"] != "C")]
    with matplotlib.rc_context(figures.STYLE):
        axes = figures.patching_figure(cells, list(READERS)).axes
    titles = [axis.get_title(loc="left") for axis in axes if axis.get_visible()]
    assert [title for title in titles if title] == ["reader A", "reader B", "B − A"]


def test_step_labels_of_a_chain_are_its_own_and_mark_the_true_step(run: RunDirectory) -> None:
    chain, cells = run.read_chains()[0], views.patches(run.read_records())
    cells = cells[(cells["chain_id"] == chain["chain_id"]) & (cells["variant"] == "noise")]
    labels = [text.get_text() for text in figures.chain_figure(cells, chain, list(READERS)).axes[0].get_yticklabels()]
    assert len(labels) == N_STEPS
    assert [label.startswith("●") for label in labels].index(True) == chain["true_step"]
    assert all(step.split()[0] in label for step, label in zip(chain["steps"], labels, strict=True))


def test_of_a_long_chain_every_so_manieth_step_is_named_and_the_true_one(run: RunDirectory) -> None:
    """10,000 labelled rows would be a picture that no library writes."""
    n, true = 10_000, 4321
    cells = pd.DataFrame(
        {"reader": "A", "layer": 0, "step": range(n), "effect": 0.1, "variant": "denoise", "position": range(n)}
    )
    long = chain("p", n, true)
    whole = chain_figure(cells, long, ["A"])
    labels = [label.get_text() for label in whole.axes[0].get_yticklabels()]
    assert len(labels) <= 60
    assert "● s4321." in labels
    assert whole.get_figheight() < 24
    tokens = [label.get_text() for label in tokens_figure(cells, long, ["A"], "denoise").axes[0].get_xticklabels()]
    assert len(tokens) <= 60
    assert "● 4322" in tokens


def test_characters_the_font_lacks_become_boxes() -> None:
    assert figures.drawable("a\n漢 $b$") == "a □ $b$"


def test_maps_of_heads_and_tokens_stand_where_their_records_say(run: RunDirectory) -> None:
    """The cell of one head at the true step is its record minus the base's; the figure shows the same number."""
    records, chain = run.read_records(), run.read_chains()[0]
    maps = {draw: (variant, cells) for variant, draw, cells in views.chain_maps(records, chain)}
    assert set(maps) == {"heads", "tokens"}
    variant, cells = maps["heads"]
    rows = records[(records["chain_id"] == chain["chain_id"]) & (records["variant"] == "denoise/z/head")]
    at = rows[
        (rows["reader"] == "A") & (rows["layer"] == 15) & (rows["head"] == 2) & (rows["step"] == chain["true_step"])
    ]
    shown = cells[(cells["reader"] == "A") & (cells["layer"] == 15) & (cells["head"] == 2)]
    effect = float(at["value"].iloc[0]) + 3
    assert shown.set_index("step")["effect"][chain["true_step"]] == pytest.approx(effect)
    figure = heads_figure(cells, chain, ["A"], variant)
    axis = figure.axes[0]
    names = [label.get_text() for label in axis.get_xticklabels()]
    drawn = axis.collections[0].get_array().reshape(4, -1)
    assert drawn[chain["true_step"], names.index("15.2")] == pytest.approx(effect)
    assert "query head" in axis.get_xlabel()
    variant, cells = maps["tokens"]
    axis = tokens_figure(cells, chain, ["A"], variant).axes[0]
    assert axis.collections[0].get_array().size == len(set(cells["layer"])) * 28
    assert [label.get_text().lstrip("● ") for label in axis.get_xticklabels()] == [
        "step 1",
        "step 2",
        "step 3",
        "step 4",
    ]
