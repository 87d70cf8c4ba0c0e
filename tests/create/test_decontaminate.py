"""Which prompts are a benchmark's questions: by thirteen words in a row, or as a whole."""

from __future__ import annotations

import gzip
import json
import os
import random
import tracemalloc
from pathlib import Path

import pytest

from anchored.create.decontaminate import Decontaminator, decontaminator
from anchored.create.settings import DecontaminateSettings
from anchored.errors import DataError
from anchored.records import Message, Prompt, user_prompt

DATA = Path(os.environ.get("ANCHORED_REAL_DATA") or Path(__file__).parents[3] / "shared" / "data")
ALPACA = DATA / "alpaca_eval" / "instructions.jsonl.gz"
MIXEVAL = DATA / "mixeval" / "2024-06-01" / "mixeval-hard" / "free-form.json.gz"
CHOICES = MIXEVAL.with_name("multiple-choice.json.gz")

LONG = "How many more white women and girls were there in 1727 compared to coloured women and girls?"


def test_thirteen_words_in_a_row_are_found_whatever_their_case_and_marks() -> None:
    known = Decontaminator([LONG])
    assert known.find(
        "Tell me: how many MORE white women, and girls -- were there (in 1727) compared to\ncoloured men?"
    ) == ("how many more white women and girls were there in 1727 compared to coloured")
    assert known.find(LONG).startswith("how many more white women")
    assert known.find("How many more white women and girls were there in 1727?") == "", "eleven words"
    assert known.find("") == ""


def test_the_shared_words_are_the_whole_run() -> None:
    known = Decontaminator([LONG])
    assert len(known.find(f"Please: {LONG} Thanks.").split()) == 17


def test_short_prompts_are_compared_whole() -> None:
    known = Decontaminator(["What is the capital of France?", LONG])
    assert known.find("what is the capital of france") == "what is the capital of france"
    assert known.find("What is the capital of France today?") == ""
    assert known.find("how many more white women") == "", "a part of a question is none"


def test_every_turn_of_a_conversation_is_compared() -> None:
    known = Decontaminator([LONG])
    talk = Prompt((Message("user", LONG), Message("assistant", "1727."), Message("user", "And later?")), "talk")
    assert known.find(talk)
    assert not known.find(user_prompt("And later?"))


def test_each_character_is_a_word_where_there_are_no_spaces() -> None:
    known = Decontaminator(["百慕大群岛在一七二七年有多少白人妇女和女孩？"])
    assert known.find("请问百慕大群岛在一七二七年有多少白人?")
    assert not known.find("百慕大群岛在哪里")


def test_more_or_fewer_words_may_be_asked_for() -> None:
    text = "how many more white women and girls were here"
    assert not Decontaminator([LONG], words=13).find(text)
    assert Decontaminator([LONG], words=8).find(text) == "how many more white women and girls were"


def test_two_hundred_thousand_n_grams_take_some_megabytes() -> None:
    draw = random.Random(0)
    questions = (" ".join(f"w{draw.randrange(50_000)}" for _ in range(1012)) for _ in range(200))
    tracemalloc.start()
    known = Decontaminator(questions)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert known.questions == 200
    assert used < 25e6


def test_questions_come_from_any_file_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": LONG}) + "\n" + json.dumps({"odd": 1}) + "\n")
    (tmp_path / "b.json").write_text(json.dumps({"0": {"context": f"It is told that {LONG}", "prompt": "How many?"}}))
    settings = DecontaminateSettings(against=(str(tmp_path / "a.jsonl"), str(tmp_path / "b.json")))
    known = decontaminator(settings)
    assert known.questions == 2
    assert known.find(LONG)
    (tmp_path / "none.jsonl").write_text('{"odd": 1}\n')
    with pytest.raises(DataError, match=r"none\.jsonl: holds no question; the first: none\.jsonl line 1"):
        decontaminator(DecontaminateSettings(against=(str(tmp_path / "none.jsonl"),)))


@pytest.mark.skipif(not MIXEVAL.exists(), reason=f"{MIXEVAL} is missing (or set ANCHORED_REAL_DATA)")
def test_real_benchmarks_find_their_own_questions_and_next_to_nothing_of_each_other() -> None:
    against = DecontaminateSettings(against=(str(MIXEVAL), str(CHOICES)))
    mixeval = decontaminator(against)
    assert mixeval.questions == 1000
    asked = [row["prompt"] for row in json.loads(gzip.decompress(MIXEVAL.read_bytes())).values()]
    long = [question for question in asked if len(question.split()) >= 15]
    assert len(long) > 100
    assert all(mixeval.find(f"Please help me. {question} Thank you!") for question in long)

    instructions = [json.loads(line)["instruction"] for line in gzip.decompress(ALPACA.read_bytes()).splitlines()]
    alpaca = decontaminator(DecontaminateSettings(against=(str(ALPACA),)))
    assert all(alpaca.find(instruction) for instruction in instructions)
    assert sum(bool(mixeval.find(instruction)) for instruction in instructions) <= 4
    triples = [
        json.loads(line)["prompt"] for line in (DATA / "clair" / "triples.jsonl").read_text("utf-8").splitlines()
    ]
    assert not any(alpaca.find(prompt) or mixeval.find(prompt) for prompt in triples)
