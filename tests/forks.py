"""`anchored` commands as forks of one interpreter that has imported everything.

    with Forks() as forks:
        command = forks.start("create", POCKET, "--out", folder, log=folder / "log")
        command.kill()

Each is a process of its own, in a group of its own, and dies as any other; only the seconds that an interpreter takes
to start are spared, and those of back-off. What the command prints goes to its log. `kill_at` ends it from within, see
`kill_at.KillAt`; with `clock_jumps` no two looks at its wall clock agree on the day.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo
from importlib import import_module
from pathlib import Path
from typing import IO, Self

from commands import ENVIRONMENT
from kill_at import KillAt

from anchored import cli
from anchored.llm import connection, faults, replies, serve
from anchored.llm.model_folder import load_tokenizer
from anchored.pocket import world


class Forks:
    """The interpreter; its block starts and ends it."""

    def __enter__(self) -> Self:
        self._interpreter = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._interpreter.communicate(timeout=60)

    def start(
        self,
        *arguments: object,
        log: Path,
        env: Mapping[str, str] | None = None,
        kill_at: str = "",
        clock_jumps: bool = False,
    ) -> Command:
        """Start `anchored ARGUMENTS`; one at a time."""
        assert self._interpreter.stdin
        assert self._interpreter.stdout
        order = {"arguments": list(map(str, arguments)), "env": dict(env or {}), "log": str(log)}
        order |= {"kill_at": kill_at, "clock_jumps": clock_jumps}
        self._interpreter.stdin.write(json.dumps(order) + "\n")
        self._interpreter.stdin.flush()
        return Command(int(self._interpreter.stdout.readline()), self._interpreter.stdout)


@dataclass(frozen=True)
class Command:
    """One that was started."""

    pid: int
    _ended: IO[str]

    def kill(self, when: Callable[[], bool] = lambda: True) -> int:
        """SIGKILL to the whole group as soon as `when` holds; the exit code (-9: it was still there)."""
        while not when() and self._runs():
            time.sleep(0.001)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        return self.wait()

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        return int(self._ended.readline())

    def _runs(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True


def _serve() -> None:
    for name in ("openai", "aiohttp", "rapidfuzz", "anchored.pipeline", "anchored.batches.render"):
        import_module(name)
    connection.LONGEST_BACKOFF = 0.05
    load_tokenizer(world.policy_folder())  # finds its class by name, among thousands of modules
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if not child:
            if order["clock_jumps"]:
                _let_clock_jump()
            _become(order["arguments"], order["env"], order["log"], order["kill_at"])
        os.setpgid(child, child)  # before anyone hears of it, who might kill the group
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    os._exit(0)  # nothing is left to be torn down, which takes seconds


def _let_clock_jump() -> None:
    jumps, usual = random.Random(os.getpid()), time.time

    class Jumping(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.now(tz) + timedelta(days=jumps.uniform(-30, 30))

    time.time = lambda: usual() + jumps.uniform(-2e6, 2e6)
    for module in (faults, replies, serve):
        module.datetime = Jumping  # type: ignore[attr-defined]


def _become(arguments: list[str], env: dict[str, str], log: str, kill_at: str) -> None:
    """Be the command, to its end."""
    os.setpgid(0, 0)
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        (2, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        os.dup2(os.open(path, flags, 0o600), descriptor)
    os.environ.update(env)
    sys.argv = ["anchored", *arguments]
    if kill_at:
        KillAt(kill_at)
    code: object = 1
    try:
        cli.main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    _serve()
