"""Rows in Arrow memory are the rows of the files, and search finds what a plain loop finds."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from report_runs import hostile_pairs, pair, refused_pairs, write_created, write_rows

from anchored.contrast import jaccard, length_ratio
from anchored.datasets_io import each_pair, read_rows, write_pairs
from anchored.errors import DataError
from anchored.inspect.rows import Rows, load_rows
from anchored.inspect.views import Query, look
from anchored.progress import Silent
from anchored.records import Answer, Message, Outcome, Pair, Prompt
from anchored.runs import Run


def load(source: object) -> Rows:
    return load_rows(str(source), None, Silent())


def pairs_of(rows: Rows) -> list[Pair]:
    return [rows.pair(row) for row in range(len(rows))]


def said_by(pair: Pair) -> str:
    turns = "\n".join(turn.content for turn in pair.prompt.messages)
    return "\n".join((pair.prompt.id, turns, pair.chosen.text, pair.rejected.text, pair.rational, pair.detail))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    write_created(run, refused_pairs())
    return run


def test_a_run_folder_shows_all_its_rows_with_their_files_and_outcomes(run: Run) -> None:
    rows = load(run.folder)
    assert pairs_of(rows) == [row for path in (run.pairs, run.held_out, run.refused) for row in read_rows(path)]
    groups = [rows.groups.of(row) for row in range(len(rows))]
    assert groups == ["training"] * 10 + ["held-out"] * 2 + ["refused"] * 4
    assert rows.outcomes.of(12) == "length_ratio"


def test_our_own_parquet_is_the_same_as_columns_and_as_rows(tmp_path: Path) -> None:
    turns = (Message("system", "s"), Message("user", "u"))
    kept = [*hostile_pairs(), replace(pair("a", "b"), prompt=Prompt(turns, "t"))]
    write_pairs(tmp_path / "pairs.parquet", kept)
    write_pairs(tmp_path / "pairs.jsonl", kept)
    assert pairs_of(load(tmp_path / "pairs.parquet")) == pairs_of(load(tmp_path / "pairs.jsonl"))
    assert pairs_of(load(tmp_path / "pairs.parquet")) == list(each_pair(tmp_path / "pairs.parquet"))


def test_foreign_rows_are_read_by_their_layout_and_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    lines = [
        {"prompt": "Hi", "chosen": "Hello there", "rejected": "Hello"},
        {"prompt": "Hi", "chosen": "same", "rejected": "same"},
        {"prompt": "Hi", "completion": "x", "label": True},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\nnot json\n")
    rows = load(path)
    assert [rows.outcomes.of(row) for row in range(4)] == ["ok", "identical", "malformed", "malformed"]
    assert [rows.groups.of(row) for row in range(4)] == ["training", "refused", "refused", "refused"]
    assert rows.jaccards([0, 1])[0] == 50
    assert math.isnan(rows.jaccards([1])[0])
    assert rows.title(0) == "Hi"
    assert rows.title(3).startswith("(no prompt)")


@pytest.mark.parametrize("text", ["", '{"prompt": "Hi"}\n', '{"prompt": "a", "completion": "b", "label": true}\n'])
def test_data_without_a_pair_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"data\.jsonl"):
        load(tmp_path / "data.jsonl")


def test_what_is_not_there_or_no_parquet_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load(tmp_path / "gone.jsonl")
    (tmp_path / "pairs.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(DataError, match=r"pairs\.parquet"):
        load(tmp_path / "pairs.parquet")
    with pytest.raises(DataError, match=r"pairs\.parquet"):
        load(tmp_path)


def test_a_run_folder_without_pairs_says_so(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.recipe.write_text("policy: {model: x}\n")
    run.metrics.write_text('{"step": 1}\n')
    with pytest.raises(DataError, match="has no pairs"):
        load(tmp_path)


def test_a_run_in_which_every_row_was_refused_can_be_looked_at(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    write_rows(run.refused, refused_pairs())
    assert len(load(run.folder)) == 4


def test_measures_are_those_of_contrast(run: Run) -> None:
    rows = load(run.folder)
    measured = rows.jaccards(range(len(rows)))
    for row, one in enumerate(pairs_of(rows)):
        if one.chosen.text and one.rejected.text:
            assert measured[row] == pytest.approx(jaccard(one.chosen.text, one.rejected.text))
            assert rows.length_ratios[row] == pytest.approx(length_ratio(one.chosen.text, one.rejected.text))
        else:
            assert math.isnan(measured[row])
            assert math.isnan(rows.length_ratios[row])


def many(tmp_path: Path, n: int) -> list[Pair]:
    """Rows over several slices, written as several row groups, with prompts of one to three turns."""
    rng = random.Random(0)
    words = ["alpha", "Beta", "GAMMA", "élan", "ÉLAN", "Straße", "雨が", "delta.", "(x)", "50%", "a_b", "\\d+", "ß"]
    made = []
    for number in range(n):
        turns = [Message("user", " ".join(rng.choices(words, k=3))) for _ in range(rng.randint(1, 3))]
        between = [part for turn in turns for part in (turn, Message("assistant", f"reply {number}"))][:-1]
        text, other = " ".join(rng.choices(words, k=5)), " ".join(rng.choices(words, k=5))
        made.append(Pair(Prompt(tuple(between), f"id-{number}"), Answer(text), Answer(other), rational=f"Why {number}"))
    write_rows(tmp_path / "pairs.parquet", made)
    return made


def test_search_finds_what_a_plain_loop_finds(tmp_path: Path) -> None:
    made = many(tmp_path, 9000)
    rows = load(tmp_path)
    texts = [said_by(one).lower() for one in made]
    needles = (
        "gam",
        "gamma",
        "gamma b",
        "éla",
        "WHY 8999",
        "id-77",
        "reply 4096",
        "雨が",
        "(x) 50%",
        "\\d+",
        "a_b",
        "",
        "zz",
    )
    for words in needles:
        found = rows.saying(words).nonzero()[0].tolist()
        assert found == [row for row, text in enumerate(texts) if words.lower() in text], words


def test_views_filter_count_and_order(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    write_created(run, refused_pairs())
    rows = load(run.folder)
    decided = rows.outcomes.codes.astype("int8") * 0
    decided[[0, 12]] = [2, 1]

    def found(**query: str) -> list[int]:
        return look(rows, decided, Query(**query)).rows.tolist()

    assert found() == list(range(16))
    assert found(show="held-out") == [10, 11]
    assert found(show="refused") == [12, 13, 14, 15]
    assert found(show="leak") == [13]
    assert found(show="nothing") == []
    assert found(decision="drop") == [0]
    assert found(decision="undecided", show="refused") == [13, 14, 15]
    assert found(method="clair") == list(range(15))
    assert found(search="line 7") == [15]
    view = look(rows, decided, Query(show="refused", search="e"))
    assert ["", "all rows", 16] in view.shows
    assert ["leak", "refused: leak", 1] in view.shows
    assert ["keep", "keep", 1] in view.decisions
    assert ["undecided", "undecided", 3] in view.decisions
    assert ["clair", "clair", 3] in view.methods
    measured = rows.jaccards(range(16))
    unlike = found(order="unlike")
    assert [measured[row] for row in unlike[:-2]] == sorted(measured[row] for row in range(14))
    assert set(unlike[-2:]) == {14, 15}
    ratios = [rows.length_ratios[row] for row in found(order="longer")[:-2]]
    assert ratios == sorted(ratios, reverse=True)
    assert found(order="alike")[:2] == sorted(found(order="alike")[:2], key=lambda row: -measured[row])
    assert Outcome.OK in rows.outcomes.names
