"""Data in an object store: read, converted and copied there, against an S3 server on loopback."""

from __future__ import annotations

import gzip
import io
import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs
import pyarrow.parquet
import pytest
from commands import ENVIRONMENT, POCKET, command
from forks import Forks
from object_store import KEY, SECRET, ObjectStore
from pocket_creation import KEY as TEACHERS_KEY
from pocket_creation import KEY_ENV, assert_keyless, make_world, overrides

from anchored import recipe as recipes
from anchored.cards import told
from anchored.create.copying import check_copy, copy_pairs
from anchored.create.settings import CreateSettings
from anchored.datasets_io import each_pair, read_pairs, read_prompts
from anchored.datasets_io.converting import convert
from anchored.datasets_io.places import Address, check_folder, place_of
from anchored.errors import DataError, RecipeError
from anchored.inspect.app import decisions_of
from anchored.inspect.rows import load_rows
from anchored.pipeline import check_creation
from anchored.pocket.teacher import Teacher
from anchored.progress import Silent
from anchored.runs import Run

ROWS = [{"prompt": f"q{n}", "chosen": f"a good answer {n}", "rejected": f"a bad one {n}"} for n in range(1200)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
HOSTILE = f"s3://{KEY}:{SECRET}@data/prompts.jsonl"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    with ObjectStore("data") as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        yield store


def test_files_and_folders_are_read_as_those_of_this_machine(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    convert(tmp_path / "rows.jsonl", tmp_path / "rows.parquet")
    here = read_pairs(tmp_path / "rows.jsonl").pairs
    data = store.buckets["data"]
    data["in/some rows ü.jsonl"] = LINES
    data["in/rows.csv"] = b"prompt,chosen,rejected\n" + b"".join(b"q,good %d,bad\n" % n for n in range(3))
    data["in/rows.parquet"] = (tmp_path / "rows.parquet").read_bytes()
    data["split/train-00000-of-00002.jsonl.gz"] = gzip.compress(LINES)
    data["split/deep/train-00001-of-00002.jsonl"] = LINES[: LINES.index(b"\n") + 1]
    data["split/test-00000-of-00001.jsonl"] = LINES

    assert read_pairs("s3://data/in/some rows ü.jsonl").pairs == here
    assert len(read_pairs("s3://data/in/rows.csv").pairs) == 3
    assert [pair.chosen for pair in each_pair("s3://data/in/rows.parquet")] == [pair.chosen for pair in here]
    assert read_pairs("s3://data/split/").pairs == [here[0], *here]
    assert read_pairs("s3://data/split", split="test").pairs == here
    drawn = read_prompts("s3://data/split", take=5, held_out=2, split="test")
    assert len(list(drawn.prompts)) == 5
    assert len(load_rows("s3://data/in/rows.parquet", None, Silent())) == len(ROWS)
    assert decisions_of("s3://data/in/rows.parquet") == Path("rows.decisions.jsonl")
    assert len(read_pairs(f"file://{tmp_path}/rows.jsonl").pairs) == len(ROWS)


def test_the_address_may_name_the_server(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.buckets["data"]["rows.jsonl"] = LINES
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    address = f"s3://data/rows.jsonl?endpoint_override={store.host}&scheme=http"
    assert len(read_pairs(address).pairs) == len(ROWS)
    assert told(address) == "rows.jsonl"


def test_converted_there_and_back_is_the_same(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    for ending in ("parquet", "jsonl.gz"):
        out = place_of(f"s3://data/out/pairs.{ending}")
        assert convert(tmp_path / "rows.jsonl", out).written == len(ROWS)
        with pytest.raises(DataError, match="exists already"):
            convert(tmp_path / "rows.jsonl", out)
        assert convert(str(out), tmp_path / f"back.{ending}", force=True).written == len(ROWS)
        convert(tmp_path / "rows.jsonl", tmp_path / f"here.{ending}")
        assert (tmp_path / f"back.{ending}").read_bytes() == (tmp_path / f"here.{ending}").read_bytes()
        assert store.buckets["data"][f"out/pairs.{ending}"] == (tmp_path / f"here.{ending}").read_bytes()


def test_what_is_not_there_or_not_allowed_is_said_on_one_line(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(LINES)

    def said(address: str, *, write: bool = False) -> str:
        with pytest.raises(DataError) as raised:
            convert(tmp_path / "rows.jsonl", place_of(address)) if write else read_pairs(address)
        text = str(raised.value)
        assert "\n" not in text
        assert KEY not in text
        assert SECRET not in text
        return text

    assert said("s3://data/none.jsonl").startswith("s3://data/none.jsonl: there is no such file or folder")
    assert said("s3://none/rows.jsonl").startswith("s3://none/rows.jsonl: there is no such file or folder")
    assert "no such bucket" in said("s3://none/rows.jsonl", write=True)
    assert "use s3://" in said("https://example.org/rows.jsonl")
    assert "use s3://" in said(f"https://me:{SECRET}@example.org/rows.jsonl")
    assert "Hadoop" in said("hdfs://localhost/rows.jsonl")
    assert "holds a login" in said(HOSTILE)
    assert "holds a login" in said(HOSTILE, write=True)
    store.buckets["data"]["bad.parquet"] = b"no parquet"
    assert "is not a readable parquet file" in said("s3://data/bad.parquet")
    store.refuses_writes = True
    assert "AWS_ACCESS_KEY_ID" in said("s3://data/out.parquet", write=True)
    assert list(store.buckets["data"]) == ["bad.parquet"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIANOBODYKNOWS0")
    assert "AWS_ACCESS_KEY_ID" in said("s3://data/bad.parquet")


@pytest.mark.slow  # the client tries for six seconds
def test_a_store_that_cannot_be_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(DataError, match=r"s3://data/rows\.jsonl: .*endpoint_override=HOST:PORT"):
        read_pairs("s3://data/rows.jsonl")


@pytest.mark.parametrize(
    "address",
    [
        HOSTILE,
        f"S3://{KEY}@data/x",
        f"s3a://{KEY}:{SECRET}@data/x",
        "gs://me:secret@data/x",
        "hdfs://me:secret@host:8020/x",
        f"s3://data/x?scheme=http&secret_key={SECRET}",
    ],
)
def test_a_login_gets_into_no_recipe_and_no_message(address: str) -> None:
    settings = {"policy": {"model": "pocket"}, "create": {"answers": {"policy": address}}}
    with pytest.raises(RecipeError, match=r"mine: create\.answers\.policy: .*holds a login") as raised:
        recipes.parse(settings, "mine")
    assert not any(part in str(raised.value) for part in (KEY, SECRET, "me:secret"))


@pytest.mark.parametrize("address", ["gs://anonymous@data/x", "hdfs://me@host:8020/x", "abfs://box@mine.dfs.net/x"])
def test_a_name_alone_is_no_login(address: str) -> None:
    recipe = recipes.parse({"policy": {"model": "pocket"}, "create": {"copy_to": address}}, "mine")
    assert recipe.create.copy_to == address


def test_a_system_that_shows_unfinished_files_gets_them_moved(tmp_path: Path) -> None:
    (tmp_path / "new").write_bytes(LINES)
    target = tmp_path / "deep" / "rows.jsonl"
    there = Address("rows.jsonl", "hdfs://host/rows.jsonl", pyarrow.fs.LocalFileSystem(), str(target))
    check_folder(there / "below")
    there.put(tmp_path / "new")
    there.put(tmp_path / "new")
    assert [path.name for path in target.parent.iterdir()] == ["rows.jsonl"]
    assert target.read_bytes() == LINES


def test_a_killed_convert_leaves_nothing_under_the_name(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    store.stalls = True
    arguments = command(("convert", tmp_path / "rows.jsonl", "s3://data/pairs.parquet"))
    environment = {**ENVIRONMENT, **store.environment, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL) as process:
        assert store.stalled.wait(60)
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
    assert store.buckets["data"] == {}


def test_pairs_are_copied_when_all_are_made_and_again_where_that_failed(
    store: ObjectStore, forks: Forks, tmp_path: Path
) -> None:
    world, log, out = make_world(tmp_path), tmp_path / "log", tmp_path / "run"
    run = Run(out)
    store.buckets["data"]["prompts.jsonl"] = world.prompts.read_bytes()
    store.buckets["data"]["answers.jsonl"] = world.answers.read_bytes()
    environment = {**store.environment, KEY_ENV: TEACHERS_KEY}

    def create(*more: str) -> tuple[int, str]:
        before = len(log.read_text()) if log.exists() else 0
        code = forks.start("create", POCKET, *settings, *more, "--out", out, log=log, env=environment).wait()
        return code, " ".join(log.read_text()[before:].split())

    with Teacher(api_key=TEACHERS_KEY) as teacher:
        settings = [
            *overrides(world, "stronger-preferred", teacher.base_url),
            "create.prompts.data=s3://data/prompts.jsonl",
            "create.answers.policy=s3://data/answers.jsonl",
        ]
        to = "create.copy_to=s3://data/mine"
        store.refuses_writes = True
        code, said = create(to)
        assert code == 3, said
        assert "the same command copies them" in said
        asked, pairs = len(teacher.requests), read_pairs(out).pairs
        assert store.buckets["data"].keys() == {"prompts.jsonl", "answers.jsonl"}
        store.refuses_writes = False
        code, said = create(to)
        assert code == 0, said
        assert read_pairs("s3://data/mine").pairs == pairs
        for file in (run.pairs, run.held_out, run.refused):
            assert store.buckets["data"][f"mine/{file.name}"] == file.read_bytes()
        writes = store.writes
        copy_pairs(run, "s3://data/mine", Silent())
        assert store.writes == writes, "nothing is copied twice"
        assert create(to, "--redo", "create")[0] == 0
        assert store.writes == writes + 3, "pairs made anew are copied anew"
        assert len(teacher.requests) == asked
    copy_pairs(run, str(tmp_path / "copies"), Silent())
    assert read_pairs(tmp_path / "copies").pairs == pairs
    assert_keyless(out, (KEY, SECRET, TEACHERS_KEY))
    assert not any(secret in log.read_text() for secret in (KEY, SECRET))


def test_where_nothing_can_be_copied_nothing_is_asked(store: ObjectStore, tmp_path: Path) -> None:
    store.buckets["data"]["mine/pairs.parquet"] = b"somebody's"
    with pytest.raises(DataError, match=r"s3://data/mine/pairs\.parquet: .*not of this run"):
        check_copy(Run(tmp_path), "s3://data/mine")
    recipe = recipes.parse({"policy": {"model": "pocket"}, "create": {"copy_to": "s3://none/mine"}}, "mine")
    with pytest.raises(DataError, match="s3://none/mine: there is no such bucket"):
        check_creation(recipe)


def test_run_folders_stay_here(forks: Forks, tmp_path: Path) -> None:
    log = tmp_path / "log"
    for start in (("create", POCKET), ("run", POCKET), ("plan", POCKET), ("demo",)):
        assert forks.start(*start, "--out", HOSTILE, log=log).wait() == 2
    said = " ".join(log.read_text().split())
    assert said.count("create.copy_to copies the finished pairs to an address") == 4
    assert SECRET not in said
    assert "copy_to" in CreateSettings.how_only


def test_row_groups_come_one_by_one(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(LINES * 5)
    convert(tmp_path / "rows.jsonl", place_of("s3://data/pairs.parquet"))
    whole = store.buckets["data"]["pairs.parquet"]
    assert pyarrow.parquet.ParquetFile(io.BytesIO(whole)).num_row_groups == 6
    rows = each_pair("s3://data/pairs.parquet")
    assert next(rows).chosen.text == "a good answer 0"
    assert store.sent < len(whole) / 2, "the end of the file, and the first of six groups"
    assert sum(1 for _ in rows) == 6 * 1000 - 1
