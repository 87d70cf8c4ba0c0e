from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from anchored.errors import EvaluationError
from anchored.evaluate.questions import Questions
from anchored.evaluate.settings import EvaluateSettings
from anchored.evaluate.stage import Checkpoint, evaluate
from anchored.llm.chat import Chat
from anchored.progress import Silent
from anchored.runs import Run


def test_two_benchmarks_of_one_name_are_refused_before_a_model_is_asked(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.jsonl").write_text('{"prompt": "x", "answer": "y"}')
    benchmarks = [Questions(tmp_path / folder / "test.jsonl") for folder in ("a", "b")]

    def open_chat(checkpoint: Checkpoint) -> Chat:
        raise AssertionError(checkpoint)

    run, start = Run(tmp_path / "run"), Checkpoint("start", 0, "nowhere")
    with pytest.raises(EvaluationError, match=r"two are named 'test'.*rename a file"):
        asyncio.run(evaluate(run, EvaluateSettings(), benchmarks, [start], open_chat, Silent()))
