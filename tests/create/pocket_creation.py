"""`anchored create` in the pocket world without its policy, whose answers are given: each method, asked of a teacher.

Also what can be told of a run afterwards: which of the teacher's replies it keeps, what it says it spent, where a key
stands.
"""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from commands import POCKET
from forks import Command, Forks

from anchored.datasets_io import read_pairs
from anchored.pocket import world
from anchored.pocket.tasks import task_of
from anchored.pocket.teacher import Faults, Seen, Teacher
from anchored.pocket.teaching import stronger_answer
from anchored.runs import Run

KEY_ENV = "ANCHORED_TEST_KEY"
KEY = "sk-proj-AbCdEf0123456789-planted"
METHODS = ("clair", "judge-on-policy", "judge-off-policy", "stronger-preferred")
IN_FLIGHT = 8
USD = {"input": 2.0, "output": 10.0}
"""Per million tokens."""
PASSING = ("rate_limited", "server_error", "cut_body", "slow")
"""Faults after which the same request succeeds."""
LASTING = ("no_header", "repeated_header", "leak", "refusal", "truncated", "empty")
"""Faults of what is said, the same at every attempt."""
_QUICK = {"retry_after": 0.02, "slow_seconds": 0.05}
_ROLE = {"clair": "reviser", "stronger-preferred": "stronger"}


@dataclass(frozen=True)
class World:
    """Files of prompts and answers."""

    prompts: Path
    answers: Path
    rows: int


def make_world(folder: Path, rows: int = 44, held_out: int = 4) -> World:
    """Prompts with two answers each, of which the second is the teacher's, or wrong for every third."""
    asked = world.prompts(take=rows - held_out, held_out=held_out, seed=0)
    prompts, answers = folder / "prompts.jsonl", folder / "answers.jsonl"
    texts = [prompt.messages[-1].content for prompt in (*asked.prompts, *asked.held_out)]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    with answers.open("w") as handle:
        for number, text in enumerate(texts):
            given = ["I think it is 7, for 3 and 4 are 7.", _right(text) if number % 3 else "It is 12."]
            handle.writelines(json.dumps({"prompt": text, "completion": answer}) + "\n" for answer in given)
    return World(prompts, answers, rows)


def overrides(world: World, method: str, *base_urls: str, **more: object) -> list[str]:
    """The settings that make pairs by a method of what the teachers there say; `more` are the endpoints'."""
    others = "".join(f"{{base_url: '{url}', key_env: {KEY_ENV}}}, " for url in base_urls[1:])
    settings = {"retries": 6, "concurrency": IN_FLIGHT, "key_env": KEY_ENV, **more}
    endpoint = (
        f"{{model: pocket-teacher, base_url: '{base_urls[0]}', price: {{input: 2, output: 10}}, "
        f"more_endpoints: [{others}], {', '.join(f'{name}: {value}' for name, value in settings.items())}}}"
    )
    answers = "other" if method == "judge-off-policy" else "policy"
    return [
        f"create.method={method}",
        f"create.prompts={{data: {world.prompts}, take: {world.rows - 4}, held_out: 4}}",
        f"create.answers.{answers}={world.answers}",
        f"create.{_ROLE.get(method, 'judge')}={endpoint}",
        *([f"create.candidates=[{endpoint}]"] if method == "judge-off-policy" else []),
        *(["create.reviser.serve=null", "create.filters=[leak]"] if method == "clair" else []),
        "create.budget_usd=100",
    ]


def faults(*names: str, share: float = 0.3) -> Faults:
    """Each of these, alone or together, strikes this share of the contents."""
    return Faults.model_validate({**dict.fromkeys(names, share), **_QUICK})


@dataclass
class Creation:
    """One run folder, in which the command is started again and again."""

    forks: Forks
    folder: Path
    settings: Sequence[str]
    teachers: Sequence[Teacher]
    clock_jumps: bool = False
    kills: int = 0
    stored: set[str] = field(default_factory=set)
    """Contents whose reply was in the store when a command was started."""

    @property
    def run(self) -> Run:
        return Run(self.folder / "run")

    @property
    def requests(self) -> list[Seen]:
        return [seen for teacher in self.teachers for seen in teacher.requests]

    def answered(self) -> int:
        """How many contents were answered so far."""
        return len({seen.content for seen in came_whole(self.requests)})

    def killed(self, when: str | int) -> None:
        """Start it, and kill it at an event of its own, or when so many contents were answered."""
        before = self._marks()
        event = when if isinstance(when, str) else ""
        command = self._start(event)
        code = command.wait() if event else command.kill(lambda: self.answered() >= int(when))
        assert code == -signal.SIGKILL, f"{when} never happened: {self.log()}"
        self.kills += 1
        self._nothing_stored_was_asked(before)

    def ended(self, expected: int = 0) -> str:
        """Start it, and let it end with this exit code; what it printed."""
        before = self._marks()
        printed = self.printed(expected)
        self._nothing_stored_was_asked(before)
        return printed

    def printed(self, expected: int) -> str:
        """The same, without a look at the store, which may be damaged."""
        before = len(self.log())
        code = self._start().wait()
        assert code == expected, self.log()
        return self.log()[before:]

    def log(self) -> str:
        """All that was printed."""
        path = self.folder / "log"
        return path.read_text() if path.exists() else ""

    def forget(self) -> None:
        """The store was damaged: what can still be read is what it holds now."""
        self.stored = set(kept(self.run))

    def _start(self, kill_at: str = "") -> Command:
        self.folder.mkdir(exist_ok=True)
        arguments = ("create", POCKET, *self.settings, "--out", self.run.folder)
        how = {"log": self.folder / "log", "env": {KEY_ENV: KEY}, "clock_jumps": self.clock_jumps}
        return self.forks.start(*arguments, **how, kill_at=kill_at)

    def _marks(self) -> list[int]:
        return [len(teacher.requests) for teacher in self.teachers]

    def _nothing_stored_was_asked(self, before: Sequence[int]) -> None:
        heard = (teacher.requests[mark:] for teacher, mark in zip(self.teachers, before, strict=True))
        asked = {name_of(seen) for requests in heard for seen in requests}
        assert not asked & self.stored
        names = kept(self.run) if self.run.replies.exists() else {}
        assert self.stored <= set(names), "what was stored is still there"
        assert set(names.values()) <= {1}
        self.stored = set(names)


def undisturbed(
    forks: Forks, folder: Path, world: World, method: str, content: Faults | None = None, *more: str
) -> Creation:
    """The run that others are compared with."""
    with Teacher(content, api_key=KEY) as teacher:
        creation = Creation(forks, folder, [*overrides(world, method, teacher.base_url), *more], [teacher])
        creation.ended()
    assert len(read_pairs(creation.run.pairs).pairs) >= 3
    return creation


def kept(run: Run) -> Counter[str]:
    """How often the run's store holds the teacher's reply to each content, by `Seen.content`'s beginning.

    It reads a copy: whoever opens a store after a kill mends it.
    """
    with tempfile.TemporaryDirectory() as folder:
        for path in run.folder.glob("replies.sqlite*"):
            shutil.copy(path, folder)
        with closing(sqlite3.connect(Path(folder) / "replies.sqlite")) as store:
            if not store.execute("select count(*) from sqlite_master where name = 'replies'").fetchone()[0]:
                return Counter()
            rows = store.execute("select json_extract(raw, '$.id') from replies").fetchall()
    return Counter(id.removeprefix("chatcmpl-") for (id,) in rows if id)  # a policy in the process gives none


def name_of(seen: Seen) -> str:
    """The name of a content in `kept`."""
    return seen.content[:24]


def came_whole(requests: Iterable[Seen]) -> list[Seen]:
    """Those that were answered to the end."""
    return [seen for seen in requests if seen.status == 200 and seen.fault != "cut_body"]


def usd(seen: Iterable[Seen]) -> float:
    """What these replies cost."""
    return sum(one.prompt_tokens * USD["input"] + one.completion_tokens * USD["output"] for one in seen) / 1e6


def ledger(run: Run) -> dict[str, float]:
    """What the run says that it spent, by basis."""
    with closing(sqlite3.connect(run.replies)) as store:
        return dict(store.execute("select basis, sum(usd) from spending group by basis"))


def made(run: Run) -> dict[str, bytes]:
    """What the stage leaves behind for others."""
    return {path.name: path.read_bytes() for path in (run.pairs, run.held_out, run.refused)}


def assert_keyless(folder: Path, keys: Sequence[str] = (KEY,)) -> None:
    """No file there, of whatever kind, holds a key or a telling part of it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = path.read_bytes()
        for key in keys:
            assert key[:12].encode() not in content, path
            assert key[-10:].encode() not in content, path


def _right(question: str) -> str:
    return stronger_answer(task_of(question))


def files(run: Run) -> set[str]:
    """The names of all files of the run."""
    return {path.name for path in run.folder.rglob("*") if path.is_file()}
