"""The model card: what a checkpoint is, in the README.md that the Hub and people look for.

In: what the run was set to and trained on, and how the held-out rows stand at this checkpoint. Out: Markdown under a
YAML header. Names from outside stand in code spans, so nothing in them is taken for markup; of a local folder or file
only the last name is told. Nothing here depends on the day or the machine: a resumed run writes the same card.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from anchored.cards import CITATION, code, front_matter, on_hub, told
from anchored.runs import versions
from anchored.train.settings import TrainSettings


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What holds for every checkpoint of a run."""

    base_model: str | Path
    """A Hub id or a folder."""
    settings: TrainSettings
    precision: str
    """Of the forward and backward pass."""
    rows: int
    paired: bool
    """Whether rows are pairs, not single labelled answers."""
    methods: tuple[str, ...]
    """How the pairs were made, where they say so."""
    held_out: int
    left_out: Mapping[str, int]
    """Rows not trained on, by outcome."""
    steps: int
    """Of the whole run."""


def model_card(facts: CardFacts, epoch: int, step: int, held_out: Mapping[str, float] | None) -> str:
    """The README.md of the checkpoint after `epoch`; `held_out` is the line of trajectories.jsonl at its step."""
    settings = facts.settings
    parts = [
        front_matter(_header(facts)),
        f"# {code(told(facts.base_model))}, {code(settings.objective.name)}, epoch {epoch}",
        f"{code(told(facts.base_model))} trained with {code(settings.objective.name)} by Anchored: after "
        f"{epoch} of {settings.epochs} epochs, {step:,} of {facts.steps:,} steps.",
        "## Data\n\n" + "\n".join(_data(facts)),
        "## Training\n\n" + "\n".join(f"- {name}: {value}" for name, value in _training(facts)),
        "## Held-out rows at this checkpoint\n\n" + _measured(facts, held_out),
        "## Versions\n\n" + ", ".join(f"{name} {version}" for name, version in _versions(settings).items()),
        f"## Citation\n\n{CITATION}",
    ]
    return "\n\n".join(parts) + "\n"


def _header(facts: CardFacts) -> dict[str, object]:
    adapter = facts.settings.lora is not None and not facts.settings.lora.merge
    return {
        "base_model": str(facts.base_model) if on_hub(facts.base_model) else None,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["anchored", "preference-alignment", facts.settings.objective.name],
        "datasets": [facts.settings.data] if facts.settings.data and on_hub(facts.settings.data) else None,
    }


def _data(facts: CardFacts) -> Iterator[str]:
    kind = "pairs" if facts.paired else "labelled answers"
    source = f" of {code(told(facts.settings.data))}" if facts.settings.data else ""
    made = f" made by {', '.join(map(code, facts.methods))}" if facts.methods else ""
    yield f"- {facts.rows:,} {kind}{source}{made}"
    yield f"- {facts.held_out:,} more held out"
    if facts.left_out:
        counts = ", ".join(f"{count:,} {code(outcome)}" for outcome, count in facts.left_out.items())
        yield f"- left out: {counts}"


def _training(facts: CardFacts) -> Iterator[tuple[str, str]]:
    settings, optimizer = facts.settings, facts.settings.optimizer
    options = settings.objective.model_dump(exclude={"name"}, exclude_defaults=True) | {"beta": settings.objective.beta}
    yield (
        "objective",
        ", ".join([code(settings.objective.name), *(f"{name} {value}" for name, value in options.items())]),
    )
    if settings.refresh_reference_epochs:
        yield "reference", f"the policy itself, every {settings.refresh_reference_epochs} epochs"
    yield "optimizer", f"{optimizer.name}, learning rate {optimizer.lr:g}, {optimizer.schedule}"
    yield "epochs", str(settings.epochs)
    yield ("pairs per step" if facts.paired else "answers per step"), str(_per_step(facts))
    yield "precision", f"{facts.precision}, updates in float32"
    if settings.lora:
        yield "LoRA", f"rank {settings.lora.rank}, alpha {settings.lora.alpha:g}"
    yield "longest prompt and answer", f"{settings.max_prompt_tokens} and {settings.max_answer_tokens} tokens"
    yield "seed", str(settings.seed)


def _per_step(facts: CardFacts) -> int:
    return facts.settings.pairs_per_step * (1 if facts.paired else 2)


def _measured(facts: CardFacts, held_out: Mapping[str, float] | None) -> str:
    if held_out is None:
        return "None were held out."
    rows = [f"| {name} | {value:.4g} |" for name, value in held_out.items() if name not in ("step", "epoch")]
    explained = "Log-probabilities are natural and summed over an answer; a reward is beta x (policy - reference)."
    return "\n".join(["| | mean |", "|---|---|", *rows, "", explained])


def _versions(settings: TrainSettings) -> dict[str, str]:
    return versions("anchored", "torch", "transformers", *(["peft"] if settings.lora else []))
