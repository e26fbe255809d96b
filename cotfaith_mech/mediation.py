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

CoT mediation index (2602.03994, read second-hand: patches of the chain's hidden states against matched controls), in
each window of layers, ours: d_chain = probability a* loses when the residual stream at as many random chain tokens as
the shorter of chain and prompt has is that of another problem's chain (its mean); d_control the same at as many
random prompt tokens, from that problem's prompt. Losses count from 0.
  CMI = max(0, d_chain - d_control) / max(d_chain + d_control, eps)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from .chains import Chain, token_spans
from .contrast import AnswerContrast
from .errors import CotfaithError
from .knockout import SINK_TOKENS
from .measured import Measured
from .problems import Problem
from .reading import Trunk
from .sites import ActivationEdit, Site

CMI_EPS = 1e-3
"""Least probability that both patches together must take for an index."""


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


def measure_cmi(
    trunk: Trunk, donors: Sequence[Chain], reader: str, *, window: int = 5, draws: int = 3, seed: int = 0
) -> Measured:
    """Records of `mediation`, variant `cmi`: d_chain, d_control (probability) and the index, by the window's first
    layer; NaN where neither patch takes anything. The first of `donors`, chains of other problems, is the source."""
    measured = Measured(trunk.chain, reader)
    if not donors:
        measured.exclusions.append("mediation index: there is no other problem's chain to take states from")
        return measured
    donor = donors[0]
    contrast, n_layers = AnswerContrast.alone(trunk), trunk.model.info.n_layers
    encoding = trunk.model.encode(donor.text)
    theirs, own = token_spans(donor, encoding), trunk.spans
    states = trunk.run.sibling(encoding.ids).read([Site("resid_pre", layer) for layer in range(n_layers)])
    spans = {"chain": (own.prompt[1], own.cue[0]), "control": (own.prompt[0] + SINK_TOKENS, own.prompt[1])}
    given = {"chain": (theirs.prompt[1], theirs.cue[0]), "control": (theirs.prompt[0] + SINK_TOKENS, theirs.prompt[1])}
    n = min(end - first for first, end in spans.values())
    if n < 1 or min(end - first for first, end in given.values()) < 1:
        measured.exclusions.append(
            f"mediation index: a prompt has no more than the {SINK_TOKENS} tokens left alone, or a chain has none, its "
            "own or the other problem's"
        )
        return measured
    cells, names = [], []
    for layer in range(0, n_layers, window):
        for name, span in spans.items():
            for draw in range(draws):
                rng = np.random.default_rng([seed, 11, draw])
                positions = tuple(sorted(rng.choice(range(*span), min(n, span[1] - span[0]), replace=False).tolist()))
                cells.append(
                    [
                        ActivationEdit(
                            site, positions, "replace", states[site][slice(*given[name])].mean(0).expand(n, -1)
                        )
                        for site in (Site("resid_pre", at) for at in range(layer, min(layer + window, n_layers)))
                    ]
                )
                names.append((layer, name))
    base = float(contrast.reduce(trunk.run.logits(contrast.n_logits)[None])[0, 1])
    p = trunk.run.edited(cells, n_logits=contrast.n_logits, reduce=contrast.reduce)[:, 1].tolist()
    for layer in range(0, n_layers, window):
        lost = {
            name: float(
                np.maximum(0.0, base - np.mean([q for q, at in zip(p, names, strict=True) if at == (layer, name)]))
            )
            for name in spans
        }
        both = lost["chain"] + lost["control"]
        index = float(np.maximum(0.0, lost["chain"] - lost["control"])) / both if both > CMI_EPS else np.nan
        values = {"d_chain": lost["chain"], "d_control": lost["control"], "cmi": index}
        measured.add("mediation", "cmi", values, len(trunk.run.tokens), layer=layer)
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
