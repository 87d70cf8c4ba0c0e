"""A local OpenAI-compatible server of a model folder: its command line, its start, its certain end.

In: a `Served` (engine, folder, options). Out: a `Server` on a port of 127.0.0.1, ready to be asked; the questions are
`served_chat`'s. The server runs under a `keeper` in a process group of its own, which ends with this process, however
that ends. The keys of this process's environment are not passed on.

vLLM and SGLang are told to leave out the sampling settings of the model's generation config, and `transformers serve`
is told so with each request (`request_body`): the request decides, as it does for a model in this process.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from anchored.errors import ModelError
from anchored.llm import keeper
from anchored.llm.model_folder import is_adapter
from anchored.llm.settings import Engine
from anchored.runs import one_line

HOST = "127.0.0.1"
GRACE_SECONDS = 10.0
"""From SIGTERM to SIGKILL."""

_LEAVING_SECONDS = 3.0
"""From SIGKILL until nobody waits any more for what it killed."""

_POLL_SECONDS = 0.25
_HEALTH_SECONDS = 30.0
_NOTE_SECONDS = 60.0
_TAIL_BYTES, _TAIL_LINES, _LINE_LENGTH = 16384, 6, 240

_PORT_TAKEN = re.compile(r"address already in use|EADDRINUSE", re.IGNORECASE)
_SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)
_QUIET = {
    "HF_HUB_OFFLINE": "1",  # the folder is here
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "PYTHONUNBUFFERED": "1",
}

Options = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Served:
    """A model that is to be served, and how."""

    engine: Engine
    folder: Path
    name: str
    """What people call it."""
    log: Path
    """What the server prints is added to this file."""
    options: Options = field(default_factory=dict)
    """More of its command-line options: name to value; true and false are a flag and its `--no-` form, null is left
    out."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """More environment variables."""
    start_seconds: float = 1200


@dataclass(frozen=True, slots=True)
class _Engine:
    """What sets one server software apart."""

    program: Callable[[], list[str]]
    """The words that start it; a ModelError where it is not installed."""
    options: Callable[[Served], Options]
    positional: bool
    """Whether the model is named by its place, not by --model-path."""
    takes_a_name: bool
    """Whether it answers to `Served.name`; if not, to the folder's path."""
    one_at_a_time: bool = False


def _vllm() -> list[str]:
    program = _executable("vllm")
    if program is None:
        raise ModelError(
            "serve: vllm is not installed here; `pip install vllm`, in an environment of its own if it wants another "
            "torch, whose bin folder you put on the PATH; or start it yourself and set base_url"
        )
    return [program, "serve"]


def _sglang() -> list[str]:
    if importlib.util.find_spec("sglang"):
        return [sys.executable, "-m", "sglang.launch_server"]
    program = _executable("sglang")
    if program is None:
        raise ModelError(
            "serve: sglang is not installed here; `pip install sglang`, in an environment of its own if it wants "
            "another torch, whose bin folder you put on the PATH; or start it yourself and set base_url"
        )
    return [program, "serve"]


def _transformers() -> list[str]:
    missing = [name for name in ("fastapi", "uvicorn", "accelerate") if not importlib.util.find_spec(name)]
    if missing:
        raise ModelError(f"serve: transformers serve needs {', '.join(missing)}; pip install 'anchored[serve]'")
    return [sys.executable, "-m", "transformers.cli.transformers", "serve"]


_ENGINES: Mapping[str, _Engine] = {
    "vllm": _Engine(
        _vllm,
        lambda served: {"served-model-name": served.name, "generation-config": "vllm"},
        positional=True,
        takes_a_name=True,
    ),
    "sglang": _Engine(
        _sglang,
        lambda served: {"served-model-name": served.name, "sampling-defaults": "openai"},
        positional=False,
        takes_a_name=True,
    ),
    "transformers": _Engine(_transformers, lambda _: {}, positional=True, takes_a_name=False, one_at_a_time=True),
}


def find_program(engine: str) -> list[str]:
    """The words that start an engine; a ModelError with the pip command where it is not installed."""
    return _ENGINES[engine].program()


def check_servable(engine: Engine, folder: Path) -> None:
    """A ModelError for what no engine here can serve: an adapter without its base model's weights."""
    if is_adapter(folder):
        raise ModelError(
            f"{folder}: an adapter cannot be served by {engine}; leave out `serve`, which answers in this process, or "
            "merge it into its base model (peft's merge_and_unload, then save_pretrained)"
        )


def command_line(served: Served, port: int, program: Sequence[str]) -> list[str]:
    """The whole command; `program` are its first words."""
    engine = _ENGINES[served.engine]
    model = [str(served.folder)] if engine.positional else ["--model-path", str(served.folder)]
    ours = {"host": HOST, "port": port, **engine.options(served)}
    return [*program, *model, *_flags({**ours, **served.options})]


def request_model(served: Served) -> str:
    """The name that requests give the model."""
    return served.name if _ENGINES[served.engine].takes_a_name else str(served.folder)


def request_body(engine: Engine, ends: Sequence[int]) -> dict[str, Any]:
    """More keys that a request needs to be answered as it says, and until one of the tokens `ends`."""
    if engine != "transformers":
        return {"stop_token_ids": list(ends)} if ends else {}
    # it takes the model's own generation config, where temperature alone does not turn sampling on, and 50 is top_k;
    # temperature 0 does turn it off
    drawn = {"do_sample": True, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0}
    return {"generation_config": json.dumps({**drawn, "eos_token_id": list(ends), "pad_token_id": ends[0]})}


def most_in_flight(served: Served, wanted: int) -> int:
    """How many requests to have under way: one, where they only wait in line and each one's seed would be lost."""
    alone = _ENGINES[served.engine].one_at_a_time and not served.options.get("continuous-batching")
    return 1 if alone else wanted


async def start(served: Served, note: Callable[[str], None], tries: int = 3) -> Server:
    """Start a server and wait until it is healthy; a port that another process takes first is no end.

    Raises ModelError where it is not installed, ends by itself, or is not ready in `start_seconds`; nothing is left
    running then, and neither when this is cancelled.
    """
    server = Server(served)
    note(f"{served.name}: starting {served.engine} on {HOST}:{server.port}, log in {served.log}")
    try:
        seconds = await _wait_until_healthy(server, note)
    except BaseException as error:
        await server.stop()
        if isinstance(error, ModelError) and tries > 1 and _PORT_TAKEN.search(server.last_lines()):
            return await start(served, note, tries - 1)
        raise
    note(f"{served.name}: {served.engine} is ready after {seconds:.0f} s")
    return server


class Server:
    """A server process from its start, which is the constructor, to `stop`."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.port = _free_port()
        self.base_url = f"http://{HOST}:{self.port}/v1"
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the process is gone."""
        command = command_line(served, self.port, find_program(served.engine))
        served.log.parent.mkdir(parents=True, exist_ok=True)
        with open(served.log, "ab") as log:
            log.write(f"\n{datetime.now(UTC).isoformat(timespec='seconds')} {' '.join(command)}\n".encode())
            log.flush()
            self._log_begins = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-I", keeper.__file__, str(GRACE_SECONDS), *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(served),
                start_new_session=True,
            )
        # not one of the loop's threads, which a process that is being interrupted would wait for
        threading.Thread(target=self._watch, args=(asyncio.get_running_loop(),), daemon=True).start()

    def last_lines(self) -> str:
        """The end of what it printed."""
        with open(self.served.log, "rb") as log:
            log.seek(max(self._log_begins, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = log.read().decode("utf-8", "replace")
        lines = [line for line in map(str.rstrip, text.splitlines()) if line]
        return "\n".join(line[:_LINE_LENGTH] for line in lines[-_TAIL_LINES:])

    def about_its_end(self) -> str:
        """Where its log is, and its last lines."""
        return f"{self.served.log} has all it said, and at last:\n{self.last_lines() or '(nothing)'}"

    async def stop(self) -> None:
        """End it and all that it started, for certain; idempotent."""
        await asyncio.to_thread(self._stop)

    def _stop(self) -> None:
        if self._process.stdin:
            self._process.stdin.close()  # which tells the keeper
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_SECONDS + 5)
        # the next server may want the memory of the last: until nobody is left, not only until all are told to go
        self._kill_group()
        self._process.wait()
        until = time.monotonic() + _LEAVING_SECONDS
        while _lives(self._process.pid) and time.monotonic() < until:
            time.sleep(0.02)

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        self._process.wait()
        self._kill_group()  # in case it was the keeper alone that died
        with suppress(RuntimeError):  # the loop is closed: nobody asks any more
            loop.call_soon_threadsafe(self._note_end)

    def _note_end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError, PermissionError):  # nobody is left
            os.killpg(self._process.pid, signal.SIGKILL)


async def _wait_until_healthy(server: Server, note: Callable[[str], None]) -> float:
    """The seconds that it took."""
    served, loop = server.served, asyncio.get_running_loop()
    began = said = loop.time()
    # not /v1/models, which `transformers serve` answers with an error where there is no cache of the Hub
    while not await _is_healthy(server.port) or server.ended.done():
        now = loop.time()
        if server.ended.done():
            raise ModelError(f"{served.name}: {served.engine} ended before it was ready; {server.about_its_end()}")
        if now - began > served.start_seconds:
            raise ModelError(
                f"{served.name}: {served.engine} was not ready after {now - began:.0f} s; raise serve_seconds if it "
                f"only needs longer; {server.about_its_end()}"
            )
        if now - said > _NOTE_SECONDS:
            said = now
            last = one_line(server.last_lines().rpartition("\n")[2])
            note(f"{served.name}: {served.engine} is still starting after {now - began:.0f} s; it says: {last}")
        await asyncio.wait({server.ended}, timeout=_POLL_SECONDS)
    return loop.time() - began


async def _is_healthy(port: int) -> bool:
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=_HEALTH_SECONDS)
    try:
        async with (
            aiohttp.ClientSession(trust_env=False, timeout=timeout) as session,
            session.get(f"http://{HOST}:{port}/health") as response,
        ):
            return response.status == 200
    except (aiohttp.ClientError, OSError, TimeoutError):
        return False


def _lives(group: int) -> bool:
    """Whether any process of a group does more than wait to be reaped."""
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    states = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            state, _, its_group, *_ = file.read_text("utf-8", "replace").rpartition(")")[2].split()
            states += [state] if int(its_group) == group else []
    return not states or any(state not in "ZX" for state in states)


def _flags(options: Options) -> list[str]:
    words: list[str] = []
    for name, value in options.items():
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list | tuple):
            words += [f"--{name}", *map(str, value)]
        else:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return words


def _executable(name: str) -> str | None:
    """A command of this environment or of the PATH."""
    return shutil.which(name, path=os.path.dirname(sys.executable)) or shutil.which(name)


def _environment(served: Served) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not _SECRET.search(name)}
    return {**ours, **_QUIET, **served.environment}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
