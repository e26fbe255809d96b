"""Decision trace: after how many steps, and at which layer, does the reader hold the answer it will give?

The chain is cut after each step, the cue follows, and the residual stream after each layer is read through the model's
own final norm and unembedding (logit lens, nostalgebraist 2020) at the position that predicts the first visible token
of a*. The answer forced after each step is Early Termination's own record.
What is read is that one token: the first digit where digits are tokens of their own.
"""

from __future__ import annotations

import math

import torch

from . import edits
from .chains import token_spans
from .measured import Measured
from .reading import Trunk
from .sites import Site


def measure_trace(trunk: Trunk, reader: str) -> Measured:
    """Records of `decision_trace`: for each number of kept steps and each layer, the probability of a*'s first visible
    token, and whether it is the likeliest one."""
    measured = Measured(trunk.chain, reader)
    layers = range(trunk.model.info.n_layers)
    for keep in range(len(trunk.chain.steps) + 1):
        text = edits.truncate(trunk.chain, keep)
        encoding = trunk.model.encode(text.text)
        start, end = token_spans(text, encoding).answer
        visible = next((i for i in range(start, end) if trunk.model.decode([encoding.ids[i]]).strip()), start)
        run = trunk.run.sibling(encoding.ids[:visible])
        states = run.read([Site("resid_post", layer) for layer in layers], first=visible - 1)
        logits = trunk.model.lens(torch.stack([states[Site("resid_post", layer)][0] for layer in layers]))
        p = logits.softmax(-1)[:, encoding.ids[visible]].tolist()
        best = logits.argmax(-1).tolist()
        for layer in layers:
            is_top = p[layer] if math.isnan(p[layer]) else float(best[layer] == encoding.ids[visible])
            values = {"p_answer": p[layer], "is_top": is_top}
            measured.add("decision_trace", "logit_lens", values, visible, step=keep, layer=layer)
    return measured
