"""A reviser's reply, which holds its reasoning, a header, and the revision, taken apart.

`parse` takes a whole reply apart. Only lines that begin with the header count: in prose its name is no header. What is
cut off around the revision is what models add and students did not write: a closing tag, a rule, a fence or quotes
around the whole.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from anchored.create.replies import Problem, beginning, is_refusal
from anchored.records import Outcome


@dataclass(frozen=True, slots=True)
class Revision:
    """A revised answer, and why it was revised so."""

    text: str
    rational: str


def parse(reply: str, rejected: str, task: str = "") -> Revision | Problem:
    """The revision in a reply. A second header spoils it, unless the task or the rejected answer has such a line."""
    reply = _keys_as_headers(reply.replace("\r\n", "\n"))
    headers = [header for header in _HEADER.finditer(reply) if _is_header(header)]
    if not headers:
        if is_refusal(reply):
            return Problem(Outcome.REFUSAL, f"the teacher's reply: {beginning(reply)}", reply)
        return Problem(
            Outcome.NO_HEADER, f"no line begins with {{corrected_student_solution}}: {beginning(reply)}", reply
        )
    known = {line.strip() for line in f"{task}\n{rejected}".splitlines()}
    own = [header for header in headers if header[0].strip() not in known] or headers[:1]
    first = own[0]
    before, after = reply[: first.start()], reply[first.end("header") :].strip()
    if len(own) > 1:
        names = " and ".join(repr(header["header"].strip()) for header in own[:2])
        return Problem(Outcome.REPEATED_HEADER, f"{names} both begin a line", after)
    after = _closed(before, first, _CLOSING_TAG.split(after, maxsplit=1)[0].strip())
    text = _unwrapped(after, rejected)
    if not text:
        return Problem(Outcome.EMPTY, "nothing follows the header")
    if text == rejected.strip():
        return Problem(Outcome.IDENTICAL, "the revision is the policy's answer", text)
    if is_refusal(text) and not is_refusal(rejected):
        return Problem(Outcome.REFUSAL, f"the revision: {beginning(text)}", text)
    return Revision(text, _REASONING.sub("", before.strip(), count=1).strip())


_OPEN, _CLOSE = r"[\{\[<(]{0,2}+", r"[\}\]>)]{0,2}+"
_MARKS = r"(?:[*_`\"]|\\(?=[*_{}\[\]]))*+"
_GAP = r"\\?[ _-]?"
_LINE_START = r"^[ \t]*(?P<list>(?:(?:\d+[.)]|[-*+•>]|\#{1,6}|[☀-➿🌀-🫿\uFE0F]+)[ \t]+|>)*)"
_BEFORE, _AFTER = rf"{_MARKS}[ ]?{_OPEN}[ ]?{_MARKS}", rf"{_MARKS}[ ]?{_CLOSE}{_MARKS}"
_NAME = rf"(?:corrected|revised|improved){_GAP}(?:student(?:['’]?s)?{_GAP})?(?:solution|answer)"
_HEADER = re.compile(
    rf"{_LINE_START}(?P<header>(?P<open>{_BEFORE}){_NAME}(?!_?[a-z0-9])(?P<close>{_AFTER})[ \t]*"
    rf"(?:(?P<colon>[:：])|[-–—=]+(?=[ \t]+\S))?+{_MARKS})(?P<rest>[^\n]*)",
    re.IGNORECASE | re.MULTILINE,
)
_REASONING = re.compile(rf"{_LINE_START}{_BEFORE}teacher{_GAP}reasoning{_AFTER}[ \t]*[:：]?{_MARKS}", re.IGNORECASE)
_CLOSING_TAG = re.compile(rf"[\{{\[<]{{1,2}}[ ]?/[ ]?{_NAME}[ ]?[\}}\]>]{{1,2}}", re.IGNORECASE)
# "{corrected_student_solution} should be shorter": the sentence goes on
_PROSE = re.compile(
    r"\s*(?:[,;]|(?:is|are|was|were|should|shall|will|would|must|needs?|can|could|has|have|had|may|might|does|do|below|above"
    r"|that|which|and|or|as|in|to|by|with|for|from|provides?|improves?|includes?|addresses|keeps?|makes?|adds?|gives?"
    r"|follows|maintains?|corrects?|clarifies|offers?)\b)"
)


def _is_header(match: re.Match[str]) -> bool:
    """A name alone on its line, or set off from what follows by its marks."""
    if match["colon"] or not match["rest"].strip():
        return True
    marked = match["open"].strip() or match["close"].strip() or "#" in match["list"]
    return bool(marked) and not _PROSE.match(match["rest"])


def _keys_as_headers(reply: str) -> str:
    """A reply that is a JSON object with the revision in it, fenced or not, its keys as headers; others as they are."""
    found = _OBJECT.fullmatch(reply)
    try:
        fields = json.loads(found[1], strict=False) if found else {}
    except (ValueError, RecursionError):
        return reply
    if not any(re.fullmatch(_NAME, key, re.IGNORECASE) for key in fields):
        return reply
    return "\n".join(f"{{{key}}}:\n{value}" for key, value in fields.items())


def _closed(before: str, header: re.Match[str], after: str) -> str:
    """What follows a header without the marks that close what opens before it or with it: a fence, a brace."""
    lines = after.split("\n")
    if _opens_a_fence(before.split("\n")):
        if _BARE_FENCE.match(lines[0]):
            return "\n".join(lines[1:])
        if _BARE_FENCE.match(lines[-1]) and _opens_a_fence(lines):
            return "\n".join(lines[:-1])
    for opening, closing in header["open"].count("{") * ["{}"] + ["[]", "<>", "()"]:
        open_still = opening in header["open"] and closing not in header["close"]
        if open_still and after.endswith(closing) and after.count(closing) > after.count(opening):
            after = after[:-1].rstrip()
    return after


def _opens_a_fence(lines: list[str]) -> bool:
    """Whether one of the lines' fences has no partner."""
    return sum(_FENCE.match(line) is not None for line in lines) % 2 == 1


def _unwrapped(text: str, rejected: str) -> str:
    """The text without a rule, a fence or quotes around all of it that the rejected answer does not have."""
    text, rejected = text.strip(), rejected.strip()
    for pattern in (_RULE_BEFORE, _RULE_AFTER):
        if not pattern.search(rejected):
            text = pattern.sub("", text).strip()
    for inside in (_inside_fence, _inside_quotes):
        inner = inside(text)
        if inner is not None and inside(rejected) is None:
            text = inner.strip()
    return text


_RULE_BEFORE = re.compile(r"\A(?:-{3,}|\*{3,}|_{3,}|={3,})[ \t]*(?:\n|\Z)")
_RULE_AFTER = re.compile(r"(?:\A|\n)[ \t]*(?:-{3,}|\*{3,}|_{3,}|={3,})\Z")
_FENCE = re.compile(r"^(?P<marks>`{3,}|~{3,})[ \t]*(?P<language>[^\s`]*)[ \t]*$")
_BARE_FENCE = re.compile(r"^(?:`{3,}|~{3,})[ \t]*$")
_OBJECT = re.compile(r"\s*+(?:```\w*\s++)?(\{\s*+\".*\})\s*+(?:```\s*+)?", re.DOTALL)
_PLAIN_LANGUAGES = {"", "text", "txt", "plaintext", "markdown", "md"}


def _inside_fence(text: str) -> str | None:
    """What a fence holds that opens with the text and closes with it; a fence of code belongs to the answer."""
    lines = text.split("\n")
    opening = _FENCE.match(lines[0])
    if opening is None or opening["language"].lower() not in _PLAIN_LANGUAGES or len(lines) < 3:
        return None
    depth = 0
    for number, line in enumerate(lines):
        fence = _FENCE.match(line)
        if fence is None:
            continue
        depth += 1 if number == 0 or fence["language"] else -1
        if depth == 0:
            return "\n".join(lines[1:-1]) if number == len(lines) - 1 else None
    return None


def _inside_quotes(text: str) -> str | None:
    """What a pair of quotes holds that opens with the text and closes with it."""
    for opening, closing in (('"""', '"""'), ('"', '"'), ("“", "”"), ("«", "»")):
        inner = text.removeprefix(opening).removesuffix(closing)
        if len(text) == len(inner) + len(opening) + len(closing) and opening not in inner and closing not in inner:
            return inner
    return None
