"""Data as the model sees it: token ids laid out as trees, checked before training begins.

In: pairs, or single labelled answers, and the policy. Out: examples, and how many rows were left out and why. A row
with nothing to learn from, or that the chat template does not take, is left out by its outcome; one that the model
cannot read (too long, unknown tokens) is an error.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from anchored.batches.render import Conversation, Rendered, Renderer
from anchored.batches.tree import Tree, plant
from anchored.datasets_io.cells import short
from anchored.errors import DataError, ModelError, TrainError
from anchored.records import Outcome, Pair, TrainingRow
from anchored.train.policy import Policy
from anchored.train.settings import TrainSettings


@dataclass(frozen=True, slots=True)
class Example:
    """One pair, or one labelled answer, to train on or to measure with."""

    id: str
    """The prompt's."""
    tree: Tree
    """A pair's answers are the chosen and the rejected one; another prompt's answer may come last."""
    keys: tuple[bytes, ...]
    """Name prompt and answer by their token ids, for each answer of the tree."""
    labels: tuple[bool, ...]
    """Whether each of the example's own answers is desirable: (True, False) for a pair."""
    tokens: tuple[int, ...]
    """Scored tokens of each answer of the tree, end-of-turn token included."""
    margin: float = 0.0
    """How far the rewards of a pair should be apart, where the objective asks for the data's margins."""

    @property
    def paired(self) -> bool:
        """Whether this is a pair."""
        return len(self.labels) == 2


@dataclass(frozen=True, slots=True)
class Examples:
    """What `prepare` made of rows."""

    kept: tuple[Example, ...]
    left_out: Mapping[str, int]
    """How many rows are not among `kept`, by outcome."""
    problem: str = ""
    """Why the first row that could not be rendered was left out."""
    cut_prompts: int = 0
    """How many of the rows kept have a prompt that lost its start."""
    cut_answers: int = 0
    """How many of their answers lost their end."""


def prepare(rows: Sequence[TrainingRow], policy: Policy, settings: TrainSettings) -> Examples:
    """Render, check and plant every row."""
    renderer = Renderer(policy.tokenizer, settings.max_prompt_tokens, settings.max_answer_tokens)
    accepted = [row for row in rows if row.outcome is Outcome.OK]
    left_out = Counter(str(row.outcome) for row in rows if row.outcome is not Outcome.OK)
    kept: list[Example] = []
    problem = ""
    cut: Counter[str] = Counter()
    for row, rendered in zip(accepted, renderer.render(map(_conversation, accepted)), strict=True):
        if isinstance(rendered, ModelError):
            left_out[str(Outcome.MALFORMED)] += 1
            problem = problem or str(rendered)
        elif isinstance(row, Pair) and rendered.answers[0] == rendered.answers[1]:
            left_out[str(Outcome.IDENTICAL)] += 1
        elif not all(rendered.answers):
            left_out[str(Outcome.EMPTY)] += 1
            problem = problem or f"pair {rendered.id!r}: an answer has no tokens"
        else:
            _check_fits(row, rendered, policy)
            kept.append(_example(row, rendered, _margin(row, settings)))
            cut.update(prompts=rendered.cut_prompt, answers=rendered.cut_answers)
    return Examples(tuple(kept), left_out, problem, cut["prompts"], cut["answers"])


def with_mismatched(
    examples: Sequence[Example], donors: Sequence[Example], context: int | None, seed: int
) -> list[Example]:
    """Every example with an answer to another prompt as its tree's last: kto estimates its KL from them.

    The prompts of `donors` are put on a circle in an order drawn by `seed`; each prompt gets an answer of the next one
    (a prompt that is not on it: of one drawn for it), so none ever gets its own. With several answers, one is drawn.
    All of this depends on the prompts and answers alone, not on their order. An answer that would pass the model's
    `context` keeps its start.
    """
    answers: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for donor in donors:
        answers.setdefault(donor.tree.prompt, set()).update(donor.tree.answers[: len(donor.labels)])
    circle = sorted(answers)
    random.Random(seed).shuffle(circle)
    following = dict(zip(circle, [*circle[1:], *circle[:1]], strict=True))
    if len(circle) < 2 and any(example.tree.prompt in following for example in examples):
        raise DataError(
            "kto compares answers of different prompts, but all rows have the same prompt; add prompts, or use "
            "apo-zero-unpaired"
        )

    def other_answer(prompt: tuple[int, ...]) -> tuple[int, ...]:
        drawn = random.Random(f"{seed} {prompt}")
        other = following[prompt] if prompt in following else drawn.choice(circle)
        return drawn.choice(sorted(answers[other]))[: context - len(prompt) if context is not None else None]

    return [_with_answer(example, other_answer(example.tree.prompt)) for example in examples]


def _conversation(row: TrainingRow) -> Conversation:
    if isinstance(row, Pair):
        return Conversation(row.prompt, (row.chosen, row.rejected))
    return Conversation(row.prompt, (row.answer,))


def _margin(row: TrainingRow, settings: TrainSettings) -> float:
    """The pair's own margin, if the objective asks for the data's."""
    if settings.objective.margin != "column" or not isinstance(row, Pair):
        return 0.0
    if row.margin is None:
        raise DataError(
            f"{_named(row)} has no number in the column margin, "
            "which train.objective.margin asks for; add it, or give one margin for all pairs"
        )
    return row.margin


def _named(row: TrainingRow) -> str:
    """By id and by the prompt: an id made of the content is not found in the data."""
    return f"pair {row.prompt.id!r} ({short(row.prompt.messages[-1].content)})"


def _example(row: TrainingRow, rendered: Rendered, margin: float) -> Example:
    return Example(
        id=rendered.id,
        tree=plant(rendered.prompt, rendered.answers),
        keys=tuple(_key(rendered.prompt, answer) for answer in rendered.answers),
        labels=(True, False) if isinstance(row, Pair) else (row.desirable,),
        tokens=tuple(map(len, rendered.answers)),
        margin=margin,
    )


def _with_answer(example: Example, answer: tuple[int, ...]) -> Example:
    prompt = example.tree.prompt
    return replace(
        example,
        tree=plant(prompt, (*example.tree.answers, answer)),
        keys=(*example.keys, _key(prompt, answer)),
        tokens=(*example.tokens, len(answer)),
    )


def _key(prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> bytes:
    # the prompt's length comes first, so that no two splits of one text share a key
    ids = array("q", (len(prompt_ids), *prompt_ids, *answer_ids))
    return hashlib.sha256(ids.tobytes()).digest()


def _check_fits(row: TrainingRow, rendered: Rendered, policy: Policy) -> None:
    prompt, answer = len(rendered.prompt), max(map(len, rendered.answers))
    if policy.context is not None and prompt + answer > policy.context:
        raise TrainError(
            f"{_named(row)} has {prompt} prompt and {answer} answer tokens, but the model's context is "
            f"{policy.context}; lower train.max_prompt_tokens or train.max_answer_tokens so that they add up to "
            f"{policy.context} at most"
        )
    embeddings: Any = policy.model.get_input_embeddings()
    known = embeddings.weight.shape[0]
    highest = max(_flat(rendered))
    if highest >= known:
        raise ModelError(
            f"{_named(row)} holds token {highest}, but the model has embeddings for {known} tokens only; "
            "use the tokenizer that belongs to the model"
        )


def _flat(row: Rendered) -> Iterator[int]:
    for ids in (row.prompt, *row.answers):
        yield from ids
