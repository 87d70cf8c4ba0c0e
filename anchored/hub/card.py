"""The data set card: what a file of pairs or answers is, in the README.md that the Hub and people look for.

In: `Facts`, gathered while the rows go by. Out: Markdown under a YAML header. Names from outside stand in code spans.
Nothing here depends on the day or the machine: the same rows have the same card.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from anchored.cards import CITATION, code, fenced, front_matter, told
from anchored.contrast import MeanContrast, Means, compare
from anchored.datasets_io import Layout
from anchored.records import Outcome, Pair, TrainingRow, prompt_id

DATA_FILE = "data/train-00000-of-00001.parquet"
"""Where the rows stand in the repository, as the Hub expects them."""

_TOKENIZER = "whitespace"
_SIZES = (("n<1K", 1_000), ("1K<n<10K", 10_000), ("10K<n<100K", 100_000), ("100K<n<1M", 1_000_000))
_NAMED = 8
"""Most models or methods that are named one by one."""

_LAYOUTS: Mapping[Layout, str] = {
    "trl": "`prompt` (messages), `chosen`, `rejected` (the answers alone), for TRL's `DPOTrainer`",
    "implicit": "`chosen`, `rejected` (full conversations), for TRL's `DPOTrainer`",
    "clair32k": "`prompt` (the last user turn as a string), `chosen`, `rejected` (full conversations)",
    "h4": "`prompt` (the last user turn as a string), `chosen`, `rejected` and `messages` (full conversations), scores",
    "unpaired": "`prompt`, `completion` (messages), `label`, for TRL's `KTOTrainer`",
}


@dataclass(frozen=True, slots=True)
class TeacherPrompt:
    """The text that a teacher was asked with."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What a card tells."""

    name: str
    """ORG/NAME, or the file's own name."""
    file: str
    """Where the rows stand, seen from the card."""
    layout: Layout
    rows: int
    """Of the file: two a pair where it is unpaired."""
    pairs: int
    answers: int
    """Labelled answers that came without a partner."""
    methods: Mapping[str, int]
    """How many pairs each method made; the empty name for those that do not say."""
    chosen_models: Mapping[str, int]
    rejected_models: Mapping[str, int]
    prompts: int
    """Distinct ones."""
    prompts_sha256: str
    """Of their sorted `prompt_id`s, one a line."""
    outcomes: Mapping[Outcome, int]
    """How many rows were kept and how many refused, and why; of a run, the rows of its prompts."""
    contrast: MeanContrast | None
    recipe: Mapping[str, Any] | None = None
    """The settings of the run that made the pairs, as far as they may be told."""
    teacher_prompts: tuple[TeacherPrompt, ...] = ()
    license: str | None = None


class Observer:
    """Counts what a card tells of rows while they go by."""

    def __init__(self) -> None:
        self.pairs = self.answers = 0
        self.methods: Counter[str] = Counter()
        self.chosen_models: Counter[str] = Counter()
        self.rejected_models: Counter[str] = Counter()
        self._prompts: set[str] = set()
        self._means = Means(_TOKENIZER)

    def see(self, row: TrainingRow) -> None:
        """Count one more."""
        self._prompts.add(prompt_id(row.prompt.messages))
        if not isinstance(row, Pair):
            self.answers += 1
            models = self.chosen_models if row.desirable else self.rejected_models
            models[row.answer.model] += 1
            return
        self.pairs += 1
        self.methods[row.method] += 1
        self.chosen_models[row.chosen.model] += 1
        self.rejected_models[row.rejected.model] += 1
        self._means.add(compare(row))

    @property
    def prompts(self) -> int:
        return len(self._prompts)

    @property
    def prompts_sha256(self) -> str:
        return hashlib.sha256("\n".join(sorted(self._prompts)).encode()).hexdigest()

    @property
    def contrast(self) -> MeanContrast | None:
        return self._means.mean() if self.pairs else None


def data_card(facts: Facts) -> str:
    """The README.md of a data set."""
    parts = [
        front_matter(_header(facts)),
        f"# {code(facts.name)}",
        _opening(facts),
        "## Rows\n\n" + "\n".join(_rows(facts)),
        "## Yield\n\n" + _yield(facts.outcomes),
        *([f"## Contrast\n\n{_contrast(facts.contrast)}"] if facts.contrast else []),
        *([f"## Recipe\n\n{_recipe(facts)}"] if facts.recipe else []),
        "## Licence\n\n" + _licence(facts.license),
        f"## Citation\n\n{CITATION}",
    ]
    return "\n\n".join(parts) + "\n"


def _header(facts: Facts) -> dict[str, object]:
    methods = [method for method in facts.methods if method]
    size = next((name for name, below in _SIZES if facts.rows < below), "n>1M")
    return {
        "license": facts.license,
        "pretty_name": facts.name.split("/")[-1],
        "task_categories": ["text-generation"],
        "tags": ["anchored", "preference-alignment", "dpo" if facts.layout != "unpaired" else "kto", *methods],
        "size_categories": [size],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": facts.file}]}],
    }


def _opening(facts: Facts) -> str:
    kinds = [(facts.pairs, "preference pairs"), (facts.answers, "labelled answers")]
    held = " and ".join(f"{count:,} {kind}" for count, kind in kinds if count)
    methods = [code(method) for method in facts.methods if method]
    how = f", made by {', '.join(methods)}" if methods else ""
    return f"{held} to {facts.prompts:,} prompts{how}. Written by Anchored."


def _rows(facts: Facts) -> Iterator[str]:
    yield f"- {facts.rows:,} rows in the layout {code(facts.layout)}: {_LAYOUTS[facts.layout]}"
    if any(facts.methods):
        yield f"- method: {_counted(facts.methods)}"
    for side, models in (("chosen", facts.chosen_models), ("rejected", facts.rejected_models)):
        if models:
            yield f"- {side} answers by: {_counted(models)}"
    yield f"- prompts: {facts.prompts:,} distinct; sha256 of their sorted ids, one a line: {code(facts.prompts_sha256)}"
    for prompt in facts.teacher_prompts:
        yield f"- the teacher was asked with {code(prompt.name)}, sha256 {code(prompt.sha256)}"
    yield "- each row has the content name of its prompt in `prompt_id`"


def _counted(named: Mapping[str, int]) -> str:
    common = Counter(named).most_common()
    shown = [f"{code(told(name)) if name else 'not recorded'} ({count:,})" for name, count in common[:_NAMED]]
    return ", ".join(shown) + (f", and {len(common) - _NAMED} more" if len(common) > _NAMED else "")


def _yield(outcomes: Mapping[Outcome, int]) -> str:
    total = sum(outcomes.values())
    ordered = sorted(outcomes.items(), key=lambda item: (item[0] is not Outcome.OK, -item[1], item[0]))
    lines = [f"| {code(outcome)} | {count:,} | {100 * count / total:.1f} % |" for outcome, count in ordered]
    return "\n".join(["| outcome | rows | share |", "|---|---|---|", *lines])


def _contrast(mean: MeanContrast) -> str:
    measures = [
        (f"Jaccard similarity x 100, tokenizer {code(mean.tokenizer)}", f"{mean.jaccard:.2f}"),
        ("Levenshtein distance, characters", f"{mean.levenshtein:,.1f}"),
        ("Levenshtein distance per character of the longer answer", f"{mean.normalised_levenshtein:.3f}"),
        ("characters of the chosen answer per character of the rejected one", f"{mean.length_ratio:.2f}"),
        ("characters that both begin with", f"{mean.shared_prefix:,.1f}"),
        ("the same per character of the shorter answer", f"{mean.shared_prefix_share:.3f}"),
        ("share of chosen answers that speak of being a revision", f"{mean.leak_rate:.4f}"),
    ]
    lines = [f"| {name} | {value} |" for name, value in measures]
    return "\n".join([f"| mean over {mean.pairs:,} pairs | |", "|---|---|", *lines])


def _recipe(facts: Facts) -> str:
    text = yaml.safe_dump(dict(facts.recipe or {}), sort_keys=False, allow_unicode=True)
    return f"What the pairs depend on; of local paths the last name.\n\n{fenced(text, 'yaml')}"


def _licence(license: str | None) -> str:
    if license:
        return f"{code(license)}, as its publisher says."
    return "None was given. What the prompts' source and the models' terms allow, whoever publishes this must say."
