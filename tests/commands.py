"""Running the real command in its own process, as a user does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
POCKET = ROOT / "recipes" / "pocket.yaml"
STUCK_SECONDS = 300
"""After so long a process does not end any more: a busy machine takes a minute for what takes seconds."""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "160"}


@dataclass(frozen=True)
class Finished:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


def anchored(*arguments: object, env: dict[str, str] | None = None) -> Finished:
    """Run `anchored ARGUMENTS` to its end."""
    done = subprocess.run(
        command(arguments), env={**ENVIRONMENT, **(env or {})}, capture_output=True, text=True, timeout=900, check=False
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def anchored_killed(*arguments: object, when: Callable[[], bool], by: int = signal.SIGKILL) -> int:
    """Run `anchored ARGUMENTS` and send it a signal as soon as `when` holds; its exit code (-9 after SIGKILL)."""
    with subprocess.Popen(
        command(arguments), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None and not when():
            time.sleep(0.005)
        process.send_signal(by)
        return process.wait(STUCK_SECONDS)


def command(arguments: Sequence[object]) -> list[str]:
    return [sys.executable, "-m", "anchored", *map(str, arguments)]
