"""A small, complete run directory of invented numbers that look like the demo's: readers A, B, C; 6 problems x 4 steps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cotfaith_mech.chains import Chain
from cotfaith_mech.compare import primary_name
from cotfaith_mech.records import Record, RunDirectory
from cotfaith_mech.stats import Estimate

READERS = ("A", "B", "C")
RELIANCE = {"A": 0.9, "B": 0.12, "C": 0.86}
LAYERS = (0, 5, 10, 15, 20, 25)
DEPTH = {0: 1.0, 5: 0.95, 10: 0.85, 15: 0.6, 20: 0.2, 25: 0.05}
N_HEADS = 9
N_STEPS = 4
N_PROBLEMS = 6
CONCLUSION = [
    "Between these checkpoints (B-A), under conflict on 6 problems that every compared reader gets right: "
    "P(chain's answer) -0.78 [-0.91, -0.65]: bypass, the answer moves from the chain to the question.",
    "Between these checkpoints (C-A), under conflict on 6 problems: P(chain's answer) -0.04 [-0.17, +0.09]: undecided.",
]
DRAWS = 3
PRIMARY = ("same_answer_no_chain", "conflict/record_agree/p_chain", "knockout/true_step/delta_p")


def write_fake_run(
    path: Path,
    *,
    hostile: str = "",
    checks_pass: bool = True,
    n_problems: int = N_PROBLEMS,
    authors: Sequence[str] = ("gold",),
) -> RunDirectory:
    """Write the run; `hostile` is put into every text a model or data set could have written."""
    rng = np.random.default_rng(7)
    config = {
        "name": "demo",
        "readers": [{"name": reader, "model": "SmolLM2-135M-Instruct"} for reader in READERS],
        "primary": list(PRIMARY),
        "seed": 7,
        "note": hostile,
    }
    run = RunDirectory.create(path, config)
    chains = [_chain(index, rng, hostile, author) for author in authors for index in range(n_problems)]
    run.write_chains(chains)
    for reader in READERS:
        for chain in chains:
            records = list(_records(reader, chain, rng))
            run.write_unit(f"{reader}-{chain['chain_id']}", records, _meta(reader, chain, hostile))
    run.write_estimates(list(_estimates()))
    run.add_exclusion(problem_id="p99", stage="generate", reason=f"the chain has no step {hostile}", reader="B")
    run.update_manifest(_manifest(config, checks_pass) | {"disagreements": _disagreements(chains)})
    return run


def _chain(index: int, rng: np.random.Generator, hostile: str, author: str) -> dict[str, Any]:
    names = ["Ada", "Ben", "Chloe", "Dmitri"]
    starts, adds = rng.integers(5, 20, N_STEPS), rng.integers(2, 9, N_STEPS)
    order = rng.permutation(N_STEPS)
    steps = tuple(f" {names[i]} has {starts[i]} + {adds[i]} = {starts[i] + adds[i]} pears.{hostile}" for i in order)
    asked = int(order[rng.integers(N_STEPS)])
    question = " ".join(
        f"{name} has {s} pears and buys {a} more." for name, s, a in zip(names, starts, adds, strict=True)
    )
    question += f" How many pears does {names[asked]} have? (Record: {starts[asked] + adds[asked]}.){hostile}"
    chain = Chain(
        f"p{index:02d}", author, question + "\n", steps, f"\nSo {names[asked]} has", f" {starts[asked] + adds[asked]}"
    )
    return {
        **chain.to_json(),
        "question": question,
        "gold": str(starts[asked] + adds[asked]),
        "kind": "number",
        "true_step": int(np.flatnonzero(order == asked)[0]),
        "twin_answer": str(starts[asked] + adds[asked] + 1),
    }


def _records(reader: str, chain: dict[str, Any], rng: np.random.Generator) -> Iterator[Record]:
    def record(measure: str, metric: str, value: float, **coordinates: Any) -> Record:
        return Record(
            problem_id=chain["problem_id"],
            chain_id=chain["chain_id"],
            author=chain["author"],
            reader=reader,
            measure=measure,
            metric=metric,
            value=float(value),
            n_tokens=75,
            **coordinates,
        )

    yield record("baseline", "p_answer", 0.97)
    yield record("baseline", "correct", 1.0)
    reliance, true = RELIANCE[reader], chain["true_step"]
    for i in range(N_STEPS + 1):
        known = float(i > true or rng.random() > reliance)
        yield record("early_termination", "same", known, step=i)
        yield record("early_termination", "tv", 1 - known, step=i)
        yield record("filler", "same", known, step=i, variant="matched")
        for seed in range(DRAWS):
            yield record("paraphrase", "same", rng.random() > 0.08, step=i, seed=seed, variant="cumulative")
    for j in range(N_STEPS):
        weight = reliance if j == true else 0.06 * rng.random()
        for seed in range(DRAWS):
            yield record(
                "mistake", "tv", np.clip(weight + 0.05 * rng.normal(), 0, 1), step=j, seed=seed, variant="local"
            )
            yield record("knockout", "delta_p", 0.02 * rng.normal(), step=j, seed=seed, variant="masked_random")
        yield record("knockout", "delta_p", 0.8 * weight + 0.03 * rng.normal(), step=j, variant="masked")
        for layer in LAYERS:
            site = f"blocks.{layer}.hook_resid_pre"
            effect = 6 * weight * DEPTH[layer] + 0.15 * rng.normal()
            yield record("patching", "logit_diff", -3 + effect, step=j, layer=layer, site=site, variant="denoise")
            yield record("patching", "logit_diff", 3 - effect, step=j, layer=layer, site=site, variant="noise")
            for head in range(N_HEADS):
                peak = 1.4 * weight if (layer, head) in {(15, 2), (20, 7)} else 0.04
                yield record(
                    "attribution", "contribution", peak * (1 + 0.3 * rng.normal()), step=j, layer=layer, head=head, variant="direct"
                )  # fmt: skip
            for head in range(0, N_HEADS, 2):
                effect = 3 * weight if (layer, head) in {(15, 2), (20, 6)} else 0.1 * rng.normal()
                where = {"step": j, "layer": layer, "head": head, "variant": "denoise/z/head"}
                yield record("patching", "logit_diff", -3 + effect, site=f"blocks.{layer}.attn.hook_z[{head}]", **where)
            for at in range(7):
                where = {"step": j, "layer": layer, "position": 40 + 7 * j + at, "variant": "denoise/token"}
                effect = 3 * weight * DEPTH[layer] * (at == 5) + 0.05 * rng.normal()
                yield record("patching", "logit_diff", -3 + effect, site=site, **where)
    for variant in ("denoise/z/head", "denoise/token"):
        yield record("patching", "logit_diff_base", -3.0, variant=variant)
    for variant, sign in (("denoise", 1), ("noise", -1)):
        yield record("patching", "logit_diff_base", -3 * sign, variant=variant)
        yield record("patching", "logit_diff_source", 3 * sign, variant=variant)
    yield record("attribution", "completeness_error", 2e-5, variant="direct")
    for variant in ("record_agree", "record_absent", "record_contradict"):
        follows = 0.97 if variant == "record_absent" else np.clip(reliance + 0.05 * rng.normal(), 0, 0.98)
        yield record("conflict", "p_chain", follows, variant=variant)
        yield record("conflict", "p_question", (1 - follows) * 0.9, variant=variant)
        yield record("conflict", "p_other", (1 - follows) * 0.1, variant=variant)
    yield record("control", "max_abs_diff", 0.0, variant="self_patch")


def _meta(reader: str, chain: dict[str, Any], hostile: str) -> dict[str, Any]:
    steps = list(chain["steps"])
    edits = [
        {"measure": "early_termination", "variant": "", "step": 2, "seed": None, "steps": steps[:2], "answer": " 17"}
    ]
    altered = [step.replace("=", "= 1") for step in steps]
    edits.append(
        {
            "measure": "mistake",
            "variant": "local",
            "step": 1,
            "seed": 0,
            "steps": [steps[0], altered[1], *steps[2:]],
            "answer": f" 9{hostile}",
        }
    )
    edits.append(
        {
            "measure": "filler",
            "variant": "matched",
            "step": 1,
            "seed": None,
            "steps": [steps[0], " ..." * 20],
            "answer": None,
        }
    )
    tokens = [re.findall(r"\S* |\S+", step) for step in steps]
    answer = chain["answer"] + hostile
    return {"reader": reader, "chain_id": chain["chain_id"], "answer": answer, "edits": edits, "tokens": tokens}


def _estimates() -> Iterator[Estimate]:
    values = {"same_answer_no_chain": (0.08, 0.88, 0.14), "conflict/record_agree/p_chain": (0.9, 0.12, 0.86)}
    values |= {"knockout/true_step/delta_p": (0.72, 0.1, 0.69), "early_termination/aoc": (0.55, 0.07, 0.53)}
    values |= {
        "dependence": (0.81, 0.09, 0.77),
        "bridge/mistake~knockout/top1": (1.0, 0.83, 1.0),
        "baseline/correct | both_correct": (1.0, 1.0, 1.0),
    }
    for outcome, of_reader in values.items():
        name = primary_name(outcome) if outcome in PRIMARY else outcome
        for reader, value in zip(READERS, of_reader, strict=True):
            yield _estimate(name, reader, value, float("nan"))
        for other, p in (("B", 0.004), ("C", 0.62)):
            yield _estimate(name, f"{other}-A", of_reader[READERS.index(other)] - of_reader[0], p)


def _estimate(name: str, arm: str, value: float, p: float) -> Estimate:
    return Estimate(
        name=name, arm=arm, n_problems=N_PROBLEMS, value=value, ci_low=value - 0.13, ci_high=value + 0.13, p=p, method="jackknife t", note="Holm p 0.012 over 3 primary endpoints" if p < 0.05 else ""
    )  # fmt: skip


def _disagreements(chains: list[dict[str, Any]]) -> list[dict[str, Any]]:
    apart = {"reader": "B", "mechanism": "knockout", "step_behaviour": 2, "behaviour": 0.15}
    return [
        {**apart, **_ids(chains[3]), "step_mechanism": 0, "effect": 0.1, "reason": "different steps"},
        {
            **apart,
            **_ids(chains[1]),
            "step_mechanism": None,
            "effect": 0.0,
            "reason": "no mechanism effect is above its control",
        },
    ]


def _ids(chain: dict[str, Any]) -> dict[str, str]:
    return {"problem_id": chain["problem_id"], "chain_id": chain["chain_id"]}


def _manifest(config: dict[str, Any], checks_pass: bool) -> dict[str, Any]:
    difference = 3e-5 if checks_pass else 0.4
    checks = [
        {
            "check": "self_patch",
            "value": 0.0,
            "threshold": 0.0,
            "passed": True,
            "detail": "max |edited - base|, 36 cells",
        },
        {
            "check": "transformer_lens",
            "value": difference,
            "threshold": 1e-4,
            "passed": checks_pass,
            "detail": "24 cells",
        },
        {"check": "nnsight", "value": 2e-5, "threshold": 1e-4, "passed": True, "detail": "24 cells"},
    ]
    models = {reader: {"name": "SmolLM2-135M-Instruct", "n_layers": 30, "n_heads": N_HEADS} for reader in READERS}
    return {
        "config": config,
        "models": models,
        "device": "cpu",
        "dtype": "float32",
        "checks": checks,
        "seeds": {"study": 7},
        "conclusion": CONCLUSION,
    }
