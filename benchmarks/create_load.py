"""Asking an endpoint at full load: Anchored's way from request to stored reply, against the plain `openai` client.

    python benchmarks/create_load.py [--rounds 3] [--write]

The endpoint is a local process that answers every chat completion after half a second with 2 KB of text. Ours asks as
the create stage does: through the store of replies on the disk, with the endpoint's limits, retries and money counted.
The plain client is `AsyncOpenAI` with its default transport, in a loop with a semaphore, and keeps nothing. The floor
is what no client can beat: requests made beforehand, written to bare sockets the moment a reply is whole, which is not
read; what it lacks of the ideal is the endpoint's and the machine's. Every run is a process of its own, all take turns.
With 64 in flight the ideal is a time, half a second for each 64 requests; with 512 it is the machine that is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import multiprocessing
import os
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from train_vs_trl import write

LATENCY = 0.5
ANSWER = "The winning answer is a minimal revision of the losing one. " * 34
PROMPT = "Improve this answer and keep what is right about it. " * 20
OURS, PLAIN, FLOOR = "anchored", "openai", "bare sockets"


# the endpoint


class Answering(asyncio.Protocol):
    """HTTP as far as needed: whole requests with a Content-Length in, a response out, half a second later.

    It is the first of `responses` whose key the request holds.
    """

    def __init__(self, responses: Mapping[bytes, bytes]) -> None:
        self._responses = responses
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, rest = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        if len(rest) >= length:
            self._received = rest[length:]
            response = next(response for key, response in self._responses.items() if key in rest)
            asyncio.get_running_loop().call_later(LATENCY, self._transport.write, response)


def response_of(answer: str) -> bytes:
    """The whole HTTP response of a chat completion."""
    usage = {"prompt_tokens": 250, "completion_tokens": 450, "total_tokens": 700}
    choice = {"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}
    whole = {"id": "1", "object": "chat.completion", "created": 1, "model": "load", "choices": [choice], "usage": usage}
    body = json.dumps(whole).encode()
    return f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def endpoint(ready: Connection, answers: Mapping[str, str]) -> None:
    """Serve until the process is ended."""
    responses = {key.encode(): response_of(answer) for key, answer in answers.items()}

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Answering(responses), "127.0.0.1", 0, backlog=1024)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


@contextlib.contextmanager
def running_endpoint(answers: Mapping[str, str]) -> Iterator[str]:
    """Its base URL; a request gets the first of `answers` whose key it holds."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=endpoint, args=(there, answers), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{here.recv()}/v1"
    finally:
        process.terminate()
        process.join()


# the sides, each in a process of its own


async def ask_as_anchored(url: str, in_flight: int, count: int, folder: Path) -> float:
    from anchored.llm.ask import work_through
    from anchored.llm.chat import Reply, Request
    from anchored.llm.endpoints import open_endpoints
    from anchored.llm.money import Purse
    from anchored.llm.replies import ReplyStore
    from anchored.llm.settings import EndpointSettings, Price
    from anchored.records import Message

    price = Price(input=2.5, output=10)
    settings = EndpointSettings(model="load", base_url=url, key_env=None, concurrency=in_flight, price=price)
    with ReplyStore(folder / "replies.sqlite") as store:
        purse = Purse(1e6, store.spent())
        chat = store.remember(open_endpoints(settings, purse=purse), purse)

        async def work(_: int, request: Request) -> Reply:
            return await chat.reply(request)

        requests = (Request((Message("user", f"{number}: {PROMPT}"),)) for number in range(count))
        started = time.perf_counter()
        replies = await work_through(requests, work)
        seconds = time.perf_counter() - started
        await chat.close()
        assert store.count() == count
    assert all(reply.text == ANSWER for reply in replies)
    return seconds


async def ask_as_plain_client(url: str, in_flight: int, count: int) -> float:
    import openai

    # its connections take longer than its default lets them, with so many at once
    client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
    slots = asyncio.Semaphore(in_flight)

    async def work(number: int) -> str | None:
        async with slots:
            reply = await client.chat.completions.create(**plain_body(number))
        return reply.choices[0].message.content

    started = time.perf_counter()
    texts = await asyncio.gather(*map(work, range(count)))
    seconds = time.perf_counter() - started
    await client.close()
    assert all(text == ANSWER for text in texts)
    return seconds


class Asking(asyncio.Protocol):
    """Sends the next of `requests` as soon as the reply to the last is whole, until there are none."""

    def __init__(self, requests: Iterator[bytes]) -> None:
        self.ended = asyncio.get_running_loop().create_future()
        self._requests = requests
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, rest = self._received.partition(b"\r\n\r\n")
        if found and len(rest) == int(head.partition(b"Content-Length: ")[2]):
            self._received = b""
            self._send()

    def _send(self) -> None:
        if request := next(self._requests, None):
            self._transport.write(request)
        else:
            self._transport.close()
            self.ended.set_result(None)


async def ask_over_bare_sockets(url: str, in_flight: int, bodies: Iterable[bytes]) -> float:
    """Seconds until all of these JSON bodies are answered."""
    address = urlsplit(url)
    head = f"POST {address.path}/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: ".encode()
    requests = iter([head + b"%d\r\n\r\n" % len(body) + body for body in bodies])
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    made = await asyncio.gather(
        *(loop.create_connection(lambda: Asking(requests), address.hostname, address.port) for _ in range(in_flight))
    )
    await asyncio.gather(*(asking.ended for _, asking in made))
    return time.perf_counter() - started


def plain_body(number: int) -> dict[str, Any]:
    return {
        "model": "load",
        "messages": [{"role": "user", "content": f"{number}: {PROMPT}"}],
        "temperature": 0.7,
        "max_tokens": 1024,
        "seed": number,
    }


def run_here(side: str, url: str, in_flight: int, count: int) -> None:
    """One side's run in this process; its figures on stdout."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with TemporaryDirectory(dir=Path.cwd()) as folder:
        before = time.process_time()
        if side == OURS:
            seconds = asyncio.run(ask_as_anchored(url, in_flight, count, Path(folder)))
        elif side == PLAIN:
            seconds = asyncio.run(ask_as_plain_client(url, in_flight, count))
        else:
            bodies = (json.dumps(plain_body(number)).encode() for number in range(count))
            seconds = asyncio.run(ask_over_bare_sockets(url, in_flight, bodies))
        print(json.dumps({"seconds": seconds, "cpu": time.process_time() - before}))


def run(side: str, url: str, in_flight: int, count: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", side, url, str(in_flight), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# what came out


def measured(arguments: argparse.Namespace, url: str) -> dict[tuple[int, str], list[dict[str, Any]]]:
    runs: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for turn in range(arguments.rounds):
        for in_flight, count in ((64, arguments.requests_64), (512, arguments.requests_512)):
            for side in (FLOOR, OURS, PLAIN):
                figures = run(side, url, in_flight, count)
                runs.setdefault((in_flight, side), []).append(figures | {"rate": count / figures["seconds"]})
                rate = count / figures["seconds"]
                print(f"round {turn + 1}: {side}, {in_flight} in flight: {rate:.0f}/s", file=sys.stderr, flush=True)
    return runs


def section(runs: dict[tuple[int, str], list[dict[str, Any]]], arguments: argparse.Namespace, load: float) -> str:
    def median(key: tuple[int, str], name: str) -> float:
        return statistics.median(figures[name] for figures in runs[key])

    counts = {64: arguments.requests_64, 512: arguments.requests_512}
    rows = ["| in flight | client | requests/s | of the ideal time | CPU ms per request |", "|--:|---|--:|--:|--:|"]
    for in_flight, side in runs:
        key, count = (in_flight, side), counts[in_flight]
        ideal = count / in_flight * LATENCY
        rows.append(
            f"| {in_flight} | {side} | {median(key, 'rate'):.0f} | {median(key, 'seconds') / ideal:.3f} "
            f"| {1000 * median(key, 'cpu') / count:.2f} |"
        )
    ratio = median((512, OURS), "rate") / median((512, PLAIN), "rate")
    over = median((64, OURS), "seconds") / median((64, FLOOR), "seconds")
    about = (
        f"{datetime.date.today():%Y-%m-%d}, {os.cpu_count()} cores shared with the endpoint (load average {load:.1f} "
        f"before it began), openai {version('openai')}, aiohttp {version('aiohttp')}. Answers of 2 KB after {LATENCY} "
        f"s; {counts[64]} and {counts[512]} requests, medians of {arguments.rounds} rounds in which all take turns. "
        "Ours stores every reply on the disk before it is given, and counts its money; the plain client keeps "
        "nothing, and bare sockets, the floor, do not even read."
    )
    command = shlex.join(["python", "benchmarks/create_load.py", *sys.argv[1:]])
    return "\n".join(
        [
            *(f"    {command}", "", about, "", *rows, ""),
            f"With 64 in flight ours takes {over:.3f} times the floor's time; with 512 it has {ratio:.2f} times the "
            "plain rate.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests-64", type=int, default=2560, help="with 64 in flight")
    parser.add_argument("--requests-512", type=int, default=4096, help="with 512 in flight")
    parser.add_argument("--write", action="store_true", help="keep the results in docs/benchmarks.md")
    parser.add_argument("--side", nargs=4, metavar=("SIDE", "URL", "IN_FLIGHT", "COUNT"), help="one run, in here")
    arguments = parser.parse_args()
    if arguments.side:
        side, url, in_flight, count = arguments.side
        run_here(side, url, int(in_flight), int(count))
        return
    with running_endpoint({"": ANSWER}) as url:
        load = os.getloadavg()[0]
        text = section(measured(arguments, url), arguments, load)
    print(text)
    if arguments.write:
        write(text, "create_load", "Asking an endpoint at full load")


if __name__ == "__main__":
    main()
