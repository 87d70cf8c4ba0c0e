"""The run folder: where one run's files lie, what it was begun with, and which stages are complete.

Everything a stage writes goes through here or appears whole under its name (written aside, then renamed), so a process
killed at any moment leaves nothing half-written that a later one would take for finished. JSONL files are appended
line by line; a line torn by a kill is dropped when they are read.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import yaml

from anchored.errors import DataError, RecipeError

STAGES = ("create", "train", "evaluate", "report")
DECISIONS = "decisions.jsonl"
"""What people decided about pairs: a file of this name in a run folder, with this ending beside other data."""


# ten times as fast where PyYAML was built with it
_SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Run:
    """The files of one run."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.recipe = self.folder / "recipe.yaml"
        self.replies = self.folder / "replies.sqlite"
        self.batches = self.folder / "batches"
        self.pairs = self.folder / "pairs.parquet"
        self.held_out = self.folder / "held_out.parquet"
        self.refused = self.folder / "refused.parquet"
        self.decisions = self.folder / DECISIONS
        self.reference = self.folder / "reference.sqlite"
        self.metrics = self.folder / "metrics.jsonl"
        self.trajectories = self.folder / "trajectories.jsonl"
        self.checkpoints = self.folder / "checkpoints"
        self.scores = self.folder / "scores.jsonl"
        self.answers = self.folder / "answers"
        self.resamples = self.folder / "resamples.npz"
        self.report = self.folder / "report.html"
        self._done = self.folder / "stages"
        self._copy = self._done / "copy.json"

    @contextmanager
    def lock(self, way_out: str = "wait for it") -> Iterator[None]:
        """Hold the folder for this process; the system lets go of it when the process ends, however it ends.

        `way_out` is what somebody can do where another process holds it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"{self.folder}: another process is working in this run folder; {way_out}") from None
            yield

    def summary(self, stage: str) -> dict[str, Any] | None:
        """What a complete stage left to say about itself (counts, seconds); None while it is not complete."""
        path = self._done / f"{stage}.json"
        if not path.exists():
            return None
        try:
            summary = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise DataError(
                f"{path}: not readable ({one_line(error)}); delete it, and the stage is done again"
            ) from None
        if not isinstance(summary, dict):
            raise DataError(f"{path}: not what a stage leaves; delete it, and the stage is done again")
        return summary

    def has_begun(self, stage: str) -> bool:
        """Whether there is anything that the settings of `stage` shaped."""
        return self.summary(stage) is not None or any(path.exists() for path in self._made(stage))

    def has_work(self) -> bool:
        """Whether anything was made here that another recipe would not have made."""
        made = (self.replies, self.reference, self.metrics, self.checkpoints, self._done)
        return any(path.exists() for path in made)

    def has_new_decisions(self) -> bool:
        """Whether people decided about pairs after `create` was complete."""
        made = self._done / "create.json"
        if not (made.exists() and self.decisions.exists()):
            return False
        return self.decisions.stat().st_mtime_ns > made.stat().st_mtime_ns

    def complete(self, stage: str, summary: dict[str, Any]) -> None:
        """Mark a stage complete: the same command skips it from now on."""
        self._done.mkdir(parents=True, exist_ok=True)
        write_text(self._done / f"{stage}.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")

    def redo(self, stage: str) -> None:
        """Forget that `stage` and the stages after it are complete, and drop what they made.

        Replies and reference log-probabilities stay: they are kept by content, and were paid for.
        """
        for later in STAGES[STAGES.index(stage) :]:
            # the mark goes first: a kill in between must not leave a "complete" stage without its files
            (self._done / f"{later}.json").unlink(missing_ok=True)
            for path in self._made(later):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def note_copy(self, folder: str, *, whole: bool) -> None:
        """Remember that copies of what `create` made were begun in a folder, or are there as a `whole`."""
        made = self._made_at() if whole else 0
        write_text(self._copy, json.dumps({"to": folder, "made": made}) + "\n")

    def has_copied_to(self, folder: str) -> bool:
        """Whether copies in a folder, perhaps older ones, are this run's."""
        return self._copied().get("to") == folder

    def is_copied(self, folder: str) -> bool:
        """Whether what `create` made last is copied to a folder."""
        return self._copied() == {"to": folder, "made": self._made_at()}

    def read_recipe(self) -> dict[str, Any] | None:
        """The settings the run was begun with; None in a new folder."""
        if not self.recipe.exists():
            return None
        try:
            settings = yaml.load(self.recipe.read_text("utf-8"), _SafeLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RecipeError(
                f"{self.recipe}: not a readable recipe ({one_line(error)}); restore or delete it"
            ) from None
        if not isinstance(settings, dict):
            raise RecipeError(f"{self.recipe}: holds no settings; restore or delete it")
        return settings

    def server_log(self, name: str) -> Path:
        """What a server that a stage started for model `name` prints."""
        return self.folder / f"serve-{name.replace(' ', '-')}.log"

    def _made_at(self) -> int:
        return (self._done / "create.json").stat().st_mtime_ns

    def _copied(self) -> dict[str, Any]:
        lines = read_lines(self._copy)
        return lines[-1] if lines else {}

    def _made(self, stage: str) -> list[Path]:
        """What a stage makes beside what is kept by content."""
        return {
            "create": [self.pairs, self.held_out, self.refused],
            "train": [self.metrics, self.trajectories, self.checkpoints],
            "evaluate": [self.scores, self.answers, self.resamples],
            "report": [self.report],
        }[stage]


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Add one JSON line; each line is flushed, so a kill can tear the last one at most."""
    append_lines(path, [record])


def append_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Add JSON lines in one write."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    with open(path, "ab+") as handle:
        # a line torn by a kill would swallow the first new one
        if handle.seek(0, os.SEEK_END) and not _ends_line(handle):
            text = "\n" + text
        handle.write(text.encode("utf-8", "replace"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; torn ones are owed again, never a crash. A missing file has none."""
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Replace a JSONL file as a whole."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    with written_aside(path) as aside:
        aside.write_text(text, "utf-8", errors="replace")


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file or a folder to; it takes the place of `path` when the block succeeds."""
    aside = path.with_name(f".{path.name}.partial")
    _remove(aside)
    try:
        yield aside
    except BaseException:
        _remove(aside)
        raise
    for file in [aside, *aside.rglob("*")] if aside.is_dir() else [aside]:
        sync(file)
    if path.is_dir():
        _remove(path)
    os.replace(aside, path)
    sync(path.parent)


def versions(*packages: str) -> dict[str, str]:
    """The versions of those of `packages` that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def one_line(error: BaseException | str) -> str:
    """An error's text on one line, for messages."""
    return " ".join(str(error).split()) or type(error).__name__


def _ends_line(handle: IO[bytes]) -> bool:
    handle.seek(-1, os.SEEK_END)
    return handle.read(1) == b"\n"


def sync(path: Path) -> None:
    """What was written to a file or a folder is on the disk, whatever happens to the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
