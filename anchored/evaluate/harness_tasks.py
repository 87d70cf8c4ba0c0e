"""Tasks of lm-eval by name: found, loaded with their data, and tried on a question before any model is asked.

In: a name and the settings. Out: `Tasks`. Whatever would fail after hours of training fails here: an unknown name, data
that cannot be had, a missing package, a task that a chat cannot answer or that runs what a model writes.
"""

from __future__ import annotations

import difflib
import io
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anchored.errors import AnchoredError, EvaluationError
from anchored.evaluate.settings import LmEvalSettings
from anchored.runs import one_line

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry

PACKAGE = "lm-eval"
# what lm-eval's own command seeds with: its few-shot examples are drawn by it
_SEED, _OTHER_SEED = 0, 1234
_SHOWN = 6
_TRIAL = "It is 42."


@dataclass(frozen=True, slots=True, eq=False)
class Tasks:
    """What a name stands for: a task, or a group of tasks with a score of its own."""

    name: str
    tasks: Mapping[str, ConfigurableTask]
    group: Group | None
    version: str
    """lm-eval's, the task's own, and how many examples stand before each question."""

    @property
    def needs_weights(self) -> bool:
        """Whether likelihoods decide, which only a model's own weights tell."""
        return any(task.OUTPUT_TYPE != "generate_until" for task in self.tasks.values())

    def seed(self) -> None:
        """As lm-eval's own command does before each evaluation."""
        _seed()
        for task in self.tasks.values():
            task.set_fewshot_seed(_OTHER_SEED)


def load_tasks(name: str, settings: LmEvalSettings, others: Sequence[str]) -> Tasks:
    """The tasks of that name; `others` are names that are not lm-eval's, for a hint. Once per name and settings."""
    _check_installed(name, others)
    return _load(name, settings.model_dump_json(), tuple(others))


@lru_cache
def _load(name: str, content: str, others: tuple[str, ...]) -> Tasks:
    import lm_eval

    settings = LmEvalSettings.model_validate_json(content)
    include = settings.include
    if include is not None and not Path(include).is_dir():
        raise EvaluationError(
            f"evaluate.lm_eval.include: {include} is no folder; name the one that holds your tasks' YAML"
        )
    # packages and tasks print what they download
    with quiet(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        manager = _manager_of(name, include)
        _check_name(name, manager.task_index, others)
        if (manager.task_index[name].cfg or {}).get("unsafe_code"):  # some run code when they are loaded
            _check_code(f"evaluate.benchmarks: {name}", settings)
        with _named_errors(name):
            _seed()
            found = manager.load([name])
        tasks: dict[str, Any] = dict(found["tasks"])
        for task in tasks.values():
            _check_kind(name, task, settings)
            _set_shots(task, settings.fewshot)
        group = found.get("groups", {}).get(name)
        shots = {task.get_config("num_fewshot") for task in tasks.values()}
        facts = [
            f"{PACKAGE} {lm_eval.__version__}",
            f"version {group.version if group else next(iter(tasks.values())).VERSION}",
            f"{shots.pop()}-shot" if len(shots) == 1 else "",
        ]
        loaded = Tasks(name, tasks, group, ", ".join(filter(None, facts)))
        _try(loaded, settings)
    return loaded


def _check_installed(name: str, others: Sequence[str]) -> None:
    unknown = f"evaluate.benchmarks: {name!r} is not known; choose from {', '.join(others)}, or give a path to a .jsonl"
    if "/" in name:  # no task of lm-eval's
        raise EvaluationError(f"{unknown} of questions{_nearest(name, others)}")
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise EvaluationError(
            f"{unknown} of questions; if it is one of {PACKAGE}'s tasks: pip install 'anchored[{PACKAGE}]'"
        ) from error


def _manager_of(name: str, include: str | None) -> TaskManager:
    """One that knows the name; lm-eval's 14,000 own tasks take seconds to read, so only where one's own do not do."""
    if include is not None:
        own = _manager(include, defaults=False)
        if _is_complete(name, own.task_index):
            return own
    return _manager(include, defaults=True)


@lru_cache
def _manager(include: str | None, *, defaults: bool) -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include, include_defaults=defaults)


def _is_complete(name: object, index: Mapping[str, Entry]) -> bool:
    """Whether a task, or all of a group's, are in the index."""
    entry = index.get(name) if isinstance(name, str) else None
    if entry is None or entry.kind.name == "TAG":
        return False
    children = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else None
    return all(_is_complete(child, index) for child in children) if isinstance(children, list) else True


def _check_name(name: str, index: Mapping[str, Entry], others: Sequence[str]) -> None:
    entry = index.get(name)
    if entry is None:
        raise EvaluationError(
            f"evaluate.benchmarks: {name!r} is none of {', '.join(others)}, no path of a .jsonl of questions, and no "
            f"task of {PACKAGE}{_nearest(name, [*others, *index])}"
        )
    members: Sequence[str] = ()
    if entry.kind.name == "TAG":
        members = sorted(entry.tags)
    elif entry.kind.name == "GROUP" and not (entry.cfg or {}).get("aggregate_metric_list"):
        listed = (entry.cfg or {}).get("task") or ()
        members = [one if isinstance(one, str) else str(one.get("task", one.get("group"))) for one in listed]
    if members:
        more = f" and {len(members) - _SHOWN} more" if len(members) > _SHOWN else ""
        raise EvaluationError(
            f"evaluate.benchmarks: {name} has no score of its own in {PACKAGE}; name its members: "
            f"{', '.join(members[:_SHOWN])}{more}"
        )


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _check_kind(name: str, task: Any, settings: LmEvalSettings) -> None:
    from lm_eval.api.task import ConfigurableTask

    which = f"evaluate.benchmarks: {name}" + (f": {task.task_name}" if task.task_name != name else "")
    if getattr(task, "UNSAFE_CODE", False):
        _check_code(which, settings)
    if getattr(task, "MULTIMODAL", False):
        raise EvaluationError(f"{which} shows pictures or plays sound, which cannot be asked here; leave it out")
    if not isinstance(task, ConfigurableTask):
        raise EvaluationError(
            f"{which} writes its prompts past the chat template; only tasks that take one can be asked"
        )
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        raise EvaluationError(
            f"{which} measures perplexity, of which nothing here makes a score; use {PACKAGE}'s command"
        )


def _check_code(which: str, settings: LmEvalSettings) -> None:
    if not settings.unsafe_code:
        raise EvaluationError(
            f"{which} runs code that the model writes, and nothing shields this machine from it; where that may be, "
            "set evaluate.lm_eval.unsafe_code to true"
        )


def _set_shots(task: Any, fewshot: int | None) -> None:
    """By lm-eval's own rule: a task that says 0 keeps it."""
    own = task.get_config("num_fewshot")
    if own is None:
        task.set_config("num_fewshot", fewshot or 0)
    elif fewshot is not None and own != 0:
        task.set_config("num_fewshot", fewshot)


def _try(loaded: Tasks, settings: LmEvalSettings) -> None:
    """Write each task's first question, see that it can be asked, and grade an answer to it."""
    from anchored.evaluate.harness_requests import as_conversation, generation, pair

    loaded.seed()
    for task in loaded.tasks.values():
        with _named_errors(loaded.name):
            task.build_all_requests(
                limit=1, apply_chat_template=True, fewshot_as_multiturn=True, chat_template=as_conversation
            )
            for instance in task.instances:
                if instance.request_type == "generate_until":
                    generation(instance, settings.max_tokens)
                    instance.resps = [_TRIAL] * (instance.repeats or 1)
                else:
                    pair(instance)
                    instance.resps = [(-1.0, False)]
            task.apply_filters()
            for name in task.instances[0].filtered_resps:
                found = [instance.filtered_resps[name] for instance in task.instances]
                task.process_results(task.instances[0].doc, found)


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Whatever a task's own code, its data or its packages raise, as one that says which task it was."""
    try:
        yield
    except AnchoredError:
        raise
    except ImportError as error:
        raise EvaluationError(
            f"evaluate.benchmarks: {name} needs what cannot be imported: {one_line(error)}; install the package, "
            "or leave the task out"
        ) from error
    except Exception as error:
        raise EvaluationError(
            f"evaluate.benchmarks: {PACKAGE} cannot load {name}: {type(error).__name__}: {one_line(error)[:300]}; its "
            "data must be on the Hub and within reach, in the cache of an earlier download, or where its YAML says"
        ) from error


def _seed() -> None:
    import torch

    random.seed(_SEED)
    np.random.seed(_OTHER_SEED)
    torch.manual_seed(_OTHER_SEED)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and log lines: the command shows its own."""
    import datasets
    from lm_eval.api import task
    from tqdm import tqdm

    log, hidden = logging.getLogger("lm_eval"), datasets.are_progress_bars_disabled()
    level, bar = log.level, task.tqdm
    log.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    task.tqdm = partial(tqdm, disable=True)  # its call has no switch
    try:
        yield
    finally:
        task.tqdm = bar
        log.setLevel(level)
        if not hidden:
            datasets.enable_progress_bars()
