from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from anchored.llm.chat import Request
from anchored.llm.settings import EndpointSettings, SampleSettings, is_loopback
from anchored.records import Message


@pytest.mark.parametrize(
    ("given", "variable"),
    [
        ({}, "OPENAI_API_KEY"),
        ({"base_url": "https://api.openai.com/v1/"}, "OPENAI_API_KEY"),
        ({"base_url": "http://localhost:8000/v1"}, None),
        ({"base_url": "http://[::1]:8000/v1"}, None),
        ({"serve": "pocket"}, None),
        ({"base_url": "http://127.0.0.1:8000/v1", "key_env": "MINE"}, "MINE"),
        ({"base_url": "https://llm.example/v1", "key_env": None}, None),
        ({"base_url": "https://llm.example/v1", "key_env": "MINE"}, "MINE"),
    ],
)
def test_which_variable_holds_the_key(given: dict[str, Any], variable: str | None) -> None:
    settings = EndpointSettings(model="m", **given)
    assert settings.key_env == variable
    assert EndpointSettings(**settings.model_dump()) == settings


def test_the_key_of_openai_is_sent_to_nobody_else_by_default() -> None:
    with pytest.raises(ValidationError, match=r"key_env: name the environment variable .*https://llm\.example/v1"):
        EndpointSettings(model="m", base_url="https://llm.example/v1")
    with pytest.raises(ValidationError, match="'localhost:8000' is no address such as"):
        EndpointSettings(model="m", base_url="localhost:8000")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("api.openai.com/v1", "is no address"),
        ("", "is no address"),
        ("ftp://x/v1", "is no address"),
        ("https://me:secret@llm.example/v1", "holds a user or a password"),
        ("https://llm.example/v1/chat/completions", "goes too far"),
        ("https://llm.example/v1/chat/completions/", "goes too far"),
        ("http://[broken/v1", "Invalid IPv6 URL"),
    ],
)
def test_an_address_that_cannot_be_one_is_refused(url: str, says: str) -> None:
    with pytest.raises(ValidationError, match=says) as raised:
        EndpointSettings(model="m", base_url=url, key_env=None)
    assert "secret" not in str(raised.value).partition("[type=")[0]


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"max_tokens": 0},
        {"concurrency": 0},
        {"model": ""},
        {"modle": "m"},
    ],
)
def test_impossible_values_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        EndpointSettings(**({"model": "m"} | bad))


@pytest.mark.parametrize(
    ("url", "is_own"),
    [
        ("http://127.0.0.1:1/v1", True),
        ("http://127.9.9.9/v1", True),
        ("http://localhost/v1", True),
        ("http://[::1]/v1", True),
        ("http://localhost.evil.example/v1", False),
        ("http://10.0.0.1/v1", False),
        ("https://api.openai.com/v1", False),
    ],
)
def test_what_is_this_machines_own(url: str, is_own: bool) -> None:
    assert is_loopback(url) == is_own


def test_settings_make_the_request() -> None:
    messages = (Message("user", "hi"),)
    assert SampleSettings(temperature=0.2).request(messages, index=3, seed=5) == Request(messages, 0.2, 1.0, 1024, 3, 5)


def test_options_of_a_server_are_written_in_any_way() -> None:
    sample = SampleSettings(serve="vllm", serve_options={"--tensor-parallel-size": 8, "max_model_len": 4096})
    assert sample.serve_options == {"tensor-parallel-size": 8, "max-model-len": 4096}
    assert sample.shaping_options() == {}
    assert SampleSettings(serve="vllm", serve_options={"dtype": "half", "tp": 2}).shaping_options() == {"dtype": "half"}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"serve": "vllm", "serve_options": {"host": "0.0.0.0"}}, "host is set for you"),
        ({"serve": "vllm", "serve_options": {"api_key": "x"}}, "api-key is set for you"),
        ({"serve": "pocket"}, "serve"),
        ({"serve_options": {"tp": 8}}, "set serve too"),
        ({"serve_env": {"CUDA_VISIBLE_DEVICES": 0}}, "set serve too"),
        ({"extra_body": {"top_k": 5}}, "set serve or base_url too"),
        ({"serve": "vllm", "base_url": "http://127.0.0.1:1/v1", "model": "m"}, "leave one out"),
        ({"base_url": "http://127.0.0.1:1/v1"}, "model is missing"),
        ({"model": "m"}, "set base_url too"),
        ({"base_url": "127.0.0.1:1", "model": "m"}, "is no address"),
        ({"base_url": "http://127.0.0.1:1/v1", "model": "m", "key_env": "sk-123"}, "names an environment variable"),
    ],
)
def test_a_policy_answers_in_one_place(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        SampleSettings(**given)


def test_a_policy_elsewhere_is_asked_as_its_settings_say() -> None:
    assert SampleSettings().elsewhere() is None
    sample = SampleSettings(
        temperature=0.3, base_url="https://llm.example/v1", model="mine", key_env="MINE", extra_body={"top_k": 5}
    )
    endpoint = sample.elsewhere()
    assert endpoint is not None
    assert (endpoint.model, endpoint.base_url, endpoint.key_env) == ("mine", "https://llm.example/v1", "MINE")
    assert (endpoint.temperature, endpoint.concurrency, endpoint.extra_body) == (0.3, 256, {"top_k": 5})


def test_a_policy_is_served_without_thoughts_and_without_a_key() -> None:
    endpoint = SampleSettings(temperature=0.3, serve="sglang", serve_options={"dtype": "half"}).endpoint("m")
    assert endpoint.extra_body == {"chat_template_kwargs": {"enable_thinking": False}}
    assert (endpoint.key_env, endpoint.temperature) == (None, 0.3)
    assert endpoint.shaping_options() == {"dtype": "half"}


def test_more_endpoints_have_the_same_rules_about_keys() -> None:
    here, elsewhere = {"base_url": "http://127.0.0.1:8001/v1/"}, {"base_url": "https://llm.example/v1"}
    settings = EndpointSettings(model="m", more_endpoints=[here, {**elsewhere, "key_env": "MINE"}])  # pyright: ignore[reportArgumentType]
    assert [(one.base_url, one.key_env) for one in settings.more_endpoints] == [
        ("http://127.0.0.1:8001/v1", None),
        ("https://llm.example/v1", "MINE"),
    ]
    assert EndpointSettings(**settings.model_dump()) == settings
    second = settings.at(settings.more_endpoints[1])
    assert (second.base_url, second.key_env, second.more_endpoints) == ("https://llm.example/v1", "MINE", ())
    for wrong, says in (
        (elsewhere, "key_env: name the environment variable"),
        ({"key_env": "MINE"}, "base_url"),  # to whom would it be sent?
        ({"base_url": "https://me:secret@llm.example/v1", "key_env": None}, "holds a user or a password"),
    ):
        with pytest.raises(ValidationError, match=says):
            EndpointSettings(model="m", more_endpoints=[wrong])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "bad", [{"requests_per_minute": 0}, {"tokens_per_minute": -1}, {"price": {"input": 1}}, {"price": {"output": -1}}]
)
def test_rates_and_prices_are_numbers_that_can_be(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        EndpointSettings(model="m", **bad)


def test_a_server_that_is_started_is_the_only_one() -> None:
    with pytest.raises(ValidationError, match="leave out more_endpoints"):
        EndpointSettings(model="m", serve="vllm", more_endpoints=[{"base_url": "http://127.0.0.1:1/v1"}])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "given",
    [
        {"extra_body": {"api_key": "sk-planted"}},
        {"extra_body": {"router": [{"headers": {"Authorization": "Bearer sk-planted"}}]}},
        {"serve": "vllm", "serve_env": {"HF_TOKEN": "sk-planted"}},
        {"serve": "vllm", "serve_options": {"hf-token": "sk-planted"}},
    ],
)
@pytest.mark.parametrize("settings", [EndpointSettings, SampleSettings])
def test_no_key_stands_in_a_recipe(settings: type[EndpointSettings], given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="keys do not stand in recipes"):
        settings.model_validate({"model": "m", "base_url": "http://127.0.0.1:1/v1", **given})


def test_what_only_looks_like_a_key_may_stand_there() -> None:
    body = {"stop_token_ids": [1], "eos_token": "</s>", "max_tokens_secretly": 3, "api_key": None}
    assert EndpointSettings(model="m", extra_body=body).extra_body == body
