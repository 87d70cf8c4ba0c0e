"""Rendering: pairs to token ids through the model's chat template; what is scored is what generation produces.

In: pairs of text and the model's tokenizer. Out: the prompt's ids and each answer's. No model runs here.

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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from anchored.errors import ModelError
from anchored.records import Answer, Message, Pair
from anchored.runs import one_line

_THINKING_OPTIONS: tuple[dict[str, Any], ...] = ({"enable_thinking": False}, {})


@dataclass(frozen=True, slots=True)
class RenderedPair:
    """A pair as token ids; an answer ends with its end-of-turn token unless it was cut."""

    id: str
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Conversation:
    """Rendered text of a prompt, and of each answer up to its end-of-turn token."""

    prompt: str
    answers: tuple[str, str]


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

    def pair(self, pair: Pair) -> RenderedPair:
        """One pair, or its ModelError raised; `pairs` is faster for many."""
        rendered = self.pairs([pair])[0]
        if isinstance(rendered, ModelError):
            raise rendered
        return rendered

    def pairs(self, pairs: Sequence[Pair]) -> list[RenderedPair | ModelError]:
        """All pairs, in order, tokenized together; what cannot be rendered is an error in its place."""
        conversations = [self._conversation_or_error(pair) for pair in pairs]
        sound = [conversation for conversation in conversations if isinstance(conversation, _Conversation)]
        prompts = iter(self._tokenize([conversation.prompt for conversation in sound]))
        wholes = iter(self._tokenize([c.prompt + answer for c in sound for answer in c.answers]))
        rendered: list[RenderedPair | ModelError] = []
        for pair, conversation in zip(pairs, conversations, strict=True):
            if isinstance(conversation, ModelError):
                rendered.append(conversation)
                continue
            prompt_ids = next(prompts)
            chosen, rejected = (self._answer_ids(prompt_ids, next(wholes), answer) for answer in conversation.answers)
            rendered.append(
                RenderedPair(pair.prompt.id, tuple(prompt_ids[-self._max_prompt_tokens :]), chosen, rejected)
            )
        return rendered

    def _conversation_or_error(self, pair: Pair) -> _Conversation | ModelError:
        try:
            return self._conversation(pair)
        except ModelError as error:
            return error

    def _conversation(self, pair: Pair) -> _Conversation:
        for options in _THINKING_OPTIONS:
            prompt = self._apply(pair, pair.prompt.messages, options, add_generation_prompt=True)
            chosen, rejected = (
                self._answer_text(pair, answer, prompt, options) for answer in (pair.chosen, pair.rejected)
            )
            if chosen is not None and rejected is not None:
                return _Conversation(prompt, (chosen, rejected))
        raise ModelError(
            f"pair {pair.prompt.id!r}: the chat template does not put the answers' text after its generation prompt; "
            "give the model a template that does, or leave the pair out"
        )

    def _answer_text(self, pair: Pair, answer: Answer, prompt: str, options: dict[str, Any]) -> str | None:
        """What the template appends to the prompt for this answer, with its end of turn; None if it is not there."""
        turn = Message("assistant", answer.text)
        whole = self._apply(pair, (*pair.prompt.messages, turn), options, add_generation_prompt=False)
        appended = whole.removeprefix(prompt)
        text = answer.text.strip()
        start = appended.find(text)
        if not whole.startswith(prompt) or start < 0 or appended[:start].strip():
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
        self, pair: Pair, messages: Sequence[Message], options: dict[str, Any], *, add_generation_prompt: bool
    ) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt, **options
            )
        except Exception as error:  # whatever a template's author raises, or jinja
            raise ModelError(
                f"pair {pair.prompt.id!r}: the chat template refuses the conversation: {one_line(error)}; "
                "leave the pair out, or use a model whose template takes it"
            ) from None
        return _encodable(pair, str(text))

    def _answer_ids(self, prompt_ids: list[int], whole_ids: list[int], answer: str) -> tuple[int, ...]:
        if whole_ids[: len(prompt_ids)] == prompt_ids:
            ids = whole_ids[len(prompt_ids) :]
        else:
            ids = self._alone(answer)
        return tuple(ids[: self._max_answer_tokens])

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


def _encodable(pair: Pair, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = text[max(0, error.start - 20) : error.end + 20]
        raise ModelError(f"pair {pair.prompt.id!r}: half a surrogate pair in {where!r}; mend or remove it") from None
    return text
