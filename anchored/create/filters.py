"""Which finished pairs are refused after all, and why.

In: a pair and the filters with their settings. Out: the same pair, or one whose outcome says what it failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from anchored import contrast
from anchored.create.settings import LengthRatio
from anchored.leak import find_leak
from anchored.records import Outcome, Pair, as_text


def filtered(pair: Pair, filters: Sequence[LengthRatio | Literal["leak"]]) -> Pair:
    """The pair, refused by the first filter that it fails; what is refused already stays so."""
    for one in filters:
        if pair.outcome is Outcome.OK:
            pair = _without_leak(pair) if one == "leak" else _within(pair, one)
    return pair


def _within(pair: Pair, band: LengthRatio) -> Pair:
    ratio = contrast.length_ratio(pair.chosen.text, pair.rejected.text)
    if band.low <= ratio <= band.high:
        return pair
    detail = f"{ratio:.3f} times as long as the rejected answer, not {band.low:g} to {band.high:g}"
    return replace(pair, outcome=Outcome.LENGTH_RATIO, detail=detail)


def _without_leak(pair: Pair) -> Pair:
    words = find_leak(pair.chosen.text, as_text(pair.prompt), pair.rejected.text)
    return replace(pair, outcome=Outcome.LEAK, detail=f"speaks of being a revision: {words!r}") if words else pair
