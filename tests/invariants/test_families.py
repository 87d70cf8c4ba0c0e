"""Every family of models in tree rows against transformers' own forward passes: logps and every parameter's gradient.

The models have random weights and are tiny; the plain side is a copy that no tree row ever went through.
"""

from __future__ import annotations

import copy
import warnings
from random import Random
from typing import Any

import pytest
import torch
import transformers
from plain_scores import (
    CPU,
    VOCAB,
    assert_scores_like,
    gradients,
    norms_in_fp64,
    random_ids,
    random_trees,
)
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from anchored.batches.answer_logps import answer_logps, answer_logps_plain
from anchored.batches.fused import fuse
from anchored.batches.head import find_head
from anchored.batches.tree import plant

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
WINDOW = 5
DEVICE = torch.device("cuda")
"""Shorter than most prompts with their answers, and than many answers."""
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**SHAPE),
    "qwen2": transformers.Qwen2Config(**SHAPE),
    "qwen2-windows": transformers.Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=8),
    "mistral": transformers.MistralConfig(**SHAPE, sliding_window=4096),
    "mistral-window": transformers.MistralConfig(**SHAPE, sliding_window=WINDOW),
    "mistral-window-2": transformers.MistralConfig(**SHAPE, sliding_window=2),
    "gemma2": transformers.Gemma2Config(
        **SHAPE, **LAYERS, head_dim=8, sliding_window=WINDOW, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **SHAPE, **LAYERS, head_dim=8, sliding_window=WINDOW, final_logit_softcapping=3.0
    ),
    "phi3": transformers.Phi3Config(**SHAPE, sliding_window=WINDOW),
    "phi": transformers.PhiConfig(**SHAPE),
    "olmo2": transformers.Olmo2Config(**SHAPE),
    "gpt-neox": transformers.GPTNeoXConfig(**SHAPE, rotary_pct=0.25),
    "gpt-neox-sequential": transformers.GPTNeoXConfig(**SHAPE, use_parallel_residual=False),
    "granite": transformers.GraniteConfig(
        **SHAPE, logits_scaling=3.0, attention_multiplier=0.3, residual_multiplier=0.5, embedding_multiplier=2.0
    ),
    "cohere": transformers.CohereConfig(**SHAPE, logit_scale=0.3),
    "cohere2": transformers.Cohere2Config(**SHAPE, **LAYERS, logit_scale=0.3, sliding_window=WINDOW),
    "mixtral": transformers.MixtralConfig(
        **SHAPE, num_local_experts=4, sliding_window=WINDOW, output_router_logits=True
    ),
    "qwen3-moe": transformers.Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=8, output_router_logits=True),
    "gpt-oss": transformers.GptOssConfig(
        **SHAPE, **LAYERS, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW
    ),
}

EXACT_IN_FP64 = ("llama", "qwen2-windows", "qwen3", "mistral-window", "phi3", "phi", "olmo2", "gpt-neox", "granite")
"""Nothing but their norms computes in less than their weights' precision."""


def build(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Random weights; norms, biases and sinks too, which start as ones and zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval().to(dtype)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() == 1:
                    weight.add_(0.3 * torch.randn_like(weight))
    return model


def fallbacks(recorded: pytest.WarningsRecorder) -> list[str]:
    return [text for warning in recorded if "tree rows" in (text := str(warning.message))]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_of_trees_scores_like_each_answer_alone(name: str, recwarn: pytest.WarningsRecorder) -> None:
    model = build(FAMILIES[name])
    plain = copy.deepcopy(model)
    random = Random(name)
    for answers in (1, 2, 3):
        assert_scores_like(plain, model, random_trees(random, 4, answers), 2e-5)
    assert find_head(model) is not None
    assert not fallbacks(recwarn)


@pytest.mark.parametrize("name", EXACT_IN_FP64)
def test_in_fp64_a_row_of_trees_scores_like_each_answer_alone_to_its_digits(name: str) -> None:
    model = norms_in_fp64(build(FAMILIES[name], torch.float64))
    assert_scores_like(copy.deepcopy(model), model, random_trees(Random(name), 5, 3), 1e-9)


def test_gemma_3_as_it_loads_with_its_eyes_takes_rows(recwarn: pytest.WarningsRecorder) -> None:
    text = FAMILIES["gemma3"].to_dict() | {"final_logit_softcapping": None}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    model = build(config)
    assert type(model) is transformers.Gemma3ForConditionalGeneration
    assert_scores_like(copy.deepcopy(model), model, random_trees(Random(0), 4, 3), 2e-5)
    assert not fallbacks(recwarn)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral-window", "gpt-neox", "mixtral", "gpt-oss"])
def test_layers_computed_again_in_the_backward_pass_change_nothing(name: str) -> None:
    model = build(FAMILIES[name])
    trees = random_trees(Random(name), 4, 3)
    expected = gradients(model, answer_logps(model, trees, CPU))
    model.activation_checkpointing_enable()
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    calls = []
    for layer in layers:
        layer.training = True
        layer.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    found = gradients(model, answer_logps(model, trees, CPU))
    assert len(calls) > 2 * len(layers), "no layer ran twice"
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert torch.equal(found[parameter], gradient), parameter


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral-window", "gpt-oss"])
def test_calls_without_a_row_are_what_they_were(name: str) -> None:
    model = build(FAMILIES[name])
    plain = copy.deepcopy(model)
    answer_logps(model, random_trees(Random(name), 2, 2), CPU)
    ids = torch.tensor([[0, 0, 7, 5, 3, 9, 2, 8], [4, 8, 7, 5, 3, 11, 5, 6]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    expected = plain.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), expected)


UNKNOWN: dict[str, PreTrainedConfig] = {
    "olmo": transformers.OlmoConfig(**SHAPE, clip_qkv=1.5),
    "starcoder2": transformers.Starcoder2Config(**SHAPE, sliding_window=WINDOW),
    "gemma": transformers.GemmaConfig(**SHAPE, head_dim=8),
    "granite-moe": transformers.GraniteMoeConfig(
        **SHAPE, num_local_experts=4, num_experts_per_tok=2, logits_scaling=3.0, output_router_logits=True
    ),
    "gpt2": transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_types_never_tested_are_compared_first_and_score_through_their_own_head(
    name: str, recwarn: pytest.WarningsRecorder
) -> None:
    model = build(UNKNOWN[name])
    assert find_head(model) is None
    assert_scores_like(copy.deepcopy(model), model, random_trees(Random(name), 4, 3), 2e-5)
    assert not fallbacks(recwarn)
    told = [str(warning.message) for warning in recwarn if "logits of a row" in str(warning.message)]
    assert len(told) == 1
    assert type(model).__name__ in told[0]


class ForgetfulConfig(transformers.MistralConfig):
    """A type of model that nobody knows."""

    model_type = "forgetful"


class ForgetsTheRow(transformers.MistralForCausalLM):
    def forward(self, *args: Any, tree_row: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_a_model_that_loses_the_row_on_its_way_to_the_layers_is_found_out() -> None:
    model = ForgetsTheRow(ForgetfulConfig(**SHAPE)).eval()
    plain = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="differ from the plain path"):
        assert_scores_like(plain, model, random_trees(Random(9), 4, 2), 2e-5)


class ForgetsTheWindow(transformers.MistralForCausalLM):
    """Masks by its window, but does not tell its attention function."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.config = copy.copy(config)
            layer.self_attn.config.sliding_window = None

    def set_attn_implementation(self, attn_implementation: Any, allow_all_kernels: bool = False) -> None:
        super().set_attn_implementation(attn_implementation, allow_all_kernels)
        for layer in self.model.layers:
            layer.self_attn.config._attn_implementation = self.config._attn_implementation


def test_a_lost_window_is_found_out_when_a_row_outgrows_it() -> None:
    model = ForgetsTheWindow(ForgetfulConfig(**SHAPE, sliding_window=8)).eval()
    plain = copy.deepcopy(model)
    short, long = plant([1, 2], [[3, 4, 5], [3, 6]]), plant([1, 2], [[3, 4] * 10, [3, 5] * 9])
    assert_scores_like(plain, model, [short], 2e-5)
    with pytest.warns(UserWarning, match="differ from the plain path"):
        assert_scores_like(plain, model, [short, long], 2e-5)


DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "max_position_embeddings": 16}
LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
    },
    "original_max_position_embeddings": 16,
    "max_position_embeddings": 64,
}

REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "mamba": (transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2), "state"),
    "qwen3-next": (
        transformers.Qwen3NextConfig(
            **SHAPE,
            **EXPERTS,
            head_dim=8,
            layer_types=["linear_attention", "full_attention"],
            shared_expert_intermediate_size=16,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
        "state",
    ),
    "alibi": (transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4), "replaced"),
    "dynamic-rope": (transformers.LlamaConfig(**SHAPE, **DYNAMIC), "dynamic"),
    "longrope": (transformers.Phi3Config(**SHAPE, **LONGROPE), "longrope"),
    "dropout": (transformers.LlamaConfig(**SHAPE, attention_dropout=0.1), "drops out"),
    "looks-ahead": (transformers.Gemma3TextConfig(**SHAPE, head_dim=8, use_bidirectional_attention=True), "ahead"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_row_can_express_falls_back_says_so_once_and_is_right(name: str) -> None:
    config, reason = REFUSED[name]
    model = build(config)
    plain = copy.deepcopy(model)
    random = Random(8)
    # longer than what the moving positions of some begin to move at
    trees = [plant(random_ids(random, 9, 9), [random_ids(random, 12, 9), random_ids(random, 5)]) for _ in range(3)]
    with pytest.warns(UserWarning, match=rf"takes no tree rows \(.*{reason}.*\); each answer runs") as said:
        answer_logps(model.train(), trees, CPU)
    assert len(fallbacks(said)) == 1
    model.eval()
    with warnings.catch_warnings(action="error", category=UserWarning):
        assert_scores_like(plain, model, trees, 2e-5)


@pytest.mark.parametrize("name", ["dynamic-rope", "longrope"])
def test_positions_that_move_late_leave_shorter_rows_alone(name: str, recwarn: pytest.WarningsRecorder) -> None:
    model = build(REFUSED[name][0])
    plain = copy.deepcopy(model)
    random = Random(0)
    trees = [plant(random_ids(random, 5, 5), [random_ids(random, 9, 1) for _ in range(2)]) for _ in range(4)]
    assert sum(tree.size for tree in trees) > 16
    assert_scores_like(plain, model, trees, 2e-5)
    assert not fallbacks(recwarn)


IN_16_BIT_ON_GPUS = sorted(FAMILIES.keys() - {"mixtral", "qwen3-moe", "gpt-oss"})
"""Rounding makes a router choose other experts, whose numbers are no longer near."""


@pytest.mark.gpu
@pytest.mark.parametrize("name", IN_16_BIT_ON_GPUS)
def test_on_a_gpu_a_row_in_16_bit_is_as_near_to_the_truth_as_each_answer_alone(name: str) -> None:
    truth_model = build(FAMILIES[name], torch.float64)
    trees = random_trees(Random(name), 12, 3)
    truth = answer_logps(truth_model, trees, CPU)
    expected = gradients(truth_model, truth)
    model = build(FAMILIES[name], torch.bfloat16).to("cuda")
    # what the norms and kernels of training do to a model
    row_model = copy.deepcopy(model)
    fuse(row_model)
    found, plain = answer_logps(row_model, trees, DEVICE), answer_logps_plain(model, trees, DEVICE)
    assert _distance(found, truth) < 1.5 * _distance(plain, truth) + 1e-3
    of_row, of_plain = gradients(row_model, found), gradients(model, plain)
    for parameter, gradient in expected.items():
        near = _distance(of_plain[parameter], gradient)
        assert _distance(of_row[parameter], gradient) < 2 * near + 1e-2 * float(gradient.norm()), parameter


def _distance(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.detach().cpu().double() - truth.detach()).norm())
