"""Cross-model patching of a model and its fine-tune: in whose writing, in whose reading, and at which layers lies a
difference between their answers?

1. Write x read: keys and values of prompt and chain by one model, the cue's rows by the other; all four cells.
2. Layer by layer: one layer of the donor in the recipient, at the rows of prompt and chain or at those of the cue and
   answer, in both directions. 'Where' may be claimed only where both directions agree.
Texts are the problem's conflicts: P(chain's answer) and P(question's answer). Source: MEASURES 'cross-model patching'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .backends.huggingface import HuggingFaceModel
from .backends.hybrid import Hybrid
from .chains import Chain, token_spans
from .errors import CotfaithError
from .measured import Measured
from .model import CachedRun, TextReader
from .problems import Conflict, Problem
from .reading import Trunk

BASE, TUNED = "base", "tuned"


@dataclass(frozen=True)
class Pair:
    """A model and its fine-tune, with the hybrids of each with layers of the other."""

    models: dict[str, HuggingFaceModel]
    hybrids: dict[str, Hybrid]

    @classmethod
    def of(cls, base: TextReader, tuned: TextReader) -> Pair:
        """Raises CotfaithError where the two are not of one shape on the huggingface backend, or do not write text as
        the same tokens."""
        if not (isinstance(base, HuggingFaceModel) and isinstance(tuned, HuggingFaceModel)):
            raise CotfaithError(
                f"{base.info.name!r} ({base.info.backend}) and {tuned.info.name!r} ({tuned.info.backend}) cannot be "
                "spliced; use the huggingface backend for both."
            )
        if base.info.text_hash != tuned.info.text_hash:
            raise CotfaithError(
                f"{base.info.name!r} and {tuned.info.name!r} differ in tokenizer or chat template, so that their rows "
                "stand for other tokens; give a model and its fine-tune."
            )
        hybrids = {BASE: Hybrid(base, tuned), TUNED: Hybrid(tuned, base)}
        return cls({BASE: base, TUNED: tuned}, hybrids)


def measure_cross_model(pair: Pair, problem: Problem, chain: Chain, reader: str, *, layers: bool = True) -> Measured:
    """Records of `cross_model`, as those of `reader`, the tuned model: P(chain's answer) and P(question's answer) in
    the cells of write x read under each conflict, and with `layers` those of single layers under the first."""
    measured = Measured(chain, reader)
    if not problem.conflicts:
        measured.exclusions.append("cross-model patching: the problem has no conflicts to read")
    for number, conflict in enumerate(problem.conflicts):
        _measure_conflict(measured, pair, problem, conflict, layers and number == 0)
    return measured


def _measure_conflict(measured: Measured, pair: Pair, problem: Problem, conflict: Conflict, layers: bool) -> None:
    base = pair.models[BASE]
    text = replace(
        measured.chain, prompt=base.render(conflict.question), steps=conflict.steps, answer=f" {conflict.chain_answer}"
    )
    encoding = base.encode(text.text)
    spans = token_spans(text, encoding)
    cue = spans.cue[0]
    runs = {name: model.cached_run(encoding.ids) for name, model in pair.models.items()}

    def read(run: CachedRun, model: HuggingFaceModel) -> dict[str, float]:
        trunk = Trunk(model, text, problem.kind, problem.labels, spans, run)
        [answered] = trunk.read([(text, [text.answer, f" {conflict.question_answer}"])])
        by_chain, by_question = answered.readings
        says_chain = by_chain.p if math.isnan(by_chain.p) else float(by_chain.greedy)
        return {"p_chain": by_chain.p, "p_question": by_question.p, "says_chain": says_chain}

    for reads, own in runs.items():
        for writes, donor in runs.items():
            run = own if reads == writes else own.spliced(donor, 0, cue)
            variant = f"{conflict.variant}/write_{writes}_read_{reads}"
            measured.add("cross_model", variant, read(run, pair.models[reads]), len(encoding.ids))
    if layers:
        for into, hybrid in pair.hybrids.items():
            for layer in range(base.info.n_layers):
                with hybrid.with_layer(layer) as mixed:
                    whole = mixed.cached_run(encoding.ids)
                    cells = {
                        "chain_rows": (runs[into].spliced(whole, 0, cue), pair.models[into]),
                        "cue_rows": (whole.spliced(runs[into], 0, cue), mixed),
                    }
                    for rows, (run, model) in cells.items():
                        variant = f"{conflict.variant}/into_{into}/{rows}"
                        measured.add("cross_model", variant, read(run, model), len(encoding.ids), layer=layer)
