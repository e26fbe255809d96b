"""Ask SmolLM2 over `transformers serve` and in process: python experiments/serve_smollm2.py [path of transformers]

Needs `pip install 'cotfaith-mech[api]' 'transformers[serving]'`; where the server lives in another environment, give
the path of its `transformers`. It samples only where generation_config.json says do_sample, so a copy of the model that
says so is served; the client's retries wait for it. Prints what each reader says and the probability of a named answer.
Their prompts differ: over the endpoint the cue has a user turn of its own.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from cotfaith_mech.backends.weights import locate
from cotfaith_mech.chains import Chain
from cotfaith_mech.endpoint import AskedChain, Endpoint
from cotfaith_mech.errors import EndpointError
from cotfaith_mech.model import load
from cotfaith_mech.problems import AnswerKind
from cotfaith_mech.reading import Trunk

NAME, PORT, CUE = "HuggingFaceTB/SmolLM2-135M-Instruct", "8765", "\nSo the answer is"
SUM, CAPITAL = "Tom has 3 apples and buys 4. How many has he?", "What is the capital of France?"
ASKED: tuple[tuple[Chain, AnswerKind, tuple[str, ...], str], ...] = (
    (Chain("sum", "supplied", SUM, ("Tom has 3 apples.", " 3 + 4 = 7."), CUE), "number", (), " 7"),
    (Chain("letter", "supplied", f"{CAPITAL}\nA) Rome\nB) Paris", ("It is Paris.",), CUE), "choice", ("A", "B"), " B"),
    (Chain("city", "supplied", CAPITAL, ("France is in Europe.",), CUE), "text", (), " Paris"),
)


def main(command: str = str(Path(sys.executable).with_name("transformers"))) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = shutil.copytree(locate(NAME), f"{scratch}/model")
        Path(folder, "generation_config.json").write_text('{"do_sample": true, "top_k": 0, "eos_token_id": 2}')
        served = [command, "serve", folder, "--device", "cpu", "--dtype", "float32", "--port", PORT]
        log = Path(scratch, "server.log")
        with log.open("wb") as sink, subprocess.Popen(served, stdout=sink, stderr=sink) as server:
            try:
                compare(Endpoint(folder, f"http://localhost:{PORT}/v1", samples=10, max_retries=15))
            except EndpointError as failure:
                said = log.read_text(errors="replace").strip().splitlines() or ["nothing"]
                raise SystemExit(f"{failure}\nThe last thing `{command} serve` said: {said[-1]}") from failure
            finally:
                server.terminate()


def compare(endpoint: Endpoint) -> None:
    model = load(NAME, device="cpu")
    for chain, kind, labels, answer in ASKED:
        inside = replace(chain, prompt=model.render(chain.prompt))
        for asked in (AskedChain.of(endpoint, chain, kind, labels), Trunk.of(model, inside, kind, labels, None, 0.0)):
            [said] = asked.read([(asked.chain, [answer])])
            [p] = said.readings
            print(f"{kind:7}{asked.model.info.backend:12} {said.said!r}; p({answer.strip()}) {p.p:.2f} ± {p.p_se:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
