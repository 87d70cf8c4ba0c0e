"""From every layout to every other and back: the same pairs, every row accounted for, memory that does not grow."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import datasets
import pyarrow.parquet as pq
import pytest
from commands import anchored

from anchored.datasets_io import Layout, PairWriter, read_pairs, read_training, write_pairs
from anchored.datasets_io.converting import Converted, convert
from anchored.errors import DataError
from anchored.records import Answer, LabelledAnswer, Message, Outcome, Pair, Prompt, prompt_id, user_prompt

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
PAIRED = [layout for layout in LAYOUTS if layout != "unpaired"]
ENDINGS = (".parquet", ".jsonl", ".jsonl.gz")

USER = {"role": "user", "content": "Why?"}
GOOD = {"role": "assistant", "content": "Because."}
BAD = {"role": "assistant", "content": "No idea."}
STRINGS = {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."}

PIECES = [
    "why", "the sky", "雨が", "مرحبا", "שלום", "🙂", "👩‍👩‍👧", "é", "e\u0301", "\u2028", "\x00", "\n\n",
    "\t", "  ", "\r\n", "\ufeff", '"', "'", "\\", "[1, 2]", "{}", "null", "NaN", "<b>",
    "```", "---", "x=1;", '[{"role": "user", "content": "Hi"}]',
]  # fmt: skip


def random_text(rng: random.Random, least: int = 0) -> str:
    return "".join(rng.choice(PIECES) + rng.choice(["", " "]) for _ in range(rng.randrange(least, 8)))


def random_prompt(rng: random.Random) -> tuple[Message, ...]:
    """With or without a system turn, of one or several turns, opened by either side."""
    turns = [Message("system", random_text(rng))] if rng.random() < 0.4 else []
    role = rng.choice(["user", "user", "assistant"])
    for _ in range(rng.choice([0, 0, 1, 2, 3])):
        turns.append(Message(role, random_text(rng)))
        role = "assistant" if role == "user" else "user"
    if role == "assistant":
        turns.append(Message("assistant", random_text(rng)))
    return (*turns, Message("user", f"{random_text(rng)} {rng.random()}?" if rng.random() < 0.9 else PIECES[-1]))


def random_pair(rng: random.Random) -> Pair:
    messages = random_prompt(rng)
    name = rng.choice([prompt_id(messages), f"row {rng.random()}", "雨"])
    chosen, rejected = (f"{random_text(rng)}{mark}{random_text(rng)}" for mark in "+-")
    models = [rng.choice(["", "gpt-4", "meta/llama 🙂"]) for _ in range(2)]
    return Pair(
        Prompt(messages, name),
        Answer(chosen, models[0]),
        Answer(rejected, models[1]),
        method=rng.choice(["", "clair", "judge-on-policy"]),
        rational=rng.choice(["", "", random_text(rng)]),
        margin=rng.choice([None, 0.0, -1.5, 1e300]),
    )


def random_pairs(seed: int, count: int = 40) -> list[Pair]:
    rng = random.Random(seed)
    return [random_pair(rng) for _ in range(count)]


def write_jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back_gives_the_same_pairs(layout: Layout, ending: str, tmp_path: Path) -> None:
    for seed in range(8):
        pairs = random_pairs(seed)
        source, there, back = tmp_path / "a.parquet", tmp_path / f"b{ending}", tmp_path / "c.parquet"
        write_pairs(source, pairs)
        for one, other, form in ((source, there, layout), (there, back, "trl")):
            done = convert(one, other, form, force=True)
            assert not done.refused.counts
            assert not done.left_out
        assert (
            read_pairs(there).pairs == pairs if layout in PAIRED else len(read_training(there).rows) == 2 * len(pairs)
        )
        assert read_pairs(back).pairs == pairs


def test_a_walk_through_all_layouts_ends_where_it_began(tmp_path: Path) -> None:
    rng = random.Random(7)
    pairs = random_pairs(7, 100)
    path = tmp_path / "0.jsonl"
    write_pairs(path, pairs)
    for step in range(1, 25):
        following = tmp_path / f"{step}{rng.choice(ENDINGS)}"
        convert(path, following, rng.choice(LAYOUTS))
        path = following
    convert(path, tmp_path / "end.parquet")
    assert read_pairs(tmp_path / "end.parquet").pairs == pairs


def test_each_layout_has_its_columns(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", {**STRINGS, "score_chosen": 8, "score_rejected": 3.5, "rational": "r"})
    written = {}
    for layout in LAYOUTS:
        convert(source, tmp_path / f"{layout}.parquet", layout)
        written[layout] = rows_of(tmp_path / f"{layout}.parquet")
    ((trl,), (implicit,), (clair,), (h4,)) = (written[layout] for layout in PAIRED)
    assert (trl["prompt"], trl["chosen"], trl["rejected"]) == ([USER], [GOOD], [BAD])
    assert (trl["score_chosen"], trl["score_rejected"]) == (8.0, 3.5)
    assert "prompt" not in implicit
    assert implicit["chosen"] == clair["chosen"] == h4["chosen"] == h4["messages"] == [USER, GOOD]
    assert implicit["rejected"] == clair["rejected"] == h4["rejected"] == [USER, BAD]
    assert clair["prompt"] == h4["prompt"] == "Why?"
    assert clair["rational"] == "r"
    names = ["prompt", "prompt_id", "chosen", "rejected", "messages", "score_chosen", "score_rejected"]
    assert list(h4)[: len(names)] == names
    assert (h4["score_chosen"], h4["score_rejected"]) == (8.0, 3.5)
    good, bad = written["unpaired"]
    assert (good["prompt"], good["completion"], good["label"], good["score"]) == ([USER], [GOOD], True, 8.0)
    assert (bad["prompt"], bad["completion"], bad["label"], bad["score"]) == ([USER], [BAD], False, 3.5)


def test_what_a_source_says_beside_the_conversation_goes_along(tmp_path: Path) -> None:
    beside = {"source": "evol", "turns": 3, "checked": True, "loss": 0.5, "note": None, "tags": ["a"], "mixed": 1}
    rows = [{**STRINGS, **beside}, {**STRINGS, **beside, "loss": 2, "source": None, "mixed": "one"}]
    done = convert(write_jsonl(tmp_path / "in.jsonl", *rows), tmp_path / "out.parquet", "clair32k")
    first, second = rows_of(tmp_path / "out.parquet")
    assert {name: first[name] for name in ("source", "turns", "checked", "loss")} == {
        "source": "evol", "turns": 3, "checked": True, "loss": 0.5,
    }  # fmt: skip
    assert (second["source"], second["loss"]) == (None, 2.0)
    assert set(done.left_out) == {"tags", "mixed"}
    assert "list ['a']" in done.left_out["tags"]


def test_a_file_without_types_keeps_texts_and_has_numbers_where_scores_stand(tmp_path: Path) -> None:
    header = "prompt,chosen,rejected,source,score_chosen,score_rejected,margin,turns"
    (tmp_path / "in.csv").write_text(f"{header}\nWhy?,Because.,No idea.,evol,8.5,,0.5,3\nWho?,Me.,You.,,nan,2,,\n")
    convert(tmp_path / "in.csv", tmp_path / "out.parquet")
    beside = [
        {name: row[name] for name in ("source", "score_chosen", "score_rejected", "margin", "turns")}
        for row in rows_of(tmp_path / "out.parquet")
    ]
    assert beside == [
        {"source": "evol", "score_chosen": 8.5, "score_rejected": None, "margin": 0.5, "turns": "3"},
        {"source": "", "score_chosen": None, "score_rejected": 2.0, "margin": None, "turns": ""},
    ]


def test_a_column_that_comes_late_or_changes_its_kind_is_told(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{**STRINGS, "turns": 1} for _ in range(1500)]
    rows[1200] |= {"turns": "many", "late": "x"}
    done = convert(write_jsonl(tmp_path / "in.jsonl", *rows), tmp_path / "out.parquet")
    written = rows_of(tmp_path / "out.parquet")
    assert len(written) == done.written == 1500
    assert [row["turns"] for row in written[1199:1202]] == [1, None, 1]
    assert done.left_out == {
        "turns": "some cells are no int: str 'many'",
        "late": "first stands in a later row: str 'x'",
    }


def test_ultrafeedbacks_scores_become_columns(tmp_path: Path) -> None:
    completions = [
        {"model": model, "response": text, "overall_score": score}
        for model, text, score in (("a", "No idea.", 2.0), ("b", "Because.", 9.0), ("c", "Hm.", 5.0))
    ]
    row = {"source": "evol", "instruction": "Why?", "models": ["a", "b", "c"], "completions": completions}
    done = convert(write_jsonl(tmp_path / "in.jsonl", row), tmp_path / "out.parquet", "h4")
    (written,) = rows_of(tmp_path / "out.parquet")
    assert (written["score_chosen"], written["score_rejected"]) == (9.0, 2.0)
    assert (written["chosen_model"], written["rejected_model"], written["source"]) == ("b", "a", "evol")
    assert set(done.left_out) == {"models"}


def test_every_row_is_written_or_told_with_its_reason(tmp_path: Path) -> None:
    same, torn = {**STRINGS, "rejected": "Because."}, "not an object"
    source = write_jsonl(tmp_path / "in.jsonl", STRINGS, same, torn, same, {"text": "x"})
    done = convert(source, tmp_path / "out.jsonl")
    assert (done.read, done.kept, done.written) == (5, 1, 1)
    assert done.refused.counts == {Outcome.IDENTICAL: 2, Outcome.MALFORMED: 2}
    said = anchored("convert", source, tmp_path / "again.jsonl")
    assert said.code == 0, said.err
    assert "again.jsonl: 1 rows in the layout trl" in said.out
    assert f"{source}: 4 of 5 rows refused (2 identical, 2 malformed)" in said.out
    assert "2 identical, the first: in.jsonl line 2: chosen and rejected are the same text" in said.out
    assert "2 malformed, the first: in.jsonl line 4" not in said.out
    assert "2 malformed, the first: in.jsonl line 3" in said.out
    one = anchored("convert", write_jsonl(tmp_path / "one.jsonl", STRINGS, same), tmp_path / "third.jsonl")
    assert one.out.count("chosen and rejected are the same text") == 1


def unpaired(prompt: str, completion: str, label: bool, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "label": label, **more}


def test_two_answers_to_one_prompt_are_a_pair_wherever_they_stand(tmp_path: Path) -> None:
    rows = [
        unpaired("a", "a good", True, model="m", score=9.0),
        unpaired("b", "b bad", False),
        unpaired("a", "a better", True),
        unpaired("a", "a bad", False, model="n", score=2.0),
        unpaired("c", "alone", True),
        unpaired("b", "b good", True),
        unpaired("a", "a worse", False),
        unpaired("d", "same", True),
        unpaired("d", "same", False),
    ]
    done = convert(write_jsonl(tmp_path / "in.jsonl", *rows), tmp_path / "out.parquet")
    written = rows_of(tmp_path / "out.parquet")
    answers = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in written]
    assert answers == [("a good", "a bad"), ("b good", "b bad"), ("a better", "a worse")]
    assert (written[0]["chosen_model"], written[0]["rejected_model"]) == ("m", "n")
    assert (written[0]["score_chosen"], written[0]["score_rejected"]) == (9.0, 2.0)
    assert (done.read, done.kept) == (9, 6)
    assert done.refused.counts == {Outcome.IDENTICAL: 2, Outcome.MALFORMED: 1}
    assert done.refused.examples[Outcome.MALFORMED] == (
        "in.jsonl line 5: an unpaired row without an undesirable answer to the same prompt; a pair needs one of each"
    )


def test_unpaired_data_without_partners_is_refused_with_the_reason(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", unpaired("a", "x", True), unpaired("b", "y", False))
    with pytest.raises(DataError, match=r"none of its 2 rows is a pair .*without an undesirable answer"):
        convert(source, tmp_path / "out.parquet")
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


def test_single_answers_stay_single_in_their_own_layout(tmp_path: Path) -> None:
    rows = [unpaired("a", "x", True, rational="r"), unpaired("b", "y", False, rating=3), STRINGS]
    convert(write_jsonl(tmp_path / "in.jsonl", *rows), tmp_path / "out.parquet", "unpaired")
    found = read_training(tmp_path / "out.parquet").rows
    expected = [("a", "x", True), ("b", "y", False), ("Why?", "Because.", True), ("Why?", "No idea.", False)]
    assert found == [LabelledAnswer(user_prompt(p), Answer(text), good) for p, text, good in expected]
    written = rows_of(tmp_path / "out.parquet")
    assert [(row["rational"], row["rating"]) for row in written[:2]] == [("r", None), ("", 3)]


def test_the_same_rows_are_the_same_bytes_in_every_ending(tmp_path: Path) -> None:
    write_pairs(tmp_path / "in.jsonl", random_pairs(3))
    for name in ("one.jsonl.gz", "two.jsonl.gz"):
        convert(tmp_path / "in.jsonl", tmp_path / name)
    assert (tmp_path / "one.jsonl.gz").read_bytes() == (tmp_path / "two.jsonl.gz").read_bytes()
    convert(tmp_path / "in.jsonl", tmp_path / "plain.jsonl")
    assert gzip.decompress((tmp_path / "one.jsonl.gz").read_bytes()) == (tmp_path / "plain.jsonl").read_bytes()


def test_what_exists_is_kept_unless_forced(tmp_path: Path) -> None:
    source, out = write_jsonl(tmp_path / "in.jsonl", STRINGS), tmp_path / "out.jsonl"
    out.write_text("mine")
    with pytest.raises(DataError, match="exists already; choose another name, or write over it with --force"):
        convert(source, out)
    assert out.read_text() == "mine"
    with pytest.raises(DataError, match=r"is empty"):
        convert(write_jsonl(tmp_path / "empty.jsonl"), out, force=True)
    assert out.read_text() == "mine"
    convert(source, out, force=True)
    assert len(read_pairs(out).pairs) == 1
    convert(out, out, "h4", force=True)
    assert len(read_pairs(out).pairs) == 1, "a file may be converted in its place"
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        convert(source, tmp_path / "folder.jsonl", force=True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("out.csv",), "use .parquet or .jsonl"),
        (("out.jsonl", "--layout", "h5"), "'h5'"),
        (("gone/x/out.jsonl",), "in."),
    ],
)
def test_wrong_arguments_are_one_line(arguments: Sequence[str], says: str, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    if says != "in.":
        write_jsonl(source, STRINGS)
    done = anchored("convert", source, tmp_path / arguments[0], *arguments[1:])
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert says in done.err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_run_folder_and_a_split_are_valid_sources(tmp_path: Path) -> None:
    write_pairs(tmp_path / "run" / "pairs.parquet", random_pairs(1), {"jaccard": [50.0] * 40})
    convert(tmp_path / "run", tmp_path / "out.parquet", "h4")
    assert read_pairs(tmp_path / "out.parquet").pairs == random_pairs(1)
    assert {row["jaccard"] for row in rows_of(tmp_path / "out.parquet")} == {50.0}
    for split in ("train", "test"):
        write_pairs(tmp_path / "both" / f"{split}.jsonl", random_pairs(2 if split == "test" else 3))
    convert(tmp_path / "both", tmp_path / "test.jsonl", split="test")
    assert read_pairs(tmp_path / "test.jsonl").pairs == random_pairs(2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_datasets_reads_what_is_written_lines_and_parquet_alike(layout: Layout, tmp_path: Path) -> None:
    write_pairs(tmp_path / "in.jsonl", random_pairs(5, 6))
    loaded = []
    for ending, form in ((".parquet", "parquet"), (".jsonl", "json")):
        convert(tmp_path / "in.jsonl", tmp_path / f"out{ending}", layout)
        file = str(tmp_path / f"out{ending}")
        data: Any = datasets.load_dataset(form, data_files=file, cache_dir=str(tmp_path / "cache"))["train"]
        loaded.append(data.to_list())
    assert loaded[0] == loaded[1]


def test_a_writer_leaves_what_was_there_when_its_block_fails(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    write_pairs(path, random_pairs(1))
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError), PairWriter(path) as writer:  # noqa: PT012
        writer.write(random_pairs(2, 1500))
        raise ZeroDivisionError
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["pairs.parquet"]


def test_many_small_batches_make_full_row_groups(tmp_path: Path) -> None:
    pairs = random_pairs(4, 2300)
    with PairWriter(tmp_path / "pairs.parquet", extra={"n": int}) as writer:
        for start in range(0, len(pairs), 7):
            batch = pairs[start : start + 7]
            writer.write(batch, {"n": range(start, start + len(batch))})
    file = pq.ParquetFile(tmp_path / "pairs.parquet")
    assert [file.metadata.row_group(place).num_rows for place in range(file.num_row_groups)] == [1000, 1000, 300]
    assert [row["n"] for row in rows_of(tmp_path / "pairs.parquet")] == list(range(2300))
    assert [replace_margin(pair) for pair in pairs] == read_pairs(tmp_path / "pairs.parquet").pairs


def replace_margin(pair: Pair) -> Pair:
    """The pair as a writer writes it that has no column for margins."""
    return Pair(pair.prompt, pair.chosen, pair.rejected, pair.method, pair.rational)


# what getrusage says is not less than the parent's, which has loaded PyTorch
PEAK = """
import re, sys
from pathlib import Path
from anchored.datasets_io.converting import convert
convert(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
print(re.findall(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[0])
"""


# Arrow's own pool keeps what was freed for a while: 20 to 40 MB more, by chance, of memory that nobody holds; and so
# does malloc for each of Arrow's threads: 50 MB more with 16 cores
GIVEN_BACK = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("first", "second", "layout"), [("jsonl", "parquet", "h4"), ("parquet", "jsonl.gz", "unpaired")]
)
def test_ten_times_the_rows_take_no_more_memory(first: str, second: str, layout: str, tmp_path: Path) -> None:
    peaks = []
    for name, count in (("few", 2000), ("many", 20_000)):
        source = tmp_path / f"{name}.{first}"
        with PairWriter(source) as writer:
            for start in range(0, count, 500):
                writer.write([long_pair(number) for number in range(start, start + 500)])
        arguments = [sys.executable, "-c", PEAK, str(source), str(tmp_path / f"{name}-out.{second}"), layout]
        done = subprocess.run(arguments, env=GIVEN_BACK, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] < peaks[0] + 30_000, f"{peaks} KiB, and the texts alone are 50 MiB"


def long_pair(number: int) -> Pair:
    text = f"{number} " * (1000 // len(str(number)))
    return Pair(user_prompt(f"question {number}"), Answer(f"{text}good"), Answer(f"{text}bad"))


def test_the_result_counts_source_rows_not_written_ones(tmp_path: Path) -> None:
    done: Converted = convert(write_jsonl(tmp_path / "in.jsonl", STRINGS), tmp_path / "out.jsonl", "unpaired")
    assert (done.read, done.kept, done.written) == (1, 1, 2)
