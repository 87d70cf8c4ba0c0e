"""Which prompts share their words with a benchmark's questions, as the GPT-3 paper finds it (appendix C): by n-grams.

In: the questions, once; then prompt after prompt. Out: the shared words, or "". Texts are compared as lower-case words
without marks; of the questions only 64-bit hashes of their n-grams are kept. Nothing here decides what becomes of a
contaminated prompt.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from anchored.create.settings import DecontaminateSettings
from anchored.datasets_io.answers import read_questions
from anchored.records import Prompt

# each character of a script without spaces is a word of its own
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


class Decontaminator:
    """Knows the questions of benchmarks."""

    def __init__(self, questions: Iterable[str], words: int = 13) -> None:
        self.words = words
        self.questions = 0
        self._grams: set[int] = set()
        self._short: set[int] = set()
        """Whole questions of fewer words than an n-gram has."""
        for question in questions:
            self._add(question)

    def find(self, prompt: Prompt | str) -> str:
        """The first words that a prompt shares with a question: at least `words` in a row, or the whole of both.

        Each turn is compared by itself; the words come back normalised.
        """
        turns = [prompt] if isinstance(prompt, str) else [message.content for message in prompt.messages]
        return next(filter(None, map(self._shared, turns)), "")

    def _add(self, question: str) -> None:
        words = _words(question)
        self.questions += 1
        if len(words) >= self.words:
            self._grams.update(map(hash, _grams(words, self.words)))
        elif words:
            self._short.add(hash(" ".join(words)))

    def _shared(self, text: str) -> str:
        words = _words(text)
        if len(words) < self.words:
            whole = " ".join(words)
            return whole if words and hash(whole) in self._short else ""
        hits = [hash(gram) in self._grams for gram in _grams(words, self.words)]
        if True not in hits:
            return ""
        first = hits.index(True)
        last = next((place for place in range(first, len(hits)) if not hits[place]), len(hits)) - 1
        return " ".join(words[first : last + self.words])


def decontaminator(settings: DecontaminateSettings) -> Decontaminator:
    """One that knows the questions of all files that the settings name; raises DataError for what cannot be read."""
    asked = (question for source in settings.against for question in read_questions(source))
    return Decontaminator(asked, settings.words)


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _grams(words: Sequence[str], size: int) -> Iterator[str]:
    for start in range(len(words) - size + 1):
        yield " ".join(words[start : start + size])
