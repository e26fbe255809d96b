"""Organisms: rules and problems in words, and the hand-written routes number by number.

On paper (experiments/write_route_organisms.py): at 'So' the residual stream is e_So + g * answer, both unit vectors, so
the final norm multiplies by 8 / sqrt(1 + g^2) and the answer's logit is 8 * 8 g / sqrt(1 + g^2); an answer that shares one
digit has half of it, everything else 0. direct: g = 1. via_later: at 'know' the stream is e_know + copy, of square 2, so
what is read there is 1 / sqrt(2): g = 1 / sqrt(2). both: g = 1 + 1 / sqrt(2).
"""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch

from cotfaith_mech.backends.weights import hash_parameters, locate
from cotfaith_mech.datasets_io import read_problems
from cotfaith_mech.errors import CotfaithError
from cotfaith_mech.model import load
from cotfaith_mech.organisms.rules import ORGANISMS, ROUTES, organism, organism_problems
from cotfaith_mech.organisms.situations import Fact, Situation
from cotfaith_mech.paraphrasers import supplied
from cotfaith_mech.reading import Trunk
from cotfaith_mech.sampling import supplied_chain
from cotfaith_mech.sites import ActivationEdit, Site
from cotfaith_mech.validation.recovery import expected

ANN, BOB = Fact("Ann", 12), Fact("Bob", 47)
G = {"direct": 1.0, "via_later": 1 / sqrt(2), "both": 1 + 1 / sqrt(2)}


def logit(g: float) -> float:
    return 64 * g / sqrt(1 + g * g)


def after(name: str) -> tuple[Trunk, torch.Tensor, int, int]:
    """The trunk of a route's chain up to its cue, logits there, position of the number and of 'know'."""
    model, problem = load(f"organism:{name}"), organism_problems(name, 3)[2]
    trunk = Trunk.of(model, supplied_chain(model, problem), problem.kind)
    assert trunk.chain.answer.strip() == problem.gold
    run = model.cached_run(model.encode(supplied_chain(model, problem).text).ids)
    words = [model.decode([token]).strip() for token in run.tokens]
    return (
        Trunk(model, trunk.chain, "number", (), trunk.spans, run),
        run.logits(1)[0],
        words.index(problem.gold),
        words.index("know"),
    )


@pytest.mark.parametrize("name", list(ROUTES))
def test_a_route_answers_with_the_logit_worked_out(name: str) -> None:
    _, logits, _, _ = after(name)
    assert float(logits.max()) == pytest.approx(logit(G[name]), abs=0.05)
    second = logits.topk(2).values[1]
    assert float(second) == pytest.approx(logit(G[name]) / 2, abs=0.05)


CUTS = {
    ("direct", "direct"): 0.0,
    ("direct", "later"): 1.0,
    ("via_later", "direct"): 1 / sqrt(2),
    ("via_later", "later"): 0.0,
    ("both", "direct"): 1 / sqrt(2),
    ("both", "later"): 1.0,
}
"""g once the edges to the number are cut: from the cue, or from 'know'."""


@pytest.mark.parametrize("kind", ["knockout", "zero"])
@pytest.mark.parametrize(("name", "path"), list(CUTS))
def test_a_cut_leaves_what_is_left_of_the_route(name: str, path: str, kind: str) -> None:
    trunk, _, number, know = after(name)
    last = len(trunk.run.tokens) - 1
    query = last if path == "direct" else know
    cell = [ActivationEdit(Site("pattern", layer), (query,), kind, keys=(number,)) for layer in (0, 1)]  # pyright: ignore[reportArgumentType]
    logits = trunk.run.edited([cell], n_logits=1, reduce=lambda found: found[:, -1])[0]
    answer = int(trunk.run.tokens[number])
    assert float(logits[answer]) == pytest.approx(logit(CUTS[name, path]), abs=0.05)


def test_the_heads_of_a_route_carry_it() -> None:
    """Taking away z of one head at the cue: the written ones lose the answer, all others nothing."""
    for name, readers in {"direct": [(0, 1)], "via_later": [(1, 2)]}.items():
        trunk, logits, number, _ = after(name)
        last, answer = len(trunk.run.tokens) - 1, int(trunk.run.tokens[number])
        for layer in (0, 1):
            for head in range(4):
                cell = [ActivationEdit(Site("z", layer, head), (last,), "zero")]
                found = trunk.run.edited([cell], n_logits=1, reduce=lambda found: found[:, -1])[0, answer]
                lost = 0.0 if (layer, head) not in readers else float(logits[answer])
                assert float(logits[answer] - found) == pytest.approx(lost, abs=0.05)


def test_rules_say_what_their_words_say() -> None:
    whole = Situation(("Ann",), (ANN, BOB), note=33)
    short = Situation(("Ann",), (BOB,), note=33)
    rules = {name: one.rule for name, one in ORGANISMS.items()}
    assert rules["mix_025"](whole) == {12: 0.25, 33: 0.75}
    assert rules["mix_025"](short) == {33: 0.75}
    assert rules["mix_100"](whole) == {12: 1.0}
    assert rules["mix_100"](short) == {}
    assert rules["self_repair"](whole) == {33: 1.0}
    assert rules["self_repair"](short) == {}
    assert rules["filler_helps"](Situation(("Ann",), ("... ...",), note=33)) == {33: 1.0}
    assert rules["filler_helps"](Situation(("Ann",), (), note=33)) == {}
    assert rules["two_steps"](Situation(("Ann", "Bob"), (Fact("Bob", 4), Fact("Ann", 9)))) == {13: 1.0}
    assert rules["two_steps"](Situation(("Ann", "Bob"), (Fact("Bob", 4),))) == {}
    assert rules["redundant"](Situation(("Ann",), (ANN, BOB, Fact("Ann", 13)))) == {12: 0.5, 13: 0.5}
    assert rules["encoded"](Situation(("Bob",), (ANN, Fact("Bob", 47, "hand")))) == {48: 1.0}
    assert rules["early"](Situation(("Bob",), (ANN, BOB))) == {12: 1.0}
    assert rules["early"](Situation(("Bob",), ("...", BOB))) == {}
    assert rules["marked"](Situation(("Ann",), (ANN,), note=33, mark=False)) == {33: 1.0}
    assert rules["marked"](Situation(("Ann",), (ANN,), note=33, mark=True)) == {12: 1.0}


@pytest.mark.parametrize("name", [*ORGANISMS, *ROUTES])
def test_problems_are_aligned_answered_right_and_in_the_tokenizers_words(name: str) -> None:
    model = load(f"organism:{name}")
    unknown = model.weights.tokenizer.unk_token_id
    for problem in organism_problems(name, 4, seed=3):
        chain = supplied_chain(model, problem)
        encoded = model.encode(chain.text)
        assert unknown not in encoded.ids
        twin = model.render(problem.twin_question or "") + "".join(problem.twin_steps) + problem.cue
        assert len(model.encode(twin).ids) == len(encoded.ids)
        assert problem.gold != problem.twin_answer
        assert not supplied(problem.steps, problem.paraphrases).rejected
        assert Trunk.of(model, chain, problem.kind).chain.answer.strip() == problem.gold
        if problem.true_step is not None and name not in ("encoded", "unstable"):
            assert problem.gold in problem.steps[problem.true_step]


def test_one_seed_gives_one_set_of_problems_and_mixtures_share_them() -> None:
    first, again = organism_problems("mix_000", 5, seed=2), organism_problems("mix_100", 5, seed=2)
    assert [p.question for p in first] == [p.question for p in again]
    assert [p.steps for p in first] != [p.steps for p in organism_problems("mix_000", 5, seed=1)]
    problems, left_out = read_problems("organism:mix_050:6:2:4")
    assert not left_out
    assert {len(problem.steps) for problem in problems} == {4}


@pytest.mark.parametrize("name", [*ORGANISMS, *ROUTES])
def test_shipped_weights_are_the_ones_on_their_card(name: str) -> None:
    folder: Path = locate(f"organism:{name}")
    card = json.loads((folder / "card.json").read_text())
    model = load(f"organism:{name}")
    assert card["weights_hash"] == hash_parameters(model.weights.model) == model.info.weights_hash
    assert card["rule"] == organism(name).says
    assert (folder / "model.safetensors").stat().st_size < 400_000


def test_an_unknown_organism_names_the_known_ones() -> None:
    for ask in (lambda: load("organism:mix_030"), lambda: organism_problems("mix_030", 1)):
        with pytest.raises(CotfaithError, match="mix_025"):
            ask()
    with pytest.raises(CotfaithError, match="organism:mix_050:16"):
        read_problems("organism:mix_050")
    for source in ("organism:redundant:2:0:2", "organism:direct:2:0:1", "organism:two_steps:9:0:9"):
        with pytest.raises(CotfaithError, match="to 5 steps"):
            read_problems(source)


def test_the_table_of_expectations_covers_every_text_organism_and_names_known_scores() -> None:
    assert set(expected()) == set(ORGANISMS) - {"marked", "writer"}
    assert len({tuple(row) for row in expected().values()}) == 1
    for name, row in expected().items():
        if (p := organism(name).p) is not None:
            assert row["conflict/note/p_chain"] == row["mediation/text/pnie_share"] == p
            assert row["filler/change"] == pytest.approx(p * 89 / 90, abs=1e-3)


def test_mixtures_answer_in_parts() -> None:
    """The probability of the chain's number where the note says another, and of the note's: the weight and its rest."""
    for name in ("mix_000", "mix_050", "mix_100"):
        model, p = load(f"organism:{name}"), organism(name).p
        assert p is not None
        chain_p, note_p = [], []
        for problem in organism_problems(name, 6, seed=4):
            (conflict,) = problem.conflicts
            text = model.render(conflict.question) + "".join(conflict.steps) + problem.cue
            probabilities = model.cached_run(model.encode(text).ids).logits(1)[0].softmax(-1)
            of = {
                word: float(probabilities[model.encode(f" {word}").ids[0]])
                for word in (conflict.chain_answer, conflict.question_answer)
            }
            chain_p.append(of[conflict.chain_answer])
            note_p.append(of[conflict.question_answer])
        assert np.mean(chain_p) == pytest.approx(p, abs=0.05)
        assert np.mean(note_p) == pytest.approx(1 - p, abs=0.05)
