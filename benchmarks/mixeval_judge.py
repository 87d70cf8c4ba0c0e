"""Grading 1000 answers to MixEval-Hard by a judge that takes half a second, 64 at a time.

    python benchmarks/mixeval_judge.py DATA [--rounds 3] [--write]

DATA is what `evaluate.mixeval.data` may be: a folder or a clone with the benchmark's files. Every answer is another
one, so that none of the thousand questions to the judge is asked for two rows. Ours is the benchmark as the evaluate
stage runs it, from answers to grades, with each verdict in the store of replies before it counts. The floor sends the
same thousand requests, made beforehand, over bare sockets. Every run is a process of its own, the two take turns;
the endpoint is that of `create_load.py`. The ideal is 16 waves of half a second.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from create_load import FLOOR, LATENCY, OURS, ask_over_bare_sockets, running_endpoint
from train_vs_trl import write

from anchored.evaluate.benchmark import Answered
from anchored.evaluate.mixeval_hard import MixEvalHard
from anchored.evaluate.settings import EvaluateSettings
from anchored.llm.bodies import request_body
from anchored.llm.chat import Reply, Request
from anchored.llm.endpoints import open_endpoints
from anchored.llm.replies import ReplyStore
from anchored.llm.settings import EndpointSettings

IN_FLIGHT = 64
ROWS = 1000
VERSION = "2024-06-01"
IDEAL = math.ceil(ROWS / IN_FLIGHT) * LATENCY
ANSWER = "In the case of {}: " + "it is the first of them, by what the question says and what one knows of it. " * 8
VERDICTS = {
    "multiple-choice": "The answer settles on the first option and gives a reason for it.\n[[A]]",
    "": "The answer names one of the two things that were asked for, in other words than the accepted one.\n[[0.5]]",
}
"""By what the request holds."""


class Recorder:
    """A judge at hand, which writes down the JSON of what it is asked."""

    name = fingerprint = "recorder"

    def __init__(self, settings: EndpointSettings) -> None:
        self.bodies: list[bytes] = []
        self._settings = settings

    async def reply(self, request: Request) -> Reply:
        body = json.dumps(request_body(self._settings, request))
        self.bodies.append(body.encode())
        return Reply(next(text for key, text in VERDICTS.items() if key in body), "stop", self.name)

    async def close(self) -> None: ...


async def measure(side: str, url: str, data: str, folder: Path) -> float:
    """Seconds of one side's run."""
    judge = {"model": "judge", "base_url": url, "key_env": None, "concurrency": IN_FLIGHT}
    settings = EvaluateSettings.model_validate({"judge": judge, "mixeval": {"data": data}})
    assert settings.judge
    benchmark = MixEvalHard(VERSION, settings)
    answers = [Answered(item, ANSWER.format(item.id)) for item in benchmark.items()]
    if side == FLOOR:
        recorder = Recorder(settings.judge)
        await benchmark.grade_all(answers, recorder, lambda: None)
        assert len(recorder.bodies) == ROWS
        return await ask_over_bare_sockets(url, IN_FLIGHT, recorder.bodies)
    with ReplyStore(folder / "replies.sqlite") as store:
        chat = store.remember(open_endpoints(settings.judge))
        started = time.perf_counter()
        grades = await benchmark.grade_all(answers, chat, lambda: None)
        seconds = time.perf_counter() - started
        await chat.close()
        assert store.count() == ROWS
    assert len(grades) == ROWS
    assert all(grade.grades and not grade.remarks for grade in grades)
    return seconds


def run_here(side: str, url: str, data: str) -> None:
    """One side's run in this process; its figures on stdout."""
    with TemporaryDirectory(dir=Path.cwd()) as folder:
        before = time.process_time()
        seconds = asyncio.run(measure(side, url, data, Path(folder)))
        print(json.dumps({"seconds": seconds, "cpu": time.process_time() - before}))


def run(side: str, url: str, data: str) -> dict[str, Any]:
    command = [sys.executable, __file__, data, "--side", side, url]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def section(runs: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace, load: float) -> str:
    rows = ["| | seconds | of the ideal time | CPU s |", "|---|--:|--:|--:|"]
    median = {
        side: {name: statistics.median(one[name] for one in figures) for name in ("seconds", "cpu")}
        for side, figures in runs.items()
    }
    for side, figures in median.items():
        seconds = figures["seconds"]
        rows.append(f"| {side} | {seconds:.2f} | {seconds / IDEAL:.3f} | {figures['cpu']:.2f} |")
    about = (
        f"{datetime.date.today():%Y-%m-%d}, {os.cpu_count()} cores shared with the judge (load average {load:.1f} "
        f"before it began). MixEval-Hard {VERSION}, {ROWS} answers of about {len(ANSWER)} characters, {ROWS} questions "
        f"to a judge that replies after {LATENCY} s, {IN_FLIGHT} in flight: ideally {IDEAL:.1f} s. Medians of "
        f"{arguments.rounds} rounds in which both take turns. Ours is all from answers to grades, with every verdict "
        "on the disk before it counts; bare sockets, the floor, send the same requests, made beforehand, and do not "
        "even read."
    )
    over = median[OURS]["seconds"] / median[FLOOR]["seconds"]
    command = "python benchmarks/mixeval_judge.py DATA" + (" --write" if arguments.write else "")
    return "\n".join([f"    {command}", "", about, "", *rows, "", f"Ours takes {over:.3f} times the floor's time."])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", metavar="DATA", help="where the benchmark's files are")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="keep the results in docs/benchmarks.md")
    parser.add_argument("--side", nargs=2, metavar=("SIDE", "URL"), help="one run, in here")
    arguments = parser.parse_args()
    if arguments.side:
        run_here(*arguments.side, arguments.data)
        return
    load = os.getloadavg()[0]
    runs: dict[str, list[dict[str, Any]]] = {FLOOR: [], OURS: []}
    with running_endpoint(VERDICTS) as url:
        for turn in range(arguments.rounds):
            for side, figures in runs.items():
                figures.append(run(side, url, arguments.data))
                print(f"round {turn + 1}: {side}: {figures[-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
    text = section(runs, arguments, load)
    print(text)
    if arguments.write:
        write(text, "mixeval_judge", "A judge over MixEval-Hard")


if __name__ == "__main__":
    main()
