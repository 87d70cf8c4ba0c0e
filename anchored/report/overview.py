"""The head of the report: what was run, its first numbers, its settings, and what is still to be done."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from anchored.llm.money import dollars
from anchored.records import Outcome, Score
from anchored.report.contents import Contents
from anchored.report.scoreboard import Scoreboard
from anchored.report.tables import duration, signed
from anchored.runs import Run

_TEACHES = {
    "clair": "revised by {}",
    "judge-on-policy": "judged by {}",
    "judge-off-policy": "judged by {}",
    "stronger-preferred": "won by answers of {}",
}


@dataclass(frozen=True, slots=True)
class Tile:
    """A headline number, with a few lines of detail."""

    label: str
    value: str
    detail: str
    leading: bool = False


@dataclass(frozen=True, slots=True)
class Fact:
    """A setting worth knowing."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Gap:
    """What is not there, and the command that makes it."""

    text: str
    command: str = ""
    ending: str = ""


def lede(contents: Contents) -> str:
    """One sentence: which policy, which objective, which pairs."""
    policy = contents.policy or "A model"
    pairs = _pairs(contents)
    if not contents.metrics:
        return f"{policy}: {pairs}, not trained on yet." if pairs else f"{policy}: nothing made yet."
    beta, epochs, rate = (contents.setting(f"train.{key}") for key in ("objective.beta", "epochs", "optimizer.lr"))
    objective = contents.setting("train.objective.name") or "an unrecorded objective"
    how = [f"β {beta}" if beta else "", f"{epochs} epochs" if epochs else "", f"learning rate {rate}" if rate else ""]
    settings = ", ".join(filter(None, how))
    trained_on = f" on {pairs}" if pairs else ""
    return f"{policy}, aligned with {objective}{f' ({settings})' if settings else ''}{trained_on}."


def tiles(contents: Contents) -> list[Tile]:
    """The numbers that one looks for first."""
    return [*_score_tiles(contents), *_data_tiles(contents), *_training_tiles(contents)]


def facts(contents: Contents) -> list[Fact]:
    """The settings that one compares runs by."""
    versions = contents.setting("versions") or {}
    named = {
        "Policy": contents.setting("policy.model"),
        "Prompts": contents.setting("create.prompts.data"),
        "Method": contents.setting("create.method"),
        "Teacher": contents.teacher,
        "Teacher's tokens": _tokens(contents),
        "Noticed in kept pairs": _counts(contents.summary("create").get("noticed") or {}),
        "Training data": contents.setting("train.data"),
        "Objective": contents.setting("train.objective.name"),
        "β": contents.setting("train.objective.beta"),
        "Optimizer": contents.setting("train.optimizer.name"),
        "Learning rate": contents.setting("train.optimizer.lr"),
        "Schedule": contents.setting("train.optimizer.schedule"),
        "Epochs": contents.setting("train.epochs"),
        "Pairs per step": contents.setting("train.pairs_per_step"),
        "Rows trained on": contents.summary("train").get("pairs"),
        "Left out of training": _counts(contents.summary("train").get("left_out") or {}),
        "Benchmarks": ", ".join(contents.setting("evaluate.benchmarks") or ()),
        "Spent on judging": _judging(contents),
        "Time": _counts({stage: _took(contents, stage) for stage in ("create", "train", "evaluate")}),
        "Versions": _counts(versions),
    }
    if contents.setting("train.data"):
        named |= dict.fromkeys(("Prompts", "Method", "Teacher", "Teacher's tokens"))
    return [
        Fact(name, f"{value:,}" if isinstance(value, int) else str(value)) for name, value in named.items() if value
    ]


def gaps(contents: Contents) -> dict[str, Gap | None]:
    """By section, what is missing in it."""
    return {
        "scores": _scores_gap(contents),
        "data": _data_gap(contents),
        "training": _training_gap(contents),
        "held_out": _held_out_gap(contents),
    }


def _pairs(contents: Contents) -> str:
    data, kept = contents.setting("train.data"), len(contents.accepted("training"))
    if data or not kept:
        return f"the pairs of {data}" if data else ""
    method, teacher = contents.setting("create.method"), contents.teacher
    taught = f" {_TEACHES[method].format(teacher)}" if teacher and method in _TEACHES else ""
    return f"{kept:,} {method} pairs{taught}" if method else f"{kept:,} pairs"


def _score_tiles(contents: Contents) -> list[Tile]:
    if not contents.boards:
        return []
    board = contents.boards[0]
    tiles = []
    if board.start:
        tiles.append(Tile("Starting model", f"{board.start.score:.1f}", f"{_interval(board.start)}\n{board.title}"))
    if board.best:
        tiles.append(Tile("Best checkpoint", f"{board.best.score:.1f}", _standing(board, board.best), leading=True))
        tiles.append(Tile("Last checkpoint", f"{board.trained[-1].score:.1f}", _standing(board, board.trained[-1])))
    return tiles


def _standing(board: Scoreboard, score: Score) -> str:
    change = board.change(score.checkpoint, None)
    over = f" over {board.shared:,} shared items or more" if board.shared else ""
    gained = f"{signed(change)} points{over}\n" if change is not None else ""
    return f"{gained}{_interval(score)}\n{score.checkpoint}"


def _interval(score: Score) -> str:
    return f"95 % {score.low:.1f} to {score.high:.1f}"


def _data_tiles(contents: Contents) -> list[Tile]:
    tiles = []
    outcomes = contents.outcomes
    if outcomes:
        kept, total = outcomes[Outcome.OK], outcomes.total()
        apart = len(contents.accepted("held-out"))
        held_out = f"\n{apart:,} held out" if apart else ""
        tiles.append(Tile("Accepted pairs", f"{kept:,}", f"{100 * kept / total:.1f} % of {total:,} rows{held_out}"))
    mean = contents.contrasts.get("training")
    if mean:
        tiles.append(
            Tile(
                "Jaccard similarity",
                f"{mean.jaccard:.1f}",
                f"of {mean.tokenizer} tokens\nLevenshtein {mean.levenshtein:,.0f}",
            )
        )
    return tiles


def _training_tiles(contents: Contents) -> list[Tile]:
    summary = contents.summary("train")
    if not summary.get("seconds"):
        return []
    epochs, steps = contents.setting("train.epochs"), summary.get("steps")
    parts = [f"{epochs} epochs" if epochs else "", f"{steps:,} steps" if steps else ""]
    return [Tile("Training", duration(summary["seconds"]), "\n".join(filter(None, parts)))]


def _tokens(contents: Contents) -> str:
    """Of all who were asked but the policy."""
    replies = contents.summary("create").get("replies", {})
    used = [one for role, one in replies.items() if role != "policy"]
    names = ("prompt_tokens", "completion_tokens", "replies")
    asked, answered, count = (sum(one.get(name, 0) for one in used) for name in names)
    if not answered:
        return ""
    spent = next((one["spent"] for one in used if one.get("spent")), None)  # the run's, which all of them share
    money = f", {dollars(spent['run_usd'])}" if spent else ""
    return f"{asked:,} in, {answered:,} out, {count:,} replies{money}"


def _judging(contents: Contents) -> str:
    """By the judges and the stronger model."""
    spent = contents.summary("evaluate").get("spent")
    return dollars(spent["run_usd"]) if spent else ""


def _took(contents: Contents, stage: str) -> str:
    seconds = contents.summary(stage).get("seconds")
    return duration(seconds) if seconds else ""


def _counts(named: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in named.items() if value)


def _scores_gap(contents: Contents) -> Gap | None:
    if contents.boards:
        return None
    if contents.recipe and not contents.setting("evaluate.benchmarks"):
        return Gap("The recipe names no benchmark (evaluate.benchmarks), so nothing was scored.")
    return Gap("There are no scores yet:", stage_command(contents.run, "evaluate"), "makes them.")


def _data_gap(contents: Contents) -> Gap | None:
    if contents.rows:
        return None
    data = contents.setting("train.data")
    if data:
        return Gap("The run's pairs are not its own:", shlex.join(("anchored", "contrast", data)), "measures them.")
    return Gap("There are no pairs yet:", stage_command(contents.run, "create"), "makes them.")


def _training_gap(contents: Contents) -> Gap | None:
    if not contents.metrics:
        return Gap("Nothing is trained yet:", stage_command(contents.run, "train"), "does it.")
    if not contents.summary("train"):
        return Gap("Training has not come to its end:", stage_command(contents.run, "train"), "goes on from here.")
    return None


def _held_out_gap(contents: Contents) -> Gap | None:
    if not contents.metrics or contents.trajectories:
        return None
    return Gap("No pairs were held out (create.prompts.held_out), so there is nothing to follow through training.")


def stage_command(run: Run, stage: str, *options: str) -> str:
    """The command that does one stage of a run folder."""
    return shlex.join(("anchored", stage, "RECIPE", "--out", str(run.folder), *options))
