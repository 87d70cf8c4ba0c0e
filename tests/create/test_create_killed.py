"""`anchored create` before the misbehaving teacher, killed again and again: the pairs are the undisturbed run's, what
is stored is asked no more, what was spent is counted once, and the key stands nowhere.

The moments of the kills are drawn by seed: by how many contents the teacher has answered, so that they spread over the
run's life whatever the machine's load, and by what the command itself does at its beginning and its end.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from commands import ENVIRONMENT, POCKET, anchored, command
from forks import Forks
from pocket_creation import (
    IN_FLIGHT,
    KEY,
    KEY_ENV,
    LASTING,
    METHODS,
    PASSING,
    Creation,
    World,
    assert_keyless,
    came_whole,
    faults,
    files,
    kept,
    ledger,
    made,
    name_of,
    overrides,
    undisturbed,
    usd,
)

from anchored.pocket.teacher import Faults, Teacher
from anchored.runs import Run

LATE = ("os.rename:refused.parquet:1", "os.rename:held_out.parquet:1", "os.rename:pairs.parquet:1")
AT_LAST = ("open:.create.json.partial:1", "os.rename:create.json:1")


def moments(answered: int, seed: int, count: int = 10) -> list[str | int]:
    """When to kill a run whose teacher answers so many contents."""
    chance = random.Random(seed)
    late = sorted(chance.sample(LATE, 2), key=LATE.index)
    end: list[str | int] = [*late, chance.choice(AT_LAST)]
    middle: list[str | int] = sorted(chance.sample(range(1, answered - IN_FLIGHT - 2), count - len(end) - 1))
    middle.insert(chance.randrange(len(middle) + 1), "open:prompts.jsonl:1")
    return middle + end


def assert_spent_once(creation: Creation) -> None:
    """The ledger holds what the kept replies cost, and no more than was served; a kill loses what was in flight."""
    once = {name_of(seen): seen for seen in came_whole(creation.requests)}
    kept_usd = usd(once[name] for name in creation.stored)
    served = came_whole(creation.requests)
    said = ledger(creation.run)
    assert kept_usd - 1e-9 <= said["usage"] <= usd(served) + 1e-9
    lost = len(served) - len(creation.stored)
    assert 0 <= lost <= creation.kills * IN_FLIGHT * len(creation.teachers)
    summary = creation.run.summary("create")
    assert summary is not None
    spent = next(about["spent"] for about in summary["replies"].values() if "spent" in about)
    assert spent["run_usd"] == pytest.approx(sum(said.values()))


@pytest.mark.parametrize(
    "method", [*METHODS[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS[2:])]
)
def test_ten_kills_among_all_faults_at_once_and_a_clock_that_jumps_change_no_pair(
    forks: Forks, world: World, tmp_path: Path, method: str
) -> None:
    whole = undisturbed(forks, tmp_path / "whole", world, method, faults(*LASTING))
    said = ledger(whole.run)
    assert said == {"usage": pytest.approx(usd(came_whole(whole.requests)))}
    with Teacher(faults(*PASSING, *LASTING), api_key=KEY) as teacher:
        settings = overrides(world, method, teacher.base_url)
        creation = Creation(forks, tmp_path / "killed", settings, [teacher], clock_jumps=True)
        for when in moments(whole.answered(), seed=METHODS.index(method)):
            creation.killed(when)
        creation.ended()
    assert creation.kills == 10
    assert made(creation.run) == made(whole.run)
    assert {seen.fault for seen in creation.requests} >= {*PASSING, "empty", "refusal", "truncated"}
    assert_spent_once(creation)
    assert files(creation.run) == files(whole.run), "nothing half-made is left over"
    assert_keyless(tmp_path)


def test_kills_a_dead_endpoint_and_a_wrong_key_among_several_leave_the_target_as_it_is(
    forks: Forks, world: World, tmp_path: Path
) -> None:
    target = "create.target=9"
    whole = undisturbed(forks, tmp_path / "whole", world, "clair", faults("leak", "refusal"), target)
    struck = faults(*PASSING, "leak", "refusal")
    dying = struck.model_copy(update={"down_after": 14})
    with (
        Teacher(dying, api_key=KEY) as dies,
        Teacher(struck, api_key=KEY) as works,
        Teacher(struck, api_key="sk-another-key-altogether") as refuses,
    ):
        teachers = [dies, refuses, works]
        settings = overrides(world, "clair", *(teacher.base_url for teacher in teachers), stop_after_failures=4)
        creation = Creation(forks, tmp_path / "killed", [*settings, target], teachers)
        for when in (4, 9, "os.rename:held_out.parquet:1"):
            creation.killed(when)
        creation.ended()
        assert dies.requests[-1].fault == "down_after"
        assert came_whole(works.requests)
        assert not came_whole(refuses.requests)
    assert made(creation.run) == made(whole.run)
    assert creation.run.summary("create")["pairs"] == 9  # type: ignore[index]
    assert f"refused the key in {KEY_ENV}" in " ".join(creation.log().split())
    assert_spent_once(creation)
    assert_keyless(tmp_path)


def test_a_budget_holds_over_kills_and_a_higher_one_completes_the_run(
    forks: Forks, world: World, tmp_path: Path
) -> None:
    whole = undisturbed(forks, tmp_path / "whole", world, "stronger-preferred")
    cost = usd(came_whole(whole.requests))
    worst = (300 * 10 + 2000 * 2) / 1e6
    with Teacher(faults("rate_limited", "server_error"), api_key=KEY) as teacher:
        settings = overrides(world, "stronger-preferred", teacher.base_url, max_tokens=300)
        creation = Creation(forks, tmp_path / "run", [*settings, f"create.budget_usd={cost / 2 + worst}"], [teacher])
        for when in (5, 12):
            creation.killed(when)
        said = creation.ended(3)
        assert "raise create.budget_usd" in said
        spent = sum(ledger(creation.run).values())
        assert cost / 4 < spent <= cost / 2 + worst
        creation.settings = [*settings, "create.budget_usd=100"]
        creation.killed("os.rename:pairs.parquet:1")
        creation.ended()
    assert made(creation.run) == made(whole.run)
    assert_spent_once(creation)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [*PASSING, *LASTING])
def test_each_fault_alone_with_kills_changes_no_pair(
    forks: Forks, world: World, tmp_path: Path, method: str, kind: str
) -> None:
    if kind in ("no_header", "repeated_header", "leak") and method != "clair":
        pytest.skip("a fault of revisions alone")
    whole = undisturbed(forks, tmp_path / "whole", world, method, faults(*{kind} & set(LASTING)))
    with Teacher(faults(kind), api_key=KEY) as teacher:
        creation = Creation(forks, tmp_path / "killed", overrides(world, method, teacher.base_url), [teacher])
        for when in moments(whole.answered(), seed=len(kind), count=6):
            creation.killed(when)
        creation.ended()
    assert any(seen.fault == kind for seen in creation.requests)
    assert made(creation.run) == made(whole.run)
    assert_spent_once(creation)
    assert_keyless(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_other_draws_of_ten_kills_and_a_target(forks: Forks, world: World, tmp_path: Path, seed: int) -> None:
    method, target, lasting = METHODS[seed % 4], "create.target=16", dict.fromkeys(LASTING, 0.05)
    whole = undisturbed(forks, tmp_path / "whole", world, method, Faults.model_validate(lasting), target)
    with Teacher(faults(*PASSING).model_copy(update=lasting), api_key=KEY) as teacher:
        settings = [*overrides(world, method, teacher.base_url), target]
        creation = Creation(forks, tmp_path / "killed", settings, [teacher])
        for when in moments(whole.answered(), seed=100 + seed):
            creation.killed(when)
        creation.ended()
    assert made(creation.run) == made(whole.run)
    assert_spent_once(creation)
    assert_keyless(tmp_path)


@pytest.mark.slow
def test_the_command_killed_at_any_second_while_the_policy_samples(tmp_path: Path) -> None:
    """An interpreter for each, so that kills fall into its start and the loading of the policy as well."""
    chance = random.Random(0)
    small = (
        "create.prompts={data: pocket, take: 48, held_out: 4}",
        "create.sample.batch_size=4",
        "create.reviser.serve=null",
    )
    lasting = faults("leak", "refusal")
    folders = tmp_path / "whole", tmp_path / "killed"
    with Teacher(lasting, api_key=KEY) as teacher:
        began = time.monotonic()
        at = (f"create.reviser.base_url={teacher.base_url}", f"create.reviser.key_env={KEY_ENV}")
        assert anchored("create", POCKET, *small, *at, "--out", folders[0], env={KEY_ENV: KEY}).code == 0
        seconds = time.monotonic() - began
    kills = 0
    with Teacher(faults(*PASSING, "leak", "refusal"), api_key=KEY) as teacher:
        at = (f"create.reviser.base_url={teacher.base_url}", f"create.reviser.key_env={KEY_ENV}")
        arguments = command(("create", POCKET, *small, *at, "--out", folders[1]))
        for share in sorted(chance.uniform(0.2, 1.0) for _ in range(10)):
            stored = set(kept(Run(folders[1]))) if Run(folders[1]).replies.exists() else set()
            before = len(teacher.requests)
            code = _killed_after(share * seconds, arguments)
            kills += code == -signal.SIGKILL
            assert code in (0, -signal.SIGKILL)
            assert not stored & {name_of(seen) for seen in teacher.requests[before:]}
        assert (
            subprocess.run(arguments, env={**ENVIRONMENT, KEY_ENV: KEY}, capture_output=True, check=False).returncode
            == 0
        )
    assert kills >= 3
    assert made(Run(folders[1])) == made(Run(folders[0]))
    assert files(Run(folders[1])) == files(Run(folders[0]))
    assert_keyless(tmp_path)


def _killed_after(seconds: float, arguments: Sequence[str]) -> int:
    with subprocess.Popen(
        arguments,
        env={**ENVIRONMENT, KEY_ENV: KEY},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.wait(60)
