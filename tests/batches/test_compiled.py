"""Functions in one pass: what the compiler makes of them against what they say, on a CPU: it is the same compiler."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from anchored.batches import compiled, fused, head
from anchored.batches.head import Shaping

ROWS = (33, 65, 40)
"""A later number is another length of the first dimension."""


@pytest.fixture
def cpu_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiled, "_DEVICES", {"cpu"})
    yield
    torch._dynamo.reset()


def norms(rows: int, dtype: torch.dtype) -> list[tuple[Callable[..., Any], tuple[Any, ...]]]:
    states, grad, weight = torch.randn(1, rows, 64, dtype=dtype), torch.randn(1, rows, 64, dtype=dtype), torch.randn(64)
    weight, scale = weight.to(dtype), torch.rand(1, rows, 1)
    return [(fused._normed, (states, weight, 1e-5)), (fused._norm_gradients, (grad, states, weight, scale, True, True))]


def gates(rows: int, dtype: torch.dtype) -> list[tuple[Callable[..., Any], tuple[Any, ...]]]:
    grad, gate, up = torch.randn(3, rows, 96, dtype=dtype)
    return [(fused._gated, (gate, up)), (fused._gate_gradients, (grad, gate, up))]


def logits(rows: int, dtype: torch.dtype) -> list[tuple[Callable[..., Any], tuple[Any, ...]]]:
    made, targets, grad = torch.randn(rows, 200, dtype=dtype), torch.randint(200, (rows, 1)), torch.randn(rows, 1)
    norm = made.float().logsumexp(-1, keepdim=True)
    return [
        call
        for shaping in (Shaping(), Shaping(0.5, 2.0))
        for call in (
            (head._scores, (made, targets, shaping)),
            (head._logit_gradient, (made, norm, targets, grad, shaping)),
        )
    ]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler (Debian: apt-get install g++)")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("calls", [norms, gates, logits])
def test_what_is_compiled_computes_what_is_written(
    cpu_too: None, calls: Callable[..., Any], dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="PyTorch's compiler")
        for rows in ROWS:
            for function, arguments in calls(rows, dtype):
                compare(function(*copied(arguments)), function.__wrapped__(*copied(arguments)), tolerance)  # type: ignore[attr-defined]


def test_without_a_compiler_functions_run_as_they_are_written_and_that_is_said_once(
    cpu_too: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(function: object) -> None:
        raise RuntimeError("no C compiler was found\nand more lines")

    monkeypatch.setattr(torch, "compile", no_compiler)
    triple = compiled.one_pass(lambda x: 3 * x)
    with pytest.warns(UserWarning, match=r"compiler does not work here \(no C compiler was found\); .* slower"):
        assert triple(torch.ones(2)).tolist() == [3, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert triple(torch.ones(3)).tolist() == [3, 3, 3]


def copied(arguments: tuple[Any, ...]) -> list[Any]:
    return [argument.clone() if isinstance(argument, Tensor) else argument for argument in arguments]


def compare(found: Any, expected: Any, tolerance: float) -> None:
    for one, other in zip(*((of if isinstance(of, tuple) else (of,)) for of in (found, expected)), strict=True):
        assert one.dtype == other.dtype
        assert float((one.double() - other.double()).norm() / other.double().norm()) < tolerance
