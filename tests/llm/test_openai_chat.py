from __future__ import annotations

import asyncio
import io
import json
import logging
import shutil
import socket
import ssl
import subprocess
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import virtual_time
from aiohttp import web
from fault_server import (
    FaultServer,
    answers_together,
    completion,
    cuts,
    echoes_headers,
    fails,
    hangs,
    hangs_up,
    says,
    sends,
    trickles,
)

from anchored.errors import ModelError, NoReply, ReplyError, Stopped
from anchored.llm.ask import ask_all
from anchored.llm.chat import Reply, Request, Usage
from anchored.llm.limits import Gate
from anchored.llm.openai_chat import OpenAIChat
from anchored.llm.settings import EndpointSettings
from anchored.records import Message

KEY = "sk-proj-AbCdEf0123456789-secret"
T = TypeVar("T")


def a_request(text: str = "Why is the sky blue?", **fields: Any) -> Request:
    return Request((Message("user", text),), **fields)


def use(
    server: FaultServer | str,
    work: Callable[[OpenAIChat], Coroutine[Any, Any, T]],
    run: Callable[[Coroutine[Any, Any, T]], T] = asyncio.run,
    **settings: Any,
) -> T:
    """Run `work(chat)` against the server in a loop of its own."""
    base_url = server if isinstance(server, str) else server.base_url

    async def main() -> T:
        chat = OpenAIChat(EndpointSettings(model="gpt-test", base_url=base_url, **settings))
        try:
            return await work(chat)
        finally:
            await chat.close()

    return run(main())


def ask_one(server: FaultServer | str, request: Request | None = None, **settings: Any) -> Reply:
    return use(server, lambda chat: chat.reply(request or a_request()), **settings)


@pytest.fixture
def deaf() -> Iterator[str]:
    """An address that nobody listens at, nor can while the test runs."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}/v1"


# what is sent and what comes back


def test_a_reply_keeps_text_usage_latency_and_the_raw_response(server: FaultServer) -> None:
    server.script = [says("Rayleigh scattering.", after=0.05)]
    reply = ask_one(server)
    assert (reply.text, reply.finish_reason, reply.model) == ("Rayleigh scattering.", "stop", "served-model")
    assert reply.usage == Usage(prompt_tokens=7, completion_tokens=3)
    assert 0.05 <= reply.seconds < 60
    assert reply.raw == completion("Rayleigh scattering.")


def test_json_that_is_declared_as_text_is_read(server: FaultServer) -> None:
    server.script = [sends(json.dumps(completion("fine")), "text/plain")]
    assert ask_one(server).text == "fine"


def test_the_body_holds_the_sampling_settings_and_never_the_index(server: FaultServer) -> None:
    ask_one(server, a_request(temperature=0.0, max_tokens=9, index=3), extra_body={"reasoning_effort": "low"})
    assert server.seen[0].body == {
        "model": "gpt-test",
        "messages": [{"role": "user", "content": "Why is the sky blue?"}],
        "temperature": 0.0,
        "max_tokens": 9,
        "reasoning_effort": "low",
    }


def test_samples_of_one_prompt_are_different_requests_that_come_out_the_same_again(server: FaultServer) -> None:
    for index in (0, 1, 0):
        ask_one(server, a_request(index=index))
    first, second, again = (seen.body["seed"] for seen in server.seen)
    assert first == again != second
    assert 0 <= first < 2**31


def test_the_seed_stays_at_home_where_the_settings_say_so(server: FaultServer) -> None:
    ask_one(server, send_seed=False)
    assert "seed" not in server.seen[0].body


def test_a_message_that_is_no_text_is_its_own_rows_failure(server: FaultServer) -> None:
    with pytest.raises(ReplyError, match="lone surrogate"):
        ask_one(server, a_request("half of an emoji: \ud83d"))
    assert server.seen == []


# what is tried again


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize(
    "fault",
    [
        fails(500),
        fails(502),
        fails(408),
        fails(409),
        fails(529),
        cuts(),
        cuts(beginning=b""),
        hangs_up(),
        sends('{"choices": [{"message"'),
        sends("<html>Bad gateway</html>", "text/html"),
        sends("null"),
        sends('{"choices": []}'),
        sends('{"choices": [{"index": 0}]}'),
        sends('{"error": {"message": "upstream failed", "code": 502}}'),
        sends("\x00\xff\x1f"),
        says("half", finish_reason="error"),
    ],
)
def test_what_may_pass_is_tried_again(server: FaultServer, fault: Any) -> None:
    server.script = [fault, fault]
    assert ask_one(server).text == "fine"
    assert len(server.seen) == 3


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("slow", [hangs, partial(trickles, 600)], ids=["silent", "trickling"])
def test_a_reply_that_takes_too_long_is_asked_for_at_most_twice_more(server: FaultServer, slow: Any) -> None:
    clock = virtual_time.Leaps()
    server.script = [slow(clock.leap), slow(clock.leap)]
    assert ask_one(server, run=clock.run, timeout_seconds=600).text == "fine"
    clock = virtual_time.Leaps()
    server.script = [slow(clock.leap)] * 3
    with pytest.raises(ReplyError, match=r"3 attempts \(last: no reply in time\)"):
        ask_one(server, run=clock.run, timeout_seconds=600)
    assert len(server.seen) == 6


@pytest.mark.usefixtures("quick_retries")
def test_an_unlucky_row_fails_alone_after_its_retries(server: FaultServer) -> None:
    server.script = [says("fine")] + [fails(500, {"message": "cuda error"})] * 3

    async def work(chat: OpenAIChat) -> list[Any]:
        first = await chat.reply(a_request())
        second = await asyncio.gather(chat.reply(a_request()), return_exceptions=True)
        return [first, *second, await chat.reply(a_request())]

    first, unlucky, third = use(server, work, retries=2)
    assert (first.text, third.text) == ("fine", "fine")
    assert type(unlucky) is NoReply
    assert "3 attempts (last: 500: cuda error)" in str(unlucky)


def test_the_pause_between_attempts_grows_and_is_drawn_at_random(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[float, float]] = []
    monkeypatch.setattr("random.uniform", lambda low, high: drawn.append((low, high)) or 0.0)
    server.script = [fails(500)] * 8
    ask_one(server, retries=8)
    assert drawn == [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (0, 32), (0, 60), (0, 60)]


def in_a_second() -> dict[str, str]:
    """Of a response, by the server's own clock."""
    now = datetime.now(UTC)
    then = now + timedelta(seconds=1)
    return {"Date": format_datetime(now, usegmt=True), "Retry-After": format_datetime(then, usegmt=True)}


@pytest.mark.parametrize(
    ("headers", "least", "most"),
    [
        (lambda: {"Retry-After": "0.4"}, 0.4, 200),
        (lambda: {"retry-after-ms": "400", "Retry-After": "300"}, 0.4, 200),
        (in_a_second, 1, 200),
    ],
    ids=["seconds", "milliseconds", "date"],
)
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_obeyed(
    server: FaultServer, headers: Callable[[], Mapping[str, str]], least: float, most: float, status: int
) -> None:
    server.script = [fails(status, headers=headers())]
    assert ask_one(server).text == "fine"
    first, second = server.seen
    assert least <= second.at - first.at < most


def test_a_429_holds_back_everyone(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.script = [fails(429, headers={"Retry-After": "0.5"})]

    async def work(chat: OpenAIChat) -> None:
        heard, pause = asyncio.Event(), Gate.pause

        def paused(gate: Gate, seconds: float) -> None:
            pause(gate, seconds)
            heard.set()

        monkeypatch.setattr(Gate, "pause", paused)
        first = asyncio.create_task(chat.reply(a_request("first")))
        await heard.wait()
        await asyncio.gather(first, *(chat.reply(a_request(str(number))) for number in range(5)))

    use(server, work)
    refused, *others = server.seen
    assert len(others) == 6
    assert all(seen.at - refused.at >= 0.5 for seen in others)


@pytest.mark.usefixtures("quick_retries")
def test_under_a_rate_limit_every_row_gets_its_reply(server: FaultServer) -> None:
    """Three at a time are served, the others refused at once; no row may be lost to it, whatever `retries` says."""

    async def limited(request: Any) -> Any:
        return await (says("fine", after=0.01) if server.in_flight <= 3 else fails(429))(request)

    server.always = limited
    requests = [a_request(str(number)) for number in range(200)]
    replies = use(server, lambda chat: ask_all(chat, requests), concurrency=64, retries=0)
    assert [reply.text if isinstance(reply, Reply) else str(reply) for reply in replies] == ["fine"] * 200
    assert len(server.seen) < 1000


def test_as_many_requests_are_in_flight_as_set_and_no_more(server: FaultServer) -> None:
    server.always = answers_together(server, 7, says("fine", after=0.03))
    requests = [a_request(str(number)) for number in range(40)]
    use(server, lambda chat: ask_all(chat, requests), concurrency=7)
    assert server.most_in_flight == 7


# what ends it


@pytest.mark.parametrize(
    ("fault", "error", "says_so"),
    [
        (fails(401, {"message": "bad key"}), ModelError, r"refused the key in TEST_KEY \(401: bad key\)"),
        (fails(403, {"message": "not yours"}), ModelError, r"TEST_KEY \(403: not yours\)"),
        (
            fails(404, {"message": "The model `gpt-test` does not exist"}),
            ModelError,
            "gpt-test .*does not exist.*base_url",
        ),
        (sends("<html>not here</html>", "text/html", 404), ModelError, "not here"),
        (fails(402, {"message": "Insufficient Balance"}), Stopped, "402: Insufficient Balance"),
        (fails(429, {"message": "You exceeded your current quota", "code": "insufficient_quota"}), Stopped, "no money"),
        (fails(429, headers={"Retry-After": "86400"}), Stopped, "86400 s"),
    ],
)
def test_what_no_retry_can_mend_ends_everything_after_one_request(
    server: FaultServer, fault: Any, error: type[Exception], says_so: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    server.script = [fault]

    async def work(chat: OpenAIChat) -> None:
        for _ in range(3):  # the second and third hear the same without asking
            with pytest.raises(error, match=says_so) as raised:
                await chat.reply(a_request())
            assert type(raised.value) is error
            assert "\n" not in str(raised.value)

    use(server, work, key_env="TEST_KEY")
    assert len(server.seen) == 1


def test_those_who_wait_for_their_turn_are_told_at_once(server: FaultServer) -> None:
    server.script = [fails(500), fails(429, headers={"Retry-After": "600"}), fails(401)]

    async def work(chat: OpenAIChat) -> None:
        started = time.monotonic()
        results = await asyncio.gather(*(chat.reply(a_request()) for _ in range(50)), return_exceptions=True)
        assert time.monotonic() - started < 300
        assert {type(result) for result in results} == {ModelError}

    use(server, work, concurrency=3)
    assert len(server.seen) <= 4


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_bad_row_is_refused_alone_and_at_once(server: FaultServer, status: int) -> None:
    server.script = [fails(status, {"message": "This model's maximum context length is 8192 tokens"})]
    with pytest.raises(ReplyError, match=rf"{status}: This model's maximum context"):
        ask_one(server)
    assert len(server.seen) == 1


@pytest.mark.usefixtures("quick_retries")
def test_nothing_listens(deaf: str) -> None:
    for work in (lambda chat: chat.reply(a_request()), lambda chat: chat.check()):
        with pytest.raises(
            ModelError, match=rf"nothing answers at {deaf} .*Connect call failed.*curl {deaf}/models"
        ) as raised:
            use(deaf, work)
        assert type(raised.value) is ModelError


@pytest.mark.usefixtures("quick_retries")
def test_an_endpoint_that_goes_down_midway_stops_the_stage() -> None:
    with FaultServer() as server:

        async def work(chat: OpenAIChat) -> None:
            await chat.reply(a_request())
            server.__exit__()
            with pytest.raises(Stopped, match=r"is down .*the same command goes on"):
                await chat.reply(a_request())

        try:
            use(server, work, retries=2)
        finally:
            server.__enter__()


@pytest.mark.usefixtures("quick_retries")
def test_many_failed_requests_in_a_row_stop_the_stage(server: FaultServer) -> None:
    server.script = [says("fine")]
    server.always = fails(503, {"message": "overloaded"})
    requests = [a_request(str(number)) for number in range(100)]
    with pytest.raises(Stopped, match=r"5 requests in a row.*503: overloaded"):
        use(server, lambda chat: ask_all(chat, requests), retries=1, stop_after_failures=5, concurrency=2)
    assert len(server.seen) < 20


@pytest.mark.parametrize(("status", "message"), [(429, "slow down"), (503, "overloaded")])
def test_an_error_that_asks_to_wait_again_and_again_stops_the_stage(
    server: FaultServer, status: int, message: str
) -> None:
    clock = virtual_time.Leaps()

    async def act(request: web.Request) -> web.StreamResponse:
        clock.leap(200)  # from one refusal to the next
        return await fails(status, {"message": message}, headers={"Retry-After": "0.01"})(request)

    server.always = act
    with pytest.raises(Stopped, match=f"nothing but {status}: {message} for 6.. s"):
        ask_one(server, run=clock.run, patience_seconds=500, retries=1000)
    assert len(server.seen) == 4


@pytest.mark.usefixtures("quick_retries")
def test_a_request_that_is_always_refused_for_its_rate_fails_alone(server: FaultServer) -> None:
    server.always = fails(429)
    with pytest.raises(ReplyError, match="31 times"):
        ask_one(server)


@pytest.mark.usefixtures("quick_retries")
def test_rows_that_are_refused_for_their_rate_one_after_the_other_stop_the_stage(server: FaultServer) -> None:
    server.always = fails(429, {"message": "slow down"}, headers={"Retry-After": "0.001"})
    requests = [a_request(str(number)) for number in range(100)]
    with pytest.raises(Stopped, match=r"3 requests in a row.*429: slow down"):
        use(server, lambda chat: ask_all(chat, requests), stop_after_failures=3, concurrency=1)
    assert len(server.seen) == 3 * 31


# rates


def a_minute_of(server: FaultServer) -> float:
    """Requests per minute from the first to the last that the server saw."""
    return 60 * (len(server.seen) - 1) / (server.seen[-1].at - server.seen[0].at)


@pytest.mark.parametrize("told", [False, True], ids=["set", "by headers"])
def test_requests_keep_to_the_rate_evenly(server: FaultServer, told: bool) -> None:
    headers = {"x-ratelimit-limit-requests": "1800", "x-ratelimit-remaining-requests": "1790"}

    async def act(_: Any) -> Any:
        return web.json_response(completion("fine"), headers=headers if told else {})

    server.always = act
    settings: dict[str, Any] = {"concurrency": 2} if told else {"requests_per_minute": 1800}
    use(server, lambda chat: ask_all(chat, [a_request(str(number)) for number in range(60)]), **settings)
    assert len(server.seen) == 60
    begin = server.seen[0].at
    assert sum(seen.at < begin + 0.2 for seen in server.seen) <= 40
    assert 200 < a_minute_of(server) < 3600  # a busy machine is late; exactly it is in test_limits


def test_tokens_keep_to_the_rate_by_what_was_really_used(server: FaultServer) -> None:
    """Guessed at 4096 each, used are 10: at 1,000 a second, ten would take forty seconds by the guess."""
    started = time.monotonic()
    requests = [a_request(str(number), max_tokens=4096) for number in range(10)]
    use(server, lambda chat: ask_all(chat, requests), tokens_per_minute=60_000)
    assert time.monotonic() - started < 20


def test_where_nothing_remains_nothing_is_sent_until_it_does(server: FaultServer) -> None:
    clock = virtual_time.Leaps()

    async def act(_: Any) -> Any:
        spent = {"x-ratelimit-limit-tokens": "1000000", "x-ratelimit-remaining-tokens": "0"}
        return web.json_response(completion("fine"), headers=spent | {"x-ratelimit-reset-tokens": "1h"})

    server.script = [act]

    async def work(chat: OpenAIChat) -> None:
        await chat.reply(a_request("first"))
        others = [asyncio.create_task(chat.reply(a_request(str(number)))) for number in range(5)]
        await asyncio.sleep(0.1)
        assert len(server.seen) == 1
        clock.leap()
        await asyncio.gather(*others)

    use(server, work, clock.run)
    assert len(server.seen) == 6


# keys


def test_a_missing_key_is_named_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER_KEY", " ")
    for settings in (EndpointSettings(model="m"), EndpointSettings(model="m", key_env="OTHER_KEY")):
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        with pytest.raises(ModelError, match=str(settings.key_env)):
            OpenAIChat(settings)


def test_no_key_reaches_a_local_server_that_was_not_to_have_one(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    ask_one(server)
    assert "Authorization" not in server.seen[0].headers


def test_the_key_is_sent_where_it_is_named(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", KEY + "\r\n")
    ask_one(server, key_env="TEST_KEY")
    assert server.seen[0].headers["Authorization"] == f"Bearer {KEY}"


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize(
    "fault",
    [
        echoes_headers(401),
        echoes_headers(400),
        echoes_headers(500),
        sends(f"Incorrect API key provided: {KEY[:10]}*****{KEY[-4:]}.", "text/plain", 401),
        cuts(),
        None,
        sends("no json"),
    ],
    ids=["echo 401", "echo 400", "echo 500", "starred", "cut", "time-out", "no json"],
)
def test_the_key_is_in_no_message_no_traceback_and_no_log(
    server: FaultServer, fault: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    clock = virtual_time.Leaps()
    server.always = fault or hangs(clock.leap)
    caplog.set_level(logging.DEBUG)
    with pytest.raises(ModelError) as raised:
        ask_one(server, run=clock.run, key_env="TEST_KEY", retries=1, timeout_seconds=600)
    shown = io.StringIO()
    error: BaseException | None = raised.value
    traceback.print_exception(raised.value, file=shown)
    while error is not None:
        shown.write(f"{error!r} {error} {vars(error)}")
        assert error.__cause__ is None
        error = error.__context__
    for part in (KEY, KEY[:10], KEY[-4:], "Bearer"):
        assert part not in shown.getvalue().replace("'Bearer [key]'", "")
        assert part not in caplog.text


def test_a_key_that_cannot_be_one_is_not_shown(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", "sk-schlüssel")
    with pytest.raises(ModelError, match="TEST_KEY") as raised:
        ask_one(server, key_env="TEST_KEY")
    assert "schl" not in str(raised.value)


def test_check_refuses_a_wrong_key_and_takes_any_other_answer(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    use(server, lambda chat: chat.check())
    server.always = fails(404)
    use(server, lambda chat: chat.check())
    server.always = echoes_headers(401)
    with pytest.raises(ModelError, match="TEST_KEY") as raised:
        use(server, lambda chat: chat.check(), key_env="TEST_KEY")
    assert KEY not in str(raised.value)
    assert server.seen == []


# parameters that a model refuses


def test_a_reasoning_model_is_asked_its_way_after_the_first_refusal(
    server: FaultServer, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(name: str, message: str) -> Any:
        return fails(400, {"message": message, "param": name, "code": "unsupported_parameter"})

    server.script = [
        unsupported(
            "max_tokens", "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        ),
        unsupported("temperature", "Unsupported value: 'temperature' does not support 0.7 with this model."),
    ]

    async def work(chat: OpenAIChat) -> list[Reply]:
        return [await chat.reply(a_request(max_tokens=50)), await chat.reply(a_request(max_tokens=60))]

    use(server, work)
    *_, third, fourth = (seen.body for seen in server.seen)
    assert len(server.seen) == 4
    assert (third["max_completion_tokens"], fourth["max_completion_tokens"]) == (50, 60)
    assert not {"max_tokens", "temperature"} & (third.keys() | fourth.keys())
    assert [record.levelname for record in caplog.records if record.name.startswith("anchored")] == ["WARNING"] * 2


def test_an_endpoint_that_refuses_seed_is_asked_without(server: FaultServer) -> None:
    detail = [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]
    server.script = [sends(f'{{"detail": {str(detail).replace(chr(39), chr(34))}}}', status=422)]
    assert ask_one(server).text == "fine"
    assert ["seed" in seen.body for seen in server.seen] == [True, False]


def test_a_parameter_that_is_refused_though_it_was_not_sent_fails_the_row(server: FaultServer) -> None:
    server.always = fails(400, {"message": "'seed' is not supported", "code": "unsupported_parameter"})
    with pytest.raises(ReplyError, match="'seed' is not supported"):
        ask_one(server)
    assert len(server.seen) == 2


def test_an_endpoint_that_refuses_everything_in_the_same_words_stops_the_stage(server: FaultServer) -> None:
    server.script = [fails(400, {"message": "m is not a valid model ID"})] * 5

    async def five(chat: OpenAIChat) -> list[str]:
        errors = [await asyncio.gather(chat.reply(a_request(str(n))), return_exceptions=True) for n in range(5)]
        return [type(error).__name__ for (error,) in errors]

    assert use(server, five, stop_after_failures=3) == ["ReplyError"] * 2 + ["ModelError"] * 3
    assert len(server.seen) == 3


@pytest.mark.parametrize("answered_before", [True, False])
def test_rows_that_an_endpoint_minds_stop_nothing(server: FaultServer, answered_before: bool) -> None:
    message = "odd request" if answered_before else "maximum context length is 10 tokens"
    server.script = [says("fine")] * answered_before + [fails(400, {"message": message})] * 4

    async def all_of_them(chat: OpenAIChat) -> list[str]:
        found = [await asyncio.gather(chat.reply(a_request(str(n))), return_exceptions=True) for n in range(4)]
        return [type(one).__name__ for (one,) in found[1:]]

    assert use(server, all_of_them, stop_after_failures=2) == ["ReplyError"] * 3


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl to make a certificate")
def test_a_certificate_of_ones_own_is_believed_where_the_environment_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = f"req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {certificate} -days 1 -subj /CN=localhost"
    named = ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(["openssl", *made.split(), *named], check=True, capture_output=True)
    server = FaultServer(always=says("fine"))
    server.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.tls.load_cert_chain(certificate, key)
    with server:
        with pytest.raises(
            ModelError, match=r"certificate of https://127.* is not trusted .*self-signed.*SSL_CERT_FILE"
        ):
            ask_one(server, retries=0)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
        with pytest.raises(ModelError, match=r"SSL_CERT_FILE is '.*none.pem', which holds no certificates"):
            ask_one(server)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert ask_one(server).text == "fine"
