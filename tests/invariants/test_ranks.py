"""One rank or several, each with the whole model or a part of it: the same steps, and the same model at the end."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks_work import Training, Trainings
from safetensors.torch import load_file
from tiny_models import save_folder
from training_pairs import steady

from anchored.progress import Silent
from anchored.runs import read_lines
from anchored.train.launch import run_ranks
from anchored.train.ranks import Ranks, joined

CLIPPED = {"optimizer": {"name": "adamw", "lr": 1e-4, "max_grad_norm": 0.5, "weight_decay": 0.1}}
KTO = {"objective": {"name": "kto", "beta": 1.0}}

KINDS = {
    "plain": Training(Path("plain"), Path("llama")),
    "clipped": Training(Path("clipped"), Path("tied"), CLIPPED | {"gradient_checkpointing": True}),
    "kto": Training(Path("kto"), Path("llama"), KTO),
    "unpaired": Training(Path("unpaired"), Path("llama"), {"objective": {"name": "apo-zero-unpaired"}}, unpaired=True),
    "refreshed": Training(Path("refreshed"), Path("llama"), {"refresh_reference_epochs": 1}),
    "adapters": Training(Path("adapters"), Path("llama"), {"lora": {"rank": 4}, "optimizer": {"lr": 1e-3}}),
    "bfloat16": Training(Path("bfloat16"), Path("llama"), {"precision": "bfloat16"}),
}
"""Trainings by what is special about them; their paths are set in the test's folder."""

WAYS = {"ddp": {"parallel": "ddp"}, "fsdp": {"parallel": "fsdp"}, "offload": {"offload": True}}

RANKS = {
    **{(kind, "ddp", 2): KINDS[kind] for kind in KINDS},
    **{(kind, "fsdp", 2): KINDS[kind] for kind in KINDS},
    ("plain", "offload", 2): KINDS["plain"],
    **{(kind, way, 3): KINDS[kind] for kind in ("plain", "kto") for way in ("ddp", "fsdp")},
}

MOVES = [
    ("ddp", 2, "fsdp", 3),
    ("fsdp", 2, "ddp", 3),
    ("fsdp", 2, "fsdp", 3),
    ("fsdp", 2, "ddp", 1),
    ("ddp", 1, "fsdp", 3),
]
"""From which ranks to which others a run that was cut short goes on."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every training of this file, done."""
    base = tmp_path_factory.mktemp("ranks")
    save_folder(base / "llama")
    save_folder(base / "tied", "qwen2", tied=True)
    moves = [_placed(KINDS["kto"], base, "-".join(map(str, move)), "ddp") for move in MOVES]
    begun = [replace(training, stop_after=4) for training in moves]
    for kind in KINDS.values():
        _placed(kind, base, f"{kind.folder}-alone", "ddp").run(Ranks())
    for count in (1, 2, 3):
        runs = [_placed(t, base, f"{kind}-{way}-{n}", way) for (kind, way, n), t in RANKS.items() if n == count]
        runs += [_by(training, move[0]) for move, training in zip(MOVES, begun, strict=True) if move[1] == count]
        runs += [_by(training, move[2]) for move, training in zip(MOVES, moves, strict=True) if move[3] == count > 1]
        _do(count, runs)
    _do(1, [_by(training, move[2]) for move, training in zip(MOVES, moves, strict=True) if move[3] == 1])
    return base


@pytest.mark.parametrize(("kind", "way", "count"), RANKS)
def test_any_number_of_ranks_trains_as_one(base: Path, kind: str, way: str, count: int) -> None:
    _compare(base, f"{kind}-alone", f"{kind}-{way}-{count}", loosely=kind == "bfloat16")


@pytest.mark.parametrize("move", MOVES, ids=lambda move: "-".join(map(str, move)))
def test_a_run_goes_on_with_other_ranks_as_if_undisturbed(base: Path, move: tuple[str, int, str, int]) -> None:
    _compare(base, "kto-alone", "-".join(map(str, move)))


@pytest.mark.parametrize(("way", "count"), [("ddp", 2), ("ddp", 3)])
def test_reference_logps_are_the_same_bits_whoever_computes_them(base: Path, way: str, count: int) -> None:
    assert _reference(base / f"plain-{way}-{count}") == _reference(base / "plain-alone")


def test_one_rank_with_all_parts_is_a_rank_without_any(base: Path) -> None:
    with joined(Ranks(), "cpu"):
        _placed(KINDS["plain"], base, "plain-fsdp-1", "fsdp").run(Ranks())
    _compare(base, "plain-alone", "plain-fsdp-1")


def _placed(training: Training, base: Path, name: str, way: str) -> Training:
    return _by(replace(training, folder=base / name, model=base / training.model), way)


def _by(training: Training, way: str) -> Training:
    return replace(training, changes={**training.changes, **WAYS[way]})


def _do(count: int, runs: list[Training]) -> None:
    if count == 1:
        for training in runs:
            training.run(Ranks())
    else:
        run_ranks(count, "cpu", Trainings(runs), Silent())


def _compare(base: Path, alone: str, shared: str, loosely: bool = False) -> None:
    """The same lines and weights, but for the order in which float32 (or, loosely, bfloat16) numbers were added."""
    for name in ("metrics.jsonl", "trajectories.jsonl"):
        expected, found = (steady(read_lines(base / folder / name)) for folder in (alone, shared))
        assert len(expected) == len(found) > 5
        for one, other in zip(expected, found, strict=True):
            assert one == pytest.approx(other, rel=0.05 if loosely else 2e-4, abs=0.05 if loosely else 2e-5)
    last = Path("checkpoints", "epoch-02")
    expected, found = (_weights(base / folder / last) for folder in (alone, shared))
    start = _weights(base / alone / "checkpoints" / "epoch-01")
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        moved = (weight.float() - start[name].float()).norm()
        assert (weight.float() - found[name].float()).norm() <= (0.2 if loosely else 0.01) * moved, name


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def _reference(folder: Path) -> list[tuple[object, ...]]:
    with sqlite3.connect(folder / "reference.sqlite") as database:
        return database.execute("SELECT * FROM logps ORDER BY model, answer").fetchall()
