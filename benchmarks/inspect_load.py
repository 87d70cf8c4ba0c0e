"""How `anchored inspect` stands 100,000 pairs: start, memory, search, one pair, and the list while it is scrolled.

    python benchmarks/inspect_load.py --pairs 100000 --browser

A run folder of made-up pairs (answers of about 2 KB, the chosen one a revision of the rejected one; 5 % of the rows
refused, 1 % held out) is written once; the command itself is started on it and asked over HTTP, as its page asks.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pyarrow.parquet

from anchored.contrast import Contrast, contrasts
from anchored.datasets_io import write_pairs
from anchored.records import Answer, Outcome, Pair, user_prompt
from anchored.runs import Run

WORDS = 350
"""Of an answer: about 2 KB."""
CHANGED = 0.1
"""Share of words that a revision replaces."""
DISTINCT = 5000
"""Pairs whose answers are made up; the others repeat them under prompts and names of their own."""
NEEDLE = "the needle of row"
SEARCHES = ("e", "er", "zyx", "needle of row 77", "Revised because", "no such words at all", "ARADA", "lorem ipsum")
FRAMES = """async () => {
    const list = document.getElementById('list'), gaps = [];
    let before = await new Promise(requestAnimationFrame), blank = 0;
    for (let step = 0; step < 300; step += 1) {
        list.scrollTop += step < 200 ? 173 : list.scrollHeight / 120;
        const now = await new Promise(requestAnimationFrame);
        gaps.push(now - before);
        before = now;
        blank += list.querySelectorAll('[aria-busy]').length > 20;
    }
    return { gaps, blank, entries: list.querySelectorAll('.entry').length };
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, default=Path("build/inspect"))
    parser.add_argument("--browser", action="store_true", help="scroll the page in a headless Chromium, too")
    asked = parser.parse_args()
    run = Run(asked.folder / str(asked.pairs))
    if not run.pairs.exists():
        make_run(run, asked.pairs)
    size = sum(path.stat().st_size for path in (run.pairs, run.held_out, run.refused)) / 2**20
    print(f"{asked.pairs:,} rows, {size:.0f} MB of parquet")
    with inspecting(run.folder) as served:
        print(f"start: {served.seconds:.1f} s, {served.cpu():.1f} of the CPU; memory {served.memory():.0f} MB")
        measure(served)
        if asked.browser:
            scroll(served.address)
        print(f"memory at the end: {served.memory():.0f} MB, at most {served.memory('VmHWM'):.0f} MB")


def make_run(run: Run, n: int) -> None:
    """Write the files of a run with `n` rows."""
    run.folder.mkdir(parents=True, exist_ok=True)
    texts = _texts(min(n, DISTINCT))
    counts = {run.held_out: n // 100, run.refused: n // 20, run.pairs: n - n // 100 - n // 20}
    for path, count in counts.items():
        outcome = Outcome.LENGTH_RATIO if path == run.refused else Outcome.OK
        with _parts(path) as write:
            for start in range(0, count, DISTINCT):
                rows = range(start, min(start + DISTINCT, count))
                write([_pair(texts[row % DISTINCT], f"{path.stem}-{row}", outcome, row) for row in rows], texts)


@dataclass
class Served:
    """The command while it serves."""

    process: subprocess.Popen[str]
    address: str
    seconds: float
    """From its start to the address it prints."""

    def ask(self, path: str, **query: object) -> Any:
        host, token = self.address.removeprefix("http://").split("/#")
        connection = http.client.HTTPConnection(host, timeout=60)
        connection.request("GET", f"{path}?{urlencode(query)}", headers={"X-Anchored-Token": token})
        return json.loads(connection.getresponse().read())

    def cpu(self) -> float:
        """Seconds of all its threads so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self, which: str = "VmRSS") -> float:
        """MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split(f"{which}:")[1].split()[0]) / 1024


@contextmanager
def inspecting(folder: Path) -> Iterator[Served]:
    """`anchored inspect` on a folder, until the block ends."""
    command = [sys.executable, "-m", "anchored", "inspect", str(folder), "--no-browser"]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        lines = [process.stdout.readline().strip() for _ in range(2)]
        try:
            yield Served(process, lines[1], time.perf_counter() - began)
        finally:
            process.send_signal(signal.SIGINT)


def measure(served: Served) -> None:
    """Print how long the page's questions take."""
    for words in SEARCHES:
        began = served.cpu()
        first, found = _timed(lambda words=words: served.ask("/api/view", search=words))
        used = 1000 * (served.cpu() - began)
        again, _ = _timed(lambda words=words: served.ask("/api/view", search=words))
        print(
            f"search {words!r}: {found['total']:,} rows in {first:.0f} ms ({used:.0f} of the CPU), again {again:.0f} ms"
        )
    for query in ({"show": "refused"}, {"order": "unlike"}, {"order": "alike"}, {"order": "longer"}):
        took, view = _timed(lambda query=query: served.ask("/api/view", **query))
        print(f"view {query}: {view['total']:,} rows in {took:.0f} ms")
    view = served.ask("/api/view")
    starts = range(0, view["total"], max(1, view["total"] // 50))
    lists = [_timed(lambda at=at: served.ask("/api/rows", view=view["view"], start=at, count=100))[0] for at in starts]
    pairs = [_timed(lambda at=at: served.ask("/api/pair", row=at))[0] for at in starts]
    print(f"100 rows of the list: {_spread(lists)}; one pair with its differences: {_spread(pairs)}")


def scroll(address: str) -> None:
    """Print what the browser's frames take while the list is scrolled: slowly, then through all of it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(address)
        page.locator("#row-5").wait_for()
        found = page.evaluate(FRAMES)
        browser.close()
    gaps = sorted(found["gaps"])
    print(
        f"scrolling: {_spread(gaps)} a frame, {gaps[int(len(gaps) * 0.95)]:.0f} ms at the 95th percentile; "
        f"{found['entries']} rows in the page; {found['blank']} of {len(gaps)} frames before their rows came"
    )


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds and the result."""
    began = time.perf_counter()
    result = work()
    return 1000 * (time.perf_counter() - began), result


def _spread(milliseconds: list[float]) -> str:
    return f"{statistics.median(milliseconds):.0f} ms (at most {max(milliseconds):.0f})"


@dataclass
class Texts:
    """Two answers, and how far they differ."""

    chosen: str
    rejected: str
    contrast: Contrast


@contextmanager
def _parts(path: Path) -> Iterator[Callable[[list[Pair], list[Texts]], None]]:
    """Pairs in parts into one parquet file, as `create` writes them."""
    part, writer = path.with_name("part.parquet"), None

    def write(pairs: list[Pair], texts: list[Texts]) -> None:
        nonlocal writer
        columns = ("jaccard", "levenshtein", "length_ratio")
        each = [one.contrast for one in texts[: len(pairs)]]
        write_pairs(part, pairs, {name: [float(getattr(one, name)) for one in each] for name in columns})
        table = pyarrow.parquet.read_table(part)
        writer = writer or pyarrow.parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)

    yield write
    if writer:
        writer.close()
    part.unlink(missing_ok=True)


def _texts(n: int) -> list[Texts]:
    rng = np.random.default_rng(0)
    syllables = [a + b for a in "bcdfglmnprstv" for b in "aeiou"]
    words = ["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(8000)]
    vocabulary = np.array(words, dtype=object)
    made = []
    for _ in range(n):
        # common words are common: the square of a uniform number
        drawn = (rng.random((2, WORDS)) ** 2 * len(vocabulary)).astype(int)
        rejected = vocabulary[drawn[0]]
        chosen = np.where(rng.random(WORDS) < CHANGED, vocabulary[drawn[1]], rejected)
        answers = [" ".join(one).capitalize() + "." for one in (chosen, rejected)]
        contrast = contrasts([Pair(user_prompt("?"), Answer(answers[0]), Answer(answers[1]))])[0]
        made.append(Texts(*answers, contrast))
    return made


def _pair(texts: Texts, name: str, outcome: Outcome, row: int) -> Pair:
    prompt = user_prompt(f"{texts.rejected[:80]}? {NEEDLE} {row}.", id=name)
    answers = Answer(texts.chosen, "teacher"), Answer(texts.rejected, "policy")
    detail = "" if outcome is Outcome.OK else "2.314 times as long"
    rational = f"Revised because {texts.rejected[:300]}"
    return Pair(prompt, *answers, method="clair", rational=rational, outcome=outcome, detail=detail)


if __name__ == "__main__":
    main()
