"""LocalChat on tiny random models: against plain generation, the softmax, and itself in other batches."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import STUCK_SECONDS
from scipy import stats
from tiny_models import CHATML, END, save_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from anchored.errors import ModelError, ReplyError
from anchored.llm import local_chat
from anchored.llm.chat import Chat, Reply, Request
from anchored.llm.local_chat import LocalChat, gumbel, keep_top_p, noise_key, padded_width
from anchored.records import Message

WORDS = ["add", "348", "and", "275", "first", "the ones", "sort", "larger", "train", "hours", "cents", "你好", "?"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """What is promised bit by bit is promised for one thread; and tests share the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("models") / "llama", "llama")


def ask(text: str, **settings: float) -> Request:
    return Request((Message("user", text),), **settings)  # type: ignore[arg-type]


def questions(count: int, seed: int = 0, **settings: float) -> list[Request]:
    """Requests whose prompts and limits differ in length."""
    draw = random.Random(seed)
    return [
        ask(
            " ".join(draw.choices(WORDS, k=draw.randint(1, 40))),
            index=i % 3,
            max_tokens=draw.randint(1, 40),
            **settings,
        )
        for i in range(count)
    ]


def answers(
    folder: Path, requests: Sequence[Request], batch_size: int = 16, device: str = "cpu", **settings: str
) -> list[Reply]:
    """All replies, asked at once."""

    async def run() -> list[Reply]:
        chat = LocalChat(folder, batch_size=batch_size, device=device, **settings)
        try:
            return await asyncio.gather(*map(chat.reply, requests))
        finally:
            await chat.close()

    return asyncio.run(run())


def token_ids(replies: Iterable[Reply]) -> list[list[int]]:
    return [reply.raw["token_ids"] for reply in replies]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_greedy_answers_are_those_of_plain_generation_one_by_one(tmp_path: Path, family: str) -> None:
    folder = save_folder(tmp_path / family, family, bos=family == "llama")  # type: ignore[arg-type]
    requests = questions(20, temperature=0.0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for request, reply in zip(requests, answers(folder, requests), strict=True):
        turns = [{"role": "user", "content": request.messages[0].content}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        whole = model.generate(prompt, max_new_tokens=request.max_tokens, do_sample=False, pad_token_id=0)
        alone = whole[0, prompt.shape[1] :]
        assert reply.raw["token_ids"] == alone.tolist()
        assert reply.text == tokenizer.decode(alone, skip_special_tokens=True)
        assert reply.usage.prompt_tokens == prompt.shape[1]
        assert reply.usage.completion_tokens == len(alone)
        assert reply.finish_reason == ("stop" if alone[-1] == tokenizer.eos_token_id else "length")


@pytest.mark.gpu
def test_a_gpu_answers_as_a_cpu_does_and_draws_the_same_again(folder: Path) -> None:
    requests = questions(20, temperature=0.0)
    assert token_ids(answers(folder, requests, device="cuda")) == token_ids(answers(folder, requests))
    drawn = questions(60, temperature=1.0, seed=3)
    first, again = (token_ids(answers(folder, drawn, device="cuda")) for _ in range(2))
    assert first == again
    assert len({tuple(tokens) for tokens in first if len(tokens) > 3}) > 30


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_sample_does_not_depend_on_its_batch(folder: Path, dtype: str) -> None:
    requests = questions(240, temperature=1.0, seed=3)
    alone = token_ids(answers(folder, requests, batch_size=8, dtype=dtype))
    assert len({tuple(tokens) for tokens in alone if len(tokens) > 3}) > 150
    assert any(tokens[-1] == 2 for tokens in alone)  # some end by themselves

    order = random.Random(1).sample(range(240), 240)
    shuffled = token_ids(answers(folder, [requests[i] for i in order], batch_size=50, dtype=dtype))
    assert shuffled == [alone[i] for i in order]

    some = requests[::5]
    among_others = [*questions(100, seed=9, temperature=0.5, top_p=0.8), *some, *questions(60, seed=8, temperature=0.0)]
    assert token_ids(answers(folder, among_others, batch_size=128, dtype=dtype))[100:148] == alone[::5]


def test_a_request_asked_by_itself_gets_what_it_got_in_a_crowd(folder: Path) -> None:
    requests = questions(60, temperature=1.0, seed=4)
    crowd = token_ids(answers(folder, requests, batch_size=64))

    async def one_by_one() -> list[Reply]:
        chat = LocalChat(folder, batch_size=64, device="cpu")
        replies = [await chat.reply(request) for request in requests[:10]]
        await chat.close()
        return replies

    assert token_ids(asyncio.run(one_by_one())) == crowd[:10]


def test_each_part_of_the_request_gives_another_sample_and_a_longer_limit_continues_it(folder: Path) -> None:
    first = ask("Add 348 and 275.", temperature=1.0, max_tokens=12)
    requests = [
        first,
        first,
        replace(first, max_tokens=40),
        replace(first, index=1),
        replace(first, seed=1),
        replace(first, messages=(Message("system", "Be brief."), *first.messages)),
    ]
    drawn = token_ids(answers(folder, requests))
    assert drawn[0] == drawn[1] == drawn[2][:12]
    assert len({tuple(tokens[:12]) for tokens in drawn}) == 4


def test_first_tokens_follow_the_softmax(folder: Path) -> None:
    text, temperature, draws = "Which number is larger?", 0.4, 3000
    requests = [ask(text, temperature=temperature, max_tokens=1, index=index) for index in range(draws)]
    counts = Counter(tokens[0] for tokens in token_ids(answers(folder, requests, batch_size=256)))
    assert_drawn_from(counts, first_token_probabilities(folder, text, temperature))


def test_second_tokens_follow_the_softmax_whatever_the_first(folder: Path) -> None:
    """A noise that repeated from one position to the next would not show in the first token."""
    text, temperature = "Which number is larger?", 0.4
    requests = [ask(text, temperature=temperature, max_tokens=2, index=index) for index in range(6000)]
    drawn = token_ids(answers(folder, requests, batch_size=256))
    first = Counter(tokens[0] for tokens in drawn).most_common(1)[0][0]
    counts = Counter(tokens[1] for tokens in drawn if tokens[0] == first)
    assert_drawn_from(counts, first_token_probabilities(folder, text, temperature, [first]))


def test_top_p_draws_from_exactly_the_nucleus(folder: Path) -> None:
    text = "How many coins make 68 cents?"
    probabilities = first_token_probabilities(folder, text, 0.5)
    nucleus, mass = set(), 0.0
    for token in np.argsort(-probabilities, kind="stable"):
        nucleus.add(int(token))
        mass += probabilities[token]
        if mass >= 0.3:
            break
    requests = [ask(text, temperature=0.5, top_p=0.3, max_tokens=1, index=index) for index in range(2000)]
    counts = Counter(tokens[0] for tokens in token_ids(answers(folder, requests, batch_size=256)))
    assert set(counts) == nucleus
    within = np.where([token in nucleus for token in range(len(probabilities))], probabilities, 0)
    assert_drawn_from(counts, within / within.sum())


def test_top_p_keeps_the_smallest_set_and_of_equal_tokens_the_first() -> None:
    scores = torch.tensor([[0.4, 0.1, 0.4, 0.1], [0.25, 0.25, 0.25, 0.25], [0.1, 0.2, 0.3, 0.4]]).log()
    kept = keep_top_p(scores, torch.tensor([[0.5], [0.5], [1e-9]], dtype=torch.float64)).isfinite()
    assert kept.int().tolist() == [[1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]]


def test_the_noise_is_gumbel_and_a_function_of_key_position_and_token() -> None:
    keys = torch.tensor([[noise_key(ask("x", index=index))] for index in range(50)])
    noise = gumbel(keys, 7, 1000)
    assert torch.equal(noise[[3, 40], :400], gumbel(keys[[3, 40]], 7, 400))
    assert stats.kstest(noise.flatten().numpy(), stats.gumbel_r.cdf).pvalue > 0.01
    neighbours = [gumbel(keys, 8, 1000), noise.roll(1, 0), noise.roll(1, 1), gumbel(keys + 1, 7, 1000)]
    for other in neighbours:
        assert abs(np.corrcoef(noise.flatten(), other.flatten())[0, 1]) < 0.015
    # the first values of the published generator, seed 1234567, as uniforms
    first = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert torch.allclose(_splitmix_uniforms(1234567, 3), torch.tensor([value / 2**64 for value in first]).double())


def test_a_padded_width_holds_the_prompt_and_wastes_at_most_a_quarter() -> None:
    widths = [padded_width(length) for length in range(1, 5000)]
    assert all(length <= width <= max(16, 1.25 * length + 16) for length, width in enumerate(widths, 1))
    assert widths == sorted(widths)
    assert len(set(widths)) < 40


def test_the_requests_settings_hold_and_not_the_generation_configs(folder: Path, tmp_path: Path) -> None:
    requests = questions(16, temperature=0.7)
    other = save_folder(tmp_path / "opinionated", "llama")
    config = json.loads((other / "generation_config.json").read_text())
    config |= {"do_sample": True, "temperature": 2.0, "top_k": 1, "repetition_penalty": 5.0, "max_length": 3}
    (other / "generation_config.json").write_text(json.dumps(config))
    assert token_ids(answers(other, requests)) == token_ids(answers(folder, requests))
    (other / "generation_config.json").write_text(json.dumps(config | {"suppress_tokens": list(range(3, 400))}))
    assert {token for tokens in token_ids(answers(other, requests)) for token in tokens} <= {0, 1, 2, *range(400, 448)}


def test_the_templates_end_of_turn_ends_an_answer_that_the_generation_config_does_not_name(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "model", "llama")
    for name in ("generation_config.json", "config.json"):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | {"eos_token_id": 0}))
    replies = answers(folder, [ask("x", temperature=1.5, max_tokens=400, index=index) for index in range(32)])
    assert any(reply.raw["token_ids"][-1] == 2 and reply.finish_reason == "stop" for reply in replies)
    assert all(2 not in reply.raw["token_ids"][:-1] for reply in replies)
    assert all(END not in reply.text for reply in replies)


def test_what_cannot_be_asked_is_that_rows_error_alone(folder: Path) -> None:
    async def run() -> list[Reply | BaseException]:
        chat = LocalChat(folder, batch_size=16, device="cpu")
        requests = [
            ask("fine", max_tokens=5),
            ask("long " * 2000, max_tokens=5),
            ask("x", max_tokens=5000),
            ask("\ud800"),
        ]
        results = await asyncio.gather(*map(chat.reply, requests), return_exceptions=True)
        await chat.close()
        return results

    fine, long, greedy, surrogate = asyncio.run(run())
    assert isinstance(fine, Reply)
    assert isinstance(long, ReplyError)
    assert "2048" in str(long)
    assert isinstance(greedy, ReplyError)
    assert "5000" in str(greedy)
    assert isinstance(surrogate, ReplyError)


def test_a_template_without_system_turns_refuses_only_those(tmp_path: Path) -> None:
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    folder = save_folder(tmp_path / "model", chat_template=refuses + CHATML)

    async def run() -> list[Reply | BaseException]:
        chat = LocalChat(folder, batch_size=8, device="cpu")
        plain = ask("x", max_tokens=3)
        system = replace(plain, messages=(Message("system", "Be brief."), *plain.messages))
        results = await asyncio.gather(chat.reply(plain), chat.reply(system), return_exceptions=True)
        await chat.close()
        return results

    plain, system = asyncio.run(run())
    assert isinstance(plain, Reply)
    assert isinstance(system, ReplyError)
    assert "System role not supported" in str(system)


def test_the_event_loop_runs_on_while_answers_are_made_and_short_ones_do_not_wait_for_long_ones(folder: Path) -> None:
    async def run() -> None:
        chat: Chat = LocalChat(folder, batch_size=8, device="cpu")
        await chat.reply(ask("warm up", max_tokens=1))
        long = asyncio.create_task(chat.reply(ask("Sort them.", temperature=0.0, max_tokens=600)))
        short = asyncio.create_task(chat.reply(ask("Sort them.", temperature=0.0, max_tokens=2)))
        await short
        assert not long.done()
        turns = 0
        while not long.done():
            await asyncio.sleep(0.001)
            turns += 1
        assert turns > 3
        await chat.close()

    asyncio.run(run())


def test_a_failure_of_the_worker_reaches_all_who_wait_and_all_who_come_later(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])

    async def run() -> None:
        chat = LocalChat(folder, batch_size=8, device="cpu")  # nothing is loaded yet
        results = await asyncio.gather(*(chat.reply(ask(text)) for text in "abcdefghijkl"), return_exceptions=True)
        assert {type(result) for result in results} == {ModelError}
        with pytest.raises(ModelError, match=str(folder)):
            await chat.reply(ask("later"))
        await chat.close()

    asyncio.run(run())


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of what is generated so far, prompt and all, at each token."""
    draw, seen = local_chat._Draw.__call__, []

    def noted(self: local_chat._Draw, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(input_ids.shape[1])
        return draw(self, input_ids, scores)

    monkeypatch.setattr(local_chat._Draw, "__call__", noted)
    return seen


async def under_way(steps: list[int]) -> None:
    """Wait until the worker is at a batch."""
    before = len(steps)
    while len(steps) == before:
        await asyncio.sleep(0.001)


def test_closing_ends_the_worker_after_its_token_and_tells_who_waits(
    folder: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        chat = LocalChat(folder, batch_size=8, device="cpu", name="closing")
        await chat.reply(ask("warm up", max_tokens=1))
        waiting = [asyncio.create_task(chat.reply(ask("x", max_tokens=1900, index=index))) for index in range(30)]
        await under_way(steps)
        closing = chat._closing.set
        monkeypatch.setattr(chat._closing, "set", lambda: (closing(), steps.clear()))
        await chat.close()
        assert len(steps) <= 1
        for result in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(result, ModelError)
        await chat.close()
        with pytest.raises(ModelError, match="closed"):
            await chat.reply(ask("x"))

    asyncio.run(run())
    assert "generate closing" not in {thread.name for thread in threading.enumerate()}


def test_a_cancelled_call_leaves_the_others_and_frees_its_row(folder: Path, steps: list[int]) -> None:
    async def run() -> None:
        chat = LocalChat(folder, batch_size=8, device="cpu")
        expected = await chat.reply(ask("x", max_tokens=50))
        endless = [asyncio.create_task(chat.reply(ask("x", max_tokens=1900, index=index))) for index in range(8)]
        await under_way(steps)
        for task in endless:
            task.cancel()
        again = await chat.reply(ask("x", max_tokens=50))
        assert again.text == expected.text
        assert max(steps) < 500
        await chat.close()

    asyncio.run(run())


def test_the_fingerprint_is_of_the_content_and_the_precision(folder: Path, tmp_path: Path) -> None:
    same = LocalChat(save_folder(tmp_path / "same"), batch_size=4, device="cpu")
    ours = LocalChat(folder, batch_size=8, device="cpu", name="another name")
    assert ours.fingerprint == same.fingerprint
    assert (same.name, ours.name) == ("same", "another name")
    others = [
        LocalChat(folder, batch_size=8, device="cpu", dtype="bfloat16"),
        LocalChat(save_folder(tmp_path / "weights", seed=1), batch_size=8, device="cpu"),
    ]
    assert len({chat.fingerprint for chat in [ours, *others]}) == 3


def test_running_out_of_memory_names_the_setting_to_lower(folder: Path) -> None:
    script = f"""
import asyncio, resource, torch
from anchored.errors import ModelError
from anchored.llm.chat import Request
from anchored.llm.local_chat import LocalChat
from anchored.records import Message

async def run():
    chat = LocalChat({str(folder)!r}, batch_size=4096, device="cpu")
    await chat.reply(Request((Message("user", "x"),), max_tokens=1))
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20),) * 2)
    requests = [Request((Message("user", "long " * 300),), max_tokens=4, index=i) for i in range(600)]
    results = await asyncio.gather(*map(chat.reply, requests), return_exceptions=True)
    print({{type(result).__name__ for result in results}}, results[0])

asyncio.run(run())
"""
    if sys.platform != "linux":
        pytest.skip("needs RLIMIT_AS and /proc")
    # threads take room of their own, the more the more cores there are
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=STUCK_SECONDS, check=False)
    assert "{'ModelError'}" in done.stdout, done.stderr[-2000:]
    assert "lower sample.batch_size (now 4096)" in done.stdout


def first_token_probabilities(folder: Path, text: str, temperature: float, answer: Sequence[int] = ()) -> np.ndarray:
    """The model's distribution after the prompt and the tokens of `answer`, without any of our code."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([[*prompt, *answer]])).logits[0, -1]
    scaled = logits.double().numpy() / temperature
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


def assert_drawn_from(counts: Counter[int], probabilities: np.ndarray) -> None:
    """Chi-square over the tokens that are expected five times or more, and the others as one."""
    draws = sum(counts.values())
    often = np.flatnonzero(probabilities * draws >= 5)
    assert len(often) > 2
    observed = np.array([counts[int(token)] for token in often])
    expected = probabilities[often] * draws
    rest = draws - expected.sum()
    if rest > 1e-6 * draws:
        observed, expected = np.append(observed, draws - observed.sum()), np.append(expected, rest)
    assert stats.chisquare(observed, expected * (observed.sum() / expected.sum())).pvalue > 0.01


def _splitmix_uniforms(seed: int, count: int) -> torch.Tensor:
    states = torch.arange(1, count + 1) * local_chat._GOLDEN + seed
    return local_chat._shift(local_chat._mix(states), 12).double() * 2.0**-52
