"""Memory of `anchored create` over many prompts: does it grow with their number?

    python benchmarks/create_stream.py [--prompts 20000 40000 80000] [--write]

The create stage itself (clair), prompts from a file, the reply store on disk, and models that answer at once: 600
characters to prompts of 400. Each number of prompts runs in a process of its own; the slope between the least and the
most of them says what a million would take.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from train_vs_trl import write

WORDS = ("the", "answer", "of", "a", "model", "holds", "many", "words", "which", "say", "little", "about", "numbers")


def text(seed: str, characters: int) -> str:
    """Words drawn by a seed, so many characters of them."""
    draw = Random(seed)
    return " ".join(draw.choices(WORDS, k=characters // 4))[:characters].strip() + "."


def write_prompts(path: Path, count: int) -> None:
    with path.open("w") as lines:
        for number in range(count):
            lines.write(json.dumps({"prompt": f"{number} {text(str(number), 400)}"}) + "\n")


def run(folder: Path, count: int) -> None:
    """The stage over a file of prompts; prints what it took as a line of JSON."""
    from anchored.create.settings import CreateSettings
    from anchored.create.stage import create
    from anchored.datasets_io import read_prompts
    from anchored.llm.chat import Reply, Request, Usage
    from anchored.llm.replies import ReplyStore
    from anchored.progress import Silent
    from anchored.runs import Run

    class Instant:
        """A model that answers at once."""

        def __init__(self, name: str, opening: str) -> None:
            self.name = self.fingerprint = name
            self._opening = opening

        async def reply(self, request: Request) -> Reply:
            said = self._opening + text(request.messages[-1].content, 600)
            return Reply(said, "stop", self.name, usage=Usage(200, 150), raw={"content": said})

        async def close(self) -> None: ...

    bare = megabytes()
    prompts = read_prompts(folder / "prompts.jsonl", held_out=100)
    drawn = megabytes()
    with ReplyStore(folder / "replies.sqlite") as store:
        policy = store.remember(Instant("policy", ""))
        teacher = store.remember(Instant("teacher", "{teacher_reasoning}: None.\n\n{corrected_student_solution}:\n"))
        began = time.perf_counter()
        settings = CreateSettings.model_validate({"reviser": {"model": "teacher"}})
        summary = asyncio.run(create(Run(folder), settings, prompts, {"policy": policy, "teacher": teacher}, Silent()))
    seconds = time.perf_counter() - began
    assert summary.pairs == count - 100
    print(json.dumps({"bare": bare, "drawn": drawn, "peak": megabytes(), "seconds": seconds}))


def megabytes() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(count: int) -> dict[str, float]:
    with TemporaryDirectory() as scratch:
        write_prompts(Path(scratch) / "prompts.jsonl", count)
        done = subprocess.run(
            [sys.executable, __file__, "--run", scratch, "--prompts", str(count)], check=True, stdout=subprocess.PIPE
        )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=[20_000, 40_000, 80_000])
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="keep the results in docs/benchmarks.md")
    arguments = parser.parse_args()
    if arguments.run:
        run(arguments.run, arguments.prompts[0])
        return
    found = {count: measure(count) for count in arguments.prompts}
    lines = [
        "    python benchmarks/create_stream.py --write",
        "",
        "Peak resident memory of the create stage by the number of prompts, with models that answer at once.",
        "",
        "| prompts | imports, MB | after the draw | peak | rows per second |",
        "|--:|--:|--:|--:|--:|",
    ]
    for count, one in found.items():
        rate = count / one["seconds"]
        lines.append(f"| {count:,} | {one['bare']:.0f} | {one['drawn']:.0f} | {one['peak']:.0f} | {rate:.0f} |")
    least, most = min(found), max(found)
    if least < most:
        slope = (found[most]["peak"] - found[least]["peak"]) / (most - least)
        million = found[most]["peak"] + slope * (1_000_000 - most)
        lines += ["", f"{1e5 * slope:.0f} MB more for each 100,000 prompts: a million would take {million:.0f} MB."]
    page = "\n".join(lines)
    print(page)
    if arguments.write:
        write(page, "create_stream", "Memory of creating pairs")


if __name__ == "__main__":
    main()
