"""What each process of torchrun makes of a model that they share: `python -m tests.sharded MODEL FOLDER`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cotfaith_mech.errors import CotfaithError
from cotfaith_mech.model import load
from cotfaith_mech.sites import ActivationEdit, Site

from .test_conformance import random_cells, tokens


def made_by(model: Any) -> dict[str, Any]:
    """Its hash, a text, reads, and counterfactuals of all kinds (knockouts of all heads)."""
    x = tokens(2)
    sites = [
        Site(kind, layer) for kind in ("resid_pre", "resid_mid", "mlp_out", "z", "q", "k", "v") for layer in (0, 3)
    ]
    cells = [cell for cell in random_cells(model) if not any(e.site.kind == "pattern" and e.site.head for e in cell)]
    made: dict[str, Any] = {
        "hash": model.info.weights_hash,
        "text": model.generate(["So Ann has 22."], max_new_tokens=6),
        "cells": model.cached_run(x[0].tolist()).edited(cells, n_logits=3, reduce=lambda logits: logits.flatten(1)),
    }
    run = model.run(x, read=[*sites, Site("z", 1, 4), Site("k", 2, 1)])
    return made | {"logits": run.logits} | {str(site): value for site, value in run.activations.items()}


if __name__ == "__main__":
    name, folder = sys.argv[1:]
    model = load(name, backend="nnsight", device="auto")
    torch.save(made_by(model), Path(folder) / f"{os.environ['RANK']}.pt")
    cut = ActivationEdit(Site("pattern", 1, 2), (9,), "knockout", None, (3,))
    with pytest.raises(CotfaithError, match="all heads"):
        model.run(tokens(), edits=[cut])
    with pytest.raises(CotfaithError, match="nnsight backend"):
        load(name, device="auto")
