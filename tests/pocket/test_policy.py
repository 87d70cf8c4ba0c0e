from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from anchored.pocket.build import build, share_right
from anchored.pocket.tasks import make_tasks
from anchored.pocket.world import policy_folder


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    # matrices this small lose more than they gain by a second thread, the more so on a busy machine
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(policy_folder())


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(policy_folder()).eval()


def ids_of(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    return tokenizer.apply_chat_template(messages, return_dict=False, **options)


def test_the_shipped_policy_is_small(model: Any) -> None:
    assert sum(file.stat().st_size for file in policy_folder().iterdir()) <= 4 * 2**20
    assert 500_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 1_000_000
    assert model.config.model_type == "llama"


def test_the_shipped_policy_gets_a_third_to_a_half_right_greedily(model: Any, tokenizer: Any) -> None:
    torch.manual_seed(0)
    tasks = make_tasks(150, seed=5, split="evaluation")
    assert 1 / 3 <= share_right(model, tokenizer, tasks) <= 1 / 2
    assert 1 / 4 <= share_right(model, tokenizer, tasks, temperature=1.0) <= 1 / 2


@pytest.mark.parametrize(
    "turns",
    [
        ["user"],
        ["system", "user"],
        ["user", "assistant", "user"],
        ["system", "user", "assistant", "user", "assistant", "user"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("answer", ["Answer: 725", " leading and trailing ", "\n\n", "", "déjà vu 数 🙂 \\boxed{1}"])
def test_a_prompts_tokens_begin_the_tokens_of_prompt_and_answer(tokenizer: Any, turns: list[str], answer: str) -> None:
    prompt = [{"role": role, "content": f" What is {place}+345?\n"} for place, role in enumerate(turns)]
    prompt_ids = ids_of(tokenizer, prompt, add_generation_prompt=True)
    all_ids = ids_of(tokenizer, [*prompt, {"role": "assistant", "content": answer}])
    assert all_ids[: len(prompt_ids)] == prompt_ids
    answer_ids = all_ids[len(prompt_ids) :]
    assert answer_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer_ids[:-1], skip_special_tokens=True) == answer
    assert all_ids.count(tokenizer.bos_token_id) == 1
    assert all_ids[0] == tokenizer.bos_token_id


def test_generation_ends_at_the_end_of_the_turn(model: Any, tokenizer: Any) -> None:
    config = GenerationConfig.from_pretrained(policy_folder())
    assert config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert config.pad_token_id == tokenizer.pad_token_id
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    prompt = ids_of(tokenizer, [{"role": "user", "content": "What is 123+456?"}], add_generation_prompt=True)
    with torch.no_grad():
        output = model.generate(torch.tensor([prompt]))[0].tolist()
    assert output[-1] == tokenizer.eos_token_id
    assert len(output) < len(prompt) + config.max_new_tokens


def test_digits_are_single_tokens(tokenizer: Any) -> None:
    assert tokenizer.convert_ids_to_tokens(tokenizer("12345", add_special_tokens=False)["input_ids"]) == list("12345")


def test_an_unknown_role_is_refused(tokenizer: Any) -> None:
    with pytest.raises(jinja2.TemplateError, match="got tool"):
        ids_of(tokenizer, [{"role": "tool", "content": "4"}])


def test_building_again_gives_the_same_folder(tmp_path: Path) -> None:
    for name in ("one", "two"):
        build(tmp_path / name, seed=1, examples=96)
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert files == sorted(file.name for file in policy_folder().iterdir())
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
