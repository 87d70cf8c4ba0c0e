"""`anchored inspect`: opens a data set, serves its page until it is interrupted, and says what was decided.

`write_decided` applies decisions to data that nobody makes again, a file that came from elsewhere.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import webbrowser
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from anchored.datasets_io import each_pair, write_pairs
from anchored.datasets_io.places import Place, place_of
from anchored.decisions import DecisionFile, apply, read_decisions
from anchored.errors import DataError
from anchored.inspect.rows import load_rows, run_of
from anchored.inspect.server import Server
from anchored.inspect.session import Session
from anchored.progress import Progress
from anchored.records import Outcome
from anchored.report.overview import stage_command
from anchored.runs import DECISIONS

Say = Callable[[str], None]
_ENDING = re.compile(r"\.(jsonl|ndjson|json|parquet|csv|tsv)(\.(gz|zst|bz2|xz))?$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Inspection:
    """What is looked at, and where decisions go."""

    source: str
    decisions: Path | None = None
    """None: see `decisions_of`."""
    split: str | None = None
    port: int = 0
    """0: a free one."""
    browser: bool = True
    """Open it."""


def open_session(asked: Inspection, progress: Progress) -> Session:
    """Read the rows and the decisions. Raises DataError where there is nothing to look at, or nowhere to decide."""
    path = asked.decisions or decisions_of(asked.source)
    _check_writable(path)
    return Session(_title(asked.source), load_rows(asked.source, asked.split, progress), DecisionFile(path))


def serve(session: Session, asked: Inspection, say: Say) -> None:
    """Serve the page until Ctrl-C, then say what was decided and how to apply it."""
    with Server(session, asked.port) as server, suppress(KeyboardInterrupt):
        say(f"{asked.source}: {session.rows:,} rows; decisions go to {session.path}")
        say(server.address)
        say("Ctrl-C ends; what is decided is on the disk already")
        if asked.browser and _has_screen():
            webbrowser.open(server.address)
        server.serve_forever()
    held = session.close()
    if session.path.exists():
        say(f"{session.path}: {held.describe()}")
        for line in _how_to_apply(asked, session.path):
            say(line)


def write_decided(asked: Inspection, out: Place, say: Say) -> None:
    """Write the pairs of a data set as people decided: without what they dropped, with what they kept or edited."""
    if run := run_of(asked.source):
        command = stage_command(run, "create", "--redo", "create")
        raise DataError(f"{asked.source}: is a run folder, which decides for itself: {command}")
    path = asked.decisions or decisions_of(asked.source)
    decisions = read_decisions(path)
    if not decisions.counts():
        raise DataError(f"{path}: holds no decision; `anchored inspect {asked.source}` writes them")
    before = list(each_pair(asked.source, split=asked.split))
    after = [apply(pair, decisions) for pair in before]
    kept = [pair for pair in after if pair.outcome is Outcome.OK]
    if not kept:
        raise DataError(f"{out}: not written, for no pair would be left; undo some of what {path} holds")
    write_pairs(out, kept)
    changed = Counter(now.outcome for was, now in zip(before, after, strict=True) if was is not now)
    say(f"{path}: {decisions.describe()}")
    say(f"{out}: {len(kept):,} of {len(before):,} rows; {changed.total()} changed by people")


def decisions_of(source: str) -> Path:
    """Where decisions about a source go: into its folder, beside its file, or into this folder if it is elsewhere."""
    path = place_of(source)
    if not isinstance(path, Path):
        return Path(f"{_ENDING.sub('', path.name)}.{DECISIONS}")
    if path.is_dir():
        return path / DECISIONS
    if not path.exists():
        return Path(f"{source.replace('/', '--')}.{DECISIONS}")
    if path.suffix == ".parquet" and (run := run_of(str(path.parent))) and run.recipe.exists():
        return run.decisions
    return path.with_name(f"{_ENDING.sub('', path.name)}.{DECISIONS}")


def _title(source: str) -> str:
    path = place_of(source)
    if not isinstance(path, Path):
        return path.name
    return path.resolve().name if path.exists() else source


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise DataError(f"{path}: is a folder; --decisions names a file")
    place = path if path.exists() else path.parent
    if not os.access(place, os.W_OK):
        raise DataError(f"{place}: nothing can be written there; name another file with --decisions")


def _has_screen() -> bool:
    """Whether a browser would open in a window: in a terminal it would take the place of what is printed there."""
    if sys.platform in ("darwin", "win32"):
        return True
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))


def _how_to_apply(asked: Inspection, path: Path) -> list[str]:
    run = run_of(asked.source)
    if run is None:
        command = shlex.join(("anchored", "inspect", asked.source, "--write", "OUT.parquet"))
        return [f"apply them: {command}"]
    command = stage_command(run, "create", "--redo", "create")
    if path.resolve() != run.decisions.resolve():
        command += f" create.decisions={shlex.quote(str(path))}"
    elif not run.has_new_decisions():
        return []
    return [f"apply them: {command} (replies are stored, so nothing is paid again)"]
