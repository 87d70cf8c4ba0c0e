"""What people decided: what it makes of a pair, and a file that nothing breaks and nobody's decision is lost from."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest

from anchored.datasets_io import read_rows, write_pairs
from anchored.decisions import (
    Decision,
    DecisionFile,
    Decisions,
    Key,
    apply,
    decide,
    key_of,
    obstacle,
    read_decisions,
    unedited,
)
from anchored.errors import DataError
from anchored.records import Answer, Message, Outcome, Pair, Prompt, user_prompt

PAIR = Pair(user_prompt("Is water wet?", id="p1"), Answer("Yes, it is.", "teacher"), Answer("Yes.", "policy"), "clair")
REFUSED = replace(PAIR, outcome=Outcome.LENGTH_RATIO, detail="2.750 times as long")


def holding(*decisions: Decision) -> Decisions:
    held = Decisions()
    for decision in decisions:
        held.add(decision)
    return held


def test_a_pair_that_nobody_decided_about_stays_as_it_is() -> None:
    other = replace(PAIR, prompt=replace(PAIR.prompt, id="p2"))
    assert apply(PAIR, Decisions()) is PAIR
    assert apply(PAIR, holding(decide(other, "drop"))) is PAIR


def test_drop_refuses_by_name_and_leaves_the_reason_of_what_was_refused_already() -> None:
    dropped = apply(PAIR, holding(decide(PAIR, "drop", note="dull")))
    assert (dropped.outcome, dropped.detail) == (Outcome.DROPPED, "dropped by a person (dull)")
    assert (dropped.chosen, dropped.rejected) == (PAIR.chosen, PAIR.rejected)
    assert apply(REFUSED, holding(decide(REFUSED, "drop"))) is REFUSED


def test_keep_accepts_what_was_refused_and_says_what_for() -> None:
    kept = apply(REFUSED, holding(decide(REFUSED, "keep")))
    assert (kept.outcome, kept.detail) == (Outcome.OK, "kept by a person, was: length_ratio (2.750 times as long)")
    assert apply(PAIR, holding(decide(PAIR, "keep"))) is PAIR


def test_an_edit_accepts_the_pair_with_the_new_text_and_names_its_author() -> None:
    decision = decide(REFUSED, "edit", {"chosen": "Wet, yes.", "rejected": "Yes."})
    assert (decision.edited, decision.original) == ({"chosen": "Wet, yes."}, {"chosen": "Yes, it is."})
    edited = apply(REFUSED, holding(decision))
    assert edited.chosen == Answer("Wet, yes.", "teacher+edited")
    assert edited.rejected == PAIR.rejected
    assert edited.outcome is Outcome.OK
    assert edited.detail == "edited by a person, was: length_ratio (2.750 times as long)"
    assert apply(PAIR, holding(decision)).detail == "edited by a person"


def test_an_edited_pair_is_found_again_and_goes_back_to_what_it_was() -> None:
    decision = decide(PAIR, "edit", {"rejected": "No."})
    held = holding(decision)
    edited = apply(PAIR, held)
    assert held.about(key_of(edited)) is None
    edit = held.edit_that_made(key_of(edited))
    assert edit == decision
    assert unedited(edited, decision) == replace(PAIR, detail="edited by a person")
    nameless = replace(PAIR, rejected=Answer("Yes."))
    assert apply(nameless, held).rejected.model == "edited"
    assert unedited(apply(nameless, held), decision).rejected.model == ""


def test_the_last_decision_holds_and_undo_leaves_none() -> None:
    held = holding(decide(PAIR, "drop"), decide(PAIR, "keep"), decide(PAIR, "drop"))
    assert apply(PAIR, held).outcome is Outcome.DROPPED
    assert held.counts() == {"drop": 1}
    held.add(decide(PAIR, "undo"))
    assert apply(PAIR, held) is PAIR
    assert held.counts().total() == 0


@pytest.mark.parametrize(
    "other",
    [
        replace(PAIR, prompt=replace(PAIR.prompt, id="p2")),
        replace(PAIR, prompt=Prompt((Message("user", "Is fire wet?"),), "p1")),
        replace(PAIR, prompt=Prompt((Message("system", "Be brief."), *PAIR.prompt.messages), "p1")),
        replace(PAIR, chosen=Answer("Yes, it is!")),
        replace(PAIR, rejected=Answer("Yes!")),
        replace(PAIR, chosen=PAIR.rejected, rejected=PAIR.chosen),
    ],
    ids=["id", "prompt", "system", "chosen", "rejected", "swapped"],
)
def test_a_decision_never_lands_on_another_pair(other: Pair) -> None:
    assert apply(other, holding(decide(PAIR, "drop"), decide(PAIR, "drop"))) is other


def test_what_a_file_does_to_texts_changes_no_key(tmp_path: Path) -> None:
    strange = replace(PAIR, chosen=Answer("half \ud83d a pair\r\n\x00", "m"), rejected=Answer("\ufeffa\u2028b", "m"))
    write_pairs(tmp_path / "pairs.parquet", [strange])
    (read,) = read_rows(tmp_path / "pairs.parquet")
    assert read.chosen.text != strange.chosen.text
    assert key_of(read) == key_of(strange)


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (replace(REFUSED, chosen=Answer(" ")), "the chosen answer is empty"),
        (replace(REFUSED, rejected=Answer("Yes, it is. ")), "the same text"),
        (replace(REFUSED, prompt=Prompt((), "p1")), "does not end with a user turn"),
    ],
)
def test_what_is_no_pair_cannot_be_kept_and_an_old_keep_of_it_changes_nothing(pair: Pair, reason: str) -> None:
    assert reason in obstacle(pair)
    with pytest.raises(DataError, match=reason):
        decide(pair, "keep")
    by_hand = Decision(key_of(pair), "keep")
    assert apply(pair, holding(by_hand)) is pair


def test_an_edit_that_leaves_no_pair_or_changes_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="the same text"):
        decide(PAIR, "edit", {"chosen": "Yes."})
    with pytest.raises(DataError, match="is empty"):
        decide(PAIR, "edit", {"chosen": "\n"})
    with pytest.raises(DataError, match="changes nothing"):
        decide(PAIR, "edit", {"chosen": "Yes, it is."})
    by_hand = Decision(key_of(PAIR), "edit", {"chosen": "Yes."}, {"chosen": "Yes, it is."})
    spoilt = apply(PAIR, holding(by_hand))
    assert spoilt.outcome is Outcome.IDENTICAL
    assert spoilt.detail == "edited by a person: chosen and rejected are the same text"


def test_an_answer_that_was_missing_can_be_written() -> None:
    alone = replace(PAIR, chosen=Answer(""), outcome=Outcome.NO_HEADER, detail="no header")
    written = apply(alone, holding(decide(alone, "edit", {"chosen": "It is, by definition."})))
    assert written.outcome is Outcome.OK
    assert written.chosen == Answer("It is, by definition.", "edited")


def test_the_file_holds_a_line_per_decision_with_the_original_of_an_edit(tmp_path: Path) -> None:
    file = DecisionFile(tmp_path / "decisions.jsonl")
    file.append(decide(PAIR, "drop", note='a "note" — with ünïcode\nand lines'))
    file.append(decide(PAIR, "edit", {"chosen": "Wet."}))
    lines = [json.loads(line) for line in file.path.read_text("utf-8").splitlines()]
    key = key_of(PAIR)
    assert [(line["id"], line["pair"], line["decision"]) for line in lines] == [
        ("p1", key.pair, "drop"),
        ("p1", key.pair, "edit"),
    ]
    assert lines[0]["note"] == 'a "note" — with ünïcode\nand lines'
    assert lines[1]["edited"] == {"chosen": "Wet."}
    assert lines[1]["original"] == {"chosen": "Yes, it is."}
    assert lines[1]["time"].endswith("+00:00")
    again = read_decisions(file.path)
    assert again.about(key) == file.decisions.about(key)
    assert again.edit_that_made(Key("p1", lines[1]["becomes"])) is not None
    assert again.describe() == "1 decision (1 edit)"


def test_no_file_holds_no_decision(tmp_path: Path) -> None:
    assert read_decisions(tmp_path / "decisions.jsonl").describe() == "0 decisions"


def test_a_torn_last_line_is_told_of_and_the_next_decision_is_whole(tmp_path: Path) -> None:
    file = DecisionFile(tmp_path / "decisions.jsonl")
    file.append(decide(PAIR, "drop"))
    file.append(decide(PAIR, "keep"))
    data = file.path.read_bytes()
    for cut in range(len(data.splitlines()[0]) + 2, len(data) - 2):
        file.path.write_bytes(data[:cut])
        torn = DecisionFile(file.path)
        torn.refresh()
        assert torn.decisions.counts() == {"drop": 1}
        assert torn.decisions.describe() == "1 decision (1 drop); 1 unreadable left out (line 2)"
    torn.append(decide(PAIR, "undo"))
    assert torn.decisions.counts() == {}
    for held in (torn.decisions, read_decisions(file.path)):
        assert held.unreadable == [2]
        assert held.about(key_of(PAIR)) is None


def test_a_last_line_without_its_end_counts_if_it_is_whole(tmp_path: Path) -> None:
    file = DecisionFile(tmp_path / "decisions.jsonl")
    file.append(decide(PAIR, "drop"))
    file.path.write_bytes(file.path.read_bytes().rstrip())
    held = DecisionFile(file.path)
    held.refresh()
    assert held.decisions.counts() == {"drop": 1}
    held.append(decide(PAIR, "keep"))
    assert read_decisions(file.path).counts() == {"keep": 1}
    assert read_decisions(file.path).unreadable == []


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[1]",
        '"drop"',
        "{}",
        '{"id": "p1", "pair": "KEY", "decision": "delete"}',
        '{"id": "p1", "pair": "KEY", "decision": ["drop"]}',
        '{"id": 1, "pair": "KEY", "decision": "drop"}',
        '{"id": "p1", "pair": "", "decision": "drop"}',
        '{"id": "p1", "pair": "KEY", "decision": "drop", "note": 5}',
        '{"id": "p1", "pair": "KEY", "decision": "edit"}',
        '{"id": "p1", "pair": "KEY", "decision": "edit", "edited": {"chosen": 3}, "original": {"chosen": "a"}}',
        '{"id": "p1", "pair": "KEY", "decision": "edit", "edited": {"prompt": "x"}, "original": {"prompt": "a"}}',
        '{"id": "p1", "pair": "KEY", "decision": "edit", "edited": {"chosen": "x"}, "original": {}}',
        '{"id": "p1", "pair": "KEY", "decision": "drop", "edited": {"chosen": "x"}, "original": {"chosen": "a"}}',
        "[" * 100_000,
        "\x00\x00",
    ],
)  # fmt: skip
def test_a_line_that_is_no_decision_counts_for_nothing(tmp_path: Path, line: str) -> None:
    path = tmp_path / "decisions.jsonl"
    good = json.dumps({"id": "p1", "pair": key_of(PAIR).pair, "decision": "drop"})
    bad = line.replace("KEY", key_of(PAIR).pair)
    path.write_text(f"\n{good}\n\n{bad}\n", "utf-8")
    held = read_decisions(path)
    assert apply(PAIR, held).outcome is Outcome.DROPPED
    assert held.unreadable == [4]


def test_bytes_that_are_no_text_count_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    path.write_bytes(b"\xff\xfe\x00{\n")
    assert read_decisions(path).unreadable == [1]


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match=r"folder\.jsonl: cannot be read"):
        read_decisions(tmp_path / "folder.jsonl")
    with pytest.raises(DataError, match="cannot be written"):
        DecisionFile(tmp_path / "gone" / "decisions.jsonl").append(decide(PAIR, "drop"))


def test_what_others_write_shows_up_and_a_new_file_replaces_the_old_one(tmp_path: Path) -> None:
    mine, theirs = DecisionFile(tmp_path / "d.jsonl"), DecisionFile(tmp_path / "d.jsonl")
    mine.append(decide(PAIR, "drop"))
    assert [decision.kind for decision in theirs.refresh()] == ["drop"]
    assert theirs.refresh() == []
    # what comes back from one's own writing holds what others wrote before
    other = replace(PAIR, prompt=replace(PAIR.prompt, id="p2"))
    mine.append(decide(other, "keep"))
    assert [decision.kind for decision in theirs.append(decide(PAIR, "undo"))] == ["keep", "undo"]
    theirs.path.write_text("")
    assert mine.refresh() == []
    assert mine.decisions.counts() == {}


def write_many(path: Path, who: str, n: int) -> None:
    file = DecisionFile(path)
    for number in range(n):
        file.append(decide(replace(PAIR, prompt=replace(PAIR.prompt, id=f"{who}-{number}")), "drop", note="x" * 3000))


def test_several_people_in_several_processes_lose_nothing(tmp_path: Path) -> None:
    path, n = tmp_path / "decisions.jsonl", 40
    spawn = multiprocessing.get_context("fork")
    workers = [spawn.Process(target=write_many, args=(path, f"process{number}", n)) for number in range(3)]
    workers += [Thread(target=write_many, args=(path, f"thread{number}", n)) for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    held = read_decisions(path)
    assert held.unreadable == []
    assert held.counts() == {"drop": 5 * n}
