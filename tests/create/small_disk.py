"""A disk that is as small as a test wants it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(place: Path) -> Iterator[Callable[[int], None]]:
    """Makes a new folder's disk so many kilobytes large, and larger, keeping what is on it."""
    place.mkdir()

    def mount(options: str) -> int:
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True).returncode

    def resize(kilobytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", place], check=True)

    if not shutil.which("mount") or mount("size=16k"):
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        yield resize
    finally:
        subprocess.run(["umount", place], check=True)
