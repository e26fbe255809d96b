"""The one error a user is meant to read, and what it says of words that are unknown."""

import difflib
from collections.abc import Iterable, Sequence


class CotfaithError(ValueError):
    """Something the user can mend: one sentence with what was found, what was expected, and the remedy."""


class EndpointError(CotfaithError):
    """An endpoint gives no answers at all: a run stops there, as every unit after it would fail too, and resumes."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The question after an unknown word whether the nearest one of `known` was meant; empty where none is near."""
    near = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_words(field: str, words: Sequence[str], known: Sequence[str]) -> None:
    """Raises CotfaithError where `words`, the values of a plan's `field`, are one text or hold one that is unknown."""
    if isinstance(words, str):
        raise CotfaithError(f"{field} is the text {words!r}, where several words are expected; write ({words!r},).")
    for word in words:
        if word not in known:
            hint = nearest(str(word), known) or "; use one of these."
            raise CotfaithError(f"{field} has {word!r}, which is none of {', '.join(known)}{hint}")
