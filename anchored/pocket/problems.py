"""The five kinds of problem: how each is drawn, asked, read back from its question, and solved.

Facts are the values of a question's slots. `solve` takes the mind that does the thinking, so a right solution and one
with a misconception (`mistakes.Student`) come from the same steps. Nothing here writes answers (see `phrasing`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from anchored.pocket.phrasing import Step, Template

Facts = dict[str, str]


class Mind:
    """A flawless solver; a student overrides both."""

    def believes(self, misconception: str) -> bool:
        return False

    def slips(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class Solution:
    """The steps to a result, right or not."""

    steps: tuple[Step, ...]
    result: str


@dataclass(frozen=True, slots=True)
class Problem:
    """One category."""

    wordings: tuple[Template, ...]
    draw: Callable[[Random], Facts]
    solve: Callable[[Facts, Mind], Solution]


def _draw_addition(rng: Random) -> Facts:
    return {"addend": str(rng.randint(101, 999)), "added": str(rng.randint(101, 999))}


def _solve_addition(facts: Facts, mind: Mind) -> Solution:
    steps, digits, carry = [], "", 0
    for position, place in enumerate(("ones", "tens", "hundreds"), start=1):
        first, second = int(facts["addend"][-position]), int(facts["added"][-position])
        total = _compute(first + second + carry, mind)
        carried, carry = carry, total // 10
        if carry and place != "hundreds" and mind.believes(f"the {place} carry nothing"):
            carry = 0
        steps.append(_step("column", place, first, second, carried, total, total % 10, carry))
        digits = f"{total % 10}{digits}"
    return Solution(tuple(steps), f"{carry or ''}{digits}")


def _draw_time(rng: Random) -> Facts:
    return {
        "hour": f"{rng.randint(0, 19):02}",
        "minute": f"{5 * rng.randrange(12):02}",
        "hours": str(rng.randint(1, 3)),
        "minutes": f"{5 * rng.randrange(3, 12):02}",
    }


def _solve_time(facts: Facts, mind: Mind) -> Solution:
    minutes = _compute(int(facts["minute"]) + int(facts["minutes"]), mind)
    hour_length = 100 if minutes >= 60 and mind.believes("an hour has 100 minutes") else 60
    carry, kept = divmod(minutes, hour_length)
    hours = _compute(int(facts["hour"]) + int(facts["hours"]) + carry, mind)
    steps = (
        _step("minutes", facts["minute"], facts["minutes"], f"{minutes:02}", f"{kept:02}", carry),
        _step("hours", facts["hour"], facts["hours"], carry, f"{hours:02}"),
    )
    return Solution(steps, f"{hours:02}:{kept:02}")


_ITEMS = ("pen", "book", "pear", "cake", "drink", "card", "lamp", "ball", "cup", "map")


def _draw_coins(rng: Random) -> Facts:
    return {"item": rng.choice(_ITEMS), "cents": str(rng.randint(11, 299))}


def _solve_coins(facts: Facts, mind: Mind) -> Solution:
    left, steps, paid = int(facts["cents"]), [], []
    while left > 0:
        coin = next(coin for coin in (200, 100, 50, 20, 10, 5, 2, 1) if coin <= left)
        if coin == 20 and left >= 25 and mind.believes("there is a coin of 25"):
            coin = 25
        if coin == 2 and mind.believes("there is no coin of 2"):
            coin = 1
        left = _compute(left - coin, mind)
        paid.append(str(coin))
        steps.append(_step("coin", coin, left))
    return Solution(tuple(steps), "+".join(paid))


_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri")


def _draw_count(rng: Random) -> Facts:
    limit = rng.randint(2, 8)
    values = [rng.randint(1, 9) for _ in range(rng.randint(4, 5))]
    if rng.random() < 0.4:
        values[rng.randrange(len(values))] = limit
    return {
        "bound": rng.choice(("at least", "more than")),
        "limit": str(limit),
        "rows": "".join(f"\n- {day} {value}" for day, value in zip(_DAYS, values, strict=False)),
    }


def _solve_count(facts: Facts, mind: Mind) -> Solution:
    limit, total, steps = int(facts["limit"]), 0, []
    for row in facts["rows"].split("\n- ")[1:]:
        day, value = row.split()
        counts = int(value) > limit
        if int(value) == limit:
            counts = (facts["bound"] == "at least") != mind.believes("at least and more than are swapped")
        if mind.slips():
            counts = not counts
        total += counts
        steps.append(_step("row", day, value, "yes" if counts else "no", total))
    return Solution(tuple(steps), str(total))


def _draw_sort(rng: Random) -> Facts:
    numbers = [f"{first_digit}{rng.randrange(10)}" for first_digit in rng.sample(range(1, 10), 4)]
    if rng.random() < 0.6:
        place, other = rng.sample(range(4), 2)
        numbers[place] = numbers[other]
    return {"numbers": ", ".join(numbers)}


def _solve_sort(facts: Facts, mind: Mind) -> Solution:
    left, steps, done = facts["numbers"].split(", "), [], []
    if len(set(left)) < len(left) and mind.believes("a number that comes twice is written once"):
        left = list(dict.fromkeys(left))
    while len(left) > 1:
        number = sorted(left, key=int)[1 if mind.slips() else 0]
        left.remove(number)
        done.append(number)
        steps.append(_step("next", number, " ".join(left)))
    return Solution(tuple(steps), ", ".join(done + left))


PROBLEMS = {
    "addition": Problem(
        (Template("What is <addend>+<added>?"), Template("Add <addend> and <added>.")), _draw_addition, _solve_addition
    ),
    "time": Problem(
        (
            Template("A bus leaves at <hour>:<minute> and takes <hours> h <minutes> min. When does it arrive?"),
            Template("A film starts at <hour>:<minute> and lasts <hours> h <minutes> min. When does it end?"),
        ),
        _draw_time,
        _solve_time,
    ),
    "coins": Problem(
        (
            Template("A <item> costs <cents> cents. Which euro coins pay for it? As few as you can, largest first."),
            Template("Pay <cents> cents for a <item> with as few euro coins as you can, largest first."),
        ),
        _draw_coins,
        _solve_coins,
    ),
    "count": Problem(
        (
            Template("On how many days were there <bound> <limit> guests?<rows>"),
            Template("Count the days with <bound> <limit> guests:<rows>"),
        ),
        _draw_count,
        _solve_count,
    ),
    "sort": Problem(
        (Template("Sort from small to large: <numbers>"), Template("Put in order, smallest first: <numbers>")),
        _draw_sort,
        _solve_sort,
    ),
}


def _step(kind: str, *values: object) -> Step:
    return Step(kind, tuple(str(value) for value in values))


def _compute(value: int, mind: Mind) -> int:
    # One too many is the slip: it keeps every value in its range of digits and every loop ending.
    return value + 1 if mind.slips() else value
