"""Reading every layout that people have, writing TRL's, and refusing rows by name."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from anchored.datasets_io import held_out_count, read_pairs, read_prompts, read_rows, read_training, write_pairs
from anchored.errors import DataError
from anchored.records import Answer, LabelledAnswer, Message, Outcome, Pair, Prompt, prompt_id, user_prompt

USER = {"role": "user", "content": "Why?"}
GOOD = {"role": "assistant", "content": "Because."}
BAD = {"role": "assistant", "content": "No idea."}
HELLO = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief."}

EXPLICIT = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
STRINGS = {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."}
IMPLICIT = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
CLAIR_32K = {"prompt": "Why?", "chosen": [USER, GOOD], "rejected": [USER, BAD], "rational": "It guesses."}
BINARIZED = {
    "prompt": "Why?",
    "prompt_id": "f0e37e9f",
    "chosen": [{"content": "Why?", "role": "user"}, {"content": "Because.", "role": "assistant"}],
    "rejected": [{"content": "Why?", "role": "user"}, {"content": "No idea.", "role": "assistant"}],
    "messages": [USER, GOOD],
    "score_chosen": 8.5,
    "score_rejected": 3.0,
}
ULTRAFEEDBACK = {
    "source": "evol_instruct",
    "instruction": "Why?",
    "models": ["a", "b", "c", "d"],
    "completions": [
        {"model": "a", "response": "Hm.", "overall_score": 5.0, "annotations": {"honesty": {"Rating": "4"}}},
        {"model": "b", "response": "No idea.", "overall_score": 1.0},
        {"model": "c", "response": "Because.", "overall_score": "9.5"},
        {"model": "d", "response": "Unscored.", "overall_score": None},
    ],
    "correct_answers": ["None"],
}
LAYOUTS = {
    "explicit messages": EXPLICIT,
    "explicit strings": STRINGS,
    "explicit, strings in answers only": {**EXPLICIT, "chosen": "Because.", "rejected": "No idea."},
    "string prompt, answers as turns": {**STRINGS, "chosen": [GOOD], "rejected": [BAD]},
    "one turn as an object": {**EXPLICIT, "chosen": GOOD, "rejected": BAD},
    "implicit": IMPLICIT,
    "clair 32k": CLAIR_32K,
    "binarized": BINARIZED,
    "ultrafeedback": ULTRAFEEDBACK,
    "instruction": {"instruction": "Why?", "input": "", "chosen": "Because.", "rejected": "No idea."},
    "question with an empty system": {"system": "", "question": "Why?", "chosen": "Because.", "rejected": "No idea."},
    "turns as JSON": {name: json.dumps(value) for name, value in EXPLICIT.items()},
    "turns as Python prints them": {name: str(value) for name, value in EXPLICIT.items()},
    "turns as a struct of lists": {
        "prompt": {"role": ["user"], "content": ["Why?"]},
        "chosen": {"role": ["assistant"], "content": ["Because."]},
        "rejected": {"role": ["assistant"], "content": ["No idea."]},
    },
    "content in parts": {
        **EXPLICIT,
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "Because."}]}],
    },
    "transcripts": {
        "chosen": "\n\nHuman: Why?\n\nAssistant: Because.",
        "rejected": "\n\nHuman: Why?\n\nAssistant: No idea.",
    },
    "a transcript that waits for the answer": {**STRINGS, "prompt": "\n\nHuman: Why?\n\nAssistant:"},
    "input": {"input": "Why?", "chosen": "Because.", "rejected": "No idea."},
    "conversation that waits for the answer": {
        "conversations": [{"from": "human", "value": "Why?"}],
        "chosen": {"from": "gpt", "value": "Because."},
        "rejected": {"from": "gpt", "value": "No idea."},
    },
    "prompt beside full turns": {"messages": [USER], **IMPLICIT},
}


def write_jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def only_pair(path: Path) -> Pair:
    rows = read_pairs(path)
    assert rows.refused == []
    (pair,) = rows.pairs
    return pair


def only_refused(path: Path, *rows: Any) -> Pair:
    """The refused one of some rows, beside a good row that keeps the source usable."""
    found = read_pairs(write_jsonl(path, *rows, {**STRINGS, "prompt": "good"}))
    assert len(found.pairs) == 1
    (row,) = found.refused
    return row


@pytest.mark.parametrize("row", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_each_layout_reads_as_the_same_pair(row: dict[str, Any], tmp_path: Path) -> None:
    pair = only_pair(write_jsonl(tmp_path / "data.jsonl", row))
    assert pair.prompt.messages == (Message("user", "Why?"),)
    assert (pair.chosen.text, pair.rejected.text) == ("Because.", "No idea.")


@pytest.mark.parametrize(
    "name", ["explicit messages", "implicit", "clair 32k", "binarized", "ultrafeedback", "turns as JSON"]
)
def test_each_kind_of_file_reads_as_the_same_pair(name: str, tmp_path: Path) -> None:
    row = LAYOUTS[name]
    stored = (
        row
        if name != "ultrafeedback"
        else {
            **row,
            "completions": [dict(c, overall_score=float(c["overall_score"] or "nan")) for c in row["completions"]],
        }
    )
    files = [
        write_jsonl(tmp_path / "a.jsonl", row),
        tmp_path / "b.json",
        tmp_path / "c.json",
        tmp_path / "d.parquet",
        tmp_path / "e.csv",
        tmp_path / "f.jsonl.gz",
        tmp_path / "g.csv.gz",
        tmp_path / "h.parquet.gz",
    ]
    files[1].write_text(json.dumps([row], indent=2), "utf-8")
    files[2].write_text(json.dumps(row) + "\n", "utf-8")
    pq.write_table(pa.Table.from_pylist([stored]), files[3])
    with open(files[4], "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(row)
        writer.writerow(value if isinstance(value, str) else json.dumps(value) for value in row.values())
    for plain, zipped in ((files[0], files[5]), (files[4], files[6]), (files[3], files[7])):
        zipped.write_bytes(gzip.compress(plain.read_bytes()))
    pairs = {file.name: only_pair(file) for file in files}
    assert len(set(pairs.values())) == 1, pairs
    assert pairs["a.jsonl"].chosen.text == "Because."


@pytest.mark.parametrize("name", ["a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zst", "A.JSONL", "a.tsv", "a.csv", "a.json"])
def test_files_are_read_however_they_are_packed_parted_or_spelt(name: str, tmp_path: Path) -> None:
    line = (json.dumps(STRINGS) + "\n").encode()
    parted = {"a.tsv": "\t", "a.csv": ";"}
    packed = {
        "a.jsonl.bz2": bz2.compress(line),
        "a.jsonl.xz": lzma.compress(line),
        "a.jsonl.zst": bytes(pa.compress(line, "zstd", asbytes=True)),
        "a.json": json.dumps({"version": "1", "data": [STRINGS]}).encode(),
    }
    if name in parted:
        with open(tmp_path / name, "w", newline="", encoding="utf-8") as handle:
            csv.writer(handle, delimiter=parted[name]).writerows([STRINGS.keys(), STRINGS.values()])
    else:
        (tmp_path / name).write_bytes(packed.get(name, line))
    assert only_pair(tmp_path / name).chosen.text == "Because."


def test_a_cut_zst_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    whole = bytes(pa.compress(json.dumps({"prompt": os.urandom(999).hex()}).encode(), "zstd", asbytes=True))
    (tmp_path / "a.jsonl.zst").write_bytes(whole[:-99])
    with pytest.raises(DataError, match=r"a.jsonl.zst: cannot be read"):
        read_pairs(tmp_path / "a.jsonl.zst")


def test_who_said_it_and_why_are_kept(tmp_path: Path) -> None:
    assert only_pair(write_jsonl(tmp_path / "a.jsonl", CLAIR_32K)).rational == "It guesses."
    assert only_pair(write_jsonl(tmp_path / "b.jsonl", BINARIZED)).prompt.id == "f0e37e9f"
    pair = only_pair(write_jsonl(tmp_path / "c.jsonl", ULTRAFEEDBACK))
    assert (pair.chosen.model, pair.rejected.model, pair.method) == ("c", "b", "judge-off-policy")


def test_system_and_earlier_turns_belong_to_the_prompt(tmp_path: Path) -> None:
    talk = [SYSTEM, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, USER]
    turns = tuple(Message(turn["role"], turn["content"]) for turn in talk)
    explicit = only_pair(write_jsonl(tmp_path / "a.jsonl", {"prompt": talk, "chosen": [GOOD], "rejected": [BAD]}))
    beside = only_pair(
        write_jsonl(tmp_path / "b.jsonl", {"prompt": "Why?", "chosen": [*talk, GOOD], "rejected": [*talk, BAD]})
    )
    assert explicit.prompt.messages == beside.prompt.messages == turns
    column = only_pair(write_jsonl(tmp_path / "c.jsonl", {"system": "Be brief.", **STRINGS}))
    assert column.prompt.messages == (turns[0], turns[3])
    longer = {"prompt": talk[:2], "chosen": [*talk[2:], GOOD], "rejected": [*talk[2:], BAD]}
    assert only_pair(write_jsonl(tmp_path / "d.jsonl", longer)).prompt.messages == turns


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [HELLO, USER, GOOD], "rejected": [HELLO, USER, BAD]},
        {"prompt": "Why?", "chosen": [HELLO, USER, GOOD], "rejected": [HELLO, USER, BAD]},
        {"prompt": [HELLO, USER], "chosen": [GOOD], "rejected": [BAD]},
    ],
)
def test_the_assistant_may_open_a_conversation(row: dict[str, Any], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", row)
    opened = (Message("assistant", "Hello"), Message("user", "Why?"))
    assert only_pair(path).prompt.messages == opened
    (prompt,) = read_prompts(path).prompts
    assert prompt.messages == opened


@pytest.mark.parametrize(
    ("row", "outcome", "says"),
    [
        ({**EXPLICIT, "chosen": [USER, GOOD]}, "doubled_turn", "chosen repeats turns"),
        ({**EXPLICIT, "prompt": [USER, USER]}, "doubled_turn", "stands twice"),
        ({"chosen": [USER, USER, GOOD], "rejected": [USER, USER, BAD]}, "doubled_turn", "stands twice"),
        ({**IMPLICIT, "rejected": [USER]}, "no_assistant_turn", "rejected ends with a user turn"),
        ({**EXPLICIT, "chosen": []}, "no_assistant_turn", "chosen is an empty list"),
        ({**STRINGS, "rejected": "Because."}, "identical", "the same text"),
        ({**STRINGS, "rejected": " Because.\n"}, "identical", "the same text"),
        ({**STRINGS, "rejected": "  "}, "empty", "rejected answer is empty"),
        ({**STRINGS, "chosen": None}, "malformed", "chosen has no value"),
        ({**STRINGS, "chosen": 3}, "malformed", "chosen holds int 3"),
        ({**STRINGS, "chosen": ["Because."]}, "malformed", "chosen holds list"),
        ({**STRINGS, "chosen": [{"role": "tool", "content": "x"}]}, "malformed", "role 'tool'"),
        ({**STRINGS, "chosen": [{"role": "assistant", "content": None}]}, "malformed", "holds no value"),
        ({**STRINGS, "chosen": [{"role": "assistant", "content": [{"type": "image_url"}]}]}, "malformed", "not text"),
        ({**STRINGS, "prompt": ""}, "malformed", "the prompt is empty"),
        ({**EXPLICIT, "prompt": [USER, GOOD]}, "malformed", "does not end with a user turn"),
        ({**EXPLICIT, "prompt": []}, "malformed", "does not end with a user turn"),
        ({"chosen": "a", "rejected": "b"}, "malformed", "an answer alone"),
        (
            {"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "Who?"}, BAD]},
            "malformed",
            "different prompts",
        ),
        (
            {"prompt": [HELLO, USER], "chosen": [HELLO, USER, GOOD], "rejected": [HELLO, USER, BAD]},
            "doubled_turn",
            "chosen repeats turns",
        ),
        ({**STRINGS, "chosen": f"[{USER}\n {GOOD}]"}, "malformed", "spells turns that cannot be read"),
        ({"system": 3, **STRINGS}, "malformed", "the system column holds int"),
        ({"prompt": "a", "completion": "b", "label": True}, "malformed", "an unpaired row"),
        ({"text": "a", "labels": 3}, "malformed", "columns text, labels are no known layout"),
        ({**ULTRAFEEDBACK, "completions": ULTRAFEEDBACK["completions"][:1]}, "malformed", "a pair needs two"),
        ({**ULTRAFEEDBACK, "completions": []}, "malformed", "0 of its 0 completions"),
        ({**ULTRAFEEDBACK, "completions": None}, "malformed", "completions holds no value"),
        ({**ULTRAFEEDBACK, "completions": [ULTRAFEEDBACK["completions"][0]] * 2}, "tie", "overall_score 5"),
        (["prompt", "chosen"], "malformed", "not an object"),
    ],
)
def test_a_row_that_is_no_pair_is_refused_by_name(row: Any, outcome: str, says: str, tmp_path: Path) -> None:
    refused = only_refused(tmp_path / "data.jsonl", row)
    assert refused.outcome == outcome
    assert says in refused.detail
    assert refused.detail.startswith("data.jsonl line 1: ")


def test_lines_that_are_no_json_are_refused_with_their_number(tmp_path: Path) -> None:
    lines = [json.dumps(STRINGS).encode(), b"", b'{"prompt": "x", ', b'{"prompt": "\xff"}', b"[" * 100_000, b'"text"']
    (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    found = read_pairs(tmp_path / "data.jsonl")
    assert len(found.pairs) == 1
    assert [row.detail.split(":")[0] for row in found.refused] == [
        f"data.jsonl line {number}" for number in (3, 4, 5, 6)
    ]
    assert {row.outcome for row in found.refused} == {Outcome.MALFORMED}


def test_line_separators_within_a_text_are_no_line_ends(tmp_path: Path) -> None:
    row = {**STRINGS, "chosen": "one\u2028two\x85three\r\nfour"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", "utf-8", newline="")
    assert only_pair(tmp_path / "data.jsonl").chosen.text == row["chosen"]


def test_half_a_surrogate_pair_becomes_the_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "chosen": "x\\ud83d", "rejected": "\\ud83d\\ude00"}\n')
    pair = only_pair(tmp_path / "data.jsonl")
    assert (pair.chosen.text, pair.rejected.text) == ("x\ufffd", "\U0001f600")


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        ("", "data.jsonl", "is empty"),
        ("[]", "data.json", "is empty"),
        ("prompt,chosen,rejected\n", "data.csv", "is empty"),
        ("[{]", "data.json", "is not JSON"),
        ("not parquet", "data.parquet", "not a readable parquet file"),
        ("not gzip", "data.jsonl.gz", "cannot be read"),
        ("x", "data.xlsx", "its ending is none of"),
        ('{"text": "a"}', "data.jsonl", "columns text are no known layout"),
        ('{"prompt": "a", "completion": "b", "label": true}', "data.jsonl", "an unpaired row"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "data.jsonl", "1 identical"),
    ],
)
def test_a_source_without_a_pair_is_an_error_that_names_it(content: str, name: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=says) as raised:
        read_pairs(tmp_path / name)
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_cut_gzip_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    data = gzip.compress("".join(json.dumps({**STRINGS, "prompt": os.urandom(9).hex()}) for _ in range(99)).encode())
    (tmp_path / "data.jsonl.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"data.jsonl.gz: cannot be read"):
        read_pairs(tmp_path / "data.jsonl.gz")


@pytest.mark.parametrize("source", ["data/missing.jsonl", "./missing", "missing", "/nowhere/at/all", "a/b/c"])
def test_a_missing_source_is_an_error_without_asking_the_network(source: str) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        read_pairs(source)


def test_a_hub_id_that_cannot_be_had_is_one_line() -> None:
    code = (
        "from anchored.datasets_io import read_pairs\nfrom anchored.errors import DataError\n"
        "try: read_pairs('nobody/nothing-of-the-kind')\nexcept DataError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("nobody/nothing-of-the-kind: no such path here, and not to be had from the Hub")
    assert "the Hub cannot be reached; correct the path, mend the network" in done.stdout
    assert done.stdout.count("\n") == 1


def test_a_folder_is_read_by_split(tmp_path: Path) -> None:
    for split, prompt in (("train", "a"), ("test", "b")):
        pq.write_table(
            pa.Table.from_pylist([{**STRINGS, "prompt": prompt}]), tmp_path / f"{split}-00000-of-00001-ab1.parquet"
        )
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert [pair.prompt for pair in read_pairs(tmp_path).pairs] == [user_prompt("a")]
    assert [pair.prompt for pair in read_pairs(tmp_path, split="test").pairs] == [user_prompt("b")]
    with pytest.raises(DataError, match="no split 'val'; there are test, train"):
        read_pairs(tmp_path, split="val")


@pytest.mark.parametrize(
    "files",
    [
        {"train_prefs-00000-of-00001.jsonl": "a", "test_prefs-00000-of-00001.jsonl": "b"},
        {"data/part1.jsonl": "a", "data/dev.jsonl": "b"},
    ],
)
def test_a_test_split_is_never_taken_for_training_data(files: dict[str, str], tmp_path: Path) -> None:
    for name, prompt in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, {**STRINGS, "prompt": prompt})
    with pytest.raises(DataError, match="has several splits"):
        read_pairs(tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        {"train_0.jsonl": "a", "train_1.jsonl": "b", "test_0.jsonl": "c"},
        {"train/0.jsonl": "a", "train/1.jsonl": "b", "test/0.jsonl": "c"},
        {"data/train/0.jsonl": "a", "data/train/1.jsonl": "b", "data/validation.jsonl": "c"},
        {"train.jsonl": "a", "train_2.jsonl": "b", "eval.jsonl": "c"},
        {"part-0.jsonl": "a", "part-1.jsonl": "b"},
        {"latest.jsonl": "a", "development.jsonl": "b"},
    ],
)
def test_the_training_files_of_a_folder_are_told_by_their_names(files: dict[str, str], tmp_path: Path) -> None:
    for name, prompt in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / name, {**STRINGS, "prompt": prompt})
    assert {pair.prompt for pair in read_pairs(tmp_path).pairs} == {user_prompt("a"), user_prompt("b")}


def test_a_folder_of_shards_is_read_whole_and_a_run_folder_by_its_pairs(tmp_path: Path) -> None:
    shards, run = tmp_path / "shards", tmp_path / "run"
    shards.mkdir()
    for shard in ("part1", "part2"):
        write_jsonl(shards / f"{shard}.jsonl", {**STRINGS, "prompt": shard})
    assert len(read_pairs(shards).pairs) == 2
    write_pairs(run / "pairs.parquet", read_pairs(shards).pairs)
    write_jsonl(run / "metrics.jsonl", {"step": 1})
    assert len(read_pairs(run).pairs) == 2
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"holds no .jsonl"):
        read_pairs(tmp_path / "none")


def test_a_data_set_that_datasets_saved_is_read_with_its_splits(tmp_path: Path) -> None:
    data = {
        split: datasets.Dataset.from_list([{**BINARIZED, "prompt_id": split}])
        for split in ("train_prefs", "test_prefs")
    }
    datasets.DatasetDict(data).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(DataError, match="several splits; set split to one of train_prefs, test_prefs"):
        read_pairs(tmp_path / "both")
    (pair,) = read_pairs(tmp_path / "both", split="test_prefs").pairs
    assert (pair.prompt.id, pair.chosen.text) == ("test_prefs", "Because.")
    (prompt,) = read_prompts(tmp_path / "both", split="train_prefs").prompts
    assert prompt.messages == (Message("user", "Why?"),)


# ---- prompts


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?"},
        {"prompt": [USER]},
        {"instruction": "Why?", "input": "", "output": "Because."},
        {"question": "Why?"},
        {"messages": [USER]},
        {"messages": [USER, GOOD]},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
        {"conversation": [USER, GOOD], "model": "vicuna", "turn": 1},
        {"prompt": "\n\nHuman: Why?\n\nAssistant: ", "answers": [{"answer": "Because.", "rank": 1.0}]},
        {"query": "Why?", "input": None},
        "Why?",
        EXPLICIT,
        IMPLICIT,
        CLAIR_32K,
        BINARIZED,
        ULTRAFEEDBACK,
        {"prompt": "Why?", "completion": "Because.", "label": True},
    ],
)
def test_a_prompt_is_read_from_every_layout(row: Any, tmp_path: Path) -> None:
    rows = read_prompts(write_jsonl(tmp_path / "data.jsonl", row))
    assert [prompt.messages for prompt in rows.prompts] == [(Message("user", "Why?"),)]


def test_an_instruction_and_its_input_are_one_prompt(tmp_path: Path) -> None:
    rows = read_prompts(write_jsonl(tmp_path / "data.jsonl", {"instruction": "Add.", "input": "1 2"}))
    assert [prompt.messages for prompt in rows.prompts] == [(Message("user", "Add.\n\n1 2"),)]


def test_only_the_columns_of_prompts_are_read_from_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([ULTRAFEEDBACK | {"completions": "unread"}]), tmp_path / "data.parquet")
    assert len(read_prompts(tmp_path / "data.parquet").prompts) == 1
    pq.write_table(pa.Table.from_pylist([{"text": "a"}]), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="columns text are no known layout"):
        read_prompts(tmp_path / "other.parquet")


def test_the_draw_is_seeded_uniform_distinct_and_nested(tmp_path: Path) -> None:
    names = [f"question {number}" for number in range(400)]
    path = write_jsonl(tmp_path / "data.jsonl", *({"prompt": name} for name in names + names[:50]))

    def drawn(**how: Any) -> tuple[set[str], set[str]]:
        rows = read_prompts(path, **how)
        texts = [[prompt.messages[0].content for prompt in part] for part in (rows.prompts, rows.held_out)]
        assert all(len(set(part)) == len(part) for part in texts), "without repetition"
        return set(texts[0]), set(texts[1])

    prompts, held_out = drawn(take=100, held_out=50, seed=1)
    assert (len(prompts), len(held_out), prompts & held_out) == (100, 50, set())
    assert drawn(take=100, held_out=50, seed=1) == (prompts, held_out), "the same seed draws the same"
    assert drawn(take=100, held_out=50, seed=2)[0] != prompts
    more, same = drawn(take=200, held_out=50, seed=1)
    assert prompts < more
    assert same == held_out
    rest, _ = drawn(held_out=50, seed=1)
    assert rest | held_out == set(names)
    assert len(drawn(take=1000, held_out=50)[0]) == 350, "take is at most"
    # uniform: how often one prompt in the first half is drawn over many seeds
    first_half = sum(len(drawn(take=40, seed=seed)[0] & set(names[:200])) for seed in range(20))
    assert 330 < first_half < 470, "800 draws, mean 400, deviation about 13"


def test_the_draw_does_not_depend_on_the_order_of_the_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {number}"} for number in range(50)]
    one = read_prompts(write_jsonl(tmp_path / "a.jsonl", *rows), take=10, held_out=5)
    other = read_prompts(write_jsonl(tmp_path / "b.jsonl", *reversed(rows)), take=10, held_out=5)
    drawn = list(one.prompts)
    assert len(drawn) == len(one.prompts) == 10
    assert drawn == list(other.prompts)[::-1], "each in its data's order"
    assert list(one.prompts) == drawn, "and again"


def test_prompts_that_a_benchmark_has_are_set_aside_before_the_draw(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", *({"prompt": f"question {number}"} for number in range(20)))
    rows = read_prompts(
        path, held_out=3, shared_with_benchmarks=lambda one: "question 1" if "1" in one.messages[0].content else ""
    )
    assert (len(rows.prompts), len(rows.held_out), len(rows.refused)) == (6, 3, 11)
    assert not any("1" in prompt.messages[0].content for prompt in (*rows.prompts, *rows.held_out))
    first = rows.refused[0]
    assert (first.outcome, first.prompt.messages[0].content) == (Outcome.CONTAMINATED, "question 1")
    assert first.detail == "data.jsonl line 2: a benchmark's question has the words 'question 1'"


def test_a_slice_of_the_draw_is_a_smaller_draw(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", *({"prompt": f"question {number}"} for number in range(50)))
    rows = read_prompts(path, held_out=5, seed=3)
    for count in (1, 7, 45):
        assert list(rows.prompts[:count]) == list(read_prompts(path, take=count, held_out=5, seed=3).prompts)
    first, rest = set(rows.prompts[:20]), set(rows.prompts[20:])
    assert (len(first), len(rest), first & rest) == (20, 25, set())
    assert list(rows.prompts[60:]) == []


@pytest.mark.parametrize(("now", "says"), [("", "has fewer rows than when"), ('{"prompt": ""}\n' * 9, "is none now")])
def test_a_source_that_changes_while_it_is_used_is_named(tmp_path: Path, now: str, says: str) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", *({"prompt": f"question {number}"} for number in range(9)))
    rows = read_prompts(path)
    path.write_text(now)
    with pytest.raises(DataError, match=says):
        list(rows.prompts)


def test_the_datas_ids_are_kept_where_they_tell_prompts_apart(tmp_path: Path) -> None:
    unique = [{"id": 1, "prompt": "a"}, {"id": 2, "prompt": "b"}]
    assert [prompt.id for prompt in read_prompts(write_jsonl(tmp_path / "a.jsonl", *unique)).prompts] == ["1", "2"]
    shared = [{"id": 1, "prompt": "a"}, {"id": 2, "prompt": "b"}, {"id": 1, "prompt": "c"}, {"id": 2, "prompt": "b"}]
    found = read_prompts(write_jsonl(tmp_path / "b.jsonl", *shared))
    assert [prompt.id for prompt in found.prompts] == [user_prompt("a").id, "2", user_prompt("c").id]
    assert (found.doubled_ids, found.doubled_id) == (1, "1")


def test_rows_without_a_prompt_are_told_and_too_many_held_out_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "data.jsonl", {"prompt": "a"}, {"prompt": None}, {"prompt": float("nan")}, {"prompt": " "}
    )
    rows = read_prompts(path)
    assert [row.detail.split(":")[0] for row in rows.refused] == [f"data.jsonl line {line}" for line in (2, 3, 4)]
    with pytest.raises(DataError, match=r"has 1 distinct prompts, so 1 cannot be held out"):
        read_prompts(path, held_out=1)
    with pytest.raises(DataError, match="none of its 1 rows is a prompt"):
        read_prompts(write_jsonl(tmp_path / "none.jsonl", {"prompt": []}))


# ---- writing

ODD = 'tab\t, "quote", line\nend\r\n \u2028 \U0001f600 <script> \x00 '
PAIRS = [
    Pair(user_prompt("Why?", id="7"), Answer("Because.", "gpt"), Answer("No idea.", "llama"), "clair", "It guesses."),
    Pair(
        Prompt((Message("system", "s"), Message("user", ODD), Message("assistant", ""), Message("user", "u")), "talk"),
        Answer(ODD + "a"),
        Answer(ODD),
    ),
]
REFUSED = [
    Pair(user_prompt("p"), Answer(""), Answer("x"), "clair", outcome=Outcome.TRUNCATED, detail="cut"),
    Pair(
        Prompt((), "row-9"), Answer(""), Answer(""), outcome=Outcome.MALFORMED, detail="data.jsonl line 9: is not JSON"
    ),
]


@pytest.mark.parametrize("name", ["pairs.parquet", "pairs.jsonl"])
def test_written_pairs_read_back_as_they_were(name: str, tmp_path: Path) -> None:
    path = tmp_path / "made" / name
    write_pairs(path, PAIRS, {"jaccard": [1.5, None]})
    assert read_pairs(path).pairs == PAIRS
    write_pairs(path, PAIRS + REFUSED)
    assert read_rows(path) == PAIRS + REFUSED
    again = read_pairs(path)
    assert again.pairs == PAIRS
    assert [row.outcome for row in again.refused] == [Outcome.TRUNCATED, Outcome.MALFORMED]
    assert [file.name for file in path.parent.iterdir()] == [name], "nothing half-written is left"


def test_the_columns_are_those_of_the_design_and_trl_takes_them(tmp_path: Path) -> None:
    extra = {"jaccard": [1.5, 2.0], "levenshtein": [3, 4], "length_ratio": [1.0, 1.1]}
    write_pairs(tmp_path / "pairs.parquet", PAIRS, extra)
    data: Any = datasets.load_dataset("parquet", data_files=str(tmp_path / "pairs.parquet"), cache_dir=str(tmp_path))[
        "train"
    ]
    columns = [
        "prompt",
        "chosen",
        "rejected",
        "id",
        "prompt_id",
        "method",
        "rational",
        "chosen_model",
        "rejected_model",
    ]
    columns += ["outcome", "detail"]
    assert data.column_names == columns + list(extra)
    row = data[0]
    assert (row["prompt"], row["chosen"], row["rejected"]) == ([USER], [GOOD], [BAD])
    assert (row["outcome"], row["prompt_id"], row["levenshtein"]) == ("ok", prompt_id(PAIRS[0].prompt.messages), 3)


def test_no_pairs_are_a_file_with_columns_and_no_rows(tmp_path: Path) -> None:
    write_pairs(tmp_path / "held_out.parquet", [])
    assert read_rows(tmp_path / "held_out.parquet") == []
    assert "chosen" in pq.read_schema(tmp_path / "held_out.parquet").names


@pytest.mark.parametrize("layout", ["implicit", "clair32k"])
def test_other_layouts_read_back_too(layout: Any, tmp_path: Path) -> None:
    write_pairs(tmp_path / "a.parquet", PAIRS, layout=layout)
    assert read_pairs(tmp_path / "a.parquet").pairs == PAIRS
    row = pq.read_table(tmp_path / "a.parquet").to_pylist()[0]
    assert row["chosen"] == [USER, GOOD]
    assert row.get("prompt") == (None if layout == "implicit" else "Why?")


def test_what_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"use .parquet or .jsonl"):
        write_pairs(tmp_path / "pairs.txt", PAIRS)
    with pytest.raises(DataError, match="layout 'h5' is not known"):
        write_pairs(tmp_path / "pairs.jsonl", PAIRS, layout="h5")  # pyright: ignore[reportArgumentType]
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write_pairs(tmp_path / "file" / "pairs.parquet", PAIRS)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is missing")
def test_a_full_disk_is_a_data_error_and_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, PAIRS)
    (tmp_path / ".pairs.jsonl.partial").symlink_to("/dev/full")
    monkeypatch.setattr("anchored.runs._remove", lambda path: None)  # keeps the link that stands for a full disk
    with pytest.raises(DataError, match=r"pairs.jsonl: cannot be written \(.*No space left"):
        write_pairs(path, PAIRS)
    assert read_pairs(path).pairs == PAIRS


def test_rows_of_others_are_not_read_as_our_own(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="was not written by anchored"):
        read_rows(write_jsonl(tmp_path / "data.jsonl", STRINGS))


@pytest.mark.parametrize(
    ("asked", "prompts", "count"), [(None, 32_000, 100), (None, 60, 6), (None, 9, 0), (7, 60, 7), (0, 60, 0)]
)
def test_unless_a_number_is_asked_for_few_prompts_keep_most_for_training(
    asked: int | None, prompts: int, count: int
) -> None:
    assert held_out_count("data", asked, prompts) == count


UNPAIRED = {
    "strings": {"prompt": "Why?", "completion": "Because.", "label": True},
    "messages": {"prompt": [USER], "completion": [GOOD], "label": True},
    "full turns": {"completion": [USER, GOOD], "label": True},
    "a number as label": {"prompt": "Why?", "completion": "Because.", "label": 1},
    "a float as label": {"prompt": "Why?", "completion": "Because.", "label": 1.0},
    "text as label": {"prompt": "Why?", "completion": "Because.", "label": "True"},
    "empty columns of pairs": {
        "prompt": "Why?",
        "completion": "Because.",
        "label": "1",
        "chosen": None,
        "rejected": "",
    },
}


@pytest.mark.parametrize("row", UNPAIRED.values(), ids=UNPAIRED)
def test_unpaired_rows_are_labelled_answers(tmp_path: Path, row: dict[str, Any]) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps({**row, "label": label}) for label in (row["label"], 0, "false")))
    found = read_training(file)
    assert not found.refused
    assert [one.desirable for one in found.rows if isinstance(one, LabelledAnswer)] == [True, False, False]
    assert {(one.prompt.messages, one.answer.text) for one in found.rows if isinstance(one, LabelledAnswer)} == {
        ((Message("user", "Why?"),), "Because.")
    }


@pytest.mark.parametrize("messages", [False, True])
@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_unpaired_data_reads_the_same_from_every_kind_of_file(tmp_path: Path, ending: str, messages: bool) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"Why {number}?", "completion": "Because, of course.", "label": number % 2 == 0}
        for number in range(4)
    ]
    if messages:
        rows = [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "completion": [{"role": "assistant", "content": row["completion"]}],
                "label": row["label"],
            }
            for row in rows
        ]
    file = tmp_path / f"data.{ending}"
    if ending == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    elif ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        datasets.Dataset.from_list(rows).to_pandas().to_csv(file, index=False)  # type: ignore[union-attr]
    found = read_training(file)
    expected = [LabelledAnswer(user_prompt(f"Why {n}?"), Answer("Because, of course."), n % 2 == 0) for n in range(4)]
    assert found.rows == expected
    assert not found.refused


def test_a_missing_label_is_refused_by_its_row_with_the_way_out(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    good, unlabelled = UNPAIRED["strings"], {"prompt": "Why?", "completion": "Hm."}
    file.write_text("\n".join(map(json.dumps, [good, unlabelled, {**good, "label": "good"}, {**good, "label": 2}])))
    found = read_training(file)
    assert len(found.rows) == 1
    assert [(row.outcome, row.detail) for row in found.refused] == [
        (
            Outcome.MALFORMED,
            "data.jsonl line 2: nothing says whether the completion is desirable; give it a label of true or false",
        ),
        (Outcome.MALFORMED, "data.jsonl line 3: label holds str 'good', not true or false"),
        (Outcome.MALFORMED, "data.jsonl line 4: label holds int 2, not true or false"),
    ]
    file.write_text(json.dumps(unlabelled))
    with pytest.raises(
        DataError, match=r"none of its 1 rows .* data.jsonl line 1: .* give it a label of true or false"
    ):
        read_training(file)


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_pairs_and_unpaired_rows_do_not_mix(tmp_path: Path, ending: str) -> None:
    rows = [STRINGS, {"prompt": "Why?", "completion": "Because.", "label": True}]
    file = tmp_path / f"data.{ending}"
    if ending == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    else:
        names = ("prompt", "chosen", "rejected", "completion", "label")
        table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
        pq.write_table(table, file) if ending == "parquet" else table.to_pandas().to_csv(file, index=False)
    with pytest.raises(DataError, match="mixes 1 pairs and 1 unpaired rows; train on one kind at a time"):
        read_training(file)


def test_a_margin_is_read_written_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    with open(file, "w", newline="") as handle:
        writer = csv.writer(handle)
        rows = [(f"Why {n}?", "Because.", "No idea.", margin) for n, margin in enumerate(("0.5", "", "2"))]
        writer.writerows([("prompt", "chosen", "rejected", "margin"), *rows])
    pairs = read_pairs(file).pairs
    assert [pair.margin for pair in pairs] == [0.5, None, 2.0]
    for name in ("out.parquet", "out.jsonl"):
        write_pairs(tmp_path / name, pairs)
        assert read_rows(tmp_path / name) == pairs
        assert read_pairs(tmp_path / name).pairs == pairs


def test_a_margin_too_large_for_a_number_is_none(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    row = {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea.", "margin": 10**400}
    file.write_text(json.dumps(row))
    assert [pair.margin for pair in read_pairs(file).pairs] == [None]
