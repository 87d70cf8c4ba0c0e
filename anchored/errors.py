"""Every error that a user can meet.

AnchoredError                     the base: a message that names the value, where it stands and the way out
├── RecipeError                   a setting is unknown, wrong, or not what the run folder was begun with
├── DataError                     a data set, a store or the disk cannot be read or written as asked
├── ModelError                    a model folder, a template or an endpoint cannot do what is asked
│   └── ReplyError                one request got no usable reply: a row's outcome, never the end of a stage
│       └── NoReply               in all attempts, for want of the endpoint: another might have answered
├── TrainError                    training cannot start or go on
├── EvaluationError               an evaluation cannot be trusted
└── Stopped                       ended cleanly before the end; the same command goes on from here
    └── BudgetReached             the next request might cost more than there is left to spend

The command line prints the message alone and exits with `exit_code`. Messages never hold keys or request headers.
"""

from __future__ import annotations


class AnchoredError(Exception):
    """Base of what `anchored` raises on purpose; `exit_code` is the command's (2: the user's input)."""

    exit_code = 2


class RecipeError(AnchoredError):
    """A setting is unknown, wrong, or differs from the run folder's recipe."""


class DataError(AnchoredError):
    """A data set, a store or the disk cannot be read or written as asked."""


class ModelError(AnchoredError):
    """A model folder, a chat template or an endpoint cannot do what is asked."""


class ReplyError(ModelError):
    """One request got no usable reply, after all retries; the others are unaffected."""


class NoReply(ReplyError):
    """All attempts at one request failed for want of the endpoint: another might have answered."""


class TrainError(AnchoredError):
    """Training cannot start or go on."""


class EvaluationError(AnchoredError):
    """An evaluation cannot be trusted."""


class Stopped(AnchoredError):
    """Ended cleanly before the end (endpoint down, quota or budget spent, interrupted); the same command goes on."""

    exit_code = 3


class BudgetReached(Stopped):
    """The next request might cost more than there is left to spend."""
