"""What to evaluate and how."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from anchored.llm.settings import LocalSampling
from anchored.settings import Settings


class GreedySettings(LocalSampling):
    """Answers of a checkpoint, the likeliest token each time unless set otherwise."""

    temperature: float = Field(default=0.0, ge=0, le=2)
    """0 is greedy."""


class EvaluateSettings(Settings):
    """The `evaluate:` section of a recipe."""

    how_only: ClassVar[frozenset[str]] = frozenset()

    benchmarks: tuple[str, ...] = ()
    """Names of benchmarks, or paths of question files (JSONL with prompt, answer and, if you like, category)."""
    checkpoints: Literal["all", "last"] = "all"
    """Which checkpoints answer beside the starting model; the paper takes every epoch's."""
    sample: GreedySettings = GreedySettings()
    """How the model answers; greedy by default."""
    resamples: int = Field(default=2000, ge=100)
    """Bootstrap resamples behind each interval."""
    seed: int = 0
    """Seeds the bootstrap, and the answers where `sample.temperature` is above 0."""


class AlpacaJudging(Settings):
    """How AlpacaEval's judge is asked; the defaults are the official ones."""

    prompt: str = "alpaca-judge"
    """The official prompt; the paper's own judge (create/judge, with room in max_tokens), whose verdict is the last [1]
    or [2]; or a text file with the slots of either."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """What it does to a verdict that is read by log-probabilities is nothing at most endpoints."""
    max_tokens: int = Field(default=1, ge=1)
    """Longest verdict. A judge that thinks first needs room for it."""
    top_logprobs: int = Field(default=5, ge=0, le=20)
    """Likeliest tokens to ask for, so that a preference is graded; 0, or an endpoint that tells none: the verdict is
    read from the text, and is all or nothing."""
    raw_quotes: bool = False
    """Put the texts into the prompt as they are, as the official package does: an answer may then end its own quotation
    and speak as the prompt. Else three quotation marks in a row are escaped."""
    retries: int = Field(default=2, ge=0)
    """How often a reply that holds no verdict is asked for again; after that the verdict has failed, and is counted."""
    seed: int = 0
    """Draws the order in which the answers are shown; 0 is the official order."""
