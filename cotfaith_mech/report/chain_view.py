"""The chain view's data: an index to filter and sort by, and one compressed block a chain, opened when it is asked for.

A block is base64 of gzipped JSON inside a script element of a type no browser runs; the page's script unpacks it with
the browser's own DecompressionStream.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections import defaultdict
from typing import Any

from .. import views
from ..markup import limit_of
from ..outcomes import Table
from ..records import RunDirectory
from . import charts, maps

TEST_WORDS = {
    "early_termination": "Early termination",
    "filler": "Filler",
    "paraphrase": "Paraphrase",
    "mistake": "Mistake",
    "shuffle": "Shuffle",
    "swap": "Another problem's chain",
    "conflict": "Conflict",
}


def block(value: Any) -> str:
    """`value` as base64 of gzipped JSON; the same text for the same value."""
    plain = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(plain.encode("utf-8", "replace"), mtime=0)).decode()


def chain_data(
    run: RunDirectory, records: Table, chains: list[dict[str, Any]], readers: list[str], apart: Table
) -> tuple[list[dict[str, Any]], list[str]]:
    """The index, a row a chain, and each chain's block: texts, tokens, its own maps, the edited texts and answers."""
    effects = _effects(views.step_effects(records), {chain["chain_id"]: len(chain["steps"]) for chain in chains})
    cells = _by_chain(views.patches(records))
    heads = views.select(records, "attribution", "contribution", "direct").dropna(subset=["step", "layer", "head"])
    heads = _by_chain(heads)
    metas = defaultdict(list)
    for meta in run.read_unit_meta():
        if "answer" in meta:
            metas[meta.get("chain_id")].append(meta)
    rings = set(zip(apart["chain_id"], apart["reader"], strict=True))
    index, blocks = [], []
    for chain in chains:
        key, own = chain["chain_id"], metas[chain["chain_id"]]
        row = {name: chain.get(name) for name in ("chain_id", "problem_id", "author", "gold", "true_step")}
        row["question"] = str(chain.get("question") or "")[:160]
        row["answers"] = {meta["reader"]: meta.get("answer") for meta in own}
        row["apart"] = [reader for reader in readers if (key, reader) in rings]
        row["effects"] = effects.get(key, {})
        index.append(row)
        detail = {name: chain.get(name) for name in ("chain_id", "question", "cue")}
        detail["steps"] = list(chain["steps"])
        detail["tokens"] = next((meta["tokens"] for meta in own if meta.get("tokens")), None)
        detail["maps"] = {
            str(variant): maps.chain_charts(one, chain, readers)
            for variant, one in (cells[key].groupby("variant") if key in cells else ())
        }
        detail["heads"] = maps.heads_by_step_charts(heads[key], chain, readers) if key in heads else None
        for kind, group in {**detail["maps"], "heads": detail["heads"]}.items():
            for chart in group["charts"] if group else ():
                chart["id"] = f"chain {chain['problem_id']} {key} {kind}"
        detail["edits"] = _edits_of(own)
        blocks.append(block(detail))
    return index, blocks


def _by_chain(table: Table) -> dict[str, Table]:
    return {str(chain): one for chain, one in table.groupby("chain_id")}


def effect_scales(records: Table) -> list[dict[str, Any]]:
    """Each effect that was measured, in words, with the end of its colour scale."""
    effects = views.step_effects(records)
    scales = []
    for effect in views.EFFECTS:
        values = effects.loc[effects["effect"] == effect.key, "value"]
        if len(values):
            scales.append({**vars(effect), "limit": limit_of(values)})
    return scales


def _effects(effects: Table, n_steps: dict[str, int]) -> dict[str, dict[str, dict[str, list[float | None]]]]:
    """`{chain: {effect: {reader: [value of each step]}}}`."""
    found: dict[str, dict[str, dict[str, list[float | None]]]] = {}
    means = effects.groupby(["chain_id", "effect", "reader", "step"], as_index=False)["value"].mean()
    columns = (means[name] for name in ("chain_id", "effect", "reader", "step"))
    for chain, effect, reader, step, value in zip(*columns, charts.numbers(means["value"]), strict=True):
        of_reader = found.setdefault(chain, {}).setdefault(effect, {})
        of_reader.setdefault(reader, [None] * n_steps[chain])[int(step)] = value
    return found


def _edits_of(metas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The edited texts of all tests, each once, with the answer each reader gave to it."""
    found: dict[str, dict[str, Any]] = {}
    for meta in metas:
        for edit in meta.get("edits") or []:
            where = {key: edit.get(key) for key in ("measure", "variant", "step", "seed", "steps")}
            row = found.setdefault(json.dumps(where), {**where, "answers": {}})
            row["test"] = TEST_WORDS.get(edit["measure"], edit["measure"])
            row["answers"][meta["reader"]] = edit.get("answer")
    return list(found.values())
