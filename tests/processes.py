"""Which processes of this machine there are, by a text in their command lines (a folder of the test's own, say)."""

from __future__ import annotations

import time
from pathlib import Path


def having(text: str) -> list[int]:
    """The ids of the living processes whose command line holds `text`."""
    folders = (folder for folder in Path("/proc").iterdir() if folder.name.isdigit())
    return [int(folder.name) for folder in folders if text in _command_line(folder)]


def all_gone(text: str, seconds: float = 60) -> bool:
    """Whether no such process is left, after waiting for it."""
    until = time.monotonic() + seconds
    while having(text):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def _command_line(folder: Path) -> str:
    try:
        return (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    except OSError:  # it ended meanwhile
        return ""
