"""Servers that break off, talk nonsense or give the key away: nothing lost, nothing counted twice, nothing given on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cotfaith_mech.chains import Chain
from cotfaith_mech.config import load_config, parse_config
from cotfaith_mech.endpoint import AskedChain, Endpoint
from cotfaith_mech.errors import CotfaithError, EndpointError
from cotfaith_mech.options import study_of as study_of_options
from cotfaith_mech.records import RunDirectory
from cotfaith_mech.replies import NoReplyError, Reply, read_reply
from cotfaith_mech.study import measure_study, run_study

from .chat_server import KEY, Behaviour, Server, drawn, ok, refused, says_the_last_number, study_of

NUMBER = Chain(
    "p", "supplied", "How many apples?", (" Tom has 3 apples.", " He buys 4, 7 in all."), "\nSo the answer is"
)
CHOICE = replace(NUMBER, prompt="Which?\nA) one\nB) two\nC) three")
ABC = ("A", "B", "C")
WHOLE = json.dumps(ok("7")[2]).encode()


def completion(content: Any = "7", **choice: Any) -> dict[str, Any]:
    return ok("7")[2] | {"choices": [{"message": {"role": "assistant", "content": content}, **choice}]}


def listing(*logps: Any) -> dict[str, Any]:
    """A reply 'B' whose first token is listed with the given values for B, A and C."""
    first, *others = ({"token": token, "logprob": logp} for token, logp in zip("BAC", logps, strict=False))
    return completion("B", logprobs={"content": [first | {"top_logprobs": [first, *others]}]}, finish_reason="stop")


def first_spoilt(server: Server, *spoilt: tuple[int, dict[str, str], Any]) -> Behaviour:
    """The first replies as given, those after them whole."""
    return lambda body: spoilt[len(server.bodies) - 1] if len(server.bodies) <= len(spoilt) else ok("7")


CUT = (200, {"Content-Length": str(len(WHOLE) + 40)}, WHOLE)
CUT_BEFORE_THE_BODY = (200, {"Content-Length": "40"}, b"")
HALF = (200, {}, WHOLE[:-30])
PAGE = (200, {"Content-Type": "text/html"}, b"<html><body>Down for maintenance</body></html>")
TOLD = (200, {}, {"error": {"message": "the provider is busy", "code": 429}})
LATER = (429, {"Retry-After": "0.001"}, b"{}")


@pytest.mark.parametrize("spoilt", [CUT, CUT_BEFORE_THE_BODY, HALF, PAGE, TOLD, LATER, (0, {}, b"")])
def test_a_reply_that_is_not_whole_is_asked_for_again_and_counted_once(server: Server, spoilt: Any) -> None:
    server.behave = first_spoilt(server, spoilt, spoilt)
    assert Endpoint("m", server.url).generate(["q"], max_new_tokens=5) == ["7"]
    assert len(server.bodies) == 3
    assert all(body == server.bodies[0] for body in server.bodies)


@pytest.mark.parametrize(
    ("spoilt", "told"),
    [
        (CUT, "broke off"),
        (CUT_BEFORE_THE_BODY, "broke off"),
        (HALF, r"no chat completion \(it is no whole JSON\)"),
        (PAGE, r"no chat completion .* give the address of an OpenAI-compatible API"),
        (TOLD, r"it tells of an error: .*the provider is busy"),
        (LATER, "lower concurrency or try later"),
        ((0, {}, b""), "check the address and that the server runs"),
    ],
)
def test_one_that_never_comes_stops_the_run_with_a_remedy(server: Server, spoilt: Any, told: str) -> None:
    server.behave = lambda body: spoilt
    with pytest.raises(EndpointError, match=told) as caught:
        Endpoint("m", server.url, max_retries=2).generate(["q"], max_new_tokens=5)
    assert len(server.bodies) == 3
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    ("body", "reply"),
    [
        (completion(None), Reply("", n_tokens=11)),
        (completion([{"type": "thinking", "thinking": "3 + 4"}, {"type": "text", "text": "7"}, 3]), Reply("7", n_tokens=11)),
        (completion("7", finish_reason=None), Reply("7", n_tokens=11)),
        (completion("7", finish_reason="length"), Reply("7", cut=True, n_tokens=11)),
        (completion("a\ud800b"), Reply("a?b", n_tokens=11)),
        (completion() | {"usage": None}, Reply("7")),
        (completion() | {"usage": {"prompt_tokens": -4}}, Reply("7")),
        (completion() | {"usage": {"prompt_tokens": True}}, Reply("7")),
        (completion() | {"usage": [3]}, Reply("7")),
        (completion(logprobs=[1]), Reply("7", n_tokens=11)),
        (completion(logprobs={"content": None}), Reply("7", n_tokens=11)),
        (completion(logprobs={"content": [{"token": 7, "logprob": -1}]}), Reply("7", n_tokens=11)),
    ],
)  # fmt: skip
def test_what_a_server_may_leave_out_is_read_as_absent(body: dict[str, Any], reply: Reply) -> None:
    assert read_reply(json.dumps(body)) == reply


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("", "no whole JSON"),
        ("[" * 100_000, "no whole JSON"),
        ("[]", "holds no message"),
        ('{"choices": []}', "holds no message"),
        ('{"choices": {"0": {"message": {}}}}', "holds no message"),
        ('{"choices": [{"message": null}]}', "holds no message"),
        ('{"choices": [{"message": "7"}]}', "holds no message"),
        ('{"choices": [{"message": {"content": {"text": "7"}}}]}', "is a dict"),
        ('{"choices": [{"message": {"content": 7}}]}', "is a int"),
        ('{"error": "no"}', 'tells of an error: "no"'),
    ],
)
def test_what_is_no_completion_is_told_apart(body: str, told: str) -> None:
    with pytest.raises(NoReplyError, match=told):
        read_reply(body)


def test_a_label_listed_at_minus_infinity_has_probability_zero(server: Server) -> None:
    """`-Infinity` as some servers write it, and exactly 0 or a rounding above it for the one that takes all."""
    server.behave = lambda body: (200, {}, listing(0.0004, -math.inf, -9999.0))
    asked = AskedChain.of(Endpoint("m", server.url), CHOICE, "choice", ABC)
    [answered] = asked.read([(asked.chain, [" A", " B", " C"])])
    assert [(one.p, one.logp) for one in answered.readings] == [(0, -math.inf), (1, 0), (0, -math.inf)]
    assert {(one.entropy, one.label_mass, one.p_se) for one in answered.readings} == {(0, 1, 0)}


@pytest.mark.parametrize("value", [None, "-0.5", [], True])
def test_a_listing_that_cannot_be_read_counts_as_none(server: Server, value: Any) -> None:
    answer = drawn({"B": 0.8, "A": 0.2})
    server.behave = lambda body: (200, {}, listing(-0.1, value)) if "logprobs" in body else answer(body)
    endpoint = Endpoint("m", server.url, samples=50)
    asked = AskedChain.of(endpoint, CHOICE, "choice", ABC)
    assert endpoint.gives_logprobs is False
    [answered] = asked.read([(asked.chain, [" B"])])
    assert answered.readings[0].p == pytest.approx(0.8, abs=0.25)
    assert answered.readings[0].p_se > 0


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.5])
def test_a_log_probability_that_is_none_leaves_the_chain_out(server: Server, value: float) -> None:
    server.behave = lambda body: (200, {}, listing(-0.1, value))
    with pytest.raises(CotfaithError, match=r"'m' gives log-probabilities that are none \(NaN, or above 0\)") as caught:
        AskedChain.of(Endpoint("m", server.url), CHOICE, "choice", ABC)
    assert not isinstance(caught.value, EndpointError)


def test_under_one_variant_alone_it_is_nan_and_not_sampled(server: Server) -> None:
    server.behave = lambda body: (200, {}, listing(-0.1, -3.0))
    asked = AskedChain.of(Endpoint("m", server.url), CHOICE, "choice", ABC)
    server.behave = lambda body: (200, {}, listing(-0.1, math.nan if len(body["messages"]) == 1 else -3.0))
    n = len(server.bodies)
    whole, none = asked.read([(asked.chain, [" A"]), (replace(asked.chain, steps=()), [" A", " B"])])
    assert whole.readings[0].p == pytest.approx(math.exp(-3) / (math.exp(-3) + math.exp(-0.1)))
    assert none.said is None
    assert all(math.isnan(one.p) and math.isnan(one.entropy) and not one.greedy for one in none.readings)
    assert len(server.bodies) == n + 2


def table(run: RunDirectory) -> pd.DataFrame:
    return run.read_records().sort_values(
        ["problem_id", "measure", "variant", "step", "metric", "seed"], ignore_index=True
    )


def scripted(body: dict[str, Any]) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Writes a chain where one is asked for; answers with the last number it sees, by the seed another now and then."""
    if len(body["messages"]) == 1 and "Complete this sentence" not in body["messages"][0]["content"]:
        return ok("First 14 + 8 = 22.\nThen 22 + 2 = 24.")
    return ok("5") if body.get("seed", 0) % 3 == 1 else says_the_last_number(body)


@pytest.fixture
def undisturbed(server: Server, tmp_path: Path) -> tuple[RunDirectory, int, dict[str, Any]]:
    server.behave = scripted
    reader = study_of(server)["readers"][0] | {"concurrency": 1}
    config = study_of(server, readers=[reader], chains="generate", tests=["early_termination"], continue_tokens=0)
    run = measure_study(parse_config(config), tmp_path / "whole")
    n_requests = len(server.bodies)
    assert len(run.read_unit_meta()) == 2
    return run, n_requests, config


def test_a_server_that_dies_after_any_number_of_requests_costs_nothing(
    server: Server, undisturbed: tuple[RunDirectory, int, dict[str, Any]], tmp_path: Path
) -> None:
    """In writing chains, between the samples of a chain (they come in threes), one before the end; silent or with a
    page."""
    whole, n, config = undisturbed
    for k, end in {1: PAGE, n // 4: (0, {}, b""), n // 2 + 1: PAGE, n - 1: (0, {}, b"")}.items():
        server.bodies.clear()
        server.behave = lambda body, k=k, end=end: end if len(server.bodies) > k else scripted(body)
        with pytest.raises(EndpointError):
            measure_study(parse_config(config), tmp_path / str(k))
        before = RunDirectory(tmp_path / str(k))
        assert not before.read_exclusions()
        kept = {path: path.read_bytes() for path in (before.path / "records").glob("*.parquet")}
        server.behave = scripted
        after = measure_study(parse_config(config), tmp_path / str(k))
        assert all(path.read_bytes() == content for path, content in kept.items())
        pd.testing.assert_frame_equal(table(after), table(whole), check_exact=True)
        assert after.read_unit_meta() == whole.read_unit_meta()
        assert after.read_exclusions() == whole.read_exclusions()
        assert after.read_chains() == whole.read_chains()


def written(folder: Path) -> bytes:
    """All that is in the files of `folder`, parquet unpacked."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    tables = [pd.read_parquet(path).to_csv().encode() for path in files if path.suffix == ".parquet"]
    return b"\n".join([*(path.read_bytes() for path in files), *tables])


@pytest.mark.parametrize(
    "behave",
    [
        lambda body: ok(f"{KEY} and 22 more") if body["temperature"] else ok(f"It is {KEY}."),
        lambda body: refused(400, f"bad key {KEY}"),
        lambda body: refused(401, f"bad key {KEY}"),
        lambda body: (200, {}, {"error": f"bad key {KEY}"}),
        lambda body: says_the_last_number(body) if len(body["messages"]) == 3 else ok(f"Think: {KEY}. So it is 22."),
    ],
)  # fmt: skip
def test_a_key_that_the_server_says_is_written_and_shown_nowhere(
    server: Server, behave: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server.behave = behave
    told = ""
    try:
        run_study(parse_config(study_of(server, chains="generate", tests=["filler"])), tmp_path / "run")
    except CotfaithError as error:
        told = str(error)
    assert server.keys[0] == f"Bearer {KEY}"
    assert (tmp_path / "run" / "manifest.json").is_file()
    assert KEY.encode() not in written(tmp_path / "run")
    assert KEY not in told + "".join(capfd.readouterr())


def test_a_key_too_short_to_be_one_is_left_in_replies(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """`EMPTY` is what local servers are given, and 7 may be the answer."""
    monkeypatch.setenv("OPENAI_API_KEY", "7")
    assert Endpoint("m", server.url).generate(["q"], max_new_tokens=5) == ["7"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"endpoint": "https://me:hush-hush@host/v1"},
            r"readers\.0\.endpoint': the address has a user, a password or a",
        ),
        ({"endpoint": "https://host/v1?api_key=hush-hush"}, r"name the environment variable .*\(api_key_env\)"),
        ({"endpoint": "https://me:hush-hush/@host/v1"}, "password"),
        ({"api_key_env": "hush-hush"}, r"no name of an environment variable, in capitals as OPENAI_API_KEY"),
        ({"api_key_env": "hf_hush"}, r"put the key into the environment"),
        ({"api_key": "hush-hush"}, r"key 'readers\.0\.api_key' is unknown; did you mean 'api_key_env'\?"),
    ],
)
def test_a_key_in_a_study_file_is_refused_and_not_repeated(
    server: Server, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    reader = study_of(server)["readers"][0] | change
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps(study_of(server, readers=[reader])))
    with pytest.raises(CotfaithError, match=told) as caught:
        load_config(path)
    assert "hush" not in str(caught.value)
    path.write_text(json.dumps(study_of(server, paraphraser=reader)))
    with pytest.raises(CotfaithError) as caught:
        load_config(path)
    assert "hush" not in str(caught.value)


def test_what_is_no_secret_in_an_address_is_kept(server: Server) -> None:
    address = "https://host/v1?api-version=2024-10-21"
    assert parse_config(study_of(server, readers=[study_of(server)["readers"][0] | {"endpoint": address}])).readers[0]


@pytest.mark.parametrize("spec", ["m@https://me:hush@host/v1", "big=m@https://me:hush@host/v1", "=m@https://me:hush@h"])
def test_a_password_on_the_command_line_is_refused_and_not_repeated(spec: str) -> None:
    with pytest.raises(CotfaithError) as caught:
        study_of_options([spec], "people:1", None, 0, False, dtype="float32", mechanism=False)
    assert "hush" not in str(caught.value)


def test_a_key_where_a_long_error_is_cut_shows_no_part(server: Server) -> None:
    server.behave = lambda body: (200, {}, {"error": {"message": "x" * 160 + KEY + "x" * 200}})
    with pytest.raises(EndpointError) as caught:
        Endpoint("m", server.url, max_retries=0).generate(["q"], max_new_tokens=5)
    assert KEY[:4] not in str(caught.value)
