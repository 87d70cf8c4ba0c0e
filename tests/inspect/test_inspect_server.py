"""Who may ask the server, and what a decision does to the file and to what is asked next."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from inspected import Served, served
from report_runs import hostile_pairs, refused_pairs, write_created, write_rows

from anchored.datasets_io import read_rows
from anchored.decisions import apply, key_of, read_decisions
from anchored.errors import DataError
from anchored.inspect.server import TOKEN_HEADER, Server
from anchored.records import Outcome
from anchored.runs import Run

READS = ["/api/about", "/api/view", "/api/rows?view=x&start=0&count=9", "/api/pair?row=0", "/api/texts?row=0"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    write_created(run, refused_pairs())
    return run


@pytest.fixture
def page(run: Run) -> Iterator[Served]:
    with served(run.folder, run.decisions) as page:
        yield page


def test_only_loopback_is_listened_on(page: Served) -> None:
    assert page.server.server_address[0] == "127.0.0.1"
    assert page.server.address.startswith(f"http://127.0.0.1:{page.server.server_port}/#")
    assert len(page.server.token) >= 32


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "localhost.evil:1"])
def test_another_host_name_gets_nothing(page: Served, host: str) -> None:
    for path in ("/", "/page.js", *READS):
        reply = page.send("GET", path, Host=host, **{TOKEN_HEADER: page.server.token})
        assert reply.status == 403
    assert page.post({"row": 0, "decision": "drop"}, Host=host).status == 403
    assert page.lines() == []


def test_this_machines_names_do_through_a_tunnel_too(page: Served) -> None:
    for host in ("localhost:9000", "127.0.0.1:1", "localhost"):
        assert page.send("GET", "/", Host=host).status == 200


@pytest.mark.parametrize("token", [None, "", "x" * 32, "ünicode"])
def test_nothing_of_the_data_goes_to_who_lacks_the_token(page: Served, token: str | None) -> None:
    headers = {} if token is None else {TOKEN_HEADER: token}
    for path in READS:
        reply = page.send("GET", path, **headers)
        assert reply.status == 403
        assert "anchored inspect" in reply.json["error"]
    body = json.dumps({"row": 0, "decision": "drop"}).encode()
    assert page.send("POST", "/api/decide", body, Content_Type="application/json", **headers).status == 403
    # a token in the address would stand in logs and be sent by links
    assert page.send("POST", f"/api/decide?{TOKEN_HEADER}={page.server.token}", body).status == 403
    assert page.lines() == []


def test_another_page_of_the_browser_cannot_decide(page: Served) -> None:
    decision = {"row": 0, "decision": "drop"}
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
        assert page.post(decision, Origin=origin).status == 403
    assert page.post(decision, Content_Type="text/plain").status == 415
    assert page.send("OPTIONS", "/api/decide").status == 501
    assert page.send("GET", "/api/decide", **{TOKEN_HEADER: page.server.token}).status == 404
    assert page.lines() == []
    own = f"http://127.0.0.1:{page.server.server_port}"
    assert page.post(decision, Origin=own).status == 200


def test_every_answer_forbids_scripts_from_elsewhere_frames_and_guessing(page: Served) -> None:
    for path in ("/", "/page.js", "/look.css", "/api/about", "/nowhere"):
        headers = page.send("GET", path, **{TOKEN_HEADER: page.server.token}).headers
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
        assert "Access-Control-Allow-Origin" not in headers


def test_no_file_but_the_pages_own_is_served(page: Served) -> None:
    for path in ("/recipe.yaml", "/../page.js", "/page.html/../../server.py", "//etc/passwd", "/%2e%2e/server.py"):
        assert page.send("GET", path, **{TOKEN_HEADER: page.server.token}).status == 404


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/api/pair?row=99", "there is no row 99"),
        ("/api/pair?row=-1", "there is no row -1"),
        ("/api/pair?row=one", "not a request"),
        ("/api/pair", "not a request"),
        ("/api/view?order=random", "choose from"),
        ("/api/view?decision=maybe", "choose from"),
    ],
)
def test_a_wrong_question_gets_an_answer_that_says_so(page: Served, path: str, says: str) -> None:
    reply = page.send("GET", path, **{TOKEN_HEADER: page.server.token})
    assert reply.status == 400
    assert says in reply.json["error"]


@pytest.mark.parametrize(
    "body",
    [
        [],
        {},
        {"row": "0", "decision": "drop"},
        {"row": 0, "decision": "delete"},
        {"row": 0, "decision": 3},
        {"row": 99, "decision": "drop"},
        {"row": 0, "decision": "edit", "texts": {"prompt": "x"}},
        {"row": 0, "decision": "edit", "texts": {"chosen": 3}},
        {"row": 0, "decision": "edit", "texts": []},
        {"row": 0, "decision": "edit"},
        {"row": 0, "decision": "edit", "texts": {"chosen": " "}},
        {"row": 0, "decision": "drop", "note": ["x"]},
        {"row": 14, "decision": "keep"},
        {"row": 15, "decision": "keep"},
    ],
)
def test_a_decision_that_cannot_be_is_refused_and_not_written(page: Served, body: object) -> None:
    reply = page.post(body)
    assert reply.status == 400
    assert reply.json["error"]
    assert page.lines() == []


def test_bodies_that_are_no_json_or_too_large_are_refused(page: Served) -> None:
    usual = {TOKEN_HEADER: page.server.token, "Content-Type": "application/json"}
    assert page.send("POST", "/api/decide", b"{", **usual).status == 400
    assert page.send("POST", "/api/decide", b"[" * 100_000, **usual).status == 400
    assert page.send("POST", "/api/decide", b"", **usual | {"Content-Length": "99999999999"}).status == 413
    with socket.create_connection(("127.0.0.1", page.server.server_port), timeout=60) as raw:
        head = ["POST /api/decide HTTP/1.1", "Host: localhost", f"{TOKEN_HEADER}: {page.server.token}"]
        raw.sendall("\r\n".join([*head, "Content-Type: application/json", "", ""]).encode())
        assert b" 411 " in raw.recv(200)
    assert page.ask("/api/about")["rows"] == 16


def test_a_view_is_asked_for_by_stretches_and_a_forgotten_one_says_so(page: Served) -> None:
    view = page.ask("/api/view", show="refused")
    assert view["total"] == 4
    first = page.ask("/api/rows", view=view["view"], start=0, count=3)
    rest = page.ask("/api/rows", view=view["view"], start=3, count=100)
    assert [row["outcome"] for row in first["rows"] + rest["rows"]] == [
        "length_ratio",
        "leak",
        "no_header",
        "malformed",
    ]
    assert page.ask("/api/rows", view="of yesterday", start=0, count=3) == {"rows": [], "gone": True}


def test_a_pair_comes_with_its_differences_marked(page: Served) -> None:
    found = page.ask("/api/pair", row=6)
    texts = page.ask("/api/texts", row=6)
    assert "".join(text for kind, text in found["parts"] if kind != 2) == texts["rejected"]
    assert "".join(text for kind, text in found["parts"] if kind != 1) == texts["chosen"]
    assert [1, "Well"] in found["parts"]
    assert [2, "Indeed"] in found["parts"]
    assert found["decision"] is None
    assert found["rational"].startswith("Because")


def test_decisions_are_in_the_file_and_in_what_is_asked_next(page: Served, run: Run) -> None:
    assert page.post({"row": 0, "decision": "drop", "note": "dull"}).json["decided"] == {
        "keep": 0,
        "drop": 1,
        "edit": 0,
    }
    assert page.post({"row": 12, "decision": "keep"}).status == 200
    shown = page.post({"row": 1, "decision": "edit", "texts": {"chosen": "Better."}}).json["pair"]
    assert shown["chosen_by"] == "teacher <b>+edited"
    assert [part["name"] for part in shown["before"]] == ["chosen"]
    assert [line["decision"] for line in page.lines()] == ["drop", "keep", "edit"]
    assert page.lines()[0]["note"] == "dull"
    assert page.lines()[2]["original"] == {"chosen": hostile_pairs()[1].chosen.text}

    assert page.ask("/api/view", decision="drop")["total"] == 1
    assert page.ask("/api/view", decision="undecided")["total"] == 13
    assert page.ask("/api/texts", row=1)["chosen"] == "Better."

    held = read_decisions(run.decisions)
    pairs, refused = read_rows(run.pairs), read_rows(run.refused)
    assert apply(pairs[0], held).outcome is Outcome.DROPPED
    assert apply(pairs[1], held).chosen.text == "Better."
    assert apply(refused[0], held).outcome is Outcome.OK


def test_search_finds_what_people_wrote(page: Served) -> None:
    page.post({"row": 3, "decision": "drop", "note": "Far too Dull"})
    page.post({"row": 4, "decision": "edit", "texts": {"chosen": "Quite another thing"}})
    assert page.ask("/api/view", search="too dull")["total"] == 1
    assert page.ask("/api/view", search="ANOTHER THING")["total"] == 1
    page.post({"row": 4, "decision": "undo"})
    assert page.ask("/api/view", search="another thing")["total"] == 0


def test_undo_takes_back_and_an_edit_back_to_the_original_is_an_undo(page: Served) -> None:
    original = page.ask("/api/texts", row=1)
    page.post({"row": 1, "decision": "edit", "texts": {"chosen": "Better.", "rejected": "Worse."}})
    page.post({"row": 1, "decision": "edit", "texts": {"chosen": "Best."}})
    assert page.ask("/api/texts", row=1) == {"chosen": "Best.", "rejected": "Worse."}
    assert page.lines()[1]["original"] == original
    page.post({"row": 1, "decision": "edit", "texts": original})
    assert [line["decision"] for line in page.lines()] == ["edit", "edit", "undo"]
    assert page.ask("/api/texts", row=1) == original
    # nothing is left to take back
    assert page.post({"row": 1, "decision": "undo"}).status == 200
    assert len(page.lines()) == 3


def test_a_row_that_create_has_edited_is_still_the_one_that_was_decided_about(page: Served, run: Run) -> None:
    page.post({"row": 2, "decision": "edit", "texts": {"chosen": "Better."}})
    held, before = read_decisions(run.decisions), read_rows(run.pairs)
    write_rows(run.pairs, [apply(pair, held) for pair in before])
    with served(run.folder, run.decisions) as again:
        shown = again.ask("/api/pair", row=2)
        assert shown["decision"]["kind"] == "edit"
        assert shown["chosen_by"] == "teacher <b>+edited"
        again.post({"row": 2, "decision": "edit", "texts": {"chosen": "Best."}})
        assert again.lines()[1]["pair"] == key_of(before[2]).pair
        assert again.lines()[1]["original"] == {"chosen": before[2].chosen.text}
        again.post({"row": 2, "decision": "undo"})
        assert again.ask("/api/texts", row=2)["chosen"] == before[2].chosen.text
    assert apply(before[2], read_decisions(run.decisions)) == before[2]


def test_two_servers_on_one_file_see_each_others_decisions(page: Served, run: Run) -> None:
    with served(run.folder, run.decisions) as other:
        page.post({"row": 0, "decision": "drop"})
        assert other.ask("/api/pair", row=0)["decision"]["kind"] == "drop"
        other.post({"row": 0, "decision": "keep"})
        other.post({"row": 3, "decision": "drop"})
        assert page.ask("/api/about")["decided"] == {"keep": 1, "drop": 1, "edit": 0}
    assert len(page.lines()) == 3


def test_decisions_of_an_earlier_day_are_there(page: Served, run: Run) -> None:
    page.post({"row": 11, "decision": "drop"})
    with open(run.decisions, "a") as handle:
        handle.write('{"torn')
    with served(run.folder, run.decisions) as again:
        view = again.ask("/api/view", decision="drop")
        assert [row["row"] for row in again.ask("/api/rows", view=view["view"], start=0, count=9)["rows"]] == [11]
        assert again.post({"row": 11, "decision": "undo"}).status == 200
    assert read_decisions(run.decisions).unreadable == [2]


def test_a_file_that_cannot_be_written_is_told_and_nothing_counts_as_decided(page: Served, run: Run) -> None:
    run.decisions.mkdir()
    reply = page.post({"row": 0, "decision": "drop"})
    assert reply.status == 400
    assert "--decisions" in reply.json["error"] or "cannot be" in reply.json["error"]
    run.decisions.rmdir()
    assert page.ask("/api/about")["decided"]["drop"] == 0


def test_a_port_that_is_taken_is_named(page: Served) -> None:
    with pytest.raises(DataError, match=rf"port {page.server.server_port} is taken"):
        Server(page.server.session, page.server.server_port)
