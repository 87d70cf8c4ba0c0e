"""Rendering: prompts and answers to token ids through the model's chat template; scored is what generation produces.

In: conversations and the model's tokenizer. Out: the prompt's ids and each answer's. No model runs here.

1. The prompt is the template's generation prompt (`add_generation_prompt=True`). The template writes all special
   tokens, a BOS among them; the tokenizer adds none.
2. The answer is what the template appends for it, up to its end-of-turn token: the first added token after the
   answer's text. What follows (a newline, an end of document) is not scored. A template that writes no such token gets
   the tokenizer's EOS. Where the template trims the answer's text, so is the scored answer.
3. The answer's ids are those that follow the prompt's ids in the whole conversation. Where the tokenizer would merge
   across that border, the answer is tokenized by itself: generation starts from the prompt's ids too.
4. Templates are rendered with `enable_thinking=False`, as `llm.local_chat` does: the answers of pairs come without
   thoughts, and a template that opens them with an empty thinking block puts it into the prompt. Answers that bring
   their own thinking text, as the template writes it, are scored with it.
5. A prompt that is too long keeps its end, an answer its start; an answer's limit counts its end-of-turn token, which a
   shortened answer lacks.

A pair that the template refuses, or whose answers' text it does not keep, becomes a ModelError that names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from anchored.errors import ModelError
from anchored.records import Answer, Message, Prompt
from anchored.runs import one_line

_THINKING_OPTIONS: tuple[dict[str, Any], ...] = ({"enable_thinking": False}, {})


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt and answers to it, each of which ends the conversation: a pair's two, or a single one."""

    prompt: Prompt
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as token ids; an answer ends with its end-of-turn token unless it was cut."""

    id: str
    """The prompt's."""
    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    cut_prompt: bool = False
    """Whether the prompt lost its start."""
    cut_answers: int = 0
    """How many answers lost their end."""


@dataclass(frozen=True, slots=True)
class _Texts:
    """Rendered text of a prompt, and of each answer up to its end-of-turn token."""

    prompt: str
    answers: tuple[str, ...]


class Renderer:
    """Renders for one tokenizer; its chat template must be set."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int = 512, max_answer_tokens: int = 512
    ) -> None:
        self._tokenizer = tokenizer
        self._max_prompt_tokens = max_prompt_tokens
        self._max_answer_tokens = max_answer_tokens
        if not tokenizer.chat_template:
            raise ModelError(
                f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template; use an instruction-tuned model, "
                "or put a chat_template.jinja into its folder"
            )
        added = sorted(map(str, tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        # some tokenizers add runs of spaces: these end no turn
        ends = [re.escape(token) for token in added if token.strip()]
        self._ends = re.compile("|".join(ends)) if ends else None

    def one(self, conversation: Conversation) -> Rendered:
        """A single one, or its ModelError raised; `render` is faster for many."""
        rendered = self.render([conversation])[0]
        if isinstance(rendered, ModelError):
            raise rendered
        return rendered

    def render(self, conversations: Iterable[Conversation]) -> list[Rendered | ModelError]:
        """All of them, in order, tokenized together; what cannot be rendered is an error in its place."""
        conversations = list(conversations)
        texts = [self._texts_or_error(conversation) for conversation in conversations]
        sound = [found for found in texts if isinstance(found, _Texts)]
        prompts = iter(self._tokenize([found.prompt for found in sound]))
        wholes = iter(self._tokenize([found.prompt + answer for found in sound for answer in found.answers]))
        rendered: list[Rendered | ModelError] = []
        for conversation, found in zip(conversations, texts, strict=True):
            if isinstance(found, ModelError):
                rendered.append(found)
                continue
            prompt = next(prompts)
            answers = [self._answer_ids(prompt, next(wholes), answer) for answer in found.answers]
            rendered.append(self._cut(conversation.prompt.id, prompt, answers))
        return rendered

    def _cut(self, name: str, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> Rendered:
        return Rendered(
            id=name,
            prompt=tuple(prompt[-self._max_prompt_tokens :]),
            answers=tuple(tuple(answer[: self._max_answer_tokens]) for answer in answers),
            cut_prompt=len(prompt) > self._max_prompt_tokens,
            cut_answers=sum(len(answer) > self._max_answer_tokens for answer in answers),
        )

    def _texts_or_error(self, conversation: Conversation) -> _Texts | ModelError:
        try:
            return self._texts(conversation.prompt, conversation.answers)
        except ModelError as error:
            return error

    def _texts(self, prompt: Prompt, answers: Sequence[Answer]) -> _Texts:
        for options in _THINKING_OPTIONS:
            before = self._apply(prompt, prompt.messages, options, add_generation_prompt=True)
            texts = [self._answer_text(prompt, answer, before, options) for answer in answers]
            found = tuple(text for text in texts if text is not None)
            if len(found) == len(texts):
                return _Texts(before, found)
        raise ModelError(
            f"pair {prompt.id!r}: the chat template does not put the answers' text after its generation prompt; "
            "give the model a template that does"
        )

    def _answer_text(self, prompt: Prompt, answer: Answer, before: str, options: dict[str, Any]) -> str | None:
        """What the template appends to the prompt for this answer, with its end of turn; None if it is not there."""
        turn = Message("assistant", answer.text)
        whole = self._apply(prompt, (*prompt.messages, turn), options, add_generation_prompt=False)
        appended = whole.removeprefix(before)
        text = answer.text.strip()
        start = appended.find(text)
        if not whole.startswith(before) or start < 0 or appended[:start].strip():
            return None
        end = self._ends.search(appended, start + len(text)) if self._ends else None
        if end:
            return appended[: end.end()]
        if self._tokenizer.eos_token is None:
            raise ModelError(
                "the chat template writes no end-of-turn token and the tokenizer has no EOS token; set one"
            )
        return appended[: start + len(text)] + str(self._tokenizer.eos_token)

    def _apply(
        self, prompt: Prompt, messages: Sequence[Message], options: dict[str, Any], *, add_generation_prompt: bool
    ) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt, **options
            )
        except Exception as error:  # whatever a template's author raises, or jinja
            raise ModelError(
                f"pair {prompt.id!r}: the chat template refuses the conversation: {one_line(error)}; "
                "use a model whose template takes it"
            ) from None
        return _encodable(prompt, str(text))

    def _answer_ids(self, prompt_ids: list[int], whole_ids: list[int], answer: str) -> list[int]:
        if whole_ids[: len(prompt_ids)] == prompt_ids:
            return whole_ids[len(prompt_ids) :]
        return self._alone(answer)

    def _alone(self, text: str) -> list[int]:
        """As in the midst of a text: SentencePiece's tokenizers put a space before what begins one."""
        eos = self._tokenizer.eos_token
        if eos is not None:
            first, *ids = self._tokenize([f"{eos}{text}"])[0]
            if first == self._tokenizer.eos_token_id:
                return ids
        return self._tokenize([text])[0]

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return encoded["input_ids"]  # type: ignore[return-value]


def _encodable(prompt: Prompt, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = text[max(0, error.start - 20) : error.end + 20]
        raise ModelError(f"pair {prompt.id!r}: half a surrogate pair in {where!r}; mend or remove it") from None
    return text
