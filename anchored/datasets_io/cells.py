"""The cells of foreign rows as texts and turns, however they were stored: JSON in a string, structs of lists, NaN.

A cell that is not what it should be raises `Refused`, which is the row's outcome and never leaves `datasets_io`.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping
from typing import Any, cast, get_args

from anchored.records import Message, Outcome, Role


class Refused(Exception):
    """This row cannot be used."""

    def __init__(self, outcome: Outcome, detail: str) -> None:
        super().__init__(detail)
        self.outcome = outcome


def malformed(detail: str) -> Refused:
    return Refused(Outcome.MALFORMED, detail)


# NumPy prints no commas between the turns, and so does a CSV file that pandas made of a parquet file
_SPELT_TURNS = re.compile(r"""\s*\[\s*\{\s*(['"])(?:role|content)\1\s*:.*\}\s*\]\s*\Z""", re.DOTALL)
# HH-RLHF's transcripts, which begin with the blank line
_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):", re.ASCII)
_CALLED = {"developer": "system", "human": "user", "prompter": "user", "gpt": "assistant", "model": "assistant"}
"""What data sets call the roles beside OpenAI's names."""
_SPEAKERS: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}


def turns(value: Any, name: str) -> tuple[Message, ...] | str:
    """A cell as messages, or as the string it is; `name` is the column's."""
    if missing(value):
        raise malformed(f"{name} has no value")
    if isinstance(value, str):
        spelt = _structure(value)
        if spelt is None and _SPELT_TURNS.match(value):
            raise malformed(f"{name} spells turns that cannot be read ({short(value)}); write parquet or JSON lines")
        if not _are_messages(spelt):
            return _transcript(value) or well_formed(value)
        value = spelt
    if isinstance(value, dict) and isinstance(value.get("role", value.get("from")), str):
        value = [value]
    return tuple(message(turn, name) for turn in records(value, name))


def message(turn: Mapping[str, Any], name: str) -> Message:
    """One turn of column `name`."""
    said, content = (
        (turn.get("from"), turn.get("value")) if _is_sharegpt(turn) else (turn.get("role"), turn.get("content"))
    )
    role = _CALLED.get(said, said) if isinstance(said, str) else said
    if role not in get_args(Role):
        raise malformed(f"{name} has a turn of role {said!r}; roles are {', '.join(get_args(Role))}")
    if isinstance(content, list) and content and all(_is_text_part(part) for part in content):
        content = "".join(text(part.get("text"), name) for part in content)
    return Message(cast(Role, role), text(content, f"a turn of {name}"))


def records(value: Any, name: str) -> list[dict[str, Any]]:
    """A cell as a list of objects; strings of JSON and structs of lists are such lists too."""
    if isinstance(value, str):
        value = _structure(value)
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, cells, strict=False)) for cells in zip(*value.values(), strict=False)]
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise malformed(f"{name} holds {kind(value)}, not text or a list of objects")
    return value


def text(value: Any, name: str) -> str:
    """A cell that must be a string."""
    if not isinstance(value, str):
        raise malformed(f"{name} holds {kind(value)}, not text")
    return well_formed(value)


def note(columns: Mapping[str, Any], name: str) -> str:
    """A text that says something about the row; empty where a foreign column of that name holds anything else."""
    value = columns.get(name)
    return well_formed(value) if isinstance(value, str) else ""


def number(value: Any) -> float | None:
    """A cell as a finite number; None for anything else."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def truth(value: Any, name: str) -> bool:
    """A cell that must be true or false, also as 1 and 0 or as files without types spell it."""
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    spelt = str(value).strip().lower()
    if spelt not in known:
        raise malformed(f"{name} holds {kind(value)}, not true or false")
    return known[spelt]


def missing(value: Any) -> bool:
    """None, or the NaN that stands for it in float columns."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def well_formed(value: str) -> str:
    """Half a surrogate pair is no text: no tokenizer, file or endpoint takes it, so it becomes U+FFFD."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def kind(value: Any) -> str:
    """What a cell holds, for people."""
    if missing(value):
        return "no value"
    return f"{type(value).__name__} {short(value)}"


def short(value: Any) -> str:
    """The beginning of a value, for people."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type", "text") == "text"


def _are_messages(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(turn, dict) and ({"role", "content"} <= turn.keys() or _is_sharegpt(turn)) for turn in value)


def _is_sharegpt(turn: Mapping[str, Any]) -> bool:
    return {"from", "value"} <= turn.keys() and "role" not in turn


def _transcript(spelt: str) -> tuple[Message, ...]:
    """The turns of a transcript such as `\\n\\nHuman: ...\\n\\nAssistant: ...`; empty if it is none.

    An answer that is still to come (`\\n\\nAssistant:` at the end) is no turn.
    """
    before, *parts = _TRANSCRIPT.split(spelt)
    if before or len(parts) < 4 or parts[0] != "Human":
        return ()
    said = [
        Message(_SPEAKERS[who], well_formed(what.strip())) for who, what in zip(parts[::2], parts[1::2], strict=True)
    ]
    return tuple(said if said[-1].content or said[-1].role == "user" else said[:-1])


def _structure(spelt: str) -> Any:
    """The list that a string spells (as JSON, or as Python prints it in CSV files); None for other strings."""
    if not spelt.lstrip().startswith("["):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(spelt)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return None
