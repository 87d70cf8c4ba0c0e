"""Prompts as texts."""

from __future__ import annotations

from anchored.records import Message, Prompt, as_text, user_prompt


def test_a_single_user_turn_is_its_bare_text() -> None:
    assert as_text(user_prompt("User: hi\n")) == "User: hi\n"


def test_several_turns_are_blocks_with_their_roles() -> None:
    turns = (
        Message("system", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", "Yes?"),
        Message("user", "Bye"),
    )
    assert as_text(Prompt(turns, "1")) == "System: Be brief.\n\nUser: Hi\n\nAssistant: Yes?\n\nUser: Bye"
    assert as_text(Prompt(turns[:2], "2")) == "System: Be brief.\n\nUser: Hi"
