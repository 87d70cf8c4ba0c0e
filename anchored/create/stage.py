"""The stage that makes pairs: prompts in; pairs.parquet, held_out.parquet and refused.parquet in the run folder out.

Each prompt is one row, made from its sample to its outcome in one go, many rows at once. Every reply comes through the
store, so a run that was cut short, or has another parser or filter now, asks nothing twice.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anchored import contrast
from anchored.create.clair import clair
from anchored.create.desk import CreateChats, Desk, Used
from anchored.create.filters import filtered
from anchored.create.judge import judge_on_policy
from anchored.create.settings import CreateSettings
from anchored.create.stronger import stronger_preferred
from anchored.datasets_io import PromptRows, write_pairs
from anchored.decisions import Decisions, apply, read_decisions
from anchored.errors import DataError
from anchored.llm.ask import work_through
from anchored.llm.replies import Remembered
from anchored.progress import Progress
from anchored.records import Outcome, Pair, Prompt
from anchored.runs import Run

__all__ = ["METHODS", "CreateChats", "CreateSummary", "create"]

METHODS: Mapping[str, Callable[[Prompt, Desk], Awaitable[Pair]]] = {
    "clair": clair,
    "judge-on-policy": judge_on_policy,
    "stronger-preferred": stronger_preferred,
}
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
    """Rows of the data that hold no prompt."""
    contrast: dict[str, Any]
    """The pairs' row of Table 1."""
    replies: dict[str, dict[str, Any]]
    """Of policy and teacher: the model, the tokens of the replies that rows were made of, and how many replies this
    process asked for and how many it had in the store."""
    seconds: float
    """Of this process."""


async def create(
    run: Run, settings: CreateSettings, prompts: PromptRows, chats: CreateChats, progress: Progress
) -> CreateSummary:
    """Make a row of every prompt and write them; what Stopped or ModelError cut short goes on with the same call."""
    started = time.perf_counter()
    desk = Desk(settings, chats)
    _note_what_is_missing(settings, prompts, progress)
    decisions = _decisions(run, settings, progress)
    rows = await _rows(desk, [*prompts.prompts, *prompts.held_out], decisions, progress)
    training, held_out = rows[: len(prompts.prompts)], rows[len(prompts.prompts) :]
    # the refused first: they say why, should there be no pair
    _write_refused(run.refused, {"training": training, "held_out": held_out, "data": prompts.refused})
    _note_what_failed(rows, progress)
    pairs, held_out_pairs = _accepted(training), _accepted(held_out)
    if not pairs:
        raise DataError(_no_pairs(run.refused, training))
    _write_pairs(run.pairs, pairs)
    _write_pairs(run.held_out, held_out_pairs)
    summary = CreateSummary(
        method=settings.method,
        pairs=len(pairs),
        held_out=len(held_out_pairs),
        outcomes=_by_outcome(training),
        held_out_outcomes=_by_outcome(held_out),
        prompts_refused=len(prompts.refused),
        contrast=asdict(contrast.contrast(pairs)),
        replies={"policy": _about(chats.policy, desk.policy), "teacher": _about(chats.teacher, desk.teacher)},
        seconds=time.perf_counter() - started,
    )
    run.complete("create", asdict(summary))
    return summary


async def _rows(desk: Desk, prompts: Sequence[Prompt], decisions: Decisions, progress: Progress) -> list[Pair]:
    """A row of each prompt, in their order: the teacher works while the policy still samples.

    What ends the stage is raised when the rows under way are through, for their replies may have been paid for.
    """
    make, filters = METHODS[desk.settings.method], desk.settings.active_filters()
    outcomes: Counter[str] = Counter()

    async def row(_: int, prompt: Prompt) -> Pair:
        pair = apply(filtered(await make(prompt, desk), filters), decisions)
        outcomes[pair.outcome] += 1
        progress.advance(_TASK, **outcomes)
        return pair

    progress.start(_TASK, len(prompts))
    try:
        return await work_through(prompts, row)
    finally:
        progress.finish(_TASK)


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
    if prompts.refused:
        first = prompts.refused[0].detail
        progress.note(f"create: {len(prompts.refused)} rows of the data hold no prompt; the first: {first}")


def _note_what_failed(rows: Sequence[Pair], progress: Progress) -> None:
    failed = [row for row in rows if row.outcome is Outcome.ENDPOINT_ERROR]
    if failed:
        progress.note(
            f"create: {len(failed)} rows got no reply (the first: {failed[0].detail}); "
            "--redo create asks for these again and for nothing else"
        )


def _accepted(rows: Iterable[Pair]) -> list[Pair]:
    return [row for row in rows if row.outcome is Outcome.OK]


def _by_outcome(rows: Iterable[Pair]) -> dict[str, int]:
    return {str(outcome): count for outcome, count in Counter(row.outcome for row in rows).most_common()}


def _write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    each = contrast.contrasts(pairs)
    columns = ("jaccard", "levenshtein", "length_ratio")
    write_pairs(path, pairs, {name: [getattr(one, name) for one in each] for name in columns})


def _write_refused(path: Path, sets: Mapping[str, Sequence[Pair]]) -> None:
    refused = [(name, row) for name, rows in sets.items() for row in rows if row.outcome is not Outcome.OK]
    write_pairs(path, [row for _, row in refused], {"set": [name for name, _ in refused]})


def _about(chat: Remembered, used: Used) -> dict[str, Any]:
    return {"model": chat.name, **asdict(used), "asked": chat.asked, "from_store": chat.hits}


_ADVICE = {
    Outcome.NO_HEADER: "the teacher does not follow its prompt: try a stronger one",
    Outcome.TRUNCATED: "raise max_tokens of create.sample or of the teacher",
    Outcome.EMPTY: "see whether the model answers at all",
    Outcome.REFUSAL: "the teacher will not work on these prompts",
    Outcome.IDENTICAL_SAMPLES: "raise create.sample.temperature",
    Outcome.ENDPOINT_ERROR: "see what the endpoint says",
    Outcome.LENGTH_RATIO: "widen the length_ratio of create.filters, or use another teacher",
    Outcome.LEAK: "take leak out of create.filters, or use another teacher",
}


def _no_pairs(refused: Path, rows: Sequence[Pair]) -> str:
    if not rows:
        return "create: there are no prompts to make pairs of; see create.prompts"
    counts = Counter(row.outcome for row in rows).most_common()
    outcome = counts[0][0]
    first = next(row.detail for row in rows if row.outcome is outcome)
    advice = _ADVICE.get(outcome, "compare the texts")
    return (
        f"create: none of {len(rows)} prompts became a pair ({', '.join(f'{count} {name}' for name, count in counts)})"
        f"; {advice}; {refused} holds every row, the first {outcome}: {first}"
    )
