"""A benchmark from a file of one's own: questions with known short answers, graded by exact match.

The file is JSONL: `prompt` (or `question`), `answer` (a string, or a list of accepted ones), optionally `id` and
`category`. An answer is right if, after normalising case, spaces and punctuation at the ends, the whole of it or its
last line equals an accepted answer or ends with it as whole words ("The answer is 42." for 42). For grading by a judge
see the benchmarks made for it; this rule knows nothing but strings.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anchored.errors import EvaluationError
from anchored.evaluate.benchmark import GradedByRule, Item, View
from anchored.records import user_prompt

_ENDS = " \t\n.,;:!?\"'`*_()[]{}$"
_MINUS = "\N{MINUS SIGN}"


class Questions(GradedByRule):
    """A question file as a benchmark."""

    views: tuple[View, ...] = (View("exact-match"),)

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise EvaluationError(f"evaluate.benchmarks: no question file at {path}; give a benchmark's name or a path")
        content = path.read_bytes()
        self.name = path.name.removesuffix(".jsonl")
        if not self.name.strip("."):
            raise EvaluationError(
                f"{path}: answers and scores are kept by the file's name, which says nothing; rename it"
            )
        self.version = hashlib.sha256(content).hexdigest()[:12]
        rows = [_row(line, path, number) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
        if not rows:
            raise EvaluationError(f"{path}: holds no question; each line needs `prompt` and `answer`")
        self._items = tuple(
            Item(str(_given(row, "id", number)), user_prompt(row["prompt"]), str(_given(row, "category", "other")))
            for number, row in enumerate(rows)
        )
        self._accepted = {
            item.id: tuple(map(_normal, row["answer"])) for item, row in zip(self._items, rows, strict=True)
        }
        if len(self._accepted) < len(rows):
            raise EvaluationError(f"{path}: `id` is not unique; leave it out or mend it")

    def items(self) -> Sequence[Item]:
        return self._items

    def grade(self, item: Item, answer: str) -> dict[str, float]:
        lines = [line for line in answer.splitlines() if line.strip()]
        candidates = {_normal(answer), _normal(lines[-1]) if lines else ""}
        right = any(_ends_with(said, accepted) for said in candidates for accepted in self._accepted[item.id])
        return {"exact-match": float(right)}


def _row(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        raise EvaluationError(f"{path}, line {number}: not JSON") from None
    row = row if isinstance(row, dict) else {}
    prompt, answer = row.get("prompt", row.get("question")), row.get("answer")
    accepted = answer if isinstance(answer, list) else [answer]
    accepted = [str(value) for value in accepted if isinstance(value, str | int | float) and _normal(str(value))]
    if not isinstance(prompt, str) or not prompt.strip() or not accepted:
        raise EvaluationError(f"{path}, line {number}: needs `prompt` (text) and `answer` (text or list of texts)")
    return {**row, "prompt": prompt, "answer": accepted}


def _given(row: dict[str, Any], name: str, otherwise: Any) -> Any:
    value = row.get(name)
    return otherwise if value is None else value


def _normal(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold().replace(_MINUS, "-")
    text = re.sub(r"\s+", " ", text).rstrip(_ENDS)
    # the point of ".5" is part of the number
    point = re.match(rf"[{re.escape(_ENDS)}]*(?=\.\d)", text)
    return text[point.end() :] if point else text.lstrip(_ENDS)


def _ends_with(said: str, accepted: str) -> bool:
    # a whole word in front: "142" does not end with the answer "42", nor "-42", "0.42", "1/42" or "10:42"
    return said == accepted or bool(re.search(r"(?<![\w.,\-])(?<!\d[/:^])" + re.escape(accepted) + r"\Z", said))
