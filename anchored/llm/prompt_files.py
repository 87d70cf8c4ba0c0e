"""Prompts that are text files: found by name or path, and filled in. `<<name>>` marks a slot.

Slots are filled in one pass, so what is filled in is never searched again, whatever an answer holds.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path

import anchored
from anchored.errors import RecipeError

SLOT = re.compile(r"<<([A-Za-z_][A-Za-z0-9_]*)>>")


def load(name_or_path: str | Path) -> str:
    """The text of a shipped prompt (`create/reviser`, or `reviser` where only one stage has it) or of a user's file.

    The bytes stay as they are: line ends and the newlines at the end belong to the prompt.
    """
    path = _find(name_or_path)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RecipeError(f"{path}: this prompt file cannot be read ({reason}); give a UTF-8 text file") from None


def fill(template: str, slots: Mapping[str, str]) -> str:
    """The template with every slot filled; a slot without a value, or a value without a slot, is a RecipeError."""
    wanted = set(SLOT.findall(template))
    if unknown := sorted(wanted - slots.keys()):
        raise RecipeError(f"the prompt has the slot <<{unknown[0]}>>; only {_marks(slots)} can be filled in")
    if missing := sorted(slots.keys() - wanted):
        raise RecipeError(f"the prompt lacks the slot <<{missing[0]}>>; it must hold {_marks(slots)}")
    return SLOT.sub(lambda slot: slots[slot[1]], template)


def _find(name_or_path: str | Path) -> Path:
    package = Path(anchored.__file__).parent
    shipped = {f"{file.parents[1].name}/{file.stem}": file for file in sorted(package.glob("*/prompts/*.txt"))}
    matches = [name for name in shipped if name_or_path in (name, name.partition("/")[2])]
    if len(matches) == 1:
        return shipped[matches[0]]
    if (path := Path(name_or_path)).exists():
        return path
    if matches:
        raise RecipeError(f"several shipped prompts are called {str(name_or_path)!r}; say {' or '.join(matches)}")
    near = difflib.get_close_matches(str(name_or_path), shipped, 3, 0.4) or list(shipped)
    raise RecipeError(f"{str(name_or_path)!r} is no file and no shipped prompt; shipped are {', '.join(near)}")


def _marks(slots: Mapping[str, str]) -> str:
    return ", ".join(f"<<{name}>>" for name in sorted(slots))
