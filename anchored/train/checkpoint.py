"""What training leaves on disk: a Hugging Face folder per epoch, and one file from which a killed run goes on.

`checkpoints/epoch-01/` is what `from_pretrained` loads, in the model's own precision. `checkpoints/resume.pt` holds
the float32 weights, the optimizer and the step of the newest saved moment; it is replaced in one rename, so there is a
whole one at any time, and deleted when training is complete. It loads without running any code (`weights_only`).
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging

from anchored.errors import DataError, TrainError
from anchored.runs import one_line, written_aside
from anchored.train.policy import Policy
from anchored.train.ranks import Ranks


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """A moment of training, apart from its weights and its optimizer's state."""

    step: int
    """Steps that are done."""
    seconds: float
    """Time they took, in all the processes that took part."""
    begun_with: Mapping[str, str]
    """What must be the same to go on from here: settings, model, data."""
    reference: str = ""
    """Name of the reference's logps, where it is no longer the model that training started from."""
    running: Mapping[str, float] = field(default_factory=dict)
    """Moving averages that the objective uses."""


def checkpoint_name(epoch: int) -> str:
    """The folder after so many epochs."""
    return f"epoch-{epoch:02d}"


def save_checkpoint(folder: Path, policy: Policy, ranks: Ranks, card: str) -> None:
    """Write the Hugging Face folder: weights, config, generation config, tokenizer with its template, model card."""
    logging.disable_progress_bar()  # the command shows its own
    with _written_aside(folder) as aside, policy.as_saved() as model:
        model.save_pretrained(aside)
        policy.tokenizer.save_pretrained(aside)
        (aside / "README.md").write_text(card, "utf-8")


def drop_checkpoints_after(checkpoints: Path, epoch: int) -> None:
    """Delete the checkpoints of later epochs than `epoch`: they will be made again, or belong to a longer run."""
    for folder in checkpoints.glob("epoch-*"):
        if int(folder.name.removeprefix("epoch-")) > epoch:
            shutil.rmtree(folder)


def drop_checkpoints_except(checkpoints: Path, epochs: Collection[int]) -> None:
    """Delete the checkpoints of all epochs but `epochs`."""
    for folder in checkpoints.glob("epoch-*"):
        if int(folder.name.removeprefix("epoch-")) not in epochs:
            shutil.rmtree(folder)


def resume_file(checkpoints: Path) -> Path:
    """Where the newest saved moment lies."""
    return checkpoints / "resume.pt"


def save_resume_point(
    checkpoints: Path, point: ResumePoint, policy: Policy, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> None:
    """Replace the moment that a killed run goes on from."""
    state = {
        "step": point.step,
        "seconds": point.seconds,
        "begun_with": dict(point.begun_with),
        "reference": point.reference,
        "running": dict(point.running),
        "weights": {name: weight.data for name, weight in policy.weights.items()},
        "optimizer": optimizer.state_dict(),
    }
    with _written_aside(resume_file(checkpoints)) as aside:
        torch.save(state, aside)


def load_resume_point(
    checkpoints: Path, begun_with: Mapping[str, str], policy: Policy, optimizer: torch.optim.Optimizer
) -> ResumePoint:
    """Set weights and optimizer to the saved moment; the beginning, where nothing was saved."""
    path = resume_file(checkpoints)
    if not path.exists():
        return ResumePoint(0, 0.0, begun_with)
    state = _load(path)
    _check_same(path, state["begun_with"], begun_with)
    for name, weight in policy.weights.items():
        weight.data.copy_(state["weights"][name])
    policy.update_model()
    optimizer.load_state_dict(state["optimizer"])
    return ResumePoint(state["step"], state["seconds"], begun_with, state["reference"], state["running"])


@contextmanager
def _written_aside(path: Path) -> Iterator[Path]:
    """`written_aside`, for writers that report a full disk in ways of their own."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            yield aside
    except (OSError, RuntimeError, SafetensorError) as error:
        raise DataError(
            f"{path}: cannot be written ({one_line(error)}); free disk space and run the same command again: "
            "it goes on from the last saved step"
        ) from None


def _load(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)}); delete it to train from the beginning") from None


def _check_same(path: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            raise TrainError(
                f"{path}: training was begun with {name} {before.get(name)}, not {now.get(name)}; "
                "give the old value back, or delete this file to train from the beginning"
            )
