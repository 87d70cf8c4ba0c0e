"""One model at several endpoints, or with several keys: each request goes to the least busy of those that work.

An endpoint that ends (wrong key, no money left, down) is set aside, which is said once with its reason, and what it was
asked goes to another; only when none is left is there an error, with all reasons.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from anchored.errors import AnchoredError, BudgetReached, ModelError, NoReply, ReplyError, Stopped
from anchored.llm.chat import Reply, Request
from anchored.llm.limits import Limits, gate_of
from anchored.llm.money import Reserves
from anchored.llm.openai_chat import OpenAIChat
from anchored.llm.settings import EndpointSettings
from anchored.runs import one_line

OTHER_FILES = 512

log = logging.getLogger(__name__)


def open_endpoints(
    settings: EndpointSettings,
    *,
    base_url: str | None = None,
    purse: Reserves | None = None,
    limits: Callable[[EndpointSettings], Limits] = gate_of,
) -> OpenAIChat | Endpoints:
    """The chat of these settings; `base_url` takes the place of theirs, `more_endpoints` stand beside it."""
    _allow_connections(settings.concurrency * (1 + len(settings.more_endpoints)))
    first = OpenAIChat(settings, base_url=base_url, purse=purse, limits=limits(settings))
    if not settings.more_endpoints:
        return first
    others = [settings.at(other) for other in settings.more_endpoints]
    return Endpoints([first, *(OpenAIChat(other, purse=purse, limits=limits(other)) for other in others)])


def _allow_connections(count: int) -> None:
    """Let this process open so many beside its files, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Endpoints:
    """Several endpoints of one model, all with the same fingerprint, as one chat.

    Requests wait in one line here, so that none stands before a slow endpoint while another is free.
    """

    def __init__(self, chats: Sequence[OpenAIChat]) -> None:
        self.name, self.fingerprint = chats[0].name, chats[0].fingerprint
        self._asking = dict.fromkeys(chats, 0)
        """How many requests each has."""
        self._ended: dict[OpenAIChat, AnchoredError] = {}
        self._waiting: deque[_Waiting] = deque()

    async def check(self) -> None:
        """Set aside those where nothing answers or the key is refused; raises if that is all of them."""
        await asyncio.gather(*map(self._check, self._working()))
        if not self._working():
            raise self._none_left()

    async def reply(self, request: Request) -> Reply:
        tried: set[OpenAIChat] = set()
        moved = False
        while True:
            chat = await self._assigned(tried, first=moved)
            moved = True
            try:
                return await chat.reply(request)
            except NoReply:
                tried.add(chat)
                if tried.issuperset(self._working()):
                    raise
            except (BudgetReached, ReplyError):  # the same everywhere
                raise
            except (ModelError, Stopped) as error:
                self._set_aside(chat, error)
            finally:
                self._leave(chat)

    async def close(self) -> None:
        await asyncio.gather(*(chat.close() for chat in self._asking))

    async def _check(self, chat: OpenAIChat) -> None:
        try:
            await chat.check()
        except (ModelError, Stopped) as error:
            self._set_aside(chat, error)

    def _working(self) -> list[OpenAIChat]:
        return [chat for chat in self._asking if chat not in self._ended]

    async def _assigned(self, tried: Collection[OpenAIChat], *, first: bool) -> OpenAIChat:
        """Wait in line for the least busy endpoint that was not tried yet."""
        waiting = _Waiting(tried, asyncio.get_running_loop().create_future())
        if first:
            self._waiting.appendleft(waiting)
        else:
            self._waiting.append(waiting)
        self._serve()
        try:
            return await waiting.given
        except asyncio.CancelledError:
            if waiting.given.done() and not waiting.given.cancelled() and not waiting.given.exception():
                self._leave(waiting.given.result())
            raise

    def _leave(self, chat: OpenAIChat) -> None:
        self._asking[chat] -= 1
        self._serve()

    def _serve(self) -> None:
        while self._waiting:
            tried, given = self._waiting[0].tried, self._waiting[0].given
            working = self._working()
            if given.done():  # cancelled
                pass
            elif not working:
                given.set_exception(self._none_left())
            else:
                chat = min([chat for chat in working if chat not in tried] or working, key=self._load)
                # where nobody is asked anything, nobody's end would call us again
                if self._load(chat) >= 1 and any(self._asking.values()):
                    return
                self._asking[chat] += 1
                given.set_result(chat)
            self._waiting.popleft()

    def _load(self, chat: OpenAIChat) -> float:
        return self._asking[chat] / chat.room if chat.room else float("inf")

    def _set_aside(self, chat: OpenAIChat, error: AnchoredError) -> None:
        if chat in self._ended:
            return
        self._ended[chat] = error
        if left := len(self._working()):
            log.warning("set aside, %d of %d endpoints go on: %s", left, len(self._asking), one_line(error))

    def _none_left(self) -> AnchoredError:
        errors = [self._ended[chat] for chat in self._asking]
        # if any may work later, the same command goes on then
        kind = Stopped if any(isinstance(error, Stopped) for error in errors) else ModelError
        return kind(f"none of {len(errors)} endpoints is left: {'; '.join(dict.fromkeys(map(str, errors)))}")


class _Waiting(NamedTuple):
    """A request that no endpoint has yet."""

    tried: Collection[OpenAIChat]
    given: asyncio.Future[OpenAIChat]
