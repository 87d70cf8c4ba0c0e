"""Experiment trackers behind one seam: TensorBoard, Weights & Biases, trackio and MLflow, imported only when asked for.

In: the lines of `metrics.jsonl` and `trajectories.jsonl` as they are written. Out: the same numbers where people look
at their runs. Trackers are listeners: they work in threads of their own, and one that fails or hangs is told of once
and then left out, never waited for. What goes where is a tracker's own business (WANDB_MODE, MLFLOW_TRACKING_URI ...).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any, Protocol
from uuid import uuid4

from anchored.errors import TrainError
from anchored.progress import Progress
from anchored.runs import one_line, write_text

PROJECT = "anchored"
"""What the runs are filed under, unless the tracker's own environment variables say otherwise."""

_SECONDS_TO_CLOSE = 60.0
"""How long the end of training waits for trackers that still have something to write."""


_SILENT = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    # a folder of files is all that MLflow's small package can write without a server
    "MLFLOW_ALLOW_FILE_STORE": "true",
}
"""What keeps the trackers from sending their makers anything, or from working at all; the user's own values win."""


class Tracker(Protocol):
    """One open run of one tracker."""

    forgets: bool
    """Whether what an earlier process logged of steps that are done again is gone."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers by name; steps never fall."""

    def close(self) -> None:
        """All that was logged is kept, and the run is over."""


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """What a tracker is opened for."""

    folder: Path
    settings: Mapping[str, Any]
    """The resolved recipe."""
    done: int = 0
    """Steps that are not done again; those after it will be logged."""
    seen: int = 0
    """Last step that an earlier process logged: a tracker that cannot forget must not get it twice."""

    @property
    def begins(self) -> bool:
        """Whether no process logged anything yet."""
        return not self.done and not self.seen


def check_installed(names: tuple[str, ...]) -> None:
    """Raise for a tracker whose package is missing."""
    for name in names:
        if find_spec(name) is None:
            raise TrainError(
                f"train.trackers names {name}, which is not installed; pip install 'anchored[{name}]', or leave it out"
            )


class Trackers:
    """The trackers of a run; use as a context manager, so that they are closed however training ends."""

    def __init__(self, names: tuple[str, ...], run: TrackedRun, progress: Progress) -> None:
        self._progress = progress
        self._workers: list[_Worker] = []
        for name in names:
            tracker = self._opened(name, run)
            if tracker:
                after = -1 if tracker.forgets or run.begins else run.seen
                self._workers.append(_Worker(name, tracker, after, progress))

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        until = time.monotonic() + _SECONDS_TO_CLOSE
        for worker in self._workers:
            worker.close(until)

    def log(self, kind: str, line: Mapping[str, float]) -> None:
        """Pass a line on, its numbers named `kind/NAME`; returns at once."""
        values = {f"{kind}/{name}": value for name, value in line.items() if name != "step" and math.isfinite(value)}
        for worker in self._workers:
            worker.put(int(line["step"]), values)

    def _opened(self, name: str, run: TrackedRun) -> Tracker | None:
        for variable, value in _SILENT.items():
            os.environ.setdefault(variable, value)
        try:
            return _OPENERS[name](run)
        except Exception as error:  # of every kind: network, login, settings
            if run.begins:
                raise TrainError(
                    f"train.trackers: {name} cannot be opened ({one_line(error)}); mend that, or leave it out"
                ) from None
            self._progress.note(f"{name} cannot be opened ({one_line(error)}); training goes on without it")
            return None


class _Worker:
    """The thread that one tracker works in."""

    def __init__(self, name: str, tracker: Tracker, after: int, progress: Progress) -> None:
        self._name, self._tracker, self._after, self._progress = name, tracker, after, progress
        self._queue: Queue[tuple[int, Mapping[str, float]] | None] = Queue()
        self._thread = Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, step: int, values: Mapping[str, float]) -> None:
        """Let the tracker log this when it comes to it."""
        if step > self._after and self._thread.is_alive():
            self._queue.put((step, values))

    def close(self, until: float) -> None:
        """Wait for what is still to be written, but not longer than `until`, in monotonic seconds."""
        self._queue.put(None)
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._progress.note(f"{self._name} does not answer; what it has not written yet is lost to it")

    def _work(self) -> None:
        try:
            while (entry := self._queue.get()) is not None:
                self._tracker.log(*entry)
            self._tracker.close()
        except Exception as error:  # a tracker's troubles are never training's
            self._progress.note(f"{self._name} failed ({one_line(error)}); training goes on without it")


class _TensorBoard:
    forgets = True

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        # readers forget what a killed process wrote of the steps that are done again
        after = run.done + 1 if run.done else 0
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=after)
        self._writer.add_text("recipe", f"```json\n{json.dumps(run.settings, indent=1, default=str)}\n```", run.done)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    forgets = False

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run.folder.name),
            id=_name_in(run, "wandb", _new_name),
            dir=run.folder,
            config=dict(run.settings),
            resume="allow",
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    forgets = False

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        name = _name_in(run, "trackio", lambda: f"{run.folder.name}-{_new_name()}")
        # the run itself: the package's own functions find it in the thread that opened it alone
        self._run = trackio.init(project=PROJECT, name=name, config=dict(run.settings), resume="allow", embed=False)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    forgets = False

    def __init__(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient

        here = (run.folder / "mlflow").absolute().as_uri()
        self._client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", here))
        self._id = _name_in(run, "mlflow", lambda: self._create(run))
        self._client.update_run(self._id, status="RUNNING")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self._id, [Metric(name, value, now, step) for name, value in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self._id)

    def _create(self, run: TrackedRun) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        found = experiment.experiment_id if experiment else self._client.create_experiment(name)
        created = self._client.create_run(found, run_name=run.folder.name)
        params = [Param(key, str(value)) for key, value in _leaves(run.settings)]
        for start in range(0, len(params), 100):  # the most that one request may hold
            self._client.log_batch(created.info.run_id, params=params[start : start + 100])
        return created.info.run_id


def _name_in(run: TrackedRun, tracker: str, make: Callable[[], str]) -> str:
    """The tracker's name of this run, kept in the run folder so that a later process finds it; new for a new run."""
    path = run.folder / "trackers.json"
    known: dict[str, str] = {} if run.begins or not path.exists() else json.loads(path.read_text("utf-8"))
    if tracker not in known:
        known[tracker] = make()
        write_text(path, json.dumps(known, indent=1) + "\n")
    return known[tracker]


def _new_name() -> str:
    return uuid4().hex[:8]


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


_OPENERS: Mapping[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
    "mlflow": _Mlflow,
}
