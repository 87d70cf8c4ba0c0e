"""What people decided about pairs: a file of decisions, one JSON object a line, and what they make of a pair.

The file only grows; the last decision about a pair holds. A decision names its pair by the prompt's id and by the
content of the pair as it was made, so it never lands on another one. A line that cannot be read is left out and told
of. Nothing here knows who decides or when pairs are made: `inspect` writes decisions, `create` applies them.
"""

from __future__ import annotations

import fcntl
import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal, get_args

from anchored.datasets_io import checked
from anchored.datasets_io.cells import well_formed
from anchored.errors import DataError
from anchored.records import Answer, Outcome, Pair, content_hash
from anchored.runs import append_line, one_line, sync

Kind = Literal["keep", "drop", "edit", "undo"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ANSWERS = ("chosen", "rejected")

_EDITED = "edited"


@dataclass(frozen=True, slots=True)
class Key:
    """Which pair."""

    id: str
    """The prompt's."""
    pair: str
    """The first 32 hex digits of the sha256 of the prompt's turns and both answers, before any edit."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What a person said about one pair."""

    key: Key
    kind: Kind
    edited: Mapping[str, str] = field(default_factory=dict)
    """Of an edit: the new text of `chosen`, `rejected` or both."""
    original: Mapping[str, str] = field(default_factory=dict)
    """Of an edit: what these answers said before."""
    becomes: str = ""
    """Of an edit: the content (as in `Key.pair`) of what it makes, by which it is found again."""
    note: str = ""
    time: str = ""
    """ISO 8601, UTC."""


class Decisions:
    """The decisions of a file, by pair."""

    def __init__(self) -> None:
        self.unreadable: list[int] = []
        """Lines that are no decision, the first line being 1; a line torn by a kill is one."""
        self._last: dict[Key, Decision] = {}
        self._edits: dict[Key, Decision] = {}

    def add(self, decision: Decision) -> None:
        """A later decision."""
        self._last[decision.key] = decision
        if decision.kind == "edit":
            self._edits[Key(decision.key.id, decision.becomes)] = decision

    def about(self, key: Key) -> Decision | None:
        """What holds for a pair; None where nothing was decided, or was undone."""
        decision = self._last.get(key)
        return None if decision is None or decision.kind == "undo" else decision

    def edit_that_made(self, key: Key) -> Decision | None:
        """The edit whose result has this key, if it is an edited pair."""
        return self._edits.get(key)

    def counts(self) -> Counter[str]:
        """How many pairs each kind holds for."""
        return Counter(decision.kind for decision in self._last.values() if decision.kind != "undo")

    def describe(self) -> str:
        """For people: `14 decisions (5 keep, 8 drop, 1 edit)`, and which lines were left out."""
        counts = self.counts()
        kinds = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind])
        total = counts.total()
        said = f"{total} decision{'' if total == 1 else 's'}{f' ({kinds})' if kinds else ''}"
        if not self.unreadable:
            return said
        some = ", ".join(map(str, self.unreadable[:5])) + (" ..." if self.unreadable[5:] else "")
        return f"{said}; {len(self.unreadable)} unreadable left out (line {some})"


def read_decisions(path: Path) -> Decisions:
    """The decisions of a file; none of a missing one. Raises DataError if it cannot be opened."""
    file = DecisionFile(path)
    file.refresh()
    return file.decisions


def apply(pair: Pair, decisions: Decisions) -> Pair:
    """What people make of a pair as it was made, and refused or accepted.

    drop refuses it (`dropped`), keep accepts it though it was refused, edit changes texts and accepts it. A refused
    row stays refused as it was when it is dropped, or when nothing can be learnt from what was kept (see `obstacle`).
    """
    decision = decisions.about(key_of(pair))
    return pair if decision is None else decided(pair, decision)


def decide(pair: Pair, kind: Kind, texts: Mapping[str, str] | None = None, note: str = "") -> Decision:
    """A decision about a pair that has none applied; `texts` are an edit's answers, as far as they are new.

    Raises DataError where it would leave no pair to train on, or changes nothing.
    """
    new = {name: well_formed(text) for name, text in (texts or {}).items()}
    changed = {name: text for name, text in new.items() if text != getattr(pair, name).text} if kind == "edit" else {}
    if kind == "edit" and not changed:
        raise DataError("the edit changes nothing; keep the pair, or undo what was decided")
    decision = Decision(
        key_of(pair),
        kind,
        changed,
        {name: getattr(pair, name).text for name in changed},
        note=well_formed(note),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    after = edited(pair, decision)
    if kind in ("keep", "edit") and (reason := obstacle(after)):
        raise DataError(f"this cannot be kept: {reason}")
    return replace(decision, becomes=key_of(after).pair) if kind == "edit" else decision


def decided(pair: Pair, decision: Decision) -> Pair:
    """What one decision makes of its pair."""
    said = f" ({decision.note})" if decision.note else ""
    if decision.kind == "edit":
        return _accepted(edited(pair, decision), f"edited by a person{said}")
    if decision.kind == "drop" and pair.outcome is Outcome.OK:
        return replace(pair, outcome=Outcome.DROPPED, detail=f"dropped by a person{said}")
    if decision.kind == "keep" and pair.outcome is not Outcome.OK:
        return _accepted(pair, f"kept by a person{said}")
    return pair


def edited(pair: Pair, decision: Decision) -> Pair:
    """The pair with the decision's texts; who wrote an answer that was edited is `MODEL+edited`."""
    answers = {name: Answer(text, _edited_name(getattr(pair, name).model)) for name, text in decision.edited.items()}
    return replace(pair, **answers)


def unedited(pair: Pair, decision: Decision) -> Pair:
    """The pair as it was before an edit."""
    answers = {name: Answer(text, _plain_name(getattr(pair, name).model)) for name, text in decision.original.items()}
    return replace(pair, **answers)


def obstacle(pair: Pair) -> str:
    """Why a row, whatever its outcome, is no pair to train on; empty if it is one."""
    after = checked(replace(pair, outcome=Outcome.OK))
    return "" if after.outcome is Outcome.OK else after.detail


def key_of(pair: Pair) -> Key:
    """The name that a pair has in the file."""
    # texts as files hold them, for there half a surrogate pair is no text
    turns = [[message.role, well_formed(message.content)] for message in pair.prompt.messages]
    content = content_hash([turns, well_formed(pair.chosen.text), well_formed(pair.rejected.text)])
    return Key(well_formed(pair.prompt.id), content[:32])


class DecisionFile:
    """A file of decisions that several people may write to at once, in one process or in several."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.decisions = Decisions()
        self._bytes = self._lines = 0  # read so far
        self._mutex = threading.Lock()

    def append(self, decision: Decision) -> list[Decision]:
        """Add a decision, on the disk when this returns; returns all that is new in the file.

        Raises DataError if the file cannot be written.
        """
        with self._mutex:
            try:
                is_new = not self.path.exists()
                with _locked(self.path, "ab", fcntl.LOCK_EX):
                    append_line(self.path, _as_line(decision))
                    sync(self.path)
                if is_new:
                    sync(self.path.parent)
            except OSError as error:
                raise DataError(f"{self.path}: cannot be written ({one_line(error)}); see --decisions") from None
            return self._read_on()

    def refresh(self) -> list[Decision]:
        """Read what others have added; returns it."""
        with self._mutex:
            return self._read_on()

    def close(self) -> None:
        """Wait for a decision that is being written, and take no more."""
        self._mutex.acquire()

    def _read_on(self) -> list[Decision]:
        try:
            size = self.path.stat().st_size if self.path.exists() else 0
            if size < self._bytes:  # another file has taken its place
                self.decisions, self._bytes, self._lines = Decisions(), 0, 0
            if size == self._bytes:
                return []
            with _locked(self.path, "rb", fcntl.LOCK_SH) as handle:
                handle.seek(self._bytes)
                data = handle.read()
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({one_line(error)})") from None
        self._bytes += len(data)
        # nobody is writing: a last line without its end was torn, or typed by hand
        lines = data.split(b"\n")
        found = [self._take(line, number) for number, line in enumerate(lines, self._lines + 1) if line.strip()]
        self._lines += len(lines) - 1
        return [decision for decision in found if decision]

    def _take(self, line: bytes, number: int) -> Decision | None:
        decision = _from_line(line)
        if decision:
            self.decisions.add(decision)
        else:
            self.decisions.unreadable.append(number)
        return decision


@contextmanager
def _locked(path: Path, mode: str, lock: int) -> Iterator[IO[bytes]]:
    with open(path, mode) as handle:
        fcntl.flock(handle, lock)
        yield handle


def _as_line(decision: Decision) -> dict[str, Any]:
    line: dict[str, Any] = {"id": decision.key.id, "pair": decision.key.pair, "decision": decision.kind}
    if decision.kind == "edit":
        line |= {"edited": dict(decision.edited), "original": dict(decision.original), "becomes": decision.becomes}
    return line | {"note": decision.note, "time": decision.time}


def _from_line(line: bytes) -> Decision | None:
    """A line as a decision; None if it is not one."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("decision") not in KINDS:
        return None
    texts = {name: found.get(name, "") for name in ("id", "pair", "becomes", "note", "time")}
    new, before = found.get("edited", {}), found.get("original", {})
    sound = all(isinstance(text, str) for text in texts.values()) and texts["pair"]
    if not sound or not _are_answers(new) or not _are_answers(before) or new.keys() != before.keys():
        return None
    kind: Kind = found["decision"]
    if (kind == "edit") != bool(new):
        return None
    return Decision(Key(texts["id"], texts["pair"]), kind, new, before, texts["becomes"], texts["note"], texts["time"])


def _are_answers(value: object) -> bool:
    return isinstance(value, dict) and all(name in ANSWERS and isinstance(text, str) for name, text in value.items())


def _accepted(pair: Pair, said: str) -> Pair:
    """The pair accepted, or as it is where nothing can be learnt from it."""
    refused = pair.outcome is not Outcome.OK
    was = f"{pair.outcome} ({pair.detail})" if pair.detail else str(pair.outcome)
    after = checked(replace(pair, outcome=Outcome.OK, detail=f"{said}, was: {was}" if refused else said))
    if after.outcome is Outcome.OK:
        return after
    return pair if refused else replace(after, detail=f"{said}: {after.detail}")


def _edited_name(model: str) -> str:
    plain = _plain_name(model)
    return f"{plain}+{_EDITED}" if plain else _EDITED


def _plain_name(model: str) -> str:
    """Who wrote an answer before people edited it."""
    return "" if model == _EDITED else model.removesuffix(f"+{_EDITED}")
