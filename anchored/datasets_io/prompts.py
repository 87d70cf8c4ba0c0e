"""Prompts drawn from a source: a uniform seeded sample of the distinct ones, some of them apart.

The source is read once to draw, which keeps a few numbers per row, and again as the prompts are iterated, so that a
million of them need no memory. Sources are files, folders and Hub ids in the layouts of `layouts`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from anchored.datasets_io import layouts
from anchored.datasets_io.cells import Refused, short
from anchored.datasets_io.refusals import Refusals, refusal
from anchored.datasets_io.rows import Row, read
from anchored.errors import DataError
from anchored.records import Answer, Outcome, Pair, Prompt, content_hash, prompt_id


class Prompts(Protocol):
    """Prompts that can be gone through more than once: a list, or what was drawn from a source."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Prompt]: ...

    def __getitem__(self, part: slice, /) -> Prompts: ...


@dataclass(frozen=True, slots=True)
class PromptRows:
    """What was drawn from a source of prompts."""

    prompts: Prompts
    held_out: Prompts
    refused: list[Pair] = field(default_factory=list)
    """Rows without a usable prompt, and those whose prompt a benchmark has."""
    doubled_ids: int = 0
    """Ids that the data gives to several prompts, which are named by their content instead."""
    doubled_id: str = ""
    """The first of them."""


class Drawn:
    """Some prompts of a source, in the data's order. A slice goes by the order of the draw: `[:n]` draws fewer."""

    def __init__(self, source: _Source, rows: Sequence[int]) -> None:
        self._source = source
        self._rows = rows
        """Numbers of the source's rows in the order of the draw."""

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Prompt]:
        due = iter(sorted(self._rows))
        wanted = next(due, None)
        for number, row in enumerate(self._source.rows()):
            if wanted is None:
                return
            if number == wanted:
                yield self._source.prompt(row)
                wanted = next(due, None)
        if wanted is not None:
            raise DataError(f"{self._source.name}: has fewer rows than when its prompts were drawn; leave it as it is")

    def __getitem__(self, part: slice, /) -> Drawn:
        return Drawn(self._source, self._rows[part])


def read_prompts(
    source: str | Path,
    *,
    take: int | None = None,
    held_out: int | None = 0,
    seed: int = 0,
    split: str | None = None,
    shared_with_benchmarks: Callable[[Prompt], str] | None = None,
) -> PromptRows:
    """The distinct prompts of a source: `held_out` of them apart (see `held_out_count`), at most `take` of the others.

    Both are uniform seeded samples. They are drawn by the rank of each prompt's content, so a smaller `take` is a part
    of a larger one, and neither the order of the rows nor a few more rows change who is drawn. Prompts of which
    `shared_with_benchmarks` returns words are set aside before.
    """
    found = _Found(seed)
    refused = []
    for number, row in enumerate(read(source, split, layouts.READ_FOR_PROMPTS)):
        try:
            prompt = layouts.prompt(row.readable())
        except Refused as reason:
            refused.append(refusal(row, reason))
            continue
        if shared_with_benchmarks and (words := shared_with_benchmarks(prompt)):
            refused.append(_contaminated(row, prompt, words))
        else:
            found.add(number, prompt)
    if not len(found.rows):
        raise Refusals.of(refused).nothing_usable(source, "prompt")
    drawn = found.in_order()
    kept = len(drawn) - held_out_count(source, held_out, len(drawn))
    named = _Source(source, split, found.doubled)
    apart = Drawn(named, drawn[kept:])
    return PromptRows(Drawn(named, drawn[:kept][:take]), apart, refused, len(found.doubled), found.doubled_id)


def held_out_count(source: str | Path, asked: int | None, prompts: int) -> int:
    """How many of `prompts` distinct prompts to hold out; None asks for 100, or for a tenth of fewer than 1000."""
    if asked is None:
        return min(100, prompts // 10)
    if asked >= prompts:
        raise DataError(
            f"{source}: has {prompts} distinct prompts, so {asked} cannot be held out; lower held_out or add more"
        )
    return asked


def _contaminated(row: Row, prompt: Prompt, words: str) -> Pair:
    detail = f"{row.where}: a benchmark's question has the words {short(words)}"
    return Pair(prompt, Answer(""), Answer(""), outcome=Outcome.CONTAMINATED, detail=detail)


class _Found:
    """The distinct prompts of a source by their first rows: some tens of bytes for each."""

    def __init__(self, seed: int) -> None:
        self.rows = array("Q")
        self.doubled: set[int] = set()
        """Hashes of the ids that several prompts have."""
        self.doubled_id = ""
        """The first such id."""
        self._seed = seed
        self._ranks = array("Q")
        self._contents: set[int] = set()
        self._ids: set[int] = set()

    def add(self, row: int, prompt: Prompt) -> None:
        content = prompt_id(prompt.messages)
        before = len(self._contents)
        self._contents.add(int(content, 16))
        if len(self._contents) == before:
            return
        self.rows.append(row)
        self._ranks.append(int(content_hash([self._seed, content])[:16], 16))
        name = hash(prompt.id)
        if name in self._ids:
            self.doubled.add(name)
            self.doubled_id = self.doubled_id or prompt.id
        self._ids.add(name)

    def in_order(self) -> array[int]:
        """The rows in an order drawn from the seed and each prompt's content alone."""
        places = sorted(range(len(self.rows)), key=self._ranks.__getitem__)
        return array("Q", (self.rows[place] for place in places))


@dataclass(frozen=True, slots=True)
class _Source:
    """Where drawn prompts are read again."""

    name: str | Path
    split: str | None
    doubled: Set[int]
    """Hashes of the ids that name several prompts; these are named by their content instead."""

    def rows(self) -> Iterator[Row]:
        return read(self.name, self.split, layouts.READ_FOR_PROMPTS)

    def prompt(self, row: Row) -> Prompt:
        try:
            prompt = layouts.prompt(row.readable())
        except Refused as reason:
            raise DataError(
                f"{self.name}: {row.where} was a prompt when it was drawn and is none now ({reason}); leave the file "
                "as it is while it is used"
            ) from None
        return replace(prompt, id=prompt_id(prompt.messages)) if hash(prompt.id) in self.doubled else prompt
