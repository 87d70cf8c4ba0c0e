from __future__ import annotations

import pytest

from anchored.llm.verdict import read_verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("[1]", 1),
        ("[2]", 2),
        ("Solution [1] is short, so **[2]**.", 2),
        ("[2] at first sight, but in the end\n\n[1].", 1),
        ("[[1]]", 1),
        ("1", None),
        ("[3]", None),
        ("[ 1 ]", None),
        ("(1) or {2}", None),
        ("[12]", None),
        ("", None),
    ],
)
def test_the_last_mark_counts(text: str, verdict: int | None) -> None:
    assert read_verdict(text) == verdict
