"""Local servers: command lines, and processes that start, fail, hang, end and are ended, with a small server of ours.

vLLM and SGLang themselves need a GPU and are not run here; `transformers serve` is, in test_transformers_serve.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import processes
import pytest
from tiny_models import save_folder

from anchored.errors import AnchoredError, ModelError, Stopped
from anchored.llm import serve
from anchored.llm.chat import Request
from anchored.llm.serve import Served, command_line, most_in_flight, request_body, request_model
from anchored.llm.served_chat import ServedChat
from anchored.llm.settings import EndpointSettings
from anchored.records import Message

SMALL_SERVER = Path(__file__).with_name("small_server.py")
T = TypeVar("T")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture
def served(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    """A model behind the small server, in the place of vLLM."""
    engine = replace(serve._ENGINES["vllm"], program=lambda: [sys.executable, str(SMALL_SERVER)])
    monkeypatch.setitem(serve._ENGINES, "vllm", engine)  # type: ignore[arg-type]
    monkeypatch.setattr(serve, "GRACE_SECONDS", 0.5)
    return Served("vllm", folder, "small", tmp_path / "run" / "serve-small.log", options={"mark": str(tmp_path)})


def a_request(text: str = "hi", **fields: Any) -> Request:
    return Request((Message("user", text),), **fields)


def use(served: Served, work: Callable[[ServedChat], Awaitable[T]]) -> T:
    async def main() -> T:
        chat = ServedChat(served, EndpointSettings(model="small", serve="vllm"), lambda _: None)
        try:
            return await work(chat)
        finally:
            await chat.close()

    return asyncio.run(main())


def told(text: str) -> dict[str, Any]:
    return json.loads(text)


# command lines


def test_the_command_line_of_vllm(tmp_path: Path) -> None:
    options = {"tensor-parallel-size": 8, "dtype": "bfloat16", "max-model-len": 8192, "seed": 3, "chat-template": "t.j"}
    served = Served("vllm", tmp_path, "org/model", tmp_path / "log", options)
    assert command_line(served, 8123, ["vllm", "serve"]) == [
        "vllm",
        "serve",
        str(tmp_path),
        "--host=127.0.0.1",
        "--port=8123",
        "--served-model-name=org/model",
        "--generation-config=vllm",
        "--tensor-parallel-size=8",
        "--dtype=bfloat16",
        "--max-model-len=8192",
        "--seed=3",
        "--chat-template=t.j",
    ]
    assert request_model(served) == "org/model"
    assert most_in_flight(served, 200) == 200


def test_the_command_line_of_sglang(tmp_path: Path) -> None:
    options = {"tp": 4, "context-length": 4096, "random-seed": 1}
    served = Served("sglang", tmp_path, "org/model", tmp_path / "log", options)
    assert command_line(served, 8123, ["python", "-m", "sglang.launch_server"]) == [
        "python",
        "-m",
        "sglang.launch_server",
        "--model-path",
        str(tmp_path),
        "--host=127.0.0.1",
        "--port=8123",
        "--served-model-name=org/model",
        "--sampling-defaults=openai",
        "--tp=4",
        "--context-length=4096",
        "--random-seed=1",
    ]


def test_the_command_line_of_transformers_serve(tmp_path: Path) -> None:
    served = Served("transformers", tmp_path, "org/model", tmp_path / "log", {"device": "cpu"})
    program = ["python", "-m", "transformers.cli.transformers", "serve"]
    assert command_line(served, 8123, program) == [
        *program,
        str(tmp_path),
        "--host=127.0.0.1",
        "--port=8123",
        "--device=cpu",
    ]
    # it answers to the path it was started with, and one request after the other
    assert request_model(served) == str(tmp_path)
    assert most_in_flight(served, 200) == 1
    assert most_in_flight(replace(served, options={"continuous-batching": True}), 200) == 200


def test_options_take_every_form(tmp_path: Path) -> None:
    options = {
        "enforce-eager": True,
        "enable-prefix-caching": False,
        "generation-config": None,
        "speculative-config": {"model": "small", "num_speculative_tokens": 4},
        "middleware": ["a", "b"],
    }
    line = command_line(Served("vllm", tmp_path, "m", tmp_path / "log", options), 1, ["vllm", "serve"])
    assert line[6:] == [
        "--enforce-eager",
        "--no-enable-prefix-caching",
        '--speculative-config={"model": "small", "num_speculative_tokens": 4}',
        "--middleware",
        "a",
        "b",
    ]


def test_a_request_says_where_to_end_and_transformers_serve_must_be_told_to_sample() -> None:
    assert request_body("vllm", [2, 5]) == {"stop_token_ids": [2, 5]}
    assert request_body("sglang", []) == {}
    told = json.loads(request_body("transformers", [2, 5])["generation_config"])
    assert (told["do_sample"], told["top_k"], told["eos_token_id"]) == (True, 0, [2, 5])


# processes


def test_a_server_answers_and_leaves_nothing_behind(served: Served) -> None:
    async def work(chat: ServedChat) -> list[Any]:
        assert not processes.having(str(served.options["mark"])), "started before anybody asked"
        replies = await asyncio.gather(*(chat.reply(a_request(f"question {n}")) for n in range(5)))
        # keeper, server, and what the server started
        assert len(processes.having(str(served.options["mark"]))) == 3
        return replies

    replies = use(served, work)
    assert not processes.having(str(served.options["mark"]))
    assert {reply.model for reply in replies} == {"small"}
    questions = {told(reply.text)["body"]["messages"][0]["content"] for reply in replies}
    assert questions == {f"question {n}" for n in range(5)}
    assert "POST /v1/chat/completions" in served.log.read_text()


def test_what_it_waits_for_is_said(served: Served) -> None:
    notes: list[str] = []

    async def main() -> None:
        server = await serve.start(served, notes.append)
        await server.stop()
        await server.stop()

    asyncio.run(main())
    assert "starting vllm on 127.0.0.1:" in notes[0]
    assert str(served.log) in notes[0]
    assert "vllm is ready after" in notes[1]


def test_no_key_goes_to_a_server_and_it_is_told_to_be_quiet(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "VLLM_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "a secret")
    served = replace(served, environment={"CUDA_VISIBLE_DEVICES": "4,5"})
    reply = use(served, lambda chat: chat.reply(a_request()))
    seen = told(reply.text)
    assert "a secret" not in reply.text
    assert seen["key"] is None
    assert seen["environment"]["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert seen["environment"]["VLLM_NO_USAGE_STATS"] == "1"


def fails(served: Served, expected: type[AnchoredError] = ModelError) -> str:
    with pytest.raises(expected) as caught:
        use(served, lambda chat: chat.reply(a_request()))
    assert processes.all_gone(str(served.options["mark"]), seconds=0)
    return str(caught.value)


def test_a_server_that_dies_at_its_start_is_quoted(served: Served) -> None:
    message = fails(replace(served, environment={"MODE": "dies"}))
    assert "small: vllm ended before it was ready" in message
    assert "RuntimeError: no memory for them" in message
    assert "exit code 3" in message
    assert str(served.log) in message


def test_a_server_that_never_gets_ready_is_told_of_and_ended(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_NOTE_SECONDS", 0.1)
    hanging = replace(served, environment={"MODE": "hangs"})

    class Heard(Exception):
        """What it says of itself is passed on."""

    def note(text: str) -> None:
        if "small: vllm is still starting after" in text and "GET /health" in text:
            raise Heard

    with pytest.raises(Heard):
        asyncio.run(serve.start(hanging, note))
    message = fails(replace(hanging, start_seconds=0.5))
    assert re.search(r"was not ready after \d+ s; raise serve_seconds", message)


def test_a_server_that_answers_no_question_is_found_out_at_its_start(served: Served) -> None:
    assert "the template takes no user turn" in fails(replace(served, environment={"MODE": "refuses"}))


def test_a_server_that_ignores_sigterm_is_killed(served: Served) -> None:
    reply = use(replace(served, environment={"MODE": "stubborn"}), lambda chat: chat.reply(a_request()))
    assert reply.finish_reason == "stop"
    assert not processes.having(str(served.options["mark"]))


def test_a_port_that_was_taken_meanwhile_is_no_end(served: Served, tmp_path: Path) -> None:
    mark = tmp_path / "first"
    reply = use(replace(served, environment={"MODE": "taken", "MARK": str(mark)}), lambda chat: chat.reply(a_request()))
    assert reply.finish_reason == "stop"
    assert "Address already in use" in served.log.read_text()


def test_a_server_that_ends_in_the_middle_stops_everything_at_once(served: Served) -> None:
    async def work(chat: ServedChat) -> None:
        await chat.reply(a_request())
        with pytest.raises(Stopped, match="in the middle of the work"):
            await asyncio.wait_for(chat.reply(a_request("end")), 60)
        with pytest.raises(Stopped, match="exit code 7"):
            await asyncio.wait_for(chat.reply(a_request()), 60)

    use(served, work)
    assert not processes.having(str(served.options["mark"]))


def test_a_keeper_that_is_killed_takes_the_server_with_it(served: Served) -> None:
    async def work(chat: ServedChat) -> None:
        await chat.reply(a_request())
        assert chat._server
        os.kill(chat._server._process.pid, signal.SIGKILL)
        await asyncio.wait_for(chat._server.ended, 60)
        with pytest.raises(Stopped):
            await chat.reply(a_request())
        assert processes.all_gone(str(served.options["mark"]))

    use(served, work)


def test_an_interruption_while_it_starts_leaves_nothing(served: Served) -> None:
    served = replace(served, environment={"MODE": "hangs"})

    async def main() -> None:
        chat = ServedChat(served, EndpointSettings(model="small", serve="vllm"), lambda _: None)
        asking = asyncio.create_task(chat.reply(a_request()))
        while not processes.having(str(served.options["mark"])):
            await asyncio.sleep(0.02)
        asking.cancel()
        await chat.close()

    asyncio.run(main())
    assert not processes.having(str(served.options["mark"]))


OWNER = """
import asyncio, sys
from dataclasses import replace
from pathlib import Path
from anchored.llm import serve

async def main():
    program = lambda: [sys.executable, sys.argv[1]]
    serve._ENGINES = {"vllm": replace(serve._ENGINES["vllm"], program=program)}
    place = Path(sys.argv[2])
    await serve.start(serve.Served("vllm", place, "small", place / "log"), lambda _: None)
    print("ready", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda by: by.name)
def test_a_server_does_not_outlive_the_process_that_wanted_it(tmp_path: Path, by: signal.Signals) -> None:
    place = tmp_path / "owned"
    place.mkdir()
    command = [sys.executable, "-c", OWNER, str(SMALL_SERVER), str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as owner:
        assert owner.stdout
        assert owner.stdout.readline() == "ready\n"
        # itself, keeper, server, and what the server started
        assert len(processes.having(str(place))) == 4
        owner.send_signal(by)
        owner.wait(60)
    assert processes.all_gone(str(place))


# what cannot be served


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_what_is_not_installed_is_one_line_with_the_pip_command(
    folder: Path, tmp_path: Path, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ModelError, match=f"pip install {engine}") as caught:
        ServedChat(
            Served(engine, folder, "m", tmp_path / "log"), EndpointSettings(model="m", serve=engine), lambda _: None
        )
    assert "\n" not in str(caught.value)


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="adapter cannot be served"):
        serve.check_servable("vllm", tmp_path)


# whose replies are whose


def fingerprint(folder: Path, engine: Any = "transformers", **settings: Any) -> str:
    served = Served(engine, folder, "m", folder / "log", settings.get("serve_options", {}))
    return ServedChat(served, EndpointSettings(model="m", serve=engine, **settings), lambda _: None).fingerprint


def test_replies_belong_to_weights_engine_and_what_shapes_them(folder: Path, served: Served, tmp_path: Path) -> None:
    of_the_folder = fingerprint(folder)
    assert fingerprint(folder, "vllm") != of_the_folder
    assert fingerprint(save_folder(tmp_path / "other", seed=1)) != of_the_folder
    assert fingerprint(folder, serve_options={"dtype": "float16"}) != of_the_folder
    assert fingerprint(folder, extra_body={"top_k": 5}) != of_the_folder
    how: Mapping[str, Any] = {"device": "cpu", "tensor-parallel-size": 2}
    assert fingerprint(folder, serve_options=how, serve_env={"CUDA_VISIBLE_DEVICES": 0}) == of_the_folder
