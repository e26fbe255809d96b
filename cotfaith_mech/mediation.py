"""Mediation through the chain: what of the question's effect on the answer runs through the reasoning?

Four worlds Y(q, c) with aligned twins: question q or its twin q', chain c or its twin c', Y = probability of the twin's
answer. Only the probability readout recovers a mixture weight (MEASURES 'mediation').
  PNIE = Y(q, c') - Y(q, c)     TNIE = Y(q', c') - Y(q', c)     (through the chain, at q and at q')
  PNDE = Y(q', c) - Y(q, c)     TNDE = Y(q', c') - Y(q, c')     (past the chain)
  TE = Y(q', c') - Y(q, c) = PNIE + TNDE = TNIE + PNDE          interaction = TNIE - PNIE
Two mediators, always named. `text`: the chain's words, read under the question of the world. `kv`: its keys and values,
frozen as they were computed under the question they belong to. Their difference is the path question -> chain
activations -> answer. With supplied chains this is a controlled contrast; a natural effect averages over chains that
the reader itself writes under q'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .chains import Chain, token_spans
from .errors import CotfaithError
from .measured import Measured
from .problems import Problem
from .reading import Trunk


def measure_mediation(trunk: Trunk, problem: Problem, reader: str) -> Measured:
    """Records of `mediation`, variants `text` and `kv`: Y of each world and the effects, in probability.

    Needs a problem with aligned twins of question and chain, and a run that can be spliced; else an exclusion.
    """
    measured = Measured(trunk.chain, reader)
    if not (problem.twin_question and problem.twin_steps and problem.twin_answer):
        measured.exclusions.append("mediation: the problem has no aligned twins of question and chain")
        return measured
    worlds = _worlds(trunk, problem.twin_question, problem.twin_steps)
    encodings = {world: trunk.model.encode(chain.text) for world, chain in worlds.items()}
    if any(token_spans(worlds[world], encoding) != trunk.spans for world, encoding in encodings.items()):
        measured.exclusions.append("mediation: the tokens of the twins do not align with those of question and chain")
        return measured
    asked = [f" {problem.twin_answer}"]
    text = trunk.read([(chain, asked) for chain in worlds.values()])
    y = {"text": dict(zip(worlds, (one.readings[0].p for one in text), strict=True))}
    try:
        twin, (first, end) = trunk.run.sibling(encodings["q'c'"].ids), (trunk.spans.prompt[1], trunk.spans.cue[0])
        spliced = {"qc'": trunk.run.spliced(twin, first, end), "q'c": twin.spliced(trunk.run, first, end)}
    except CotfaithError as error:
        measured.exclusions.append(f"mediation by keys and values: {error}")
    else:
        y["kv"] = y["text"] | {
            world: replace(trunk, run=run).read([(worlds[world], asked)])[0].readings[0].p
            for world, run in spliced.items()
        }
    for mediator, probabilities in y.items():
        values = {f"y_{world}": p for world, p in probabilities.items()} | effects(probabilities)
        measured.add("mediation", mediator, values, len(trunk.run.tokens))
    return measured


def _worlds(trunk: Trunk, question: str, steps: tuple[str, ...]) -> dict[str, Chain]:
    prompt, own = trunk.model.render(question), trunk.chain
    return {
        "qc": own,
        "qc'": replace(own, steps=steps),
        "q'c": replace(own, prompt=prompt),
        "q'c'": replace(own, prompt=prompt, steps=steps),
    }


def effects(y: Mapping[str, float]) -> dict[str, float]:
    """The effects of four worlds; each sum of an indirect and the other direct one is the total."""
    pnie, tnie = y["qc'"] - y["qc"], y["q'c'"] - y["q'c"]
    return {
        "pnie": pnie,
        "tnie": tnie,
        "pnde": y["q'c"] - y["qc"],
        "tnde": y["q'c'"] - y["qc'"],
        "te": y["q'c'"] - y["qc"],
        "interaction": tnie - pnie,
    }
