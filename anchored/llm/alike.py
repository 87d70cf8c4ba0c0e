"""Notices an endpoint whose samples of one prompt are all the same, and says so once.

Servers take `temperature` and `seed` without a word and may still answer greedily: `transformers serve` does, where the
model's generation config does not turn sampling on. Nothing is asked for this: replies are compared as they come.
"""

from __future__ import annotations

from collections.abc import Callable

from anchored.llm.chat import Chat, Reply, Request
from anchored.records import Message

ENOUGH = 8
"""Prompts with two equal samples, before one with different ones, that make it no chance."""
_MOST_WAITING = 4096


class WatchedChat:
    """A chat whose samples are compared, until two of them differ."""

    def __init__(self, chat: Chat, note: Callable[[str], None]) -> None:
        self.name, self.fingerprint = chat.name, chat.fingerprint
        self._chat, self._note = chat, note
        self._first: dict[tuple[Message, ...], tuple[int, str]] = {}
        """Index and text of a sample of each prompt that has one so far."""
        self._alike = 0
        self._settled = False

    async def reply(self, request: Request) -> Reply:
        reply = await self._chat.reply(request)
        if request.temperature > 0 and not self._settled:
            self._compare(request, reply)
        return reply

    async def close(self) -> None:
        await self._chat.close()

    def _compare(self, request: Request, reply: Reply) -> None:
        index, text = self._first.setdefault(request.messages, (request.index, reply.text))
        if index == request.index:
            if len(self._first) > _MOST_WAITING:  # nobody asks for a second one
                self._settle()
            return
        if text != reply.text:
            self._settle()
            return
        del self._first[request.messages]
        self._alike += 1
        if self._alike == ENOUGH:
            self._settle()
            self._note(
                f"{self.name}: two samples at temperature {request.temperature:g} are the same text for each of the "
                f"first {ENOUGH} prompts; its server seems to ignore temperature and seed (transformers serve does, "
                "where the model's generation_config.json has no do_sample: true)"
            )

    def _settle(self) -> None:
        self._settled = True
        self._first.clear()
