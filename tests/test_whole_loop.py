"""The whole loop on the pocket world, through the real command: done once, killed and resumed, changed and redone."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import POCKET, anchored, anchored_killed
from safetensors.torch import load_file

from anchored.pocket.teacher import Teacher
from anchored.runs import Run, read_lines

SMALL = ("create.prompts.take=40", "create.prompts.held_out=8", "train.epochs=2", "train.pairs_per_step=4")


def run_pocket(folder: Path, *more: object, teacher: Teacher) -> tuple[object, ...]:
    # few at a time, so that a kill finds the teacher at work
    endpoint = (
        "create.reviser.serve=null",
        f"create.reviser.base_url={teacher.base_url}",
        "create.reviser.concurrency=2",
    )
    return ("run", POCKET, *SMALL, *endpoint, "--limit", "40", "--out", folder, *more)


def weights(run: Run) -> bytes:
    state = load_file(run.checkpoints / "epoch-02" / "model.safetensors")
    return b"".join(state[name].numpy().tobytes() for name in sorted(state))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("undisturbed")
    with Teacher() as teacher:
        done = anchored(*run_pocket(folder, teacher=teacher))
    assert done.code == 0, done.err
    assert "epoch-02" in done.out
    assert "report.html" in done.out
    return Run(folder)


def test_a_run_leaves_every_file_of_the_design(undisturbed: Run) -> None:
    run = undisturbed
    for path in (run.recipe, run.replies, run.pairs, run.held_out, run.refused, run.reference, run.report):
        assert path.stat().st_size > 0, path
    steps = [line["step"] for line in read_lines(run.metrics)]
    assert steps == list(range(1, len(steps) + 1))
    assert read_lines(run.trajectories)[0]["step"] == 0
    scores = read_lines(run.scores)
    assert {line["checkpoint"] for line in scores} == {"start", "epoch-01", "epoch-02"}
    assert {line["n"] for line in scores if line["category"] is None} == {40}
    assert len(read_lines(run.answers / "pocket" / "epoch-02.jsonl")) == 40


def test_the_same_command_again_does_nothing_anew(undisturbed: Run) -> None:
    before = {path: path.stat().st_mtime_ns for path in (undisturbed.pairs, undisturbed.metrics, undisturbed.scores)}
    with Teacher() as teacher:
        # another port is no other recipe: where an endpoint is does not change what it answers
        done = anchored(*run_pocket(undisturbed.folder, teacher=teacher))
        assert done.code == 0, done.err
        assert not teacher.requests
    assert before == {path: path.stat().st_mtime_ns for path in before}


def stored_replies(run: Run, model: str = "%") -> int:
    if not run.replies.exists():
        return 0
    with sqlite3.connect(run.replies) as store:
        try:
            return store.execute("SELECT count(*) FROM replies WHERE model LIKE ?", (model,)).fetchone()[0]
        except sqlite3.OperationalError:
            return 0


KILLS: dict[str, Callable[[Run], bool]] = {
    "while the policy samples": lambda run: stored_replies(run) >= 1,
    "while the teacher revises": lambda run: stored_replies(run) >= 60,
    "before the first step": lambda run: run.summary("create") is not None,
    "in the first epoch": lambda run: len(read_lines(run.metrics)) >= 3,
    "after a checkpoint": lambda run: (run.checkpoints / "epoch-01").exists(),
    "while a checkpoint answers": lambda run: run.summary("train") is not None,
}


def test_a_run_killed_at_any_point_ends_as_the_undisturbed_one(undisturbed: Run, tmp_path: Path) -> None:
    """One run, killed with SIGKILL at one point after another, then left to finish."""
    run = Run(tmp_path / "killed")
    asked, stored = {}, {}
    with Teacher() as teacher:
        for name, when in KILLS.items():
            code = anchored_killed(*run_pocket(run.folder, teacher=teacher), when=lambda when=when: when(run))
            assert code == -9, name
            asked[name] = sum(request.part == "reviser" for request in teacher.requests)
            stored[name] = stored_replies(run, "pocket-teacher")
        done = anchored(*run_pocket(run.folder, teacher=teacher))
        assert done.code == 0, done.err
    # between these two kills the pairs were finished: a reply that was stored and asked for again would have been asked
    # for, but not stored anew
    before, after = "while the teacher revises", "before the first step"
    assert 0 < stored[before] <= stored[after]
    assert asked[after] - asked[before] == stored[after] - stored[before]
    # and nothing is asked once they are
    assert asked["while a checkpoint answers"] == asked[after]
    assert weights(run) == weights(undisturbed)
    assert run.pairs.read_bytes() == undisturbed.pairs.read_bytes()
    assert read_lines(run.scores) == read_lines(undisturbed.scores)
    varying = ("pairs_per_second", "tokens_per_second")
    steady = [{k: v for k, v in line.items() if k not in varying} for line in read_lines(run.metrics)]
    assert steady == [{k: v for k, v in line.items() if k not in varying} for line in read_lines(undisturbed.metrics)]
    assert read_lines(run.trajectories) == read_lines(undisturbed.trajectories)


def test_a_changed_filter_makes_pairs_anew_without_a_call(undisturbed: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "copy")
    shutil.copytree(undisturbed.folder, run.folder)
    changed = "create.filters=[{length_ratio: {low: 0.99, high: 1.01}}]"
    with Teacher() as teacher:
        arguments = run_pocket(run.folder, changed, teacher=teacher)
        refused = anchored(*arguments)
        assert refused.code == 2
        assert "create.filters" in refused.err
        assert "--redo create" in refused.err
        done = anchored(*arguments, "--redo", "create", "--until", "create")
        assert done.code == 0, done.err
        assert not teacher.requests
    outcomes = run.summary("create")
    assert outcomes is not None
    assert "length_ratio" in json.dumps(outcomes)
    assert run.summary("train") is None
