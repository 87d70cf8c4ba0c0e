"""What travels between the stages: prompts, answers, pairs, outcomes and scores. Frozen data, no behaviour.

Nothing here reads or writes files (see `datasets_io`), and nothing here knows a model.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Role = Literal["system", "user", "assistant"]

START = "start"
"""The starting model's name among the checkpoints."""
STRONGER = "stronger"
"""The name, among the checkpoints, of a stronger model that answers beside them."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """Messages that end with a user turn."""

    messages: tuple[Message, ...]
    id: str
    """Stable name of the row: the data set's own id, else `prompt_id` of the messages."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One assistant turn, and who wrote it."""

    text: str
    model: str = ""


class Outcome(StrEnum):
    """Why a row was kept (`ok`) or refused. The values are what stands in files."""

    OK = "ok"
    # the reviser's reply
    NO_HEADER = "no_header"
    REPEATED_HEADER = "repeated_header"
    # any LLM's reply
    EMPTY = "empty"
    TRUNCATED = "truncated"
    REFUSAL = "refusal"
    ENDPOINT_ERROR = "endpoint_error"
    # the pair
    IDENTICAL = "identical"
    LENGTH_RATIO = "length_ratio"
    LEAK = "leak"
    CONTRAST = "contrast"
    TOO_LONG = "too_long"
    REPETITION = "repetition"
    CONTROL_CHARACTERS = "control_characters"
    HTML = "html"
    OWN_FILTER = "own_filter"
    SURPLUS = "surplus"
    # the prompt
    CONTAMINATED = "contaminated"
    MISSING_ANSWER = "missing_answer"
    DROPPED = "dropped"
    # the judge's verdict
    TIE = "tie"
    DISAGREEMENT = "disagreement"
    UNPARSABLE = "unparsable"
    IDENTICAL_SAMPLES = "identical_samples"
    ADDRESSES_JUDGE = "addresses_judge"
    CONTRADICTED_SCORE = "contradicted_score"
    # a row of a data set that cannot be a pair
    DOUBLED_TURN = "doubled_turn"
    NO_ASSISTANT_TURN = "no_assistant_turn"
    MALFORMED = "malformed"


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, with where they come from. A refused pair may lack answers (empty text)."""

    prompt: Prompt
    chosen: Answer
    rejected: Answer
    method: str = ""
    """How it was made: clair, judge-on-policy, judge-off-policy, stronger-preferred, or empty for foreign data."""
    rational: str = ""
    """The reviser's or judge's reasoning (the column's name in the paper's released data)."""
    outcome: Outcome = Outcome.OK
    detail: str = ""
    """What in the row led to the outcome, for people: the matched words, the ratio, the endpoint's message. Of a kept
    row: what was noticed all the same."""
    margin: float | None = None
    """How far the rewards of the two should be apart, where the data says so."""


@dataclass(frozen=True, slots=True)
class LabelledAnswer:
    """One answer to a prompt and whether it is a good one: unpaired data. A refused one may lack its answer."""

    prompt: Prompt
    answer: Answer
    desirable: bool
    outcome: Outcome = Outcome.OK
    detail: str = ""


TrainingRow = Pair | LabelledAnswer
"""What one can train on; a data set holds one kind."""


@dataclass(frozen=True, slots=True)
class Score:
    """One line of scores.jsonl: a checkpoint's score on a benchmark, as a whole or in one category."""

    checkpoint: str
    step: int
    benchmark: str
    version: str
    view: str
    category: str | None
    """None for the whole benchmark."""
    score: float
    """Percent, 0..100."""
    low: float
    high: float
    """95 % bootstrap interval of `score`."""
    n: int
    """Items scored."""
    judge: str


def prompt_id(messages: tuple[Message, ...]) -> str:
    """A content name for a prompt: the first 16 hex digits of the sha256 of its turns."""
    turns = [[message.role, message.content] for message in messages]
    return content_hash(turns)[:16]


def content_hash(value: object) -> str:
    """The sha256 (64 hex digits) of a JSON-able value, independent of key order and of Python's hash seed."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def user_prompt(text: str, *, id: str | None = None) -> Prompt:
    """A prompt of a single user turn."""
    messages = (Message("user", text),)
    return Prompt(messages, id or prompt_id(messages))


def as_text(prompt: Prompt) -> str:
    """A prompt as one text: a single user turn bare, several turns as blocks with their roles."""
    messages = prompt.messages
    if len(messages) == 1 and messages[0].role == "user":
        return messages[0].content
    return "\n\n".join(f"{message.role.capitalize()}: {message.content}" for message in messages)
