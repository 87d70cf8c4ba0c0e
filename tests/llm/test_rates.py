from __future__ import annotations

import pytest

from anchored.llm.rates import SLACK, Pace, Quota, Quotas, TokenGuess, read_quotas, read_seconds


def sent_at(pace: Pace, amounts: list[float], *, late: float = 0.0, start: float = 1000.0) -> list[float]:
    """When each is sent by one who always has the next one ready, and wakes a little late."""
    now, moments = start, []
    for amount in amounts:
        if pace.due() > now:
            now = pace.due() + late
        pace.take(amount, now)
        moments.append(now)
    return moments


def most_in_a_minute(moments: list[float], amounts: list[float]) -> float:
    most = inside = 0.0
    begin = 0
    for moment, amount in zip(moments, amounts, strict=True):
        inside += amount
        while moments[begin] <= moment - 60 + 1e-6:
            inside -= amounts[begin]
            begin += 1
        most = max(most, inside)
    return most


@pytest.mark.parametrize("late", [0.0, 0.003, 0.02])
@pytest.mark.parametrize("per_minute", [1, 7, 60, 600, 12_000])
def test_a_minute_never_holds_more_than_its_share_and_nearly_all_of_it(per_minute: int, late: float) -> None:
    count = 3 * per_minute + 1
    moments = sent_at(Pace(per_minute), [1] * count, late=late)
    assert most_in_a_minute(moments, [1] * count) <= per_minute
    if per_minute > 100:  # the long run has the rate, though every wake was late
        assert count / (moments[-1] - moments[0]) > 0.985 * per_minute / 60


def test_a_minute_begins_without_a_burst() -> None:
    moments = sent_at(Pace(600), [1] * 1200)
    for second in range(int(moments[-1] - moments[0])):
        assert sum(second <= at - moments[0] < second + 1 for at in moments) <= 10 * (1 + SLACK) + 1


def test_idle_time_is_not_saved_up() -> None:
    pace = Pace(600)
    sent_at(pace, [1] * 10)
    moments = sent_at(pace, [1] * 100, start=5000.0)
    assert sum(at < 5001 for at in moments) <= 10 * (1 + SLACK) + 1


def test_uneven_amounts_keep_to_the_rate_but_for_the_last() -> None:
    amounts = [float(size) for size in (500, 30, 4000, 200, 200, 1200) * 40]
    moments = sent_at(Pace(20_000), amounts)
    assert most_in_a_minute(moments, amounts) <= 20_000 + 4000
    assert sum(amounts) / (moments[-1] - moments[0]) > 0.97 * 20_000 / 60


def test_what_is_larger_than_a_minutes_share_is_sent_and_waited_for_after() -> None:
    first, second = sent_at(Pace(1000), [3000, 1])
    assert first == 1000.0
    assert second - first == pytest.approx(3 * 60.5, abs=SLACK + 0.01)


def test_what_was_not_used_comes_back() -> None:
    pace = Pace(60_000)
    pace.take(4096, 1000.0)
    pace.give_back(3096)
    assert pace.due() == pytest.approx(1001, abs=SLACK + 0.01)
    pace.give_back(-500)
    assert pace.due() == pytest.approx(1001.5, abs=SLACK + 0.02)


def test_without_a_limit_everything_goes_at_once() -> None:
    assert sent_at(Pace(), [1] * 1000) == [1000.0] * 1000


def test_a_limit_that_is_heard_holds_and_one_that_is_set_holds_against_it() -> None:
    heard, fixed = Pace(), Pace(60)
    for pace in (heard, fixed):
        pace.heard(Quota(limit=600, remaining=None, reset=None), sent=1000.0)
    assert (heard.per_minute, fixed.per_minute) == (600, 60)


def test_nothing_is_sent_while_nothing_is_left_and_newer_word_ends_that() -> None:
    pace = Pace()
    pace.heard(Quota(600, 0, 20), sent=1000.0)
    assert pace.due() == 1020.0
    pace.heard(Quota(600, 0, 50), sent=990.0)  # older than what is known
    assert pace.due() == 1020.0
    pace.heard(Quota(600, 300, 30), sent=1001.0)
    assert pace.due() <= 1001.0


def test_a_quota_that_comes_back_after_hours_holds_nobody_for_longer_than_a_minute() -> None:
    pace = Pace()
    pace.heard(Quota(14_400, 0, 86_400), sent=1000.0)
    assert pace.due() == 1060.0


def test_what_is_left_of_a_fixed_window_is_spread_over_its_rest() -> None:
    """Someone else used the key: 20 are left for the next 40 s, though 600 a minute is the limit."""
    pace = Pace()
    pace.heard(Quota(600, 20, 40), sent=1000.0)
    moments = sent_at(pace, [1] * 40)
    assert 18 <= sum(at < 1040 for at in moments) <= 21


def test_a_bucket_that_fills_bit_by_bit_is_emptied_no_further_than_half() -> None:
    """The endpoint's own bucket, with the headers that it would send; another client takes half of the rate."""
    pace, level, now, limit = Pace(), 600.0, 1000.0, 600.0
    lowest, sent = level, 0
    for _ in range(3000):
        due = max(now, pace.due())
        level = min(limit, level + (due - now) * limit / 60 * 0.5)
        now = due
        assert level >= 1, "a 429"
        level -= 1
        sent += 1
        lowest = min(lowest, level)
        pace.take(1, now)
        pace.heard(Quota(limit, int(level), (limit - level) * 60 / limit), sent=now)
    assert lowest > 100
    assert sent / (now - 1000) > 0.45 * limit / 60


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1),
        ("6m0s", 360),
        ("20ms", 0.02),
        ("1h2m3.5s", 3723.5),
        ("59.7", 59.7),
        (" 12 ", 12),
        ("1d", 86400),
        ("150µs", 0.00015),
        ("", None),
        ("soon", None),
        ("-3", None),
        ("1s tomorrow", None),
        ("nan", None),
        ("1e5", None),
        ("2026-01-01T00:00:00Z", None),
    ],
)
def test_how_seconds_are_written(text: str, seconds: float | None) -> None:
    assert read_seconds(text) == (None if seconds is None else pytest.approx(seconds))


def test_the_headers_of_openai() -> None:
    headers = {
        "x-ratelimit-limit-requests": "10000",
        "x-ratelimit-limit-tokens": "2000000",
        "x-ratelimit-remaining-requests": "9999",
        "x-ratelimit-remaining-tokens": "1999974",
        "x-ratelimit-reset-requests": "6ms",
        "x-ratelimit-reset-tokens": "0s",
    }
    assert read_quotas(headers) == Quotas(Quota(10_000, 9999, 0.006), Quota(2_000_000, 1_999_974, 0))
    assert read_quotas({}) == Quotas(None, None)
    assert read_quotas({"x-ratelimit-limit-requests": "many"}) == Quotas(Quota(None, None, None), None)


def test_tokens_are_guessed_from_what_was_seen() -> None:
    guess = TokenGuess()
    assert guess.tokens(400, 4096) == 100 + 4096
    for _ in range(200):
        guess.learn(characters=400, prompt_tokens=200, completion_tokens=50)
    assert guess.tokens(400, 4096) == pytest.approx(250, rel=0.02)
    assert guess.tokens(400, 20) == pytest.approx(220, rel=0.02)
