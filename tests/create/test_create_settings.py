"""The create section of a recipe: filters in their forms, the method's teacher, defaults that are the paper's."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from anchored.create.settings import CreateSettings, LengthRatio


@pytest.mark.parametrize(
    ("filters", "active"),
    [
        (["leak"], ("leak",)),
        (["length_ratio"], (LengthRatio(low=0.5, high=2.0),)),
        ([{"length_ratio": {"low": 0.7}}, "leak"], (LengthRatio(low=0.7, high=2.0), "leak")),
        ([{"leak": None}], ("leak",)),
        ([], ()),
    ],
)
def test_a_filter_is_a_name_or_a_name_with_settings(filters: list, active: tuple) -> None:
    settings = CreateSettings.model_validate({"filters": filters})
    assert settings.active_filters() == active
    assert CreateSettings.model_validate(settings.model_dump(mode="json")) == settings, "a written recipe reads back"


def test_only_clair_filters_unless_asked() -> None:
    assert CreateSettings().active_filters() == (LengthRatio(low=0.5, high=2.0), "leak")
    assert CreateSettings(method="judge-on-policy").active_filters() == ()
    assert CreateSettings.model_validate({"method": "stronger-preferred", "filters": ["leak"]}).active_filters() == (
        "leak",
    )


@pytest.mark.parametrize(
    ("filters", "says"),
    [
        (["leek"], "a filter is one of length_ratio, leak"),
        ([{"length": {"low": 1}}], "a filter is one of length_ratio, leak"),
        ([3], "a filter is one of length_ratio, leak"),
        ([{"length_ratio": {"low": 3}}], "low \\(3\\) is above high \\(2\\)"),
        ([{"length_ratio": {"min": 3}}], "Extra inputs"),
        ([{"leak": {"words": 3}}], "leak has no settings"),
    ],
)
def test_a_wrong_filter_says_what_there_is(filters: list, says: str) -> None:
    with pytest.raises(ValidationError, match=says) as raised:
        CreateSettings.model_validate({"filters": filters})
    assert raised.value.error_count() == 1


def test_each_method_has_its_teacher_with_the_papers_settings() -> None:
    for method in ("clair", "judge-on-policy", "stronger-preferred"):
        teacher = CreateSettings.model_validate({"method": method}).teacher()
        assert (teacher.model, teacher.temperature, teacher.max_tokens) == ("gpt-4-turbo", 0.7, 4096)
    assert CreateSettings.model_validate({"reviser": {"model": "mine"}}).teacher().model == "mine"


def test_a_budget_needs_the_price_of_who_is_asked() -> None:
    price = {"input": 2.5, "output": 10}
    CreateSettings.model_validate({"budget_usd": 9, "reviser": {"price": price}})
    with pytest.raises(ValidationError, match=r"budget_usd is 9, .* gpt-4-turbo costs .* clair its price"):
        CreateSettings.model_validate({"budget_usd": 9, "judge": {"price": price}})
    with pytest.raises(ValidationError, match="greater than 0"):
        CreateSettings.model_validate({"budget_usd": 0, "reviser": {"price": price}})
