"""Pretrains the pocket policy from nothing: `python -m anchored.pocket.build --out DIR [--seed N]`.

In: a seed. Out: a Hugging Face folder, the same for the same seed and versions, in about 10 minutes on one core. The
package ships one as `policy/`. Alignment is not done here: that is what the policy is for.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from anchored.pocket.mistakes import student_answer
from anchored.pocket.tasks import Task, is_right, make_tasks, task_stream

_BOS, _END, _PAD = "<|begin|>", "<|end|>", "<|pad|>"
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
_SPECIAL = [_BOS, _END, _PAD, *_ROLES]  # the tokenizer numbers them first, in this order
_TOKEN_IDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}

_CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception('The roles are system, user and assistant; got ' ~ message['role']) -}}
    {%- endif -%}
    {{- '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""

_EXAMPLES = 72_000
_BATCH = 32
_LEARNING_RATE = 3e-3
_WARMUP_STEPS = 100


def build(out: Path, seed: int = 0, examples: int = _EXAMPLES) -> None:
    """Pretrains on a student's answers to `examples` tasks and saves model and tokenizer."""
    # The order in which threads add up changes the last bits, and with them the folder.
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    tokenizer = _train_tokenizer(seed)
    model = LlamaForCausalLM(_config(tokenizer))
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    _pretrain(model, tokenizer, examples, seed)
    _save(model, tokenizer, out)


def share_right(model: Any, tokenizer: Any, tasks: list[Task], *, temperature: float = 0.0) -> float:
    """The share of tasks whose result the model gets right, greedily or sampled."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": task.question}], add_generation_prompt=True, tokenize=False
        )
        for task in tasks
    ]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    with torch.no_grad():
        outputs = model.generate(**inputs, **sampling)
    answers = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(map(is_right, tasks, answers)) / len(tasks)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the pocket policy.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    build(options.out, options.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.out)
    model = LlamaForCausalLM.from_pretrained(options.out).eval()
    tasks = make_tasks(250, seed=0, split="held-out")
    for temperature in (0.0, 1.0):
        right = share_right(model, tokenizer, tasks, temperature=temperature)
        print(f"temperature {temperature}: {right:.1%} of {len(tasks)} held-out tasks right")


@dataclass(frozen=True, slots=True)
class _Example:
    """Token ids of a prompt with its answer, and where the answer begins."""

    ids: list[int]
    answer_start: int


def _train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        # Single digits, so that a number is computed with the way it is written.
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = Random(seed)
    tasks = islice(task_stream(seed, "pretraining"), 4000)
    tokenizer.train_from_iterator((f"{task.question}\n{student_answer(task, rng)}" for task in tasks), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_BOS,
        eos_token=_END,
        pad_token=_PAD,
        additional_special_tokens=list(_ROLES),
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def _config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        **_TOKEN_IDS,
    )


def _pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: int, seed: int) -> None:
    steps = examples // _BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = min(_WARMUP_STEPS, steps // 2)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    model.train()
    began, seen = time.monotonic(), 0
    for step, batch in enumerate(islice(_batches(tokenizer, seed), steps), start=1):
        loss = model(**_collate(batch)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seen += sum(len(example.ids) for example in batch)
        if step % 50 == 0:
            minutes = (time.monotonic() - began) / 60
            print(f"step {step} of {steps}  loss {loss.item():.3f}  {seen:,} tokens  {minutes:.1f} min", flush=True)


def _batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[list[_Example]]:
    """Batches without end, of examples alike in length, in random order."""
    rng = Random(seed)
    tasks = task_stream(seed, "pretraining")
    while True:
        chunk = _examples(tokenizer, list(islice(tasks, 32 * _BATCH)), rng)
        chunk.sort(key=lambda example: len(example.ids))
        batches = [chunk[start : start + _BATCH] for start in range(0, len(chunk), _BATCH)]
        rng.shuffle(batches)
        yield from batches


def _examples(tokenizer: PreTrainedTokenizerFast, tasks: list[Task], rng: Random) -> list[_Example]:
    prompts = [f"{_BOS}<|user|>{task.question}{_END}<|assistant|>" for task in tasks]
    answers = [f"{student_answer(task, rng)}{_END}" for task in tasks]
    prompt_ids: Any = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    answer_ids: Any = tokenizer(answers, add_special_tokens=False)["input_ids"]
    return [_Example(prompt + answer, len(prompt)) for prompt, answer in zip(prompt_ids, answer_ids, strict=True)]


def _collate(batch: list[_Example]) -> dict[str, torch.Tensor]:
    """Padded on the right, which causal attention never looks at; only answers are learned."""
    width = max(len(example.ids) for example in batch)
    ids = torch.full((len(batch), width), _TOKEN_IDS["pad_token_id"])
    labels = torch.full((len(batch), width), -100)
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        answer = example.ids[example.answer_start :]
        labels[row, example.answer_start : len(example.ids)] = torch.tensor(answer)
    return {"input_ids": ids, "labels": labels}


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=256, **_TOKEN_IDS)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
