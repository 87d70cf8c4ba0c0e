"""Memory of `anchored create` over many prompts: does it grow with their number?

    python benchmarks/create_stream.py [--engine ray] [--prompts 20000 40000 80000] [--write]

The create stage itself (clair), prompts from a file, the reply store on disk, and models that answer at once: 600
characters to prompts of 400. Each number of prompts runs in a process of its own; the slope between the least and the
most of them says what a million would take.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from train_vs_trl import write

from anchored.create.desk import CreateChats
from anchored.create.settings import CreateSettings
from anchored.create.stage import create
from anchored.datasets_io import PromptRows, read_prompts
from anchored.llm.chat import Reply, Request, Usage
from anchored.llm.replies import ReplyStore
from anchored.llm.shared import Books
from anchored.progress import Progress, Silent
from anchored.runs import Run

PROMPTS = [20_000, 40_000, 80_000]
WORDS = ("the", "answer", "of", "a", "model", "holds", "many", "words", "which", "say", "little", "about", "numbers")


def text(seed: str, characters: int) -> str:
    """Words drawn by a seed, so many characters of them."""
    draw = Random(seed)
    return " ".join(draw.choices(WORDS, k=characters // 4))[:characters].strip() + "."


def write_prompts(path: Path, count: int) -> None:
    with path.open("w") as lines:
        for number in range(count):
            lines.write(json.dumps({"prompt": f"{number} {text(str(number), 400)}"}) + "\n")


class Instant:
    """A model that answers at once."""

    def __init__(self, name: str, opening: str) -> None:
        self.name = self.fingerprint = name
        self._opening = opening

    async def reply(self, request: Request) -> Reply:
        said = self._opening + text(request.messages[-1].content, 600)
        return Reply(said, "stop", self.name, usage=Usage(200, 150), raw={"content": said})

    async def close(self) -> None: ...


@asynccontextmanager
async def opened(books: Books, _: Progress) -> AsyncIterator[CreateChats]:
    """Who answers, wherever rows are made."""
    teacher = Instant("teacher", "{teacher_reasoning}: None.\n\n{corrected_student_solution}:\n")
    yield {name.name: books.remember(name, paid=False) for name in (Instant("policy", ""), teacher)}


async def create_by(engine: str, folder: Path, prompts: PromptRows) -> dict[str, float]:
    """The stage; what it took."""
    run = Run(folder)
    settings = CreateSettings.model_validate({"reviser": {"model": "teacher"}, "engine": engine, "ray": {"workers": 1}})
    if engine == "ray":
        from anchored.create.on_ray import cluster
        from anchored.create.ray_hub import Order

        order = Order(settings, opened, counts_money=False, run=str(folder))
        async with cluster(order, run.replies, Silent()) as workers:
            began = time.perf_counter()
            summary = await create(run, settings, prompts, workers.chats, Silent(), engine=workers)
            found = {
                "seconds": time.perf_counter() - began,
                "hub": peak_of("ray::RayHub"),
                "worker": peak_of("ray::MapWorker"),
            }
    else:
        with ReplyStore(run.replies) as store:
            async with opened(Books(store), Silent()) as chats:
                began = time.perf_counter()
                summary = await create(run, settings, prompts, chats, Silent())
                found = {"seconds": time.perf_counter() - began}
    assert summary.pairs == len(prompts.prompts)
    return found


def run(engine: str, folder: Path) -> None:
    """The stage over a file of prompts; prints what it took as a line of JSON."""
    bare = megabytes()
    prompts = read_prompts(folder / "prompts.jsonl", held_out=100)
    drawn = megabytes()
    found = asyncio.run(create_by(engine, folder, prompts))
    print(json.dumps({"bare": bare, "drawn": drawn, "peak": megabytes(), **found}))


def peak_of(name: str) -> float:
    """The most memory that a process of this name has held, in MB."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            if (folder / "cmdline").read_text().startswith(name):
                return megabytes(folder)
    return 0.0


def megabytes(process: Path = Path("/proc/self")) -> float:
    """The most memory that a process has held: its own, where getrusage counts what its parent held, too."""
    return int((process / "status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


def measure(engine: str, count: int) -> dict[str, float]:
    with TemporaryDirectory() as scratch:
        write_prompts(Path(scratch) / "prompts.jsonl", count)
        done = subprocess.run(
            [sys.executable, __file__, "--run", scratch, "--engine", engine], check=True, stdout=subprocess.PIPE
        )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS)
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="ray: one worker on this machine")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="keep the results in docs/benchmarks.md")
    arguments = parser.parse_args()
    if arguments.run:
        run(arguments.engine, arguments.run)
        return
    on_ray = arguments.engine == "ray"
    found = {count: measure(arguments.engine, count) for count in arguments.prompts}
    shown = {"bare": "imports, MB", "drawn": "after the draw", "peak": "peak"}
    shown |= {"hub": "peak of the hub", "worker": "peak of the worker"} if on_ray else {}
    counts = f" --prompts {' '.join(map(str, arguments.prompts))}" if arguments.prompts != PROMPTS else ""
    lines = [
        f"    python benchmarks/create_stream.py{' --engine ray' if on_ray else ''}{counts} --write",
        "",
        "Peak resident memory of the create stage by the number of prompts, with models that answer at once"
        + (", made by one worker on Ray." if on_ray else "."),
        "",
        f"| prompts | {' | '.join(shown.values())} | rows per second |",
        f"|--:|{'--:|' * len(shown)}--:|",
    ]
    for count, one in found.items():
        cells = [f"{one[name]:.0f}" for name in shown]
        lines.append(f"| {count:,} | {' | '.join(cells)} | {count / one['seconds']:.0f} |")
    least, most = min(found), max(found)
    if least < most:
        slope = (found[most]["peak"] - found[least]["peak"]) / (most - least)
        million = found[most]["peak"] + slope * (1_000_000 - most)
        lines += ["", f"{1e5 * slope:.0f} MB more for each 100,000 prompts: a million would take {million:.0f} MB."]
    page = "\n".join(lines)
    print(page)
    if arguments.write and on_ray:
        write(page, "create_stream_ray", "Memory of creating pairs on Ray")
    elif arguments.write:
        write(page, "create_stream", "Memory of creating pairs")


if __name__ == "__main__":
    main()
