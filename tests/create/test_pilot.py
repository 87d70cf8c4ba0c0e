"""The first rows say what all will cost, before the rest is asked: the command's stage with the pocket teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import POCKET

from anchored import recipe as recipes
from anchored.errors import BudgetReached
from anchored.pipeline import Plan, execute
from anchored.pocket.teacher import Teacher
from anchored.progress import Silent
from anchored.runs import Run

PRICE = "{input: 1000, output: 3000}"  # USD per million tokens: the pocket teacher writes little


class Listener(Silent):
    """Keeps notes with the number of requests that the teacher had got, and the money that was shown."""

    def __init__(self, teacher: Teacher) -> None:
        self.notes: list[tuple[int, str]] = []
        self.usd: list[float] = []
        self._teacher = teacher

    def note(self, text: str) -> None:
        self.notes.append((len(self._teacher.requests), text))

    def advance(self, task: str, by: int = 1, **facts: object) -> None:
        usd = facts.get("usd", 0.0)
        assert isinstance(usd, float)
        self.usd.append(usd)


def create(folder: Path, teacher: Teacher, *more: str) -> tuple[Run, Listener]:
    listener = Listener(teacher)
    where = ("create.reviser.serve=null", f"create.reviser.base_url={teacher.base_url}", "create.reviser.key_env=null")
    small = ("create.prompts.take=24", "create.prompts.held_out=2", "create.sample.batch_size=8", "create.pilot=5")
    plan = Plan(recipes.load(POCKET, [*small, *where, *more]), folder, ("create",))
    return execute(plan, listener), listener


def test_what_all_rows_will_cost_is_told_before_the_rest_is_asked(tmp_path: Path) -> None:
    with Teacher() as teacher:
        run, listener = create(tmp_path, teacher, f"create.reviser.price={PRICE}")
        asked = len(teacher.requests)
    ((when, told),) = ((when, text) for when, text in listener.notes if "will cost about" in text)
    assert when == 5, "the pilot's rows"
    assert told.startswith("create: by the first 5 rows, all 26 will cost about ")
    spent = run.summary("create")["replies"]["teacher"]["spent"]["run_usd"]  # type: ignore[index]
    low, high = (float(text.split()[0]) for text in told.split("95 % interval ")[1].split(")")[0].split(" to "))
    assert low < spent < high
    assert listener.usd == sorted(listener.usd)
    assert listener.usd[-1] == pytest.approx(spent)
    with Teacher() as teacher:
        again, _ = create(tmp_path / "without", teacher)
        assert len(teacher.requests) == asked
    assert again.pairs.read_bytes() == run.pairs.read_bytes(), "a pilot changes no pair"


def test_a_budget_that_the_pilot_shows_to_be_too_small_is_told_and_stops_the_stage_when_it_is_reached(
    tmp_path: Path,
) -> None:
    with Teacher() as teacher:
        with pytest.raises(BudgetReached, match=r"raise create\.budget_usd"):
            create(tmp_path, teacher, f"create.reviser.price={PRICE}", "create.budget_usd=25")
        first = len(teacher.requests)
        run, listener = create(tmp_path, teacher, f"create.reviser.price={PRICE}", "create.budget_usd=1000")
        assert len(teacher.requests) - first < 26, "what is paid for is not asked again"
    assert run.summary("create") is not None
    assert any("will cost about" in text for _, text in listener.notes)


@pytest.mark.parametrize(("pilot", "take"), [(1, 1), (1, 3), (3, 3), (0, 3)])
def test_nothing_is_told_where_there_is_no_rest_to_ask_or_too_little_to_tell_by(
    tmp_path: Path, pilot: int, take: int
) -> None:
    with Teacher() as teacher:
        sizes = (f"create.pilot={pilot}", f"create.prompts.take={take}", "create.filters=[]", "create.prompts.seed=1")
        _, listener = create(tmp_path, teacher, f"create.reviser.price={PRICE}", *sizes)
    assert not any("cost" in text for _, text in listener.notes)


def test_without_a_price_nothing_is_told(tmp_path: Path) -> None:
    with Teacher() as teacher:
        _, listener = create(tmp_path, teacher)
    assert not any("cost" in text for _, text in listener.notes)
