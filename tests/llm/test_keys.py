"""A key that a faulty endpoint echoes is in no file of the run, in nothing that is printed, in no log."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import POCKET, anchored
from fault_server import Act, FaultServer, cuts, echoes_headers, fails, hangs, hangs_up, says, sends

KEY = "sk-proj-AbCdEf0123456789-secret"
OTHER = "sk-proj-ZyXwVu9876543210-hidden"
SMALL = ("create.prompts.take=4", "create.prompts.held_out=1", "create.sample.batch_size=8")
QUICK = {"retries": 1, "stop_after_failures": 2, "timeout_seconds": 2, "patience_seconds": 1}


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (echoes_headers(400), 2),  # every row is refused: no pairs
        (echoes_headers(401), 2),
        (echoes_headers(402), 3),
        (echoes_headers(403), 2),
        (echoes_headers(404), 2),
        (echoes_headers(429), 3),
        (echoes_headers(500), 3),
        (echoes_headers(503), 3),
        (sends(f"Incorrect API key provided: {KEY[:10]}*****{KEY[-4:]}.", "text/plain", 401), 2),
        (cuts(), 3),
        (hangs_up(), 3),
        (hangs(), 3),
        (sends("no json"), 3),
        (fails(402, {"message": f"no money for {KEY}"}), 3),
        (says(f"your key is {KEY[:4]}..."), 2),  # no revision
    ],
)
def test_the_key_is_nowhere(server: FaultServer, tmp_path: Path, fault: Act, code: int) -> None:
    server.always = fault
    with FaultServer() as second:
        second.always = fault
        done = anchored(
            "create",
            POCKET,
            *SMALL,
            "create.reviser.serve=null",
            f"create.reviser.base_url={server.base_url}",
            "create.reviser.key_env=TEST_KEY",
            f"create.reviser.more_endpoints=[{{base_url: '{second.base_url}', key_env: OTHER_KEY}}]",
            *(f"create.reviser.{name}={value}" for name, value in QUICK.items()),
            "--out",
            tmp_path / "run",
            env={"TEST_KEY": KEY, "OTHER_KEY": OTHER, "PYTHONASYNCIODEBUG": "1"},
        )
    assert done.code == code, (done.out, done.err)
    texts = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert texts
    texts |= {Path("stdout"): done.out.encode(), Path("stderr"): done.err.encode()}
    for path, text in texts.items():
        for part in (KEY, KEY[:10], KEY[-8:], OTHER, OTHER[:14], OTHER[-8:]):
            assert part.encode() not in text, (path, part)
