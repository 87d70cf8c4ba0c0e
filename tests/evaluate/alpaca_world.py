"""A small benchmark of AlpacaEval's form, for tests: instructions of its own with tables of their own."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anchored.evaluate.alpaca_files import BASELINE, DIFFICULTY

N = 60


def instruction(place: int) -> str:
    return f"Question {place}?"


def write_json(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text(json.dumps(rows), "utf-8")
    return path


def baseline_rows(n: int = N) -> list[dict[str, str]]:
    rng = np.random.default_rng(0)
    return [
        {
            "dataset": "small",
            "instruction": instruction(place),
            "output": "b" * int(rng.integers(50, 400)),
            "generator": "base",
        }
        for place in range(n)
    ]


def output_rows(n: int = N, name: str = "mine") -> list[dict[str, str]]:
    rng = np.random.default_rng(1)
    lengths = rng.integers(50, 400, n)
    return [
        {"dataset": "small", "instruction": instruction(place), "output": "a" * int(size), "generator": name}
        for place, size in enumerate(lengths)
    ]


def save_world(folder: Path, *, regression: bool = True) -> Path:
    """A folder with the benchmark's files."""
    rng = np.random.default_rng(2)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / BASELINE, baseline_rows())
    difficulty = rng.normal(0, 1, N)
    with (folder / DIFFICULTY).open("w", newline="") as handle:
        csv.writer(handle).writerows([["", "instruction_difficulty"], *enumerate(difficulty)])
    if regression:
        header = ["model", "index", "std_delta_len", "instruction_difficulty", "not_gamed_baseline", "preference"]
        rows = [
            [model, place, sign * abs(rng.normal()), difficulty[place], False, 0.5 - sign * rng.uniform(0, 0.4)]
            for model, sign in (("concise", 1), ("verbose", -1))
            for place in range(N)
        ]
        with (folder / "df_gamed_small.csv").open("w", newline="") as handle:
            csv.writer(handle).writerows([header, *rows])
    return folder
