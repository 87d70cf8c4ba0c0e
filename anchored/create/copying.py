"""The finished pairs copied to where `create.copy_to` says: an object store, or another folder.

In: a run folder whose create stage is complete. The copy is not part of the stage: where it fails, what was made stays
made, and the same command copies again.
"""

from __future__ import annotations

from anchored.datasets_io.places import Place, copied, place_of
from anchored.errors import DataError, Stopped
from anchored.progress import Progress
from anchored.runs import Run


def check_copy(run: Run, copy_to: str) -> None:
    """Raise a DataError for a folder that holds the pairs of another run."""
    _check_free(run, copy_to, place_of(copy_to))


def copy_pairs(run: Run, copy_to: str, progress: Progress) -> None:
    """Copy pairs.parquet, held_out.parquet and refused.parquet, unless they are there; Stopped where that fails."""
    if run.is_copied(copy_to):
        return
    try:
        folder = place_of(copy_to)
        _check_free(run, copy_to, folder)
        run.note_copy(copy_to, whole=False)
        # the pairs last: who finds them finds the others
        for file in (run.refused, run.held_out, run.pairs):
            copied(file, folder / file.name)
    except DataError as error:
        raise Stopped(
            f"create: the pairs are made and stay in {run.folder}, but are not copied: {error}; the same command "
            "copies them, and with create.copy_to=null it goes on without"
        ) from None
    run.note_copy(copy_to, whole=True)
    progress.note(f"create: pairs.parquet, held_out.parquet and refused.parquet are copied to {folder}")


def _check_free(run: Run, copy_to: str, folder: Place) -> None:
    pairs = folder / run.pairs.name
    if not run.has_copied_to(copy_to) and pairs.exists():
        raise DataError(f"{pairs}: is there already, and not of this run; name another folder in create.copy_to")
