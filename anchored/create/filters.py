"""Which finished pairs are refused after all, and why: one table of named filters, each a function with its options.

In: a pair and the filters chosen. Out: the same pair, or one whose outcome says what it failed. A new filter is one
function, from a pair and its options to what is wrong with it ("" if nothing), and one row of `FILTERS`.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from inspect import iscoroutinefunction
from itertools import groupby
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from anchored import contrast
from anchored.create.replies import beginning, is_refusal
from anchored.errors import RecipeError
from anchored.leak import find_leak
from anchored.own import IMPORT_PATH, failure, import_attribute
from anchored.records import Outcome, Pair, as_text
from anchored.settings import Settings

OWN_EXAMPLE = "my_package.my_module:my_filter"


class NoOptions(Settings):
    """A filter without knobs."""


class Band(Settings):
    """Outside of [low, high] a pair is refused."""

    low: float
    high: float

    @model_validator(mode="after")
    def _is_a_band(self) -> Band:
        if self.low > self.high:
            raise ValueError(f"low ({self.low:g}) is above high ({self.high:g}); swap them")
        return self


class LengthRatio(Band):
    """Characters of the chosen answer per character of the rejected one."""

    low: float = Field(default=0.5, ge=0)
    high: float = Field(default=2.0, gt=0)


class Jaccard(Band):
    """Jaccard similarity of the two answers' sets of whitespace tokens, in percent."""

    low: float = Field(default=0.0, ge=0, le=100)
    high: float = Field(default=100.0, ge=0, le=100)


class EditShare(Band):
    """Characters to insert, delete or replace (Levenshtein), as a share of the longer answer's."""

    low: float = Field(default=0.0, ge=0, le=1)
    high: float = Field(default=1.0, ge=0, le=1)


class Looks(Settings):
    """Options of a filter that looks at one answer by itself."""

    answers: Literal["chosen", "both"] = "chosen"
    """Which answers must pass."""


class MaxChars(Looks):
    """How long an answer may be."""

    most: int = Field(default=20_000, ge=1)
    """Characters."""


class Repetition(Looks):
    """When an answer repeats itself."""

    lines: int = Field(default=10, ge=2)
    """This often the same line in a row is a loop."""
    window: int = Field(default=2000, ge=500)
    """Characters that are compressed together."""
    share: float = Field(default=0.12, gt=0, lt=1)
    """A window that zlib compresses to less than this share of its bytes is a loop, in any language."""


@dataclass(frozen=True, slots=True)
class Filter:
    """A row of the table."""

    find: Callable[[Pair, Any], str]
    """(pair, options) -> what is wrong, for people; "" if nothing."""
    outcome: Outcome
    options: type[Settings] = NoOptions


@dataclass(frozen=True, slots=True)
class Chosen:
    """A filter that a recipe asks for."""

    name: str
    """Of `FILTERS`, or the import path of one's own."""
    options: Settings | Mapping[str, Any] = field(default_factory=NoOptions)
    """Those of one's own filter are its keyword arguments."""


def choose(given: Any) -> Chosen:
    """What a recipe says, a name or one name with its options (`{length_ratio: {low: 0.7}}`); ValueError if wrong."""
    if isinstance(given, Chosen):
        return given
    name, options = next(iter(given.items())) if isinstance(given, dict) and len(given) == 1 else (given, None)
    if not isinstance(name, str) or not (name in FILTERS or re.fullmatch(IMPORT_PATH, name)):
        raise ValueError(f"a filter is one of {', '.join(FILTERS)}, or one of them with its options, or {OWN_EXAMPLE}")
    if options is not None and not isinstance(options, dict):
        raise ValueError(f"the options of {name} are a section with keys, as in {{{name}: {{most: 3}}}}")
    if name not in FILTERS:
        return Chosen(name, options or {})
    model = FILTERS[name].options
    if options and not model.model_fields:
        raise ValueError(f"{name} has no options; write it bare")
    try:
        return Chosen(name, model.model_validate(options or {}))
    except ValidationError as error:
        raise ValueError(f"{name}: {_explain(error, model)}") from None


def spelt(chosen: Chosen) -> str | dict[str, Any]:
    """A chosen filter as a recipe says it."""
    options = chosen.options.model_dump() if isinstance(chosen.options, Settings) else dict(chosen.options)
    return {chosen.name: options} if options else chosen.name


def schema() -> dict[str, Any]:
    """JSON Schema of one filter of a recipe."""
    options = {name: one.options.model_json_schema() for name, one in FILTERS.items() if one.options.model_fields}
    with_options = [
        {"type": "object", "properties": {name: known}, "required": [name], "additionalProperties": False}
        for name, known in options.items()
    ]
    own = {
        "type": "object",
        "patternProperties": {f"^{IMPORT_PATH}$": {"type": "object"}},
        "additionalProperties": False,
    }
    return {"anyOf": [{"enum": list(FILTERS)}, {"type": "string", "pattern": f"^{IMPORT_PATH}$"}, *with_options, own]}


def check(filters: Sequence[Chosen]) -> None:
    """Raise a RecipeError for a filter of one's own that cannot be imported or is no function."""
    for one in filters:
        if one.name not in FILTERS:
            _own(one.name)


def filtered(pair: Pair, filters: Sequence[Chosen]) -> Pair:
    """The pair, refused by the first filter that it fails; what is refused already stays so."""
    for one in filters:
        if pair.outcome is not Outcome.OK:
            break
        row = FILTERS.get(one.name) or _own(one.name)
        detail = row.find(pair, one.options)
        if detail:
            pair = replace(pair, outcome=row.outcome, detail=detail)
    return pair


def _outside_length_ratio(pair: Pair, band: LengthRatio) -> str:
    ratio = contrast.length_ratio(pair.chosen.text, pair.rejected.text)
    if band.low <= ratio <= band.high:
        return ""
    return f"{ratio:.3f} times as long as the rejected answer, not {band.low:g} to {band.high:g}"


def _leak(pair: Pair, _: NoOptions) -> str:
    words = find_leak(pair.chosen.text, as_text(pair.prompt), pair.rejected.text)
    return f"speaks of being a revision: {words!r}" if words else ""


def _outside_jaccard(pair: Pair, band: Jaccard) -> str:
    jaccard = contrast.jaccard(pair.chosen.text, pair.rejected.text)
    if band.low <= jaccard <= band.high:
        return ""
    return f"Jaccard similarity {jaccard:.1f}, not {band.low:g} to {band.high:g}"


def _outside_edit_share(pair: Pair, band: EditShare) -> str:
    chosen, rejected = pair.chosen.text, pair.rejected.text
    share = contrast.normalised(contrast.levenshtein(chosen, rejected), chosen, rejected)
    if band.low <= share <= band.high:
        return ""
    return f"{share:.3f} of the longer answer's characters differ, not {band.low:g} to {band.high:g}"


def _too_long(pair: Pair, options: MaxChars) -> str:
    for whose, text in _looked_at(pair, options):
        if len(text) > options.most:
            return f"the {whose} answer has {len(text)} characters, more than {options.most}"
    return ""


def _repetition(pair: Pair, options: Repetition) -> str:
    for whose, text in _looked_at(pair, options):
        for line, again in groupby(text.splitlines()):
            times = sum(1 for _ in again)
            if times >= options.lines and line.strip():
                return f"the {whose} answer has the same line {times} times in a row: {beginning(line)}"
        for part in _windows(text, options.window):
            spelt_out = part.encode("utf-8", "surrogatepass")
            if len(zlib.compress(spelt_out, 6)) < options.share * len(spelt_out):
                return f"the {whose} answer repeats itself: {beginning(part)}"
    return ""


def _control_characters(pair: Pair, options: Looks) -> str:
    for whose, text in _looked_at(pair, options):
        found = _NO_TEXT.search(text)
        if found:
            name = unicodedata.name(found[0], "a control character")
            return f"the {whose} answer holds U+{ord(found[0]):04X} ({name}) at character {found.start()}"
    return ""


def _html(pair: Pair, options: Looks) -> str:
    for whose, text in _looked_at(pair, options):
        if _HTML_PAGE.match(text) and not _SPEAKS_OF_HTML.search(as_text(pair.prompt)):
            return f"the {whose} answer is an HTML page: {beginning(text)}"
    return ""


def _refusal(pair: Pair, _: NoOptions) -> str:
    return f"the chosen answer: {beginning(pair.chosen.text)}" if is_refusal(pair.chosen.text) else ""


FILTERS: Mapping[str, Filter] = {
    "length_ratio": Filter(_outside_length_ratio, Outcome.LENGTH_RATIO, LengthRatio),
    "leak": Filter(_leak, Outcome.LEAK),
    "jaccard": Filter(_outside_jaccard, Outcome.CONTRAST, Jaccard),
    "edit_share": Filter(_outside_edit_share, Outcome.CONTRAST, EditShare),
    "max_chars": Filter(_too_long, Outcome.TOO_LONG, MaxChars),
    "repetition": Filter(_repetition, Outcome.REPETITION, Repetition),
    "control_characters": Filter(_control_characters, Outcome.CONTROL_CHARACTERS, Looks),
    "html": Filter(_html, Outcome.HTML, Looks),
    "refusal": Filter(_refusal, Outcome.REFUSAL),
}

# the C0 and C1 controls but tab and line ends, what turns the direction of text, what is no character, halves of pairs
_NO_TEXT = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069\ufffd-\uffff\ud800-\udfff]")
_HTML_PAGE = re.compile(
    r"\s*+(?:```html\s*+)?(?:<\?xml[^>]{0,200}>\s*+)?<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE
)
_SPEAKS_OF_HTML = re.compile(
    r"html|web[ -]?(?:page|site|app)|\bcss\b|front-?end|landing page|<\w+[^<>]*>", re.IGNORECASE
)


def _looked_at(pair: Pair, options: Looks) -> Iterator[tuple[str, str]]:
    yield "chosen", pair.chosen.text
    if options.answers == "both":
        yield "rejected", pair.rejected.text


def _windows(text: str, size: int) -> Iterator[str]:
    """Half-overlapping stretches of a text, its end included; none of a text too short to tell."""
    if len(text) < 500:
        return
    for start in range(0, max(len(text) - size, 0) + 1, size // 2):
        yield text[start : start + size]
    if len(text) > size:
        yield text[-size:]


@cache
def _own(path: str) -> Filter:
    """A function `(pair, **options) -> what is wrong with the pair, or ""` as a row of the table."""
    function = import_attribute(path, "create.filters")
    if not callable(function) or iscoroutinefunction(function):
        kind = "coroutine function" if callable(function) else type(function).__name__
        raise RecipeError(f"create.filters: {path} is a {kind}; a filter is a function (pair, **options)")

    def find(pair: Pair, options: Mapping[str, Any]) -> str:
        try:
            found = function(pair, **options)
        except (Exception, SystemExit) as error:
            raise RecipeError(f"create.filters: {path} fails on prompt {pair.prompt.id}: {failure(error)}") from error
        if not isinstance(found, str | None):
            raise RecipeError(
                f"create.filters: {path} returned a {type(found).__name__}; it has to say in words why a pair is "
                'refused, or "" to keep it'
            )
        return f"{path}: {found}" if found else ""

    return Filter(find, Outcome.OWN_FILTER)


def _explain(error: ValidationError, model: type[Settings]) -> str:
    problem = error.errors()[0]
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return f"unknown option {key!r}; its options are {', '.join(model.model_fields)}"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should", "must")
    return f"{key} {message}".strip()
