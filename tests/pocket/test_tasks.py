from __future__ import annotations

from collections import Counter
from itertools import islice
from random import Random

import pytest

from anchored.errors import DataError
from anchored.pocket.mistakes import student_answer
from anchored.pocket.phrasing import MARKDOWN, OPENINGS, PLAIN, read_line, result_step, write_step
from anchored.pocket.tasks import CATEGORIES, Task, grade, is_right, make_tasks, task_of, task_stream

TASKS = make_tasks(100, seed=7, split="evaluation")


def right_answer(task: Task, phrasing: int = 0) -> str:
    lines = [write_step(step, phrasing) for step in (*task.steps, result_step(task.result))]
    return "\n".join([OPENINGS[0], *lines])


def independent_result(task: Task) -> str:
    """The result by other means than the world's own solver."""
    words = task.question.replace("?", " ").replace(".", " ").replace(":", " ").replace("+", " ").split()
    numbers = [int(word) for word in words if word.isdigit()]
    if task.category == "addition":
        return str(sum(numbers))
    if task.category == "time":
        minutes = (numbers[0] + numbers[2]) * 60 + numbers[1] + numbers[3]
        return f"{minutes // 60:02}:{minutes % 60:02}"
    if task.category == "coins":
        return "+".join(map(str, fewest_coins(numbers[0])))
    if task.category == "sort":
        return ", ".join(map(str, sorted(int(word) for word in task.question.split(": ")[1].split(", "))))
    head, *rows = task.question.split("\n")
    limit, values = numbers[0], [int(row.split()[-1]) for row in rows]
    return str(sum(value >= limit if "at least" in head else value > limit for value in values))


def fewest_coins(cents: int) -> list[int]:
    """By dynamic programming; euro coins have one best set, written largest first."""
    best: list[list[int]] = [[]]
    for amount in range(1, cents + 1):
        options = [[coin, *best[amount - coin]] for coin in (200, 100, 50, 20, 10, 5, 2, 1) if coin <= amount]
        best.append(min(options, key=len))
    return sorted(best[cents], reverse=True)


def test_results_agree_with_an_independent_computation() -> None:
    assert [task.result for task in TASKS] == [independent_result(task) for task in TASKS]


def test_categories_are_balanced_and_tasks_different() -> None:
    assert Counter(task.category for task in TASKS) == dict.fromkeys(CATEGORIES, 20)
    assert len(CATEGORIES) >= 5
    assert len({task.id for task in TASKS}) == len({task.question for task in TASKS}) == 100


def test_the_same_seed_makes_the_same_tasks_and_another_seed_others() -> None:
    assert make_tasks(100, seed=7, split="evaluation") == TASKS
    assert make_tasks(100, seed=8, split="evaluation") != TASKS


def test_a_task_follows_from_its_question() -> None:
    assert [task_of(task.question) for task in TASKS] == TASKS


@pytest.mark.parametrize(
    "question",
    [
        "",
        "What is 12+345?",
        "What is 1234+345?",
        "What is ١٢٣+456?",
        "What is 123+456? ",
        "what is 123+456?",
        "A bus leaves at 29:00 and takes 1 h 05 min. When does it arrive?",
        "How many have at least 3?",
        "How many have at least 3?\n- Ann 3\nThank you",
        "Sort from small to large: 7",
        "Write a poem.",
    ],
)
def test_what_is_no_task_is_refused_by_name(question: str) -> None:
    with pytest.raises(DataError, match="no pocket task"):
        task_of(question)


def test_splits_share_no_problem_even_in_other_words() -> None:
    splits = ("pretraining", "prompts", "held-out", "evaluation")
    questions = {split: {task.question for task in make_tasks(1000, 0, split)} for split in splits}
    problems = {
        split: {(task.category, task.steps) for task in make_tasks(1000, 0, split) if task.category != "count"}
        for split in splits
    }
    for split in splits:
        others = [other for other in splits if other != split]
        assert not questions[split] & set().union(*(questions[other] for other in others))
        assert not problems[split] & set().union(*(problems[other] for other in others))


def test_pretraining_never_meets_an_evaluation_question() -> None:
    evaluation = {task.question for task in make_tasks(1000, 0, "evaluation")}
    assert not any(task.question in evaluation for task in islice(task_stream(0, "pretraining"), 5000))


def test_asking_for_more_tasks_than_there_are_says_how_many_there_are() -> None:
    with pytest.raises(DataError, match=r"ask for \d+ at most"):
        make_tasks(10_000, 0, "held-out")


@pytest.mark.parametrize("phrasing", [*PLAIN, MARKDOWN])
def test_every_step_reads_back_in_every_phrasing(phrasing: int) -> None:
    for task in TASKS:
        for step in (*task.steps, result_step(task.result)):
            line = read_line(write_step(step, phrasing))
            assert line is not None
            assert (line.step, line.phrasing) == (step, phrasing)


@pytest.mark.parametrize("phrasing", [*PLAIN, MARKDOWN])
def test_a_right_answer_has_full_marks_in_every_phrasing(phrasing: int) -> None:
    for task in TASKS:
        assert grade(task, right_answer(task, phrasing)) == 1
        assert is_right(task, right_answer(task, phrasing))


def test_marks_are_the_share_of_right_lines() -> None:
    task = task_of("What is 457+268?")
    right = "ones: 7+8+0=15, write 5, carry 1\ntens: 5+6+1=12, write 2, carry 1\nhundreds: 4+2+1=7, write 7, carry 0\n"
    dropped = (
        "ones: 7+8+0=15, write 5, carry 0\ntens: 5+6+0=11, write 1, carry 1\nhundreds: 4+2+1=7, write 7, carry 0\n"
    )
    assert grade(task, right + "Answer: 725") == 1
    assert grade(task, "Of course!\n" + right + "Answer: 725") == 1
    assert grade(task, dropped + "Answer: 715") == 1 / 4
    assert not is_right(task, dropped + "Answer: 715")
    assert grade(task, right + "Answer: 715") == 3 / 4
    assert grade(task, right) == 3 / 4
    assert not is_right(task, right)
    assert grade(task, "Answer: 725") == 1 / 4
    assert is_right(task, "Answer: 725")


def test_lines_too_many_or_out_of_order_cost_marks() -> None:
    task = task_of("Sort from small to large: 42, 7, 65")
    right = "next 7, left 42 65\nthen 42, so left 65\nAnswer: 7, 42, 65"
    assert grade(task, right) == 1
    assert grade(task, right + "\nAnswer: 7, 42, 65") == 3 / 4
    assert grade(task, right + "\nI hope this helps!") == 3 / 4
    assert grade(task, "then 42, so left 65\nnext 7, left 42 65\nAnswer: 7, 42, 65") == 2 / 3


def test_only_the_result_stated_last_counts() -> None:
    task = task_of("What is 457+268?")
    assert is_right(task, "Answer: 1\nSo the answer is 725.")
    assert not is_right(task, "Answer: 725\nAnswer: 726")


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "\n\n \t\n",
        "\x00\ud800\u2028",
        "Answer: " + "9" * 100_000,
        "Answer: " * 20_000,
        "- " * 50_000,
        "next 1, left" + " 1" * 50_000,
        "Answer: ٧٢٥",
        "Answer: 725" + "\u200b",
        "Answer: 72\n5",
        "<script>alert(725)</script>",
        "Answer: 700..725",
        "\n".join(["ones: 7+8+0=15, write 5, carry 1"] * 5_000),
    ],
)
def test_hostile_answers_are_graded_low_not_crashed_on(answer: str) -> None:
    task = task_of("What is 457+268?")
    assert not is_right(task, answer)
    assert 0 <= grade(task, answer) < 0.5


def test_students_are_right_as_often_as_their_misconceptions_let_them() -> None:
    rng = Random(0)
    tasks = make_tasks(1000, seed=1, split="evaluation")
    answers = [student_answer(task, rng) for task in tasks]
    right = sum(map(is_right, tasks, answers))
    assert 0.4 < right / len(tasks) < 0.6
    # a right result on wrong lines is rare, so full marks and a right result nearly coincide
    assert sum(grade(task, answer) == 1 for task, answer in zip(tasks, answers, strict=True)) > 0.95 * right
