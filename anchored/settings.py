"""The base of every settings model: unknown keys are errors, values cannot be changed after parsing."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A frozen group of knobs; each stage keeps its own in its `settings.py`, one line of doc under each field."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    how_only: ClassVar[frozenset[str]] = frozenset()
    """Fields that say how a thing is done, never what comes out (concurrency, time-outs): free to change in mid-run.
    Of a field that is a mapping, `field.key` is one of its keys."""
