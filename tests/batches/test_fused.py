"""Replaced layers against the originals: values, gradients, what is kept, and what is left alone."""

from __future__ import annotations

from copy import deepcopy
from itertools import product as product_of
from pathlib import Path

import pytest
import torch
from tiny_models import Family, make_model
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from anchored.batches import fused as fused_layers
from anchored.batches.answer_logps import answer_logps
from anchored.batches.fused import _LARGE, FeedForward, FusedAttention, RMSNorm, fuse, product
from anchored.batches.tree import plant

MODELS = 12
"""Of random weights, whose roundings are averaged."""

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}


def loss_and_gradients(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    logits = model(ids, use_cache=False).logits
    loss = logits.log_softmax(-1).gather(-1, ids.roll(-1, 1)[..., None]).sum()
    loss.backward()
    return logits.detach(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same(model: PreTrainedModel, fused: PreTrainedModel, tolerance: float = 1e-6) -> None:
    (expected, expected_grads), (found, found_grads) = loss_and_gradients(model), loss_and_gradients(fused)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert found_grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        scale = float(grad.abs().max())
        torch.testing.assert_close(found_grads[name], grad, rtol=0, atol=20 * tolerance * scale, msg=name)


def layer_gradients(layer: nn.Module, states: Tensor, weighing: Tensor) -> list[Tensor]:
    states = states.clone().requires_grad_(True)
    out = layer(states)
    return [out, *torch.autograd.grad((out * weighing).sum(), [states, *layer.parameters()])]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_fused_model_has_the_values_and_gradients_of_the_original(family: Family) -> None:
    model = make_model(family, vocab_size=64)
    fused = deepcopy(model)
    norms = 2 * 2 + 1 + (2 * 2 if family == "qwen3" else 0)
    attentions = 0 if family == "qwen3" else 2
    assert fuse(fused) == norms + 2 + attentions
    assert_same(model, fused)


def test_mistral_is_fused_too() -> None:
    model = MistralForCausalLM(MistralConfig(**SHAPE)).eval()
    fused = deepcopy(model)
    assert fuse(fused) == 9
    assert_same(model, fused)


TREES = [plant((1, 2, 3), ((4, 5, 6, 7), (4, 5, 9))), plant((3, 2), ((4, 5, 6, 7, 8, 9), (4, 1, 9, 2)))]


def row_logps_and_gradients(model: PreTrainedModel) -> list[Tensor]:
    logps = answer_logps(model, TREES, torch.device("cpu"), fallback=False)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return [logps, *torch.autograd.grad(logps.square().sum(), trained)]


def with_and_without_fused_attention(model: PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same model twice; all but attention is fused in both."""
    original = deepcopy(model)
    for each in (model, original):
        fuse(each)
    for layer in original.get_decoder().layers:
        layer.self_attn.__class__ = type(layer.self_attn).__mro__[2]
    assert not any(isinstance(layer, FusedAttention) for layer in original.modules())
    return original, model


def attention_model(family: str, seed: int = 0) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        if family != "mistral":
            model = make_model(family, vocab_size=64, seed=seed, dtype=torch.float64)  # type: ignore[arg-type]
        else:
            # a window shorter than the answers
            model = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=3)).double().eval()
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.uniform_(-1, 1)
    return model


@pytest.mark.parametrize(
    ("family", "trained"),
    [*product_of(["llama", "qwen2", "mistral"], ["", "q_proj", "k_proj", "embed"]), ("qwen2", "v_proj.bias")],
)
def test_fused_attention_gives_rows_the_originals_values_and_gradients(family: str, trained: str) -> None:
    models = with_and_without_fused_attention(attention_model(family))
    calls: list[int] = []
    for model in models:
        for name, weight in model.named_parameters():
            weight.requires_grad_(trained in name)
    with pytest.MonkeyPatch.context() as patch:
        turned = fused_layers._TurnedProjections.apply
        patch.setattr(fused_layers._TurnedProjections, "apply", lambda *given: calls.append(1) or turned(*given))
        expected, found = map(row_logps_and_gradients, models)
    assert len(calls) == 2, "one call per layer of the fused model"
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9 * float(theirs.detach().abs().max()))


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_in_16_bit_fused_attention_errs_as_the_original_does(family: str) -> None:
    errors = [0.0, 0.0]
    for seed in range(MODELS):
        rounded = attention_model(family, seed).to(torch.bfloat16)
        exact = [one.detach() for one in row_logps_and_gradients(deepcopy(rounded).double())]
        for place, model in enumerate(with_and_without_fused_attention(rounded)):
            found = [one.detach() for one in row_logps_and_gradients(model)]
            assert all(grad.dtype is torch.bfloat16 for grad in found[1:])
            pairs = zip(found, exact, strict=True)
            off = [float((mine.double() - true).norm() / true.norm()) for mine, true in pairs]
            errors[place] += sum(off) / len(off) / MODELS
    original, fused = errors
    # other roundings, not more of them
    assert 0 < fused < 1.15 * original < 0.02


def test_an_adapter_in_the_attention_counts_and_generation_is_the_originals() -> None:
    original, fused = with_and_without_fused_attention(attention_model("llama"))
    prompt = torch.tensor([[1, 2, 3]])
    generated = [model.generate(prompt, max_new_tokens=5, do_sample=False) for model in (original, fused)]
    assert torch.equal(*generated)
    for model in (original, fused):
        for layer in model.get_decoder().layers:
            layer.self_attn.k_proj = nn.Sequential(layer.self_attn.k_proj, nn.Tanh())
    for mine, theirs in zip(row_logps_and_gradients(fused), row_logps_and_gradients(original), strict=True):
        assert torch.equal(mine, theirs)


def test_projections_have_the_gradients_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

    # sines that differ between the halves, as no model has them
    cos, sin = draw(3, 4).detach(), draw(3, 4).detach()
    weights, biases = [draw(size, 5) for size in (8, 4, 4)], [draw(size) for size in (8, 4, 4)]
    made = fused_layers._TurnedProjections.apply
    assert torch.autograd.gradcheck(lambda x, *rest: made(x, cos, sin, *rest), (draw(3, 5), *weights, *biases))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_feed_forward_layer_agrees_to_the_last_digits(dtype: torch.dtype) -> None:
    original = make_model("llama", width=64, dtype=dtype).get_decoder().layers[0].mlp
    fused = FeedForward(original.gate_proj, original.up_proj, original.down_proj)
    states, weighing = torch.randn(2, 3, 7, 64, generator=torch.Generator().manual_seed(0), dtype=dtype)
    for found, expected in zip(*(layer_gradients(x, states, weighing) for x in (fused, original)), strict=True):
        torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_norm_agrees_bit_for_bit_and_its_gradients_to_round_off(dtype: torch.dtype) -> None:
    original = make_model("llama", width=64, dtype=dtype).get_decoder().norm
    with torch.no_grad():
        original.weight.uniform_(0.5, 2)
    fused = RMSNorm(original.weight, original.variance_epsilon)
    states, weighing = 3 * torch.randn(2, 3, 7, 64, generator=torch.Generator().manual_seed(0), dtype=dtype)
    found, expected = (layer_gradients(layer, states, weighing) for layer in (fused, original))
    assert torch.equal(found[0], expected[0])
    # the originals compute in float32 whatever the model's precision
    tolerance = 2e-2 if dtype is torch.bfloat16 else 2e-6
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


@pytest.mark.parametrize("transposed", [False, True])
def test_large_products_are_products(transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(300, 600, generator=generator), torch.randn(800, 600, generator=generator)
    if transposed:
        weight = weight.T.contiguous().T
    assert len(x) * weight.numel() > _LARGE
    expected = (x.double() @ weight.double().T).float()
    torch.testing.assert_close(product(x, weight), expected, rtol=1e-5, atol=1e-4)


def test_gradients_are_those_of_finite_differences() -> None:
    original = make_model("llama", width=8, dtype=torch.float64).get_decoder().layers[0].mlp
    fused = FeedForward(original.gate_proj, original.up_proj, original.down_proj)
    states = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(fused, (states,))


def test_parameters_and_files_keep_their_names(tmp_path: Path) -> None:
    model = make_model("qwen3")
    names, weights = [name for name, _ in model.named_parameters()], model.state_dict()
    fuse(model)
    assert {name for name, _ in model.named_parameters()} == set(names)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    assert not any(isinstance(layer, RMSNorm | FeedForward) for layer in loaded.modules())


def test_less_is_kept_for_the_backward_pass() -> None:
    def kept(model: PreTrainedModel) -> int:
        sizes: dict[int, int] = {}
        weights = {weight.data_ptr() for weight in model.parameters()}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if x.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            # the graph lives until the sizes are counted, so that no memory is counted twice
            logits = model(torch.arange(48)[None], use_cache=False).logits
        assert logits.requires_grad
        return sum(sizes.values())

    model = make_model("llama", vocab_size=64, width=64, layers=6)
    before = kept(model)
    fuse(model)
    assert kept(model) < 0.8 * before


def test_layers_of_other_classes_stay_as_they_are() -> None:
    # Gemma 2 scales by 1 + weight and has another activation; this Llama has a gelu and biases
    gemma = Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8)).eval()
    assert fuse(gemma) == 0
    llama = LlamaForCausalLM(LlamaConfig(**SHAPE, hidden_act="gelu")).eval()
    assert fuse(llama) == 7
    assert not any(isinstance(layer, FeedForward) for layer in llama.modules())


def test_a_bias_or_an_adapter_in_the_feed_forward_layer_counts() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, mlp_bias=True)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.uniform_(-1, 1)
    fused = deepcopy(model)
    fuse(fused)
    assert_same(model, fused)
    model = make_model("llama", vocab_size=64)
    fused = deepcopy(model)
    fuse(fused)
    for each in (model, fused):
        for layer in each.get_decoder().layers:
            layer.mlp.up_proj = nn.Sequential(layer.mlp.up_proj, nn.Tanh())
    assert_same(model, fused)


def test_frozen_weights_get_no_gradient() -> None:
    model = make_model("llama", vocab_size=64)
    fuse(model)
    for name, weight in model.named_parameters():
        weight.requires_grad_("q_proj" in name)
    found = loss_and_gradients(model)[1]
    assert found
    assert all("q_proj" in name for name in found)


def test_each_model_is_replaced_alone() -> None:
    one, other = make_model("llama"), make_model("llama")
    fuse(one)
    assert type(other.get_decoder().norm).__name__ == "LlamaRMSNorm"
    assert fuse(one) == 0
