"""Elementwise work on a GPU in one pass over its memory: PyTorch's compiler makes one kernel of a function.

In: a function of tensors, of nothing but elementwise operations and sums. Out: the same function, compiled where its
first argument is on a GPU. Elsewhere, and where there is no compiler (it needs Triton and a C compiler), the function
runs as it is written; that is said once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from inspect import unwrap
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_DEVICES = {"cuda"}
"""Where functions are compiled."""


def one_pass(function: Callable[P, T]) -> Callable[P, T]:
    """Compile `function` for GPUs when it is first called there; lengths of first dimensions may change."""
    compiled: Callable[P, T] | None = None

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        nonlocal compiled
        leading: Any = args[0]
        if leading.device.type not in _DEVICES:
            return function(*args, **kwargs)
        try:
            # what a type checker wrapped around it is no part of the work
            compiled = compiled or torch.compile(unwrap(function))
            return compiled(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            _DEVICES.discard(leading.device.type)
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(f"PyTorch's compiler does not work here ({reason}); training is slower", stacklevel=2)
            return function(*args, **kwargs)

    return run
