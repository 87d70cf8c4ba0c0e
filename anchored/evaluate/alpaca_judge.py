"""AlpacaEval's judge: any chat is shown two answers and names the better one.

In: a model's outputs, the benchmark's data, a chat that judges (behind the store, so nothing is asked twice). Out:
annotations, and how the verdicts were read. The prompt is the official one unless another is named. What stands in an
answer is data to it: the quotation marks that would end its frame are written with backslashes, and what looks like the
frame is counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from anchored.errors import EvaluationError, NoReply, ReplyError
from anchored.evaluate.alpaca_files import AlpacaData, Annotation, Instruction, Outputs
from anchored.evaluate.benchmark import SPEAKS_TO_JUDGE
from anchored.evaluate.preference import FIRST, SECOND, TIE, for_the_second, from_logprobs, from_text, is_switched
from anchored.evaluate.settings import AlpacaJudging
from anchored.llm.addressed import addresses_judge
from anchored.llm.ask import work_through
from anchored.llm.chat import Chat, Reply, Request
from anchored.llm.prompt_files import SLOT, fill, load
from anchored.llm.verdict import read_verdict
from anchored.records import Message

SLOTS: tuple[str, ...] = ("instruction", "output_1", "output_2")
"""Of the official prompt, where the judge names `m` or `M`."""
MARK_SLOTS: tuple[str, ...] = ("prompt", "answer_1", "answer_2")
"""Of the paper's prompt (create/judge) and its like, where the judge ends with [1] or [2]."""
BY_LOGPROBS, BY_TEXT, SAME = "log-probabilities", "text", "identical answers"
_TURN = re.compile(r"<\|im_start\|>(system|user|assistant)\n(.*?)<\|im_end\|>", re.DOTALL)
_FRAME = re.compile(
    r'"""\s*[,}]|model_identifier|## (?:Model Outputs|Best Model Identifier)|<\|im_(?:start|end)\|>', re.I
)
_QUOTES = '"""'
_REPEATED = _RARE = 0.05
FRAMED, EMPTY = "holds pieces of the judge's prompt", "empty"
_TREATED = {
    SPEAKS_TO_JUDGE: "speak to the judge; they were judged as they are",
    FRAMED: "hold pieces of the judge's prompt; they were shown as text, as all are",
    EMPTY: "are empty; they were judged as they are",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """One judged instruction."""

    preference: float | None
    """1 to 2; None: no verdict could be had."""
    read_by: str
    """`BY_LOGPROBS`, `BY_TEXT`, `SAME` (nobody was asked), or "" where there is none."""
    note: str = ""
    """Why there is none."""
    reply: Reply | None = None
    no_reply: bool = False
    """Whether the judge's endpoint failed at it, which another time it may not."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A model's outputs with the judge's verdicts."""

    annotations: tuple[Annotation, ...]
    """Of every instruction that was answered, in the benchmark's order; those without a verdict have no preference."""
    read_by: Counter[str]
    """Verdicts by how they were read."""
    failures: tuple[str, ...]
    """Why answers have no verdict, one line each."""
    fingerprint: str
    """What distinguishes this judge's verdicts from another's: model, prompt, sampling, reading."""
    notes: tuple[str, ...]
    """What was noticed about the answers, for people."""


async def judge(
    outputs: Outputs,
    data: AlpacaData,
    chat: Chat,
    settings: AlpacaJudging,
    on_verdict: Callable[[], None] = lambda: None,
) -> Judged:
    """Ask for every instruction that has an answer; `on_verdict` hears of each.

    A reply without a verdict is asked for again, then counted as failed. Raises EvaluationError where no verdict could
    be had at all, Stopped where the judge is down.
    """
    frame = Frame(settings)
    answered = [
        (instruction, answer)
        for instruction, answer in zip(data.instructions, outputs.answers, strict=True)
        if answer is not None
    ]
    if not answered:
        raise EvaluationError(f"{outputs.generator} has answered none of the benchmark's instructions")
    verdicts = await work_through(answered, lambda _, pair: frame.judge(*pair, chat, on_verdict))
    failures = tuple(verdict.note for verdict in verdicts if verdict.preference is None)
    if len(failures) == len(verdicts):
        raise EvaluationError(f"{chat.name} gave no verdict on any answer of {outputs.generator}; first: {failures[0]}")
    read_by = Counter(verdict.read_by for verdict in verdicts if verdict.read_by)
    fingerprint = frame.fingerprint(chat, read_by.elements())
    return Judged(
        tuple(
            annotation(
                instruction,
                answer,
                verdict.preference,
                raw_completion(verdict.reply),
                (data.baseline, outputs.generator, fingerprint),
            )
            for (instruction, answer), verdict in zip(answered, verdicts, strict=True)
        ),
        read_by,
        failures,
        fingerprint,
        tuple(noticed([(instruction.text, answer) for instruction, answer in answered])),
    )


class Frame:
    """The judge's prompt, and how it is asked."""

    def __init__(self, settings: AlpacaJudging, seed: int = 0) -> None:
        """`seed` draws verdicts, where the temperature is above 0."""
        self._settings, self._seed = settings, seed
        template = load(settings.prompt)
        self._by_mark = bool({*SLOT.findall(template)} & {*MARK_SLOTS})
        self._slots = MARK_SLOTS if self._by_mark else SLOTS
        fill(template, dict.fromkeys(self._slots, ""))
        self._escaped = not settings.raw_quotes and _QUOTES in template
        self.sha256 = sha256(template.encode()).hexdigest()
        # split before it is filled: an answer that holds a turn's marks makes no turn
        turns = [(role, text.strip()) for role, text in _TURN.findall(template)]
        self._turns = turns or [("user", template)]

    def request(self, instruction: Instruction, answer: str, index: int = 0) -> Request:
        """The `index`-th question about an answer; the two are shown in the order that the instruction draws."""
        shown = (instruction.baseline, answer)
        if is_switched(instruction.text, self._settings.seed):
            shown = (answer, instruction.baseline)
        slots = dict(zip(self._slots, map(self._quoted, (instruction.text, *shown)), strict=True))
        messages = (self._message(role, text, slots) for role, text in self._turns)
        sampling, told = self._settings, 0 if self._by_mark else self._settings.top_logprobs
        return Request(tuple(messages), sampling.temperature, 1.0, sampling.max_tokens, index, self._seed, told)

    def read(self, reply: Reply, instruction: Instruction) -> Verdict:
        """The verdict of a reply about an answer to an instruction."""
        shown_second, read_by = self._preference(reply)
        if shown_second is None:
            cut = "" if reply.finish_reason == "stop" else f", finish_reason {reply.finish_reason}"
            return Verdict(None, "", f"no verdict in the judge's reply {reply.text.strip()[:60]!r}{cut}", reply)
        switched = is_switched(instruction.text, self._settings.seed)
        return Verdict(for_the_second(shown_second, switched), read_by, reply=reply)

    async def judge(self, instruction: Instruction, answer: str, chat: Chat, on_verdict: Callable[[], None]) -> Verdict:
        """What the chat finds; a reply without a verdict is asked for again, identical answers are a tie unasked."""
        verdict = Verdict(TIE, SAME)
        if answer != instruction.baseline:
            # a judge that takes the likeliest token each time says the same again
            for index in range(1 + (self._settings.retries if self._settings.temperature > 0 else 0)):
                try:
                    reply = await chat.reply(self.request(instruction, answer, index))
                except ReplyError as error:
                    verdict = Verdict(None, "", str(error), no_reply=isinstance(error, NoReply))
                    break
                verdict = self.read(reply, instruction)
                if verdict.preference is not None:
                    break
        on_verdict()
        return verdict

    def _preference(self, reply: Reply) -> tuple[float | None, str]:
        """For the answer that was shown second, and how it was read."""
        said, told = reply.text.strip(), reply.logprobs
        # where the name is not all that was said, the first token is no verdict
        if not self._by_mark and (len(told) == 1 or (told and said in (FIRST, SECOND))):
            graded = from_logprobs(told[0])
            if graded is not None:
                return graded, BY_LOGPROBS
        if reply.finish_reason != "stop" and said not in (FIRST, SECOND):
            return None, ""  # cut before its verdict
        if self._by_mark:
            mark = read_verdict(said)
            return None if mark is None else float(mark), BY_TEXT
        return from_text(said), BY_TEXT

    def fingerprint(self, chat: Chat, read_by: Iterable[str]) -> str:
        """Model, prompt, sampling, and how its verdicts were read; `read_by` says it of each."""
        sampling = self._settings
        facts = [
            chat.fingerprint,
            f"prompt {self.sha256[:12]}",
            "quotes escaped" if self._escaped else "",
            f"temperature {sampling.temperature:g}",
            f"max_tokens {sampling.max_tokens}",
            "" if self._by_mark else f"top_logprobs {sampling.top_logprobs}",
            f"order {sampling.seed}",
            f"read by {_reading(read_by)}",
        ]
        return ", ".join(filter(None, facts))

    def _quoted(self, text: str) -> str:
        return text.replace(_QUOTES, '\\"\\"\\"') if self._escaped else text

    @staticmethod
    def _message(role: Any, text: str, slots: dict[str, str]) -> Message:
        return Message(role, fill(text, {name: slots[name] for name in slots if f"<<{name}>>" in text}))


def remarks(instruction: str, answer: str) -> dict[str, str]:
    """What in an answer should make one look at it before one trusts its verdict, each with the words that show it."""
    found = {}
    if words := addresses_judge(answer, instruction):
        found[SPEAKS_TO_JUDGE] = words
    if framed := _FRAME.search(answer):
        found[FRAMED] = framed[0]
    if not answer.strip():
        found[EMPTY] = ""
    return found


def noticed(answered: Sequence[tuple[str, str]]) -> list[str]:
    """The same over all answers, each after its instruction, and what only shows over all of them."""
    found = [remarks(instruction, answer) for instruction, answer in answered]
    notes = []
    for kind, treated in _TREATED.items():
        shown = [one[kind] for one in found if kind in one]
        if shown:
            first = f" (first: {shown[0]!r})" if shown[0] else ""
            notes.append(f"{len(shown)} answers {treated}{first}")
    return [*notes, *repeated([answer for _, answer in answered])]


def repeated(answers: Sequence[str]) -> list[str]:
    """Whether one answer is given to many questions."""
    text, count = Counter(answers).most_common(1)[0] if answers else ("", 0)
    if count <= max(2, _REPEATED * len(answers)) or not text.strip():
        return []
    return [f"one answer is given to {count} of {len(answers)} instructions: {' '.join(text.split())[:60]!r}"]


def _reading(read_by: Iterable[str]) -> str:
    """The ways; one that is rare is chance, and makes no other judge."""
    counts = Counter(way for way in read_by if way in (BY_LOGPROBS, BY_TEXT))
    return " and ".join(way for way in sorted(counts) if counts[way] > _RARE * counts.total()) or "nobody"


def annotation(
    instruction: Instruction, answer: str, preference: float | None, raw: Any, names: tuple[str, str, str]
) -> Annotation:
    """A line of an annotations file; `names` are the baseline, the model and the annotator."""
    return Annotation(
        instruction.text, instruction.baseline, answer, preference, *names, dataset=instruction.dataset, raw=raw
    )


def raw_completion(reply: Reply | None) -> Any:
    """The reply as alpaca_eval's own parser reads it."""
    if reply is None:
        return None
    content = [
        {"top_logprobs": [{"token": token, "logprob": value} for token, value in place.items()]}
        for place in reply.logprobs
    ]
    return {
        "finish_reason": reply.finish_reason,
        "logprobs": {"content": content} if content else None,
        "message": {"role": "assistant", "content": reply.text},
        "text": reply.text,
    }
