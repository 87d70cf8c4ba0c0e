"""`anchored create` before the misbehaving teacher, killed again and again: the pairs are the undisturbed run's, what
is stored is asked no more, what was spent is counted once, and the key stands nowhere.

The moments of the kills are drawn by seed: by how many contents the teacher has answered, so that they spread over the
run's life whatever the machine's load, and by what the command itself does at its beginning and its end.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from commands import POCKET
from forks import Forks
from pocket_creation import (
    IN_FLIGHT,
    KEY,
    KEY_ENV,
    METHODS,
    World,
    assert_keyless,
    came_whole,
    kept,
    ledger,
    made,
    make_world,
    name_of,
    overrides,
    requests_of,
    usd,
)

from anchored.datasets_io import read_pairs
from anchored.pocket.teacher import Faults, Seen, Teacher
from anchored.runs import Run

SHARES = ("rate_limited", "server_error", "cut_body", "slow")
CONTENT = ("no_header", "repeated_header", "leak", "refusal", "truncated", "empty")
QUICK = {"retry_after": 0.02, "slow_seconds": 0.05}
LATE = ("os.rename:refused.parquet:1", "os.rename:held_out.parquet:1", "os.rename:pairs.parquet:1")
AT_LAST = ("open:.create.json.partial:1", "os.rename:create.json:1")
ENV = {KEY_ENV: KEY}


def faults(*names: str, share: float = 0.3) -> Faults:
    return Faults.model_validate({**dict.fromkeys(names, share), **QUICK})


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as forks:
        yield forks


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@dataclass
class Creation:
    """One run folder, in which the command is started again and again."""

    forks: Forks
    folder: Path
    settings: Sequence[str]
    teachers: Sequence[Teacher]
    kills: int = 0
    stored: set[str] = field(default_factory=set)
    """Contents whose reply was in the store when a command was started."""

    @property
    def run(self) -> Run:
        return Run(self.folder / "run")

    @property
    def requests(self) -> list[Seen]:
        return requests_of(*self.teachers)

    def answered(self) -> int:
        """How many contents were answered so far."""
        return len({seen.content for seen in came_whole(self.requests)})

    def killed(self, when: str | int) -> None:
        """Start it, and kill it at an event of its own, or when so many contents were answered."""
        before = len(self.requests)
        event = when if isinstance(when, str) else ""
        command = self._start(event)
        code = command.wait() if event else command.kill(lambda: self.answered() >= int(when))
        assert code == -signal.SIGKILL, f"{when} never happened: {self.log()}"
        self.kills += 1
        self._nothing_stored_was_asked(before)

    def completed(self) -> Run:
        """Start it, and let it end."""
        before = len(self.requests)
        code = self._start().wait()
        assert code == 0, self.log()
        self._nothing_stored_was_asked(before)
        return self.run

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def _start(self, kill_at: str = ""):  # noqa: ANN202
        self.folder.mkdir(exist_ok=True)
        arguments = ("create", POCKET, *self.settings, "--out", self.run.folder)
        return self.forks.start(*arguments, log=self.folder / "log", env=ENV, kill_at=kill_at)

    def _nothing_stored_was_asked(self, before: int) -> None:
        asked = {name_of(seen) for seen in self.requests[before:]}
        assert not asked & self.stored
        names = kept(self.run) if self.run.replies.exists() else {}
        assert self.stored <= set(names), "what was stored is still there"
        assert set(names.values()) <= {1}
        self.stored = set(names)


def moments(answered: int, seed: int, count: int = 10) -> list[str | int]:
    """When to kill a run whose teacher answers so many contents."""
    chance = random.Random(seed)
    late = sorted(chance.sample(LATE, 2), key=LATE.index)
    end: list[str | int] = [*late, chance.choice(AT_LAST)]
    middle: list[str | int] = sorted(chance.sample(range(1, answered - IN_FLIGHT - 2), count - len(end) - 1))
    middle.insert(chance.randrange(len(middle) + 1), "open:prompts.jsonl:1")
    return middle + end


def undisturbed(forks: Forks, folder: Path, world: World, method: str, content: Faults, *more: str) -> Creation:
    with Teacher(content, api_key=KEY) as teacher:
        creation = Creation(forks, folder, [*overrides(world, method, teacher.base_url), *more], [teacher])
        creation.completed()
    assert len(read_pairs(creation.run.pairs).pairs) >= 3
    return creation


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


@pytest.mark.parametrize("method", METHODS)
def test_ten_kills_among_all_faults_at_once_change_no_pair(
    forks: Forks, world: World, tmp_path: Path, method: str
) -> None:
    whole = undisturbed(forks, tmp_path / "whole", world, method, faults(*CONTENT))
    said = ledger(whole.run)
    assert said == {"usage": pytest.approx(usd(came_whole(whole.requests)))}
    with Teacher(faults(*SHARES, *CONTENT), api_key=KEY) as teacher:
        creation = Creation(forks, tmp_path / "killed", overrides(world, method, teacher.base_url), [teacher])
        for when in moments(whole.answered(), seed=METHODS.index(method)):
            creation.killed(when)
        creation.completed()
    assert creation.kills == 10
    assert made(creation.run) == made(whole.run)
    assert {seen.fault for seen in creation.requests} >= {*SHARES, "empty", "refusal", "truncated"}
    assert_spent_once(creation)
    assert files(creation.run) == files(whole.run), "nothing half-made is left over"
    assert_keyless(tmp_path)


def files(run: Run) -> set[str]:
    return {path.name for path in run.folder.rglob("*") if path.is_file()}
