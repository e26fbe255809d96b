"""Chains: segmentation gives the text back, spans tile it for any tokenization, and both agree with brute force."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotfaith_mech.chains import Chain, Encoding, segment, token_spans
from cotfaith_mech.errors import CotfaithError

pieces_of_text = st.sampled_from(
    ["So ", "3.5", "1,000", ". ", "! ", "? ", "\n", "\r\n", "\n\n", "- ", "2. ", "**Step 1.** ", "Mr. ", "e.g. ", "```py\nx = 1\n```",
     r"\[ x^2. \]", r"\(a\)", "`f(x).y`", "| a | b |\n", "…", "é", "e\u0301", "👩‍👩‍👧", "中。", "\u2028", "\t", " ", "“no.” ", "...", "x"]
)  # fmt: skip
texts = st.lists(pieces_of_text, max_size=25).map("".join) | st.text(max_size=60)


@given(texts, st.integers(1, 7))
def test_segments_concatenate_back_and_are_grouped_never_cut(text, max_steps):
    steps = segment(text, max_steps)
    assert "".join(steps) == text
    assert all(steps)
    assert len(steps) == min(len(segment(text, 10**6)), max_steps)
    ends = {len("".join(segment(text, 10**6)[:i])) for i in range(len(segment(text, 10**6)) + 1)}
    assert {len("".join(steps[:i])) for i in range(len(steps) + 1)} <= ends


@given(texts)
def test_whitespace_leads_a_step_and_no_step_is_blank(text):
    steps = segment(text)
    assert all(step.strip() for step in steps) or not text.strip()
    assert not any(step != step.rstrip() for step in segment(text, 10**6)[:-1])


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("Ann has 3.5. Bob has 1,000.", ["Ann has 3.5.", " Bob has 1,000."]),
        ("1. Add 3 and 4.\n2) Halve it.", ["1. Add 3 and 4.", "\n2) Halve it."]),
        ("a. One\nb. Two", ["a. One", "\nb. Two"]),
        ("**Step 2.** Do it. Done", ["**Step 2.** Do it.", " Done"]),
        ("**Total.** Next", ["**Total.**", " Next"]),
        ("Mr. Li has 3. Dr. Wu too.", ["Mr. Li has 3.", " Dr. Wu too."]),
        ("Some, e.g. cats. At 5 p.m. He left.", ["Some, e.g. cats.", " At 5 p.m.", " He left."]),
        ('He said "no." Then (it rained.) Ok?', ['He said "no."', " Then (it rained.)", " Ok?"]),
        ("See No. 5 there. No. Yes!", ["See No. 5 there.", " No.", " Yes!"]),
        ("a\r\n\r\nb\n", ["a", "\r\n\r\nb\n"]),
        ("The answer is B. So", ["The answer is B.", " So"]),
        ("22.\nSo", ["22.", "\nSo"]),
        ("22. \n So", ["22.", " \n So"]),
        ("So \nBut", ["So", " \nBut"]),
        ("", []),
        (" \n", [" \n"]),
        ("\n\nx", ["\n\nx"]),
    ],
)
def test_segments_written_out(text, steps):
    assert list(segment(text)) == steps


def synthetic(text: str, cuts: list[int], repeats: list[int]) -> Encoding:
    """Tokens at arbitrary cut points; one that is a single character may be split into bytes with equal offsets."""
    bounds = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    offsets = []
    for i, (a, b) in enumerate(pairwise(bounds)):
        offsets += [(a, b)] * (1 + repeats[i % len(repeats)] if b - a == 1 else 1)
    return Encoding(tuple(range(len(offsets))), tuple(offsets))


parts = st.tuples(texts, st.lists(texts, max_size=5).map(tuple), texts, st.sampled_from(["", " 22", "é", "👩‍👩‍👧"]))


@given(parts)
def test_pieces_tile_the_text(parts):
    chain = Chain("p", "a", *parts)
    assert "".join(chain.pieces) == chain.text
    assert [chain.text[a:b] for a, b in chain.char_spans] == list(chain.pieces)
    assert Chain.from_json(json.loads(json.dumps(chain.to_json()))) == chain


@given(parts, st.lists(st.integers(0, 500), max_size=40), st.lists(st.integers(0, 3), min_size=1, max_size=3))
def test_token_spans_tile_and_each_token_lies_where_its_first_character_does(parts, cuts, repeats):
    chain = Chain("p", "a", *parts)
    answer_start = chain.char_spans[-1][0]
    encoding = synthetic(chain.text, [*cuts, answer_start], repeats)
    spans = token_spans(chain, encoding)
    flat = [spans.prompt, *spans.steps, spans.cue, spans.answer]
    assert len(spans.steps) == len(chain.steps)
    assert [i for a, b in flat for i in range(a, b)] == list(range(len(encoding.ids)))
    for (a, b), (start, end) in zip(flat, chain.char_spans, strict=True):
        assert [i for i, (first, _) in enumerate(encoding.offsets) if start <= first < end] == list(range(a, b))


def test_spans_by_hand_with_a_character_split_into_bytes():
    chain = Chain("p", "a", "Q:", (" é.", " 3"), " So", " 4")
    offsets = ((0, 2), (2, 3), (3, 4), (3, 4), (4, 5), (5, 7), (7, 10), (10, 11), (11, 12))
    spans = token_spans(chain, Encoding(tuple(range(9)), offsets))
    assert spans.prompt == (0, 1)
    assert spans.steps == ((1, 5), (5, 6))
    assert (spans.cue, spans.answer) == ((6, 7), (7, 9))


def test_a_token_across_the_border_of_cue_and_answer_is_refused():
    chain = Chain("p", "a", "Q", ("s",), "c ", "22")
    with pytest.raises(CotfaithError, match="end the cue without a space"):
        token_spans(chain, Encoding((0, 1, 2), ((0, 2), (2, 5), (5, 6))))


def test_an_answer_without_a_token_is_refused():
    chain = Chain("p", "a", "Q", ("s",), "c", "2")
    with pytest.raises(CotfaithError, match="has no token of its own"):
        token_spans(chain, Encoding((0, 1), ((0, 2), (2, 4))))


def test_chain_id_depends_on_the_content_but_not_on_the_forced_answer():
    chain = Chain("p", "a", "Q", ("s", "t"), "c")
    assert chain.chain_id == chain.with_answer(" 2").chain_id
    others = [
        Chain("p", "a", "Q", ("st",), "c"),
        Chain("p", "b", "Q", ("s", "t"), "c"),
        Chain("p", "a", "Q", ("s", "t"), "c", variant="v"),
    ]
    assert len({chain.chain_id, *(o.chain_id for o in others)}) == 4
