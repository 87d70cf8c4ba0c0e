"""How a step of an answer is put into words, and read back.

A `Step` is what a line says (its kind and values), apart from how it says it. Each kind has two plain phrasings, the
student's, and one in Markdown with LaTeX, the stronger teacher's. In: steps, lines. Out: lines, steps. What is right or
wrong is not known here (see `problems`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PLAIN = (0, 1)
MARKDOWN = 2

OPENINGS = (
    "Let me work it out.",
    "Step by step:",
    "Here is how.",
    "I will go through it in order.",
    "We can do this in small steps.",
)
MARKDOWN_OPENING = "### Solution"


@dataclass(frozen=True, slots=True)
class Step:
    """What one line says."""

    kind: str
    values: tuple[str, ...]
    """In the order of the slots of the kind's first phrasing."""


@dataclass(frozen=True, slots=True)
class Line:
    """A step as it was read, and the phrasing it was in."""

    step: Step
    phrasing: int


class Template:
    """A sentence with named slots: fills them, and reads them back from a text that is exactly such a sentence."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.slots = tuple(re.findall(r"<(\w+)>", text))
        parts = re.split(r"<(\w+)>", text)
        self._pattern = re.compile("".join(_part_pattern(part, index % 2 == 1) for index, part in enumerate(parts)))

    def fill(self, values: dict[str, str]) -> str:
        return re.sub(r"<(\w+)>", lambda slot: values[slot[1]], self.text)

    def read(self, text: str) -> dict[str, str] | None:
        match = self._pattern.fullmatch(text)
        return match.groupdict() if match else None


def write_step(step: Step, phrasing: int) -> str:
    """The step as a line."""
    templates = _PHRASINGS[step.kind]
    return templates[phrasing].fill(dict(zip(templates[0].slots, step.values, strict=True)))


def read_line(line: str) -> Line | None:
    """What a line says, or None for one in no known phrasing. Spaces around and between words do not matter."""
    plain = " ".join(line.split())
    for kind, templates in _PHRASINGS.items():
        for phrasing, template in enumerate(templates):
            values = template.read(plain)
            if values is not None:
                return Line(Step(kind, tuple(values[slot].strip() for slot in templates[0].slots)), phrasing)
    return None


def result_step(result: str) -> Step:
    """The last line of an answer."""
    return Step("result", (result,))


# One pattern per slot; ASCII digits only, and no two neighbours that could share characters, so reading is linear.
_NUMBER = "[0-9]{1,4}"
_SLOT_PATTERNS = {
    "place": "ones|tens|hundreds",
    "addend": "[1-9][0-9]{2}",
    "added": "[1-9][0-9]{2}",
    "hour": "[01][0-9]",
    "minute": "[0-5][05]",
    "hours": "[1-3]",
    "minutes": "[0-5][05]",
    "cents": "[1-9][0-9]{0,2}",
    "limit": "[1-9]",
    "item": "[a-z]{1,9}",
    "day": "Mon|Tue|Wed|Thu|Fri",
    "bound": "at least|more than",
    "verdict": "yes|no",
    "rest": "[0-9]{1,4}(?: [0-9]{1,4}){0,9}",
    "numbers": "[1-9][0-9]?(?:, [1-9][0-9]?){1,9}",
    "rows": r"(?:\n- (?:Mon|Tue|Wed|Thu|Fri) [0-9]){1,9}",
    "result": "[0-9][0-9:+, ]{0,99}",
}


def _part_pattern(part: str, is_slot: bool) -> str:
    return f"(?P<{part}>{_SLOT_PATTERNS.get(part, _NUMBER)})" if is_slot else re.escape(part)


_PHRASINGS = {
    kind: tuple(Template(text) for text in texts)
    for kind, texts in {
        "column": (
            "<place>: <first>+<second>+<carried>=<sum>, write <digit>, carry <carry>",
            "add the <place>: <first>+<second>+<carried>=<sum>, so <digit> and carry <carry>",
            "- **<place>:** $<first> + <second> + <carried> = <sum>$, hence $<digit>$ with carry $<carry>$",
        ),
        "minutes": (
            "minutes: <first>+<second>=<sum>, write <kept>, carry <carry>",
            "add the minutes: <first>+<second>=<sum>, so <kept> and carry <carry>",
            "- **minutes:** $<first> + <second> = <sum>$, hence $<kept>$ with carry $<carry>$",
        ),
        "hours": (
            "hours: <first>+<second>+<carried>=<sum>",
            "add the hours: <first>+<second>+<carried>=<sum>",
            "- **hours:** $<first> + <second> + <carried> = <sum>$",
        ),
        "coin": (
            "take <coin>, <left> left",
            "pay <coin>, so <left> left",
            r"- **coin:** $<coin>$, $\text{left} = <left>$",
        ),
        "row": (
            "- <day> <value>: <verdict>, <total> so far",
            "- <day> has <value>, <verdict>, so <total>",
            "- **<day>:** $<value>$ **<verdict>**, $n = <total>$",
        ),
        "next": (
            "next <number>, left <rest>",
            "then <number>, so left <rest>",
            "- **next:** $<number>$, leaving *<rest>*",
        ),
        "result": (
            "Answer: <result>",
            "So the answer is <result>.",
            r"**Answer:** $\boxed{<result>}$",
        ),
    }.items()
}
