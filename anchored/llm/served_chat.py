"""A model that answers through a server of its own, which is started at the first question and stopped by `close`.

In: a `Served` and the settings of its client. Replies are kept by the content of the weights, as those of a model in
this process, and by the name of the engine: each engine computes and draws in its own way, so the samples of one are
not those of another. Options of the server that shape answers (dtype, quantization) belong to it; how many devices or
how much memory it has does not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from anchored.errors import ModelError, ReplyError, Stopped
from anchored.llm.chat import Reply, Request
from anchored.llm.model_folder import end_of_turn_ids_in, fingerprint
from anchored.llm.openai_chat import OpenAIChat
from anchored.llm.serve import (
    Served,
    Server,
    check_servable,
    find_program,
    most_in_flight,
    request_body,
    request_model,
    start,
)
from anchored.llm.settings import EndpointSettings
from anchored.records import Message, content_hash


class ServedChat:
    """Chat over a model folder by way of a local server; `note` hears of its start.

    Raises ModelError for what cannot be served and where the engine is not installed.
    """

    def __init__(self, served: Served, settings: EndpointSettings, note: Callable[[str], None]) -> None:
        find_program(served.engine)
        check_servable(served.engine, served.folder)
        self.name = served.name
        self.fingerprint = f"{fingerprint(served.folder)}-{served.engine}"
        shaping = {"options": settings.shaping_options(), "body": settings.extra_body}
        if any(shaping.values()):
            self.fingerprint += f" {content_hash(shaping)}"
        self._served = served
        self._note = note
        self._settings = settings
        self._server: Server | None = None
        self._client: OpenAIChat | None = None
        self._starting: asyncio.Task[None] | None = None

    async def check(self) -> None:
        """Start the server now, instead of at the first question."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        await asyncio.shield(self._starting)

    async def reply(self, request: Request) -> Reply:
        await self.check()
        answer = await self._ask(request)
        if answer is None:
            assert self._server
            raise Stopped(
                f"{self.name}: {self._served.engine} ended in the middle of the work; the same command goes on from "
                f"here; {self._server.about_its_end()}"
            )
        return replace(answer, model=self.name)

    async def close(self) -> None:
        """Stop the server and all that it started."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        if self._client is not None:
            await self._client.close()
        if self._server is not None:
            await self._server.stop()

    async def _start(self) -> None:
        settings = await asyncio.to_thread(self._client_settings)
        self._server = await start(self._served, self._note)
        self._client = OpenAIChat(settings, base_url=self._server.base_url)
        # drawn like all others: with continuous batching, transformers serve draws all as the first one asks
        question = replace(settings.request([Message("user", "Hello")]), max_tokens=1)
        # healthy is not yet able to answer: a template may fail, or the memory of the first batch
        try:
            answer = await self._ask(question)
        except ReplyError as error:
            raise ModelError(f"{self.name}: {self._served.engine} runs, but answers no question: {error}") from error
        if answer is None:
            raise ModelError(
                f"{self.name}: {self._served.engine} ended at the first question; {self._server.about_its_end()}"
            )

    def _client_settings(self) -> EndpointSettings:
        served, settings = self._served, self._settings
        body = request_body(served.engine, self._ends())
        return settings.model_copy(
            update={
                "model": request_model(served),
                "key_env": None,
                "concurrency": most_in_flight(served, settings.concurrency),
                "extra_body": {**body, **settings.extra_body},
            }
        )

    def _ends(self) -> tuple[int, ...]:
        try:
            return end_of_turn_ids_in(self._served.folder)
        except ModelError:  # vLLM and SGLang know tokenizers and templates that are not to be read here
            if self._served.engine == "transformers":
                raise
            return ()

    async def _ask(self, request: Request) -> Reply | None:
        """The server's answer; None where the server is gone."""
        assert self._client
        assert self._server
        answer = asyncio.create_task(self._client.reply(request))
        try:
            await asyncio.wait({answer, self._server.ended}, return_when=asyncio.FIRST_COMPLETED)
            if self._server.ended.done() and not (answer.done() and answer.exception() is None):
                return None
            return answer.result()
        finally:
            answer.cancel()
