"""The stage that makes pairs: prompts in; pairs.parquet, held_out.parquet and refused.parquet in the run folder out.

Each prompt is one row, made from its sample to its outcome in one go, many rows at once. Every reply comes through the
store, so a run that was cut short, or has another parser or filter now, asks nothing twice.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from anchored.create.desk import Answering, CreateChats, Desk, Used
from anchored.create.engine import ByBatch, Engine, Here, Made
from anchored.create.estimate import estimate
from anchored.create.noticed import NOTICED
from anchored.create.replies import beginning
from anchored.create.row_file import RowFile
from anchored.create.settings import CreateSettings
from anchored.datasets_io import PairWriter, PromptRows, Prompts
from anchored.decisions import Decisions, apply, read_decisions
from anchored.errors import DataError
from anchored.progress import Progress
from anchored.records import Outcome, Pair
from anchored.runs import Run

__all__ = ["ByBatch", "CreateChats", "CreateSummary", "create"]

_TASK = "pairs"


@dataclass(frozen=True, slots=True)
class CreateSummary:
    """What the stage has to say about itself; the run folder keeps it."""

    method: str
    pairs: int
    held_out: int
    outcomes: dict[str, int]
    """Rows of the training prompts by outcome, the most frequent first."""
    held_out_outcomes: dict[str, int]
    prompts_refused: int
    """Rows of the data that hold no prompt, or one that a benchmark has."""
    contrast: dict[str, Any]
    """The pairs' row of Table 1."""
    replies: dict[str, dict[str, Any]]
    """By role (policy, teacher, ...): the model, the tokens of the replies that rows were made of, and how many this
    process asked for and how many it had in the store."""
    prompt_files: dict[str, dict[str, str]]
    """Name (`prompt`) and `sha256` of each prompt file that a teacher was asked with, by role."""
    noticed: dict[str, int]
    """Pairs of this process that were kept although something was noticed, which their `detail` says: `holds_verdict`
    (an answer holds [1] or [2]), `addresses_judge`, `control_characters`, `html`."""
    seconds: float
    """Of this process."""


async def create(
    run: Run,
    settings: CreateSettings,
    prompts: PromptRows,
    chats: CreateChats,
    progress: Progress,
    by_batch: ByBatch | None = None,
    engine: Engine | None = None,
) -> CreateSummary:
    """Make a row of every prompt and write them; what Stopped or ModelError cut short goes on with the same call.

    Rows are written as they come, in the order of the prompts, so their number does not matter to memory, but for those
    that `by_batch` makes at a time. `engine` makes the rows; None: this process does, and asks the chats itself.
    """
    started = time.perf_counter()
    desk = Desk(settings, chats)
    decisions = _decisions(run, settings, progress)
    maker = _Maker(desk, engine or Here(desk, by_batch), decisions, progress, by_batch)
    _note_what_is_missing(settings, prompts, progress)
    for note in desk.notes:
        progress.note(note)
    with PairWriter(run.refused, extra={"set": str}) as refused:
        for row in prompts.refused:
            refused.write([row], {"set": ["data"]})
        training = RowFile("training", run.pairs, refused, settings.target)
        held_out = RowFile("held_out", run.held_out, refused)
        # without a pair the refused rows alone are written: they say why
        with suppress(_NoPair), training, held_out:
            await maker.make(prompts, training, held_out)
            if not training.pairs:
                raise _NoPair
    if not training.pairs:
        raise DataError(_no_pairs(run.refused, training))
    _note_what_failed((training, held_out), progress)
    for what, count in maker.noticed.items():
        progress.note(f"create: {NOTICED[what]} in {count} of the pairs that were kept; their detail says so")
    if settings.target is not None and training.pairs < settings.target:
        progress.note(f"create: {training.pairs} pairs of all {len(prompts.prompts)} prompts, not {settings.target}")
    summary = CreateSummary(
        method=settings.method,
        pairs=training.pairs,
        held_out=held_out.pairs,
        outcomes=_by_outcome(training),
        held_out_outcomes=_by_outcome(held_out),
        prompts_refused=len(prompts.refused),
        contrast=asdict(training.contrast()),
        replies={role: _about(chat, maker.used[role]) for role, chat in chats.items()},
        prompt_files=desk.prompt_files,
        noticed=dict(maker.noticed),
        seconds=time.perf_counter() - started,
    )
    run.complete("create", asdict(summary))
    return summary


class _NoPair(Exception):
    """No row of the training prompts was accepted."""


@dataclass(slots=True)
class _Maker:
    """Makes rows, and tells how many are through and what is spent."""

    desk: Desk
    engine: Engine
    decisions: Decisions
    progress: Progress
    by_batch: ByBatch | None = None
    outcomes: Counter[str] = field(default_factory=Counter)
    used: defaultdict[str, Used] = field(default_factory=lambda: defaultdict(Used))
    """By role."""
    noticed: Counter[str] = field(default_factory=Counter)
    """What was seen in rows that were made all the same."""
    bills: list[float] = field(default_factory=list)
    """USD of each row of the pilot."""

    async def make(self, prompts: PromptRows, training: RowFile, held_out: RowFile) -> None:
        """A row of each prompt, in their order: the teacher works while the policy still samples.

        What ends the stage is raised when the rows under way are through, for their replies may have been paid for.
        """
        target, every = training.target, len(prompts.prompts)
        apart: list[tuple[RowFile, Prompts]] = [(held_out, prompts.held_out)]
        self.progress.start(_TASK, (target or every) + len(prompts.held_out))
        try:
            tried = 0
            while tried < every and (target is None or training.pairs < target):
                more = min(every - tried, _round(target, training.pairs, tried) if target else every)
                pilot = 0 if tried else self._pilot()
                is_pilot = 1 < pilot < more
                if is_pilot:
                    more = pilot
                due = [(training, prompts.prompts[tried : tried + more])]
                tried += more
                if not is_pilot:  # beside others, so that nobody waits for the last of these
                    due += apart
                    apart = []
                await self._rows(due)
                if is_pilot:
                    self._tell_what_all_cost(prompts, training)
            await self._rows(apart)
        finally:
            self.progress.finish(_TASK)

    def _pilot(self) -> int:
        """How many rows go first to tell the cost of all; none by batch, where they would take a batch of their own."""
        return self.desk.settings.pilot if self.desk.purse and not self.by_batch else 0

    async def _rows(self, due: Sequence[tuple[RowFile, Prompts]]) -> None:
        """A row of each prompt, in order, each to the file beside its prompts."""
        jobs = ((file, prompt) for file, prompts in due for prompt in prompts)
        await self.engine.rows(jobs, self._finish, lambda file, pair: file.put(pair))

    def _finish(self, file: RowFile, made: Made) -> Pair:
        pair, bill = apply(made.pair, self.decisions), made.bill
        if len(self.bills) < self.desk.settings.pilot:
            self.bills.append(bill.usd)
        for role, used in bill.used.items():
            self.used[role].add(used)
        if pair is made.pair:  # else people have looked at it
            self.noticed.update(bill.noticed)
        self._tell(pair.outcome, file)
        return pair

    def _tell(self, outcome: Outcome, file: RowFile) -> None:
        self.outcomes[outcome] += 1
        money = {"usd": self.desk.purse.spent_usd} if self.desk.purse else {}
        # where so many pairs are wanted, only pairs are steps
        steps = int(file.target is None or outcome is Outcome.OK)
        self.progress.advance(_TASK, steps, **self.outcomes, **money)

    def _tell_what_all_cost(self, prompts: PromptRows, training: RowFile) -> None:
        """The pilot's estimate, before the rest is asked."""
        assert self.desk.purse
        rows = len(prompts.prompts)
        if training.target:
            rows = min(rows, len(self.bills) + _round(training.target, training.pairs, len(self.bills)))
        found = estimate(self.bills, rows + len(prompts.held_out))
        self.progress.note(f"create: {found.told(self.desk.purse.spent_usd, self.desk.settings.budget_usd)}")


def _round(target: int, pairs: int, tried: int) -> int:
    """How many prompts to try next, given what came of those tried: as many as should be enough, and no more."""
    missing = target - pairs
    if not pairs:
        return tried or missing
    return math.ceil(missing * tried / pairs)


def _decisions(run: Run, settings: CreateSettings, progress: Progress) -> Decisions:
    path = Path(settings.decisions).expanduser() if settings.decisions else run.decisions
    if settings.decisions and not path.exists():
        raise DataError(f"create.decisions: {path}: no such file; `anchored inspect` writes one")
    decisions = read_decisions(path)
    if path.exists():
        progress.note(f"create: {path}: {decisions.describe()}")
    return decisions


def _note_what_is_missing(settings: CreateSettings, prompts: PromptRows, progress: Progress) -> None:
    take, found = settings.prompts.take, len(prompts.prompts)
    if take is not None and found < take:
        progress.note(f"create: prompts.take asks for {take} prompts, there are {found}")
    if prompts.doubled_ids:
        progress.note(
            f"create: {prompts.doubled_ids} ids of the data name several prompts each (the first: "
            f"{beginning(prompts.doubled_id)}); these prompts are named by their content, and answers that exist are "
            "found by it alone"
        )
    contaminated = [row for row in prompts.refused if row.outcome is Outcome.CONTAMINATED]
    without = [row for row in prompts.refused if row.outcome is not Outcome.CONTAMINATED]
    for rows, what in ((without, "hold no prompt"), (contaminated, "are set aside as contaminated")):
        if rows:
            progress.note(f"create: {len(rows)} rows of the data {what}; the first: {rows[0].detail}")


def _note_what_failed(files: Sequence[RowFile], progress: Progress) -> None:
    failed = sum(file.outcomes[Outcome.ENDPOINT_ERROR] for file in files)
    if failed:
        first = next(file.details[Outcome.ENDPOINT_ERROR] for file in files if file.outcomes[Outcome.ENDPOINT_ERROR])
        progress.note(
            f"create: {failed} rows got no reply (the first: {first}); "
            "--redo create asks for these again and for nothing else"
        )


def _by_outcome(file: RowFile) -> dict[str, int]:
    return {str(outcome): count for outcome, count in file.outcomes.most_common()}


def _about(chat: Answering, used: Used) -> dict[str, Any]:
    spent = {"spent": asdict(chat.purse.spent())} if chat.purse else {}
    return {"model": chat.name, **asdict(used), "asked": chat.asked, "from_store": chat.hits, **spent}


_ADVICE = {
    Outcome.NO_HEADER: "the teacher does not follow its prompt: try a stronger one",
    Outcome.TRUNCATED: "raise max_tokens of create.sample or of the teacher",
    Outcome.EMPTY: "see whether the model answers at all",
    Outcome.REFUSAL: "the teacher will not work on these prompts",
    Outcome.IDENTICAL_SAMPLES: "raise the temperature of who answers",
    Outcome.ENDPOINT_ERROR: "see what the endpoint says, and the same command asks again",
    Outcome.LENGTH_RATIO: "widen the length_ratio of create.filters, or use another teacher",
    Outcome.LEAK: "take leak out of create.filters, or use another teacher",
    Outcome.CONTRAST: "widen the band of jaccard or edit_share in create.filters",
    Outcome.MISSING_ANSWER: "see whether create.answers or create.judged answers these prompts: by content or by id",
    Outcome.ADDRESSES_JUDGE: "look at the answers; create.judge.refuse_addressed=false has them judged all the same",
    Outcome.DISAGREEMENT: "try another judge",
    Outcome.UNPARSABLE: "the judge does not follow its prompt: try a stronger one",
}


def _no_pairs(refused: Path, training: RowFile) -> str:
    if not training.outcomes:
        return "create: there are no prompts to make pairs of; see create.prompts"
    counts = training.outcomes.most_common()
    outcome = counts[0][0]
    advice = _ADVICE.get(outcome, "look at them")
    return (
        f"create: none of {training.outcomes.total()} prompts became a pair "
        f"({', '.join(f'{count} {name}' for name, count in counts)}); {advice}; {refused} holds every row, "
        f"the first {outcome}: {training.details[outcome]}"
    )
