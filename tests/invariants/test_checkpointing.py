"""Gradient checkpointing is how a step runs, never what comes out: whole trainings with and without it, bit by bit."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_folder
from training_pairs import make_pairs, make_settings, steady, trained
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

from anchored.errors import TrainError
from anchored.runs import read_lines
from anchored.train.examples import prepare
from anchored.train.policy import load_policy, recompute_layers

PAIRS, HELD_OUT = make_pairs(6), make_pairs(3, seed=1)
LORA = {"lora": {"rank": 4}, "optimizer": {"name": "adamw", "lr": 1e-3}}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"tokens_per_batch": 150}),
        ("qwen3", {"precision": "bfloat16"}),
        ("llama", {**LORA, "tokens_per_batch": 150}),
        ("qwen2", {**LORA, "precision": "bfloat16"}),
        ("llama", {"objective": {"name": "kto", "beta": 1.0}, "tokens_per_batch": 150}),
    ],
    ids=["float32", "bfloat16", "adapters", "adapters-bfloat16", "two-passes"],
)
def test_a_training_with_gradient_checkpointing_is_the_one_without(
    family: Any, changes: dict[str, Any], tmp_path: Path
) -> None:
    model = save_folder(tmp_path / "start", family)
    for name, on in (("off", False), ("on", True)):
        trained(tmp_path / name, model, make_settings(**changes, gradient_checkpointing=on), PAIRS, HELD_OUT)
    off, on = tmp_path / "off", tmp_path / "on"
    assert steady(read_lines(on / "metrics.jsonl")) == steady(read_lines(off / "metrics.jsonl"))
    assert read_lines(on / "trajectories.jsonl") == read_lines(off / "trajectories.jsonl")
    for file in (off / "checkpoints" / "epoch-02").glob("*.safetensors"):
        assert file.read_bytes() == (on / "checkpoints" / "epoch-02" / file.name).read_bytes()


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["all-weights", "adapters"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_lies_inside_a_layer_is_dropped_and_made_again(
    checkpointing: bool, lora: dict[str, Any] | None, tmp_path: Path
) -> None:
    settings = make_settings(gradient_checkpointing=checkpointing, lora=lora)
    policy = load_policy(save_folder(tmp_path), settings)
    kept: list[bool] = []

    def follow(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        index = len(kept)
        kept.append(True)
        weakref.finalize(output.untyped_storage(), kept.__setitem__, index, False)

    layers: Any = policy.model.get_decoder().layers
    for layer in layers:
        layer.mlp.up_proj.register_forward_hook(follow)
    logps = policy.logps([example.tree for example in prepare(PAIRS, policy, settings).kept])
    assert kept == [not checkpointing] * len(layers)
    logps.sum().backward()
    assert len(kept) == len(layers) * (2 if checkpointing else 1)


def test_a_model_that_would_begin_to_drop_out_is_refused(tmp_path: Path) -> None:
    path = save_folder(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_dropout": 0.1}))
    with pytest.raises(TrainError, match=r"gradient_checkpointing: .* has attention_dropout"):
        load_policy(tmp_path, make_settings(gradient_checkpointing=True))


def test_a_model_without_layers_to_compute_again_is_refused() -> None:
    model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=8, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(TrainError, match="OpenAIGPTLMHeadModel has no layers that can be computed again"):
        recompute_layers(model)
