"""OpenAI's Batch API: upload, make, find, follow, cancel, download. Each call ends in its value or in a `Fault`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchored.errors import DataError
from anchored.llm.batch_files import URL, State
from anchored.llm.connection import Connection
from anchored.llm.faults import Fault
from anchored.runs import one_line, written_aside

if TYPE_CHECKING:
    from openai import AsyncAPIResponse
    from openai.types import Batch as ApiBatch

WINDOW = "24h"
TAG = "anchored"
FILE_SECONDS = 3600.0
CALL_SECONDS = 120.0
CHUNK_BYTES = 2**20
ENDED = ("completed", "failed", "expired", "cancelled")


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
        return found if isinstance(found, Fault) else found.id

    async def make(self, state: State) -> Look | Fault:
        """Make a batch of the uploaded requests."""
        made = self.connection.client.batches.create(
            completion_window=WINDOW,
            endpoint=URL,
            input_file_id=state.file_id,
            metadata={TAG: state.tag},
            extra_headers=self._headers,
        )
        return self._looked(await self.connection.attempt(made, CALL_SECONDS))

    async def find(self, state: State) -> Look | Fault | None:
        """The batch that was made of the uploaded requests, should there be one."""

        async def call() -> ApiBatch | None:
            async for batch in self.connection.client.batches.list(limit=100, extra_headers=self._headers):
                # some endpoints keep no metadata; a file is uploaded anew for each batch
                if (batch.metadata or {}).get(TAG) == state.tag or batch.input_file_id == state.file_id:
                    return batch
            return None

        return self._looked(await self.connection.attempt(call(), CALL_SECONDS))

    async def look(self, state: State) -> Look | Fault:
        """How far a batch is."""
        seen = self.connection.client.batches.retrieve(state.batch_id, extra_headers=self._headers)
        return self._looked(await self.connection.attempt(seen, CALL_SECONDS))

    async def cancel(self, state: State) -> Look | Fault:
        """Ask for a batch's end; what is answered already stays."""
        seen = self.connection.client.batches.cancel(state.batch_id, extra_headers=self._headers)
        return self._looked(await self.connection.attempt(seen, CALL_SECONDS))

    async def download(self, file_id: str, path: Path) -> Fault | None:
        """Bring a file of results here, whole or not at all."""
        content = self.connection.client.files.with_streaming_response.content

        async def call() -> None:
            with written_aside(path) as aside, open(aside, "wb") as file:
                async with content(file_id, extra_headers=self._headers, timeout=FILE_SECONDS) as response:
                    async for piece in self._keyless(_chunks(response)):
                        _write(file, piece, path)

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

    def _looked(self, seen: Any) -> Any:
        """An SDK's batch as a `Look`; what is none stays as it is."""
        if seen is None or isinstance(seen, Fault):
            return seen
        if not seen.id or not seen.status:
            return Fault("again", "the reply is no batch")
        errors = (seen.errors and seen.errors.data) or []
        words = [f"{error.message or error.code}{f' (line {error.line})' if error.line else ''}" for error in errors]
        more = f" and {len(words) - 3} more" if len(words) > 3 else ""
        counts = seen.request_counts
        return Look(
            batch_id=seen.id,
            status=seen.status,
            done=(counts and counts.completed) or 0,
            failed=(counts and counts.failed) or 0,
            output_file_id=seen.output_file_id or "",
            error_file_id=seen.error_file_id or "",
            errors=self.connection.without_key(one_line("; ".join(words[:3]) + more if words else "no reason given"))[
                :600
            ],
            limited=any(_is_load(error) for error in errors),
        )


def _is_load(error: Any) -> bool:
    """Whether an error of a batch speaks of how much is under way ("Enqueued token limit reached ...")."""
    return "enqueued" in str(error.message).lower() or error.code in ("token_limit_exceeded", "request_limit_exceeded")


async def _chunks(response: AsyncAPIResponse[bytes]) -> AsyncIterator[bytes]:
    """A body in pieces. Raises ConnectionError where it breaks off: the SDK lets its transport's errors pass."""
    try:
        async for chunk in response.iter_bytes(CHUNK_BYTES):
            yield chunk
    except (asyncio.CancelledError, GeneratorExit):
        raise
    except Exception as error:
        raise ConnectionError("the file was cut short") from error


def _write(file: Any, chunk: bytes, path: Path) -> None:
    try:
        file.write(chunk)
    except OSError as error:  # the disk's, not the connection's
        raise DataError(f"{path}: {error.strerror}; make room, then the same command goes on") from None
