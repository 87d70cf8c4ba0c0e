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
