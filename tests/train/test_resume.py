"""A run killed with SIGKILL at any point, and started again, leaves the files of the undisturbed run, bit by bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import save_folder
from train_killed import HELD_OUT, PAIRS, SETTINGS
from training_pairs import InterruptAt, make_pairs, make_settings, steady, trained

from anchored.runs import Run, read_lines

ONE_BY_ONE = [
    "advance:reference:2",
    "open:metrics.jsonl:1",  # before the first step's line
    "advance:train:1",  # no moment is saved yet
    "open:metrics.jsonl:4",  # between saved moments
    "os.rename:.epoch-01.partial:1",  # the checkpoint is written, but not in its place
    "os.rename:.step-8.partial:1",  # the checkpoint is in its place, the moment after it is not saved
    "open:moment.json:4",  # a moment is half written
    "shutil.rmtree:step-10:1",  # a moment is in its place, and the one before still there
    "advance:train:3",  # just after a moment was saved
    "os.rename:.train.json.partial:1",  # all is done but saying so
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Run:
    run = Run(tmp_path_factory.mktemp("undisturbed"))
    trained(run.folder, model, SETTINGS, PAIRS, HELD_OUT)
    return run


def test_a_run_killed_again_and_again_ends_as_the_undisturbed(undisturbed: Run, model: Path, tmp_path: Path) -> None:
    worker = Path(__file__).with_name("train_killed.py")
    search = f"import sys, runpy; sys.path[:0] = {sys.path!r}; sys.argv = sys.argv[1:]; "
    run_worker = search + "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", run_worker, str(worker), str(tmp_path), str(model), *ONE_BY_ONE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    run = Run(tmp_path)
    assert read_lines(run.trajectories) == read_lines(undisturbed.trajectories)
    assert steady(read_lines(run.metrics)) == steady(read_lines(undisturbed.metrics))
    assert [line["step"] for line in read_lines(run.metrics)] == list(range(1, 16))
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["epoch-01", "epoch-02", "epoch-03"]
    for folder in run.checkpoints.iterdir():
        for file in folder.iterdir():
            assert file.read_bytes() == (undisturbed.checkpoints / folder.name / file.name).read_bytes(), file
    killed, whole = run.summary("train"), undisturbed.summary("train")
    assert killed is not None
    assert whole is not None
    for name in ("pairs", "held_out", "left_out", "steps", "checkpoints"):
        assert killed[name] == whole[name]


def test_a_complete_run_is_left_alone(undisturbed: Run, model: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.folder.rglob("*")}
    summary = trained(undisturbed.folder, model, SETTINGS, PAIRS, HELD_OUT)
    assert summary.steps == 15
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.folder.rglob("*")}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_a_run_on_a_gpu_goes_on_where_it_was(name: str, model: Path, tmp_path: Path) -> None:
    settings = make_settings(device="cuda", save_every_steps=1, optimizer={"name": name, "lr": 1e-4})
    trained(tmp_path / "whole", model, settings, make_pairs(8))
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", model, settings, make_pairs(8), progress=InterruptAt("train", 3))
    trained(tmp_path / "cut", model, settings, make_pairs(8))
    whole, cut = ([line["loss"] for line in read_lines(tmp_path / run / "metrics.jsonl")] for run in ("whole", "cut"))
    assert cut == pytest.approx(whole, rel=1e-4)
