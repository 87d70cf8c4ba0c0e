"""How fast `anchored contrast` measures pairs, from a parquet file on disk to the row of Table 1.

    python benchmarks/contrast_speed.py [--pairs 29000] [--characters 2000] [--tokenizer whitespace] [--workers 2]

The answers are made of the words of Python's own reference, drawn one after the other as they follow one another there,
in sentences, lists and paragraphs. A revision keeps most sentences, changes words in some and writes others
anew; one in fifty speaks of being a revision. What is timed is the command's own work, in a fresh process each time:
reading, all measures, the mean, by as many workers as asked for. Peak memory is that process's, without its workers.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from random import Random

from anchored.contrast import MOST_WORKERS, contrast, find_tokenizer, jaccard, levenshtein, shared_prefix
from anchored.datasets_io import PairWriter, Refusals, read_pairs, stream_pairs
from anchored.leak import find_leak
from anchored.records import Answer, Pair, as_text, user_prompt

MEASURED_APART = 1000
"""Pairs."""


@dataclass
class Writer:
    """Draws words as they follow one another in a text."""

    rng: Random
    following: dict[str, list[str]]
    words: list[str]

    def sentence(self) -> str:
        word = self.rng.choice(self.words)
        words = [word]
        for _ in range(self.rng.randrange(5, 28)):
            word = self.rng.choice(self.following.get(word) or self.words)
            words.append(word)
        text = " ".join(words)
        return f"{text[0].upper()}{text[1:]}."

    def answer(self, characters: int) -> list[str]:
        """Sentences with what stands between them, about so many characters together."""
        sentences: list[str] = []
        while sum(map(len, sentences)) < characters:
            sentences.append(self.rng.choice(["", "", "", "- ", "**Note:** "]) + self.sentence())
            sentences.append(self.rng.choice([" ", " ", " ", "\n", "\n\n"]))
        return sentences

    def revised(self, sentences: Sequence[str]) -> list[str]:
        """The same with some of its words and some of its sentences changed."""
        return [self._revised(one) if one.strip() else one for one in sentences]

    def _revised(self, sentence: str) -> str:
        fate = self.rng.random()
        if fate < 0.55:
            return sentence
        if fate < 0.8:
            words = sentence.split()
            for _ in range(1 + len(words) // 8):
                words[self.rng.randrange(len(words))] = self.rng.choice(self.words)
            return " ".join(words)
        return self.sentence()


def make_writer(seed: int = 0) -> Writer:
    text = "\n".join(topics.values())
    words = re.findall(r"[A-Za-z][A-Za-z'-]*,?", text)
    following: dict[str, list[str]] = defaultdict(list)
    for word, after in pairwise(words):
        following[word].append(after)
    return Writer(Random(seed), following, words)


def make_pairs(count: int, characters: int) -> Iterator[Pair]:
    writer = make_writer()
    for number in range(count):
        rejected = writer.answer(characters)
        chosen = writer.revised(rejected)
        if number % 50 == 0:
            chosen.insert(0, "Here is the revised answer:\n\n")
        prompt = user_prompt(f"{number}. {writer.sentence()}")
        yield Pair(prompt, Answer("".join(chosen)), Answer("".join(rejected)), "clair")


def write(path: Path, count: int, characters: int) -> None:
    with PairWriter(path) as writer:
        for pair in make_pairs(count, characters):
            writer.write([pair])


def measure(path: Path, tokenizer: str, workers: int) -> None:
    """What the command does, and what it took: wall and CPU seconds, peak memory in MiB."""
    started = time.perf_counter()
    mean = contrast(stream_pairs(path, Refusals()), tokenizer, workers)
    wall = time.perf_counter() - started
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(one.ru_utime + one.ru_stime for one in used)
    status = Path("/proc/self/status").read_text()
    print(mean.pairs, wall, cpu, int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 1024)


def apart(path: Path, tokenizer: str) -> Iterator[tuple[str, float]]:
    """Microseconds a pair of each part."""
    pairs = read_pairs(path, take=MEASURED_APART).pairs
    tokenize = find_tokenizer(tokenizer)
    parts: dict[str, Callable[[str, str, Pair], object]] = {
        f"Jaccard ({tokenizer})": lambda a, b, pair: jaccard(a, b, tokenize),
        "Levenshtein": lambda a, b, pair: levenshtein(a, b),
        "shared prefix": lambda a, b, pair: shared_prefix(a, b),
        "leak": lambda a, b, pair: find_leak(a, as_text(pair.prompt), b),
    }
    for name, part in parts.items():
        started = time.process_time()
        for pair in pairs:
            part(pair.chosen.text, pair.rejected.text, pair)
        yield name, 1e6 * (time.process_time() - started) / len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=29_000)
    parser.add_argument("--characters", type=int, default=2000)
    parser.add_argument("--tokenizer", default="whitespace")
    parser.add_argument("--workers", type=int, default=min(MOST_WORKERS, os.cpu_count() or 1))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        measure(asked.measure, asked.tokenizer, asked.workers)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.parquet"
        write(path, asked.pairs, asked.characters)
        mean = contrast(stream_pairs(path, Refusals()), asked.tokenizer, asked.workers)
        print(
            f"{mean.pairs:,} pairs of about {asked.characters:,} characters, {path.stat().st_size / 2**20:.0f} MiB of "
            f"parquet: Jaccard {mean.jaccard:.1f} ({mean.tokenizer}), Levenshtein {mean.levenshtein:,.0f}, leaks "
            f"{100 * mean.leak_rate:.1f} %"
        )
        for name, microseconds in apart(path, asked.tokenizer):
            print(f"  {name}: {microseconds:,.0f} µs a pair")
        command = [sys.executable, __file__, "--measure", str(path), "--tokenizer", asked.tokenizer]
        command += ["--workers", str(asked.workers)]
        runs = [
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            for _ in range(asked.repeats)
        ]
    walls, cpus, peaks = ([float(run[place]) for run in runs] for place in (1, 2, 3))
    wall, cpu = statistics.median(walls), statistics.median(cpus)
    print(
        f"contrast, {asked.workers} workers: {mean.pairs / wall:,.0f} pairs/s, {wall:.1f} s (CPU {cpu:.1f} s, median "
        f"of {len(runs)}), peak memory {max(peaks):.0f} MiB"
    )


if __name__ == "__main__":
    main()
