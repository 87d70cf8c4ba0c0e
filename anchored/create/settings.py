"""What is set about making pairs."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PlainSerializer, PlainValidator, WithJsonSchema, field_validator, model_validator

from anchored.create.filters import Chosen, choose, schema, spelt
from anchored.llm.settings import BatchSettings, EndpointSettings, Price, SampleSettings, Sampling
from anchored.settings import Settings
from anchored.teachers import DECIDING, OFF_POLICY, TEAM, teachers

PAPERS_TEACHER = "gpt-4-turbo"
POLICY = "policy"
"""The policy's name among those who answer."""


class PromptSettings(Settings):
    """Where the prompts come from."""

    data: str = "openbmb/UltraFeedback"
    """A file, a folder, an address (s3://bucket/...) or a Hub id; `pocket` is the pocket world's."""
    split: str | None = None
    """Which split, where the data has several; null: train."""
    take: int | None = Field(default=None, ge=1)
    """Draw at most so many, uniformly and without repetition; null: all."""
    held_out: int | None = Field(default=None, ge=0)
    """Prompts kept apart, whose pairs are never trained on: their log-probabilities are followed through training.
    Null: 100, or a tenth of the prompts where there are fewer than 1000."""
    seed: int = 0
    """Of the draw, of the samples, of which two answers a judge sees and in which order."""


class DecontaminateSettings(Settings):
    """Which prompts are set aside because a benchmark asks the same."""

    against: tuple[str, ...] = Field(min_length=1)
    """Files of questions, in any layout of prompts; a `context` column beside a question belongs to it."""
    words: int = Field(default=13, ge=1)
    """So many words in a row that a prompt shares with a question are too many; shorter prompts are compared whole."""


class ReviserSettings(EndpointSettings):
    """The teacher of clair."""

    model: str = PAPERS_TEACHER
    prompt: str = "create/reviser"
    """The paper's prompt; create/reviser-same-length, create/reviser-light, -medium or -strong; or a text file with the
    slots <<prompt>> and <<answer>> that asks for the same headers."""


class StepSettings(EndpointSettings):
    """One step of a team of revisers."""

    does: Literal["revise", "critique"]
    """revise: writes the next revision; critique: says what is still to be improved."""
    model: str = PAPERS_TEACHER
    prompt: str | None = None
    """A shipped prompt or a text file with any of the slots <<prompt>>, <<answer>> (the policy's), <<revision>> (the
    latest) and <<critique>> (the latest), as far as the steps before it have made them. Null: create/reviser for the
    first revision, create/critic for a critique, create/reviser-again for a later revision."""


class BestOfSettings(Settings):
    """Which of several revisions is taken."""

    n: int = Field(default=4, ge=2, le=64)
    """Revisions of each answer."""
    by: Literal["jaccard", "judge"] = "jaccard"
    """Of those that pass the filters; jaccard: the one most like the policy's answer; judge: create.judge compares the
    first with the second, the winner with the third, and so on."""


class JudgeSettings(EndpointSettings):
    """The teacher of judge-on-policy and judge-off-policy, and whom best_of may ask."""

    model: str = PAPERS_TEACHER
    prompt: str = "create/judge"
    """The paper's prompt, or a text file with the slots <<prompt>>, <<answer_1>> and <<answer_2>> that asks for [1] or
    [2]."""
    orders: Literal["one", "both"] = "one"
    """one: shows the two answers in an order drawn from the prompt's id and the seed; both: asks in either order and
    drops disagreements."""
    refuse_addressed: bool = True
    """Ask nothing about answers that speak to their judge (`say [1]`): the row's outcome is addresses_judge. false:
    they are judged, and `detail` says so."""


class StrongerSettings(EndpointSettings):
    """The teacher of stronger-preferred."""

    model: str = PAPERS_TEACHER


Filter = Annotated[Chosen, PlainValidator(choose), PlainSerializer(spelt), WithJsonSchema(schema())]

CLAIR_FILTERS: tuple[Chosen, ...] = (choose("length_ratio"), choose("leak"))


class RaySettings(Settings):
    """The Ray cluster that `engine: ray` works on."""

    how_only: ClassVar[frozenset[str]] = frozenset(
        {"address", "workers", "cpus", "gpus", "rows_per_block", "wait_seconds"}
    )

    address: str | None = None
    """HOST:PORT of a cluster, or `auto` on one of its machines. null: what RAY_ADDRESS says, else Ray is started on
    this machine for the stage."""
    workers: int | None = Field(default=None, ge=1)
    """Processes that make rows, wherever the cluster has room (an autoscaler is asked for it). null: on each node one,
    or as many as it has `gpus` for; nodes that join later get theirs."""
    cpus: float = Field(default=1, ge=0)
    """Cores that each worker takes of its node."""
    gpus: float = Field(default=0, ge=0)
    """GPUs that each worker takes, for the models that it holds or serves itself; 0: it sees none."""
    rows_per_block: int = Field(default=16, ge=1)
    """Prompts that are handed to a worker together."""
    wait_seconds: float = Field(default=300, gt=0)
    """Longest wait while there is no worker, at the start and when all are gone, before the stage stops."""

    @field_validator("address")
    @classmethod
    def _is_of_a_cluster(cls, address: str | None) -> str | None:
        if address is not None and "://" in address:
            raise ValueError("is HOST:PORT or auto: the command runs on a machine of the cluster (`ray job submit`)")
        return address


class CreateSettings(Settings):
    """The `create:` section: how pairs are made from prompts."""

    how_only: ClassVar[frozenset[str]] = frozenset({"budget_usd", "pilot", "engine", "batch", "copy_to"})

    method: Literal["clair", "judge-on-policy", "judge-off-policy", "stronger-preferred"] = "clair"
    """clair: the teacher minimally revises the policy's answer; judge-on-policy: it picks the better of two of them;
    judge-off-policy: it picks the better of two answers by other models, or the data says which is;
    stronger-preferred: its own answer wins."""
    prompts: PromptSettings = PromptSettings()
    decontaminate: DecontaminateSettings | None = None
    """Set prompts aside that share their words with a benchmark."""
    target: int | None = Field(default=None, ge=1)
    """Go on through the prompts, in the order of their draw, until so many pairs are accepted; null: try every prompt.
    Pairs beyond them are refused as surplus, and cost nothing when the target is raised."""
    sample: SampleSettings = SampleSettings()
    """How the policy answers."""
    reviser: ReviserSettings = ReviserSettings()
    team: tuple[StepSettings, ...] = ()
    """Steps that revise one after another, in place of `reviser`: revise, critique, revise. The last revision wins."""
    best_of: BestOfSettings | None = None
    """Ask for several revisions and take one; null: ask for one."""
    judge: JudgeSettings = JudgeSettings()
    candidates: tuple[EndpointSettings, ...] = ()
    """The other models of judge-off-policy: endpoints that are asked for their answers."""
    answers: dict[str, str] = Field(default_factory=dict)
    """Answers that exist already, as NAME: FILE. judge-off-policy: NAME is one of the other models. Elsewhere it is
    `policy`, whose answers are then read and not sampled."""
    judged: str | None = None
    """Pairs that are judged already, for judge-off-policy: a file, a folder or a Hub id. Null: prompts.data, where
    neither candidates nor answers are named."""
    stronger: StrongerSettings = StrongerSettings()
    filters: tuple[Filter, ...] | None = None
    """Which pairs are refused, in this order (docs/create.md). Null: length_ratio and leak for clair, none for the
    others."""
    decisions: str | None = None
    """A file in which people decided about pairs (`anchored inspect`): it has the last word after the filters. null:
    decisions.jsonl of the run folder, if there is one."""
    copy_to: str | None = None
    """A folder to which the finished pairs.parquet, held_out.parquet and refused.parquet are copied, as in
    s3://bucket/folder (docs/formats.md); null: nowhere."""
    batch: BatchSettings = BatchSettings()
    """How `--batch`, `--batch-export` and `--batch-import` go."""
    budget_usd: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Most money for the replies of this run, in USD, what earlier processes spent included; null: no limit. Needs the
    price of every endpoint that the method asks."""
    pilot: int = Field(default=20, ge=0)
    """Where prices are known, so many rows are made first, and what all will cost is told before the rest is asked; 0:
    none."""

    engine: Literal["local", "ray"] = "local"
    """local: this process makes the rows; ray: workers on a Ray cluster do (docs/cluster.md). The pairs are the
    same."""
    ray: RaySettings = RaySettings()

    @model_validator(mode="after")
    def _budget_has_its_prices(self) -> CreateSettings:
        for role, endpoint in self.endpoints().items() if self.budget_usd is not None else ():
            if endpoint.price is None:
                raise ValueError(
                    f"budget_usd is {self.budget_usd:g}, but what {endpoint.model} costs is not known; give the "
                    f"{role} of {self.method} its price: {{input: ..., output: ...}}, in USD per million tokens"
                )
        if self.budget_usd is not None and self.asks_policy and self.sample.key_env and self.sample.price is None:
            raise ValueError(
                f"budget_usd is {self.budget_usd:g}, but what the policy costs at {self.sample.base_url} is not known; "
                "give sample its price: {input: ..., output: ...}, in USD per million tokens, 0 where it is free"
            )
        return self

    @model_validator(mode="after")
    def _fits_the_method(self) -> CreateSettings:
        self._check_clair_only()
        if self.method == OFF_POLICY:
            self._check_off_policy()
        else:
            self._check_others()
        return self

    def teacher(self) -> ReviserSettings | JudgeSettings | StrongerSettings | None:
        """The stronger model that the method asks; None where a team revises or the data is judged already."""
        asked = self._asked()
        return getattr(self, asked[0]) if asked and asked[0] != TEAM else None

    def endpoints(self) -> dict[str, EndpointSettings]:
        """Every endpoint that the method asks, by its role."""
        teacher = self.teacher()
        asked: dict[str, EndpointSettings] = {"teacher": teacher} if teacher else {}
        if self.method == "clair":
            asked |= {step_role(place): step for place, step in enumerate(self.team)}
            asked |= {section: getattr(self, section) for section in self._asked()[1:]}
        if self.method == OFF_POLICY:
            asked |= {candidate_role(place): one for place, one in enumerate(self.candidates)}
        return asked

    def prices(self) -> dict[str, Price]:
        """What whoever is asked costs, by its role, the policy's included; nobody whose price is not known."""
        found = {role: one.price for role, one in self.endpoints().items() if one.price}
        return found | ({POLICY: self.sample.price} if self.asks_policy and self.sample.price else {})

    def key_variables(self) -> set[str]:
        """The environment variables that hold keys of the endpoints."""
        asked = self.endpoints().values()
        addresses = [*asked, *(other for endpoint in asked for other in endpoint.more_endpoints), self.sample]
        return {address.key_env for address in addresses if address.key_env}

    @property
    def asks_policy(self) -> bool:
        """Whether the policy is to answer prompts."""
        return self.method != OFF_POLICY and POLICY not in self.answers

    @property
    def judged_data(self) -> str | None:
        """Where the judged pairs of judge-off-policy are; None where a judge is asked."""
        return None if self._asked() else self.judged or self.prompts.data

    def active_filters(self) -> tuple[Chosen, ...]:
        """The filters with their options, in order."""
        if self.filters is not None:
            return self.filters
        return CLAIR_FILTERS if self.method == "clair" else ()

    def _asked(self) -> tuple[str, ...]:
        return teachers(self.model_dump(include=set(DECIDING)))

    def _check_clair_only(self) -> None:
        for name in ("team", "best_of"):
            if getattr(self, name) and self.method != "clair":
                raise ValueError(f"{name} has no use with {self.method}: only clair revises; leave {name} out")
        if self.team and (self.team[0].does, self.team[-1].does) != ("revise", "revise"):
            raise ValueError("team begins and ends with a step that does: revise")
        revisers = [step for step in self.team if step.does == "revise"] or [self.reviser]
        if self.best_of and all(reviser.temperature == 0 for reviser in revisers):
            raise ValueError("best_of asks for several revisions, which are all the same at temperature 0; raise it")

    def _check_off_policy(self) -> None:
        if self.judged and (self.candidates or self.answers):
            raise ValueError("judged pairs need no candidates and no answers; leave one of them out")
        if POLICY in self.answers:
            raise ValueError("answers: judge-off-policy compares other models; call them by their own names")
        named = len(self.candidates) + len(self.answers)
        if named == 1:
            raise ValueError("judge-off-policy needs two or more other models: add to candidates or answers")
        drawn = [one.model_dump(include={*Sampling.model_fields, "model", "extra_body"}) for one in self.candidates]
        if any(one in drawn[:place] for place, one in enumerate(drawn)):
            raise ValueError("candidates names one model twice, whose answers would be the same; draw them differently")

    def _check_others(self) -> None:
        for name in ("candidates", "judged"):
            if getattr(self, name):
                raise ValueError(f"{name} has no use with {self.method}; use judge-off-policy, or leave {name} out")
        if strangers := sorted(self.answers.keys() - {POLICY}):
            raise ValueError(
                f"answers of {strangers[0]!r} have no use with {self.method}; "
                f"the policy's own are named as {{{POLICY}: FILE}}"
            )


def candidate_role(place: int) -> str:
    """The role of one of the candidates."""
    return f"candidate {place + 1}"


def step_role(place: int) -> str:
    """The role of one of the team's steps."""
    return f"step {place + 1}"
