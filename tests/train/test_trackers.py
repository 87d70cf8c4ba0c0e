"""Trackers: what was logged is read back from where each keeps it, and no trouble of theirs is training's."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import save_folder
from training_pairs import InterruptAt, Notes, make_pairs, make_settings, trained
from wandb.proto import wandb_internal_pb2

from anchored.errors import TrainError
from anchored.runs import read_lines
from anchored.train import trackers
from anchored.train.trackers import TrackedRun, Trackers

PAIRS, HELD_OUT = make_pairs(8), make_pairs(2, seed=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("policy"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    # the trackers set some of these, if they are not set
    for variable in trackers._SILENT:
        monkeypatch.setenv(variable, os.environ.get(variable, trackers._SILENT[variable]))


def settings(*names: str, **changes: Any) -> Any:
    return make_settings(trackers=names, pairs_per_step=4, **changes)


def interrupted_and_resumed(folder: Path, model: Path, name: str) -> None:
    """Two epochs of two steps, stopped after the third and gone on with after the second."""
    with pytest.raises(KeyboardInterrupt):
        trained(folder, model, settings(name), PAIRS, HELD_OUT, InterruptAt("train", 3))
    trained(folder, model, settings(name), PAIRS, HELD_OUT)


def expected(folder: Path, file: str, name: str) -> list[tuple[int, float]]:
    return [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in read_lines(folder / file)]


def test_tensorboard_shows_each_step_once_also_after_an_interruption(model: Path, tmp_path: Path) -> None:
    interrupted_and_resumed(tmp_path, model, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for kind, file in (("train", "metrics.jsonl"), ("held_out", "trajectories.jsonl")):
        for name in ("loss", "reward_margin"):
            found = [(event.step, event.value) for event in events.Scalars(f"{kind}/{name}")]
            assert found == expected(tmp_path, file, name)
    assert "train/lr" in events.Tags()["scalars"]


def test_mlflow_shows_each_step_once_also_after_an_interruption(model: Path, tmp_path: Path) -> None:
    interrupted_and_resumed(tmp_path, model, "mlflow")
    client = MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("anchored")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    for kind, file in (("train", "metrics.jsonl"), ("held_out", "trajectories.jsonl")):
        found = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, f"{kind}/loss")]
        assert found == expected(tmp_path, file, "loss")
    assert run.data.params["train.objective.name"] == "apo-zero"
    assert (run.info.status, run.info.run_name) == ("FINISHED", tmp_path.name)


def log_records(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, which an offline run of wandb is after 7 bytes of header."""
    block, header, place, whole = 32_768, 7, 7, b""
    while place + header <= len(data):
        left = block - place % block
        if left < header:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + header])
        whole += data[place + header : place + header + length]
        place += header + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


def wandb_rows(folder: Path) -> list[dict[str, float]]:
    """The history rows of all offline runs in a folder, in the order of their making."""
    rows = []
    for file in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        for data in log_records(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                rows.append({(one.key or one.nested_key[0]): float(one.value_json) for one in record.history.item})
    return rows


def test_wandb_gets_each_step_once_also_after_an_interruption(model: Path, tmp_path: Path) -> None:
    interrupted_and_resumed(tmp_path, model, "wandb")
    rows = wandb_rows(tmp_path)
    found = [(int(row["_step"]), row["train/loss"]) for row in rows if "train/loss" in row]
    assert found == expected(tmp_path, "metrics.jsonl", "loss")
    ids = {file.name.rsplit("-", 1)[1] for file in (tmp_path / "wandb").glob("offline-run-*")}
    assert len(ids) == 1, "the same run goes on"


def test_a_new_run_in_the_same_folder_is_a_new_one_for_the_tracker(model: Path, tmp_path: Path) -> None:
    run = TrackedRun(tmp_path, {})
    for names in (("mlflow",), ("mlflow",)):
        with Trackers(names, run, Notes()) as opened:
            opened.log("train", {"step": 1, "loss": 1.0})
    client = MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("anchored")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 2


@pytest.fixture(scope="module")
def trackio_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trackio")
    # read once, as the package is imported
    os.environ["TRACKIO_DIR"] = str(folder)
    return folder


def test_trackio_gets_each_step_once_also_after_an_interruption(
    model: Path, tmp_path: Path, trackio_folder: Path
) -> None:
    interrupted_and_resumed(tmp_path, model, "trackio")
    with sqlite3.connect(trackio_folder / "anchored.db") as store:
        rows = store.execute("select run_name, run_id, step, metrics from metrics order by id").fetchall()
    logged = [(step, json.loads(metrics)) for _, _, step, metrics in rows]
    found = [(step, metrics["train/loss"]) for step, metrics in logged if "train/loss" in metrics]
    assert found == expected(tmp_path, "metrics.jsonl", "loss")
    assert len({(name, run) for name, run, _, _ in rows}) == 1, "the same run goes on"
    assert rows[0][0].startswith(tmp_path.name)


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_done(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(TrainError, match=r"names trackio, which is not installed; pip install 'anchored\[trackio\]'"):
        trained(tmp_path, model, settings("trackio"), PAIRS)
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_cannot_be_opened_ends_a_new_run_but_not_one_that_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://at-all")
    with pytest.raises(TrainError, match=r"mlflow cannot be opened \(.*nowhere.*\); mend that, or leave it out"):
        trained(tmp_path, model, settings("mlflow"), PAIRS)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, model, settings(), PAIRS, progress=InterruptAt("train", 3))
    notes = Notes()
    assert trained(tmp_path, model, settings("mlflow"), PAIRS, progress=notes).steps == 4
    assert "mlflow cannot be opened" in notes.text
    assert "training goes on without it" in notes.text


class Failing:
    """A tracker whose network is gone after two lines."""

    forgets = False

    def __init__(self, run: TrackedRun) -> None:
        self.lines = 0

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.lines += 1
        if self.lines > 2:
            raise ConnectionError("no route\nto host")

    def close(self) -> None: ...


class Hanging(Failing):
    """A tracker whose server never answers."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        threading.Event().wait()


def test_a_tracker_that_fails_is_told_of_once_and_training_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers._OPENERS, "mlflow", Failing)  # type: ignore[arg-type]
    notes = Notes()
    trained(tmp_path / "failing", model, settings("mlflow", "tensorboard"), PAIRS, HELD_OUT, notes)
    assert notes.text.count("mlflow failed (no route to host); training goes on without it") == 1
    trained(tmp_path / "none", model, settings(), PAIRS, HELD_OUT)
    weights = [
        (tmp_path / name / "checkpoints/epoch-02/model.safetensors").read_bytes() for name in ("failing", "none")
    ]
    assert weights[0] == weights[1]
    events = EventAccumulator(str(tmp_path / "failing" / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("train/loss")) == 4


def test_training_does_not_wait_for_a_tracker_that_hangs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers._OPENERS, "mlflow", Hanging)  # type: ignore[arg-type]
    monkeypatch.setattr(trackers, "_SECONDS_TO_CLOSE", 0.05)
    notes = Notes()
    trained(tmp_path, model, settings("mlflow"), PAIRS, progress=notes)
    assert "mlflow does not answer" in notes.text


def test_no_tracker_is_imported_that_was_not_asked_for() -> None:
    code = (
        "import sys, anchored.train.stage, anchored.pipeline;"
        "sys.exit(any(name in sys.modules for name in ('wandb', 'mlflow', 'trackio', 'tensorboard')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
