"""Prompts that a benchmark has are set aside by the command, counted, and kept for people to look at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import POCKET, anchored

from anchored.datasets_io import read_rows
from anchored.pocket import world
from anchored.records import Outcome
from anchored.runs import Run


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


@pytest.mark.slow
def test_what_the_benchmark_asks_is_not_trained_on(tmp_path: Path) -> None:
    texts = [prompt.messages[0].content for prompt in world.prompts(take=12, held_out=0, seed=5).prompts]
    data = write(tmp_path / "prompts.jsonl", texts)
    asked = write(tmp_path / "benchmark.jsonl", [texts[3].upper(), "Something else altogether?"])
    command = ("create", POCKET, f"create.prompts.data={data}", "create.prompts.held_out=2", "create.prompts.take=null")
    against = f"create.decontaminate={{against: ['{asked}'], words: 5}}"
    done = anchored(*command, against, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert "rows of the data are set aside as contaminated; the first: prompts.jsonl line" in done.out.replace(
        "\n", " "
    )
    run = Run(tmp_path / "run")
    rows = [row for path in (run.pairs, run.held_out, run.refused) for row in read_rows(path)]
    aside = [row for row in rows if row.outcome is Outcome.CONTAMINATED]
    assert texts[3] in {row.prompt.messages[0].content for row in aside}
    assert len(rows) == len(texts)
    wrong = anchored(*command, against.replace("benchmark", "nothing"), "--out", tmp_path / "other")
    assert (wrong.code, wrong.err.count("\n")) == (2, 1)
    assert "nothing.jsonl" in wrong.err
