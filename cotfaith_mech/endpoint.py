"""A reader behind an OpenAI-compatible chat endpoint: its text is all it shows, at times the likeliest first tokens.

1. A chain is asked as turns: the user asks the question, the assistant's turn holds the steps, and the cue stands in a
   user turn of its own, with the request to complete it by the answer alone (Lanham et al. 2307.13702).
2. Choices and yes/no/maybe, where the server lists log-probabilities: the labels among the listed tokens of the first
   visible one, renormalised; `label_mass` is their sum. One that is not listed has p = 0 (at most the least listed p).
3. Else, and where no label is listed: the share of `samples` replies at temperature 1, with its standard error.
4. What the reader says is its reply at temperature 0, or the likeliest label where labels are listed.
Source: MEASURES 'Reading an answer'; platform.openai.com/docs/api-reference/chat for the schema.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from .answers import normalise, same_answer, uncut_answer
from .chains import Chain
from .errors import CotfaithError, EndpointError
from .model import ReaderInfo
from .problems import AnswerKind
from .reading import MIN_LABEL_MASS, Answered, Asked, Reading, check_label_mass
from .replies import NoReplyError, Reply, read_reply
from .seeds import check_seeds, seed_of

GO_ON = "Go on from exactly where you stopped; do not repeat anything."
COMPLETE = "{cue} …\nComplete this sentence. Reply only with {form}."
AT_ONCE = "Answer at once, without reasoning. "
FORMS: Mapping[AnswerKind, str] = {
    "number": "the number",
    "choice": "one letter",
    "yesno": "one word: yes, no or maybe",
    "text": "the answer, in a few words",
}
PROBE = "Write twelve random words."
MAX_ANSWER_TOKENS = 16
TOP_TOKENS = (20, 5)
"""How many first tokens are asked for: the most that the API lists, and what servers with a lower limit give."""
NEWER_LENGTH = "max_completion_tokens"
"""What newer models want in place of max_tokens, and say so when they refuse it."""
PARTICULAR = (400, 413, 422)
"""What a server answers to one request that it cannot take (too long, say); other refusals concern them all."""
RETRY_SECONDS = (0.5, 8.0)
"""What is waited before the first try after a reply that is none, twice as long before each further one; the most."""
SHORTEST_SECRET = 8
"""A key of fewer characters ('none', 'EMPTY') is a dummy, and a word of replies that may well be meant."""
_PIECE = re.compile(r"\d|[^\W\d]+|([^\w\s])\1*")

Talk = tuple[tuple[str, str], ...]
"""Turns of a conversation: role and text."""


@dataclass(frozen=True)
class Request:
    """One request for a reply to `talk`; `seed` counts only where the temperature is not 0."""

    talk: Talk
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    logprobs: bool = False


class Endpoint:
    """A TextReader at an address (`https://…/v1`). Its API key stays in the environment and is read at each call.

    An address with `user:password@` is asked with these in place of the key.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        samples: int = 20,
        timeout: float = 120.0,
        max_retries: int = 6,
        check_sampling: bool = True,
    ) -> None:
        """`timeout` in seconds, per try; `max_retries` with exponential backoff, or after what Retry-After says;
        `check_sampling`: before the first sampled answers, see whether the server samples at all.

        Raises CotfaithError when the client is not installed, the address is no http(s) URL, the key is not set
        (loopback and an address with a user need none), or `concurrency` or `samples` is below 1.
        """
        _client_library()
        address = _address(base_url)
        for name, value in {"concurrency": concurrency, "samples": samples}.items():
            if value < 1:
                raise CotfaithError(f"{name} is {value}, but at least 1 is needed; give a positive number.")
        self.model, self.base_url, self.api_key_env = model, base_url, api_key_env
        self.concurrency, self.samples, self.timeout, self.max_retries = concurrency, samples, timeout, max_retries
        self._shown = _without_secrets(address)
        self._needs_key = not address.username and not _is_loopback(address.hostname or "")
        self._gives_logprobs: bool | None = None
        self._top = TOP_TOKENS
        self._length = "max_tokens"
        self._check_sampling = check_sampling
        self._key()
        identity = f"{model}@{self._shown}"
        self.info = ReaderInfo(
            name=model,
            backend="endpoint",
            context=None,
            dtype="unknown",
            device=f"endpoint {self._shown}",
            weights_hash=identity,
            text_hash=identity,
        )

    def __repr__(self) -> str:
        return f"Endpoint({self.model!r}, {self._shown!r})"

    @property
    def gives_logprobs(self) -> bool | None:
        """Whether the server lists log-probabilities; None until it was asked for some. It is found out once."""
        return self._gives_logprobs

    def render(self, question: str) -> str:
        """The question itself: the server applies its own template. Raises CotfaithError when it is blank."""
        if not question.strip():
            raise CotfaithError("The question is empty; give one with text.")
        return question

    def count(self, text: str) -> int:
        """An estimate of the tokens of `text`, as the tokenizer is out of reach: words, digits one by one, and marks
        (a run of the same mark, such as '...', counts once)."""
        return sum(1 for _ in _PIECE.finditer(text))

    def generate(
        self,
        prompts: Sequence[str],
        *,
        begun: Sequence[str] | None = None,
        max_new_tokens: int,
        temperature: float = 0.0,
        seeds: Sequence[int] = (),
    ) -> list[str]:
        """See `TextReader.generate`. A turn cannot be left open over this API: where one is `begun`, it is shown as the
        assistant's and the user asks to go on; what comes back is set off by a space."""
        starts = [""] * len(prompts) if begun is None else begun
        talks = [_begun(prompt, start) for prompt, start in zip(prompts, starts, strict=True)]
        check_seeds(seeds, prompts, temperature)
        drawn = zip(talks, seeds or [0] * len(talks), strict=True)
        requests = [Request(talk, max_new_tokens, temperature, seed) for talk, seed in drawn]
        return [
            text if not start or text[:1].isspace() else f" {text}"
            for start, text in zip(starts, (reply.text for reply in self.ask(requests)), strict=True)
        ]

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """The replies in the order of `requests`, `concurrency` of them under way at once.

        Raises CotfaithError when the server cannot be reached or refuses a request, after all retries.
        """
        if not requests:
            return []
        openai = _client_library()
        address = urlsplit(self.base_url)
        client = openai.OpenAI(
            base_url=address._replace(query="", fragment="").geturl(),
            default_query=dict(parse_qsl(address.query)),
            api_key=self._key(),
            timeout=self.timeout,
            max_retries=self.max_retries,
        )
        with client, ThreadPoolExecutor(self.concurrency) as pool:
            try:
                return list(pool.map(lambda request: self._reply(client, request), requests))
            except openai.APIError as error:
                raise self._failure(error) from None

    def sample(self, talks: Sequence[Talk], max_tokens: int) -> list[list[Reply]]:
        """`samples` replies to each talk at temperature 1; the seeds follow from its text, so that no two texts share
        them. Raises CotfaithError when the server writes the same text for every seed (looked at before the first)."""
        if talks and self._check_sampling:
            probes = [Request((("user", PROBE),), 3 * MAX_ANSWER_TOKENS, 2.0, seed) for seed in range(4)]
            if len({reply.text for reply in self.ask(probes)}) == 1:
                raise EndpointError(
                    f"{self._shown} wrote the same text 4 times at temperature 2, so shares of sampled answers mean "
                    "nothing; turn sampling on (`transformers serve`: do_sample in generation_config.json), or set "
                    "check_sampling=False for a model that always writes the same."
                )
            self._check_sampling = False
        n = self.samples
        replies = self.ask([Request(talk, max_tokens, 1.0, seed_of(talk) + i) for talk in talks for i in range(n)])
        return [replies[i * n : (i + 1) * n] for i in range(len(talks))]

    def _reply(self, client: Any, request: Request) -> Reply:
        """One reply. A server that refuses log-probabilities, or gives none, is asked without them from then on."""
        openai = _client_library()
        if not request.logprobs or self._gives_logprobs is False:
            return self._sent(client, request)
        refused = (openai.BadRequestError, openai.UnprocessableEntityError, openai.PermissionDeniedError)
        for top in self._top:
            try:
                reply = self._sent(client, request, logprobs=True, top_logprobs=top)
                self._top = (top,)
                break
            except refused:
                if self._gives_logprobs and top in self._top:
                    raise
        else:
            reply = self._sent(client, request)
        if self._gives_logprobs is None and (reply.first or reply.text.strip()):
            self._gives_logprobs = bool(reply.first)
        return reply

    def _sent(self, client: Any, request: Request, **options: Any) -> Reply:
        """The reply to one request; where what comes is none, it is asked for again, as the client does after others
        that fail."""
        (first, longest), told = RETRY_SECONDS, ""
        for tried in range(self.max_retries + 1):
            try:
                reply = read_reply(self._body(client, request, **options))
            except NoReplyError as amiss:
                told = self._hidden(str(amiss))[:300]
            else:
                if reply.withheld:
                    raise CotfaithError(
                        f"{self._shown} withheld a reply of {self.model!r} (finish_reason content_filter); leave this "
                        "chain out, or ask a server without that filter."
                    )
                return replace(reply, text=self._hidden(reply.text, SHORTEST_SECRET))
            if tried < self.max_retries:
                time.sleep(min(first * 2**tried, longest))
        raise EndpointError(
            f"{self._shown} answered, but with no chat completion ({told}); try later, or give the address of an "
            "OpenAI-compatible API, which often ends in /v1."
        )

    def _body(self, client: Any, request: Request, **options: Any) -> str:
        if request.temperature:
            options |= {"seed": request.seed % 2**31, "top_p": 1.0}
        create = partial(
            client.chat.completions.with_raw_response.create,
            model=self.model,
            messages=[{"role": role, "content": content} for role, content in request.talk],
            temperature=request.temperature,
            **options,
        )
        openai, length = _client_library(), self._length
        try:
            return create(**{length: request.max_tokens}).http_response.text
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            wanted = re.search(rf"(?i)(?=.*{NEWER_LENGTH}).*(?:instead|not support|unsupported)", str(error), re.DOTALL)
            if length == NEWER_LENGTH or not wanted:
                raise
            self._length = NEWER_LENGTH
            return create(**{NEWER_LENGTH: request.max_tokens}).http_response.text

    def _key(self) -> str:
        key = os.environ.get(self.api_key_env, "")
        if not key and self._needs_key:
            raise CotfaithError(
                f"The environment variable {self.api_key_env} is not set, but {self._shown} needs an API key; "
                "set it, or name another variable (api_key_env)."
            )
        return key or "none"

    def _hidden(self, text: str, least: int = 1) -> str:
        """`text` with `***` in place of the key and the address' password, of `least` characters or more."""
        password = urlsplit(self.base_url).password or ""
        for secret in (os.environ.get(self.api_key_env, ""), password, unquote(password)):
            text = text.replace(secret, "***") if len(secret) >= least else text
        return text

    def _failure(self, error: Any) -> CotfaithError:
        """One sentence on a failed request: address, what the server said (never the key), remedy."""
        openai = _client_library()
        if isinstance(error, openai.APITimeoutError):
            return EndpointError(f"{self._shown} did not answer in {self.timeout:g} s; raise timeout or try later.")
        if isinstance(error, openai.APIConnectionError):
            return EndpointError(
                f"{self._shown} cannot be reached, or broke off; check the address and that the server runs."
            )
        said = self._hidden(str(error))[:300]
        status = getattr(error, "status_code", None)
        remedies = {
            401: f"check the key in {self.api_key_env}",
            403: f"check the key in {self.api_key_env} and what it may use",
            404: "check the address and the name of the model",
            429: "lower concurrency or try later",
        }
        busy = status is not None and status >= 500
        remedy = remedies.get(status or 0, "try later" if busy else "check the model and what the server supports")
        kind = CotfaithError if status in PARTICULAR else EndpointError
        return kind(f"{self._shown} refused a request to {self.model!r} ({said}); {remedy}.")


@dataclass(frozen=True)
class AskedChain:
    """A ChainReader: a chain that an endpoint has been asked to complete, with its own answer a* in `chain.answer`."""

    model: Endpoint
    chain: Chain
    kind: AnswerKind
    labels: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        endpoint: Endpoint,
        chain: Chain,
        kind: AnswerKind,
        labels: tuple[str, ...] = (),
        min_label_mass: float = MIN_LABEL_MASS,
    ) -> AskedChain:
        """Ask for a* after the complete chain (or keep `chain.answer` if it is set already).

        Raises CotfaithError when the reply holds no answer of this kind, or less than `min_label_mass` lies on the
        labels where the server lists log-probabilities.
        """
        asked = cls(endpoint, chain, kind, labels)
        if chain.answer:
            return asked
        [reply] = endpoint.ask([asked._greedy(asked.talk(chain))])
        listed = asked._listed(reply)
        if reply.undefined:
            raise CotfaithError(
                f"{endpoint.info.name!r} gives log-probabilities that are none (NaN, or above 0) after the complete "
                "chain; see whether the server's model is whole."
            )
        if reply.first:
            check_label_mass(endpoint, math.fsum(listed.values()), labels, min_label_mass)
        said = asked._said(reply, listed)
        if not said:
            raise CotfaithError(
                f"{endpoint.info.name!r} gave no {kind} at once after the cue {chain.cue!r}, but wrote "
                f"{reply.text!r}; give another cue or reader."
            )
        return replace(asked, chain=chain.with_answer(f" {said}"))

    def talk(self, variant: Chain) -> Talk:
        """The turns that show a text variant without its answer: question, steps, and the cue in a turn of its own.

        A variant without steps is one user turn, which asks for the answer at once.
        """
        form = FORMS[self.kind]
        if self.labels:
            form = f"one {'word' if self.kind == 'yesno' else 'letter'}: {_listing(self.labels)}"
        complete = COMPLETE.format(cue=variant.cue.strip(), form=form)
        steps = "".join(variant.steps).strip()
        if not steps:
            return (("user", f"{variant.prompt}\n\n{AT_ONCE}{complete}"),)
        return ("user", variant.prompt), ("assistant", steps), ("user", complete)

    def read(self, asked: Asked) -> list[Answered]:
        """See `ChainReader.read`; texts that are the same to the reader are asked once."""
        talks = [self.talk(variant) for variant, _ in asked]
        distinct = list(dict.fromkeys(talks))
        replies = dict(zip(distinct, self.model.ask([self._greedy(talk) for talk in distinct]), strict=True))
        unlisted = [talk for talk in distinct if not (replies[talk].undefined or self._listed(replies[talk]))]
        samples = dict(zip(unlisted, self.model.sample(unlisted, MAX_ANSWER_TOKENS), strict=True))
        return [
            self._answered(variant, answers, replies[talk], samples.get(talk, []))
            for talk, (variant, answers) in zip(talks, asked, strict=True)
        ]

    def _greedy(self, talk: Talk) -> Request:
        return Request(talk, MAX_ANSWER_TOKENS, logprobs=bool(self.labels))

    def _listed(self, reply: Reply) -> dict[str, float]:
        """Probability of each label that is listed for the first visible token: the sum over its spellings (' A', 'A';
        'Yes', ' yes'). Given the blanks before that token; '(A' and 'A)' are other tokens."""
        fold = str.casefold if self.kind == "yesno" else str
        by_spelling = {fold(label): label for label in self.labels}
        listed: dict[str, float] = {}
        for token, logp in reply.first:
            label = by_spelling.get(fold(token.strip()))
            if label is not None and math.exp(logp) > 0:
                listed[label] = listed.get(label, 0.0) + math.exp(logp)
        return listed

    def _said(self, reply: Reply, listed: Mapping[str, float]) -> str | None:
        return max(listed, key=lambda label: listed[label]) if listed else self._extracted(reply)

    def _extracted(self, reply: Reply) -> str | None:
        return uncut_answer(_without_cue(reply.text, self.chain.cue), self.kind, reply.cut)

    def _answered(self, variant: Chain, answers: Sequence[str], reply: Reply, samples: Sequence[Reply]) -> Answered:
        n_tokens = self.model.count(variant.with_answer("").text) if reply.n_tokens is None else reply.n_tokens
        if reply.undefined:
            return Answered(None, tuple(Reading(math.nan, False, math.nan, n_tokens, math.nan) for _ in answers))
        listed = self._listed(reply)
        said = self._said(reply, listed)
        shares = self._listed_shares(listed) if listed else self._sampled_shares(samples)
        entropy = sum(-p * math.log(p) for p in shares.values())
        mass = math.fsum(listed.values()) if listed else self._sampled_mass(shares)
        readings = []
        for answer in answers:
            wanted = normalise(answer, self.kind)
            p = 0.0 if wanted is None else shares.get(wanted, 0.0)
            logp = math.log(p) if p else -math.inf
            greedy = same_answer(said or "", answer, self.kind)
            readings.append(Reading(logp, greedy, entropy, n_tokens, min(mass, 1.0), _standard_error(p, len(samples))))
        return Answered(said, tuple(readings))

    def _listed_shares(self, listed: Mapping[str, float]) -> dict[str | None, float]:
        total = math.fsum(listed.values())
        return {normalise(label, self.kind): p / total for label, p in listed.items()}

    def _sampled_shares(self, samples: Sequence[Reply]) -> dict[str | None, float]:
        """Share of each normalised answer; all replies without an answer of the kind are one outcome (None)."""
        counts = Counter(normalise(self._extracted(reply) or "", self.kind) for reply in samples)
        return {outcome: count / len(samples) for outcome, count in counts.items()}

    def _sampled_mass(self, shares: Mapping[str | None, float]) -> float:
        """Share of the replies that are one of the labels; 1 where the answer is free."""
        return sum(shares.get(normalise(label, self.kind), 0.0) for label in self.labels) if self.labels else 1.0


def _standard_error(p: float, n: int) -> float:
    """Standard error of the share `p` of `n` draws (0 draws: p is exact, 0).

    Where p is 0 or 1 the share (np + 1) / (n + 2) stands for it, lest the error be 0 (as in Agresti and Coull 1998).
    """
    if n == 0:
        return 0.0
    if p in (0.0, 1.0):
        p = (n * p + 1) / (n + 2)
    return math.sqrt(p * (1 - p) / n)


def _without_cue(reply: str, cue: str) -> str:
    """`reply` without the cue it may open with, or the end of it ('The answer is 22' after 'So the answer is')."""
    words = [re.escape(word) for word in cue.split()]
    for start in range(len(words) - 1):
        opening = re.match(r"\W*" + r"\s+".join(words[start:]) + r"[\s:…*]+", reply, re.IGNORECASE)
        if opening:
            return reply[opening.end() :]
    return reply


def _begun(prompt: str, start: str) -> Talk:
    if not start.strip():
        return (("user", prompt),)
    return ("user", prompt), ("assistant", start), ("user", GO_ON)


def _listing(labels: Sequence[str]) -> str:
    """'A, B or C'."""
    return " or ".join(filter(None, [", ".join(labels[:-1]), labels[-1]]))


def _client_library() -> Any:
    try:
        import openai
    except ModuleNotFoundError:
        raise CotfaithError(
            "An endpoint is asked through the openai client, which is not installed; "
            "install the extra: pip install 'cotfaith-mech[api]'."
        ) from None
    return openai


def _address(base_url: str) -> SplitResult:
    try:
        address = urlsplit(base_url)
        if address.scheme in ("http", "https") and address.hostname and address.port != 0:
            return address
    except ValueError:
        pass
    shown = base_url.rpartition("@")[2].partition("?")[0]
    raise CotfaithError(f"The endpoint {shown!r} is no web address; give one such as http://localhost:8000/v1.")


def _without_secrets(address: SplitResult) -> str:
    """The address without user, password, query and fragment."""
    return address._replace(netloc=address.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
