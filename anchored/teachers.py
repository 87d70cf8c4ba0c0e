"""Which of create's settings name the models that a method asks, read from the settings as a recipe holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OFF_POLICY = "judge-off-policy"
TEAM = "team"
DECIDING = frozenset({"method", "team", "best_of", "candidates", "answers"})
"""The settings that it depends on."""


def teachers(create: Mapping[str, Any]) -> tuple[str, ...]:
    """The sections of `create` that are asked: who revises, answers or picks the winner first, then who helps.

    Empty where the pairs were judged before, and where there is no method.
    """
    match create.get("method"):
        case None:
            return ()
        case "clair":
            first = TEAM if create.get("team") else "reviser"
            return (first, "judge") if (create.get("best_of") or {}).get("by") == "judge" else (first,)
        case "stronger-preferred":
            return ("stronger",)
        case method:
            judged_before = method == OFF_POLICY and not (create.get("candidates") or create.get("answers"))
            return () if judged_before else ("judge",)
