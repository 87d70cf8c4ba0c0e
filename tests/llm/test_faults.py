"""Error responses as providers really send them, and what must follow from each."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from anchored.llm.faults import fault_of_status, retry_after

OPENAI_QUOTA = {
    "message": "You exceeded your current quota, please check your plan and billing details.",
    "type": "insufficient_quota",
    "param": None,
    "code": "insufficient_quota",
}
OPENAI_RATE = {
    "message": "Rate limit reached for gpt-4 in organization org-x on tokens per min (TPM): Limit 10000, Used 9500.",
    "type": "tokens",
    "code": "rate_limit_exceeded",
}
OPENAI_TOO_LARGE = {
    "message": "Request too large for gpt-4o on tokens per min (TPM): Limit 30000, Requested 44132.",
    "type": "tokens",
    "code": "rate_limit_exceeded",
}
GEMINI_RATE = [
    {
        "error": {
            "code": 429,
            "message": "You exceeded your current quota, please check your plan and billing details. "
            "Quota exceeded for metric: generate_content_requests_per_minute",
            "status": "RESOURCE_EXHAUSTED",
        }
    }
]
ANTHROPIC_CREDIT = {
    "type": "error",
    "error": {
        "type": "invalid_request_error",
        "message": "Your credit balance is too low to access the Anthropic API.",
    },
}
AZURE_FILTER = {
    "message": "The response was filtered due to the prompt triggering Azure OpenAI's content management policy.",
    "code": "content_filter",
    "status": 400,
}
VLLM_TOO_LONG = {
    "object": "error",
    "message": "This model's maximum context length is 2048 tokens. However, you requested 5000 tokens.",
    "type": "BadRequestError",
    "param": None,
    "code": 400,
}
TOO_MANY_TOKENS_ASKED = {
    "message": "max_tokens is too large: 100000. This model supports at most 4096 completion tokens.",
    "param": "max_tokens",
    "code": None,
}
OPENROUTER_MODERATION = {"error": {"code": 403, "message": "Input was flagged", "metadata": {"reasons": ["violence"]}}}
MISTRAL_SEED = {
    "detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]
}
O1_MAX_TOKENS = {
    "message": "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' "
    "instead.",
    "param": "max_tokens",
    "code": "unsupported_parameter",
}
O1_TEMPERATURE = {
    "message": "Unsupported value: 'temperature' does not support 0.7 with this model. Only the default (1) value is "
    "supported.",
    "param": "temperature",
    "code": "unsupported_value",
}
OVERLOADED = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}


@pytest.mark.parametrize(
    ("status", "body", "follows"),
    [
        (401, {"message": "Incorrect API key"}, "endpoint"),
        (403, "Forbidden", "endpoint"),
        (403, OPENROUTER_MODERATION, "row"),
        (404, {"message": "The model `gpt-5-mega` does not exist", "code": "model_not_found"}, "endpoint"),
        (405, "<html>Method Not Allowed</html>", "endpoint"),
        (301, "", "endpoint"),
        (402, {"error": {"message": "Insufficient Balance"}}, "quota"),
        (429, OPENAI_QUOTA, "quota"),
        (429, {"message": "billing_hard_limit_reached", "code": "billing_hard_limit_reached"}, "quota"),
        (400, ANTHROPIC_CREDIT, "quota"),
        (403, {"error": "Your team has used all available credits"}, "quota"),
        (429, OPENAI_RATE, "throttled"),
        (429, GEMINI_RATE, "throttled"),
        (429, None, "throttled"),
        (429, OPENAI_TOO_LARGE, "row"),
        (400, AZURE_FILTER, "row"),
        (400, VLLM_TOO_LONG, "row"),
        (400, TOO_MANY_TOKENS_ASKED, "row"),
        (413, "", "row"),
        (400, O1_MAX_TOKENS, "without"),
        (400, O1_TEMPERATURE, "without"),
        (422, MISTRAL_SEED, "without"),
        (408, None, "again"),
        (409, None, "again"),
        (500, "Internal Server Error", "again"),
        (503, None, "again"),
        (529, OVERLOADED, "again"),
    ],
)
def test_what_follows_from_an_error_response(status: int, body: Any, follows: str) -> None:
    fault = fault_of_status(status, {}, body)
    assert fault.follows == follows
    assert fault.reason.startswith(str(status))


def test_the_refused_parameter_is_named() -> None:
    bodies = (O1_MAX_TOKENS, O1_TEMPERATURE, MISTRAL_SEED)
    assert [fault_of_status(400, {}, body).parameter for body in bodies] == ["max_tokens", "temperature", "seed"]


def test_the_reason_is_the_bodys_message_on_one_line() -> None:
    assert fault_of_status(529, {}, OVERLOADED).reason == "529: Overloaded"
    assert fault_of_status(500, {}, "<html>\n  <b>Oh</b>\n</html>").reason == "500: <html> <b>Oh</b> </html>"
    assert fault_of_status(500, {}, None).reason == "500"
    assert len(fault_of_status(500, {}, "x" * 10_000).reason) < 400


@pytest.mark.parametrize("body", [[], {}, 7, "", [[]], {"error": None}, {"error": [1]}, {"message": {"a": 1}}, True])
def test_no_body_is_too_odd(body: Any) -> None:
    assert fault_of_status(500, {}, body).follows == "again"
    assert fault_of_status(400, {}, body).follows == "row"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "12"}, 12.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "tomorrow"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:09 GMT", "date": "Wed, 21 Oct 2015 07:28:00 GMT"}, 9.0),
        ({"retry-after": "Wed, 21 Oct 2065 07:28:09 GMT", "date": "Wed, 21 Oct 2065 07:28:00 GMT"}, 9.0),
        ({}, None),
    ],
)
def test_retry_after_in_all_its_forms(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


def test_retry_after_as_a_date_to_come() -> None:
    then = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=1000)
    most = (then - datetime.now(UTC)).total_seconds()
    wait = retry_after({"retry-after": format_datetime(then, usegmt=True)})
    least = (then - datetime.now(UTC)).total_seconds()
    assert wait is not None
    assert least <= wait <= most
