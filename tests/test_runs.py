from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from anchored.errors import DataError, RecipeError
from anchored.runs import Run, append_line, read_lines, write_lines, written_aside


def test_a_torn_last_line_is_owed_again_and_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"step": 1})
    with open(path, "a") as handle:
        handle.write('{"step": 2, "lo')
    assert read_lines(path) == [{"step": 1}]
    append_line(path, {"step": 2})
    assert read_lines(path) == [{"step": 1}, {"step": 2}]


def test_lines_keep_any_text(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    records = [{"text": "tab\t line\n \u2028 null\x00 emoji 🙂"}, {"text": "</script>"}]
    write_lines(path, records)
    assert read_lines(path) == records


def test_a_block_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), written_aside(path) as aside:  # noqa: PT012
        aside.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    with written_aside(path) as aside:
        aside.write_text("new")
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["pairs.parquet"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "epoch-01"
    path.mkdir()
    (path / "old").touch()
    with written_aside(path) as aside:
        aside.mkdir()
        (aside / "new").touch()
    assert [entry.name for entry in path.iterdir()] == ["new"]


def test_two_processes_cannot_work_in_one_folder(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    code = (
        "import sys\nfrom anchored.runs import Run\n"
        "with Run(sys.argv[1]).lock():\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(DataError, match="another process"), run.lock():
            pass
        other.kill()
    with run.lock():
        pass


def test_redo_forgets_a_stage_and_the_later_ones_but_keeps_what_was_paid_for(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for path in (run.pairs, run.replies, run.reference, run.metrics, run.scores):
        path.touch()
    (run.checkpoints / "epoch-01").mkdir(parents=True)
    for stage in ("create", "train", "evaluate"):
        run.complete(stage, {"seconds": 1})
    run.redo("train")
    assert run.summary("create") == {"seconds": 1}
    assert run.summary("train") is None
    assert run.summary("evaluate") is None
    assert run.pairs.exists()
    assert run.replies.exists()
    assert run.reference.exists()
    assert not run.metrics.exists()
    assert not run.checkpoints.exists()
    assert not run.scores.exists()


def test_an_unreadable_recipe_in_a_run_folder_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.recipe.write_text("policy: [")
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        run.read_recipe()
    run.recipe.write_text(json.dumps(["not", "settings"]))
    with pytest.raises(RecipeError, match="holds no settings"):
        run.read_recipe()


@pytest.mark.parametrize("text", ["{", "[]"])
def test_an_unreadable_summary_of_a_stage_is_named(tmp_path: Path, text: str) -> None:
    run = Run(tmp_path)
    run.complete("train", {"steps": 3})
    (tmp_path / "stages/train.json").write_text(text)
    with pytest.raises(DataError, match=r"stages/train\.json: .*the stage is done again"):
        run.summary("train")
