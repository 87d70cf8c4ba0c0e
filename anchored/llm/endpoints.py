"""One model at several endpoints, or with several keys: each request goes to the least busy of those that work.

An endpoint that ends (wrong key, no money left, down) is set aside, which is said once with its reason, and what it was
asked goes to another; only when none is left is there an error, with all reasons.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence

from anchored.errors import AnchoredError, BudgetReached, ModelError, NoReply, ReplyError, Stopped
from anchored.llm.chat import Reply, Request
from anchored.llm.money import Purse
from anchored.llm.openai_chat import OpenAIChat
from anchored.llm.settings import EndpointSettings
from anchored.runs import one_line

log = logging.getLogger(__name__)


def open_endpoints(
    settings: EndpointSettings, *, base_url: str | None = None, purse: Purse | None = None
) -> OpenAIChat | Endpoints:
    """The chat of these settings; `base_url` takes the place of theirs, `more_endpoints` stand beside it."""
    first = OpenAIChat(settings, base_url=base_url, purse=purse)
    if not settings.more_endpoints:
        return first
    return Endpoints([first, *(OpenAIChat(settings.at(other), purse=purse) for other in settings.more_endpoints)])


class Endpoints:
    """Several endpoints of one model, all with the same fingerprint, as one chat."""

    def __init__(self, chats: Sequence[OpenAIChat]) -> None:
        self.name, self.fingerprint = chats[0].name, chats[0].fingerprint
        self._chats = tuple(chats)
        self._ended: dict[OpenAIChat, AnchoredError] = {}

    async def check(self) -> None:
        """Set aside those where nothing answers or the key is refused; raises if that is all of them."""
        await asyncio.gather(*(self._check(chat) for chat in self._working()))
        self._pick(())

    async def reply(self, request: Request) -> Reply:
        tried: set[OpenAIChat] = set()
        while True:
            chat = self._pick(tried)
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

    async def close(self) -> None:
        await asyncio.gather(*(chat.close() for chat in self._chats))

    async def _check(self, chat: OpenAIChat) -> None:
        try:
            await chat.check()
        except (ModelError, Stopped) as error:
            self._set_aside(chat, error)

    def _working(self) -> list[OpenAIChat]:
        return [chat for chat in self._chats if chat not in self._ended]

    def _pick(self, tried: Collection[OpenAIChat]) -> OpenAIChat:
        """The least busy of those that work and were not tried yet."""
        working = self._working()
        if not working:
            self._raise_all()
        return min((chat for chat in working if chat not in tried), key=lambda chat: chat.load, default=working[0])

    def _set_aside(self, chat: OpenAIChat, error: AnchoredError) -> None:
        if chat in self._ended:
            return
        self._ended[chat] = error
        if left := len(self._working()):
            log.warning("set aside, %d of %d endpoints go on: %s", left, len(self._chats), one_line(error))

    def _raise_all(self) -> None:
        """If any may work later, the same command goes on then."""
        errors = list(self._ended.values())
        kind = Stopped if any(isinstance(error, Stopped) for error in errors) else ModelError
        raise kind(f"none of {len(errors)} endpoints is left: {'; '.join(dict.fromkeys(map(str, errors)))}")
