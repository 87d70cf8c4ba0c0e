"""docs/create.md and docs/formats.md: their recipes are recipes, and their tables name what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from anchored import recipe as recipes
from anchored.create.filters import FILTERS
from anchored.records import Outcome

PAGES = {name: (Path(__file__).parents[2] / "docs" / name).read_text("utf-8") for name in ("create.md", "formats.md")}
RECIPES = [(name, text) for name, page in PAGES.items() for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
TEXT = PAGES["create.md"]


@pytest.mark.parametrize(("page", "text"), RECIPES, ids=range(len(RECIPES)))
def test_every_recipe_of_the_pages_is_one(page: str, text: str) -> None:
    recipes.parse({"policy": {"model": "models/my-model-instruct"}, **yaml.safe_load(text)}, f"docs/{page}")
    assert len(text.splitlines()) <= 15


@pytest.mark.parametrize("page", PAGES)
def test_each_page_shows_every_method(page: str) -> None:
    methods = recipes.schema()["$defs"]["CreateSettings"]["properties"]["method"]["enum"]
    assert {method for method in methods if f"method: {method}" in PAGES[page]} == set(methods)


def test_the_page_names_every_filter_prompt_and_outcome() -> None:
    assert [name for name in FILTERS if f"| `{name}` |" not in TEXT] == []
    shipped = (Path(recipes.__file__).parent / "create" / "prompts").glob("*.txt")
    assert [file.stem for file in shipped if f"create/{file.stem}" not in TEXT and file.stem != "judge"] == []
    table = TEXT.split("## Outcomes")[1]
    assert [outcome for outcome in Outcome if f"`{outcome}`" not in table] == []
    for name, row in FILTERS.items():
        (line,) = [line for line in TEXT.splitlines() if line.startswith(f"| `{name}` |")]
        for option, field in row.options.model_fields.items():
            shown = f"{field.default:g}" if isinstance(field.default, float) else f"{field.default}"
            assert f"{option}: {shown}" in line, line
