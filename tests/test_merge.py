"""Runs merged over training seeds: against scipy, by hand, and what must be refused."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from cotfaith_mech.compare import holm_p
from cotfaith_mech.errors import CotfaithError
from cotfaith_mech.merge import contrast, endpoint, merged, student
from cotfaith_mech.records import Record, RunDirectory
from cotfaith_mech.report import build_merged
from cotfaith_mech.stats import Estimate

NAME, ARM = "filler/change | both_correct", "tuned-base/supplied"
READERS = [{"name": "base", "model": "m"}, {"name": "tuned", "model": "m"}]


def kept(path, condition, seed, value, *, data="d", n=9, name=NAME):
    labels = {"condition": condition, "training_seed": seed}
    run = RunDirectory.create(path / f"{condition}-{seed}-{name[:3]}", {"readers": READERS, "labels": labels})
    run.pin("data", {"sha256": data})
    run.write_estimates([Estimate(name, ARM, n, value, value - 1, value + 1, 0.5, "jackknife t over problems")])
    return run


def test_mean_over_seeds_has_students_interval(tmp_path):
    values = [-0.5, -0.2, -0.4, -0.9, -0.1]
    rows = merged([kept(tmp_path, "answers", seed, value, n=9 - seed) for seed, value in enumerate(values)])
    (row,) = rows
    oracle = scipy.stats.ttest_1samp(values, 0)
    interval = oracle.confidence_interval(0.95)
    assert (row.estimate.ci_low, row.estimate.ci_high) == pytest.approx((interval.low, interval.high))
    assert row.estimate.p == pytest.approx(oracle.pvalue)
    assert (row.estimate.value, row.estimate.n_problems) == (pytest.approx(np.mean(values)), 5)
    assert row.seeds == dict(zip("01234", values, strict=True))
    assert "checkpoints" not in row.estimate.note


def test_few_seeds_speak_of_checkpoints_and_one_keeps_its_own_interval(tmp_path):
    rows = merged(
        [kept(tmp_path, "answers", 1, -0.5), kept(tmp_path, "answers", 2, -0.5), kept(tmp_path, "one", 1, 0.3)]
    )
    both, one = rows
    assert (both.estimate.ci_low, both.estimate.ci_high, both.estimate.p) == (-0.5, -0.5, 0.0)
    assert both.estimate.note == "2 training seeds: these checkpoints"
    assert (one.estimate.ci_low, one.estimate.method) == (-0.7, "jackknife t over problems")
    assert one.estimate.note.startswith("one training seed")


def test_seeds_without_a_value_are_not_zero(tmp_path):
    (row,) = merged([kept(tmp_path, "a", 1, 0.2), kept(tmp_path, "a", 2, np.nan), kept(tmp_path, "a", 3, 0.4)])
    assert row.seeds == {"1": 0.2, "3": 0.4}


def test_contrast_is_welchs_t(tmp_path):
    one, other = [-0.5, -0.6, -0.4, -0.8], [0.0, 0.1, -0.05]
    runs = [kept(tmp_path, "answers", i, v) for i, v in enumerate(one)]
    runs += [kept(tmp_path, "chains", i, v) for i, v in enumerate(other)]
    found = contrast(merged(runs), "answers", "chains", NAME, ARM)
    oracle = scipy.stats.ttest_ind(one, other, equal_var=False)
    assert found is not None
    assert found.value == pytest.approx(np.mean(one) - np.mean(other))
    assert found.p == pytest.approx(oracle.pvalue)
    assert contrast(merged(runs[:5]), "answers", "chains", NAME, ARM) is None


def test_holm_over_the_primary_endpoints_of_each_group(tmp_path):
    runs = []
    for seed, (filler, swap) in enumerate([(-0.5, 0.1), (-0.6, -0.1), (-0.55, 0.3)]):
        run = kept(tmp_path, "answers", seed, filler)
        more = Estimate("swap/change | both_correct", ARM, 9, swap, 0.0, 0.0, 0.5, "x")
        run.write_estimates([*run.read_estimates(), more])
        runs.append(run)
    rows = {
        row.estimate.name: row.estimate for row in merged(runs, ["filler/change@/supplied", "swap/change@/supplied"])
    }
    p = scipy.stats.ttest_1samp([-0.5, -0.6, -0.55], 0).pvalue
    assert holm_p(rows[NAME]) == pytest.approx(2 * p, rel=1e-3)
    # an endpoint that no run has still counts as a member of the family
    alone = merged(runs, ["filler/change@/supplied", "absent@/supplied", "gone@/supplied"])
    assert holm_p(next(row.estimate for row in alone if row.estimate.name == NAME)) == pytest.approx(3 * p, rel=1e-3)
    assert endpoint(runs[0], "filler/change@/supplied") == (NAME, ARM)


def test_what_cannot_be_merged_is_refused(tmp_path):
    one = kept(tmp_path, "answers", 1, -0.5)
    with pytest.raises(CotfaithError, match="the same labels"):
        merged([one, one])
    with pytest.raises(CotfaithError, match="in its problems"):
        merged([one, kept(tmp_path, "answers", 2, -0.5, data="else")])
    other = RunDirectory.create(
        tmp_path / "draws", {"readers": READERS, "labels": {"condition": "answers"}, "draws": 9}
    )
    other.pin("data", {"sha256": "d"})
    other.write_estimates(one.read_estimates())
    with pytest.raises(CotfaithError, match="in its draws"):
        merged([one, other])
    bare = RunDirectory.create(tmp_path / "bare", {"readers": READERS})
    with pytest.raises(CotfaithError, match="no estimates yet"):
        merged([bare])


def test_student_against_scipy_and_where_nothing_varies():
    values = np.array([0.3, 0.1, 0.25, -0.1])
    oracle = scipy.stats.ttest_1samp(values, 0)
    low, high, p = student(values)
    assert (low, high) == pytest.approx(tuple(oracle.confidence_interval(0.95)))
    assert p == pytest.approx(oracle.pvalue)
    assert student(np.zeros(3)) == (0, 0, 1)
    assert student(np.full(3, 0.5)) == (0.5, 0.5, 0)


def test_the_page_shows_differences_levels_and_what_was_not_run(tmp_path):
    runs = [kept(tmp_path, "answers <b>", seed, -0.5 + seed / 10) for seed in (1, 2)]
    for run in runs:
        manifest = run.read_manifest()
        run.update_manifest(manifest | {"config": manifest["config"] | {"primary": ["filler/change"]}})
        run.write_chains([{"author": "supplied", "problem_id": "p"}])
        level = Estimate(NAME, "base/supplied", 9, 0.8, 0.7, 0.9, np.nan, "x")
        run.write_estimates([*run.read_estimates(), level])
    page = build_merged(runs, [tmp_path / "gone"], tmp_path / "out").read_text()
    assert "answers &lt;b&gt;" in page
    assert "not run" in page
    primary = page[page.index('id="primary"') : page.index('id="runs"')]
    assert primary.count("<small>tuned-base/supplied</small>") == 1
    assert "base/supplied</small>" not in primary.replace("tuned-base/supplied</small>", "")
    assert (tmp_path / "out" / "forest.pdf").exists()


def test_the_page_opens_with_a_verdict_of_each_group_and_says_what_was_left_out(tmp_path):
    conflict = [f"conflict/record_agree/{metric} | both_correct" for metric in ("p_chain", "p_question", "p_other")]
    runs = []
    for condition, values in (("answers", (-0.60, 0.55, 0.05)), ("chains", (-0.01, 0.01, 0.00))):
        for seed in (0, 1, 2):
            run = kept(tmp_path, condition, seed, 0.001 * seed, name="filler/change | both_correct")
            shifted = [value + 0.001 * seed for value in values]
            triple = [Estimate(n, ARM, 9, v, v, v, 0.5, "x") for n, v in zip(conflict, shifted, strict=True)]
            run.write_estimates([*run.read_estimates(), *triple])
            manifest = run.read_manifest()
            config = manifest["config"] | {"primary": ["filler/change", "conflict/record_agree/p_chain"]}
            run.update_manifest(manifest | {"config": config})
            run.write_chains([{"author": "supplied", "problem_id": "p"}])
            runs.append(run)
    for problem in "pq":
        runs[0].add_exclusion(problem_id=problem, stage="edit", reason="no number in <the> chain")
    page = build_merged(runs, [], tmp_path / "out").read_text()
    verdict = page[page.index('class="verdict"') : page.index("</header>")]
    answers, chains = verdict.split("<b>chains.</b>")
    assert "<b>answers.</b> Between these checkpoints (tuned-base/supplied), under conflict (record agree)" in answers
    assert "P(chain&#39;s answer) -0.60 [-0.60, -0.60] (primary, Holm p" in answers
    assert "bypass, the answer moves from the chain to the question." in answers
    assert "1 of 2 primary differences are told from 0 (95% interval and Holm&#39;s p): " in answers
    assert "conflict/record_agree/p_chain (tuned-base/supplied) −0.599 [−0.601, −0.597]." in answers
    assert "no change beyond 0.1" in chains
    assert "2 left out</a>, each with its reason." in verdict
    left_out = page[page.index('id="exclusions"') : page.index('id="estimates"')]
    assert '<td class="n">2</td><td>edit</td><td class="name">no number in &lt;the&gt; chain</td>' in left_out
    assert left_out.count("nothing was left out") == 5


def test_a_ladder_of_single_readers_shows_levels(tmp_path):
    runs = []
    for size in ("small", "large"):
        config = {"readers": READERS[:1], "labels": {"size": size}, "primary": ["accuracy"]}
        run = RunDirectory.create(tmp_path / size, config)
        run.write_chains([{"author": "base", "problem_id": "p"}])
        run.write_estimates([Estimate("accuracy | both_correct", "base", 9, 0.8, 0.7, 0.9, np.nan, "x")])
        runs.append(run)
    page = build_merged(runs, [], tmp_path / "out").read_text()
    assert "what stands here are levels" in page
    assert page.count("accuracy | both_correct") >= 2


def test_a_compacted_run_reads_the_same(tmp_path):
    run = RunDirectory.create(tmp_path / "run", {"readers": READERS})
    run.write_chains([{"chain_id": "c", "problem_id": "p", "author": "supplied"}])
    for unit in ("b", "a"):
        where = {"problem_id": "p", "chain_id": "c", "author": "supplied", "reader": unit}
        records = [
            Record(**where, measure="baseline", metric="correct", value=v, step=3, n_tokens=5) for v in (0.5, 1.0)
        ]
        run.write_unit(unit, records, {"reader": unit, "answer": " 7", "edits": [{"step": None}]})
    copy = run.compacted(tmp_path / "copy")
    assert copy.read_records().equals(run.read_records())
    assert copy.read_unit_meta() == run.read_unit_meta()
    assert copy.read_chains() == run.read_chains()
    assert len(list((copy.path / "records").iterdir())) == 2
    assert copy.read_manifest()["records_left_out"] == []
    assert run.compacted(tmp_path / "less", without=("baseline",)).read_records().empty
