"""The real `create` command by batches: killed anywhere it submits nothing twice, and its pairs are a live run's."""

from __future__ import annotations

import asyncio
import io
import json
import re
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from batch_server import Answer, BatchServer, Fate, Made
from commands import ENVIRONMENT, POCKET, STUCK_SECONDS, Finished, anchored_killed, command
from fault_server import Act, completion, fails, hangs

from anchored import cli
from anchored.pocket.teacher import Teacher
from anchored.runs import Run

SECRET = "sk-a-key-that-must-not-be-seen"
ROWS = 14
PAIRS = ("pairs.parquet", "held_out.parquet", "refused.parquet")


def anchored_here(*arguments: object) -> Finished:
    """The same as `anchored`, in this process, which has loaded everything already."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["anchored", *map(str, arguments)])
        code = cli._exit_code()
    return Finished(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def answer() -> Iterator[Answer]:
    """The pocket teacher's answers."""
    with Teacher() as teacher:

        def ask(body: dict[str, Any]) -> dict[str, Any]:
            request = urllib.request.Request(
                f"{teacher.base_url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request) as response:
                return json.loads(response.read())

        yield ask


@pytest.fixture
def server(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> Iterator[BatchServer]:
    monkeypatch.setenv("ANCHORED_TEST_KEY", SECRET)
    monkeypatch.setitem(ENVIRONMENT, "ANCHORED_TEST_KEY", SECRET)
    with BatchServer(answer) as server:
        yield server


def arguments(server: BatchServer, folder: Path, *more: str) -> list[object]:
    settings = (
        f"create.prompts.take={ROWS - 2}",
        "create.prompts.held_out=2",
        "create.reviser.serve=null",
        f"create.reviser.base_url={server.base_url}",
        "create.reviser.key_env=ANCHORED_TEST_KEY",
        "create.batch={linger_seconds: 0.5, poll_seconds: 0.1}",
    )
    return ["create", POCKET, "--out", folder, *settings, *more]


@pytest.fixture(scope="module")
def live(answer: Answer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live")
    with BatchServer(answer) as server:
        done = anchored_here(*arguments(server, folder))
    assert done.code == 0, done.err
    assert len(server.live) == ROWS
    return folder


@pytest.fixture
def sampled(live: Path, tmp_path: Path) -> Path:
    """A run folder with the policy's samples and none of the teacher's replies."""
    folder = tmp_path / "run"
    folder.mkdir()
    with sqlite3.connect(live / "replies.sqlite") as source, sqlite3.connect(folder / "replies.sqlite") as copy:
        source.backup(copy)
        copy.execute("delete from replies where model like 'pocket-teacher%'")
    return folder


def assert_the_same(folder: Path, live: Path) -> None:
    for name in PAIRS:
        assert (folder / name).read_bytes() == (live / name).read_bytes(), name
    for path in folder.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_by_batch_the_pairs_are_those_of_a_live_run(server: BatchServer, live: Path, tmp_path: Path) -> None:
    done = anchored_here(*arguments(server, tmp_path / "run", "--batch"))
    assert done.code == 0, done.err
    assert f"batch-0001: {ROWS} requests go to pocket-teacher at {server.base_url}" in done.out
    assert f"batch-0001: {ROWS} requests are under way as batch_" in done.out
    assert [len(batch.rows) for batch in server.batches] == [ROWS]
    assert not server.live
    assert_the_same(tmp_path / "run", live)


def upload_hangs(server: BatchServer) -> tuple[str, list[Act], dict[str, list[Act]]]:
    return "upload", [hangs()], server.hiccups


def reply_to_making_hangs(server: BatchServer) -> tuple[str, list[Act], dict[str, list[Act]]]:
    return "make", [hangs()], server.lost


def making_hangs(server: BatchServer) -> tuple[str, list[Act], dict[str, list[Act]]]:
    return "make", [hangs()], server.hiccups


def look_hangs(server: BatchServer) -> tuple[str, list[Act], dict[str, list[Act]]]:
    return "look", [hangs()], server.hiccups


def content_hangs_half_way(server: BatchServer) -> tuple[str, list[Act], dict[str, list[Act]]]:
    async def half(request: web.Request) -> web.StreamResponse:
        body = server.files[request.match_info["id"]]
        response = web.StreamResponse(headers={"Content-Length": str(len(body))})
        await response.prepare(request)
        await response.write(body[: len(body) // 2])
        return await hangs()(request)

    return "content", [half], server.hiccups


@pytest.mark.parametrize(
    "stuck",
    [
        reply_to_making_hangs,
        *(
            pytest.param(stuck, marks=pytest.mark.slow)
            for stuck in (upload_hangs, making_hangs, look_hangs, content_hangs_half_way)
        ),
    ],
)
def test_killed_anywhere_it_submits_nothing_twice(
    server: BatchServer,
    live: Path,
    sampled: Path,
    stuck: Callable[[BatchServer], tuple[str, list[Act], dict[str, list[Act]]]],
) -> None:
    route, acts, where = stuck(server)
    where[route] = acts

    code = anchored_killed(*arguments(server, sampled, "--batch"), when=lambda: server.calls[route] > 0)
    assert code == -signal.SIGKILL
    assert not (sampled / "pairs.parquet").exists()
    done = anchored_here(*arguments(server, sampled, "--batch"))
    assert done.code == 0, done.err
    assert server.submitted == Counter(dict.fromkeys(server.submitted, 1))
    assert len(server.submitted) == ROWS
    assert not server.live
    assert_the_same(sampled, live)


@pytest.mark.slow
def test_interrupted_it_says_what_goes_on_and_a_live_run_takes_it_over(
    server: BatchServer, live: Path, sampled: Path
) -> None:
    server.fates = [Fate("expired", answered=9, looks=10**6)]
    with subprocess.Popen(
        command(arguments(server, sampled, "--batch")),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while process.poll() is None and server.calls["look"] < 3:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=STUCK_SECONDS)
    assert process.returncode == 3
    assert f"1 batch goes on at pocket-teacher at {server.base_url} ({ROWS} requests); the same command collects" in out
    assert "interrupted; the same command goes on from here" in err

    ended = anchored_here(*arguments(server, sampled, "--cancel-batches"))
    assert (ended.code, server.batches[0].cancelled) == (0, True)
    assert "cancelling" in ended.out
    done = anchored_here(*arguments(server, sampled))
    assert done.code == 0, done.err
    assert len(server.live) == ROWS - 9
    assert len(server.batches) == 1
    assert_the_same(sampled, live)


def test_exported_run_elsewhere_and_imported_the_pairs_are_the_same(
    server: BatchServer, live: Path, tmp_path: Path, answer: Answer
) -> None:
    folder = tmp_path / "a run"
    stopped = anchored_here(*arguments(server, folder, "--batch-export"))
    exported = folder / "batches" / "export-0001.jsonl"
    assert stopped.code == 3
    assert f"{ROWS} requests are in {exported}; run them, as with `vllm run-batch -i '{exported}' -o '" in stopped.err
    assert not (folder / "pairs.parquet").exists()
    results = tmp_path / "OUT.jsonl"
    with open(exported) as lines, open(results, "w") as out:
        for line in map(json.loads, lines):
            response = {"status_code": 200, "request_id": "vllm-1", "body": answer(line["body"])}
            out.write(json.dumps({"id": "vllm-1", "custom_id": line["custom_id"], "response": response}) + "\n")
    done = anchored_here(*arguments(server, folder, "--batch-import", str(results)))
    assert done.code == 0, done.err
    assert f"{results}: {ROWS} replies" in done.out.replace("\n", " ")
    assert not server.calls
    assert_the_same(folder, live)


def says(body: dict[str, Any]) -> dict[str, Any]:
    """Each model answers in its own words, and prefers as a judge the first answer that it is shown."""
    asked = body["messages"][-1]["content"]
    answer = f"{body['model']} says that it depends on the question, which has {len(asked)}"
    return completion("Rationale: it is clearer.\n[1]" if "[1]" in asked else answer)


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> Iterator[BatchServer]:
    monkeypatch.setenv("ANCHORED_TEST_KEY", SECRET)
    monkeypatch.setitem(ENVIRONMENT, "ANCHORED_TEST_KEY", SECRET)
    with BatchServer(says) as server:
        yield server


def off_policy(server: BatchServer, folder: Path, *more: str) -> list[object]:
    """Two candidates and a judge, three models at one endpoint."""
    at = f"base_url: '{server.base_url}', key_env: ANCHORED_TEST_KEY, price: {{input: 2, output: 10}}"
    settings = (
        "create.method=judge-off-policy",
        "create.prompts.take=6",
        "create.prompts.held_out=2",
        "create.reviser.serve=null",
        f"create.candidates=[{{model: ada, {at}}}, {{model: bob, {at}}}]",
        f"create.judge={{model: judge, {at}}}",
        "create.budget_usd=100",
        "create.pilot=2",
        "create.batch={linger_seconds: 0.5, poll_seconds: 0.1}",
    )
    return ["create", POCKET, "--out", folder, *settings, *more]


def refuses_once_both_are_followed(server: BatchServer) -> Act:
    async def act(request: web.Request) -> web.StreamResponse:
        while server.calls["look"] < 2:
            await asyncio.sleep(0.01)
        return await fails(401)(request)

    return act


def models_of(batches: list[Made]) -> list[tuple[str, int]]:
    return [(batch.rows[0]["body"]["model"], len(batch.rows)) for batch in batches]


def test_several_models_each_have_their_own_batches(several: BatchServer, tmp_path: Path) -> None:
    done = anchored_here(*off_policy(several, tmp_path / "live"))
    assert done.code == 0, done.err
    assert len(several.live) == 24
    several.live.clear()
    several.hiccups["look"] = [refuses_once_both_are_followed(several)]
    stopped = anchored_here(*off_policy(several, tmp_path / "run", "--batch"))
    assert stopped.code == 2, stopped.err
    done = anchored_here(*off_policy(several, tmp_path / "run", "--batch"))
    assert done.code == 0, done.err
    # the held-out rows and those of the pilot have no round of their own
    assert sorted(models_of(several.batches)) == [("ada", 8), ("bob", 8), ("judge", 8)]
    assert several.submitted == Counter(dict.fromkeys(several.submitted, 1))
    assert not several.live
    assert_the_same(tmp_path / "run", tmp_path / "live")


def test_one_model_in_two_ways_has_no_batches_but_reads_those_that_are_there(
    several: BatchServer, tmp_path: Path
) -> None:
    done = anchored_here(*off_policy(several, tmp_path, "--batch"))
    assert done.code == 0, done.err
    at = f"base_url: '{several.base_url}', key_env: ANCHORED_TEST_KEY, price: {{input: 2, output: 10}}"
    two_ways = (f"create.judge={{model: bob, {at}, concurrency: 3}}", "--redo", "create")
    refused = anchored_here(*off_policy(several, tmp_path, *two_ways, "--batch"))
    assert refused.code == 2
    assert "by batch, teacher and candidate 2 ask the same model bob in two ways" in refused.err.replace("\n", " ")
    states = sorted((tmp_path / "batches").glob("batch-*.json"))
    for path in states:  # as where the process was killed before the stage was complete
        path.write_text(path.read_text().replace('"used": true', '"used": false'))
    live = anchored_here(*off_policy(several, tmp_path, *two_ways))
    assert live.code == 0, live.err
    assert all(json.loads(path.read_text())["used"] for path in states)
    assert Counter(body["model"] for body in several.live) == {"bob": 8}


def test_a_batch_that_no_model_of_the_recipe_has_is_told_of(several: BatchServer, tmp_path: Path) -> None:
    several.hiccups["look"] = [refuses_once_both_are_followed(several)]
    stopped = anchored_here(*off_policy(several, tmp_path, "--batch"))
    assert stopped.code == 2
    assert "refused the key in ANCHORED_TEST_KEY" in stopped.err
    ending = f"`anchored create RECIPE --out {tmp_path} --cancel-batches`"
    assert re.search(rf"the same command collects (it|them), and {ending} ends", stopped.out.replace("\n", " "))
    other = [str(word).replace("model: ada", "model: cyd") for word in off_policy(several, tmp_path)]
    # its money is not there for others, for it may be spent
    usd = max(json.loads(path.read_text())["usd"] for path in (tmp_path / "batches").glob("batch-*.json"))
    short = anchored_here(*other, "--redo", "create", f"create.budget_usd={usd}")
    assert short.code == 3
    assert "USD are set aside for batches of models that the recipe does not ask now" in short.err.replace("\n", " ")
    done = anchored_here(*other)
    assert done.code == 0, done.err
    told = done.out.replace("\n", " ")
    assert re.search(rf"batch-000\d: it is under way at {several.base_url} and the recipe asks no ada now", told)
    # bob's was collected, though live
    assert Counter(body["model"] for body in several.live) == {"cyd": 8, "judge": 8}
    ended = anchored_here(*off_policy(several, tmp_path, "--cancel-batches"))
    assert re.search(r"batch-000\d \(\w+, 8 requests\): (completed|cancelling|no batch was made of it)", ended.out)


def test_all_stages_may_go_by_batch(several: BatchServer, tmp_path: Path) -> None:
    _, *more = off_policy(several, tmp_path)
    done = anchored_here("run", *more, "--until", "create", "--batch")
    assert done.code == 0, done.err
    assert not several.live


@pytest.mark.slow
def test_batches_of_several_models_are_cancelled_together(several: BatchServer, tmp_path: Path) -> None:
    several.fates = [Fate("cancelled", answered=3, looks=10**6) for _ in range(2)]
    code = anchored_killed(*off_policy(several, tmp_path, "--batch"), when=lambda: several.calls["look"] > 3)
    assert code == -signal.SIGKILL
    ended = anchored_here(*off_policy(several, tmp_path, "--cancel-batches"))
    assert (ended.code, ended.out.count("cancelling")) == (0, 2), ended.out + ended.err
    assert all(batch.cancelled for batch in several.batches)


def test_what_several_models_are_asked_is_exported_together(several: BatchServer, tmp_path: Path) -> None:
    folder, results = tmp_path / "run", tmp_path / "OUT.jsonl"
    more: tuple[str, ...] = ()
    for expected in ({"ada": 8, "bob": 8}, {"judge": 8}):
        stopped = anchored_here(*off_policy(several, folder, "--batch-export", *more))
        assert stopped.code == 3, stopped.err
        exports = sorted((folder / "batches").glob("export-*.jsonl"))
        lines = [json.loads(line) for path in exports for line in path.read_text().splitlines()]
        assert Counter(line["body"]["model"] for line in lines) == expected
        with open(results, "a") as out:
            for line in lines:
                response = {"status_code": 200, "body": says(line["body"])}
                out.write(json.dumps({"custom_id": line["custom_id"], "response": response}) + "\n")
        more = ("--batch-import", str(results))
    done = anchored_here(*off_policy(several, folder, *more))
    assert done.code == 0, done.err
    assert "24 replies" in done.out.replace("\n", " ")
    assert not several.calls


def test_teachers_that_have_no_batches_are_named(tmp_path: Path) -> None:
    done = anchored_here("create", POCKET, "--out", tmp_path / "run", "--batch")
    assert done.code == 2
    assert "teacher (serve: pocket) answers from this machine; leave --batch" in done.err.replace("\n", " ")


def test_batches_are_not_cancelled_in_a_wrong_folder_or_beside_who_follows_them(
    server: BatchServer, tmp_path: Path
) -> None:
    elsewhere = anchored_here(*arguments(server, tmp_path / "misspelt", "--cancel-batches"))
    assert elsewhere.code == 2
    assert f"{tmp_path / 'misspelt' / 'batches'}: there is no such folder" in elsewhere.err.replace("\n", " ")
    assert not (tmp_path / "misspelt").exists()
    run = Run(tmp_path / "run")
    run.batches.mkdir(parents=True)
    with run.lock():
        beside = anchored_here(*arguments(server, run.folder, "--cancel-batches"))
    assert beside.code == 2
    assert "another process is working in this run folder; interrupt it first" in beside.err.replace("\n", " ")
    none = anchored_here(*arguments(server, run.folder, "--cancel-batches"))
    assert (none.code, "no batch is under way" in none.out) == (0, True)


def test_options_that_exclude_one_another_are_named(server: BatchServer, tmp_path: Path) -> None:
    for more, words in (
        (("--batch", "--batch-export"), "choose one of --batch, --batch-export and --cancel-batches"),
        (("--batch-import", str(tmp_path / "none.jsonl")), "none.jsonl: there is no such file"),
    ):
        done: Finished = anchored_here(*arguments(server, tmp_path / "run", *more))
        assert done.code == 2
        assert words in done.err
