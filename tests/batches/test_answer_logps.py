"""Tree rows against the plain forward pass: logps, every parameter's gradient, and what a model is left as."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from plain_scores import (
    CPU,
    VOCAB,
    MostRows,
    Score,
    assert_scores_like,
    gradients,
    norms_in_fp64,
    plain_logps,
    random_ids,
    random_trees,
    random_weights,
    relative,
)
from tiny_models import Family, make_model
from transformers import LlamaForCausalLM, PreTrainedModel

from anchored.batches.answer_logps import answer_logps, answer_logps_plain, sum_answers
from anchored.batches.packing import pack
from anchored.batches.tree import lay, plant


def exact_model(family: Family = "llama") -> PreTrainedModel:
    return norms_in_fp64(make_model(family, VOCAB, dtype=torch.float64))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_a_row_scores_like_each_answer_alone_with_tied_weights(
    family: Family, dtype: torch.dtype, tolerance: float
) -> None:
    rng = random.Random(family)
    model = make_model(family, VOCAB, dtype=dtype, tied=True)
    if dtype == torch.float64:
        norms_in_fp64(model)
    for answers in (1, 2, 3, 4):
        assert_scores_like(model, model, random_trees(rng, rng.randint(1, 5), answers), tolerance)


def test_the_plain_path_scores_like_each_answer_alone() -> None:
    model = exact_model()
    assert_scores_like(model, model, random_trees(random.Random(1), 4, 2), 1e-9, score=answer_logps_plain)


def test_the_plain_path_holds_no_logits_of_the_prompt() -> None:
    model = make_model("llama", VOCAB)
    with torch.no_grad(), MostRows(VOCAB) as held:
        answer_logps_plain(model, [plant([1] * 500, [[2, 3], [4]])], CPU)
    # logits and their log softmax, at two tokens and the place after them
    assert held.most <= 6


def test_answers_longer_than_a_chunk_of_queries_score_alike() -> None:
    model, rng = exact_model(), random.Random(3)
    ids = [[rng.randrange(VOCAB) for _ in range(length)] for length in (150, 140, 300, 129)]
    assert_scores_like(model, model, [plant(ids[0], [ids[1] + ids[2], ids[1] + ids[3], ids[3]])], 1e-9)


@pytest.mark.parametrize("answers", [2, 3])
def test_any_token_budget_gives_the_logps_and_gradients_of_any_other(answers: int) -> None:
    model, trees = exact_model("qwen3"), random_trees(random.Random(7), 9, answers)
    whole = answer_logps(model, trees, CPU)
    weights, expected = random_weights(whole), gradients(model, whole)
    for budget in (1, 45, 100):
        model.zero_grad()
        for row in pack([tree.size for tree in trees], budget):
            logps = answer_logps(model, [trees[index] for index in row], CPU)
            assert relative(logps, whole[row]) < 1e-12
            (logps * weights[row]).sum().backward()
        for name, weight in model.named_parameters():
            assert weight.grad is not None
            assert relative(weight.grad, expected[name]) < 1e-9, (budget, name)


def test_the_same_row_gives_the_same_bits() -> None:
    model, trees = make_model("qwen3", VOCAB), random_trees(random.Random(8), 6, 3)
    first, second = answer_logps(model, trees, CPU), answer_logps(model, trees, CPU)
    assert torch.equal(first, second)
    again = gradients(model, second)
    assert all(torch.equal(gradient, again[name]) for name, gradient in gradients(model, first).items())


def test_an_answers_logp_is_its_tokens_sum_rounded_once() -> None:
    """So that neither a long answer's first digits nor its place in the row touch the last ones."""
    rng = random.Random(11)
    layout = lay([plant([1], [random_ids(rng, 900, 600) for _ in range(3)]) for _ in range(3)])
    logps = -10 * torch.rand(len(layout.targets), generator=torch.Generator().manual_seed(0))
    exact = [math.fsum(part.tolist()) for part in logps[layout.paths].split(layout.answer_lengths.flatten().tolist())]
    assert torch.equal(sum_answers(layout, logps).flatten(), torch.tensor(exact))


def test_equal_answers_have_equal_logps_to_the_bit() -> None:
    model, rng = make_model("llama", VOCAB), random.Random(9)
    answer = [rng.randrange(VOCAB) for _ in range(300)]
    logps = answer_logps(model, [plant([1], [answer, answer, answer])], CPU)[0]
    assert logps[0] == logps[1] == logps[2]


def test_a_frozen_head_gets_no_gradient_and_changes_no_other() -> None:
    model, trees = make_model("llama", VOCAB, dtype=torch.float64), random_trees(random.Random(5), 3, 2)
    expected = gradients(model, answer_logps(model, trees, CPU))
    model.lm_head.requires_grad_(False)
    found = gradients(model, answer_logps(model, trees, CPU))
    assert found.keys() == expected.keys() - {"lm_head.weight"}
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_rows_in_bfloat16_are_as_near_to_the_truth_as_the_plain_path() -> None:
    model = make_model("llama", VOCAB)
    trees = random_trees(random.Random(6), 8, 2)
    with torch.no_grad():
        truth = plain_logps(model, trees)
        model = model.to(torch.bfloat16)
        found, plain = answer_logps(model, trees, CPU), plain_logps(model, trees)
    assert found.dtype == torch.float32
    assert (found - truth).abs().mean() < 1.5 * (plain - truth).abs().mean()


@pytest.mark.parametrize("score", [answer_logps, answer_logps_plain])
def test_answers_without_tokens_score_zero(score: Score) -> None:
    model = make_model("llama", VOCAB)
    logps = score(model, [plant([1, 2], [[], []])], CPU)
    assert logps.tolist() == [[0.0, 0.0]]
    logps.sum().backward()


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


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 3e-2)])
def test_rows_on_cuda_score_like_rows_on_cpu_in_fp64(dtype: torch.dtype, tolerance: float) -> None:
    model = make_model("qwen3", VOCAB, dtype=torch.float64, width=128)
    trees = random_trees(random.Random(10), 6, 3)
    truth = answer_logps(model, trees, CPU)
    expected = gradients(model, truth)
    device = torch.device("cuda")
    model.to(device, dtype)
    logps = answer_logps(model, trees, device)
    assert relative(logps.cpu().double(), truth) < tolerance
    found = gradients(model, logps)
    assert all(relative(found[name].cpu().double(), gradient) < 3 * tolerance for name, gradient in expected.items())
