"""Data sets for others: converts a source, writes its card, and pushes both to the Hub.

In: a source, a file to write, and what its publisher says of it. Out: the file, README.md beside it where it is asked
for, and a repository with both. Nothing is sent before all of it is written here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from anchored.cards import told
from anchored.datasets_io.converting import Converted, check_free, convert
from anchored.datasets_io.writing import Layout, check_ending
from anchored.errors import DataError
from anchored.hub.card import DATA_FILE, Facts, Observer, TeacherPrompt, data_card
from anchored.hub.repository import Repository
from anchored.llm.settings import EndpointSettings, SampleSettings
from anchored.progress import Progress
from anchored.records import Outcome
from anchored.runs import Run, write_text
from anchored.teachers import teachers

_NOT_TOLD = EndpointSettings.how_only | SampleSettings.how_only
_SECRET = re.compile(r"key|token|secret|password|credential", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Publication:
    """How a converted file is to be shown to others."""

    repository: Repository | None = None
    """Where to push it; None: nowhere."""
    card: bool = False
    """Write README.md beside the file."""
    license: str | None = None


@dataclass(frozen=True, slots=True)
class Shared:
    """What came of it."""

    converted: Converted
    card: Path | None
    url: str | None


def share(
    source: str,
    out: Path,
    layout: Layout,
    publication: Publication,
    *,
    split: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Shared:
    """Convert and, as far as the publication asks for it, write a card and push."""
    repository = publication.repository
    card = out.with_name("README.md") if publication.card else None
    if card:
        check_free(card, force)
    if repository:
        if check_ending(out) != ".parquet":
            raise DataError(f"{out}: --push-to-hub uploads parquet; give the file a name that ends in .parquet")
        check_free(out, force)
        repository.check(force)
    observer = Observer() if card or repository else None
    converted = convert(
        source, out, layout, split=split, force=force, see=observer.see if observer else None, progress=progress
    )
    if observer is None:
        return Shared(converted, None, None)
    name = repository.name if repository else out.name
    facts = _facts(name, layout, converted, observer, _run_of(source))
    facts = replace(facts, file=out.name, license=publication.license)
    if card:
        write_text(card, data_card(facts))
    url = repository.push(out, data_card(replace(facts, file=DATA_FILE))) if repository else None
    return Shared(converted, card, url)


def _run_of(source: str) -> Run | None:
    """The run whose folder the source is."""
    run = Run(Path(source).expanduser())
    return run if run.recipe.exists() and run.pairs.exists() else None


def _facts(name: str, layout: Layout, converted: Converted, seen: Observer, run: Run | None) -> Facts:
    recipe = run.read_recipe() if run else None
    return Facts(
        name=name,
        file=name,
        layout=layout,
        rows=converted.written,
        pairs=seen.pairs,
        answers=seen.answers,
        methods=seen.methods,
        chosen_models=seen.chosen_models,
        rejected_models=seen.rejected_models,
        prompts=seen.prompts,
        prompts_sha256=seen.prompts_sha256,
        outcomes=_outcomes(converted, run),
        contrast=seen.contrast,
        recipe=_told_recipe(recipe) if recipe else None,
        teacher_prompts=_teacher_prompts(run),
    )


def _outcomes(converted: Converted, run: Run | None) -> Mapping[Outcome, int]:
    of_run = (run.summary("create") or {}).get("outcomes") if run else None
    if of_run:
        return {Outcome(name): count for name, count in of_run.items()}
    return Counter({Outcome.OK: converted.kept}) + converted.refused.counts


def _told_recipe(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the pairs depend on: the policy, how they were made, and the versions; nothing that says where and how."""
    create = dict(recipe.get("create") or {})
    unused = {"reviser", "judge", "stronger"}.difference(teachers(create)) if "method" in create else set()
    shaped = {name: value for name, value in create.items() if name not in unused}
    parts = {**{name: recipe.get(name) for name in ("policy", "create", "limit", "versions")}, "create": shaped}
    return _harmless({name: part for name, part in parts.items() if part})


def _harmless(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {name: cell for name, cell in value.items() if name not in _NOT_TOLD and not _is_secret(name)}
        return {name: _harmless(cell) for name, cell in kept.items()}
    if isinstance(value, list):
        return [_harmless(item) for item in value]
    if isinstance(value, str) and "/" in value:
        return told(value)
    return value


def _is_secret(name: str) -> bool:
    return bool(_SECRET.search(name)) and not name.endswith("_tokens")


def _teacher_prompts(run: Run | None) -> tuple[TeacherPrompt, ...]:
    """What the teachers were asked with, as the stage that asked them wrote it down."""
    files = ((run.summary("create") or {}).get("prompt_files") or {}) if run else {}
    asked = dict.fromkeys((file["prompt"], file["sha256"]) for file in files.values())
    return tuple(TeacherPrompt(_shown(name), sha256) for name, sha256 in asked)


def _shown(prompt: str) -> str:
    return prompt if prompt.count("/") == 1 and not Path(prompt).exists() else told(prompt)
