"""The pocket world with its policy behind a real `transformers serve`, through the command: whole, killed, deserted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import processes
import pytest
from commands import POCKET, anchored, anchored_killed

from anchored.datasets_io import read_rows
from anchored.pocket.teacher import MODEL, Teacher
from anchored.pocket.world import policy_folder
from anchored.records import Outcome
from anchored.runs import Run, read_lines

PROMPTS, HELD_OUT = 10, 2
ROWS = PROMPTS + HELD_OUT
SMALL = (
    f"create.prompts.take={PROMPTS}",
    f"create.prompts.held_out={HELD_OUT}",
    "create.sample.max_tokens=120",
)
SERVED = ("create.sample.serve=transformers", "create.sample.serve_options={device: cpu}")
JUDGED = ("create.method=judge-on-policy", "create.judge={model: pocket-teacher, serve: pocket}")


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """A folder of this test's own: its processes are known by it."""
    return shutil.copytree(policy_folder(), tmp_path / "policy")


def command(folder: Path, policy: Path, *more: object) -> tuple[object, ...]:
    return ("create", POCKET, *SMALL, *SERVED, f"policy.model={policy}", "--out", folder, *more)


def samples(run: Run) -> list[dict[str, Any]]:
    """The requests to the policy whose replies are stored."""
    if not run.replies.exists():
        return []
    with sqlite3.connect(run.replies) as store:
        try:
            rows = store.execute("select request from replies where model like '%-transformers%'").fetchall()
        except sqlite3.OperationalError:
            return []
    return [json.loads(text) for (text,) in rows]


def questions(run: Run) -> int:
    """How many requests the servers of this run were sent, the one that each is greeted with left out."""
    log = run.server_log("policy").read_text()
    return log.count("POST /v1/chat/completions") - log.count(" serve ")


def test_pairs_are_made_with_a_served_policy(tmp_path: Path, policy: Path) -> None:
    done = anchored(*command(tmp_path / "run", policy, *JUDGED))
    run = Run(tmp_path / "run")
    assert done.code == 0, done.err
    assert "transformers is ready after" in done.out
    assert processes.all_gone(str(policy), seconds=0)
    rows = [*read_rows(run.pairs), *read_rows(run.held_out), *read_rows(run.refused)]
    assert len(rows) == ROWS
    # two samples of each prompt, which the pocket policy's own generation config would make one
    assert Counter(request["index"] for request in samples(run)) == {0: ROWS, 1: ROWS}
    alike = sum(row.outcome is Outcome.IDENTICAL_SAMPLES for row in rows)
    assert alike < len(rows) / 2
    assert "ignore temperature" not in done.out
    # once more from the store: no server is started
    again = anchored(*command(tmp_path / "run", policy, *JUDGED, "--redo", "create"))
    assert again.code == 0, again.err
    assert "starting transformers" not in again.out


def test_a_kill_leaves_no_server_and_one_that_dies_stops_the_run_which_goes_on(tmp_path: Path, policy: Path) -> None:
    run = Run(tmp_path / "run")
    code = anchored_killed(*command(run.folder, policy), when=lambda: len(samples(run)) >= 3)
    assert code == -signal.SIGKILL
    assert processes.all_gone(str(policy))
    at_the_kill, answered = len(samples(run)), questions(run)
    assert 3 <= at_the_kill < ROWS

    def end_the_server() -> bool:
        if len(samples(run)) < at_the_kill + 3:
            return False
        os.kill(max(processes.having(f"transformers.cli.transformers serve {policy}")), signal.SIGKILL)
        return True

    code = anchored_killed(*command(run.folder, policy), when=end_the_server, by=0)
    assert code == 3
    assert processes.all_gone(str(policy), seconds=0)
    assert at_the_kill + 3 <= len(samples(run)) < ROWS

    done = anchored(*command(run.folder, policy))
    assert done.code == 0, done.err
    assert len(samples(run)) == ROWS
    # one at a time: the one under way at the kill is all that was asked again
    assert questions(run) - answered == ROWS - at_the_kill


def test_a_server_that_cannot_start_is_quoted(tmp_path: Path, policy: Path) -> None:
    done = anchored(*command(tmp_path / "run", policy, "create.sample.serve_options={device: nowhere}"))
    assert done.code == 2, done.err
    assert "transformers ended before it was ready" in done.err
    assert "nowhere" in done.err
    assert "serve-policy.log" in done.err
    assert "Traceback" not in done.err.splitlines()[0]


def test_a_policy_that_runs_elsewhere_is_asked_there(tmp_path: Path, policy: Path) -> None:
    with Teacher() as elsewhere:
        server = (f"create.sample.base_url={elsewhere.base_url}", f"create.sample.model={MODEL}")
        anchored("create", POCKET, *SMALL, *server, f"policy.model={policy}", "--out", tmp_path / "run")
        assert Counter(seen.status for seen in elsewhere.requests) == {200: ROWS}
    refused = read_rows(Run(tmp_path / "run").refused)
    assert refused, "what is right already is not revised"
    assert {row.rejected.model for row in refused} - {""} == {MODEL}


@pytest.mark.slow
def test_every_checkpoint_is_served_for_all_benchmarks(tmp_path: Path, policy: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    lines = (json.dumps({"prompt": f"Add {n} and 5.", "answer": str(n + 5)}) for n in range(3))
    questions.write_text("\n".join(lines))
    settings = (
        "train.epochs=1",
        f"evaluate.benchmarks=[pocket, {questions}]",
        "evaluate.sample.serve=transformers",
        "evaluate.sample.serve_options={device: cpu}",
        "evaluate.sample.max_tokens=100",
        f"policy.model={policy}",
    )
    done = anchored("run", POCKET, *SMALL, *settings, "--until", "evaluate", "--limit", "4", "--out", tmp_path / "run")
    assert done.code == 0, done.err
    run = Run(tmp_path / "run")
    for checkpoint in ("start", "epoch-01"):
        assert run.server_log(checkpoint).read_text().count(" serve ") == 1
        assert len(read_lines(run.answers / "pocket" / f"{checkpoint}.jsonl")) == 4
        assert len(read_lines(run.answers / "questions" / f"{checkpoint}.jsonl")) == 3
    assert processes.all_gone(str(tmp_path), seconds=0)
