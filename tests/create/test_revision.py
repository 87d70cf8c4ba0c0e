"""The reviser's reply, taken apart: which lines are headers, what belongs to the revision, what spoils a reply."""

from __future__ import annotations

import time

import pytest

from anchored.create.replies import Problem
from anchored.create.revision import Revision, parse
from anchored.records import Outcome

REASONING = "{teacher_reasoning}: Too short.\n\n"


def revision_of(reply: str, rejected: str = "old") -> Revision:
    parsed = parse(reply, rejected)
    assert isinstance(parsed, Revision), parsed
    return parsed


def outcome_of(reply: str, rejected: str = "old", task: str = "") -> Outcome:
    parsed = parse(reply, rejected, task)
    assert isinstance(parsed, Problem), parsed
    return parsed.outcome


@pytest.mark.parametrize(
    "after",
    [
        "{corrected_student_solution}\n\nX y",
        "{corrected_student_solution}:\nX y",
        "{corrected_student_solution}: X y",
        "{corrected_student_solution} X y",
        "{corrected_student_solution}: \nX y",
        "{corrected_student_solution}:\r\nX y\r\n",
        "{{corrected_student_solution}}: X y",
        "[corrected_student_solution]\nX y",
        "(corrected_student_solution): X y",
        "<corrected_student_solution>\nX y\n</corrected_student_solution>",
        "<corrected_student_solution>X y</corrected_student_solution>",
        "<corrected_student_solution>\nX y\n</corrected_student_solution>\n\nI made it longer.",
        "**Corrected Student Solution:**\nX y",
        "**Corrected Student Solution**:\nX y",
        "**{corrected_student_solution}**\nX y",
        "**{corrected_student_solution}:** X y",
        "*{corrected_student_solution}*: X y",
        "__Corrected Student Solution__\nX y",
        "**\\{corrected\\_student\\_solution\\}**: X y",
        "### Corrected Student Solution\nX y",
        "#### **Corrected Student Solution**\n\nX y",
        "## {corrected_student_solution}:\nX y",
        "2. **Corrected Solution**: X y",
        "1) {corrected_student_solution}: X y",
        "- Improved student answer: X y",
        "> {corrected_student_solution}\nX y",
        "`{corrected_student_solution}`: X y",
        '"corrected_student_solution": X y',
        "  {corrected_student_solution} :\nX y",
        "{corrected_student_solution}：X y",
        "{Corrected-Student-Solution}: X y",
        "{correctedStudentSolution}: X y",
        "CORRECTED_STUDENT_SOLUTION: X y",
        "corrected student solution\nX y",
        "Corrected student's solution: X y",
        "Corrected student’s answer: X y",
        "**Revised Answer:** X y",
        "{corrected_student_solution}:\n```\nX y\n```",
        "{corrected_student_solution}:\n```markdown\nX y\n```",
        '{corrected_student_solution}:\n"X y"',
        "{corrected_student_solution}:\n“X y”",
        "{corrected_student_solution}:\nX y\n\n---",
        "{corrected_student_solution}\n---\nX y\n---",
        "{corrected_student_solution}:\n---\n```\nX y\n```\n---\n",
        "{corrected_student_solution} - X y",
        "**{corrected_student_solution}** — X y",
        "{corrected_student_solution} = X y",
        "{corrected_student_solution: X y}",
        "**{corrected_student_solution:** X y}",
        "✅ **Corrected Student Solution:**\nX y",
        "### ✅ {corrected_student_solution}\nX y",
    ],
)
def test_the_ways_in_which_models_write_the_header(after: str) -> None:
    assert revision_of(REASONING + after) == Revision("X y", "Too short.")


@pytest.mark.parametrize(
    "reply",
    [
        "```\n{teacher_reasoning}: Too short.\n\n{corrected_student_solution}: X y\n```",
        "{teacher_reasoning}: Too short.\n\n```\n{corrected_student_solution}\n```\nX y",
        "{teacher_reasoning}: Too short.\n\n```\n{corrected_student_solution}:\nX y\n```",
        '{"teacher_reasoning": "Too short.", "corrected_student_solution": "X y"}',
        '```json\n{\n  "teacher_reasoning": "Too short.",\n  "corrected_student_solution": "X y"\n}\n```',
    ],
)
def test_a_fence_or_an_object_around_the_whole_reply_is_no_part_of_the_revision(reply: str) -> None:
    revision = revision_of(reply)
    assert revision.text == "X y"
    assert revision.rational.rstrip("`\n").endswith("Too short.")


def test_fences_and_braces_of_the_answer_itself_stay() -> None:
    code = "Use this:\n```\nx = {1}\n```"
    quoted = "{teacher_reasoning}: Wrong:\n```\nx = 1\n```\n"
    assert revision_of(quoted + "{corrected_student_solution}:\n" + code).text == code
    assert revision_of("```\n{corrected_student_solution}:\n" + code + "\n```").text == code
    assert revision_of("```\nx = 1\n\n{corrected_student_solution}:\n```py\nx = 2\n```").text == "```py\nx = 2\n```"
    assert revision_of("{corrected_student_solution: f(x) {1}").text == "f(x) {1}"
    assert revision_of("{corrected_student_solution: f(x) {1}}").text == "f(x) {1}"
    assert revision_of("{corrected_student_solution}: f(x) = {1}").text == "f(x) = {1}"
    assert revision_of("{corrected_student_solution}:\n- one\n- two").text == "- one\n- two"
    assert revision_of("{corrected_student_solution}: - one\n- two").text == "- one\n- two"


@pytest.mark.parametrize(
    "after",
    [
        "The {corrected_student_solution} is below.\nX y",
        "{corrected_student_solution} is below.\nX y",
        "{corrected_student_solution} should be longer.\nX y",
        "**Corrected student solution** improves on it.\nX y",
        "Here it is: {corrected_student_solution}\nX y",
        "I wrote a corrected student solution: X y",
        "Corrected solution below\nX y",
        "Corrected solutions: X y",
        "Improved answers are longer.\nX y",
        "{corrected_student_solution_1}: X y",
        "{student_solution}: X y",
        "X y",
        "",
    ],
)
def test_what_is_prose_or_another_name_is_no_header(after: str) -> None:
    assert outcome_of(REASONING + after) is Outcome.NO_HEADER


@pytest.mark.parametrize(
    ("reasoning", "rational"),
    [
        ("{teacher_reasoning}: Too short.\n", "Too short."),
        ("{teacher_reasoning}\n\nToo short.\n\n", "Too short."),
        ("**Teacher Reasoning:**\nToo short.\n", "Too short."),
        ("### {teacher_reasoning}\nToo short.\n", "Too short."),
        ("<teacher_reasoning>Too short.\n", "Too short."),
        ("Too short.\n", "Too short."),
        ("The {teacher_reasoning} says: too short.\n", "The {teacher_reasoning} says: too short."),
        ("", ""),
    ],
)
def test_the_reasoning_is_what_stands_before_without_its_own_header(reasoning: str, rational: str) -> None:
    assert revision_of(f"{reasoning}{{corrected_student_solution}}: X y").rational == rational


def test_the_answers_own_fences_quotes_and_rules_stay() -> None:
    header = "{corrected_student_solution}:\n"
    code = "```python\nprint(1)\n```"
    assert revision_of(header + code).text == code, "a fence with a language belongs to the code in it"
    assert revision_of(header + code + "\n\nIt prints 1.").text == code + "\n\nIt prints 1."
    assert revision_of(header + "```\na\n```\nand\n```\nb\n```").text == "```\na\n```\nand\n```\nb\n```"
    assert revision_of(header + "```\na\n```", rejected="```\nb\n```").text == "```\na\n```"
    assert revision_of(header + '"Go," she said. "Now."').text == '"Go," she said. "Now."'
    assert revision_of(header + '"To be or not to be"', rejected='"To be"').text == '"To be or not to be"'
    assert revision_of(header + "a\n---\nb").text == "a\n---\nb"
    assert revision_of(header + "a\n---", rejected="b\n---").text == "a\n---"
    nested = "```\nRun:\n```sh\nls\n```\nDone.\n```"
    assert revision_of(header + nested).text == "Run:\n```sh\nls\n```\nDone."


def test_lines_below_the_header_keep_their_form() -> None:
    text = "Intro  \n\n    indented\n\ttabbed\n\n1. one\n2. two"
    assert revision_of("{corrected_student_solution}\n" + text).text == text


def test_a_second_header_spoils_the_reply_and_both_texts_are_kept() -> None:
    parsed = parse("{corrected_student_solution}: A\n**Corrected Student Solution:** B", "old")
    assert isinstance(parsed, Problem)
    assert parsed.outcome is Outcome.REPEATED_HEADER
    assert parsed.text == "A\n**Corrected Student Solution:** B"


def test_a_line_of_the_students_own_is_no_second_header() -> None:
    student = "Improved answer:\nold"
    reply = "{corrected_student_solution}:\nImproved answer:\nnew"
    assert revision_of(reply, student).text == "Improved answer:\nnew"
    assert revision_of(f"You wrote\n{student}\n{reply}", student).text == "Improved answer:\nnew", "quoted before"


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        ("{corrected_student_solution}:\n", Outcome.EMPTY),
        ("{corrected_student_solution}:\n```\n\n```", Outcome.EMPTY),
        ("{corrected_student_solution}:\n---\n", Outcome.EMPTY),
        ("{corrected_student_solution}:\n old \n", Outcome.IDENTICAL),
        ("I'm sorry, but I can't assist with that.", Outcome.REFUSAL),
        ("{corrected_student_solution}:\nI'm sorry, but I can't assist with that.", Outcome.REFUSAL),
    ],
)
def test_a_reply_without_a_revision_ends_its_row(reply: str, outcome: Outcome) -> None:
    assert outcome_of(reply) is outcome


def test_a_better_worded_refusal_of_a_refusal_is_a_revision() -> None:
    better = "I'm sorry, but I can't assist with that. A doctor can."
    assert revision_of(f"{{corrected_student_solution}}: {better}", "I can't help with that.").text == better


def test_a_hostile_reply_takes_no_noticeable_time() -> None:
    started = time.process_time()
    for text in (
        "{" * 50_000,
        "*_`" * 30_000,
        "> " * 30_000,
        "corrected_student_solution " * 10_000,
        "I'm sorry " * 20_000,
    ):
        parse(text, "old")
        parse("{corrected_student_solution}: " + text, "old")
    assert time.process_time() - started < 10
