"""What an OpenAI-compatible server sent back, with nothing in it taken on trust.

Source: platform.openai.com/docs/api-reference/chat/object for the schema.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROUNDING = 1e-3
"""How far above 0 a listed log-probability may lie: low precision rounds so."""


@dataclass(frozen=True)
class Reply:
    """A reply, and whether it was cut off at the most tokens; `first` are the listed log-probabilities (nats) at its
    first visible token, empty where none are given, NaN where one is no log-probability; `n_tokens` the tokens of its
    prompt (None: the server does not say); `withheld` that a filter kept back some or all of it."""

    text: str
    cut: bool = False
    first: tuple[tuple[str, float], ...] = ()
    n_tokens: int | None = None
    withheld: bool = False

    @property
    def undefined(self) -> bool:
        return any(math.isnan(logp) for _, logp in self.first)


class NoReplyError(ValueError):
    """What came is no whole chat completion, for the reason given."""


def read_reply(body: str) -> Reply:
    """The reply in the body of a response. Raises NoReplyError."""
    try:
        whole = json.loads(body)
    except (ValueError, RecursionError):
        raise NoReplyError("it is no whole JSON") from None
    match whole:
        case {"choices": [{"message": {**message}, **choice}, *_]}:
            pass
        case {"error": error} if error:
            raise NoReplyError(f"it tells of an error: {json.dumps(error)}")
        case _:
            raise NoReplyError("it holds no message")
    text = _text(message.get("content")).encode("utf-8", "replace").decode()
    ended, listed = choice.get("finish_reason"), _first_listed(choice.get("logprobs"))
    return Reply(text, ended == "length", listed, _n_tokens(whole), ended == "content_filter")


def _text(content: Any) -> str:
    match content:
        case None:
            return ""
        case str():
            return content
        case [*parts]:
            return "".join(part["text"] for part in parts if _is_text(part))
    raise NoReplyError(f"the content of its message is a {type(content).__name__}")


def _is_text(part: Any) -> bool:
    """Whether a part of a content is text and, unlike thinking or images, of the reply."""
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _first_listed(logprobs: Any) -> tuple[tuple[str, float], ...]:
    """Tokens and log-probabilities listed for the first token that is not blank; empty where none are, or where they
    cannot be read."""
    tokens = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    for entry in tokens if isinstance(tokens, list) else ():
        if (chosen := _listed(entry)) is None:
            return ()
        if chosen[0].strip():
            beside = entry.get("top_logprobs")
            others = [_listed(other) for other in beside] if isinstance(beside, list) else []
            return tuple(dict([chosen, *filter(None, others)]).items()) if all(others) else ()
    return ()


def _listed(entry: Any) -> tuple[str, float] | None:
    match entry:
        case {"token": str(token), "logprob": int() | float() as logp} if not isinstance(logp, bool):
            return token, math.nan if not logp <= ROUNDING else float(min(max(logp, -1e300), 0))
    return None


def _n_tokens(whole: Mapping[str, Any]) -> int | None:
    match whole.get("usage"):
        case {"prompt_tokens": int(n)} if n > 0 and n is not True:
            return n
    return None
