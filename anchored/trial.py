"""What `--limit` means in a run folder whose work was done under another one: a trial takes nothing from a run.

More than before is done anew where that costs nothing to speak of, for replies are kept by content; less than before
goes into a folder of its own. The evaluation alone may ask fewer questions than the run has prompts.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence

from anchored import recipe as recipes
from anchored.errors import RecipeError
from anchored.recipe import Recipe
from anchored.runs import Run

SHORT_SECONDS = 600
"""Training that took longer is not done anew unasked."""

Note = Callable[[str], object]


def take_limit(run: Run, recipe: Recipe, stages: Sequence[str], redo: str | None, note: Note) -> Recipe:
    """The recipe that the folder is to hold; what a smaller limit made is dropped if that is all that changed.

    Raises RecipeError where the limit is smaller than that of work that is there, and where it would cost long training
    that nobody asked to do again.
    """
    before = _limit_of(run, recipe)
    if set(stages) <= {"evaluate", "report"}:
        return recipe.model_copy(update={"limit": before})
    if recipe.limit == before:
        return recipe
    first = "create" if recipe.train.data is None else "train"
    if _is_fewer(recipe.limit, before):
        _check_nothing_is_there(run, recipe.limit, before)
    else:
        _check_is_cheap(run, recipe.limit, before, first, stages, redo)
    if redo is None and [change.key for change in recipes.changes(run, recipe)] == ["limit"]:
        run.redo(first)
        recipes.write(run, recipe)
        note(
            f"limit: {_prompts(before)} before, {_prompts(recipe.limit)} now; {first} and what follows begin anew, and "
            "only what has no stored reply is asked"
        )
    return recipe


def widen_evaluation(run: Run, recipe: Recipe, stages: Sequence[str], note: Note) -> None:
    """Drop a complete evaluation that is of fewer questions than are wanted; one of more questions stays."""
    summary = run.summary("evaluate") if "evaluate" in stages else None
    if summary is None:
        return
    before, now = summary.get("limit", _limit_of(run, recipe)), recipe.limit
    if _is_fewer(before, now):
        run.redo("evaluate")
        note(f"evaluate: of {_questions(before)} before, of {_questions(now)} now; what is answered is not asked again")
    elif _is_fewer(now, before):
        note(f"evaluate: is there, of {_questions(before)}")


def _limit_of(run: Run, recipe: Recipe) -> int | None:
    """The limit that the folder's work was begun with."""
    before = run.read_recipe()
    return recipe.limit if before is None else before.get("limit")


def _is_fewer(one: int | None, other: int | None) -> bool:
    return one is not None and (other is None or one < other)


def _check_nothing_is_there(run: Run, now: int | None, before: int | None) -> None:
    if not any(map(run.has_begun, ("create", "train", "evaluate"))):
        return  # replies at most, of which none is lost
    folder, trial = (shlex.quote(str(path)) for path in (run.folder, run.folder.with_name(f"{run.folder.name}-trial")))
    raise RecipeError(
        f"limit is {now}, but {run.folder} holds work on {_prompts(before)}, which a trial must not replace; give it a "
        f"folder of its own, --out {trial} (after `anchored merge-replies {trial} {folder}` it asks nothing again)"
    )


def _check_is_cheap(
    run: Run, now: int | None, before: int | None, first: str, stages: Sequence[str], redo: str | None
) -> None:
    begun = f"limit is {'none' if now is None else now}, but {run.folder} was begun with {before}"
    if first not in stages:
        raise RecipeError(
            f"{begun}: make the other pairs first, by `anchored {first}` with the same limit (what is answered is not "
            f"asked again), or give --limit {before}"
        )
    if redo is None and (seconds := _trained_seconds(run)) > SHORT_SECONDS:
        trained = "began to train" if seconds == float("inf") else f"trained for {seconds / 60:.0f} minutes"
        raise RecipeError(
            f"{begun} and {trained} on that; --redo {first} trains anew on {_prompts(now)} (what is answered is not "
            "asked again), another --out leaves this as it is"
        )


def _trained_seconds(run: Run) -> float:
    """How long the checkpoints took; without end where training goes on yet."""
    summary = run.summary("train")
    if summary is not None:
        return float(summary.get("seconds", 0.0))
    return float("inf") if run.has_begun("train") else 0.0


def _prompts(limit: int | None) -> str:
    return "all prompts" if limit is None else f"{limit} prompts"


def _questions(limit: int | None) -> str:
    return "all questions" if limit is None else f"{limit} questions of each benchmark"
