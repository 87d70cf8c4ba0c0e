"""How far and where two answers differ: Table 1's metrics, and the word differences that the report shows.

Per pair: Jaccard similarity of the token sets x 100, Levenshtein distance on characters, also by the longer answer,
length ratio, shared beginning, and whether the chosen answer speaks of being a revision. Their mean over pairs carries
the name of the tokenizer, because the choice moves Jaccard by up to 10 points. `word_differences` cuts two texts into
spans from which both can be put together again. Nothing here decides what difference is good.
"""

from __future__ import annotations

import difflib
import math
import re
import signal
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import islice
from multiprocessing import get_context
from operator import attrgetter
from typing import Literal

from rapidfuzz.distance import Indel, Prefix
from rapidfuzz.distance import Levenshtein as _Levenshtein

from anchored.errors import ModelError
from anchored.leak import find_leak
from anchored.records import Pair, as_text
from anchored.runs import one_line

Tokenize = Callable[[str], Iterable[Hashable]]

NAMED_TOKENIZERS: dict[str, Tokenize] = {"whitespace": str.split, "word": re.compile(r"\w+").findall}
"""whitespace: `str.split()`, the default; word: runs of letters, digits and underscores. Both tell case apart."""


@dataclass(frozen=True, slots=True)
class Contrast:
    """How far apart the two answers of one pair are."""

    jaccard: float
    """Percent of the answers' distinct tokens that both have: 100 for equal sets, two empty ones included."""
    levenshtein: float
    """Characters to insert, delete or replace."""
    normalised_levenshtein: float
    """The same per character of the longer answer: 0 to 1."""
    length_ratio: float
    """Characters of the chosen answer per character of the rejected one."""
    shared_prefix: int
    """Characters that both answers begin with."""
    shared_prefix_share: float
    """The same per character of the shorter answer: 0 to 1."""
    leaks: bool
    """Whether the chosen answer speaks of being a revision."""


@dataclass(frozen=True, slots=True)
class MeanContrast:
    """A row of Table 1: means over pairs, and the tokenizer that Jaccard was taken with."""

    pairs: int
    tokenizer: str
    jaccard: float
    levenshtein: float
    normalised_levenshtein: float
    length_ratio: float
    shared_prefix: float
    shared_prefix_share: float
    leak_rate: float
    """Share of the pairs whose chosen answer speaks of being a revision: 0 to 1."""


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of text that both answers have, or only the first (removed), or only the second (added)."""

    kind: Literal["kept", "removed", "added"]
    text: str


def contrast(pairs: Iterable[Pair], tokenizer: str = "whitespace", workers: int = 1) -> MeanContrast:
    """The means over pairs, taken one by one; `tokenizer` is whitespace, word, or a Hugging Face folder or id.

    Where there are many, up to so many `workers` measure them in processes of their own, with the same result.
    """
    means, rest = Means(tokenizer), iter(pairs)
    for one in _each(islice(rest, _FEW if workers > 1 else None), tokenizer):
        means.add(one)
    if workers > 1 and means.pairs == _FEW:
        for one in _by_workers(rest, tokenizer, workers):
            means.add(one)
    return means.mean()


def contrasts(pairs: Iterable[Pair], tokenizer: str = "whitespace") -> list[Contrast]:
    """One contrast per pair."""
    return list(_each(pairs, tokenizer))


def compare(pair: Pair, tokenize: Tokenize = str.split) -> Contrast:
    """How far apart the answers of one pair are."""
    chosen, rejected = pair.chosen.text, pair.rejected.text
    return completed(pair, jaccard(chosen, rejected, tokenize), levenshtein(chosen, rejected))


def completed(pair: Pair, jaccard: float, levenshtein: float) -> Contrast:
    """The contrast of a pair whose two costly numbers are known."""
    chosen, rejected = pair.chosen.text, pair.rejected.text
    shared, shorter = shared_prefix(chosen, rejected), min(len(chosen), len(rejected))
    return Contrast(
        jaccard=jaccard,
        levenshtein=levenshtein,
        normalised_levenshtein=normalised(levenshtein, chosen, rejected),
        length_ratio=length_ratio(chosen, rejected),
        shared_prefix=shared,
        shared_prefix_share=shared / shorter if shorter else 0.0,
        leaks=find_leak(chosen, as_text(pair.prompt), rejected) is not None,
    )


class Means:
    """The means of contrasts that come one by one."""

    def __init__(self, tokenizer: str) -> None:
        self.tokenizer = tokenizer
        self.pairs = 0
        self._sums = [0.0] * len(_MEASURES)

    def add(self, one: Contrast) -> None:
        """Count one more, whose Jaccard was taken with the same tokenizer."""
        self.pairs += 1
        self._sums = [total + value for total, value in zip(self._sums, _VALUES_OF(one), strict=True)]

    def mean(self) -> MeanContrast:
        """Of those so far; NaN without any."""
        means = (total / self.pairs if self.pairs else math.nan for total in self._sums)
        return MeanContrast(self.pairs, self.tokenizer, *means)


MOST_WORKERS = 8
"""Reading the pairs keeps no more of them busy."""
_FEW = 2000
"""Pairs that are measured before workers are worth their start."""
_BATCH = 250
"""Pairs that a worker is handed at a time."""


def _each(pairs: Iterable[Pair], tokenizer: str) -> Iterator[Contrast]:
    tokenize = find_tokenizer(tokenizer)
    for pair in pairs:
        yield compare(pair, tokenize)


def _by_workers(pairs: Iterator[Pair], tokenizer: str, workers: int) -> Iterator[Contrast]:
    """The contrasts in their order; no more pairs are read than the workers are busy with."""
    batches = iter(lambda: list(islice(pairs, _BATCH)), [])
    # a fork would take along the locks of other threads, which read files
    context, deaf = get_context("spawn"), (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who waits for them
    with ProcessPoolExecutor(workers, context, signal.signal, deaf) as pool:
        busy = deque(pool.submit(contrasts, batch, tokenizer) for batch in islice(batches, 2 * workers))
        while busy:
            yield from busy.popleft().result()
            busy.extend(pool.submit(contrasts, batch, tokenizer) for batch in islice(batches, 1))


_MEASURES = tuple(Contrast.__slots__)
"""In the order in which a mean has them."""
_VALUES_OF = attrgetter(*_MEASURES)


def mean_contrast(each: Iterable[Contrast], tokenizer: str) -> MeanContrast:
    """The means of contrasts whose Jaccard was taken with `tokenizer`; NaN without any."""
    means = Means(tokenizer)
    for one in each:
        means.add(one)
    return means.mean()


def find_tokenizer(name: str) -> Tokenize:
    """The tokenizer of that name: one of `NAMED_TOKENIZERS`, else the one of a Hugging Face folder or id."""
    return NAMED_TOKENIZERS.get(name) or _hugging_face_tokenizer(name)


def jaccard(a: str, b: str, tokenize: Tokenize = str.split) -> float:
    """|A∩B| / |A∪B| x 100 of the two token sets."""
    first, second = set(tokenize(a)), set(tokenize(b))
    shared = len(first & second)
    union = len(first) + len(second) - shared
    return 100.0 * shared / union if union else 100.0


def levenshtein(a: str, b: str) -> int:
    """Unit-cost edit distance on characters."""
    return _Levenshtein.distance(a, b)


def normalised(levenshtein: float, a: str, b: str) -> float:
    """An edit distance per character of the longer text; 0 between two empty ones."""
    longer = max(len(a), len(b))
    return levenshtein / longer if longer else 0.0


def shared_prefix(a: str, b: str) -> int:
    """Characters that both texts begin with."""
    return Prefix.similarity(a, b)


def length_ratio(a: str, b: str) -> float:
    """Characters of `a` per character of `b`; infinite where only `b` is empty."""
    if not b:
        return math.inf if a else 1.0
    return len(a) / len(b)


def word_differences(a: str, b: str) -> list[Span]:
    """What of `a` is kept in `b`, removed from it, or added to it, word by word.

    The kept and removed texts together are `a`, the kept and added ones `b`, white space included. A word or two kept
    amid longer changes count as changed, for else a rewritten sentence reads as confetti.
    """
    first, second = _WORD.findall(a), _WORD.findall(b)
    changes = [_Change(*([""] * 3))]
    for block in Indel.opcodes(first, second):
        if block.tag == "equal":
            changes += [_Change("", "", token) for token in first[block.src_start : block.src_end]]
        else:
            removed = "".join(first[block.src_start : block.src_end])
            added = "".join(second[block.dest_start : block.dest_end])
            changes.append(_Change(removed, added, ""))
    return _spans(_readable(_joined(changes)))


# a word with nothing around it, a character of a script without spaces, a mark, or a run of white space
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|\s+|[^\w\s]")
_FEW_WORDS = 2


@dataclass(frozen=True, slots=True)
class _Change:
    """What was removed and added, and what both texts keep after it."""

    removed: str
    added: str
    kept: str

    @property
    def size(self) -> int:
        return max(len(self.removed), len(self.added))


def _joined(changes: Sequence[_Change]) -> list[_Change]:
    """Neighbours made one: every change but the first has something removed or added, every one but the last keeps."""
    joined = [changes[0]]
    for change in changes[1:]:
        last = joined[-1]
        if not change.size:
            joined[-1] = _Change(last.removed, last.added, last.kept + change.kept)
        elif not last.kept:
            joined[-1] = _Change(last.removed + change.removed, last.added + change.added, change.kept)
        else:
            joined.append(change)
    return joined


def _readable(changes: Sequence[_Change]) -> list[_Change]:
    """Little that is kept between two larger changes becomes part of them."""
    merged = [changes[0]]
    for change in changes[1:]:
        last = merged[-1]
        little = len(last.kept.split()) <= _FEW_WORDS and len(last.kept.strip()) <= min(last.size, change.size)
        if last.size and little:
            merged[-1] = _Change(
                last.removed + last.kept + change.removed, last.added + last.kept + change.added, change.kept
            )
        else:
            merged.append(change)
    return merged


def _spans(changes: Iterable[_Change]) -> list[Span]:
    spans = []
    for change in changes:
        spans += [Span("removed", change.removed), Span("added", change.added), Span("kept", change.kept)]
    return [span for span in spans if span.text]


@cache
def _hugging_face_tokenizer(name: str) -> Tokenize:
    close = difflib.get_close_matches(name, NAMED_TOKENIZERS, n=1)
    if close:
        raise ModelError(f"tokenizer {name!r} is not known; did you mean {close[0]}?")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the library raises of every kind
        raise ModelError(
            f"tokenizer {name!r}: neither {' nor '.join(NAMED_TOKENIZERS)}, nor a Hugging Face folder or id with a "
            f"tokenizer ({one_line(error)[:200]})"
        ) from None
    return lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
