"""What a recipe says about the objective, what each objective takes, and why it does not take the rest; no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticKnownError

from anchored.objectives import ObjectiveName
from anchored.own import IMPORT_PATH
from anchored.settings import Settings

_NAMES: tuple[str, ...] = get_args(ObjectiveName)
_OWN_EXAMPLE = "my_package.my_module:my_loss"


def _known_name(name: str) -> str:
    if name in _NAMES or re.fullmatch(IMPORT_PATH, name):
        return name
    if ":" in name:
        raise ValueError(f"an objective of your own is written as {_OWN_EXAMPLE}")
    raise PydanticKnownError("literal_error", {"expected": f"{', '.join(map(repr, _NAMES))} or {_OWN_EXAMPLE!r}"})


def _margin(value: Any) -> Any:
    if value == "column":
        return value
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError("must be 0 or more, in units of reward, or column for each pair's own")
    return number


class ObjectiveSettings(Settings):
    """What is minimised. What is not given, or null, is the objective's own default."""

    name: Annotated[
        str,
        AfterValidator(_known_name),
        WithJsonSchema({"anyOf": [{"enum": list(_NAMES)}, {"type": "string", "pattern": f"^{IMPORT_PATH}$"}]}),
    ] = "apo-zero"
    """`apo-zero` for winners better than the policy's own answers, `apo-down` for worse; `sft` learns winners alone.
    The others are in docs/objectives.md; your own is given as `my_package.my_module:my_loss`."""
    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """Scale of the rewards, beta x (policy logp - reference logp); short answers want more (1 to 2). simpo: 2."""
    margin: Annotated[float | Literal["column"], BeforeValidator(_margin)] = 0.0
    """How far apart the rewards of a pair should be, in units of reward; `column` takes each pair's own `margin` from
    the data. simpo: 1."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs taken to be labelled the wrong way round. robust-dpo: 0.1."""
    length_normalised: bool = False
    """Divide each answer's log-probabilities by its own number of tokens. ipo, simpo and orpo: true."""
    sft_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of an extra term for each pair, -log pi(winner) per token. cpo and orpo: 1."""
    desirable_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of desirable answers in kto and apo-zero-unpaired."""
    undesirable_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of undesirable answers in kto and apo-zero-unpaired."""
    penalty: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """dpop's lambda, on winners less likely than under the reference. dpop: 50."""
    alpha: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """How strongly beta-dpo's beta follows the step's mean difference of log-ratios. beta-dpo: 0.6."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of the moving average that beta-dpo compares that mean with."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        """The objective's own defaults stand where nothing is given, so that a resolved recipe shows them."""
        if not isinstance(given, Mapping):
            return given
        given = {key: value for key, value in given.items() if value is not None}
        name = given.get("name")
        return {**_DEFAULTS.get(name, {}), **given} if isinstance(name, str) else given

    @model_validator(mode="after")
    def _check_use(self) -> ObjectiveSettings:
        for knob, reason in _refused(self.name).items():
            value = getattr(self, knob)
            if value != type(self).model_fields[knob].default:
                raise ValueError(f"{knob} {value!r} has no use with {self.name}: {reason}; leave {knob} out")
        return self


def _refused(name: str) -> dict[str, str]:
    """The knobs that an objective cannot use, each with the reason; none for your own."""
    if name not in _NAMES:
        return {}
    refused = {knob: reasons[name] for knob, reasons in _NO_USE.items() if name in reasons}
    only = {knob: f"only {' and '.join(users)} can use it" for knob, users in _ONLY.items() if name not in users}
    return refused | only


_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "ipo": {"length_normalised": True},
    "simpo": {"beta": 2.0, "margin": 1.0, "length_normalised": True},
    "orpo": {"length_normalised": True, "sft_weight": 1.0},
    "cpo": {"sft_weight": 1.0},
    "dpop": {"penalty": 50.0},
    "robust-dpo": {"label_smoothing": 0.1},
    "beta-dpo": {"alpha": 0.6},
}

_ONLY: Mapping[str, tuple[str, ...]] = {
    "desirable_weight": ("kto", "apo-zero-unpaired"),
    "undesirable_weight": ("kto", "apo-zero-unpaired"),
    "penalty": ("dpop",),
    "alpha": ("beta-dpo",),
    "momentum": ("beta-dpo",),
}

_ANCHORED = "it anchors each answer by itself, so there is no difference to put a margin on"
_ONE_SIDED = "it learns from one kind of answer alone"
_SCALES = "a flipped pair's loss is 2 - loss, so smoothing would only scale the loss by 1 - 2 label_smoothing"
_WEIGHS = "a flipped label would only change the weights, which desirable_weight and undesirable_weight set"
_SINGLE = "it takes single answers, which have no winner"

_NO_USE: Mapping[str, Mapping[str, str]] = {
    "margin": {
        **dict.fromkeys(["apo-zero", "kto-pair", "kto", "apo-zero-unpaired"], _ANCHORED),
        **dict.fromkeys(["sft", "npo"], _ONE_SIDED),
        "ipo": "its margin is 1 / (2 beta)",
        "orpo": "it compares odds, not rewards",
    },
    "label_smoothing": {
        **dict.fromkeys(["apo-zero", "kto-pair"], _SCALES),
        **dict.fromkeys(["kto", "apo-zero-unpaired"], _WEIGHS),
        **dict.fromkeys(["sft", "npo"], _ONE_SIDED),
    },
    "length_normalised": {
        "sft": "its loss is per token already",
        "kto": "its KL is of whole answers",
    },
    "sft_weight": {
        **dict.fromkeys(["kto", "apo-zero-unpaired", "npo"], _SINGLE),
        "sft": "it is nothing else",
        "apo-down": "it makes winners less likely, the extra term more",
    },
}
"""Why an objective does not take a knob."""
