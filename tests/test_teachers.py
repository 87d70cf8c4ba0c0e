"""Who is asked by which method, from a recipe's words and from the settings made of them."""

from __future__ import annotations

from typing import Any

import pytest

from anchored.create.settings import CreateSettings
from anchored.teachers import teachers

STEP = {"model": "m", "does": "revise"}


@pytest.mark.parametrize(
    ("create", "asked"),
    [
        ({}, ()),
        ({"method": "clair"}, ("reviser",)),
        ({"method": "clair", "team": [STEP]}, ("team",)),
        ({"method": "clair", "best_of": {"n": 2, "by": "judge"}}, ("reviser", "judge")),
        ({"method": "clair", "best_of": {"n": 2, "by": "jaccard"}}, ("reviser",)),
        ({"method": "judge-on-policy"}, ("judge",)),
        ({"method": "stronger-preferred"}, ("stronger",)),
        ({"method": "judge-off-policy"}, ()),
        ({"method": "judge-off-policy", "judged": "pairs.jsonl"}, ()),
        ({"method": "judge-off-policy", "answers": {"a": "a.jsonl", "b": "b.jsonl"}}, ("judge",)),
    ],
)
def test_the_sections_that_a_method_asks(create: dict[str, Any], asked: tuple[str, ...]) -> None:
    assert teachers(create) == asked
    if create:
        settings = CreateSettings.model_validate(create)
        assert teachers(settings.model_dump(mode="json")) == asked
        steps = {f"step-{place}" for place in range(len(create.get("team", ())))}
        assert len(settings.endpoints()) == len(set(asked) - {"team"}) + len(steps)
        assert (settings.judged_data is None) == bool(asked)
