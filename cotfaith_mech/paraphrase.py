"""A rule-based paraphraser, offline: other wording, the same numbers, operators, names, choice labels and negations.

1. Code, LaTeX and `<<48/2=24>>` annotations are masked; a step is taken sentence by sentence.
2. Openings: a connective ('So', 'In total') is exchanged for one of its class, or a neutral opening is put before.
3. Frames: 'Ann has 14 + 8 = 22.' becomes 'For Ann: 14 + 8 = 22.', '14 + 8 = 22 for Ann.', …
4. Clauses: 'After X, Y.' becomes 'Y after X.'
5. Words: a small lexicon of exchangeable words, and contractions in both directions.
6. Every draw goes through `validate`; a rejected draw is counted with its reason, never used.
Lexicon and frames are our own. What a paraphrase must keep: MEASURES 'Behavioural tests', 3.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from .answers import end_before, labels
from .chains import segment

T = TypeVar("T")

CARDINALS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
FRACTIONS = ("half", "third", "quarter")
_NUMBER_WORDS = {
    *CARDINALS, *FRACTIONS, "zero", "one", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety", "hundred", "thousand",
    "million", "billion", "dozen", "twice", "double", "triple", "thirds", "quarters", "halves", "percent",
}  # fmt: skip
_NEGATIONS = {"not", "no", "never", "none", "neither", "nor", "without", "cannot", "nobody", "nothing"}

_CONNECTIVES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        r"(?:so (?:that|this) means(?: that)?|(?:this|that|which|it) (?:means|implies)(?: that)?|it follows that"
        r"|(?:so|therefore|thus|hence|consequently|as a result|accordingly|(?:this|that) is why)\b"
        r"(?! far| much| many| that| long| called)),?",
        ("Therefore, ", "Thus, ", "Hence, ", "As a result, ", "Consequently, ", "This means that ", "It follows that "),
    ),
    (
        r"(?:in total|altogether|all together|in all|overall|all told),",
        ("In total, ", "Altogether, ", "All told, ", "Overall, "),
    ),
    (
        r"(?:next|then|after that|afterwards|subsequently)\b(?! to),?",
        ("Next, ", "After that, ", "Then ", "Afterwards, ", "After this, ", "As the next step, ", "Following that, "),
    ),
    (
        r"(?:first|firstly|to begin(?: with)?|to start(?: with)?|first of all),",
        ("To begin with, ", "First of all, ", "To start, ", "First, "),
    ),
    (r"(?:finally|lastly|in the end|at last),", ("Lastly, ", "In the end, ", "To finish, ", "Finally, ")),
    (r"(?:however|nevertheless|nonetheless|even so),", ("Nevertheless, ", "Even so, ", "However, ", "Still, ")),
    (
        r"(?:also|additionally|moreover|furthermore|in addition|besides),",
        ("Moreover, ", "In addition, ", "Furthermore, ", "Besides, "),
    ),
    (r"(?:for example|for instance),", ("For instance, ", "As an example, ", "To give an example, ")),
)
_OPENINGS = ("Here, ", "Now, ", "In this case, ", "At this point, ", "Note that ", "We see that ", "We find that ")
_SUM_OPENINGS = ("Working this out, ", "By calculation, ", "Doing the arithmetic, ", "Computing this, ")
_BARE_OPENINGS = ("We have ", "We get ", "This gives ", "That is, ", "We obtain ")

_GROUPS = tuple(
    tuple(group.split(" | "))
    for group in """buys | purchases
bought | purchased
starts with | begins with
started with | began with
finishes | completes
finished | completed
needs | requires
needed | required
needs to | has to
need to | have to
uses | makes use of
collected | gathered
altogether | in total | all told
each day | every day
each week | every week
each month | every month
each year | every year
each of | all of
appears to | seems to
appear to | seem to
associated with | linked to
compared with | compared to
improve | enhance
improved | enhanced
due to | owing to
despite | in spite of
similar to | comparable to
useful | helpful
based on | on the basis of
may | might
the rest of | the remainder of
for a total of | which makes a total of
becomes | turns into
saves | puts aside
saved | put aside
gives us | yields
therefore | thus
in order to | so as to
big | large
bigger | larger
biggest | largest
for example | for instance
amount | quantity
whole | entire
approximately | roughly
calculate | compute | work out
determine | find out
shows that | demonstrates that | indicates that
showed that | demonstrated that | indicated that
suggests that | indicates that
although | even though
while | whereas
important | essential
helps | assists
findings | results
people who | people that
often | frequently
usually | generally
believe that | think that
believes that | thinks that
allows | permits
is equal to | equals
additional | extra
remaining | leftover
total cost | overall cost
total number | overall number
number of | count of
is not | isn't
are not | aren't
was not | wasn't
does not | doesn't
did not | didn't
do not | don't
will not | won't
cannot | can't
let's | let us""".splitlines()
)
_EXCHANGES = {form: tuple(o for g in _GROUPS if form in g for o in g if o != form) for g in _GROUPS for form in g}
_GROUPED = re.compile(
    r"(?<![\w$\\])(?:(?P<article>an?) )?(?P<word>"
    + "|".join(sorted(_EXCHANGES, key=len, reverse=True)).replace("'", "['’]")
    + r")(?![\w-])",
)
_DIRECTED = tuple(
    (re.compile(pattern), options)
    for pattern, options in (
        (r"(?<=\w )left(?=\s*$|[.,;!])", ("remaining",)),
        (r"(?<=, )so\b(?! that| far| many| much)", ("which means", "and so", "meaning")),
        (r"(?<![Aa]s )\bper\b(?! cent)", ("for each", "for every")),
        (r"\b[Bb]ecause\b(?! of)", ("given that", "since")),
        (r"\bgets(?= [$\d])", ("receives",)),
        (r"\bgot(?= [$\d])", ("received",)),
        (r"\bin all(?=\s*$|[,.;])", ("in total",)),
        (r"\bkids\b", ("children",)),
        (r"(?<=[Tt]he )total(?= [a-z])(?! of| is| was| comes| will| would)", ("overall", "combined")),
        (r"\bmakes(?= \$)", ("earns",)),
        (r"\bmade(?= \$)", ("earned",)),
        (r"\bspends(?= \$)", ("pays out",)),
        (r"\bspent(?= \$)", ("paid out",)),
        (r"\bshould be\b", ("ought to be",)),
        (r"\bsuch as\b", ("like",)),
        (r"(?<=[Tt]his )study\b", ("investigation",)),
        (r"\btravels(?= \d)", ("covers",)),
        (r"\btraveled(?= \d)", ("covered",)),
        (r"\bcosts(?= [$\d])", ("is priced at",)),
        (r"\bwill have(?= [$\d])", ("is going to have", "will own")),
        (r"\bit['’]s\b(?! (?:own|been|got))", ("it is",)),
        (r"\b(?:he|she|they|we) will\b", ("{0}'ll",)),
    )
)

_MASKED = re.compile(
    r"`[^`]+`|\\\(.*?\\\)|\\\[.*?\\\]|\$\$.*?\$\$|<<[^>]*>>|https?://\S+|\\[A-Za-z]+(?:\{[^{}]*\})*", re.DOTALL
)
_MASK, _MASKS = 0xE000, 6400  # the private use area
_MARKER = re.compile(r"\s*(?:[-*•]\s+|#+\s+|\(?\d+[.)]\s+|\W*step\s+\d+\W*\s)?(?:[*_]{1,2})?", re.IGNORECASE)
_END = re.compile(r"[.!?:;,]*[\"”'’)\]*_]*\s*$")
_SUM = re.compile(r"\d\s*%?\)?\s*[-+*/×÷=−–]|\d\s+x\s+\$?\d|[-+*/×÷=]\s*[$€£(]*\d")
_VALUE = r"(?P<v>[$€£(−-]*[\d.]*\d(?:[\d\s.,$€£%()+*/×÷x^=−–\ue000-\uf8ff-]*[\d)%\ue000-\uf8ff])?)(?![\w/.]*\w)"
_SUBJECT = (
    r"(?P<s>He|She|It|They|We|I|You|(?:[A-Z][\w’']+)(?: [A-Z][\w’']+)?"
    r"|(?:The|His|Her|Their|Its|Each|My|Our|Your|This|That) [^=\d,;:]{2,50}?)"
)
_THING = r"(?P<s>(?:The|His|Her|Their|Its|This) [^=\d,;:]{2,60}?|[A-Z][\w’']+['’]s [^=\d,;:]{2,50}?)"
_REST = r"(?P<r>.*)"
_SHORT_REST = r"(?P<r>(?: (?!(?:is|are|was|were|and|which|because|so|that)\b)[a-z’'-]+){0,4})"
_OBJECT = {"he": "him", "she": "her", "they": "them", "we": "us", "i": "me"}
_FRAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        rf"{_SUBJECT} has (?:now )?(?:a total of )?{_VALUE}{_REST}",
        (
            "For {o}: {v}{r}",
            "{S} now has {v}{r}",
            "{S} ends up with {v}{r}",
            "That gives {o} {v}{r}",
            "What {s} has is {v}{r}",
        ),
    ),
    (rf"{_SUBJECT} (?:has|had|have) {_VALUE}{_SHORT_REST}", ("{v}{r} for {o}", "For {o} that makes {v}{r}")),
    (
        rf"{_SUBJECT} had {_VALUE}{_REST}",
        ("{S} ended up with {v}{r}", "What {s} had was {v}{r}", "That gave {o} {v}{r}"),
    ),
    (
        rf"{_THING} (?:is|was) (?:equal to )?{_VALUE}{_SHORT_REST}(?<! old)(?<! older)(?<! younger)",
        (
            "{S} comes to {v}{r}",
            "{S} works out to {v}{r}",
            "{S} amounts to {v}{r}",
            "{v}{r} is {s}",
            "For {s} we get {v}{r}",
        ),
    ),
    (
        rf"There (?:is|are|will be) (?:now |still |a total of )?{_VALUE}{_REST}",
        ("We have {v}{r}", "This gives {v}{r}", "That makes {v}{r}", "We count {v}{r}"),
    ),
    (rf"There (?:was|were) {_VALUE}{_REST}", ("We had {v}{r}", "That made {v}{r}", "This gave {v}{r}")),
    (
        rf"{_SUBJECT} (?P<m>(?:will|would|can|could|also|now|only|then|still|already) )?"
        rf"(?P<w>(?!(?:is|was|are|were|be)\b)[a-z]+) (?:a total of )?{_VALUE}{_SHORT_REST}",
        ("What {s} {m}{w} is {v}{r}", "{v}{r} is what {s} {m}{w}", "As for what {s} {m}{w}, it is {v}{r}"),
    ),
    (
        r"(?:[Tt]he )?(?:[Cc]orrect |[Ff]inal |[Rr]ight )?(?:[Aa]nswer|ANSWER|[Aa]ns|[Oo]ption|[Cc]hoice)"
        r"(?: is|\s?:)*\s(?P<v>\(?[A-J]\)?|[$€£]?\d[\d,.]*)",
        (
            "The answer is {v}",
            "That makes the answer {v}",
            "The correct answer is {v}",
            "We answer {v}",
            "Our answer: {v}",
        ),
    ),
)
_IMPERATIVE = re.compile(
    r"(?:find|add|subtract|multiply|divide|calculate|compute|let|note|first|now|here|then|next|determine|combine|assume"
    r"|consider|remember|recall|use|solve|suppose|convert|take|start|we (?:see|find|know))\b",
    re.IGNORECASE,
)
_PARTICIPLE = re.compile(
    r"[A-Z][a-z]+(?:ing (?:the|a|an|his|her|their|all|both|like|these|this|that|it|up|out|for|[$\d])|ly,)"
)
_CLAUSE = re.compile(
    r"(?P<x>(?:After|Before|When|If|Since|Because|With|During|Once|While|At|On|In|For|By) [^,:;]+?), "
    r"(?:then )?(?P<y>[^:;]+)"
)

_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """a an the this that these those each every all both some any many most more no not he she it they we i you his
        her its their our my your him them us me who what which when where while why how is are was were be been has
        have had do does did will would can could should may might must if then so and or but nor yet for of in on at by
        to from with without into after before during since because as until once there here now also still only just
        let thus hence therefore however finally first second third next lastly overall altogether total given another
        other same one everyone everything already even again answer ans option choice correct final right between among
        together out per over under about than give hand please let's he's she's it's that's there's don't
        doesn't can't""",
    )
)
_OWN_WORDS = _FUNCTION_WORDS | set(CARDINALS) | {
    word.lower()
    for text in (
        *(form for _, forms in (*_CONNECTIVES, *_FRAMES, *_DIRECTED) for form in forms),
        *_OPENINGS, *_SUM_OPENINGS, *_BARE_OPENINGS,
        *(form for group in _GROUPS for form in group),
        *(re.sub(r"\W", " ", pattern) for pattern, _ in _CONNECTIVES),
    )
    for word in re.findall(r"[A-Za-z]{2,}", text)
}  # fmt: skip


@dataclass(frozen=True)
class Paraphrase:
    """A valid paraphrase, or None, and why each draw before it was rejected."""

    text: str | None
    rejected: tuple[str, ...] = ()


def rephrase(step: str, rng: np.random.Generator, tries: int = 8) -> Paraphrase:
    """The first valid of up to `tries` draws of `paraphrase_step`."""
    rejected: list[str] = []
    for _ in range(tries):
        drawn = paraphrase_step(step, rng)
        reason = "no rule applies" if drawn is None else validate(step, drawn)
        if reason is None:
            return Paraphrase(drawn, tuple(rejected))
        rejected.append(reason)
    return Paraphrase(None, tuple(rejected))


def paraphrase_step(step: str, rng: np.random.Generator) -> str | None:
    """One draw of other wording for `step`, outer whitespace kept; None where no rule applies. Not yet validated."""
    if "```" in step or any(_MASK <= ord(c) <= 0xF8FF for c in step):
        return None
    kept: list[str] = []

    def mask(match: re.Match[str]) -> str:
        kept.append(match[0])
        return chr(_MASK + len(kept) - 1)

    masked = _MASKED.sub(mask, step, count=_MASKS)
    drawn = "".join(_sentence(sentence, rng) for sentence in segment(masked, max_steps=len(step) + 1))
    drawn = re.sub("[\ue000-\uf8ff]", lambda m: kept[ord(m[0]) - _MASK], drawn)
    return None if drawn == step or len(kept) == _MASKS else drawn


def _sentence(sentence: str, rng: np.random.Generator) -> str:
    """Marker, opening, core, end, each redrawn; formulas get an opening only; other scripts and very long ones stay."""
    start = marker.end() if (marker := _MARKER.match(sentence)) else 0
    stop = end.start() if (end := _END.search(sentence, start)) else len(sentence)
    core = sentence[start:stop]
    if len(core) > 1000:
        return sentence
    if not re.search(r"[A-Za-z]{2}", core):
        if re.search(r"[^\W\d_]{2}", core) or not re.search(r"\w", core):
            return sentence
        return sentence[:start] + _drawn(_BARE_OPENINGS, rng) + core + sentence[stop:]
    ordinary = {word for word in re.findall(r"[\w'’-]+", core) if word.islower()}
    options, core = _opening(core)
    reworded = _words(_framed(_clauses(core, rng), rng), rng)
    if options or reworded == core or rng.random() < 0.25:
        reworded = _drawn(options or _neutral(core), rng) + _small(reworded, ordinary)
    return sentence[:start] + reworded + sentence[stop:]


def _drawn(options: Sequence[T], rng: np.random.Generator) -> T:
    return options[int(rng.integers(len(options)))]


def _opening(core: str) -> tuple[tuple[str, ...], str]:
    """The class of the connective that `core` opens with (empty: none), and what follows it."""
    for pattern, options in _CONNECTIVES:
        match = re.match(rf"{pattern}\s+(?=\S)", core, re.IGNORECASE)
        if match:
            rest = core[match.end() :]
            same = tuple(o for o in options if o.strip(" ,").lower() != match[0].strip(" ,").lower())
            return same, _capital(rest)
    return (), core


def _neutral(core: str) -> tuple[str, ...]:
    """Openings that add nothing; of arithmetic only before arithmetic, none ending in 'that' before an imperative."""
    openings = (*_OPENINGS, *_SUM_OPENINGS) if _SUM.search(core) else _OPENINGS
    adverbial = tuple(o for o in openings if o.endswith(", ") and not core.lower().startswith(o[:-2].lower()))
    return adverbial if _IMPERATIVE.match(core) else openings


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:] if re.match(r"[a-z]{2}|a ", text) else text


def _small(text: str, ordinary: AbstractSet[str] = frozenset()) -> str:
    """`text` without its initial capital, where that word is no name: one of ours, `ordinary`, or a participle."""
    word = re.match(r"[A-Z][\w'’-]*", text)
    if word is None or word[0] in ("I", "I'm", "I'll") or not (word[0][1:].islower() or word[0] == "A"):
        return text
    known = word[0].lower() in _OWN_WORDS | ordinary and (word[0] != "A" or text.startswith("A "))
    if known or _PARTICIPLE.match(text):
        return text[0].lower() + text[1:]
    return text


def _clauses(core: str, rng: np.random.Generator) -> str:
    """'After X, Y' as 'Y after X', half of the time."""
    match = _CLAUSE.fullmatch(core)
    if match is None or ", " in match["y"] or rng.random() < 0.5:
        return core
    return f"{_capital(match['y'])} {match['x'][0].lower()}{match['x'][1:]}"


def _framed(core: str, rng: np.random.Generator) -> str:
    """`core` in one of the frames that fit it, four times in five."""
    fitting = [(m, forms) for pattern, forms in _FRAMES if (m := re.fullmatch(pattern, core))]
    if not fitting or rng.random() < 0.2:
        return core
    match, form = _drawn([(m, f) for m, forms in fitting for f in forms], rng)
    parts = {key: value or "" for key, value in match.groupdict().items()}
    subject = parts.get("s", "")
    object_ = _OBJECT.get(subject.lower(), _small(subject))
    return _capital(form.format(**parts | {"S": subject, "s": _small(subject), "o": object_}))


def _words(core: str, rng: np.random.Generator) -> str:
    """Exchange words and contractions of the lexicon, each with probability 0.7; capitalised words stay."""

    def grouped(match: re.Match[str]) -> str:
        word = match["word"].replace("’", "'")
        if rng.random() < 0.3:
            return match[0]
        new = _drawn(_EXCHANGES[word], rng)
        article = match["article"]
        return new if article is None else f"{article[0]}{'n' if new[0] in 'aeiou' else ''} {new}"

    core = _GROUPED.sub(grouped, core)
    for pattern, options in _DIRECTED:
        if rng.random() < 0.7:
            new = _drawn(options, rng)
            core = pattern.sub(lambda m, new=new: new.format(m[0].split()[0]), core)
    return core


def validate(original: str, paraphrased: str) -> str | None:
    """Why `paraphrased` may not stand for `original`; None where it may.

    It keeps the outer whitespace, the multiset of numbers, number words, symbols, calculations (with their order),
    names, choice labels and negations, and its words differ.
    """
    if _edges(original) != _edges(paraphrased):
        return "outer whitespace differs"
    if _plain_words(original) == _plain_words(paraphrased):
        return "wording is the same"
    for name, kept in _KEPT:
        if kept(original) != kept(paraphrased):
            return f"{name} differ"
    if _names_kept(original, paraphrased) != _names_kept(paraphrased, original):
        return "names differ"
    return None


def _edges(text: str) -> tuple[str, str]:
    return text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]


def _plain_words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())


def _number_texts(text: str) -> Counter[str]:
    return Counter(re.findall(r"\d+(?:[.,]\d+)*", text))


def _number_words(text: str) -> Counter[str]:
    return Counter(word for word in _plain_words(text) if word in _NUMBER_WORDS)


def _symbols(text: str) -> Counter[str]:
    """Everything that is no word, space or punctuation; hyphens and dashes only where a number follows."""
    found = re.findall(r"[^\w\s.,;:!?\"'“”‘’–—-]|[-–−](?=\s*[$€£(]*[\d.])", text)
    return Counter(found)


def _variables(text: str) -> Counter[str]:
    return Counter(re.findall(r"(?<![^\W\d_]['’])(?<![^\W\d_])[b-z](?![^\W\d_'’])", text))


def _calculations(text: str) -> list[str]:
    """Runs of numbers and operators that hold an operator, in order, without spaces."""
    runs = re.findall(r"[\d$€£%().,+*/×÷=^<>\s−–-]+", text)
    calculations = [re.sub(r"\s", "", run).strip(".,()$€£") for run in runs]
    return [run for run in calculations if re.search(r"\d", run) and re.search(r"[+*/×÷=^<>−–-]", run)]


def _negations(text: str) -> int:
    words = re.findall(r"[a-z]+n['’]t\b|[a-z]+", text.lower())
    return sum(word in _NEGATIONS or word.endswith(("n't", "n’t")) for word in words)


def _labels(text: str) -> list[str]:
    return sorted(label for _, label in labels(text))


_KEPT: tuple[tuple[str, Callable[[str], object]], ...] = (
    ("numbers", _number_texts),
    ("number words", _number_words),
    ("symbols", _symbols),
    ("variables", _variables),
    ("calculations", _calculations),
    ("choice labels", _labels),
    ("negations", _negations),
)


def names(text: str) -> list[tuple[int, str]]:
    """Position and text of the capitalised words of `text` that are no function words, in order."""
    found = re.finditer(r"(?<![\w\\])[^\W\d_a-z][\w-]*", text)
    return [(m.start(), m[0]) for m in found if m[0][0].isupper() and m[0].lower() not in _FUNCTION_WORDS]


def _names_kept(text: str, other: str) -> Counter[str]:
    """Names of `text`; a word that opens a sentence is none where it is an ordinary word of ours or of `other`."""
    ordinary = {word for word in re.findall(r"[\w-]+", other) if word.islower()} | _OWN_WORDS
    kept = Counter[str]()
    for start, name in names(text):
        before = end_before(text, start, lambda c: not (c.isalnum() or c == "_"))
        opens = not before or re.search(r"[.!?:\n]", text[before:start]) is not None
        if not (opens and name.lower() in ordinary):
            kept[name] += 1
    return kept
