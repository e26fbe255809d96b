"""Models larger than a device: requests to NDIF, layers on several devices, tensor parallelism."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cotfaith_mech.backends.nnsight import NnsightModel
from cotfaith_mech.backends.weights import hash_parameters
from cotfaith_mech.config import parse_config
from cotfaith_mech.errors import CotfaithError, EndpointError
from cotfaith_mech.model import load
from cotfaith_mech.sites import Site

from .sharded import made_by
from .test_conformance import N_TOKENS, model, random_cells, tokens
from .tiny import tiny

SITES = [
    Site(kind, layer)
    for layer in (0, 3)
    for kind in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as on a disk."""
    folder, weights = tmp_path_factory.mktemp("large") / "tiny-llama", tiny("llama-gqa")
    weights.model.save_pretrained(folder)
    weights.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ndif(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """The model behind a stand-in for NDIF, a process that cannot import this package; and what it was asked."""
    import nnsight.modeling.huggingface
    from nnsight.schema.config import CONFIG

    log = tmp_path_factory.mktemp("ndif") / "asked.jsonl"
    command = [sys.executable, str(Path(__file__).with_name("ndif_server.py")), str(folder), str(log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, pytest.MonkeyPatch.context() as patch:
        assert server.stdout is not None
        try:
            patch.setattr(CONFIG.API, "HOST", f"http://127.0.0.1:{int(server.stdout.readline())}")
            patch.setattr(CONFIG.API, "APIKEY", "a-key-of-ours")
            patch.setattr(CONFIG.APP, "REMOTE_LOGGING", False)
            patch.setitem(nnsight.modeling.huggingface._ID_CACHE, str(folder), str(folder))
            yield load(str(folder), backend="ndif"), log
        finally:
            server.kill()


def test_a_model_on_ndif_reads_and_edits_as_the_same_model_here(ndif: tuple[Any, Path]) -> None:
    remote, local, x = ndif[0], model("llama-gqa", "nnsight"), tokens(3, rows=2)
    read = [*SITES, Site("z", 1, 4), Site("k", 2, 1), Site("pattern", 2), Site("pattern", 3, 5)]
    got, expected = (m.run(x, read=read, n_logits=N_TOKENS) for m in (remote, local))
    assert torch.allclose(got.logits, expected.logits, atol=1e-6)
    assert set(got.activations) == set(expected.activations)
    for site, value in expected.activations.items():
        assert torch.allclose(got.activations[site], value, atol=1e-6), site
    plain = local.run(x, n_logits=N_TOKENS).logits
    for cell in random_cells(local)[::3]:
        got, expected = (m.run(x, edits=cell, n_logits=N_TOKENS).logits for m in (remote, local))
        assert torch.allclose(got, expected, atol=1e-6), cell
        assert not torch.allclose(got, plain, atol=1e-3), cell
    assert all(parameter.is_meta for parameter in remote.weights.model.parameters())


def test_a_model_on_ndif_writes_what_it_writes_here(ndif: tuple[Any, Path]) -> None:
    prompts = ["How many marbles?", "So Ann has 22. The answer is"]
    written = [m.generate(prompts, max_new_tokens=7) for m in (ndif[0], model("llama-gqa", "nnsight"))]
    assert written[0] == written[1]
    with pytest.raises(CotfaithError, match="temperature: 0"):
        ndif[0].generate(prompts, max_new_tokens=7, temperature=1.0, seeds=[0, 1])


def test_requests_to_ndif_name_model_key_and_attention(ndif: tuple[Any, Path], folder: Path) -> None:
    remote, log = ndif
    remote.run(tokens(), read=[Site("pattern", 0)])
    remote.run(tokens())
    *_, eager, plain = map(json.loads, log.read_text().splitlines())
    assert json.loads(plain["model_key"].partition(":")[2])["repo_id"] == str(folder)
    assert [row["env"] for row in (eager, plain)] == [{"attn_implementation": word} for word in ("eager", "sdpa")]
    assert plain["key"] == "a-key-of-ours"
    assert "a-key-of-ours" not in repr(vars(remote.info))


def test_ndif_is_asked_with_a_key_and_its_failures_are_told(
    ndif: tuple[Any, Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnsight.schema.config import CONFIG

    remote = ndif[0]
    with pytest.raises(EndpointError, match="IndexError"):
        remote.run(torch.tensor([[10_000]]))
    for refused in (lambda: remote.lens(torch.zeros(48)), lambda: remote.written_norm(0, torch.zeros(6, 8))):
        with pytest.raises(CotfaithError, match="reads its weights"):
            refused()
    with pytest.raises(CotfaithError, match="without the adapter"):
        load(str(folder), adapter="package:a", backend="ndif")
    monkeypatch.setattr(CONFIG.API, "HOST", "http://127.0.0.1:9")
    with pytest.raises(EndpointError, match="ConnectionRefused"):
        remote.run(tokens())
    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    with pytest.raises(CotfaithError, match="NDIF_API_KEY"):
        load(str(folder), backend="ndif")


@pytest.mark.parametrize(
    ("reader", "study", "told"),
    [
        ({"adapter": "package:a"}, {}, "serves models as they are"),
        ({}, {"crosscheck_cells": 4}, "set crosscheck_cells: 0"),
        ({}, {"mechanisms": ["knockout", "attribution"]}, "has no attribution; set mechanisms to some of knockout,"),
        ({}, {"mechanisms": ["knockout", "patching"]}, None),
    ],
)
def test_a_study_asks_of_ndif_what_it_gives(reader: dict[str, Any], study: dict[str, Any], told: str | None) -> None:
    data = {
        "readers": [{"name": "A", "model": "owner/name", "backend": "ndif", **reader}],
        "problems": "people:2",
        "crosscheck_cells": 0,
        "mechanisms": ["knockout"],
        **study,
    }
    if told is None:
        parse_config(data)
        return
    with pytest.raises(CotfaithError, match=told):
        parse_config(data)


def test_a_trace_goes_through_nnsights_own_rehearsal_of_a_request() -> None:
    """`remote="local"`: serialised, restored with our modules hidden, then run."""
    weights, x = tiny("llama-gqa"), tokens(4)
    rehearsed, local = NnsightModel(weights, remote="local"), NnsightModel(weights)
    for cell in random_cells(local)[::6]:
        got, expected = (m.run(x, edits=cell, read=[Site("z", 3)]) for m in (rehearsed, local))
        assert torch.equal(got.logits, expected.logits)
        assert torch.equal(got.activations[Site("z", 3)], expected.activations[Site("z", 3)])


def test_layers_on_several_devices_give_what_one_device_gives() -> None:
    """No two devices are needed for that: see two_devices.py, which also sees tensors of two devices meet."""
    command = [sys.executable, "-m", "tests.two_devices", "llama-gqa", "mistral", "gemma2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    differences = json.loads(done.stdout.splitlines()[-1])
    assert len(differences) == 3 * 30
    assert max(differences.values()) <= 1e-6, differences


def test_a_model_that_fits_no_device_is_refused(folder: Path, tmp_path: Path) -> None:
    import transformers

    map_of = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    map_of |= {f"model.layers.{layer}": "disk" if layer == 3 else "cpu" for layer in range(4)}
    half = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map=map_of, offload_folder=tmp_path)
    with pytest.raises(CotfaithError, match=r"does not fit its devices: 'model.layers.3"):
        hash_parameters(half)


def test_device_auto_is_one_device_where_there_is_one(folder: Path) -> None:
    spread, x = load(str(folder), device="auto"), tokens(5)
    assert spread.info == load(str(folder)).info
    assert torch.equal(spread.run(x).logits, load(str(folder)).run(x).logits)


def test_processes_of_torchrun_share_a_model_behind_nnsight(tmp_path: Path) -> None:
    """Tensor parallelism by transformers, two processes with gloo; activations are whole in each."""
    weights = tiny("llama-mha")
    weights.model.save_pretrained(tmp_path / "model")
    weights.tokenizer.save_pretrained(tmp_path / "model")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*torchrun, "tests.sharded", str(tmp_path / "model"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-3000:]
    expected = made_by(load(str(tmp_path / "model"), backend="nnsight"))
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt")
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert torch.allclose(got[name], value, atol=1e-4), name
            else:
                assert got[name] == value, name
