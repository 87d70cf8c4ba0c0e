"""The create stage before an endpoint that misbehaves: what passes changes no pair, what stays is named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import POCKET

from anchored import recipe as recipes
from anchored.datasets_io import read_rows
from anchored.errors import ModelError, Stopped
from anchored.pipeline import Plan, execute
from anchored.pocket.teacher import Faults, Seen, Teacher
from anchored.progress import Silent
from anchored.records import Outcome
from anchored.runs import Run

SECRET = "sk-a-key-that-must-not-be-seen"
SMALL = ("create.prompts.take=24", "create.prompts.held_out=4", "create.sample.batch_size=8")


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANCHORED_TEST_KEY", SECRET)


def create(folder: Path, teacher: Teacher, *more: str) -> Run:
    endpoint = (
        "create.reviser.serve=null",
        f"create.reviser.base_url={teacher.base_url}",
        "create.reviser.key_env=ANCHORED_TEST_KEY",
    )
    return execute(Plan(recipes.load(POCKET, [*SMALL, *endpoint, *more]), folder, ("create",)), Silent())


def answered(teacher: Teacher) -> list[Seen]:
    return [seen for seen in teacher.requests if seen.status == 200]


def assert_no_secret(folder: Path) -> None:
    for path in folder.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


@pytest.fixture(scope="module")
def well_behaved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with pytest.MonkeyPatch.context() as patch, Teacher(api_key=SECRET) as teacher:
        patch.setenv("ANCHORED_TEST_KEY", SECRET)
        yield create(tmp_path_factory.mktemp("well_behaved"), teacher)


@pytest.mark.parametrize(
    ("faults", "more"),
    [
        (Faults(rate_limited=0.5, retry_after=0.05), ()),
        (Faults(server_error=0.3), ()),
        (Faults(cut_body=0.3), ()),
        (Faults(slow=0.2, slow_seconds=60), ("create.reviser.timeout_seconds=2",)),
    ],
    ids=["rate limits", "errors of the server", "cut bodies", "slow replies"],
)
def test_a_fault_that_passes_changes_no_pair(
    well_behaved: Run, tmp_path: Path, faults: Faults, more: tuple[str, ...]
) -> None:
    with Teacher(faults) as teacher:
        run = create(tmp_path / "run", teacher, *more)
        assert any(seen.attempt for seen in teacher.requests), "no request was struck"
    for name in ("pairs", "held_out", "refused"):
        assert getattr(run, name).read_bytes() == getattr(well_behaved, name).read_bytes(), name
    assert_no_secret(run.folder)


def test_faults_of_content_become_outcomes(tmp_path: Path) -> None:
    with Teacher(Faults(no_header=0.2, leak=0.3, truncated=0.2)) as teacher:
        run = create(tmp_path / "run", teacher)
        struck = Counter(seen.fault for seen in teacher.requests)
    outcomes = Counter(row.outcome for row in read_rows(run.refused))
    assert all(struck[fault] for fault in ("no_header", "leak", "truncated"))
    assert outcomes[Outcome.NO_HEADER] == struck["no_header"]
    assert outcomes[Outcome.TRUNCATED] == struck["truncated"]
    # a leak in too long or unchanged a text may be refused for that instead
    assert 0 < outcomes[Outcome.LEAK] <= struck["leak"]
    assert all(row.outcome is Outcome.OK for row in read_rows(run.pairs))


@pytest.mark.parametrize(("faults", "status"), [(Faults(unauthorized=True), "401"), (Faults(forbidden=True), "403")])
def test_a_refused_key_ends_it_before_anything_is_sampled(tmp_path: Path, faults: Faults, status: str) -> None:
    with Teacher(faults) as teacher:
        with pytest.raises(ModelError, match=status) as caught:
            create(tmp_path / "run", teacher)
        assert not teacher.requests
    assert caught.value.exit_code == 2
    assert "ANCHORED_TEST_KEY" in str(caught.value)
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert_no_secret(tmp_path)


def test_a_spent_quota_stops_it_and_the_same_command_completes_it(well_behaved: Run, tmp_path: Path) -> None:
    with Teacher(Faults(quota_exhausted=True)) as teacher, pytest.raises(Stopped, match="top up") as caught:
        create(tmp_path / "run", teacher)
    assert caught.value.exit_code == 3
    with Teacher() as teacher:
        run = create(tmp_path / "run", teacher)
    assert run.pairs.read_bytes() == well_behaved.pairs.read_bytes()
    assert_no_secret(run.folder)


def test_what_an_endpoint_said_before_it_went_down_is_not_asked_again(well_behaved: Run, tmp_path: Path) -> None:
    patience = ("create.reviser.retries=0", "create.reviser.stop_after_failures=2")
    with Teacher(Faults(down_after=7)) as teacher:
        with pytest.raises(Stopped, match="down") as caught:
            create(tmp_path / "run", teacher, *patience)
        before = {seen.content for seen in answered(teacher)}
    assert caught.value.exit_code == 3
    assert len(before) == 7
    with Teacher() as teacher:
        run = create(tmp_path / "run", teacher)
        after = {seen.content for seen in answered(teacher)}
    assert not before & after
    assert run.pairs.read_bytes() == well_behaved.pairs.read_bytes()
    assert run.refused.read_bytes() == well_behaved.refused.read_bytes()


PRICED = ("create.reviser.price={input: 2, output: 10}",)


def test_a_budget_stops_it_below_its_cap_and_a_higher_one_completes_it(well_behaved: Run, tmp_path: Path) -> None:
    with Teacher() as teacher:
        whole = create(tmp_path / "whole", teacher, *PRICED)
    summary = whole.summary("create")
    assert summary is not None
    cost = summary["replies"]["teacher"]["spent"]["run_usd"]
    used = summary["replies"]["teacher"]
    assert cost == pytest.approx((used["prompt_tokens"] * 2 + used["completion_tokens"] * 10) / 1e6)

    run = Run(tmp_path / "run")
    worst = 4096 * 10 / 1e6 + 0.01
    with Teacher() as teacher:
        with pytest.raises(Stopped, match=r"create\.budget_usd is .* raise create\.budget_usd") as caught:
            create(run.folder, teacher, *PRICED, f"create.budget_usd={worst + cost / 2}")
        before = {seen.content for seen in answered(teacher)}
    assert caught.value.exit_code == 3
    assert 0 < len(before) < 28
    with Teacher() as teacher:
        create(run.folder, teacher, *PRICED, f"create.budget_usd={worst + cost}")
        assert not before & {seen.content for seen in answered(teacher)}
    assert run.pairs.read_bytes() == well_behaved.pairs.read_bytes()
    summary = run.summary("create")
    assert summary is not None
    spent = summary["replies"]["teacher"]["spent"]
    assert spent["run_usd"] == pytest.approx(cost)
    assert 0 < spent["process_usd"] < cost
    assert_no_secret(tmp_path)


def test_prices_rates_and_addresses_may_change_in_mid_run(tmp_path: Path) -> None:
    impatient = ("create.reviser.retries=0", "create.reviser.stop_after_failures=2")
    with Teacher(Faults(down_after=7)) as teacher, pytest.raises(Stopped):
        create(tmp_path / "run", teacher, *PRICED, "create.budget_usd=100", *impatient)
    with Teacher() as teacher, Teacher() as other:
        more = f"create.reviser.more_endpoints=[{{base_url: '{other.base_url}', key_env: null}}]"
        create(tmp_path / "run", teacher, more, "create.reviser.requests_per_minute=60000")
        assert answered(teacher)
        assert answered(other)
