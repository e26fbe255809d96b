"""Chains written by a model: batches agree with single prompts, examples become part of the question, no step is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from cotfaith_mech.arithmetic import people_problems, word_problems
from cotfaith_mech.backends.huggingface import HuggingFaceModel
from cotfaith_mech.backends.text import _Draws
from cotfaith_mech.errors import CotfaithError, EndpointError
from cotfaith_mech.sampling import few_shot, generate_each, supplied_chain, write_chains, write_on

from .tiny import tiny


@pytest.fixture(scope="module")
def model() -> HuggingFaceModel:
    weights = tiny("llama-gqa")
    weights.model.config.max_position_embeddings = 512
    return HuggingFaceModel(weights)


def test_left_padding_changes_no_chain(model: HuggingFaceModel) -> None:
    """Prompts of unequal length in one batch: a position or mask that counts the padding writes other tokens."""
    prompts = [model.render(p.question) for p in word_problems(5, seed=2)]
    assert len({len(model.encode(prompt).ids) for prompt in prompts}) > 2
    together = model.generate(prompts, max_new_tokens=9)
    assert together == [model.generate([prompt], max_new_tokens=9)[0] for prompt in prompts]
    assert len(set(together)) > 1


def test_a_draw_rests_on_its_prompt_and_seed_alone(model: HuggingFaceModel) -> None:
    """Neither on the prompts beside it nor on their order, nor on the state of torch's generator."""
    prompts = [model.render(p.question) for p in word_problems(5, seed=2)]

    def drawn(places: list[int], plus: int = 0) -> list[str]:
        seeds = [place + plus for place in places]
        return model.generate([prompts[i] for i in places], max_new_tokens=12, temperature=1.0, seeds=seeds)

    together = drawn([0, 1, 2, 3, 4])
    assert len(set(together)) == 5
    assert drawn([4, 2, 0]) == [together[4], together[2], together[0]]
    assert [drawn([i])[0] for i in range(5)] == together
    assert all(one != other for one, other in zip(together, drawn([0, 1, 2, 3, 4], plus=9), strict=True))


def test_draws_want_a_seed_for_each_and_logits_that_are_numbers(model: HuggingFaceModel) -> None:
    for seeds in ((), (3,)):
        with pytest.raises(CotfaithError, match=f"with {len(seeds)} seeds; give one for each prompt"):
            model.generate(["a", "b"], max_new_tokens=2, temperature=1.0, seeds=seeds)
    for amiss in (torch.nan, torch.inf):
        with pytest.raises(CotfaithError, match="not numbers"):
            _Draws(1.0, [0])(torch.empty(0), torch.tensor([[0.0, amiss, 1.0]]))
    cold = _Draws(1e-307, [0])(torch.empty(0), torch.tensor([[0.0, 3.0, 1.0]]))
    assert cold.argmax(-1).tolist() == [1]


def test_one_beginning_is_written_on_in_as_many_ways_as_there_are_seeds(model: HuggingFaceModel) -> None:
    chain = supplied_chain(model, word_problems(1, seed=2)[0])
    longer = write_on(model, [chain] * 20, max_new_tokens=8, temperature=3.0, seeds=range(20))
    assert len({one.steps for one in longer}) > 15
    assert write_on(model, [chain] * 2, max_new_tokens=8, temperature=3.0, seeds=[4, 0]) == [longer[4], longer[0]]


def test_draws_have_the_models_own_frequencies() -> None:
    """Of 4,000 first tokens at temperature .8, by chi-squared against the softmax of the logits."""
    logits = torch.tensor([3.0, 1.0, 2.0, -1.0, 0.5]).repeat(4000, 1)
    taken = _Draws(0.8, range(4000))(torch.empty(0), logits).argmax(-1)
    expected = 4000 * (logits[0].double() / 0.8).softmax(-1)
    assert chisquare(taken.bincount(minlength=5).numpy(), expected.numpy()).pvalue > 0.01
    never = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).repeat(500, 1)
    assert _Draws(1.0, range(500))(torch.empty(0), never).argmax(-1).tolist() == [1] * 500


def test_a_chain_ends_where_its_author_writes_the_cue(model: HuggingFaceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = people_problems(2, seed=4)
    texts = [f"Ann has 3.\nBob has 4.{one.cue} 3.", two.cue.strip() + " 9."]
    monkeypatch.setattr(model, "generate", lambda prompts, **_: texts)
    (_, chain, reason), (_, nothing, why) = write_chains(model, [one, two], "A")
    assert chain is not None
    assert (chain.steps, chain.cue, chain.author, reason) == (("Ann has 3.", "\nBob has 4."), one.cue, "A", "")
    assert nothing is None
    assert "wrote no reasoning step" in why


def test_examples_are_read_by_author_and_readers_alike(model: HuggingFaceModel) -> None:
    problems = people_problems(4, seed=5)
    asked, shown = few_shot(problems, 2)
    assert shown == problems[:2]
    assert [p.problem_id for p in asked] == [p.problem_id for p in problems[2:]]
    for before, after in zip(problems[2:], asked, strict=True):
        head = after.question.removesuffix(before.question)
        assert all(f"{e.question}\nReasoning: {''.join(e.steps)}{e.cue} {e.gold}." in head for e in shown)
        assert [c.question for c in after.conflicts] == [head + c.question for c in before.conflicts]
    assert shown[0].question in supplied_chain(model, asked[0]).prompt
    assert few_shot(problems, 0) == (problems, [])
    with pytest.raises(CotfaithError, match="needs 5 problems with a worked chain, found 4"):
        few_shot(problems, 5)


def test_what_is_written_does_not_depend_on_what_was_written_before(model: HuggingFaceModel) -> None:
    """A resumed run draws the same chains, and so does one of other problems in another order."""
    problems = word_problems(11, seed=6)
    options = {"max_new_tokens": 14, "temperature": 1.0, "seed": 5}
    whole = {p.problem_id: chain for p, chain, _ in write_chains(model, problems, "A", **options)}
    done = {problems[i].problem_id for i in (0, 3, 8, 9, 10)}
    rest = {p.problem_id: chain for p, chain, _ in write_chains(model, problems, "A", done=done, **options)}
    assert rest == {name: chain for name, chain in whole.items() if name not in done}
    assert len(rest) == 6
    among_others = {p.problem_id: chain for p, chain, _ in write_chains(model, problems[:4:-1], "A", **options)}
    assert among_others == {p.problem_id: whole[p.problem_id] for p in problems[5:]}


def test_a_prompt_without_room_for_a_chain_is_told_and_the_others_are_written(model: HuggingFaceModel) -> None:
    short, long = word_problems(2, seed=7)
    long = replace(long, question=long.question * 9)
    (_, chain, _), (_, nothing, why) = write_chains(model, [short, long], "A", max_new_tokens=20)
    assert chain is not None
    assert nothing is None
    assert "at most 512" in why


def test_greedy_is_greedy_whatever_the_models_generation_config_says(
    model: HuggingFaceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [model.render(p.question) for p in people_problems(2, seed=1)]
    plain = model.generate(prompts, max_new_tokens=12)
    monkeypatch.setattr(model.weights.model.generation_config, "repetition_penalty", 1.8)
    assert model.generate(prompts, max_new_tokens=12) == plain


class Refusing:
    """Refuses every batch that holds 'bad'; what it writes tells the seed of each prompt."""

    info: Any = None
    render = count = str

    def generate(self, prompts: list[str], *, seeds: list[int], **_: Any) -> list[str]:
        if "bad" in prompts:
            raise CotfaithError("too long")
        if "off" in prompts:
            raise EndpointError("out of reach")
        return [f"{prompt}{seed}" for prompt, seed in zip(prompts, seeds, strict=True)]


def test_a_refused_prompt_costs_no_other_and_changes_none() -> None:
    model: Any = Refusing()
    assert generate_each(model, ["a", "b"], 8, 0.0, [5, 7]) == ["a5", "b7"]
    first, refused, last = generate_each(model, ["a", "bad", "c"], 8, 0.0, [5, 7, 9])
    assert (first, str(refused), last) == ("a5", "too long", "c9")
    with pytest.raises(EndpointError):
        generate_each(model, ["a", "off", "bad"], 8, 0.0, [5, 7, 9])
