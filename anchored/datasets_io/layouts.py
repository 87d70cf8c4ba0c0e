"""One row, in any layout that people have, as a pair, a labelled answer or a prompt, recognised by its columns:

    prompt, chosen, rejected         TRL explicit prompt: messages or strings, answers as assistant turns or strings
    chosen, rejected                 TRL implicit prompt: full turns
    prompt (str), chosen, rejected   full turns beside a string (ultrafeedback_clair_32k, ultrafeedback_binarized)
    instruction, completions         UltraFeedback's own: the best against the worst `overall_score`
    prompt, completion, label        unpaired: one answer, and whether it is desirable (TRL)
    prompt, completion | response | output | answer   one answer, or a list of them, to a prompt (or to its `id`)
    prompt | instruction | question | messages      prompts alone

`instruction`, `question`, `query` or `input` may stand for `prompt`, and `conversations` or `conversation` for
`messages`; a `system` column is a system turn, and a pair may have a `margin`. A row that would double a turn, lacks an
answer or has the same answer twice raises `Refused` with its outcome.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from anchored.datasets_io.cells import (
    Refused,
    kind,
    malformed,
    message,
    missing,
    note,
    number,
    records,
    short,
    text,
    truth,
    turns,
    well_formed,
)
from anchored.records import Answer, LabelledAnswer, Message, Outcome, Pair, Prompt, Role, prompt_id

Columns = Mapping[str, Any]
Turns = tuple[Message, ...]

_PROMPTS = ("prompt", "instruction", "question", "query", "input")
_TALKS = ("messages", "conversations", "conversation")
_SYSTEMS = ("system", "system_prompt")
_IDS = ("id", "prompt_id")
_ANSWERS = ("completion", "response", "output", "answer")
_WRITERS = ("model", "generator")
READ_FOR_PROMPTS = frozenset({*_PROMPTS, *_SYSTEMS, *_IDS, *_TALKS, "chosen"})
"""The columns that `prompt` looks at."""
READ = READ_FOR_PROMPTS | {"rejected", "completions", "completion", "label"}
"""The columns that hold the conversation, in one layout or another, and the row's name."""


def pair(columns: Columns) -> Pair:
    """A row as a pair; one of our own that was refused keeps its outcome."""
    found = _best_against_worst(columns) if "completions" in columns else _chosen_and_rejected(columns)
    if found.outcome is Outcome.OK:
        check_answers(found)
    return found


def is_unpaired(columns: Columns) -> bool:
    """Whether a row holds a single answer; in a table of both kinds, the cells of the other kind are empty."""
    return "completion" in columns and all(_empty(columns.get(name)) for name in ("chosen", "rejected"))


def labelled(columns: Columns) -> LabelledAnswer:
    """An unpaired row."""
    said = _conversation(columns, "completion")
    before = _complete(said[:-1])
    if not said[-1].content.strip():
        raise Refused(Outcome.EMPTY, "the completion is empty")
    if _empty(columns.get("label")):
        raise malformed("nothing says whether the completion is desirable; give it a label of true or false")
    row = Prompt(before, own_id(columns) or prompt_id(before))
    return LabelledAnswer(row, Answer(said[-1].content, note(columns, "model")), truth(columns["label"], "label"))


def scores(columns: Columns) -> tuple[float | None, float | None]:
    """What the chosen and the rejected answer were scored with, where the row says so."""
    if "completions" in columns:
        scored = _scored(records(columns["completions"], "completions"))
        return (scored[-1][0], scored[0][0]) if scored else (None, None)
    return number(columns.get("score_chosen")), number(columns.get("score_rejected"))


def prompt(columns: Columns) -> Prompt:
    """A row as a prompt; where the row holds a whole conversation, what comes before its last answer."""
    found = _complete(_with_system(columns, _prompt_turns(columns)))
    return Prompt(found, own_id(columns) or prompt_id(found))


@dataclass(frozen=True, slots=True)
class Answered:
    """A row of answers that somebody has."""

    id: str
    """The data's own name of the prompt; empty if it gives none."""
    prompt: Prompt | None
    """None where the row names its prompt by id alone."""
    answers: list[Answer]


def answered(columns: Columns) -> Answered:
    """A row of one answer, or of a list of them, to a prompt."""
    name = _first(columns, (*_ANSWERS, *_TALKS))
    if name is None:
        raise malformed(f"no column {', '.join(_ANSWERS)} or messages holds an answer")
    cell = columns[name]
    several = isinstance(cell, list) and bool(cell) and all(isinstance(one, str) for one in cell)
    texts = [well_formed(one) for one in cell] if several else [_last_turn(columns, name)]
    writer = next(filter(None, (note(columns, one) for one in _WRITERS)), "")
    id, says_prompt = own_id(columns), _first(columns, (*_PROMPTS, *_TALKS)) is not None
    if not id and not says_prompt:
        raise malformed(f"{name} holds an answer alone, and no column {' or '.join((*_PROMPTS, *_IDS))} says to what")
    return Answered(id, prompt(columns) if says_prompt else None, [Answer(one, writer) for one in texts])


def passage(columns: Columns) -> str:
    """The text that a benchmark's question is about; empty where there is none."""
    return note(columns, "context")


def own(columns: Columns) -> Pair:
    """A row that `write_pairs` wrote: nothing to check, for it may be a refused one."""
    return Pair(
        Prompt(tuple(message(turn, "prompt") for turn in columns["prompt"]), columns["id"]),
        Answer(columns["chosen"][0]["content"], columns["chosen_model"]),
        Answer(columns["rejected"][0]["content"], columns["rejected_model"]),
        method=columns["method"],
        rational=columns["rational"],
        outcome=Outcome(columns["outcome"]),
        detail=columns["detail"],
        margin=number(columns.get("margin")),
    )


def own_id(columns: Columns) -> str:
    """The data's own name of a row; empty if it gives none."""
    for name in _IDS:
        value = columns.get(name)
        if isinstance(value, str) and value.strip():
            return well_formed(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
    return ""


def _empty(value: Any) -> bool:
    """Whether a cell holds nothing, as each kind of file writes it."""
    return missing(value) or value in ("", [])


def _chosen_and_rejected(columns: Columns) -> Pair:
    if not {"chosen", "rejected"} <= columns.keys():
        raise malformed(_unknown_layout(columns))
    chosen, rejected = _conversation(columns, "chosen"), _conversation(columns, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise malformed("chosen and rejected answer different prompts")
    before = _complete(chosen[:-1])
    outcome = note(columns, "outcome")
    return Pair(
        Prompt(before, own_id(columns) or prompt_id(before)),
        Answer(chosen[-1].content, note(columns, "chosen_model")),
        Answer(rejected[-1].content, note(columns, "rejected_model")),
        method=note(columns, "method"),
        rational=note(columns, "rational"),
        outcome=Outcome(outcome) if outcome in set(Outcome) else Outcome.OK,
        detail=note(columns, "detail"),
        margin=number(columns.get("margin")),
    )


def _conversation(columns: Columns, name: str) -> Turns:
    """The prompt's turns and then the answer in column `name`, however the two are spread over the columns."""
    side = _as_turns(turns(columns[name], name), "assistant")
    before = _prompt_cell(columns)
    if isinstance(before, tuple) and (asked := _asked(columns)) and Message("user", asked) in side:
        before = asked  # somebody asked about what looks like turns
    if not side:
        raise Refused(Outcome.NO_ASSISTANT_TURN, f"{name} is an empty list")
    if before is None and not _is_whole(side, None):
        before = _open_talk(columns)
    if isinstance(before, tuple) and before and (side[0].role != "assistant" or side[: len(before)] == before):
        raise Refused(
            Outcome.DOUBLED_TURN,
            f"{name} repeats turns that stand in the prompt's column already; leave them in one of the two",
        )
    if isinstance(before, tuple) or not _is_whole(side, before):
        if before is None:
            raise malformed(f"{name} holds an answer alone, and no column {' or '.join(_PROMPTS)} says to what")
        side = (*_as_turns(before, "user"), *side)
    if side[-1].role != "assistant":
        raise Refused(Outcome.NO_ASSISTANT_TURN, f"{name} ends with a {side[-1].role} turn")
    return _with_system(columns, side)


def _last_turn(columns: Columns, name: str) -> str:
    """The answer in a column: the string that it is, or the assistant's turn that ends it."""
    said = turns(columns[name], name)
    if isinstance(said, str):
        return said
    if not said or said[-1].role != "assistant":
        raise Refused(Outcome.NO_ASSISTANT_TURN, f"{name} does not end with an assistant turn")
    return said[-1].content


def _asked(columns: Columns) -> str:
    """The prompt's cell where it is a string, whatever that looks like."""
    name = _first(columns, _PROMPTS)
    return note(columns, name) if name else ""


def _is_whole(said: Turns, before: str | None) -> bool:
    """Whether turns are a whole conversation, which the assistant may open, not what answers the string `before`."""
    return said[0].role != "assistant" or (len(said) > 1 and (before is None or Message("user", before) in said))


def _best_against_worst(columns: Columns) -> Pair:
    """UltraFeedback's own layout: the completion with the highest `overall_score` against the one with the lowest."""
    completions = records(columns["completions"], "completions")
    scored = _scored(completions)
    if len(scored) < 2:
        raise malformed(f"{len(scored)} of its {len(completions)} completions have an overall_score; a pair needs two")
    (low, worst), (high, _) = scored[0], scored[-1]
    if low == high:
        raise Refused(Outcome.TIE, f"all {len(scored)} completions have the overall_score {high:g}")
    best = next(index for score, index in scored if score == high)
    if contradiction := _contradiction(completions[best], high):
        raise Refused(Outcome.CONTRADICTED_SCORE, contradiction)
    rejected, chosen = (
        Answer(text(completions[index].get("response"), "response"), note(completions[index], "model"))
        for index in (worst, best)
    )
    return Pair(prompt(columns), chosen, rejected, method="judge-off-policy")


def _contradiction(completion: Columns, overall: float) -> str:
    """What speaks against an `overall_score` of 10; empty if nothing does.

    Revisions of UltraFeedback before 2023-12-29 have 10 where the judge said 1 (its issue 8); the mend made of them
    takes single ratings of 2 or less on average for the sign of it.
    """
    annotations = completion.get("annotations")
    aspects = annotations.values() if isinstance(annotations, dict) else ()
    ratings = [_rating(aspect) for aspect in aspects]
    given = [rating for rating in ratings if rating is not None]
    fine = number(completion.get("fine-grained_score"))
    if fine is None and given:
        fine = sum(given) / len(given)
    if overall < 10 or fine is None or fine > 2:
        return ""
    return f"the best completion has the overall_score {overall:g}, but {fine:g} of 5 in its single ratings"


def _rating(aspect: Any) -> float | None:
    return number(aspect.get("Rating")) if isinstance(aspect, dict) else None


def _scored(completions: Sequence[Columns]) -> list[tuple[float, int]]:
    """The `overall_score` and the place of each completion that has one, the lowest first."""
    found = [(number(completion.get("overall_score")), index) for index, completion in enumerate(completions)]
    return sorted((score, index) for score, index in found if score is not None)


def check_prompt(found: Prompt) -> None:
    """Raise Refused where there is no prompt, as in rows that could not be read."""
    _complete(found.messages)


def check_answers(found: Pair) -> None:
    """Raise Refused where an answer is empty or both are the same: there is nothing to learn from such a pair."""
    for name, answer in (("chosen", found.chosen), ("rejected", found.rejected)):
        if not answer.text.strip():
            raise Refused(Outcome.EMPTY, f"the {name} answer is empty")
    if found.chosen.text.strip() == found.rejected.text.strip():
        raise Refused(Outcome.IDENTICAL, "chosen and rejected are the same text")


def _prompt_turns(columns: Columns) -> Turns:
    before = _prompt_cell(columns)
    if isinstance(before, tuple):
        return before
    # the turns of an answer say more than a string beside them: a system turn, earlier turns
    for name in ("chosen", *_TALKS):
        said = None if missing(columns.get(name)) else turns(columns[name], name)
        if isinstance(said, tuple) and said and _is_whole(said, before):
            return said[:-1] if said[-1].role == "assistant" else said
    if before is None:
        raise malformed(_unknown_layout(columns))
    return _as_turns(before, "user")


def _prompt_cell(columns: Columns) -> Turns | str | None:
    name = _first(columns, _PROMPTS)
    if name is None:
        return None
    before = turns(columns[name], name)
    more = note(columns, "input") if name == "instruction" else ""
    return f"{before}\n\n{more}" if isinstance(before, str) and more.strip() else before


def _open_talk(columns: Columns) -> Turns | None:
    """A conversation beside the answers, where it waits for one."""
    name = _first(columns, _TALKS)
    said = turns(columns[name], name) if name else ""
    return said if isinstance(said, tuple) and said and said[-1].role == "user" else None


def _first(columns: Columns, names: Sequence[str]) -> str | None:
    """The first of the named columns that holds something."""
    return next((name for name in names if not missing(columns.get(name))), None)


def _as_turns(cell: Turns | str, role: Role) -> Turns:
    return (Message(role, cell),) if isinstance(cell, str) else cell


def _with_system(columns: Columns, after: Turns) -> Turns:
    system = next((columns[name] for name in _SYSTEMS if not missing(columns.get(name))), "")
    if not isinstance(system, str):
        raise malformed(f"the system column holds {kind(system)}, not text")
    if not system.strip() or (after and after[0].role == "system"):
        return after
    return (Message("system", well_formed(system)), *after)


def _complete(before: Turns) -> Turns:
    """The turns of a prompt, which end with a user turn and have none twice."""
    if not before or before[-1].role != "user":
        raise malformed("the prompt does not end with a user turn")
    if not before[-1].content.strip():
        raise malformed("the prompt is empty")
    for one, other in pairwise(before):
        if one == other:
            raise Refused(Outcome.DOUBLED_TURN, f"the {one.role} turn {short(one.content)} stands twice in a row")
    return before


def _unknown_layout(columns: Columns) -> str:
    names = ", ".join(map(str, columns)) or "none"
    if {"completion", "label"} <= columns.keys():
        return f"an unpaired row (columns {names}), which has no pair; pairs need chosen and rejected"
    return (
        f"columns {names} are no known layout; pairs have prompt, chosen, rejected, or chosen and rejected with full "
        "turns, or instruction and completions; unpaired data has prompt, completion, label; prompts have "
        f"{', '.join(_PROMPTS)} or messages"
    )
