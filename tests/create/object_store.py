"""An S3 server on loopback, as much of it as pyarrow's client asks for: buckets in memory, ranges, multipart uploads.

An upload that is not completed leaves nothing, as in S3. Signatures are not checked, but one by another key is refused.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Self
from xml.sax.saxutils import escape

from aiohttp import web

KEY, SECRET = "AKIAPLANTEDKEY01", "planted/secret+of+the+store/0123456789"


class ObjectStore:
    """Use as a context manager; its objects may be looked at and put from outside."""

    def __init__(self, *buckets: str) -> None:
        self.buckets: dict[str, dict[str, bytes]] = {name: {} for name in buckets}
        self.refuses_writes = False
        self.stalled = threading.Event()
        """Set once a part has come that is not answered, if `stalls`."""
        self.stalls = False
        self.writes = 0
        """Objects that were put."""
        self.sent = 0
        """Bytes of objects that were read."""
        self._uploads: dict[str, dict[int, bytes]] = {}
        self._ends = asyncio.Event()
        self._numbers = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def host(self) -> str:
        """HOST:PORT."""
        return f"127.0.0.1:{self._port}"

    @property
    def environment(self) -> Mapping[str, str]:
        """What makes a process use this store."""
        return {
            "AWS_ENDPOINT_URL": f"http://{self.host}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._start())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._ends.set)
        self._do(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: object) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)  # type: ignore[arg-type]

    async def _start(self) -> None:
        application = web.Application(client_max_size=2**30)
        application.router.add_route("*", "/{bucket}", self._answer)
        application.router.add_route("*", "/{bucket}/{key:.*}", self._answer)
        self._runner = web.AppRunner(application, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self._port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]

    async def _answer(self, request: web.Request) -> web.Response:
        if KEY not in request.headers.get("Authorization", ""):
            return _error(403, "InvalidAccessKeyId")
        objects = self.buckets.get(request.match_info["bucket"])
        if objects is None:
            return _error(404, "NoSuchBucket")
        key, query = request.match_info.get("key", ""), request.query
        if request.method in ("PUT", "POST") and "delete" not in query:
            return await self._write(request, objects, key)
        if request.method == "DELETE":
            self._uploads.pop(query.get("uploadId", ""), None) if "uploadId" in query else objects.pop(key, None)
            return web.Response(status=204)
        if not key:
            return self._list(objects, query) if request.method == "GET" else web.Response()
        if key not in objects:
            return _error(404, "NoSuchKey")
        answer = _ranged(objects[key], request)
        self.sent += len(answer.body) if isinstance(answer.body, bytes) else 0
        return answer

    async def _write(self, request: web.Request, objects: dict[str, bytes], key: str) -> web.Response:
        if self.refuses_writes:
            return _error(403, "AccessDenied")
        query, body = request.query, await request.read()
        if request.headers.get("Content-Encoding", "") == "aws-chunked":
            body = _unchunked(body)
        if "uploads" in query:
            id = str(next(self._numbers))
            self._uploads[id] = {}
            return _xml(f"<InitiateMultipartUploadResult><UploadId>{id}</UploadId></InitiateMultipartUploadResult>")
        if "partNumber" in query:
            self._uploads[query["uploadId"]][int(query["partNumber"])] = body
            if self.stalls:
                self.stalled.set()
                await self._ends.wait()
            return web.Response(headers={"ETag": '"part"'})
        if "uploadId" in query:
            body = b"".join(part for _, part in sorted(self._uploads.pop(query["uploadId"]).items()))
        elif self.stalls:
            self.stalled.set()
            await self._ends.wait()
        self.writes += 1
        objects[key] = body
        done = "<CompleteMultipartUploadResult><ETag>whole</ETag></CompleteMultipartUploadResult>"
        return _xml(done) if "uploadId" in query else web.Response(headers={"ETag": '"whole"'})

    def _list(self, objects: Mapping[str, bytes], query: Mapping[str, str]) -> web.Response:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        found, folders = [], set()
        for key in sorted(key for key in objects if key.startswith(prefix)):
            below = key[len(prefix) :]
            if delimiter and delimiter in below:
                folders.add(prefix + below.split(delimiter)[0] + delimiter)
            else:
                found.append(key)
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(objects[key])}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in found[: int(query.get("max-keys", 1000))]
        )
        common = "".join(f"<CommonPrefixes><Prefix>{escape(one)}</Prefix></CommonPrefixes>" for one in sorted(folders))
        count = f"<KeyCount>{len(found) + len(folders)}</KeyCount><IsTruncated>false</IsTruncated>"
        return _xml(f"<ListBucketResult>{count}{contents}{common}</ListBucketResult>")


def _ranged(body: bytes, request: web.Request) -> web.Response:
    headers = {"Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", "ETag": '"whole"', "Accept-Ranges": "bytes"}
    if request.method == "HEAD":
        return web.Response(headers={**headers, "Content-Length": str(len(body))})
    wanted = request.http_range
    part = body[wanted]
    return web.Response(status=200 if wanted.start is None else 206, body=part, headers=headers)


def _unchunked(body: bytes) -> bytes:
    """What a body in signed chunks holds: each is SIZE;..., a line break, so many bytes, a line break."""
    parts = []
    while True:
        head, _, body = body.partition(b"\r\n")
        size = int(head.split(b";")[0], 16)
        if not size:
            return b"".join(parts)
        parts.append(body[:size])
        body = body[size + 2 :]


def _error(status: int, code: str) -> web.Response:
    return _xml(f"<Error><Code>{code}</Code><Message>{code} at this store</Message></Error>", status)


def _xml(text: str, status: int = 200) -> web.Response:
    return web.Response(
        status=status, text=f'<?xml version="1.0" encoding="UTF-8"?>{text}', content_type="application/xml"
    )
