"""What to evaluate and how."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from anchored.llm.settings import EndpointSettings, LocalSampling
from anchored.settings import Settings


class GreedySettings(LocalSampling):
    """Answers of a checkpoint, the likeliest token each time unless set otherwise."""

    temperature: float = Field(default=0.0, ge=0, le=2)
    """0 is greedy."""


class GraderSettings(EndpointSettings):
    """The model that grades answers, for the benchmarks that need one."""

    how_only: ClassVar[frozenset[str]] = EndpointSettings.how_only | {"most_failed"}

    temperature: float = Field(default=0.0, ge=0, le=2)
    """0 is greedy; MixEval's own judge draws at 1."""
    max_tokens: int = Field(default=999, ge=1)
    """Longest verdict; thinking text counts."""
    tries: int = Field(default=3, ge=1, le=10)
    """How often it is asked for a verdict that its replies do not hold; MixEval's own tries are 10."""
    most_failed: float = Field(default=0.05, ge=0, le=1)
    """Share of a benchmark's answers that may stay without a verdict; with more, the evaluation ends with an error."""


class MixEvalSettings(Settings):
    """MixEval-Hard's files, and how its answers are graded."""

    how_only: ClassVar[frozenset[str]] = frozenset({"data"})

    data: str | None = None
    """Where the benchmark's files are: a clone of https://github.com/Psycoy/MixEval, a folder with mixeval-hard/, or a
    Hub id."""
    official_data: bool = True
    """Refuse files that are not the official ones, byte for byte. false: take what has their form."""
    official_prompts: str | None = None
    """A clone of the benchmark: its judge prompts are asked, and replies are read by its rule. null: this package's."""
    read_letters: bool = False
    """Read multiple-choice answers that are a letter, or a letter and its option, without asking the judge."""
    without_verdict: Literal["leave-out", "random"] = "leave-out"
    """An answer for which the judge gives no verdict: left out and counted, or graded at random as the official code
    does."""


class AlpacaJudging(Settings):
    """How AlpacaEval's judge is asked; the defaults are the official ones."""

    prompt: str = "alpaca-judge"
    """The official prompt; the paper's own judge (create/judge, with room in max_tokens), whose verdict is the last [1]
    or [2]; or a text file with the slots of either."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """What it does to a verdict that is read by log-probabilities is nothing at most endpoints."""
    max_tokens: int = Field(default=1, ge=1)
    """Longest verdict. A judge that thinks first needs room for it."""
    top_logprobs: int = Field(default=5, ge=0, le=20)
    """Likeliest tokens to ask for, so that a preference is graded; 0, or an endpoint that tells none: the verdict is
    read from the text, and is all or nothing."""
    raw_quotes: bool = False
    """Put the texts into the prompt as they are, as the official package does: an answer may then end its own quotation
    and speak as the prompt. Else three quotation marks in a row are escaped."""
    retries: int = Field(default=2, ge=0)
    """How often a reply that holds no verdict is asked for again; after that the verdict has failed, and is counted."""
    seed: int = 0
    """Draws the order in which the answers are shown; 0 is the official order."""


class AlpacaSettings(AlpacaJudging):
    """AlpacaEval's files, and how its answers are judged."""

    how_only: ClassVar[frozenset[str]] = frozenset({"data"})

    data: str | None = None
    """The folder with the benchmark's files (docs/alpaca_eval.md tells where they are)."""
    judge: GraderSettings | None = None
    """Who judges, where it is not `evaluate.judge`; of either, temperature and max_tokens are the ones given here."""
    ask_again: bool = False
    """Where nearly all answers are longer than the baseline's, or shorter, ask each question once more for an answer
    about as long as the baseline's; those answers tell what length does, and are in no other number."""


class LmEvalSettings(Settings):
    """Tasks of EleutherAI's lm-evaluation-harness (lm-eval), which `benchmarks` names as it names them."""

    include: str | None = None
    """A folder with tasks of your own, in lm-eval's YAML; one that has the name of lm-eval's own takes its place."""
    fewshot: int | None = Field(default=None, ge=0)
    """Examples before each question; null: as many as each task says. By lm-eval's rule a task that says 0 has none."""
    max_tokens: int = Field(default=256, ge=1)
    """Longest answer to a task that does not say; lm-eval's own is 256."""
    unsafe_code: bool = False
    """Ask tasks too that run what the model writes (humaneval, mbpp). Nothing shields this machine from it."""


class SelectSettings(Settings):
    """The best checkpoint of many flatters on the benchmark that chose it, so its scores on the others are told."""

    how_only: ClassVar[frozenset[str]] = frozenset()

    on: str | None = None
    """The benchmark that chooses, in its first view, by its name in `benchmarks`. null: the first one."""
    take: int = Field(default=1, ge=1)
    """How many of the best checkpoints are averaged; the paper takes two for AlpacaEval."""


class StrongerSettings(EndpointSettings):
    """A model at an endpoint that answers the benchmarks beside the checkpoints."""

    temperature: float = Field(default=0.0, ge=0, le=2)
    """0 is greedy."""
    max_tokens: int = Field(default=1024, ge=1)
    """Longest answer; thinking text counts."""


class EvaluateSettings(Settings):
    """The `evaluate:` section of a recipe."""

    how_only: ClassVar[frozenset[str]] = frozenset({"budget_usd"})

    benchmarks: tuple[str, ...] = ()
    """Names of benchmarks (pocket, mixeval-hard/2024-06-01, mixeval-hard/2024-08-11, alpaca-eval) and of lm-eval's
    tasks (ifeval, gsm8k, mmlu), or paths of question files (JSONL with prompt, answer and, if you like, category)."""
    checkpoints: Literal["all", "last"] = "all"
    """Which checkpoints answer beside the starting model; the paper takes every epoch's."""
    sample: GreedySettings = GreedySettings()
    """How the model answers; greedy by default."""
    judge: GraderSettings | None = None
    """Who grades the answers to MixEval-Hard, and those to AlpacaEval unless `alpaca.judge` says otherwise."""
    mixeval: MixEvalSettings = MixEvalSettings()
    """MixEval-Hard."""
    alpaca: AlpacaSettings = AlpacaSettings()
    """AlpacaEval."""
    lm_eval: LmEvalSettings = LmEvalSettings()
    """Tasks of lm-eval."""
    select: SelectSettings = SelectSettings()
    """How checkpoints are chosen whose scores elsewhere are told."""
    stronger: StrongerSettings | None = None
    """A stronger model that answers as well: which share of the gap to it have the checkpoints closed?"""
    budget_usd: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Most money for the judges and the stronger model, in USD, what earlier processes spent on this run's evaluation
    included; null: no limit. Needs the price of each."""
    resamples: int = Field(default=2000, ge=100)
    """Bootstrap resamples behind each interval."""
    seed: int = 0
    """Seeds the bootstrap, and the answers and verdicts where their temperature is above 0."""

    def endpoints(self) -> dict[str, EndpointSettings]:
        """Who may be asked for money, by the setting's name."""
        named = {"judge": self.judge, "alpaca.judge": self.alpaca.judge, "stronger": self.stronger}
        return {name: endpoint for name, endpoint in named.items() if endpoint is not None}

    @model_validator(mode="after")
    def _budget_has_its_prices(self) -> EvaluateSettings:
        for name, endpoint in self.endpoints().items() if self.budget_usd is not None else ():
            if endpoint.price is None:
                raise ValueError(
                    f"budget_usd is {self.budget_usd:g}, but what {endpoint.model} costs is not known; give "
                    f"evaluate.{name} its price: {{input: ..., output: ...}}, in USD per million tokens"
                )
        return self
