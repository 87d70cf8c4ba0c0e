"""The base of every settings model: unknown keys are errors, values cannot be changed after parsing."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A frozen group of knobs; each stage keeps its own in its `settings.py`, one line of doc under each field."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
