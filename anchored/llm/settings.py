"""What is set about sampling and about endpoints."""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from anchored.llm.chat import Request
from anchored.records import Message
from anchored.settings import Settings

OPENAI = "https://api.openai.com/v1"
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)

Engine = Literal["vllm", "sglang", "transformers"]
"""The servers that can be started for a model folder."""

_SECRET = re.compile(
    r"(?:^|[_-])(?:api[_-]?key|authorization|(?:hf|hub|api|auth|access|bearer)[_-]token|secret|password)$",
    re.IGNORECASE,
)

_OURS = {"host", "port", "model", "model-path", "served-model-name", "api-key", "force-model"}

_HOW = """
tensor-parallel-size pipeline-parallel-size data-parallel-size enable-expert-parallel gpu-memory-utilization
max-num-seqs max-num-batched-tokens max-model-len block-size swap-space cpu-offload-gb enforce-eager seed
enable-prefix-caching enable-chunked-prefill distributed-executor-backend uvicorn-log-level disable-log-stats

tp-size tp pp-size pp dp-size dp ep-size mem-fraction-static max-running-requests max-total-tokens context-length
chunked-prefill-size max-prefill-tokens page-size schedule-policy schedule-conservativeness disable-radix-cache
disable-cuda-graph cuda-graph-max-bs base-gpu-id random-seed log-level

device compile continuous-batching cb-block-size cb-num-blocks cb-max-batch-tokens cb-max-memory-percent
cb-use-cuda-graph default-seed
"""
HOW_OPTIONS = frozenset(_HOW.split())
"""Options of the servers that say how, never what: another one asks nothing again. All others count as what, as dtype,
quantization or chat-template do."""


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


class Price(Settings):
    """What a model's tokens cost, in USD per million."""

    how_only: ClassVar[frozenset[str]] = frozenset({"input", "output", "cached_input"})

    input: float = Field(ge=0, allow_inf_nan=False)
    """Of the prompt's tokens."""
    output: float = Field(ge=0, allow_inf_nan=False)
    """Of the reply's tokens; those of its thinking count."""
    cached_input: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Of prompt tokens that the endpoint had kept from before; null: as input."""


class ServedSampling(Sampling):
    """Answers of a model whose server we may start ourselves."""

    how_only: ClassVar[frozenset[str]] = frozenset(
        ["serve_env", "serve_seconds", *(f"serve_options.{key}" for key in HOW_OPTIONS)]
    )

    serve_options: dict[str, Any] = Field(default_factory=dict)
    """More options of the server's command line, without dashes: {tensor-parallel-size: 8, max-model-len: 8192}. true
    is a bare flag, false its --no- form; null takes one of ours away."""
    serve_env: dict[str, str | int] = Field(default_factory=dict)
    """More environment variables of the server: {CUDA_VISIBLE_DEVICES: "0,1"}."""
    serve_seconds: float = Field(default=1200, gt=0)
    """Longest wait until the server is ready."""

    @field_validator("serve_options")
    @classmethod
    def _are_free(cls, options: dict[str, Any]) -> dict[str, Any]:
        plain = {name.lstrip("-").replace("_", "-"): value for name, value in options.items()}
        if taken := sorted(_OURS & set(plain)):
            raise ValueError(f"{taken[0]} is set for you: the server is of this model, on a free port of this machine")
        return plain

    @field_validator("serve_options", "serve_env", "extra_body", check_fields=False)
    @classmethod
    def _hold_no_key(cls, given: dict[str, Any]) -> dict[str, Any]:
        if name := _secret_in(given):
            raise ValueError(
                f"{name}: keys do not stand in recipes, which are written into run folders; put it in an environment "
                "variable, which key_env names for an endpoint, and which a server that is started here never gets"
            )
        return given

    @model_validator(mode="after")
    def _has_a_server(self) -> Self:
        if (self.serve_options or self.serve_env) and getattr(self, "serve", None) in (None, "pocket"):
            raise ValueError("serve_options and serve_env are for a server that is started here; set serve too")
        return self

    def shaping_options(self) -> dict[str, Any]:
        """The options of the server that may change what it answers, not only how."""
        return {name: value for name, value in self.serve_options.items() if name not in HOW_OPTIONS}


class LocalSampling(ServedSampling):
    """Answers drawn from a model's own weights: in this process, or by a server that is started for it."""

    how_only: ClassVar[frozenset[str]] = ServedSampling.how_only | {"batch_size", "concurrency"}

    batch_size: int = Field(default=16, ge=1)
    """Prompts generated side by side in this process."""
    serve: Engine | None = None
    """Start this server for the stage: vllm, sglang, or transformers (`transformers serve`). null: the model answers in
    this process."""
    concurrency: int = Field(default=256, ge=1, le=1000)
    """Most requests in flight to a server. `transformers serve` gets one at a time unless its continuous-batching is
    on."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """More keys for the JSON of each request to a server (top_k, min_p, chat_template_kwargs)."""

    def endpoint(self, model: str) -> EndpointSettings:
        """What a client of the server of `model` needs. Answers are trained on without thoughts, so none are asked
        for; templates that have no such switch ignore it."""
        return EndpointSettings(
            **{name: getattr(self, name) for name in (*ServedSampling.model_fields, "serve", "concurrency")},
            model=model,
            timeout_seconds=3600,  # whether the server is alive is seen otherwise
            key_env=None,
            extra_body={"chat_template_kwargs": {"enable_thinking": False}, **self.extra_body},
        )


class SampleSettings(LocalSampling):
    """Answers drawn from the policy: in this process, by a server that is started, or by one that already runs."""

    how_only: ClassVar[frozenset[str]] = LocalSampling.how_only | {"base_url", "key_env", "price"}

    base_url: str | None = None
    """Where a server of yours already answers for the policy: what stands before `/chat/completions`."""
    model: str | None = None
    """The name by which the server at base_url knows the policy."""
    key_env: str | None = None
    """The environment variable that holds that server's key; null: none is sent."""
    price: Price | None = None
    """What tokens cost at base_url, as of a teacher; null: money is not counted."""

    @field_validator("base_url")
    @classmethod
    def _is_a_base_url(cls, url: str | None) -> str | None:
        return None if url is None else Address._is_a_base_url(url)

    @field_validator("key_env")
    @classmethod
    def _is_a_name(cls, variable: str | None) -> str | None:
        return Address._is_a_name(variable)

    @model_validator(mode="after")
    def _is_in_one_place(self) -> SampleSettings:
        if self.base_url is None:
            if self.model or self.key_env or self.price:
                raise ValueError("model, key_env and price belong to a server that already runs; set base_url too")
            if self.extra_body and self.serve is None:
                raise ValueError("extra_body is for the requests to a server; set serve or base_url too")
            return self
        if self.serve:
            raise ValueError(f"serve starts a server and base_url ({self.base_url}) is one that runs; leave one out")
        if self.model is None:
            raise ValueError(f"model is missing: the name by which the server at {self.base_url} knows the policy")
        return self

    def elsewhere(self) -> EndpointSettings | None:
        """The endpoint that already has the policy, if there is one."""
        if self.base_url is None or self.model is None:
            return None
        shared = (*Sampling.model_fields, "concurrency", "extra_body", "base_url", "model", "key_env", "price")
        return EndpointSettings(**{name: getattr(self, name) for name in shared})


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
        if "://" not in url:
            return data  # no address at all, as base_url itself says
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


class BatchSettings(Settings):
    """How requests go by an endpoint's Batch API, or to files, where the command says so (`--batch`)."""

    requests: int = Field(default=50_000, ge=1)
    """Most requests in one batch; OpenAI takes 50,000."""
    megabytes: float = Field(default=190, gt=0, allow_inf_nan=False)
    """Largest file of one batch; OpenAI takes 200."""
    under_way: int = Field(default=200_000, ge=1)
    """Most rows of pairs that wait for batches at a time; each takes some 20 kB of memory."""
    linger_seconds: float = Field(default=5, gt=0, allow_inf_nan=False)
    """What has gathered is sent when nothing was asked for so long and the policy has no answer under way."""
    poll_seconds: float = Field(default=60, gt=0, allow_inf_nan=False)
    """Longest wait between two looks at a batch."""
    retries: int = Field(default=3, ge=0)
    """How often a request that got no reply (expired, cancelled, 429, 5xx) goes into another batch."""
    price_factor: float = Field(default=0.5, ge=0, allow_inf_nan=False)
    """What a token costs by batch, as a share of the teacher's price."""

    def price(self, live: Price | None) -> Price | None:
        """The price by batch."""
        if live is None:
            return None
        cached = None if live.cached_input is None else live.cached_input * self.price_factor
        return Price(input=live.input * self.price_factor, output=live.output * self.price_factor, cached_input=cached)


class EndpointSettings(ServedSampling, Address):
    """A model behind an OpenAI-compatible endpoint: OpenAI and most providers, vLLM, SGLang, `transformers serve`."""

    how_only: ClassVar[frozenset[str]] = ServedSampling.how_only | {
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

    model: str = Field(min_length=1)
    """The name that the endpoint knows it by; with `serve`, a Hugging Face folder or Hub id."""
    base_url: str = OPENAI
    """What stands before `/chat/completions`; it usually ends in /v1."""
    more_endpoints: tuple[Address, ...] = ()
    """Others that have the same model, or other keys to the same one (`[{base_url: ..., key_env: ...}]`): each request
    goes to the least busy, and one that ends (wrong key, no money, down) is left out while the others go on."""
    serve: Literal["pocket"] | Engine | None = None
    """Start this server for the stage, instead of base_url: vllm, sglang, transformers (`transformers serve`); `pocket`
    is the pocket world's teacher."""
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

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> EndpointSettings:
        if self.serve and self.serve != "pocket" and self.more_endpoints:
            raise ValueError(f"serve: {self.serve} starts the only server of the model; leave out more_endpoints")
        return self

    def at(self, address: Address) -> EndpointSettings:
        """The same at one other address."""
        changed = {"base_url": address.base_url, "key_env": address.key_env, "more_endpoints": ()}
        return self.model_copy(update=changed)


def _secret_in(given: Any) -> str:
    """The first name of a key in nested settings; "" if there is none."""
    if isinstance(given, list):
        return next(filter(None, map(_secret_in, given)), "")
    if not isinstance(given, dict):
        return ""
    named = next((str(name) for name, value in given.items() if _SECRET.search(str(name)) and value), "")
    return named or _secret_in(list(given.values()))


def is_loopback(url: str) -> bool:
    """Whether an address is this machine's own."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
