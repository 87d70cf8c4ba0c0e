"""OpenAI's Batch API: upload, make, find, follow, cancel, download. Each call ends in its value or in a `Fault`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from anchored.errors import DataError
from anchored.llm.batch_files import URL, State
from anchored.llm.connection import Connection
from anchored.llm.faults import Fault
from anchored.runs import one_line, written_aside

if TYPE_CHECKING:
    from openai import AsyncAPIResponse

WINDOW = "24h"
TAG = "anchored"
FILE_SECONDS = 3600.0
CALL_SECONDS = 120.0
CHUNK_BYTES = 2**20
LIST_LIMIT = 100
ENDED = ("completed", "failed", "expired", "cancelled")
STATUSES = ("validating", "in_progress", "finalizing", "cancelling", *ENDED)


@dataclass(frozen=True, slots=True)
class Look:
    """What the endpoint says of a batch."""

    batch_id: str
    status: str
    done: int
    failed: int
    output_file_id: str
    error_file_id: str
    errors: str
    """Why it failed as a whole, in the endpoint's words."""
    limited: bool
    """It failed because too much is under way, not for what is in it."""

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.status in ENDED


class BatchApi:
    """The Batch API of one endpoint."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    async def upload(self, path: Path) -> str | Fault:
        """The name that a file of requests has there from now on."""
        files = self.connection.client.files
        made = files.create(file=path, purpose="batch", extra_headers=self._headers, timeout=FILE_SECONDS)
        found = await self.connection.attempt(made, FILE_SECONDS)
        if isinstance(found, Fault):
            return found
        name = getattr(found, "id", None)  # a page of HTML comes as text
        return name if name and isinstance(name, str) else Fault("again", "the reply names no file")

    async def knows_file(self, file_id: str) -> bool | Fault:
        """Whether this key's account has the file."""
        seen = await self._call("get", f"/files/{_quoted(file_id)}")
        if isinstance(seen, Fault) and seen.status == 404:
            return False
        return seen if isinstance(seen, Fault) else True

    async def make(self, state: State) -> Look | Fault:
        """Make a batch of the uploaded requests."""
        wanted = {
            "completion_window": WINDOW,
            "endpoint": URL,
            "input_file_id": state.file_id,
            "metadata": {TAG: state.tag},
        }
        return self._looked(await self._call("post", "/batches", wanted))

    async def find(self, state: State) -> Look | Fault | None:
        """The batch that was made of the uploaded requests, should there be one."""
        after, pages = "", set[str]()
        while after not in pages:  # some endpoints send the first page for ever
            pages.add(after)
            page = await self._call(
                "get", f"/batches?limit={LIST_LIMIT}" + (f"&after={_quoted(after)}" if after else "")
            )
            if isinstance(page, Fault):
                return page
            batches = page.get("data") if isinstance(page, dict) else None
            if not isinstance(batches, list) or not all(isinstance(batch, dict) for batch in batches):
                return Fault("again", "the reply is no list of batches")
            for batch in batches:
                # some endpoints keep no metadata; a file is uploaded anew for each batch
                if _dict(batch, "metadata").get(TAG) == state.tag or batch.get("input_file_id") == state.file_id:
                    return self._looked(batch)
            if not batches or page.get("has_more") is False:
                return None
            after = _text(batches[-1], "id")
        return None

    async def look(self, state: State) -> Look | Fault:
        """How far a batch is."""
        return self._looked(await self._call("get", f"/batches/{_quoted(state.batch_id)}"))

    async def cancel(self, state: State) -> Look | Fault:
        """Ask for a batch's end; what is answered already stays."""
        return self._looked(await self._call("post", f"/batches/{_quoted(state.batch_id)}/cancel"))

    async def download(self, file_id: str, path: Path) -> Fault | None:
        """Bring a file of results here, whole or not at all."""
        content = self.connection.client.files.with_streaming_response.content

        async def call() -> None:
            try:
                with written_aside(path) as aside, open(aside, "wb") as file:
                    async with content(file_id, extra_headers=self._headers, timeout=FILE_SECONDS) as response:
                        async for piece in self._keyless(_chunks(response)):
                            file.write(piece)
            except (ConnectionError, TimeoutError):  # OSErrors, and the endpoint's
                raise
            except OSError as error:
                why = error.strerror or type(error).__name__
                raise DataError(
                    f"{path}: the disk does not take the results ({why}); make room, then the same command goes on"
                ) from None

        return await self.connection.attempt(call(), FILE_SECONDS)

    async def _keyless(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Without the key, also where it lies across two pieces."""
        left, longest = b"", max(0, len(self.connection.secret) - 1)
        async for chunk in chunks:
            whole = self.connection.keyless(left + chunk)
            end = max(0, len(whole) - longest)
            yield whole[:end]
            left = whole[end:]
        yield left

    @property
    def _headers(self) -> dict[str, Any]:
        return dict(self.connection.headers)

    async def _call(self, verb: str, path: str, body: Mapping[str, Any] | None = None) -> Any | Fault:
        """The JSON that comes back."""

        async def call() -> Any:
            return json.loads((await self.connection.send(verb, path, body)).response.content)

        return await self.connection.attempt(call(), CALL_SECONDS)

    def _looked(self, seen: Any | Fault) -> Look | Fault:
        """An endpoint's JSON of a batch, of which nothing is sure."""
        if isinstance(seen, Fault):
            return seen
        if not isinstance(seen, dict) or not _text(seen, "id") or not _text(seen, "status"):
            return Fault("again", "the reply is no batch")
        status = _text(seen, "status").lower()
        if status not in STATUSES:
            return Fault(
                "row", self.connection.without_key(f"calls the batch {status!r}, which is no status of OpenAI's")
            )
        listed = _dict(seen, "errors").get("data")
        errors = [error for error in listed if isinstance(error, dict)] if isinstance(listed, list) else []
        counts = _dict(seen, "request_counts")
        return Look(
            batch_id=_text(seen, "id"),
            status=status,
            done=_count(counts, "completed"),
            failed=_count(counts, "failed"),
            output_file_id=_text(seen, "output_file_id"),
            error_file_id=_text(seen, "error_file_id"),
            errors=self.connection.without_key(_words(errors))[:600],
            limited=any(_is_load(error) for error in errors),
        )


def _words(errors: list[dict[str, Any]]) -> str:
    """Why a batch failed, from its first errors."""
    words = []
    for error in errors[:3]:
        line = f" (line {error['line']})" if error.get("line") else ""
        words.append(f"{error.get('message') or error.get('code')}{line}")
    more = f" and {len(errors) - 3} more" if len(errors) > 3 else ""
    return one_line("; ".join(words) + more if words else "no reason given")


def _is_load(error: dict[str, Any]) -> bool:
    """Whether an error of a batch speaks of how much is under way ("Enqueued token limit reached ...")."""
    by_code = error.get("code") in ("token_limit_exceeded", "request_limit_exceeded")
    return by_code or "enqueued" in str(error.get("message")).lower()


def _dict(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = found.get(name)
    return value if isinstance(value, dict) else {}


def _text(found: Mapping[str, Any], name: str) -> str:
    value = found.get(name)
    return value if isinstance(value, str) else ""


def _count(found: Mapping[str, Any], name: str) -> int:
    value = found.get(name)
    return value if isinstance(value, int) else 0


def _quoted(name: str) -> str:
    return quote(name, safe="")


async def _chunks(response: AsyncAPIResponse[bytes]) -> AsyncIterator[bytes]:
    """A body in pieces. Raises ConnectionError where it breaks off: the SDK lets its transport's errors pass."""
    try:
        async for chunk in response.iter_bytes(CHUNK_BYTES):
            yield chunk
    except (asyncio.CancelledError, GeneratorExit):
        raise
    except Exception as error:
        raise ConnectionError("the file was cut short") from error
