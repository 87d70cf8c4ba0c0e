"""What every page has in common: where its template and its style come from, and what the browser may do with it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anchored.report.tables import signed

_HERE = Path(__file__).parent
_FULL_TONE = 20.0
"""Points of change at which a cell of the score table has its full colour."""


def environment() -> Any:
    """Where the pages' templates are, with what they call; whatever is put into them is escaped."""
    import jinja2

    loader = jinja2.FileSystemLoader(_HERE)
    found = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    found.globals |= {"signed": signed, "tone": _tone}
    return found


def styles(*more: str) -> str:
    """The style of a page, with that of further files."""
    return "".join((_HERE / name).read_text("utf-8") for name in ("look.css", "page.css", *more))


def content_policy(scripts: Sequence[str]) -> str:
    """What the browser may do: run these very scripts, and load nothing at all."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    run = hashes or "'none'"
    # Plotly sets styles as it draws; data: and blob: are pictures that are made in the page
    return (
        f"default-src 'none'; script-src {run}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _tone(change: float | None) -> int:
    return min(100, round(100 * abs(change or 0) / _FULL_TONE))
