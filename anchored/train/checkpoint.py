"""What training leaves on disk: a Hugging Face folder per epoch, and one from which a killed run goes on.

`checkpoints/epoch-01/` is what `from_pretrained` loads, in the model's own precision. `checkpoints/resume/step-12/`
holds the moment after step 12: `moment.json`, and safetensors files with rows of the float32 weights and of the
optimizer's state, written by the ranks that had them. Any number of ranks, sharded or not, reads from these the rows
that it needs; nothing in them can run code, as the pickled index of PyTorch's distributed checkpoints could. A moment
is written aside and renamed, then older ones are deleted, so there is a whole one at any time.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

from anchored.errors import DataError, TrainError
from anchored.runs import one_line, sync, written_aside
from anchored.train.policy import Policy
from anchored.train.ranks import Ranks, lost_contact
from anchored.train.sharding import first_row, is_sharded, local

_FILE_BYTES = 2**30
"""Roughly how much one file of a saved moment holds: this much of a GPU's memory is copied at a time."""


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
    """Write the Hugging Face folder: weights, config, generation config, tokenizer with its template, model card.

    The first rank writes; the others give it their part.
    """
    model = policy.as_saved(ranks)
    if model is None:
        return
    logging.disable_progress_bar()  # the command shows its own
    with _full_disk_told(folder), written_aside(folder) as aside:
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


def resume_folder(checkpoints: Path) -> Path:
    """Where the saved moments lie."""
    return checkpoints / "resume"


def forget_resume_points(checkpoints: Path) -> None:
    """Delete the saved moments: the largest files of a run, of no use when it is complete."""
    shutil.rmtree(resume_folder(checkpoints), ignore_errors=True)


def save_resume_point(
    checkpoints: Path, point: ResumePoint, policy: Policy, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> None:
    """Replace the moment that a killed run goes on from; every rank writes what it alone has."""
    folder = resume_folder(checkpoints)
    path, aside = folder / f"step-{point.step}", folder / f".step-{point.step}.partial"
    with _full_disk_told(folder):
        if ranks.first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        ranks.wait()
        for index, parts in enumerate(_files(_parts(policy, optimizer, ranks))):
            file = aside / f"rank-{ranks.rank:05}-{index:05}.safetensors"
            places = {name: json.dumps([part.first_row, part.rows]) for name, part in parts.items()}
            save_file({name: part.values for name, part in parts.items()}, file, places)
            sync(file)
        ranks.wait()
        if ranks.first:
            _put_in_place(aside, path, point)


def load_resume_point(
    checkpoints: Path, begun_with: Mapping[str, str], policy: Policy, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> ResumePoint:
    """Set weights and optimizer to the newest saved moment; the beginning, where nothing was saved."""
    folder = resume_folder(checkpoints)
    moments = {int(path.name.removeprefix("step-")): path for path in folder.glob("step-*")}
    if not moments:
        return ResumePoint(0, 0.0, begun_with)
    path = moments[max(moments)]
    try:
        point = ResumePoint(**json.loads((path / "moment.json").read_bytes()))
        _check_same(folder, point.begun_with, begun_with)
        saved = _Saved(path)
        for name, weight in policy.weights.items():
            saved.read(f"weight {name}", weight.data, ranks)
            optimizer.state[weight] = {
                kind: saved.read(f"{kind} {name}", _like(kind, weight, optimizer), ranks)
                for kind in saved.kinds
                if saved.holds(f"{kind} {name}")
            }
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise DataError(
            f"{path}: cannot be read ({one_line(error)}); delete {folder} to train from the beginning"
        ) from None
    policy.update_model()
    return point


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of a tensor that has `rows` of them; a number by itself counts as one."""

    values: Tensor
    first_row: int
    rows: int


def _parts(policy: Policy, optimizer: torch.optim.Optimizer, ranks: Ranks) -> Iterator[tuple[str, _Part]]:
    """What this rank has to write: its part of what is sharded, and in the first rank all that is not."""
    for name, weight in policy.weights.items():
        state = {"weight": weight.detach(), **optimizer.state[weight]}
        for kind, tensor in state.items():
            if is_sharded(tensor):
                values = local(tensor)
                if len(values):
                    yield f"{kind} {name}", _Part(values, first_row(tensor, ranks), len(tensor))
            elif ranks.first:
                yield f"{kind} {name}", _Part(tensor, 0, len(tensor) if tensor.dim() else 1)


def _files(parts: Iterable[tuple[str, _Part]]) -> Iterator[dict[str, _Part]]:
    """The parts in groups of a file's size."""
    group: dict[str, _Part] = {}
    for name, part in parts:
        group[name] = _Part(part.values.to("cpu").contiguous(), part.first_row, part.rows)
        if sum(part.values.nbytes for part in group.values()) >= _FILE_BYTES:
            yield group
            group = {}
    if group:
        yield group


def _put_in_place(aside: Path, path: Path, point: ResumePoint) -> None:
    (aside / "moment.json").write_text(json.dumps(asdict(point)), "utf-8")
    sync(aside / "moment.json")
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)
    for other in path.parent.iterdir():
        if other != path:
            shutil.rmtree(other)


class _Saved:
    """The tensors of a saved moment, whichever files their rows lie in."""

    def __init__(self, folder: Path) -> None:
        self._parts: dict[str, list[tuple[int, int, Path]]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                for name, place in tensors.metadata().items():
                    start, rows = json.loads(place)
                    self._parts.setdefault(name, []).append((start, rows, file))
        kinds = dict.fromkeys(name.partition(" ")[0] for name in self._parts)
        self.kinds = [kind for kind in kinds if kind != "weight"]

    def holds(self, name: str) -> bool:
        """Whether there is anything of a tensor: what never had a gradient has no state."""
        return name in self._parts

    def read(self, name: str, into: Tensor, ranks: Ranks) -> Tensor:
        """Fill this rank's part of `into`, and return it."""
        mine = local(into)
        rows = mine if mine.dim() else mine[None]
        first, missing = first_row(into, ranks), len(rows)
        for start, _, file in self._parts[name]:
            with safe_open(file, "pt") as tensors:
                part = tensors.get_slice(name)
                stop = start + (part.get_shape() or [1])[0]
                low, high = max(start, first), min(stop, first + len(rows))
                if low < high:
                    found = part[low - start : high - start] if part.get_shape() else tensors.get_tensor(name)
                    rows[low - first : high - first].copy_(found)
                    missing -= high - low
        if missing:
            raise ValueError(f"{missing} rows of {name} are missing")
        return into


def _like(kind: str, weight: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """An empty tensor of the optimizer's: as large as the weight, or the number of steps.

    That lies on the CPU, but beside the weight where one kernel does the whole update.
    """
    if kind == "step":
        return torch.zeros((), device=weight.device if optimizer.defaults.get("fused") else "cpu")
    return torch.zeros_like(weight.detach())


@contextmanager
def _full_disk_told(path: Path) -> Iterator[None]:
    """For writers that report a full disk in ways of their own."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if lost_contact(error):
            raise
        raise DataError(
            f"{path}: cannot be written ({one_line(error)}); free disk space and run the same command again: "
            "it goes on from the last saved step"
        ) from None


def _check_same(path: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    for name in {**before, **now}:
        if before.get(name) == now.get(name):
            continue
        if name.startswith("train."):
            problem = f"training was begun with {name} {before.get(name)}, not {now.get(name)}; give the old value back"
        else:  # known by a hash, which tells nobody anything
            problem = f"training was begun with other contents of {name}; restore them"
        raise TrainError(f"{path}: {problem}, or delete this folder to train from the beginning")
