"""Tree rows against the plain forward pass, which is computed here by itself: logps and every parameter's gradient."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import Family, make_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from anchored.batches import answer_logps as scoring
from anchored.batches.answer_logps import answer_logps, answer_logps_plain
from anchored.batches.tree import Tree, plant

CPU = torch.device("cpu")
VOCAB = 67


def norms_in_fp64(model: PreTrainedModel) -> None:
    """transformers' norms round fp64 to fp32 inside, which would hide everything below 1e-7; torch's do not."""
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm).__name__.endswith("RMSNorm"):
                exact = torch.nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon, dtype=torch.float64)
                exact.weight = norm.weight
                setattr(parent, name, exact)


def random_ids(rng: random.Random, most: int, least: int = 0) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(rng.randint(least, most))]


def random_trees(rng: random.Random, count: int, answers: int) -> list[Tree]:
    """Prompts and answers of all shapes: long and one-token, shared prefixes or none, empty, equal, nested answers."""
    trees = []
    for index in range(count):
        # the first has something to score, or there would be no gradient to compare
        shared = random_ids(rng, 6, least=index == 0) if index == 0 or rng.random() < 0.7 else []
        drawn = [shared + random_ids(rng, rng.choice([0, 1, 9])) for _ in range(answers)]
        if rng.random() < 0.2:
            drawn[-1] = drawn[0]
        trees.append(plant(random_ids(rng, rng.choice([1, 12]), 1), drawn))
    return trees


def forward_logps(model: PreTrainedModel, trees: Sequence[Tree]) -> Tensor:
    """Independent of the package: full logits of prompt + answer, one by one."""
    rows = []
    for tree in trees:
        for answer in tree.answers:
            ids = torch.tensor([tree.prompt + answer])
            logps = torch.log_softmax(model(input_ids=ids, use_cache=False).logits, -1)[0]
            steps = range(len(tree.prompt), ids.shape[1])
            rows.append(sum((logps[step - 1, ids[0, step]] for step in steps), torch.zeros((), dtype=logps.dtype)))
    return torch.stack(rows).view(len(trees), -1)


def gradients(model: PreTrainedModel, logps: Tensor, weights: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (logps * weights).sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def assert_equal(model: PreTrainedModel, trees: Sequence[Tree], tolerance: float, score=answer_logps) -> None:
    weights = torch.randn(len(trees), len(trees[0].branches), generator=torch.Generator().manual_seed(0)).to(
        model.dtype
    )
    expected = forward_logps(model, trees)
    expected_gradients = gradients(model, expected, weights)
    found = score(model, trees, CPU)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert relative(found.detach(), expected.detach()) < tolerance
    found_gradients = gradients(model, found, weights)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert relative(found_gradients[name], gradient) < tolerance, name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_a_row_of_trees_scores_like_each_answer_alone(
    family: Family, dtype: torch.dtype, tolerance: float, tied: bool
) -> None:
    rng = random.Random(f"{family}{tied}")
    model = make_model(family, VOCAB, dtype=dtype, tied=tied)
    if dtype == torch.float64:
        norms_in_fp64(model)
    for answers in (1, 2, 2, 2, 3, 4):
        assert_equal(model, random_trees(rng, rng.randint(1, 5), answers), tolerance)


def test_the_plain_path_scores_like_each_answer_alone() -> None:
    model = make_model("llama", VOCAB, dtype=torch.float64)
    norms_in_fp64(model)
    assert_equal(model, random_trees(random.Random(1), 4, 2), 1e-9, score=answer_logps_plain)


@pytest.mark.parametrize("tile_bytes", [4 * VOCAB, 4 * VOCAB * 7])
@pytest.mark.parametrize("kept_bytes", [0, 2**27])
def test_tiles_of_the_head_change_nothing(tile_bytes: int, kept_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_TILE_BYTES", {False: tile_bytes, True: tile_bytes})
    monkeypatch.setattr(scoring, "_KEPT_BYTES", kept_bytes)
    model = make_model("qwen2", VOCAB, dtype=torch.float64)
    norms_in_fp64(model)
    assert_equal(model, random_trees(random.Random(2), 4, 2), 1e-9)


def test_answers_longer_than_a_chunk_of_queries_score_alike() -> None:
    model = make_model("llama", VOCAB, dtype=torch.float64)
    norms_in_fp64(model)
    rng = random.Random(3)
    ids = [[rng.randrange(VOCAB) for _ in range(length)] for length in (150, 140, 300, 129)]
    assert_equal(model, [plant(ids[0], [ids[1] + ids[2], ids[1] + ids[3]])], 1e-9)


def test_gradient_checkpointing_changes_nothing() -> None:
    model = make_model("qwen3", VOCAB, dtype=torch.float64)
    trees, weights = random_trees(random.Random(4), 3, 2), torch.randn(3, 2, dtype=torch.float64)
    expected = gradients(model, answer_logps(model, trees, CPU), weights)
    model.gradient_checkpointing_enable()
    found = gradients(model.train(), answer_logps(model, trees, CPU), weights)
    assert all(relative(found[name], gradient) < 1e-9 for name, gradient in expected.items())


def test_a_frozen_head_gets_no_gradient_and_changes_no_other() -> None:
    model = make_model("llama", VOCAB, dtype=torch.float64)
    trees, weights = random_trees(random.Random(5), 3, 2), torch.randn(3, 2, dtype=torch.float64)
    expected = gradients(model, answer_logps(model, trees, CPU), weights)
    model.lm_head.requires_grad_(False)
    found = gradients(model, answer_logps(model, trees, CPU), weights)
    assert found.keys() == expected.keys() - {"lm_head.weight"}
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_rows_in_bfloat16_are_as_near_to_the_truth_as_the_plain_path() -> None:
    model = make_model("llama", VOCAB)
    trees = random_trees(random.Random(6), 8, 2)
    with torch.no_grad():
        truth = forward_logps(model, trees)
        model = model.to(torch.bfloat16)
        found, plain = answer_logps(model, trees, CPU), forward_logps(model, trees)
    assert found.dtype == torch.float32
    assert (found - truth).abs().mean() < 1.5 * (plain - truth).abs().mean()


def test_answers_without_tokens_score_zero() -> None:
    model = make_model("llama", VOCAB)
    logps = answer_logps(model, [plant([1, 2], [[], []])], CPU)
    assert logps.tolist() == [[0.0, 0.0]]


def test_a_model_that_scored_rows_still_answers_and_saves_as_before(tmp_path: Path) -> None:
    model = make_model("llama", VOCAB)
    ids = torch.tensor([[0, 0, 7, 5, 3], [4, 8, 7, 5, 3]])
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])}
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    expected_logits = model(**inputs).logits
    answer_logps(model, [plant([1, 2], [[3], [4]])], CPU)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), expected)
    assert torch.allclose(model(**inputs).logits, expected_logits, atol=1e-6)
    model.save_pretrained(tmp_path)
    assert "anchored" not in (tmp_path / "config.json").read_text()
    assert LlamaForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    "config",
    [
        transformers.MistralConfig(**SHAPE, sliding_window=4096),
        transformers.GraniteConfig(**SHAPE, logits_scaling=3.0, attention_multiplier=0.3, residual_multiplier=0.5),
        transformers.CohereConfig(**SHAPE, logit_scale=0.3),
        transformers.Gemma3TextConfig(**SHAPE, head_dim=8),
        transformers.MixtralConfig(**SHAPE, num_local_experts=4),
    ],
    ids=lambda config: config.model_type,
)
def test_other_families_take_rows_through_their_own_head(
    config: PreTrainedConfig, recwarn: pytest.WarningsRecorder
) -> None:
    assert_equal(build(config), random_trees(random.Random(7), 4, 2), 1e-5)
    assert not recwarn


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.MistralConfig(**SHAPE, sliding_window=8), "window of 8 tokens"),
        (transformers.Gemma2Config(**SHAPE, head_dim=8), "softcap"),
        (transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2), "state"),
        (transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4), "replaced"),
        (transformers.LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "dynamic"),
        (transformers.LlamaConfig(**SHAPE, attention_dropout=0.1), "drops out"),
    ],
    ids=["sliding", "softcap", "recurrent", "alibi", "dynamic-rope", "dropout"],
)
def test_what_no_row_can_express_falls_back_says_so_once_and_is_right(config: PreTrainedConfig, reason: str) -> None:
    model = build(config)
    trees = random_trees(random.Random(8), 4, 2)
    with pytest.warns(UserWarning, match=reason):
        answer_logps(model.train(), trees, CPU)
    model.eval()
    with warnings.catch_warnings(action="error"):
        assert_equal(model, trees, 1e-5)


def test_a_model_that_loses_the_row_on_its_way_to_the_layers_is_found_out() -> None:
    class ForgetfulConfig(transformers.LlamaConfig):
        model_type = "forgetful"

    class Forgetful(LlamaForCausalLM):
        def forward(self, *args, tree_row=None, **kwargs):
            return super().forward(*args, **kwargs)

    model = Forgetful(ForgetfulConfig(**SHAPE)).eval()
    with pytest.warns(UserWarning, match="the plain path"):
        assert_equal(model, random_trees(random.Random(9), 4, 2), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 3e-2)])
def test_rows_on_cuda_score_like_rows_on_cpu_in_fp64(dtype: torch.dtype, tolerance: float) -> None:
    model = make_model("qwen3", VOCAB, dtype=torch.float64, width=128)
    trees, weights = random_trees(random.Random(10), 6, 3), torch.randn(6, 3, dtype=torch.float64)
    truth = answer_logps(model, trees, CPU)
    expected = gradients(model, truth, weights)
    device = torch.device("cuda")
    model.to(device, dtype)
    logps = answer_logps(model, trees, device)
    assert relative(logps.detach().cpu().double(), truth.detach()) < tolerance
    found = gradients(model, logps, weights.to(device))
    assert all(relative(found[name].cpu().double(), gradient) < 3 * tolerance for name, gradient in expected.items())
