"""What is set about making pairs."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from anchored.llm.settings import EndpointSettings, SampleSettings
from anchored.settings import Settings

PAPERS_TEACHER = "gpt-4-turbo"


class PromptSettings(Settings):
    """Where the prompts come from."""

    data: str = "openbmb/UltraFeedback"
    """A file, a folder or a Hub id; `pocket` is the pocket world's."""
    split: str | None = None
    """Which split, where the data has several; null: train."""
    take: int | None = Field(default=None, ge=1)
    """Draw at most so many, uniformly and without repetition; null: all."""
    held_out: int | None = Field(default=None, ge=0)
    """Prompts kept apart, whose pairs are never trained on: their log-probabilities are followed through training.
    Null: 100, or a tenth of the prompts where there are fewer than 1000."""
    seed: int = 0
    """Of the draw, of the samples and of the order in which a judge sees two answers."""


class ReviserSettings(EndpointSettings):
    """The teacher of clair."""

    slots: ClassVar[tuple[str, ...]] = ("prompt", "answer")

    model: str = PAPERS_TEACHER
    prompt: str = "create/reviser"
    """The paper's prompt, or a text file with the slots <<prompt>> and <<answer>> that asks for the same headers."""


class JudgeSettings(EndpointSettings):
    """The teacher of judge-on-policy."""

    slots: ClassVar[tuple[str, ...]] = ("prompt", "answer_1", "answer_2")

    model: str = PAPERS_TEACHER
    prompt: str = "create/judge"
    """The paper's prompt, or a text file with the slots <<prompt>>, <<answer_1>> and <<answer_2>> that asks for [1] or
    [2]."""
    orders: Literal["one", "both"] = "one"
    """one: shows the two answers in an order drawn from the prompt's id and the seed; both: asks in either order and
    drops disagreements."""


class StrongerSettings(EndpointSettings):
    """The teacher of stronger-preferred."""

    model: str = PAPERS_TEACHER


class LengthRatio(Settings):
    """Characters of the chosen answer per character of the rejected one; outside of [low, high] a pair is refused."""

    low: float = Field(default=0.5, ge=0)
    high: float = Field(default=2.0, gt=0)

    @model_validator(mode="after")
    def _is_a_band(self) -> LengthRatio:
        if self.low > self.high:
            raise ValueError(f"low ({self.low:g}) is above high ({self.high:g}); swap them")
        return self


class LengthRatioFilter(Settings):
    """`length_ratio` with its bounds."""

    length_ratio: LengthRatio


FilterName = Literal["length_ratio", "leak"]
FILTER_NAMES: tuple[str, ...] = get_args(FilterName)


def _checked_filter(value: Any) -> Any:
    """A filter is a name, or one name with its settings (`{length_ratio: {low: 0.7}}`)."""
    if isinstance(value, LengthRatioFilter):
        return value
    name, options = next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else (value, None)
    if name not in FILTER_NAMES:
        raise ValueError(f"a filter is one of {', '.join(FILTER_NAMES)}, or one of them with its settings")
    if options and name == "leak":
        raise ValueError("leak has no settings; write it bare")
    return {name: options} if options else name


def _form(value: Any) -> str:
    return "bare" if isinstance(value, str) else "with settings"


Filter = Annotated[
    Annotated[FilterName, Tag("bare")] | Annotated[LengthRatioFilter, Tag("with settings")],
    Discriminator(_form),
    BeforeValidator(_checked_filter),
]

CLAIR_FILTERS: tuple[Filter, ...] = ("length_ratio", "leak")


class CreateSettings(Settings):
    """The `create:` section: how pairs are made from prompts."""

    method: Literal["clair", "judge-on-policy", "stronger-preferred"] = "clair"
    """clair: the teacher minimally revises the policy's answer; judge-on-policy: it picks the better of two of them;
    stronger-preferred: its own answer wins."""
    prompts: PromptSettings = PromptSettings()
    sample: SampleSettings = SampleSettings()
    """How the policy answers."""
    reviser: ReviserSettings = ReviserSettings()
    judge: JudgeSettings = JudgeSettings()
    stronger: StrongerSettings = StrongerSettings()
    filters: tuple[Filter, ...] | None = None
    """Which pairs are refused: length_ratio, leak. null: both for clair, none for the others."""
    decisions: str | None = None
    """A file in which people decided about pairs (`anchored inspect`): it has the last word after the filters. null:
    decisions.jsonl of the run folder, if there is one."""

    def teacher(self) -> ReviserSettings | JudgeSettings | StrongerSettings:
        """The endpoint that the method asks."""
        return {"clair": self.reviser, "judge-on-policy": self.judge, "stronger-preferred": self.stronger}[self.method]

    def active_filters(self) -> tuple[LengthRatio | Literal["leak"], ...]:
        """The filters with their settings, in order."""
        chosen = self.filters if self.filters is not None else CLAIR_FILTERS if self.method == "clair" else ()
        return tuple(
            one.length_ratio
            if isinstance(one, LengthRatioFilter)
            else LengthRatio()
            if one == "length_ratio"
            else "leak"
            for one in chosen
        )
