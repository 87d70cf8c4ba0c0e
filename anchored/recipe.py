"""A recipe: every setting of a run, read from YAML and `key=value` overrides, checked, written, compared.

In: a YAML file that states what differs from the defaults. Out: a frozen `Recipe`. Every error names the key, the value
and the way out on one line.
"""

from __future__ import annotations

import copy
import difflib
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError

from anchored.create.settings import CreateSettings
from anchored.datasets_io.places import check_harmless
from anchored.errors import DataError, RecipeError
from anchored.evaluate.settings import EvaluateSettings
from anchored.runs import Run, one_line, versions, write_text
from anchored.settings import Settings
from anchored.train.settings import TrainSettings

_MISSING = "(not there)"
_LOGIN = re.compile(r"//[^/@\s]*@")


class PolicySettings(Settings):
    """The `policy:` section: the model being aligned, which before training is also the reference."""

    model: str
    """A Hugging Face folder or Hub id with safetensors weights and a chat template; `pocket` is the pocket world's."""


class Recipe(Settings):
    """Everything a run depends on."""

    policy: PolicySettings
    create: CreateSettings = CreateSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    limit: int | None = Field(default=None, ge=1)
    """Use at most so many prompts, held-out prompts and questions of a benchmark: a trial of the whole loop."""


@dataclass(frozen=True, slots=True)
class Change:
    """A setting that differs between a run folder's recipe and the one given now."""

    key: str
    before: Any
    now: Any

    @property
    def section(self) -> str:
        return self.key.split(".")[0]


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `key=value` overrides, their values being YAML (`create.filters=[leak]`)."""
    try:
        settings = yaml.load(path.read_text("utf-8"), _Loader)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe; see recipes/ for some to start from") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: is a folder; a recipe is a YAML file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: not a readable YAML file: {_yaml_problem(error)}") from None
    if not isinstance(settings, dict):
        raise RecipeError(f"{path}: holds no settings; a recipe needs at least `policy: {{model: FOLDER}}`")
    # a section whose keys are all commented out
    settings = {key: value for key, value in settings.items() if value is not None}
    for override in overrides:
        _set(settings, override)
    return parse(settings, where=str(path))


def parse(settings: dict[str, Any], where: str) -> Recipe:
    """Check plain settings; `where` stands before each error."""
    for key, text in _texts(settings):
        try:
            check_harmless(text)
        except DataError as error:
            raise RecipeError(f"{where}: {key}: {error}") from None
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        raise RecipeError("\n".join(f"{where}: {_explain(problem)}" for problem in error.errors())) from None


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors."""
    return Recipe.model_json_schema()


def begin(run: Run, recipe: Recipe) -> None:
    """Write the resolved recipe with versions into a new run folder; the recipe of a begun one must be the same."""
    changed = changes(run, recipe)
    if changed:
        change = changed[0]
        more = f" (and {len(changed) - 1} more: {', '.join(c.key for c in changed[1:])})" if len(changed) > 1 else ""
        redo = first_stage(changed)
        raise RecipeError(
            f"{change.key} is {change.now!r}, but the run in {run.folder} was begun with {change.before!r}{more}; "
            f"give the old value back, choose another --out, or add --redo {redo} to do {redo} and the stages after it "
            "again (paid replies are kept)"
        )
    write(run, recipe)


def write(run: Run, recipe: Recipe) -> None:
    """Put the resolved recipe and the versions in the run folder."""
    text = yaml.safe_dump(
        {**recipe.model_dump(mode="json"), "versions": _versions()}, sort_keys=False, allow_unicode=True
    )
    run.folder.mkdir(parents=True, exist_ok=True)
    write_text(run.recipe, text)


def changes(run: Run, recipe: Recipe) -> list[Change]:
    """Settings that differ from the run folder's recipe and change what comes out; none for a new folder.

    Those of an evaluation that has not begun change nothing: one may train first and choose benchmarks later.
    """
    before = run.read_recipe()
    if before is None:
        return []
    old, new = shaping(before), shaping(recipe.model_dump(mode="json"))
    keys = [key for key in {**new, **old} if old.get(key, _MISSING) != new.get(key, _MISSING)]
    if not run.has_begun("evaluate"):
        keys = [key for key in keys if not key.startswith("evaluate.")]
    return [Change(key, old.get(key, _MISSING), new.get(key, _MISSING)) for key in keys]


def _newer_settings(before: Mapping[str, Any]) -> dict[str, Any]:
    """A run folder's settings with the defaults of those that this version has beside them; {} where they do not fit.

    What this version has no more is left out.
    """
    known: Any = copy.deepcopy(_unversioned(before))
    for _ in range(2):
        try:
            return Recipe.model_validate(known).model_dump(mode="json")
        except ValidationError as error:
            for one in error.errors():
                if one["type"] == "extra_forbidden":
                    _drop(known, one["loc"])
    return {}


def _drop(settings: Any, place: Sequence[Any]) -> None:
    """Take out the setting at this place, if it is one."""
    for name in place[:-1]:
        settings = settings[name] if isinstance(settings, list) or name in settings else {}
    if isinstance(settings, dict):
        settings.pop(place[-1], None)


def shaping(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of resolved settings those that change what comes out of a run, by dotted key; not its versions.

    Those that an older version did not know are as they are by default.
    """
    free = _how_only(Recipe)
    leaves = {**dict(_leaves(_newer_settings(settings))), **dict(_leaves(_unversioned(settings)))}
    return {key: value for key, value in leaves.items() if free.isdisjoint(_sections(key))}


def _unversioned(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "versions"}


def first_stage(changed: Sequence[Change]) -> str:
    """The earliest stage that the changed settings touch."""
    sections = {change.section for change in changed}
    if sections & {"train", "evaluate"} == sections:
        return "train" if "train" in sections else "evaluate"
    return "create"


def _set(settings: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"{override!r}: an override is KEY=VALUE, as in train.epochs=4")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"{override!r}: the value is not YAML: {_yaml_problem(error)}") from None
    *parents, last = key.split(".")
    section = settings
    for parent in parents:
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            raise RecipeError(f"{override!r}: {parent} is a value, not a section with keys")
    section[last] = parsed


def _yaml_problem(error: Exception) -> str:
    return one_line(error).replace(' in "<unicode string>"', "")


class _Loader(yaml.SafeLoader):
    """YAML whose keys stand once: of two `train:` sections the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                problem = "a key is no word; braces that a template has yet to fill need quotes"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_PLAIN = (
    (re.compile(r"Input should be a valid dictionary or instance of \w+"), "must be a section with keys"),
    (re.compile(r"Input should be a valid tuple"), "must be a list, as in [a, b]"),
    (re.compile(r"Input should be an? valid (\w+).*"), r"must be of the kind \1"),
    (re.compile(r"Input should be "), "must be "),
)


def _explain(problem: Any) -> str:
    """One pydantic error as: key, value, what is wrong, what to write instead."""
    path = problem["loc"]
    key = ".".join(map(str, path))
    if problem["type"] == "extra_forbidden":
        known = _keys_at(path[:-1])
        return f"{key}: unknown key{_nearest(str(path[-1]), known)}; the keys here are {', '.join(known)}"
    if problem["type"] == "missing":
        return (
            f"{key}: missing; a recipe needs at least `policy: {{model: FOLDER}}`"
            if path[0] == "policy"
            else f"{key}: missing"
        )
    value = problem.get("input")
    if problem["type"] == "literal_error":
        known = [part.strip(" '") for part in problem["ctx"]["expected"].replace(" or ", ",").split(",")]
        return f"{key}: {value!r} is not a choice{_nearest(str(value), known)}; choose from {', '.join(known)}"
    message = problem["msg"].removeprefix("Value error, ")
    for pattern, plain in _PLAIN:
        message = pattern.sub(plain, message)
    # what stands in these may be a key put in the wrong place
    hidden = isinstance(value, dict) or path[-1] in ("key_env", "base_url")
    message = _LOGIN.sub("//[login]@", message)
    return f"{key}: {message}" if hidden else f"{key}: {message} (got {value!r})"


def _texts(settings: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in plain settings, by its dotted key."""
    if isinstance(settings, str):
        yield key, settings
    elif isinstance(settings, dict | list):
        for name, inner in settings.items() if isinstance(settings, dict) else enumerate(settings):
            yield from _texts(inner, f"{key}.{name}" if key else str(name))


def _nearest(word: str, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def _keys_at(path: Sequence[str | int]) -> list[str]:
    """The field names of the settings model at a dotted path, as far as the path can be followed."""
    model: type[BaseModel] = Recipe
    for part in path:
        field = model.model_fields.get(str(part))
        inner = _model_of(field.annotation) if field else None
        if inner is None:
            break
        model = inner
    return list(model.model_fields)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            value = {str(place): one for place, one in enumerate(value)}
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@cache
def _how_only(model: type[BaseModel], prefix: str = "") -> frozenset[str]:
    """The dotted keys that say only how a thing is done; of the members of a list, without their places."""
    found = {f"{prefix}{name}" for name in getattr(model, "how_only", ())}
    for name, field in model.model_fields.items():
        if inner := _model_of(field.annotation):
            found |= _how_only(inner, f"{prefix}{name}.")
    return frozenset(found)


def _sections(key: str) -> Iterator[str]:
    """A dotted key and what it stands in, without places in lists: `a.b.c`, `a.b`, `a`."""
    parts = [part for part in key.split(".") if not part.isdigit()]
    for length in range(len(parts), 0, -1):
        yield ".".join(parts[:length])


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **versions("anchored", "torch", "transformers", "openai")}
