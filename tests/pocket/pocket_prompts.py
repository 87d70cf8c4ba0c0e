"""The paper's prompts as `create` sends them, for tests of the pocket teacher."""

from __future__ import annotations

from importlib import resources

_PROMPTS = resources.files("anchored.create") / "prompts"


def reviser_prompt(question: str, answer: str) -> str:
    return _fill("reviser.txt", {"<<prompt>>": question, "<<answer>>": answer})


def judge_prompt(question: str, first: str, second: str) -> str:
    return _fill("judge.txt", {"<<prompt>>": question, "<<answer_1>>": first, "<<answer_2>>": second})


def _fill(name: str, slots: dict[str, str]) -> str:
    text = (_PROMPTS / name).read_text("utf-8")
    for slot, value in slots.items():
        before, after = text.split(slot)
        text = before + value + after
    return text
