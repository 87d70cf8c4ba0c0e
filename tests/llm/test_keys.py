"""A key that a faulty endpoint echoes is in no file of the run, in nothing that is printed, in no log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import POCKET
from fault_server import Act, FaultServer, cuts, echoes_headers, fails, hangs, says, sends

from anchored import cli

KEY = "sk-proj-AbCdEf0123456789-secret"
OTHER = "sk-proj-ZyXwVu9876543210-hidden"
SMALL = ("create.prompts.take=2", "create.prompts.held_out=1", "create.sample.batch_size=8")
QUICK = {"retries": 1, "stop_after_failures": 2, "patience_seconds": 1}


def exit_code(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Of the command, run in this process."""
    monkeypatch.setattr("sys.argv", ["anchored", *map(str, arguments)])
    return cli._exit_code()


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (lambda key: echoes_headers(400), 2),  # every row is refused: no pairs
        (lambda key: echoes_headers(401), 2),
        (lambda key: echoes_headers(429), 3),
        (lambda key: echoes_headers(500), 3),
        (lambda key: sends(f"Incorrect API key provided: {key[:10]}*****{key[-4:]}.", "text/plain", 401), 2),
        (lambda key: fails(402, {"message": f"no money for {key}"}), 3),
        (lambda key: cuts(), 3),
        (lambda key: hangs(), 3),
        (lambda key: says(f"your key begins with {key[:4]}"), 2),  # no revision
        (lambda key: says(f"your key is {key}"), 2),  # the same, and stored
    ],
    ids=["400", "401", "429", "500", "starred", "402", "cut", "time-out", "nonsense", "echoed"],
)
def test_the_key_is_nowhere(
    server: FaultServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    fault: Callable[[str], Act],
    code: int,
    request: pytest.FixtureRequest,
) -> None:
    # short where nothing ever comes, for else a busy machine might be late
    seconds = 0.5 if request.node.callspec.id == "time-out" else 60
    monkeypatch.setenv("TEST_KEY", KEY)
    monkeypatch.setenv("OTHER_KEY", OTHER)
    caplog.set_level(logging.DEBUG)
    server.always = fault(KEY)
    with FaultServer() as second:
        second.always = fault(OTHER)
        got = exit_code(
            monkeypatch,
            "create",
            POCKET,
            *SMALL,
            "create.reviser.serve=null",
            f"create.reviser.base_url={server.base_url}",
            "create.reviser.key_env=TEST_KEY",
            f"create.reviser.more_endpoints=[{{base_url: '{second.base_url}', key_env: OTHER_KEY}}]",
            *(f"create.reviser.{name}={value}" for name, value in QUICK.items()),
            f"create.reviser.timeout_seconds={seconds}",
            "--out",
            tmp_path / "run",
        )
    printed = capfd.readouterr()
    assert got == code, printed
    texts = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert texts
    texts |= {Path("stdout"): printed.out.encode(), Path("stderr"): printed.err.encode()}
    texts[Path("log")] = caplog.text.encode()
    for path, text in texts.items():
        for part in (KEY, KEY[:10], KEY[-8:], OTHER, OTHER[:14], OTHER[-8:]):
            assert part.encode() not in text, (path, part)
