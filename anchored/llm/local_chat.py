"""A model in this process that answers: concurrent `reply` calls are generated together, in batches.

In: requests. Out: replies, each as soon as it is complete. One worker thread holds the model, loads it at the first
request, and generates with transformers' `generate`, on CUDA or the CPU. Prompts of about the same length share a
batch. Between strides of STRIDE tokens complete answers are handed out and, on the CPU, leave the batch.

What an answer depends on
-------------------------
A sample is the argmax of logits / temperature + Gumbel noise, the noise a hash of the request (without `max_tokens`),
the position and the token. So it is a draw from the model's softmax, made from (messages, temperature, top_p, index,
seed, weights) and nothing else: not the batch, its size, its order or a global seed. A longer `max_tokens` continues
the same answer.

Logits alone could tell a row who its neighbours are: floating-point sums depend on the shape of the whole batch. So a
row's padded length depends on its own prompt alone, and rows come in multiples of ROWS on the CPU, always `batch_size`
of them on CUDA. Measured with torch 2.13 on an AVX2 CPU, logits are then equal bit by bit whatever the other rows, for
every number of rows: in float32 with one thread, with several threads if MKL_CBWR=AUTO is set in the environment, and
in bfloat16. Elsewhere (float32 on several threads without it, another machine, another `batch_size` on CUDA) logits
differ in their last bits, which changes a token only where two scores tie to within that: about one token in a million
in float32, more in 16 bit.

A stop string is looked for between strides, and what was generated past it is thrown away: the answer is that of the
same request without one, cut.

Of the model's generation config its EOS and padding tokens and `suppress_tokens` count; its temperature, top_p,
penalties and the like do not: the request decides, and a policy is sampled from its own distribution.
"""

from __future__ import annotations

import asyncio
import threading
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, LogitsProcessor, StoppingCriteria

from anchored.errors import ModelError, ReplyError
from anchored.llm.chat import Reply, Request, Usage
from anchored.llm.model_folder import (
    base_folder,
    end_of_turn_ids,
    fingerprint,
    load_model,
    load_tokenizer,
    model_folder,
)
from anchored.llm.responses import Content, split_thinking
from anchored.llm.stops import cut_at_stop, first_stop
from anchored.records import content_hash
from anchored.runs import one_line

STRIDE = 16
"""Tokens between two looks at which answers are complete."""
ROWS = 8
"""Rows on the CPU come in multiples of this: fewer than 4 take another kernel, with other last bits."""

_QUIET_SECONDS = 0.01  # without a new request this long, the batch is formed
_GATHER_SECONDS = 0.2  # and at the latest after this


class LocalChat:
    """Chat over a Hugging Face folder or Hub id; dtype `auto` is float32 on the CPU, else as stored."""

    def __init__(
        self, folder: str | Path, *, batch_size: int, device: str = "auto", dtype: str = "auto", name: str | None = None
    ) -> None:
        self._folder = model_folder(folder)
        self._device = _device(device)
        self._dtype = _dtype(dtype, self._device, self._folder)
        self._batch_size = batch_size
        self.name = name or (Path(folder).resolve().name if Path(folder).is_dir() else str(folder))
        self.fingerprint = f"{fingerprint(self._folder)}-{str(self._dtype).removeprefix('torch.')}"
        self._calls: list[_Call] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._closing = threading.Event()

    async def reply(self, request: Request) -> Reply:
        """The model's answer; a prompt that cannot be rendered or is too long is a ReplyError."""
        call = _Call(request, Future())
        with self._changed:
            if self._failure or self._closing.is_set():
                raise self._failure or ModelError(f"{self.name}: asked after it was closed")
            self._calls.append(call)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=f"generate {self.name}", daemon=True)
                self._thread.start()
        return await asyncio.wrap_future(call.future)

    async def close(self) -> None:
        """End the worker, after the token it is at, and free the model."""
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
        if self._thread:
            await asyncio.to_thread(self._thread.join)

    def _work(self) -> None:
        """The worker thread: load, then batch after batch, the fullest length first."""
        waiting: dict[int, list[_Row]] = defaultdict(list)
        try:
            model = _Model(self._folder, self.name, self._device, self._dtype, self._batch_size)
            while not self._closing.is_set():
                for call in self._gather(waiting):
                    if row := model.row(call):
                        waiting[row.width].append(row)
                width = max(waiting, key=lambda width: len(waiting[width]), default=0)
                batch, waiting[width] = waiting[width][: self._batch_size], waiting[width][self._batch_size :]
                if batch:
                    model.answer(batch, self._closing)
            raise ModelError(f"{self.name}: closed before it had answered")
        except BaseException as error:  # whatever ends the worker must reach those who wait for it
            calls = [row.call for rows in waiting.values() for row in rows]
            self._fail(error, calls)

    def _gather(self, waiting: dict[int, list[_Row]]) -> list[_Call]:
        """The calls that have come: at once if a batch is full, else when they stop coming."""
        full = any(len(rows) >= self._batch_size for rows in waiting.values())
        with self._changed:
            if not any(waiting.values()):
                self._changed.wait_for(lambda: self._calls or self._closing.is_set())
            latest = time.monotonic() + _GATHER_SECONDS
            while not full and not self._closing.is_set() and time.monotonic() < latest:
                if not self._changed.wait(_QUIET_SECONDS):
                    break
            calls, self._calls = self._calls, []
            return calls

    def _fail(self, error: BaseException, calls: list[_Call]) -> None:
        with self._changed:
            self._failure = error
            calls, self._calls = [*calls, *self._calls], []
        for call in calls:
            call.fail(error)


@dataclass(frozen=True, eq=False)
class _Call:
    """One `reply` in progress."""

    request: Request
    future: Future[Reply]

    def finish(self, reply: Reply) -> None:
        with suppress(InvalidStateError):  # the caller gave up meanwhile
            self.future.set_result(reply)

    def fail(self, error: BaseException) -> None:
        with suppress(InvalidStateError):
            self.future.set_exception(error)


@dataclass(frozen=True, eq=False)
class _Row:
    """A call as the model takes it."""

    call: _Call
    ids: list[int]
    width: int
    """Of the padded prompt."""
    key: int
    """Of its noise, 64 bits with sign."""
    ends: frozenset[int]
    """Tokens that end its answer."""
    thinks: bool
    """The template has begun a thought: there is no answer before that is closed."""


class _Model:
    """The loaded model, its tokenizer, and generation of one batch. Lives in the worker thread."""

    def __init__(self, folder: Path, name: str, device: torch.device, dtype: torch.dtype, batch_size: int) -> None:
        self._name = name
        self._device = device
        self._batch_size = batch_size
        self._tokenizer = load_tokenizer(folder)
        self._model: Any = load_model(folder, dtype=dtype, device=device).requires_grad_(False)
        self._ends = end_of_turn_ids(self._model, self._tokenizer)
        added = self._tokenizer.added_tokens_decoder
        self._special = {token.content: number for number, token in added.items() if token.special}
        suppressed = self._model.generation_config.suppress_tokens if self._model.generation_config else None
        # generate() takes what a call leaves open from the model's own config, so that one must say nothing
        self._model.generation_config = GenerationConfig()
        self._settings = GenerationConfig(
            max_new_tokens=STRIDE,
            do_sample=False,
            eos_token_id=list(self._ends),
            pad_token_id=self._ends[0],
            suppress_tokens=suppressed,
            return_dict_in_generate=True,
            use_cache=True,
        )

    def row(self, call: _Call) -> _Row | None:
        """The call's prompt as tokens; None, and the caller told, if it cannot be asked."""
        try:
            ids = self._prompt_ids(call.request)
        except ReplyError as error:
            call.fail(error)
            return None
        # these are in no decoded text
        stops = [self._special[stop] for stop in call.request.stop if stop in self._special]
        ends = frozenset([*self._ends, *stops])
        thinks = bool(call.request.stop) and str(self._tokenizer.decode(ids[-8:])).rstrip().endswith("<think>")
        return _Row(call, ids, padded_width(len(ids)), noise_key(call.request), ends, thinks)

    def answer(self, rows: Sequence[_Row], closing: threading.Event) -> None:
        """Generate these rows, of one width, and hand out each reply as it ends."""
        try:
            with torch.inference_mode():
                self._generate(rows, closing)
        except BaseException as error:
            problem = self._shortage(rows) if _out_of_memory(error) else None
            for row in rows:
                row.call.fail(problem or error)
            if problem:
                raise problem from error
            raise

    def _shortage(self, rows: Sequence[_Row]) -> ModelError:
        return ModelError(
            f"{self._name}: out of memory with {len(rows)} answers side by side to prompts of {rows[0].width} tokens; "
            f"lower sample.batch_size (now {self._batch_size}): what is answered is kept"
        )

    def _generate(self, rows: Sequence[_Row], closing: threading.Event) -> None:
        started = time.monotonic()
        width = rows[0].width
        # what pads the batch is a copy of its last row
        batch = [*rows, *[rows[-1]] * (self._row_count(len(rows)) - len(rows))]
        live = torch.tensor([index < len(rows) for index in range(len(batch))])
        padding = torch.tensor([width - len(row.ids) for row in batch], device=self._device)
        tokens = torch.tensor(
            [[self._ends[0]] * (width - len(row.ids)) + row.ids for row in batch], device=self._device
        )
        cache = None
        while live.any() and not closing.is_set():
            columns = torch.arange(tokens.shape[1], device=self._device)
            output = self._model.generate(
                input_ids=tokens,
                attention_mask=(columns >= padding[:, None]).long(),
                past_key_values=cache,
                generation_config=self._settings,
                logits_processor=[_Draw([row.key for row in batch], [row.call.request for row in batch], width)],
                stopping_criteria=[_Over(batch, live.to(self._device), closing)],
            )
            if closing.is_set():
                break
            tokens, cache = output.sequences, output.past_key_values
            for index, answer in enumerate(tokens[:, width:].tolist()):
                if live[index] and self._hand_out(batch[index], answer, started):
                    live[index] = False
            kept = self._kept(live)
            if len(kept) < len(batch) and live.any():
                chosen = kept.to(self._device)
                cache.batch_select_indices(chosen)
                tokens, padding, live = tokens[chosen], padding[chosen], live[kept]
                batch = [batch[index] for index in kept.tolist()]
        for index in live.nonzero().flatten().tolist():
            batch[index].call.fail(ModelError(f"{self._name}: closed before it had answered"))

    def _hand_out(self, row: _Row, answer: list[int], started: float) -> bool:
        """Whether the row is over: its answer complete and sent, or its caller gone."""
        if row.call.future.cancelled():
            return True
        request = row.call.request
        answer = answer[: request.max_tokens]
        end = next((place for place, token in enumerate(answer) if token in row.ends), None)
        spent = answer if end is None else answer[: end + 1]
        if stop := self._tokens_to_stop(row, answer[:end]):
            spent, end = answer[:stop], stop
        if end is None and len(answer) < request.max_tokens:
            return False
        text = self._text(answer[:end])
        content = split_thinking(text)
        reply = Reply(
            text=content.answer,
            finish_reason="length" if end is None else "stop",
            model=self._name,
            reasoning=content.thinking,
            usage=Usage(len(row.ids), len(spent)),
            seconds=time.monotonic() - started,
            raw={"text": text, "token_ids": spent},
        )
        row.call.finish(cut_at_stop(reply, request.stop))
        return True

    def _tokens_to_stop(self, row: _Row, answer: list[int]) -> int:
        """How many tokens of an answer it takes to hold a stop string; 0 if there is none in it."""
        stops = row.call.request.stop

        def holds_stop(count: int) -> bool:
            content = self._content(row, answer[:count])
            return first_stop(content.answer, stops) is not None

        if not stops or not holds_stop(len(answer)):
            return 0
        return bisect_left(range(len(answer)), True, key=holds_stop)

    def _content(self, row: _Row, answer: list[int]) -> Content:
        text = self._text(answer)
        return split_thinking(f"<think>{text}" if row.thinks else text)

    def _text(self, answer: list[int]) -> str:
        return str(self._tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _row_count(self, rows: int) -> int:
        least = rows if self._device.type == "cpu" else self._batch_size
        return -(-least // ROWS) * ROWS

    def _kept(self, live: Bool[Tensor, " rows"]) -> Int[Tensor, " kept"]:
        """The rows to go on with, in order: those alive, and as many others as the shape asks for."""
        count = min(self._row_count(int(live.sum())), len(live))
        return live.int().sort(descending=True, stable=True).indices[:count].sort().values

    def _prompt_ids(self, request: Request) -> list[int]:
        turns = [{"role": message.role, "content": message.content} for message in request.messages]
        try:
            # answers are trained on without thoughts, so they are sampled without; other templates ignore the switch
            rendered: Any = self._tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_dict=False, enable_thinking=False
            )
        except Exception as error:  # whatever a template's author raises, jinja, or text that is no Unicode
            raise ReplyError(f"{self._name}: the chat template refuses the prompt: {one_line(error)}") from error
        ids = list(rendered)
        config = self._model.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None)
        if context and len(ids) + request.max_tokens > context:
            raise ReplyError(
                f"{self._name}: a prompt of {len(ids)} tokens and max_tokens {request.max_tokens} do not fit its "
                f"context of {context}; lower max_tokens or leave the prompt out"
            )
        if max(ids) >= config.vocab_size:
            raise ReplyError(
                f"{self._name}: the tokenizer gives token {max(ids)}, the model knows {config.vocab_size}; use its own"
            )
        return ids


class _Draw(LogitsProcessor):
    """Makes of logits scores whose argmax is each row's draw; a row at temperature 0 keeps its logits."""

    def __init__(self, keys: Sequence[int], requests: Sequence[Request], width: int) -> None:
        self._keys = torch.tensor(keys)[:, None]
        self._temperatures = torch.tensor([[request.temperature or 1.0] for request in requests])
        self._top_ps = torch.tensor([[request.top_p] for request in requests], dtype=torch.float64)
        self._drawn = torch.tensor([[request.temperature > 0] for request in requests])
        self._some_drawn = bool(self._drawn.any())
        self._some_cut = self._some_drawn and any(request.top_p < 1 for request in requests)
        self._width = width

    def __call__(self, input_ids: Tensor, scores: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        if not self._some_drawn:
            return scores
        if self._keys.device != scores.device:
            self._keys, self._drawn = self._keys.to(scores.device), self._drawn.to(scores.device)
            self._temperatures, self._top_ps = self._temperatures.to(scores.device), self._top_ps.to(scores.device)
        scores = scores / self._temperatures
        if self._some_cut:
            scores = keep_top_p(scores, self._top_ps)
        noise = gumbel(self._keys, input_ids.shape[1] - self._width, scores.shape[1])
        return scores + noise.mul_(self._drawn)


class _Over(StoppingCriteria):
    """Which rows need no more tokens: their own limit is reached, or nobody waits for them."""

    def __init__(self, rows: Sequence[_Row], live: Bool[Tensor, " rows"], closing: threading.Event) -> None:
        self._done = ~live
        self._lengths = torch.tensor([row.width + row.call.request.max_tokens for row in rows], device=live.device)
        self._closing = closing

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        if self._closing.is_set():
            return torch.ones_like(self._done)
        return self._done | (self._lengths <= input_ids.shape[1])


def padded_width(length: int) -> int:
    """The columns of a prompt of `length` tokens: a multiple of 16, of 32 above 128, of 64 above 256, and so on."""
    step = max(16, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


def noise_key(request: Request) -> int:
    """64 bits that tell this sample's noise from every other's."""
    turns = [[message.role, message.content] for message in request.messages]
    digest = content_hash([turns, request.temperature, request.top_p, request.index, request.seed])
    return int(digest[:16], 16) - (1 << 63)


def gumbel(keys: Int[Tensor, "rows 1"], position: int, vocab: int) -> Float[Tensor, "rows vocab"]:
    """Standard Gumbel noise, a function of (key, position, token) alone: splitmix64, its counter the token."""
    counted = torch.arange(1, vocab + position + 2, device=keys.device) * _GOLDEN
    bits = _mix(_mix(keys + counted[position]) + counted[:vocab])
    uniform = _shift(bits, 12).double().add_(0.5).mul_(2.0**-52)  # in (0, 1), exactly
    return uniform.log_().neg_().log_().neg_()


def keep_top_p(scores: Float[Tensor, "rows vocab"], top_p: Float[Tensor, "rows 1"]) -> Float[Tensor, "rows vocab"]:
    """Minus infinity for all but the likeliest tokens that together hold `top_p`; of equal ones the lower id first."""
    ordered = scores.double().softmax(-1).sort(descending=True, stable=True)
    before = ordered.values.cumsum(-1) - ordered.values
    cut = torch.empty_like(before, dtype=torch.bool).scatter_(-1, ordered.indices, before >= top_p)
    return scores.masked_fill(cut, -torch.inf)


# Steele, Lea and Flood (2014): Fast splittable pseudorandom number generators; as signed 64-bit integers, which wrap
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def _mix(bits: Int[Tensor, "rows any"]) -> Int[Tensor, "rows any"]:
    bits = (bits ^ _shift(bits, 30)) * _MULTIPLIERS[0]
    bits = (bits ^ _shift(bits, 27)) * _MULTIPLIERS[1]
    return bits ^ _shift(bits, 31)


def _shift(bits: Int[Tensor, "rows any"], places: int) -> Int[Tensor, "rows any"]:
    """Logical shift to the right; torch's own keeps the sign."""
    return (bits >> places).bitwise_and_((1 << (64 - places)) - 1)


def _out_of_memory(error: BaseException) -> bool:
    """On the CPU torch raises a plain RuntimeError."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device {device!r}: torch sees no CUDA device here; use 'cpu' or 'auto'")
    return torch.device(device)


def _dtype(dtype: str, device: torch.device, folder: Path) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cpu":
        return torch.float32
    try:
        stored: Any = AutoConfig.from_pretrained(base_folder(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{folder}: config.json cannot be read: {one_line(error)}") from error
    return stored.dtype or torch.float32
