"""`anchored inspect` as a user runs it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from commands import POCKET, anchored
from inspected import inspecting
from report_runs import hostile_pairs, refused_pairs, write_created

from anchored.datasets_io import read_pairs, read_rows
from anchored.decisions import DecisionFile, decide
from anchored.records import Outcome
from anchored.runs import Run

PAIRS = [
    {"prompt": "Is water wet?", "chosen": "Yes, it is.", "rejected": "Yes."},
    {"prompt": "Is fire wet?", "chosen": "No, it is not.", "rejected": "No."},
    {"prompt": "Is ice wet?", "chosen": "It can be.", "rejected": "Yes."},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "my pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return path


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_it_is_interrupted_and_says_what_was_decided_and_how_to_apply_it(
    tmp_path: Path, end: int
) -> None:
    run = Run(tmp_path / "run")
    write_created(run, refused_pairs())
    with inspecting(run.folder) as running:
        assert running.said[0] == f"{run.folder}: 16 rows; decisions go to {run.decisions}"
        assert running.said[1].startswith("http://127.0.0.1:")
        running.ask("/api/decide", {"row": 0, "decision": "drop"})
        code, out, err = running.end(end)
    assert code == 0, err
    assert err == ""
    assert f"{run.decisions}: 1 decision (1 drop)" in out
    assert f"anchored create RECIPE --out {run.folder} --redo create" in out


@pytest.mark.slow
def test_a_complete_create_stage_says_how_decisions_are_applied_and_applies_them_for_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    create = ("create", POCKET, "create.prompts.take=12", "create.prompts.held_out=1", "--out", run.folder)
    assert anchored(*create).code == 0
    before = read_rows(run.pairs)
    with inspecting(run.folder) as running:
        running.ask("/api/decide", {"row": 0, "decision": "drop"})
        _, out, _ = running.end()
    assert "--redo create" in out
    assert "people have decided about pairs since then, --redo create applies it" in anchored(*create).out
    assert anchored(*create, "--redo", "create").code == 0
    assert read_rows(run.pairs) == before[1:]
    assert {row.outcome: row.detail for row in read_rows(run.refused)}[Outcome.DROPPED] == "dropped by a person"
    replies = run.summary("create")["replies"]  # type: ignore[index]
    assert (replies["policy"]["asked"], replies["teacher"]["asked"]) == (0, 0)
    assert "--redo" not in anchored(*create).out
    with inspecting(run.folder) as running:
        assert "--redo" not in running.end()[1], "all that was decided is applied"


def test_nothing_decided_leaves_no_file_and_no_advice(data: Path) -> None:
    with inspecting(data) as running:
        assert running.ask("/api/about")["rows"] == 3  # type: ignore[index]
        code, out, err = running.end()
        assert (code, out) == (0, ""), err
    assert [path.name for path in data.parent.iterdir()] == ["my pairs.jsonl"]


def test_decisions_beside_a_file_are_written_into_a_new_one(data: Path) -> None:
    with inspecting(data) as running:
        running.ask("/api/decide", {"row": 0, "decision": "drop"})
        running.ask("/api/decide", {"row": 1, "decision": "edit", "texts": {"chosen": "Never."}})
        _, out, _ = running.end()
    assert "my pairs.decisions.jsonl: 2 decisions (1 drop, 1 edit)" in out
    assert "--write" in out
    written = data.parent / "decided.jsonl"
    done = anchored("inspect", data, "--write", written)
    assert done.code == 0, done.err
    assert "2 of 3 rows" in done.out
    assert [pair.chosen.text for pair in read_pairs(written).pairs] == ["Never.", "It can be."]
    # the decisions are no data of the folder
    written.rename(data.parent.parent / "decided.jsonl")
    assert len(read_pairs(data.parent).pairs) == 3


def test_decisions_and_port_may_be_chosen(data: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    chosen = tmp_path / "elsewhere" / "mine.jsonl"
    with inspecting(data, "--decisions", chosen) as running:
        running.ask("/api/decide", {"row": 2, "decision": "drop"})
        port = running.said[1].split(":")[2].split("/")[0]
        taken = anchored("inspect", data, "--port", port, "--no-browser")
        assert taken.code == 2
        assert f"port {port} is taken" in taken.err
        running.end()
    assert len(chosen.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("gone.jsonl",), "no such file"),
        (("DATA", "--decisions", "gone/d.jsonl"), "name another file with --decisions"),
        (("DATA", "--port", "70000"), "65535"),
        (("DATA", "--write", "out.jsonl"), "holds no decision"),
        (("RUN", "--write", "out.jsonl"), "--redo create"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(
    data: Path, tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    run = Run(tmp_path / "run")
    write_created(run)
    named = {"DATA": data, "RUN": run.folder}
    done = anchored("inspect", *(named.get(word, word) for word in arguments), "--no-browser")
    assert done.code == 2, done
    assert len(done.err.splitlines()) == 1
    assert says in done.err


def test_write_refuses_to_leave_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    write_created(run)
    file = DecisionFile(tmp_path / "d.jsonl")
    for pair in hostile_pairs():
        file.append(decide(pair, "drop"))
    alone = tmp_path / "alone.parquet"
    run.pairs.rename(alone)
    done = anchored("inspect", alone, "--decisions", file.path, "--write", tmp_path / "out.jsonl")
    assert done.code == 2
    assert "no pair would be left" in done.err
