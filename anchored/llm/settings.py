"""What is set about sampling and about endpoints."""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from anchored.llm.chat import Request
from anchored.records import Message
from anchored.settings import Settings

OPENAI = "https://api.openai.com/v1"
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)


class Sampling(Settings):
    """How a model draws its answers."""

    temperature: float = Field(default=0.7, ge=0, le=2)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the likeliest tokens that hold this much of the probability."""
    max_tokens: int = Field(default=1024, ge=1)
    """Longest answer; thinking text counts."""

    def request(self, messages: Sequence[Message], *, index: int = 0, seed: int = 0) -> Request:
        """The request for one sample with these settings."""
        return Request(tuple(messages), self.temperature, self.top_p, self.max_tokens, index, seed)


class SampleSettings(Sampling):
    """Answers drawn from a model in this process."""

    how_only: ClassVar[frozenset[str]] = frozenset({"batch_size"})

    batch_size: int = Field(default=16, ge=1)
    """Prompts generated side by side."""


class Address(Settings):
    """Where an endpoint is, and which key it takes."""

    base_url: str
    """What stands before `/chat/completions`; it usually ends in /v1."""
    key_env: str | None = "OPENAI_API_KEY"
    """The environment variable that holds the key; null: none is sent. Left out: none to this machine, and elsewhere
    than at api.openai.com it must be said, so that no key reaches a stranger."""

    @model_validator(mode="before")
    @classmethod
    def _no_key_for_strangers(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "key_env" in data:
            return data
        url = str(data.get("base_url", OPENAI))
        if data.get("serve") or is_loopback(url):
            return {**data, "key_env": None}
        if urlsplit(url).hostname != urlsplit(OPENAI).hostname:
            raise ValueError(f"key_env: name the environment variable that holds the key of {url} (null: no key)")
        return data

    @field_validator("key_env")
    @classmethod
    def _is_a_name(cls, variable: str | None) -> str | None:
        if variable is not None and not _VARIABLE.fullmatch(variable):
            raise ValueError("names an environment variable; what stands here is no such name, or the key itself")
        return variable

    @field_validator("base_url")
    @classmethod
    def _is_a_base_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no address such as {OPENAI}")
        if "@" in parts.netloc:
            raise ValueError("the address holds a user or a password; put the key in a variable and name it in key_env")
        if parts.path.rstrip("/").endswith("/completions"):
            raise ValueError(f"{url!r} goes too far; leave off what begins with /chat/completions")
        return url.rstrip("/")


class Price(Settings):
    """What a model's tokens cost, in USD per million."""

    how_only: ClassVar[frozenset[str]] = frozenset({"input", "output", "cached_input"})

    input: float = Field(ge=0, allow_inf_nan=False)
    """Of the prompt's tokens."""
    output: float = Field(ge=0, allow_inf_nan=False)
    """Of the reply's tokens; those of its thinking count."""
    cached_input: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Of prompt tokens that the endpoint had kept from before; null: as input."""


class EndpointSettings(Sampling, Address):
    """A model behind an OpenAI-compatible endpoint: OpenAI and most providers, vLLM, SGLang, `transformers serve`."""

    how_only: ClassVar[frozenset[str]] = frozenset(
        {
            "base_url",
            "key_env",
            "more_endpoints",
            "concurrency",
            "requests_per_minute",
            "tokens_per_minute",
            "price",
            "timeout_seconds",
            "retries",
            "stop_after_failures",
            "patience_seconds",
        }
    )

    model: str = Field(min_length=1)
    """The name that the endpoint knows it by."""
    base_url: str = OPENAI
    """What stands before `/chat/completions`; it usually ends in /v1."""
    more_endpoints: tuple[Address, ...] = ()
    """Others that have the same model, or other keys to the same one (`[{base_url: ..., key_env: ...}]`): each request
    goes to the least busy, and one that ends (wrong key, no money, down) is left out while the others go on."""
    serve: Literal["pocket"] | None = None
    """Start this server for the stage, instead of base_url."""
    max_tokens: int = Field(default=4096, ge=1)
    """Longest answer; thinking text counts."""
    send_seed: bool = True
    """Send a seed drawn from the run's seed, the messages and the sample's index, so that samples differ and can be
    drawn again. An endpoint that refuses it is asked without."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """More keys for the request's JSON, as the endpoint wants them (reasoning_effort, chat_template_kwargs)."""
    concurrency: int = Field(default=64, ge=1, le=1000)
    """Most requests in flight at each endpoint; fewer after a 429, and slowly more again."""
    requests_per_minute: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Most requests sent per minute to each endpoint, evenly spaced; null: what its `x-ratelimit-*` headers say."""
    tokens_per_minute: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Most tokens per minute of each endpoint, prompts and replies together; null: what its headers say."""
    price: Price | None = None
    """What its tokens cost, `{input: 2.5, output: 10}` in USD per million; null: money is not counted."""
    timeout_seconds: float = Field(default=600, gt=0)
    """Longest wait for one reply; a request that timed out is sent at most twice more."""
    retries: int = Field(default=8, ge=0)
    """How often a request is sent again after 408, 409, 5xx, a broken connection or a reply that is no JSON."""
    stop_after_failures: int = Field(default=20, ge=1)
    """This many requests in a row without a reply, retries included: the endpoint is down, and the stage stops."""
    patience_seconds: float = Field(default=900, gt=0)
    """How long the endpoint may answer 429 to everything, or ask us to wait, before the stage stops."""

    def at(self, address: Address) -> EndpointSettings:
        """The same at one other address."""
        changed = {"base_url": address.base_url, "key_env": address.key_env, "more_endpoints": ()}
        return self.model_copy(update=changed)


def is_loopback(url: str) -> bool:
    """Whether an address is this machine's own."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
