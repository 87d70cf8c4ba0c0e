"""`create.engine: ray`: the same pairs as in one process, whatever becomes of the nodes."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from commands import ENVIRONMENT, POCKET, ROOT, anchored, command
from forks import Forks
from object_store import ObjectStore
from pocket_creation import (
    IN_FLIGHT,
    KEY,
    KEY_ENV,
    LASTING,
    PASSING,
    World,
    assert_keyless,
    came_whole,
    faults,
    kept,
    ledger,
    made,
    make_world,
    overrides,
    undisturbed,
    usd,
)
from processes import all_gone
from pydantic import ValidationError
from ray_nodes import below, nodes
from small_disk import small_disk

from anchored import recipe as recipes
from anchored.create import desk
from anchored.create.ray_hub import node_store_path
from anchored.create.settings import CreateSettings, RaySettings
from anchored.errors import RecipeError
from anchored.pipeline import Batching, Plan, execute
from anchored.pocket.teacher import Faults, Teacher
from anchored.progress import Silent
from anchored.runs import Run

ON_RAY = ("create.engine=ray", "create.ray.rows_per_block=2")
KEYED = {KEY_ENV: KEY}


def summary_of(run: Run) -> dict[str, object]:
    """What the stage says of itself, without how long it took; money is summed up in the order in which it went."""
    text = (run.folder / "stages" / "create.json").read_text()
    summary = json.loads(text, parse_float=lambda number: round(float(number), 9))
    return {name: value for name, value in summary.items() if name != "seconds"}


def started(log: Path, *arguments: object) -> subprocess.Popen[bytes]:
    """`anchored create` in a process and a group of its own."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command(("create", POCKET, *arguments)),
            env={**ENVIRONMENT, **KEYED},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def until(holds: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait as long as the process lives."""
    while not holds():
        assert process.poll() is None, log.read_text()
        time.sleep(0.002)


def whole(folder: Path, world: World, method: str, content: Faults | None = None, *more: str) -> Run:
    """The run in one process that others are compared with."""
    with Teacher(content, api_key=KEY) as teacher:
        done = anchored(
            "create", POCKET, *overrides(world, method, teacher.base_url), *more, "--out", folder, env=KEYED
        )
    assert done.code == 0, done.err
    return Run(folder)


def on_ray(folder: Path, settings: Sequence[object], expected: int = 0) -> str:
    """The same on Ray; what it printed."""
    done = anchored("create", POCKET, *settings, *ON_RAY, "--out", folder, env=KEYED)
    assert done.code == expected, done.out + done.err
    return done.out + done.err


def written(store: Path) -> dict[str, str]:
    """When each reply was written, by its key."""
    with closing(sqlite3.connect(store)) as opened:
        return dict(opened.execute("select key, created from replies"))


@pytest.fixture(autouse=True)
def _clean_node(tmp_path: Path) -> Iterator[None]:
    """What killed runs leave on this machine, which no command comes back for."""
    yield
    for name in ("run", "ray"):
        path = node_store_path(str(tmp_path / name))
        for file in path.parent.glob(f"{path.name}*"):
            file.unlink()


@pytest.mark.slow
def test_ray_makes_the_pairs_that_one_process_makes(
    forks: Forks, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_ENV, KEY)
    alone = undisturbed(forks, tmp_path / "alone", world, "clair", faults(*LASTING)).run
    with ObjectStore("data") as store, Teacher(faults("rate_limited", *LASTING), api_key=KEY) as teacher:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        objects = store.buckets["data"]
        objects |= {path.name: path.read_bytes() for path in (world.prompts, world.answers)}
        settings = [*overrides(world, "clair", teacher.base_url), *ON_RAY, "create.ray.workers=1"]
        settings += [f"create.prompts.data=s3://data/{world.prompts.name}", "create.copy_to=s3://data/mine"]
        recipe = recipes.load(POCKET, [*settings, f"create.answers.policy=s3://data/{world.answers.name}"])
        run = execute(Plan(recipe, tmp_path / "ray", ("create",)), Silent())
        requests = teacher.requests
    assert made(run) == made(alone) == {name: objects[f"mine/{name}"] for name in made(alone)}
    assert {seen.fault for seen in requests} >= {"rate_limited", *LASTING}
    assert max(Counter(seen.content for seen in came_whole(requests)).values()) == 1
    assert ledger(run) == {"usage": pytest.approx(usd(came_whole(requests)))}
    assert summary_of(run) == summary_of(alone)
    assert_keyless(tmp_path)
    assert_keyless(Path("/tmp/ray/session_latest").resolve())  # what Ray writes down
    assert all_gone(str(tmp_path))


def test_without_ray_there_is_one_line_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r'create.engine is ray, .* pip install "anchored\[ray\]"'):
        desk.check_settings(CreateSettings.model_validate({"engine": "ray"}))


def test_the_page_about_clusters_has_a_recipe_and_every_setting() -> None:
    text = (ROOT / "docs" / "cluster.md").read_text("utf-8")
    (shown,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    recipe = recipes.parse(yaml.safe_load(shown), "docs/cluster.md")
    assert recipe.create.engine == "ray"
    assert [name for name in RaySettings.model_fields if f"`{name}`" not in text] == []


@pytest.mark.parametrize("address", ["ray://head:10001", "http://head:8265"])
def test_an_address_from_outside_of_the_cluster_is_refused(address: str) -> None:
    with pytest.raises(ValidationError, match="ray job submit"):
        RaySettings(address=address)


def test_batches_are_not_for_ray(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_ENV, KEY)
    recipe = recipes.load(POCKET, [*overrides(world, "clair", "http://127.0.0.1:1/v1"), *ON_RAY])
    with pytest.raises(RecipeError, match=r"ray asks request by request; set create\.engine=local"):
        execute(Plan(recipe, tmp_path, ("create",), batching=Batching("submit")), Silent())


@pytest.mark.slow
def test_a_row_that_ends_every_worker_stops_the_stage_cleanly(world: World, tmp_path: Path) -> None:
    (tmp_path / "own_filters.py").write_text("import os\n\n\ndef deadly(pair):\n    os._exit(1)\n")
    with Teacher(api_key=KEY) as teacher:
        settings = [*overrides(world, "clair", teacher.base_url), *ON_RAY, 'create.filters=["own_filters:deadly"]']
        arguments = ("create", POCKET, *settings, "--out", tmp_path / "run")
        done = anchored(*arguments, env={**KEYED, "PYTHONPATH": f"{ROOT}:{tmp_path}"})
        asked = Counter(seen.content for seen in teacher.requests)
    assert done.code == 3, done.out + done.err
    assert "the same command goes on" in done.err
    assert "Traceback" not in done.out + done.err
    assert max(asked.values()) <= 2, "only what was in flight when a worker ended is asked again"


@pytest.mark.slow
def test_a_node_killed_midway_costs_what_it_had_in_flight_and_no_pair(tmp_path: Path) -> None:
    world = make_world(tmp_path, rows=84)
    alone = whole(tmp_path / "alone", world, "stronger-preferred")
    log = tmp_path / "log"
    with nodes(2) as (cluster, (first, _)), Teacher(Faults(slow=1, slow_seconds=0.5), api_key=KEY) as teacher:
        settings = [*overrides(world, "stronger-preferred", teacher.base_url), *ON_RAY]
        at = f"create.ray.address={cluster.address}"
        process = started(log, *settings, at, "--out", tmp_path / "run")
        until(lambda: len(teacher.requests) >= 25, process, log)
        cluster.kill(first)
        assert process.wait(120) == 0, log.read_text()
        requests = teacher.requests
    run = Run(tmp_path / "run")
    assert made(run) == made(alone)
    assert "is gone" in log.read_text()
    asked = Counter(seen.content for seen in requests)
    again = sum(asked.values()) - len(asked)
    assert again <= IN_FLIGHT
    assert set(kept(run).values()) == {1}
    once = {seen.content: seen for seen in requests}.values()
    said = ledger(run)
    assert usd(once) - 1e-9 <= said["usage"] <= usd(requests) + 1e-9
    assert usd(requests) - 1e-9 <= sum(said.values()), "what was in flight may have been billed, and is counted"
    assert_keyless(tmp_path)
    assert_keyless(Path("/tmp/ray/session_latest").resolve())


@pytest.mark.slow
def test_what_a_full_disk_did_not_take_is_on_the_node_and_not_asked_again(world: World, tmp_path: Path) -> None:
    alone = whole(tmp_path / "alone", world, "stronger-preferred")
    run = Run(tmp_path / "run")
    node = node_store_path(str(run.folder))
    with small_disk(run.folder) as resize, Teacher(api_key=KEY) as teacher:
        settings = [*overrides(world, "stronger-preferred", teacher.base_url), "create.ray.workers=1"]
        resize(160)
        assert "the disk takes no more" in on_ray(run.folder, settings, expected=2)
        left = written(node)
        assert left.keys() - written(run.replies).keys()
        resize(4096)
        on_ray(run.folder, settings)
        assert left.items() <= written(run.replies).items(), "none of these was asked again"
        assert made(run) == made(alone)
    assert not node.exists()


@pytest.mark.slow
def test_each_node_serves_the_policy_and_a_worker_killed_alone_is_replaced_there(tmp_path: Path) -> None:
    log, run = tmp_path / "log", Run(tmp_path / "run")
    with nodes(2) as (cluster, (first, _)), Teacher(api_key=KEY) as teacher:
        settings = (
            *ON_RAY,
            f"create.ray.address={cluster.address}",
            "create.prompts={data: pocket, take: 80, held_out: 4}",
            "create.sample={serve: transformers, serve_options: {device: cpu}}",
            f"create.reviser={{model: pocket-teacher, base_url: '{teacher.base_url}', key_env: {KEY_ENV}}}",
            "create.reviser.serve=null",
        )
        process = started(log, *settings, "--out", run.folder)
        until(lambda: log.read_text().count("is ready after") == 2 and len(teacher.requests) >= 8, process, log)
        raylet = first.all_processes["raylet"][0].process.pid
        (worker,) = [pid for pid in below(raylet) if "ray::MapWorker(MapBatches(RowMaker))" in _name(pid)]
        serving = below(worker)
        assert any("transformers" in _name(pid) for pid in serving)
        os.kill(worker, signal.SIGKILL)
        assert process.wait(200) == 0, log.read_text()
        asked = Counter(seen.content for seen in teacher.requests)
    assert not any(_lives(pid) for pid in serving)
    assert all_gone(str(run.folder))
    assert len(list(run.folder.glob("serve-policy-worker-*.log"))) >= 2
    summary = run.summary("create")
    assert summary
    assert sum(summary["outcomes"].values()) == 80
    assert sum(summary["held_out_outcomes"].values()) == 4
    assert set(kept(run).values()) == {1}
    assert sum(asked.values()) - len(asked) <= 64  # the endpoint's concurrency


@pytest.mark.slow
def test_without_a_node_left_it_stops_cleanly_and_goes_on_when_run_again(tmp_path: Path) -> None:
    world = make_world(tmp_path, rows=64)
    alone = whole(tmp_path / "alone", world, "clair")
    log = tmp_path / "log"
    with nodes(1) as (cluster, (only,)), Teacher(Faults(slow=1, slow_seconds=0.3), api_key=KEY) as teacher:
        settings = [*overrides(world, "clair", teacher.base_url), *ON_RAY, f"create.ray.address={cluster.address}"]
        process = started(log, *settings, "create.ray.wait_seconds=25", "--out", tmp_path / "run")
        until(lambda: len(teacher.requests) >= 15, process, log)
        cluster.kill(only)
        assert process.wait(120) == 3, log.read_text()
        assert "the same command goes on" in log.read_text()
        assert "Traceback" not in log.read_text()
        stored = set(kept(Run(tmp_path / "run")))
        mark = len(teacher.requests)
        assert mark - len(stored) <= IN_FLIGHT
        cluster.add()
        done = anchored("create", POCKET, *settings, "--out", tmp_path / "run", env=KEYED)
        assert done.code == 0, done.err
        assert not stored & {seen.content[:24] for seen in teacher.requests[mark:]}
    assert made(Run(tmp_path / "run")) == made(alone)


@pytest.mark.slow
def test_a_node_that_joins_takes_part(tmp_path: Path) -> None:
    world = make_world(tmp_path, rows=84)
    log = tmp_path / "log"
    with nodes(1) as (cluster, (first,)), Teacher(Faults(slow=1, slow_seconds=0.5), api_key=KEY) as teacher:
        settings = [*overrides(world, "clair", teacher.base_url), *ON_RAY, f"create.ray.address={cluster.address}"]
        process = started(log, *settings, "create.pilot=0", "--out", tmp_path / "run")
        until(lambda: len(teacher.requests) >= 9, process, log)
        joined = cluster.add()
        raylet = joined.all_processes["raylet"][0].process.pid
        until(lambda: any("RowMaker" in _name(pid) for pid in below(raylet)), process, log)
        cluster.kill(first)  # the other must do all that is left
        assert process.wait(120) == 0, log.read_text()
    assert summary_of(Run(tmp_path / "run"))["method"] == "clair"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["clair", "judge-off-policy"])
def test_a_target_over_two_workers_ends_where_it_ends_in_one_process(world: World, tmp_path: Path, method: str) -> None:
    more = ("create.target=16",)
    alone = whole(tmp_path / "alone", world, method, None, *more)
    with Teacher(faults(*PASSING), api_key=KEY) as teacher:
        settings = [*overrides(world, method, teacher.base_url), *more, "create.ray.workers=2", "create.ray.cpus=0.5"]
        on_ray(tmp_path / "ray", settings)
    assert made(Run(tmp_path / "ray")) == made(alone)


@pytest.mark.slow
def test_a_budget_is_never_exceeded_by_two_workers_and_a_higher_one_completes_the_run(
    world: World, tmp_path: Path
) -> None:
    alone = whole(tmp_path / "alone", world, "stronger-preferred")
    cost = sum(ledger(alone).values())
    worst = (300 * 10 + 2000 * 2) / 1e6
    with Teacher(faults("slow"), api_key=KEY) as teacher:
        settings = [
            *overrides(world, "stronger-preferred", teacher.base_url, max_tokens=300),
            "create.ray={workers: 2, cpus: 0.5}",
        ]
        said = on_ray(tmp_path / "ray", [*settings, f"create.budget_usd={cost / 2 + worst}"], expected=3)
        assert "raise create.budget_usd" in said
        assert "Traceback" not in said
        spent = usd(came_whole(teacher.requests))
        assert cost / 4 < spent <= cost / 2 + worst
        on_ray(tmp_path / "ray", [*settings, "create.budget_usd=100"])
    run = Run(tmp_path / "ray")
    assert made(run) == made(alone)
    assert ledger(run)["usage"] == pytest.approx(cost)


@pytest.mark.slow
def test_errors_of_workers_are_those_of_one_process(world: World, tmp_path: Path) -> None:
    with Teacher(api_key="sk-another-key-altogether") as teacher:
        settings = overrides(world, "clair", teacher.base_url)
        alone = anchored("create", POCKET, *settings, "--out", tmp_path / "alone", env=KEYED)
        said = on_ray(tmp_path / "ray", settings, expected=alone.code)
    assert alone.err.strip()
    assert said.strip().endswith(alone.err.strip())
    assert "Traceback" not in said
    assert_keyless(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_however_the_command_ends_nothing_is_left_running(tmp_path: Path, number: int) -> None:
    world = make_world(tmp_path, rows=84)
    log = tmp_path / "log"
    with Teacher(Faults(slow=1, slow_seconds=0.5), api_key=KEY) as teacher:
        settings = [*overrides(world, "clair", teacher.base_url), *ON_RAY]
        process = started(log, *settings, "--out", tmp_path / "run")
        until(lambda: len(teacher.requests) >= 10, process, log)
        doomed = [process.pid, *below(process.pid)]
        process.send_signal(number)
        assert process.wait(60) == (-number if number == signal.SIGKILL else 3), log.read_text()
        ends = time.monotonic() + 60
        # after SIGKILL, two agents of Ray's look for their raylet for a minute before they go
        while left := [name for pid in doomed if _lives(pid) and "Agent" not in (name := _name(pid))]:
            assert time.monotonic() < ends, left
            time.sleep(0.05)
        stored = set(kept(Run(tmp_path / "run")))
        mark = len(teacher.requests)
        assert mark - len(stored) <= IN_FLIGHT
        on_ray(tmp_path / "run", settings)
        assert not stored & {seen.content[:24] for seen in teacher.requests[mark:]}
    assert "Traceback" not in log.read_text()


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""
