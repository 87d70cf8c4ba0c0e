from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from anchored.errors import RecipeError
from anchored.llm.prompt_files import fill, load


@pytest.mark.parametrize(
    ("name", "sha256"),
    [
        ("create/reviser", "661c0d2053cae2567d1d7343ec8bc6965b97c48d752f4efa0273b51a9c510d62"),
        ("create/judge", "a5500be3d278048a7f049e9de4d89d39792d7d976515b87cb0f7a62c3028923b"),
    ],
)
def test_the_papers_prompts_are_shipped_byte_for_byte(name: str, sha256: str) -> None:
    assert hashlib.sha256(load(name).encode("utf-8")).hexdigest() == sha256


def test_the_papers_prompt_filled_in_is_what_the_paper_sends() -> None:
    text = fill(load("create/reviser"), {"prompt": "2 + 2?", "answer": "5"})
    assert "\n\n{task}: 2 + 2?\n\n{student_solution}: 5\n\n---" in text
    assert text.endswith("identifiers to structure your answer.\n\n")


def test_slots_are_filled_in_one_pass() -> None:
    assert fill("<<a>> <<b>> <<a>>", {"a": "<<b>>", "b": r"\1 {a}"}) == r"<<b>> \1 {a} <<b>>"


def test_what_only_looks_like_a_slot_stays() -> None:
    assert fill("1 << 2 >> 3 <<>> << a >> <<a>>", {"a": "x"}) == "1 << 2 >> 3 <<>> << a >> x"


def test_a_slot_without_a_value_is_named() -> None:
    with pytest.raises(RecipeError, match="the slot <<anwser>>; only <<answer>>, <<prompt>> can"):
        fill("<<prompt>> <<anwser>>", {"prompt": "", "answer": ""})


def test_a_value_without_a_slot_is_named() -> None:
    with pytest.raises(RecipeError, match="lacks the slot <<answer>>"):
        fill("<<prompt>>", {"prompt": "", "answer": ""})


def test_a_users_file_keeps_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufeffÜber\r\n<<prompt>>\n\n".encode())
    assert load(path) == load(str(path)) == "Über\r\n<<prompt>>\n\n"


def test_a_misspelt_name_is_told_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"'create/revisor' is no file and no shipped prompt; .*create/reviser"):
        load("create/revisor")


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"mine\.txt: .*not UTF-8"):
        load(path)
    with pytest.raises(RecipeError, match="cannot be read"):
        load(tmp_path)
