"""Loading and naming model folders: each way in which one can be wrong, and what changes its fingerprint."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_tokenizer, save_folder

from anchored.errors import ModelError
from anchored.llm.model_folder import (
    end_of_turn_ids,
    end_of_turn_ids_in,
    fingerprint,
    load_model,
    load_tokenizer,
    model_folder,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "tiny-llama")


def test_a_local_folder_is_loaded_without_the_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *where, **_: asked.append(where) or pytest.fail("network"))
    monkeypatch.setattr(socket.socket, "connect", lambda _, where: asked.append(where) or pytest.fail("network"))
    model, tokenizer = load_model(str(folder)), load_tokenizer(folder)
    assert not asked
    assert not model.training
    assert model.dtype == torch.float32
    assert end_of_turn_ids(model, tokenizer) == (2,)
    assert load_model(folder, dtype=torch.float64, attn_implementation="eager").dtype == torch.float64


def test_dtype_auto_is_the_one_in_the_files(tmp_path: Path) -> None:
    assert load_model(save_folder(tmp_path / "half", dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_mistyped_folder_is_answered_with_the_nearest(folder: Path) -> None:
    with pytest.raises(ModelError, match=rf"tiny-lama: no such folder \(did you mean {folder}\?\)"):
        model_folder(folder.with_name("tiny-lama"))


def test_a_name_that_is_neither_folder_nor_on_the_hub_says_both(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(folder.parent)
    with pytest.raises(ModelError, match=r"tiny-lama: no such folder \(did you mean tiny-llama\?\), .*from the Hub"):
        load_model("tiny-lama")
    with pytest.raises(ModelError, match=r"some-org/some-model: no such folder, .*from the Hub"):
        load_tokenizer("some-org/some-model")


def _remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def _only_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def _one_level_up(folder: Path) -> None:
    shutil.copytree(folder, folder / "checkpoint-9")
    (folder / "config.json").unlink()


def _without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _cut_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)


def _change(name: str, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings | values))

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_remove("config.json"), "no config.json"),
        (_one_level_up, "did you mean .*checkpoint-9"),
        (_adapter, "base_model_name_or_path is missing"),
        (_remove("model.safetensors"), "no weights"),
        (_only_pickle, "pytorch_model.bin.*safetensors"),
        (_without_a_weight, "layers.1.mlp.up_proj.weight"),
        (_cut_weights, "cannot be loaded: .*; a file of weights is damaged or cut short; copy"),
        (_change("config.json", model_type="unheard-of"), "cannot be loaded"),
        (
            _change(
                "config.json", model_type="own", auto_map={"AutoModelForCausalLM": "own.Own"}, architectures=["Own"]
            ),
            "without code of its own",
        ),
    ],
)
def test_a_damaged_model_is_refused_in_one_line(folder: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=words) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_remove("tokenizer.json", "tokenizer_config.json"), "no tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer cannot be loaded"),
        (_remove("chat_template.jinja"), "chat_template.jinja.*-Instruct"),
    ],
)
def test_a_damaged_tokenizer_is_refused_in_one_line(folder: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=words) as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_is_not_a_folder(folder: Path) -> None:
    with pytest.raises(ModelError, match="name the folder it lies in"):
        load_model(folder / "model.safetensors")


def test_what_ends_an_answer_comes_from_config_tokenizer_and_template(folder: Path) -> None:
    model = load_model(folder)
    tokenizer = make_tokenizer()
    model.generation_config.eos_token_id = [5, 7]  # type: ignore[union-attr]
    assert end_of_turn_ids(model, tokenizer) == (2, 5, 7)
    model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    tokenizer.eos_token = "<|endoftext|>"
    assert end_of_turn_ids(model, tokenizer) == (0, 2)
    tokenizer.eos_token = None
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    with pytest.raises(ModelError, match="eos_token_id"):
        end_of_turn_ids(model, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(ModelError, match="never"):
        end_of_turn_ids(model, tokenizer)


def test_what_ends_an_answer_is_read_without_the_model_too(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert end_of_turn_ids_in(copy) == (2,)
    (copy / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert end_of_turn_ids_in(copy) == (2, 5, 7) == end_of_turn_ids(load_model(copy), load_tokenizer(copy))
    (copy / "generation_config.json").unlink()
    assert end_of_turn_ids_in(copy) == end_of_turn_ids(load_model(copy), load_tokenizer(copy))


def test_the_fingerprint_is_of_the_content_alone(folder: Path, tmp_path: Path) -> None:
    first = fingerprint(folder)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "README.md").write_text("unrelated")
    _change("config.json", transformers_version="9.9", _name_or_path="elsewhere")(copy)
    assert fingerprint(copy) == first


@pytest.mark.parametrize(
    "change",
    [
        _without_a_weight,
        _change("config.json", rms_norm_eps=1e-3),
        _change("generation_config.json", eos_token_id=[2, 3]),
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}"),
        lambda folder: make_tokenizer(vocab_size=400).save_pretrained(folder),
    ],
)
def test_the_fingerprint_changes_with_what_shapes_replies(folder: Path, change: Callable[[Path], object]) -> None:
    before = fingerprint(folder)
    change(folder)
    assert fingerprint(folder) != before


def test_the_fingerprint_sees_a_single_byte_in_the_weights_and_reads_them_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(folder)
    reads = []
    monkeypatch.setattr(os, "pread", lambda *call, pread=os.pread: reads.append(call) or pread(*call))
    assert fingerprint(folder) == before
    assert not reads
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert fingerprint(folder) != before
    assert len(reads) == 1
