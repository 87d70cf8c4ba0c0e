"""The files of batches in a run folder, in the JSONL of OpenAI's Batch API, which `vllm run-batch` and others read too.

    batches/batch-0001.jsonl           the requests, one a line, each named by its key in the store of replies
    batches/batch-0001.draws.jsonl     what those lines do not hold of the requests: temperature, index, seed, ...
    batches/batch-0001.json            the batch's state: what it is called at the endpoint, and how far it is
    batches/batch-0001.output.jsonl    the replies, as they were downloaded
    batches/batch-0001.errors.jsonl    the requests that got none, likewise
    batches/export-0001.jsonl          requests for somebody else to run

A state is written before anything is sent, and anew after each step, so that a process killed at any point knows what
it may have sent. Results are found by the key of their request.
"""

from __future__ import annotations

import json
import shlex
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, NamedTuple
from uuid import uuid4

from anchored.errors import DataError
from anchored.llm.chat import Request
from anchored.llm.faults import Fault, fault_of_status
from anchored.runs import one_line, write_text, written_aside

URL = "/v1/chat/completions"
KEY_DIGITS = 64
_BEGINNING = b'{"custom_id": "'
_OFFSET_BITS = 44


class Asked(NamedTuple):
    """A request as a file holds it."""

    key: str
    request: Request
    body: Mapping[str, Any]
    """The JSON that is sent."""


def request_line(key: str, body: Mapping[str, Any]) -> bytes:
    """The line of one request."""
    line = {"custom_id": key, "method": "POST", "url": URL, "body": body}
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def keys_of(path: Path) -> Iterator[str]:
    """The keys of the requests in a file of ours. Raises DataError where it is gone."""
    for line in _lines(path):
        yield line[len(_BEGINNING) : len(_BEGINNING) + KEY_DIGITS].decode("ascii", "replace")


def count_lines(path: Path) -> int:
    """How many lines a file holds that are not empty; none where it is not there."""
    return sum(1 for line in _lines(path) if line.strip()) if path.exists() else 0


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as lines:
            yield from lines
    except FileNotFoundError:
        raise _unusable(path, "are gone") from None


def _unusable(path: Path, why: str) -> DataError:
    state = f"{path.name.split('.')[0]}.json"
    return DataError(
        f"{path}: the requests of a batch {why}; restore the file, or delete {state} beside it to ask its requests "
        "again"
    )


def _draw(request: Request) -> bytes:
    """The line of what a request's own line may not hold: its parameters as they were asked for, its index and seed."""
    draw = {each.name: getattr(request, each.name) for each in fields(request) if each.name != "messages"}
    return json.dumps(draw).encode() + b"\n"


def outcome(line: Mapping[str, Any]) -> Any | Fault:
    """What a result line says of its request: the JSON of the chat completion, or the Fault."""
    response, error = line.get("response"), line.get("error")
    if isinstance(response, dict):
        status, body = response.get("status_code"), response.get("body")
        if isinstance(status, int) and status >= 400:
            return fault_of_status(status, {}, body or error)
        if body and not error:
            return body
    if isinstance(error, dict) and isinstance(error.get("code"), int) and error["code"] >= 400:
        return fault_of_status(error["code"], {}, error)
    # not sent by the endpoint for the want of time or of a server: batch_expired, batch_cancelled, server_error
    words = error.get("message") or error.get("code") if isinstance(error, dict) else error
    reason = one_line(str(words or "the result holds no response"))[:300]
    return Fault("again", reason, not_run=bool(error) and not response)


@dataclass(slots=True)
class Counted:
    """What a file of results holds."""

    replies: int = 0
    faults: dict[str, Fault] = field(default_factory=dict)
    """By key: of the requests that got no reply."""
    foreign: int = 0
    """Results of requests that are not known here."""
    unreadable: int = 0
    """Lines that are no results: torn, or of another kind."""


class Results:
    """Replies in files, by the key of their request; 150 bytes of memory each."""

    def __init__(self) -> None:
        self._files: list[IO[bytes]] = []
        self._places: dict[bytes, int] = {}

    def add(self, path: Path, known: Callable[[str], bool] = lambda _: True) -> Counted:
        """Index a file of results. The first reply to a request stays; a reply stands before any error."""
        counted = Counted()
        number = len(self._files)
        self._files.append(open(path, "rb"))  # noqa: SIM115 - held until `close`
        offset = 0
        with open(path, "rb") as lines:
            for line in lines:
                self._add(line, number << _OFFSET_BITS | offset, counted, known)
                offset += len(line)
        for key in [key for key in counted.faults if key in self]:
            del counted.faults[key]
        return counted

    def find(self, key: str) -> Any:
        """The JSON of the chat completion; None if there is none."""
        place = self._places.get(bytes.fromhex(key))
        if place is None:
            return None
        file = self._files[place >> _OFFSET_BITS]
        file.seek(place & ((1 << _OFFSET_BITS) - 1))
        return outcome(json.loads(file.readline()))

    def forget(self, key: str) -> None:
        """It is none that can be used."""
        self._places.pop(bytes.fromhex(key), None)

    def close(self) -> None:
        """Let go of the files; idempotent."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._places

    def _add(self, text: bytes, place: int, counted: Counted, known: Callable[[str], bool]) -> None:
        if not text.strip():
            return
        try:
            line = json.loads(text)
            key = line["custom_id"]
        except (ValueError, TypeError, KeyError, RecursionError):
            counted.unreadable += 1
            return
        if not _is_key(key):
            counted.foreign += 1
            return
        counted.foreign += not known(key)  # it may be asked for yet
        result = outcome(line)
        if isinstance(result, Fault):
            counted.faults[key] = result
        else:
            counted.replies += 1
            self._places.setdefault(bytes.fromhex(key), place)


def _is_key(custom_id: object) -> bool:
    if not isinstance(custom_id, str) or len(custom_id) != KEY_DIGITS:
        return False
    try:
        bytes.fromhex(custom_id)
    except ValueError:
        return False
    return True


@dataclass(slots=True)
class State:
    """How far a batch is; a file holds the same."""

    base_url: str
    fingerprint: str
    requests: int
    usd: float
    """The most that it can cost; 0 where money is not counted."""
    tag: str = field(default_factory=lambda: uuid4().hex)
    """In the batch's metadata at the endpoint: by it a batch is found whose name there was lost."""
    begun: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    file_id: str = ""
    """Of the uploaded requests. Without it no batch was ever made of them."""
    batch_id: str = ""
    status: str = "new"
    """The endpoint's word: validating, in_progress, finalizing, completed, failed, expired, cancelling, cancelled."""
    collected: bool = False
    """Its results are here."""
    kept: bool = False
    """Its replies are in the store, and counted."""
    used: bool = False
    """The stage that asked for it is complete."""

    @property
    def is_out(self) -> bool:
        """Whether the endpoint may be at work on it."""
        return bool(self.file_id) and not self.collected


class Batch:
    """One batch's files and state."""

    def __init__(self, folder: Path, name: str, state: State) -> None:
        self.name = name
        self.state = state
        self.requests = folder / f"{name}.jsonl"
        self.draws = folder / f"{name}.draws.jsonl"
        self.output = folder / f"{name}.output.jsonl"
        self.errors = folder / f"{name}.errors.jsonl"
        self.file = folder / f"{name}.json"

    @property
    def results(self) -> list[Path]:
        """Its files of results that are there."""
        return [path for path in (self.output, self.errors) if path.exists()]

    @property
    def was_run(self) -> bool:
        """Whether any of its requests was, as far as is known: a batch that failed as a whole has no results."""
        return self.state.status != "failed" or bool(self.results)

    def write(self, asked: Iterable[Asked]) -> None:
        """Put its requests on the disk."""
        with (
            written_aside(self.requests) as lines_aside,
            written_aside(self.draws) as draws_aside,
            open(lines_aside, "wb") as lines,
            open(draws_aside, "wb") as draws,
        ):
            for one in asked:
                lines.write(request_line(one.key, one.body))
                draws.write(_draw(one.request))

    def asked(self) -> Iterator[Asked]:
        """Its requests, in order. Raises DataError where they are gone, or no longer those that were written."""
        try:
            for line, draw in zip(_lines(self.requests), _lines(self.draws), strict=True):
                row = json.loads(line)
                request = Request.from_json(row["body"]["messages"], json.loads(draw))
                yield Asked(row["custom_id"], request, row["body"])
        except (ValueError, KeyError, TypeError) as error:
            raise _unusable(self.requests, f"cannot be read ({one_line(error)})") from None

    def save(self) -> None:
        """Put the state on the disk."""
        write_text(self.file, json.dumps(asdict(self.state), indent=1) + "\n")

    def drop(self) -> None:
        """Forget a batch that was never made."""
        self.file.unlink()
        for path in (self.requests, self.draws):
            path.unlink(missing_ok=True)


class BatchFolder:
    """The batches of a run, of all its endpoints. One object for each process: it names files apart."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._naming = threading.Lock()
        self._exported = 0
        """Files that this process has exported."""
        self._heard: set[Path] = set()

    @property
    def ending(self) -> str:
        """The command that ends what is under way."""
        return f"`anchored create RECIPE --out {shlex.quote(str(self.path.parent))} --cancel-batches`"

    def begin(self, asked: Iterable[Asked], state: State) -> Batch:
        """Write the requests and the intent to send them."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self._naming:
            batch = Batch(self.path, f"batch-{self._last_number() + 1:04d}", state)
            batch.write(asked)
            batch.save()
        return batch

    def batches(self) -> list[Batch]:
        """All of them, in order."""
        return [Batch(self.path, path.stem, _read_state(path)) for path in sorted(self.path.glob("batch-*.json"))]

    def note_used(self) -> None:
        """The stage is complete: what its batches refused may be asked again from now on."""
        for batch in self.batches():
            if batch.state.kept and not batch.state.used:
                batch.state.used = True
                batch.save()

    def requests(self) -> list[Path]:
        """All files of requests that were made here, and are there."""
        return [batch.requests for batch in self.batches() if batch.requests.exists()] + self._exports()

    def is_new(self, path: Path) -> bool:
        """Whether this process has not asked this of a file before."""
        known = path in self._heard
        self._heard.add(path)
        return not known

    def export(self, files: Iterable[Iterable[Asked]]) -> list[Path]:
        """Write files for somebody else, in place of those of earlier processes."""
        self.path.mkdir(parents=True, exist_ok=True)
        for earlier in self._exports() if not self._exported else ():
            earlier.unlink()
        written = []
        for asked in files:
            self._exported += 1
            path = self.path / f"export-{self._exported:04d}.jsonl"
            with written_aside(path) as aside, open(aside, "wb") as lines:
                lines.writelines(request_line(one.key, one.body) for one in asked)
            written.append(path)
        return written

    def _last_number(self) -> int:
        """Of all files: a batch whose state was deleted may have left results, which are no later batch's."""
        names = [path.name.split(".")[0].removeprefix("batch-") for path in self.path.glob("batch-*")]
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def _exports(self) -> list[Path]:
        return [path for path in sorted(self.path.glob("export-*.jsonl")) if path.stem.count(".") == 0]


def _read_state(path: Path) -> State:
    try:
        found = json.loads(path.read_text("utf-8"))
        return State(**{each.name: found[each.name] for each in fields(State)})
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not a readable state of a batch ({one_line(error)}); restore it, or delete it to ask again"
        ) from None
