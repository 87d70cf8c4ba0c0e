"""The teachers' prompts of a recipe, by role: loaded, and found to have the right slots before anything is asked."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from hashlib import sha256

from anchored.create.settings import CreateSettings, JudgeSettings, ReviserSettings, StepSettings, step_role
from anchored.errors import RecipeError
from anchored.llm.prompt_files import SLOT, fill, load


@dataclass(frozen=True, slots=True)
class Template:
    """A prompt with its slots."""

    name: str
    """As the recipe has it: a shipped prompt's or a path."""
    text: str

    @property
    def slots(self) -> set[str]:
        return set(SLOT.findall(self.text))

    @property
    def sha256(self) -> str:
        """What `sha256sum` prints of the file."""
        return sha256(self.text.encode()).hexdigest()


def templates(settings: CreateSettings) -> dict[str, Template]:
    """Every prompt that the method asks with; raises a RecipeError for a wrong slot."""
    found = {}
    for role, endpoint in settings.endpoints().items():
        if isinstance(endpoint, ReviserSettings):
            found[role] = _with_slots(endpoint.prompt, ("prompt", "answer"))
        elif isinstance(endpoint, JudgeSettings):
            found[role] = _with_slots(endpoint.prompt, ("prompt", "answer_1", "answer_2"))
    return found | _of_the_team(settings.team)


def _with_slots(name: str, slots: Collection[str]) -> Template:
    template = Template(name, load(name))
    try:
        fill(template.text, dict.fromkeys(slots, ""))
    except RecipeError as error:
        raise RecipeError(f"{name}: {error}") from None
    return template


def _of_the_team(team: Collection[StepSettings]) -> dict[str, Template]:
    """A step may use what the steps before it made."""
    found: dict[str, Template] = {}
    slots = {"prompt", "answer"}
    for place, step in enumerate(team):
        name = step.prompt or _default_prompt(step, slots)
        template = Template(name, load(name))
        marks = ", ".join(f"<<{slot}>>" for slot in sorted(slots))
        if unknown := sorted(template.slots - slots):
            raise RecipeError(f"{name}: step {place + 1} of create.team cannot fill <<{unknown[0]}>>; it has {marks}")
        if not template.slots & {"answer", "revision"}:
            raise RecipeError(f"{name}: step {place + 1} of create.team shows no answer; its prompt needs <<answer>>")
        found[step_role(place)] = template
        slots.add("revision" if step.does == "revise" else "critique")
    return found


def _default_prompt(step: StepSettings, slots: Collection[str]) -> str:
    if step.does == "critique":
        return "create/critic"
    if "critique" in slots:
        return "create/reviser-again"
    if "revision" in slots:
        raise RecipeError("create.team: a second revision needs a critique before it, or a prompt of its own")
    return "create/reviser"
