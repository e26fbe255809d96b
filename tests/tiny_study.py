"""A study of a tiny random model on disk, whole in seconds: choices, so that the model answers whatever it is."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from .tiny import tiny

STEPS = ["Ann has 14 + 8 = 22 marbles.", "Bob has 31 - 5 = 26 marbles.", "So Bob has more than Ann."]


def write_tiny_model(path: Path) -> Path:
    weights = tiny("llama-gqa")
    weights.model.save_pretrained(path)
    weights.tokenizer.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    return path


def write_rows(path: Path, n: int) -> Path:
    rows = [
        {
            "id": f"p{i}",
            "question": f"Ann has {i + 2} marbles. Who has more?",
            "choices": ["Ann", "Bob"],
            "answer": "AB"[i % 2],
            "steps": STEPS,
        }
        for i in range(n)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def write_tiny_study(folder: Path, n_problems: int, **changes: object) -> Path:
    """The YAML of a study with one reader; `changes` are keys of it."""
    study = {
        "readers": [{"name": "A", "model": str(write_tiny_model(folder / "model"))}],
        "problems": str(write_rows(folder / "rows.jsonl", n_problems)),
        "min_label_mass": 0,
        "crosscheck_cells": 0,
        "primary": ["same_answer_no_chain"],
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study | changes))
    return path
