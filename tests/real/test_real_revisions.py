"""Ten real revisions by GPT-4, through the store and the stage, with nobody to ask: texts, contrast and filters."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from tiny_models import save_folder

from anchored.create.settings import CreateSettings
from anchored.create.stage import CreateSummary, create
from anchored.datasets_io import PromptRows, read_pairs, read_rows
from anchored.llm.chat import Reply, Request, Usage
from anchored.llm.prompt_files import fill, load
from anchored.llm.replies import Entry, ReplyStore
from anchored.progress import Silent
from anchored.records import Message, user_prompt
from anchored.runs import Run, read_lines
from anchored.train.settings import TrainSettings
from anchored.train.stage import TrainInputs, train

DATA = Path(os.environ.get("ANCHORED_REAL_DATA") or Path(__file__).parents[3] / "shared" / "data")
TRIPLES = DATA / "clair" / "triples.jsonl"

pytestmark = pytest.mark.skipif(not TRIPLES.exists(), reason=f"{TRIPLES} is missing (or set ANCHORED_REAL_DATA)")

LEAKS = {
    "60c78454": "In this corrected solution",
    "0401e23c": "Here's a corrected and feasible approach",
}
"""Of the ten, read one by one, these two speak of a correction; "correcting deviations in real-time" (48582075) is what
the robot does, "I hope this clears up any confusion" (5c48bee1) is meant for the reader. No length ratio leaves
[0.5, 2]: they are 0.509 to 1.624."""


class Nobody:
    """A chat that may not be asked: all replies must come from the store."""

    def __init__(self, name: str) -> None:
        self.name = self.fingerprint = name

    async def reply(self, request: Request) -> Reply:
        raise AssertionError(f"{self.name} was asked: {request}")

    async def close(self) -> None: ...


def triples() -> list[dict[str, Any]]:
    return [json.loads(line) for line in TRIPLES.read_text("utf-8").splitlines()]


def recorded(settings: CreateSettings) -> list[Entry]:
    """What policy and reviser answered, under the requests that the stage makes."""
    entries = []
    for triple in triples():
        sample = settings.sample.request([Message("user", triple["prompt"])])
        question = fill(load("create/reviser"), {"prompt": triple["prompt"], "answer": triple["rejected"]})
        revision = settings.reviser.request([Message("user", question)])
        usage = Usage(triple["usage"]["prompt_tokens"], triple["usage"]["completion_tokens"])
        entries += [
            Entry("policy", sample, Reply(triple["rejected"], "stop", "policy")),
            Entry(
                "reviser", revision, Reply(triple["response"], triple["finish_reason"], triple["model"], usage=usage)
            ),
        ]
    return entries


def create_from_recorded(folder: Path, **settings: object) -> CreateSummary:
    chosen = CreateSettings.model_validate({"reviser": {"model": "gpt-4-0125-preview"}, **settings})
    prompts = PromptRows([user_prompt(triple["prompt"], id=triple["id"]) for triple in triples()], [])

    async def run() -> CreateSummary:
        with ReplyStore(folder / "replies.sqlite") as store:
            store.put(recorded(chosen))
            chats = {"policy": store.remember(Nobody("policy")), "teacher": store.remember(Nobody("reviser"))}
            return await create(Run(folder), chosen, prompts, chats, Silent())

    return asyncio.run(run())


def test_without_filters_all_ten_become_pairs_with_the_expected_texts_and_contrast(tmp_path: Path) -> None:
    summary = create_from_recorded(tmp_path, filters=[])
    pairs = read_pairs(tmp_path / "pairs.parquet").pairs
    table = pyarrow.parquet.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert len(pairs) == 10
    for triple, pair, row in zip(triples(), pairs, table, strict=True):
        assert pair.prompt.id == triple["id"]
        assert pair.chosen.text == triple["expected"]["chosen"]
        assert pair.rejected.text == triple["rejected"]
        assert pair.rational == triple["expected"]["rational"]
        assert pair.chosen.model == "gpt-4-0125-preview"
        assert row["jaccard"] == pytest.approx(triple["expected"]["jaccard_whitespace"], abs=1e-5)
        assert row["levenshtein"] == triple["expected"]["levenshtein"]
    expected = [triple["expected"] for triple in triples()]
    mean = {key: sum(one[key] for one in expected) / 10 for key in ("jaccard_whitespace", "levenshtein")}
    assert summary.contrast["jaccard"] == pytest.approx(mean["jaccard_whitespace"], abs=1e-5)
    assert summary.contrast["levenshtein"] == pytest.approx(mean["levenshtein"])
    assert summary.replies["teacher"]["asked"] == summary.replies["policy"]["asked"] == 0
    assert summary.replies["teacher"]["completion_tokens"] == sum(
        one["usage"]["completion_tokens"] for one in triples()
    )


def test_the_default_filters_refuse_what_reading_the_revisions_refuses(tmp_path: Path) -> None:
    summary = create_from_recorded(tmp_path)
    refused = {row.prompt.id: row for row in read_rows(tmp_path / "refused.parquet")}
    assert {name: str(row.outcome) for name, row in refused.items()} == dict.fromkeys(LEAKS, "leak")
    for name, words in LEAKS.items():
        assert words in refused[name].detail
    assert summary.outcomes == {"ok": 8, "leak": 2}
    assert summary.pairs == 8


@pytest.mark.slow
def test_the_real_pairs_train_a_small_model_and_the_loss_falls(tmp_path: Path) -> None:
    create_from_recorded(tmp_path, filters=[])
    run = Run(tmp_path)
    settings = {"epochs": 6, "pairs_per_step": 5, "objective": {"name": "apo-zero", "beta": 0.1}}
    train(
        run,
        TrainSettings.model_validate({**settings, "optimizer": {"name": "rmsprop", "lr": 1e-4}}),
        TrainInputs(save_folder(tmp_path / "model"), read_rows(run.pairs)[:8], read_rows(run.pairs)[8:]),
        Silent(),
    )
    losses = [line["loss"] for line in read_lines(run.metrics)]
    assert losses[0] == pytest.approx(1.0, abs=1e-4)  # nothing moved yet: 1 - s(0) + s(0)
    assert losses[-1] < 0.8
    last = read_lines(run.metrics)[-1]
    assert last["reward_chosen"] > 0 > last["reward_rejected"]
