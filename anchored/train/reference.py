"""The reference's log-probabilities: computed once, kept by content, found again in any order, subset or objective.

In: the policy before its first step, and examples. Out: one value per answer, kept in `reference.sqlite`. Its key is
the model's fingerprint, the precision of the forward pass and the token ids of prompt and answer, so the file holds for
other runs too. Ranks compute a batch each at a time and the first stores them: a killed pass goes on where it was, and
the values are the same whatever the number of ranks.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from anchored.errors import DataError, TrainError
from anchored.progress import Progress
from anchored.runs import one_line
from anchored.train.examples import Example
from anchored.train.policy import Policy
from anchored.train.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Reference:
    """The reference's log-probability of every answer, by the answer's key."""

    logps: Mapping[bytes, float]
    name: str
    """The model's, in the file."""
    computed: int
    """Answers whose value was not in the file."""


def reference_logps(
    policy: Policy, examples: Sequence[Example], path: Path, ranks: Ranks, progress: Progress, name: str = ""
) -> Reference:
    """What `policy`, as it is now, gives each answer; only what `path` does not hold is computed.

    `name` is the model's, if it is not the one that the policy started from.
    """
    name = name or start_name(policy)
    with _open(path, name) if ranks.first else nullcontext() as store:
        logps = ranks.once(lambda: _stored(store, examples))
        found_before = len(logps)
        plan = _plan(examples, logps.keys(), policy.tokens_per_batch)
        if plan:
            progress.start("reference", total=sum(map(len, plan)))
        for start in range(0, len(plan), ranks.count):
            together = plan[start : start + ranks.count]
            # sharded weights are gathered by all ranks at once: one without a batch joins in with another's
            mine = together[ranks.rank % len(together)]
            new: dict[bytes, float] = {}
            for values in ranks.gather([_compute(policy, mine)])[: len(together)]:
                new = {key: value for key, value in values.items() if key not in logps} | new
            if store:
                store.put(new)
            logps.update(new)
            progress.advance("reference", sum(map(len, together)))
        if plan:
            progress.finish("reference")
    return Reference(logps, name, computed=len(logps) - found_before)


def known_reference(name: str, examples: Sequence[Example], path: Path, ranks: Ranks) -> Reference:
    """The logps of a reference that is no model at hand any more: an earlier state of a policy that trained on."""
    with _open(path, name) if ranks.first else nullcontext() as store:
        logps = ranks.once(lambda: _stored(store, examples))
    missing = sum(key not in logps for example in examples for key in example.keys)
    if missing:
        raise TrainError(
            f"{path}: lacks {missing} logps of the refreshed reference {name!r}, which cannot be computed again; "
            "restore the file, or use --redo train"
        )
    return Reference(logps, name, computed=0)


def start_name(policy: Policy) -> str:
    """The name of the model that the policy started from."""
    return f"{policy.fingerprint} {policy.precision}"


def _stored(store: _Store | None, examples: Sequence[Example]) -> dict[bytes, float]:
    assert store is not None, "the first rank's"
    return store.get({key for example in examples for key in example.keys})


def _plan(examples: Sequence[Example], known: Iterable[bytes], tokens_per_batch: int) -> list[list[Example]]:
    """Batches of the examples that bring an answer which neither `known` nor an earlier one holds, longest first.

    Each batch is filled in this order, not by the better packing of `batches.pack`: when a kill has left the first
    batches known, the plan is the rest of the same batches, so every value is the undisturbed run's to the last bit.
    """
    covered = set(known)
    batches: list[list[Example]] = []
    room = 0
    for example in sorted(examples, key=lambda example: -example.tree.size):
        if covered.issuperset(example.keys):
            continue
        covered.update(example.keys)
        if not batches or example.tree.size > room:
            batches.append([])
            room = tokens_per_batch
        batches[-1].append(example)
        room -= example.tree.size
    return batches


def _compute(policy: Policy, batch: Sequence[Example]) -> dict[bytes, float]:
    with torch.no_grad():
        rows = policy.logps([example.tree for example in batch]).tolist()
    values = {
        key: value
        for example, row in zip(batch, rows, strict=True)
        for key, value in zip(example.keys, row, strict=True)
    }
    bad = next((value for value in values.values() if not math.isfinite(value)), None)
    if bad is not None:
        raise TrainError(
            f"the starting model gives an answer the log-probability {bad} in {policy.precision}; "
            "set train.precision to float32, and if it is that already, the model's weights are broken"
        )
    return values


class _Store:
    """One model's values in a SQLite file."""

    def __init__(self, database: sqlite3.Connection, model: str) -> None:
        self._database = database
        self._model = model

    def get(self, answers: Iterable[bytes]) -> dict[bytes, float]:
        query = "SELECT logp FROM logps WHERE model = ? AND answer = ?"
        rows = ((answer, self._database.execute(query, (self._model, answer)).fetchone()) for answer in answers)
        return {answer: row[0] for answer, row in rows if row is not None}

    def put(self, values: Mapping[bytes, float]) -> None:
        """Keep values, all or none."""
        with self._database:
            rows = [(self._model, answer, logp) for answer, logp in values.items()]
            self._database.executemany("INSERT INTO logps VALUES (?, ?, ?)", rows)


@contextmanager
def _open(path: Path, model: str) -> Iterator[_Store]:
    columns = "model TEXT NOT NULL, answer BLOB NOT NULL, logp REAL NOT NULL, PRIMARY KEY (model, answer)"
    try:
        with closing(sqlite3.connect(path)) as database:
            database.execute(f"CREATE TABLE IF NOT EXISTS logps ({columns}) WITHOUT ROWID")
            yield _Store(database, model)
    except sqlite3.Error as error:
        raise DataError(
            f"{path}: cannot be used as the store of reference logps ({one_line(error)}); "
            "free disk space, or delete the file to compute them again"
        ) from None
