"""The create section of a recipe: filters in their forms, who is asked, what fits which method, the defaults."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from anchored import recipe as recipes
from anchored.create.filters import FILTERS, Chosen, Jaccard, LengthRatio, Repetition
from anchored.create.settings import CreateSettings
from anchored.errors import RecipeError

OTHER = {"model": "other", "base_url": "http://127.0.0.1:1/v1"}
ANOTHER = {"model": "another", "base_url": "http://127.0.0.1:1/v1"}


@pytest.mark.parametrize(
    ("filters", "active"),
    [
        (["leak"], (Chosen("leak"),)),
        (["length_ratio"], (Chosen("length_ratio", LengthRatio(low=0.5, high=2.0)),)),
        (
            [{"length_ratio": {"low": 0.7}}, "leak"],
            (Chosen("length_ratio", LengthRatio(low=0.7, high=2.0)), Chosen("leak")),
        ),
        ([{"leak": None}], (Chosen("leak"),)),
        ([{"jaccard": {"low": 20}}], (Chosen("jaccard", Jaccard(low=20)),)),
        ([{"repetition": {"answers": "both"}}], (Chosen("repetition", Repetition(answers="both")),)),
        (["mine.filters:short"], (Chosen("mine.filters:short", {}),)),
        ([{"mine:short": {"most": 3}}], (Chosen("mine:short", {"most": 3}),)),
        ([], ()),
    ],
)
def test_a_filter_is_a_name_or_a_name_with_options(filters: list, active: tuple) -> None:
    settings = CreateSettings.model_validate({"filters": filters})
    assert settings.active_filters() == active
    written = json.loads(json.dumps(settings.model_dump(mode="json")))
    assert CreateSettings.model_validate(written) == settings, "a written recipe reads back"


def test_only_clair_filters_unless_asked() -> None:
    assert CreateSettings().active_filters() == (
        Chosen("length_ratio", LengthRatio(low=0.5, high=2.0)),
        Chosen("leak"),
    )
    assert CreateSettings.model_validate({"method": "judge-on-policy"}).active_filters() == ()
    asked = CreateSettings.model_validate({"method": "stronger-preferred", "filters": ["leak"]})
    assert asked.active_filters() == (Chosen("leak"),)


@pytest.mark.parametrize(
    ("filters", "says"),
    [
        (["leek"], "create.filters.0: a filter is one of length_ratio, leak, jaccard"),
        ([{"length": {"low": 1}}], "a filter is one of length_ratio, leak"),
        ([3], "a filter is one of length_ratio, leak"),
        ([["leak"]], "a filter is one of length_ratio, leak"),
        ([{"length_ratio": {"low": 3}}], r"length_ratio: low (3) is above high (2); swap them"),
        ([{"length_ratio": {"min": 3}}], "length_ratio: unknown option 'min'; its options are low, high"),
        ([{"jaccard": {"low": "much"}}], "jaccard: low must be a valid number"),
        ([{"leak": {"words": 3}}], "leak has no options"),
        ([{"jaccard": 20}], "the options of jaccard are a section with keys"),
        ([{"mine:short": 3}], "the options of mine:short are a section with keys"),
    ],
)
def test_a_wrong_filter_says_what_there_is(filters: list, says: str) -> None:
    with pytest.raises(RecipeError) as raised:
        recipes.parse({"policy": {"model": "m"}, "create": {"filters": filters}}, "recipe.yaml")
    assert says in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_the_schema_names_every_filter_and_its_options() -> None:
    text = json.dumps(recipes.schema())
    for name, row in FILTERS.items():
        assert f'"{name}"' in text
        assert all(f'"{option}"' in text for option in row.options.model_fields)


def test_each_method_has_its_teacher_with_the_papers_settings() -> None:
    for method in ("clair", "judge-on-policy", "stronger-preferred"):
        teacher = CreateSettings.model_validate({"method": method}).teacher()
        assert teacher is not None
        assert (teacher.model, teacher.temperature, teacher.max_tokens) == ("gpt-4-turbo", 0.7, 4096)
    mine = CreateSettings.model_validate({"reviser": {"model": "mine"}}).teacher()
    assert mine is not None
    assert mine.model == "mine"


def test_a_budget_needs_the_price_of_everybody_who_is_asked() -> None:
    price = {"input": 2.5, "output": 10}
    CreateSettings.model_validate({"budget_usd": 9, "reviser": {"price": price}})
    with pytest.raises(ValidationError, match=r"budget_usd is 9, .* gpt-4-turbo costs .* teacher of clair its price"):
        CreateSettings.model_validate({"budget_usd": 9, "judge": {"price": price}})
    with pytest.raises(ValidationError, match="greater than 0"):
        CreateSettings.model_validate({"budget_usd": 0, "reviser": {"price": price}})
    off_policy = {"method": "judge-off-policy", "judge": {"price": price}, "budget_usd": 9}
    with pytest.raises(ValidationError, match=r"what another costs .* candidate 2 of judge-off-policy its price"):
        CreateSettings.model_validate({**off_policy, "candidates": [{**OTHER, "price": price}, ANOTHER]})


def test_a_budget_needs_the_price_of_a_policy_that_takes_a_key() -> None:
    price = {"input": 2.5, "output": 10}
    free = {"base_url": "http://127.0.0.1:1/v1", "model": "mine"}
    paid = {**free, "base_url": "https://llm.example/v1", "key_env": "MINE"}
    rest = {"budget_usd": 9, "reviser": {"price": price}}
    CreateSettings.model_validate({**rest, "sample": free})
    with pytest.raises(ValidationError, match=r"what the policy costs at https://llm.example/v1 is not known"):
        CreateSettings.model_validate({**rest, "sample": paid})
    assert set(CreateSettings.model_validate({**rest, "sample": {**paid, "price": price}}).prices()) == {
        "policy",
        "teacher",
    }
    with pytest.raises(ValidationError, match="price belong to a server that already runs"):
        CreateSettings.model_validate({**rest, "sample": {"price": price}})


@pytest.mark.parametrize(
    ("settings", "roles", "asks_policy"),
    [
        ({}, ["teacher"], True),
        ({"answers": {"policy": "f.jsonl"}}, ["teacher"], False),
        ({"best_of": {"by": "judge"}}, ["teacher", "judge"], True),
        ({"team": [{"does": "revise"}]}, ["step 1"], True),
        (
            {"team": [{"does": "revise"}, {"does": "critique"}, {"does": "revise"}], "best_of": {"by": "judge"}},
            ["step 1", "step 2", "step 3", "judge"],
            True,
        ),
        ({"method": "judge-off-policy"}, [], False),
        ({"method": "judge-off-policy", "judged": "data"}, [], False),
        (
            {"method": "judge-off-policy", "candidates": [OTHER], "answers": {"another": "f.jsonl"}},
            ["teacher", "candidate 1"],
            False,
        ),
        ({"method": "judge-off-policy", "answers": {"one": "f.jsonl", "two": "g.jsonl"}}, ["teacher"], False),
    ],
)
def test_who_is_asked_follows_from_the_settings(settings: dict, roles: list[str], asks_policy: bool) -> None:
    create = CreateSettings.model_validate(settings)
    assert (list(create.endpoints()), create.asks_policy) == (roles, asks_policy)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"team": [{"does": "critique"}, {"does": "revise"}]}, "team begins and ends with"),
        ({"team": [{"does": "revise"}, {"does": "critique"}]}, "team begins and ends with"),
        ({"method": "judge-on-policy", "team": [{"does": "revise"}]}, "team has no use with judge-on-policy"),
        ({"method": "stronger-preferred", "best_of": {"n": 2}}, "best_of has no use with stronger-preferred"),
        ({"best_of": {"n": 3}, "reviser": {"temperature": 0}}, "all the same at temperature 0"),
        ({"method": "judge-off-policy", "candidates": [OTHER]}, "needs two or more other models"),
        ({"method": "judge-off-policy", "candidates": [OTHER, OTHER]}, "names one model twice"),
        ({"method": "judge-off-policy", "candidates": [OTHER, ANOTHER], "judged": "data"}, "leave one of them out"),
        ({"method": "judge-off-policy", "answers": {"policy": "f", "one": "g"}}, "call them by their own names"),
        ({"candidates": [OTHER, ANOTHER]}, "candidates has no use with clair"),
        ({"judged": "data"}, "judged has no use with clair"),
        ({"answers": {"gpt": "f.jsonl"}}, "answers of 'gpt' have no use with clair"),
    ],
)
def test_what_does_not_fit_is_said_on_one_line(settings: dict, says: str) -> None:
    with pytest.raises(RecipeError) as raised:
        recipes.parse({"policy": {"model": "m"}, "create": settings}, "recipe.yaml")
    assert says in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    with pytest.raises(ValidationError):
        CreateSettings.model_validate(settings)
