"""A judge's verdict out of its reply."""

from __future__ import annotations

import re
from typing import Literal


def read_verdict(text: str) -> Literal[1, 2] | None:
    """The last `[1]` or `[2]` of a reply; None if neither is there."""
    marks = re.findall(r"\[([12])\]", text)
    if not marks:
        return None
    return 1 if marks[-1] == "1" else 2
