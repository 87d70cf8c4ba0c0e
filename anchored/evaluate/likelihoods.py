"""How likely endings are after contexts, by lm-eval's own model class: a chat like any other, so results are stored.

A request's only message is JSON: [[context, [ending, ...]], ...], a context being a conversation's JSON or empty. The
reply's text is JSON: [[log-likelihood, whether it is what greedy decoding would write], ...], all endings in order.
Contexts are rendered with the model's chat template and, as for answers, without thoughts.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from anchored.errors import ModelError
from anchored.llm.chat import Reply, Request
from anchored.llm.model_folder import fingerprint, load_model, load_tokenizer, model_folder
from anchored.runs import one_line

AT_ONCE = 64
"""Most questions between two times that results are stored."""
_GATHER_SECONDS = 0.01


class Likelihoods:
    """Likelihoods under a Hugging Face folder or Hub id, which is loaded at the first request."""

    def __init__(self, folder: str | Path, *, batch_size: int, name: str) -> None:
        import lm_eval
        import torch

        self._folder = model_folder(folder)
        self._batch_size = batch_size
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        # as the model answers in this process
        self._dtype = "float32" if self._device == "cpu" else "auto"
        self.name = name
        self.fingerprint = f"{fingerprint(self._folder)}-{self._dtype} likelihoods, lm-eval {lm_eval.__version__}"
        self._model: Any = None
        self._waiting: list[tuple[Request, asyncio.Future[Reply]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def reply(self, request: Request) -> Reply:
        """The likelihoods that the request asks for."""
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    async def close(self) -> None:
        """Free the model."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        if self._model is not None:
            import torch

            self._model = None
            if self._device == "cuda":
                torch.cuda.empty_cache()

    async def _work(self) -> None:
        while self._waiting:
            await asyncio.sleep(_GATHER_SECONDS)
            some, self._waiting = self._waiting[:AT_ONCE], self._waiting[AT_ONCE:]
            try:
                replies = await asyncio.to_thread(self._score, [request for request, _ in some])
            except Exception as error:
                for _, future in [*some, *self._waiting]:
                    if not future.done():
                        future.set_exception(error)
                self._waiting = []
                return
            for (_, future), reply in zip(some, replies, strict=True):
                if not future.done():
                    future.set_result(reply)

    def _score(self, requests: Sequence[Request]) -> list[Reply]:
        from lm_eval.api.instance import Instance

        self._model = self._model or self._load()
        questions = [self._pairs(request) for request in requests]
        pairs = [pair for question in questions for pair in question]
        try:
            found = iter(
                self._model.loglikelihood(
                    [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)], disable_tqdm=True
                )
            )
        except RuntimeError as error:
            raise ModelError(
                f"{self.name}: {one_line(error)[:200]}; if memory is short, lower evaluate.sample.batch_size (now "
                f"{self._batch_size}): what is known is kept"
            ) from error
        values = [[[float(value), bool(greedy)] for value, greedy in islice(found, len(one))] for one in questions]
        return [Reply(json.dumps(one), "stop", self.name) for one in values]

    def _pairs(self, request: Request) -> list[tuple[str, str]]:
        return [
            (self._render(context), ending)
            for context, endings in json.loads(request.messages[0].content)
            for ending in endings
        ]

    def _render(self, context: str) -> str:
        if not context:
            return ""
        messages = json.loads(context)
        return self._model.apply_chat_template(messages, add_generation_prompt=messages[-1]["role"] != "assistant")

    def _load(self) -> Any:
        from lm_eval.models.huggingface import HFLM

        return HFLM(
            load_model(self._folder, dtype=self._dtype, device=self._device),  # type: ignore[call-arg]
            tokenizer=load_tokenizer(self._folder),  # type: ignore[arg-type]
            backend="causal",
            batch_size=self._batch_size,
            enable_thinking=False,
        )
