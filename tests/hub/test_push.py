"""`anchored convert --push-to-hub` against a server that speaks the Hub's API: what arrives and what is refused."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from commands import Finished, anchored
from hub_server import TOKEN, Hub, Stored

from anchored.datasets_io import read_pairs, write_pairs
from anchored.records import Answer, Pair, user_prompt

PAIRS = [Pair(user_prompt(f"Why {n}?"), Answer("Because.", "gpt"), Answer("Hm.", "llama"), "clair") for n in range(5)]
FILE = "data/train-00000-of-00001.parquet"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as running:
        yield running


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "in.jsonl", PAIRS)
    return tmp_path / "in.jsonl"


def push(
    hub_url: str, source: Path, *arguments: object, token: str | None = TOKEN, out: str = "out.parquet"
) -> Finished:
    environment = {
        "HF_ENDPOINT": hub_url,
        "HF_TOKEN": token or "",
        "HF_HOME": str(source.parent / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    arguments = (source, source.with_name(out), "--push-to-hub", "lab/pairs", *arguments)
    return anchored("convert", *arguments, env=environment)


def assert_refused(done: Finished, *says: str) -> None:
    assert done.code == 2, (done.out, done.err)
    assert done.err.count("\n") == 1, done.err
    for part in says:
        assert part in done.err
    assert TOKEN not in done.out + done.err


def test_the_rows_and_their_card_arrive_in_a_private_repository(hub: Hub, source: Path) -> None:
    done = push(hub.url, source, "--license", "cc-by-4.0")
    assert done.code == 0, done.err
    assert f"{hub.url}/datasets/lab/pairs: uploaded, private" in done.out
    assert TOKEN not in done.out + done.err
    stored = hub.repositories["lab/pairs"]
    assert stored.private
    assert len(stored.commits) == 1, "one commit holds both"
    assert set(stored.files) == {FILE, "README.md"}
    assert stored.files[FILE] == source.with_name("out.parquet").read_bytes()
    card = stored.files["README.md"].decode()
    assert card.startswith("---\nlicense: cc-by-4.0\n")
    assert "# `lab/pairs`" in card
    (source.parent / "got.parquet").write_bytes(stored.files[FILE])
    assert read_pairs(source.parent / "got.parquet").pairs == PAIRS


def test_public_is_asked_for_by_name(hub: Hub, source: Path) -> None:
    done = push(hub.url, source, "--public")
    assert done.code == 0, done.err
    assert not hub.repositories["lab/pairs"].private
    assert "uploaded, for all to see" in done.out


def test_a_wrong_token_is_one_line_and_nothing_is_written(hub: Hub, source: Path) -> None:
    done = push(hub.url, source, token="hf_a_token_that_is_wrong")
    assert_refused(done, "lab/pairs", "does not know the token", "hf auth login", "401")
    assert "hf_a_token_that_is_wrong" not in done.out + done.err
    assert not source.with_name("out.parquet").exists(), "it is found out before the work"
    assert hub.repositories == {}


def test_without_a_token_the_way_to_log_in_is_told(hub: Hub, source: Path) -> None:
    assert_refused(push(hub.url, source, token=None), "nobody is logged in", "hf auth login")
    assert hub.asked == []


def test_a_token_that_may_not_write_is_told_so(hub: Hub, source: Path) -> None:
    hub.read_only = True
    assert_refused(push(hub.url, source), "may not write", "403")


def test_an_address_where_nobody_listens(source: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: nothing else can take the port
        assert_refused(push(f"http://127.0.0.1:{taken.getsockname()[1]}", source), "cannot be reached")


def test_what_is_on_the_hub_is_added_to_by_force_alone(hub: Hub, source: Path) -> None:
    before = {"data/train-00000-of-00002.parquet": b"a", "data/train-00001-of-00002.parquet": b"b", "notes.md": b"c"}
    hub.repositories["lab/pairs"] = Stored(private=True, files=dict(before), commits=["first"])
    assert_refused(push(hub.url, source), "exists on the Hub already", "--force")
    assert hub.repositories["lab/pairs"].files == before
    done = push(hub.url, source, "--force")
    assert done.code == 0, done.err
    assert set(hub.repositories["lab/pairs"].files) == {FILE, "README.md", "notes.md"}, (
        "no row of the old split is left"
    )
    assert len(hub.repositories["lab/pairs"].commits) == 2


def test_private_data_is_not_added_to_a_public_repository(hub: Hub, source: Path) -> None:
    hub.repositories["lab/pairs"] = Stored(private=False)
    assert_refused(push(hub.url, source, "--force"), "is public on the Hub", "--public")
    hub.repositories["lab/pairs"].private = True
    assert_refused(push(hub.url, source, "--force", "--public"), "is private on the Hub", "--public")
    hub.repositories["lab/pairs"].private = False
    done = push(hub.url, source, "--force", "--public")
    assert done.code == 0, done.err
    assert FILE in hub.repositories["lab/pairs"].files


def test_only_parquet_is_uploaded_and_names_have_two_parts(hub: Hub, source: Path) -> None:
    assert_refused(push(hub.url, source, out="out.jsonl"), ".parquet")
    done = anchored("convert", source, source.with_name("o.parquet"), "--push-to-hub", "pairs")
    assert_refused(done, "--push-to-hub pairs", "ORG/NAME")
    assert hub.asked == []


def test_unpaired_rows_are_uploaded_too(hub: Hub, source: Path) -> None:
    done = push(hub.url, source, "--layout", "unpaired")
    assert done.code == 0, done.err
    (source.parent / "got.parquet").write_bytes(hub.repositories["lab/pairs"].files[FILE])
    assert pq.read_table(source.parent / "got.parquet").num_rows == 2 * len(PAIRS)


@pytest.mark.parametrize(("option", "needs"), [(("--public",), "--push-to-hub"), (("--license", "mit"), "--card")])
def test_an_option_without_what_it_is_for_is_told(option: tuple[str, ...], needs: str, source: Path) -> None:
    assert_refused(anchored("convert", source, source.with_name("out.parquet"), *option), option[0], needs)
