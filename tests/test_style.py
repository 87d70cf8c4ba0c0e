"""The text of the code: linted, formatted, typed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("tool", [["ruff", "check"], ["ruff", "format", "--check"], ["pyright"]], ids=" ".join)
def test_the_code_passes(tool: list[str]) -> None:
    python = [] if tool[0] == "ruff" else ["--pythonpath", sys.executable]
    done = subprocess.run(
        [sys.executable, "-m", *tool, *python], cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
