"""Pairs as the model sees them: token ids laid out as a tree, checked before training begins.

In: pairs and the policy. Out: examples, and how many pairs were left out and why. A pair with nothing to learn from, or
that the chat template does not take, is left out by its outcome; one that the model cannot read (too long, unknown
tokens) is an error.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anchored.batches.render import RenderedPair, Renderer
from anchored.batches.tree import Tree, plant
from anchored.errors import ModelError, TrainError
from anchored.records import Outcome, Pair
from anchored.train.policy import Policy
from anchored.train.settings import TrainSettings


@dataclass(frozen=True, slots=True)
class Example:
    """One pair to train on or to measure with."""

    tree: Tree
    """Branch 0 is the chosen answer, branch 1 the rejected one."""
    keys: tuple[bytes, bytes]
    """Name prompt and answer by their token ids: the chosen answer's key, then the rejected one's."""
    chosen_tokens: int
    """Scored tokens: the answer's, its end-of-turn token included."""
    rejected_tokens: int


@dataclass(frozen=True, slots=True)
class Examples:
    """What `prepare` made of pairs."""

    kept: tuple[Example, ...]
    left_out: Mapping[str, int]
    """How many pairs are not among `kept`, by outcome."""
    problem: str = ""
    """Why the first pair that could not be rendered was left out."""


def prepare(pairs: Sequence[Pair], policy: Policy, settings: TrainSettings) -> Examples:
    """Render, check and plant every pair."""
    renderer = Renderer(policy.tokenizer, settings.max_prompt_tokens, settings.max_answer_tokens)
    accepted = [pair for pair in pairs if pair.outcome is Outcome.OK]
    left_out = Counter(str(pair.outcome) for pair in pairs if pair.outcome is not Outcome.OK)
    kept: list[Example] = []
    problem = ""
    for rendered in renderer.pairs(accepted):
        if isinstance(rendered, ModelError):
            left_out[str(Outcome.MALFORMED)] += 1
            problem = problem or str(rendered)
            continue
        if rendered.chosen_ids == rendered.rejected_ids:
            left_out[str(Outcome.IDENTICAL)] += 1
            continue
        _check_fits(rendered, policy)
        kept.append(_example(rendered))
    return Examples(tuple(kept), left_out, problem)


def _example(pair: RenderedPair) -> Example:
    return Example(
        tree=plant(pair.prompt_ids, (pair.chosen_ids, pair.rejected_ids)),
        keys=(_key(pair.prompt_ids, pair.chosen_ids), _key(pair.prompt_ids, pair.rejected_ids)),
        chosen_tokens=len(pair.chosen_ids),
        rejected_tokens=len(pair.rejected_ids),
    )


def _key(prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> bytes:
    # the prompt's length comes first, so that no two splits of one text share a key
    ids = array("q", (len(prompt_ids), *prompt_ids, *answer_ids))
    return hashlib.sha256(ids.tobytes()).digest()


def _check_fits(pair: RenderedPair, policy: Policy) -> None:
    context = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    prompt, answer = len(pair.prompt_ids), max(len(pair.chosen_ids), len(pair.rejected_ids))
    if context is not None and prompt + answer > context:
        raise TrainError(
            f"pair {pair.id!r} has {prompt} prompt and {answer} answer tokens, but the model's context is {context}; "
            f"lower train.max_prompt_tokens or train.max_answer_tokens so that they add up to {context} at most"
        )
    embeddings: Any = policy.model.get_input_embeddings()
    known = embeddings.weight.shape[0]
    highest = max(*pair.prompt_ids, *pair.chosen_ids, *pair.rejected_ids)
    if highest >= known:
        raise ModelError(
            f"pair {pair.id!r} holds token {highest}, but the model has embeddings for {known} tokens only; "
            "use the tokenizer that belongs to the model"
        )
