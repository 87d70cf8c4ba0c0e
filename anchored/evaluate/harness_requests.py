"""A model to lm-eval, which asks this package's chats: for texts by messages, for likelihoods by contexts and endings.

lm-eval builds prompts, stops texts, filters, grades and aggregates; here its requests become this package's, so that
replies are stored, a killed evaluation goes on, and one model answers every benchmark.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from anchored.errors import EvaluationError, ReplyError
from anchored.llm.chat import Reply, Request
from anchored.records import Message

Asked = Sequence[Reply | ReplyError]
Document = tuple[str, int]
"""A task's name and the number of a question in it."""

_OF_DRAWING = {"temperature", "top_p", "top_k", "min_p"}


class Conversation(str):
    """Messages as JSON, where lm-eval carries a rendered prompt about."""

    __slots__ = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        return json.loads(self)


def as_conversation(history: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> Conversation:
    """In place of a chat template: the messages as they are; whether an answer has begun shows in the last one."""
    return Conversation(json.dumps(list(history), ensure_ascii=False))


@dataclass(frozen=True, slots=True)
class Generation:
    """How a task wants a text."""

    messages: tuple[Message, ...]
    until: tuple[str, ...]
    max_tokens: int
    temperature: float
    top_p: float

    def request(self, index: int, seed: int) -> Request:
        draw = (self.temperature, self.top_p, self.max_tokens, index, seed)
        return Request(self.messages, *draw, stop=self.until)


def generation(instance: Instance, max_tokens: int) -> Generation:
    """What a request for a text wants; `max_tokens` where the task does not say.

    Raises EvaluationError where a chat cannot give it.
    """
    context, given = _arguments(instance)
    wanted: dict[str, Any] = dict(normalize_gen_kwargs(given, max_tokens))
    until, most = handle_stop_sequences(wanted.pop("until"), eos=None), wanted.pop("max_gen_toks")
    drawn = wanted.pop("do_sample")
    heeded = {"temperature", "top_p"} if drawn else _OF_DRAWING
    for name, value in wanted.items():
        if name not in heeded and (name, value) != ("num_beams", 1):
            raise EvaluationError(f"{instance.task_name} generates with {name}: {value!r}, which is not to be had here")
    temperature = float(wanted.get("temperature", 0.0)) if drawn else 0.0
    top_p = float(wanted.get("top_p", 1.0)) if drawn else 1.0
    messages = _messages(context, instance)
    if messages[-1].role == "assistant":
        raise EvaluationError(
            f"{instance.task_name} begins the answer itself (gen_prefix), which a chat does not go on with; "
            "take a variant of the task without"
        )
    return Generation(messages, tuple(filter(None, until)), most, temperature, top_p)


def _arguments(instance: Instance) -> tuple[Any, Any]:
    given: tuple[Any, ...] = instance.args
    return given[0], given[1]


def _messages(context: object, instance: Instance) -> tuple[Message, ...]:
    if not isinstance(context, Conversation):
        raise EvaluationError(
            f"{instance.task_name} writes its prompts past the chat template; only tasks that take one can be asked"
        )
    return tuple(Message(turn["role"], turn["content"]) for turn in context.messages)  # type: ignore[arg-type]


def pair(instance: Instance) -> tuple[str, str]:
    """The context and the ending whose likelihood after it is wanted; no context means none at all."""
    context, ending = _arguments(instance)
    if context:
        _messages(context, instance)
    return context, ending


def likelihood_request(pairs: Sequence[tuple[str, str]]) -> Request:
    """How likely endings are after contexts, which are conversations or empty, as a request to `Likelihoods`."""
    grouped = [[context, [end for _, end in same]] for context, same in groupby(pairs, key=lambda pair: pair[0])]
    return Request((Message("user", json.dumps(grouped, ensure_ascii=False)),), temperature=0.0, max_tokens=1)


class AskingModel(LM):
    """What lm-eval evaluates. `ask` and `score` block until all requests have their replies."""

    def __init__(
        self,
        ask: Callable[[Sequence[Request]], Asked],
        score: Callable[[Sequence[Request]], Asked],
        *,
        max_tokens: int,
        seed: int,
        takes_system: bool = True,
    ) -> None:
        super().__init__()
        self._ask, self._score = ask, score
        self._max_tokens, self._seed, self._takes_system = max_tokens, seed, takes_system
        self.failures: dict[Document, str] = {}
        """Why there is no answer to some questions; lm-eval sees an empty one."""
        self.cut: dict[Document, str] = {}
        """Questions with an answer that ended neither by itself nor at a stop, and how."""

    apply_chat_template = staticmethod(as_conversation)  # type: ignore[assignment]

    @property
    def tokenizer_name(self) -> str:
        return ""

    def generate_until(self, requests: list[Instance]) -> list[str]:
        wanted = [generation(instance, self._max_tokens) for instance in requests]
        times: Counter[int] = Counter()
        asked = []
        for instance, one in zip(requests, wanted, strict=True):
            # the likeliest answer is the same each time
            index = times[id(instance)] if one.temperature else 0
            times[id(instance)] += 1
            asked.append(self._without_system(one).request(index, self._seed))
        replies = self._ask(asked)
        return [self._text(*each) for each in zip(requests, wanted, replies, strict=True)]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        places: dict[Document, list[int]] = {}
        for place, instance in enumerate(requests):
            places.setdefault(document(instance), []).append(place)
        replies = self._score(
            [likelihood_request([pair(requests[place]) for place in found]) for found in places.values()]
        )
        values = [(0.0, False)] * len(requests)
        for (name, found), reply in zip(places.items(), replies, strict=True):
            if isinstance(reply, ReplyError):
                self.failures[name] = str(reply)
                continue
            for place, (likelihood, greedy) in zip(found, json.loads(reply.text), strict=True):
                values[place] = float(likelihood), bool(greedy)
        return values

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise EvaluationError(f"{requests[0].task_name} measures perplexity, of which nothing here makes a score")

    def _without_system(self, wanted: Generation) -> Generation:
        if self._takes_system or wanted.messages[0].role != "system":
            return wanted
        return replace(wanted, messages=wanted.messages[1:])

    def _text(self, instance: Instance, wanted: Generation, reply: Reply | ReplyError) -> str:
        if isinstance(reply, ReplyError):
            self.failures[document(instance)] = str(reply)
            return ""
        text = postprocess_generated_text(reply.text, list(wanted.until), None)
        if reply.finish_reason != "stop" and text == reply.text:
            self.cut[document(instance)] = reply.finish_reason
        return text


def document(instance: Instance) -> Document:
    assert instance.task_name is not None
    assert instance.doc_id is not None
    return instance.task_name, instance.doc_id
