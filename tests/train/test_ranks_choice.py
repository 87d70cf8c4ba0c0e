"""Whole or in parts: what the settings and a device's memory decide, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError
from tiny_models import make_tokenizer, save_folder
from training_pairs import make_settings
from transformers import Starcoder2Config, Starcoder2ForCausalLM

from anchored.errors import TrainError
from anchored.llm.model_folder import weight_shapes
from anchored.train.policy import load_policy
from anchored.train.ranks import Ranks, joined
from anchored.train.sharding import divides


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("policy"))


@pytest.mark.parametrize(
    ("changes", "sharers_of_the_memory", "expected"),
    [
        ({}, 2, False),
        ({}, 10**8, True),  # some hundred bytes for each
        ({"parallel": "ddp"}, 10**8, False),
        ({"parallel": "fsdp"}, 2, True),
        ({"offload": True}, 1, True),
        ({}, 1, False),
    ],
)
def test_the_model_is_divided_where_asked_for_or_where_it_does_not_fit(
    model: Path, changes: dict[str, object], sharers_of_the_memory: int, expected: bool
) -> None:
    ranks = Ranks(0, sharers_of_the_memory, 0, sharers_of_the_memory)
    assert divides(model, make_settings(**changes), "cpu", ranks) is expected


def test_shapes_are_read_without_the_weights(model: Path) -> None:
    policy = load_policy(model, make_settings())
    assert sorted(weight_shapes(model)) == sorted(tuple(weight.shape) for weight in policy.weights.values())


def test_offloading_whole_models_is_refused() -> None:
    with pytest.raises(ValidationError, match="offload is fsdp's; set parallel to fsdp or auto"):
        make_settings(parallel="ddp", offload=True)


def test_a_type_whose_rows_are_untested_is_not_divided(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    config = Starcoder2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    Starcoder2ForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with joined(Ranks(), "cpu"), pytest.raises(TrainError, match=r"Starcoder2ForCausalLM takes no tree .* to ddp$"):
        load_policy(tmp_path, make_settings(parallel="fsdp"), Ranks())
