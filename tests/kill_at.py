"""SIGKILL at a point of a process's own life, which no program can prevent."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


class KillAt:
    """Counts an event, and ends this process: `EVENT:NAME:COUNT`.

    `open:metrics.jsonl:7` is the 7th time that a file of this name is opened, an audit event of Python's own.
    """

    def __init__(self, kill: str) -> None:
        self.event, self.name, count = kill.split(":")
        self.left = int(count)
        sys.addaudithook(lambda event, arguments: self.see(event, *map(str, arguments)))

    def see(self, event: str, *arguments: str) -> None:
        if event == self.event and any(Path(argument).name == self.name for argument in arguments):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
