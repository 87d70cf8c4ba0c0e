"""What decays, against transformers' trainers."""

from __future__ import annotations

import pytest
import torch
from tiny_models import Family, make_model
from transformers import Trainer

from anchored.train.optimizer import build_optimizer
from anchored.train.settings import OptimizerSettings


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", ["rmsprop", "adamw"])
def test_the_same_weights_decay_as_in_transformers_trainers(family: Family, name: str) -> None:
    model = make_model(family)
    settings = OptimizerSettings.model_validate({"name": name, "weight_decay": 0.1})
    optimizer = build_optimizer(model.parameters(), settings)
    decay = {id(weight): group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
    theirs = Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    assert {name: decay[id(weight)] for name, weight in model.named_parameters()} == {
        name: 0.1 if name in theirs else 0.0 for name, _ in model.named_parameters()
    }


def test_weights_without_a_gradient_shrink_by_the_decay_and_norms_stay() -> None:
    matrix, vector = (torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (2,)))
    optimizer = build_optimizer([matrix, vector], OptimizerSettings(name="adamw", lr=0.5, weight_decay=0.1))
    for weight in (matrix, vector):
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.allclose(matrix, torch.full((2, 2), 0.95))
    assert torch.equal(vector, torch.ones(2))
