"""Table 1's metrics against independent computation, and word differences from which both texts come back."""

from __future__ import annotations

import json
import math
import random
import re
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
from commands import anchored
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from anchored.contrast import (
    compare,
    contrast,
    contrasts,
    find_tokenizer,
    jaccard,
    length_ratio,
    levenshtein,
    normalised,
    shared_prefix,
    word_differences,
)
from anchored.datasets_io import read_pairs, write_pairs
from anchored.errors import DataError, ModelError
from anchored.records import Answer, Pair, user_prompt


def pair(chosen: str, rejected: str) -> Pair:
    return Pair(user_prompt("p"), Answer(chosen), Answer(rejected))


def edit_distance(a: str, b: str) -> int:
    """The textbook's table."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]


def random_text(rng: random.Random, words: int) -> str:
    vocabulary = [
        "the",
        "sky",
        "is",
        "blue,",
        "Blue",
        "não",
        "雨",
        "雨が",
        "\n\n",
        "  ",
        "x=1;",
        "\U0001f600",
        "—",
        "a",
    ]
    return "".join(rng.choice(vocabulary) + rng.choice(["", " ", "\n", "\t"]) for _ in range(words))


def test_jaccard_is_the_share_of_common_distinct_tokens() -> None:
    assert jaccard("a b c", "b c d") == pytest.approx(100 * 2 / 4)
    assert jaccard("a a b", "b a") == 100
    assert jaccard("Sky is blue.", "sky is blue") == pytest.approx(100 * 1 / 5)
    assert jaccard("a", "b") == 0
    assert jaccard("", "a") == 0
    assert jaccard("", " \n") == 100, "two empty sets are equal"


def test_the_tokenizers_cut_as_they_say() -> None:
    text = "Don't stop: x_1 = 3.5!"
    assert list(find_tokenizer("whitespace")(text)) == ["Don't", "stop:", "x_1", "=", "3.5!"]
    assert list(find_tokenizer("word")(text)) == ["Don", "t", "stop", "x_1", "3", "5"]


def test_a_hugging_face_folder_is_a_tokenizer_without_its_special_tokens(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1, "a": 2, "b": 3, "c": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>").save_pretrained(tmp_path)
    assert contrast([pair("a b x", "b c y")], str(tmp_path)).jaccard == pytest.approx(100 * 2 / 4)


def test_an_unknown_tokenizer_is_named_with_the_nearest_right_one(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer 'words'.*did you mean word\?") as raised:
        find_tokenizer("words")
    assert "\n" not in str(raised.value)
    with pytest.raises(ModelError, match="nor a Hugging Face folder"):
        find_tokenizer(str(tmp_path))


def test_levenshtein_is_the_textbooks() -> None:
    rng = random.Random(0)
    for _ in range(50):
        a, b = random_text(rng, rng.randrange(12)), random_text(rng, rng.randrange(12))
        assert levenshtein(a, b) == edit_distance(a, b)
    assert levenshtein("kitten", "sitting") == 3


def test_length_ratio_counts_characters() -> None:
    assert length_ratio("ab", "abcd") == 0.5
    assert length_ratio("\U0001f600", "ab") == 0.5
    assert length_ratio("", "") == 1
    assert length_ratio("a", "") == math.inf


def test_the_normalised_distance_is_per_character_of_the_longer_text() -> None:
    assert normalised(levenshtein("kitten", "sitting"), "kitten", "sitting") == pytest.approx(3 / 7)
    assert normalised(levenshtein("abc", "xyz"), "abc", "xyz") == 1
    assert normalised(0, "", "") == 0
    rng = random.Random(3)
    for _ in range(50):
        a, b = random_text(rng, rng.randrange(12)), random_text(rng, rng.randrange(12))
        assert 0 <= normalised(levenshtein(a, b), a, b) <= 1


def test_the_shared_prefix_ends_with_the_first_difference() -> None:
    assert shared_prefix("The sky is blue.", "The sky was blue.") == len("The sky ")
    assert shared_prefix("abc", "abcd") == 3
    assert shared_prefix("\U0001f600x", "\U0001f600y") == 1
    assert shared_prefix("", "a") == shared_prefix("a", "b") == 0
    rng = random.Random(4)
    for _ in range(50):
        start, a, b = (random_text(rng, rng.randrange(9)) for _ in range(3))
        same = shared_prefix(start + a, start + b)
        assert (start + a)[:same] == (start + b)[:same]
        assert (start + a)[same : same + 1] != (start + b)[same : same + 1] or start + a == start + b
    assert compare(pair("abc", "abcdef")).shared_prefix_share == 1
    assert compare(pair("abxy", "abc")).shared_prefix_share == pytest.approx(2 / 3)
    assert compare(pair("", "")).shared_prefix_share == 0


def test_a_leak_counts_where_the_filter_would_refuse_it() -> None:
    leaking = "In this corrected solution, light scatters."
    assert compare(pair(leaking, "The sea.")).leaks
    assert not compare(pair("Light scatters.", leaking)).leaks, "it is the chosen answer that must not leak"
    excused = Pair(
        user_prompt("Grade this student's answer: 2+2=5"), Answer("The student's answer is wrong."), Answer("x")
    )
    assert not compare(excused).leaks
    assert contrast([pair(leaking, "a"), pair("b", "a"), pair("c", "a"), excused]).leak_rate == 0.25


def test_the_table_is_the_mean_over_pairs_with_its_tokenizers_name() -> None:
    pairs = [pair("a b", "a c"), pair("x", "x")]
    table = contrast(iter(pairs), "word")
    assert (table.pairs, table.tokenizer) == (2, "word")
    assert table.jaccard == pytest.approx((100 / 3 + 100) / 2)
    assert table.levenshtein == 0.5
    assert table.normalised_levenshtein == pytest.approx((1 / 3 + 0) / 2)
    assert table.length_ratio == 1
    assert table.shared_prefix == 1.5
    assert table.shared_prefix_share == pytest.approx((2 / 3 + 1) / 2)
    assert table.leak_rate == 0
    assert [one.levenshtein for one in contrasts(pairs)] == [1, 0]
    assert math.isnan(contrast([]).jaccard)
    assert math.isnan(contrast([]).leak_rate)


def test_workers_find_the_same_means_and_pass_errors_on() -> None:
    rng = random.Random(5)
    pairs = [pair(random_text(rng, 12), random_text(rng, 12)) for _ in range(3000)]
    assert contrast(iter(pairs), "word", workers=2) == contrast(pairs, "word")

    def torn() -> Iterator[Pair]:
        yield from pairs
        raise DataError("torn")

    with pytest.raises(DataError, match="torn"):
        contrast(torn(), workers=2)


def test_the_command_measures_several_sets_as_a_table_and_as_json(tmp_path: Path) -> None:
    names = [tmp_path / "near.jsonl", tmp_path / "far.parquet"]
    write_pairs(names[0], [pair("The sky is blue.", "The sky is red."), pair("In this revised answer: no.", "No.")])
    write_pairs(names[1], [pair("a", "b c")])
    with open(names[0], "a") as handle:
        handle.write('{"text": 1}\n')
    done = anchored("contrast", *names, "--json")
    assert done.code == 0, done.err
    measured = json.loads(done.out)
    for name, found in zip(names, measured, strict=True):
        assert found == {"data": str(name), **asdict(contrast(read_pairs(name).pairs))}
    table = anchored("contrast", *names)
    assert table.code == 0, table.err
    for says in ("Jaccard", "(whitespace)", "normalised", "ratio", "prefix", "shorter", "leaks", "50.0"):
        assert says in table.out
    assert "near.jsonl: 1 of 3 rows refused (1 malformed)" in table.out


def test_both_texts_come_back_from_the_differences() -> None:
    rng = random.Random(1)
    for _ in range(300):
        a, b = random_text(rng, rng.randrange(40)), random_text(rng, rng.randrange(40))
        spans = word_differences(a, b)
        assert "".join(span.text for span in spans if span.kind != "added") == a
        assert "".join(span.text for span in spans if span.kind != "removed") == b
        assert all(span.text for span in spans)
        kinds = [span.kind for span in spans]
        assert all(one != other for one, other in pairwise(kinds)), "neighbours are one span"
    assert word_differences("", "") == []


def marked(a: str, b: str) -> str:
    marks = {"kept": "{}", "removed": "[-{}-]", "added": "[+{}+]"}
    return "".join(marks[span.kind].format(span.text) for span in word_differences(a, b))


@pytest.mark.parametrize(
    ("a", "b", "shown"),
    [
        ("The sky is blue.", "The sky is blue.", "The sky is blue."),
        ("The sky is green.", "The sky is blue.", "The sky is [-green-][+blue+]."),
        ("The sky is blue", "The sky is very blue.", "The sky is [+very +]blue[+.+]"),
        ("3 + 4 = 8", "3 + 4 = 7", "3 + 4 = [-8-][+7+]"),
        ("今日は雨です", "今日は雪です", "今日は[-雨-][+雪+]です"),
        ("a <b>x</b>", "a <b>y</b>", "a <b>[-x-][+y+]</b>"),
        ("old", "", "[-old-]"),
        ("", "new", "[+new+]"),
    ],
)
def test_differences_are_whole_words(a: str, b: str, shown: str) -> None:
    assert marked(a, b) == shown


def test_little_that_is_kept_within_a_rewritten_sentence_is_shown_as_rewritten() -> None:
    a = "I suggest that one of those options would be quite good."
    b = "We recommend taking one or more from these better choices."
    assert marked(a, b).count("[-") <= 2
    kept = "Step one is to boil water. Step two is to add tea."
    assert marked(kept, kept.replace("water", "milk").replace("tea", "sugar")) == (
        "Step one is to boil [-water-][+milk+]. Step two is to add [-tea-][+sugar+]."
    )


def test_long_texts_are_compared_quickly() -> None:
    rng = random.Random(2)
    a = " ".join(str(rng.randrange(2000)) for _ in range(8000))
    b = " ".join(word if rng.random() < 0.7 else str(rng.randrange(2000)) for word in a.split())
    started = time.process_time()
    spans = word_differences(a, b)
    assert time.process_time() - started < 5, "difflib takes minutes"
    kept = sum(len(re.findall(r"\d+", span.text)) for span in spans if span.kind == "kept")
    assert kept > 4000
