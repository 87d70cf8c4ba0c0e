"""Small tasks in lm-eval's own YAML over local files, in the forms that people use, and lm-eval's own model on them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from anchored.pocket.tasks import Split, make_tasks

WORK, LARGEST, LENGTH, RULES = "pocket_work", "pocket_largest", "pocket_length", "pocket_rules"
"""gsm8k's form, two multiple choices, ifeval's form."""
STOPPED = "pocket_stopped"
"""gsm8k's form, with stops that the pocket's policy writes."""
NUMBERS = "pocket_numbers"
"""The group of both multiple choices, whose `acc` is a mean of tasks and whose `acc_norm` one of questions."""
# ifeval would download what splits sentences, which no instruction here needs
_UTILS = """
from pathlib import Path

import nltk

nltk.data.path.insert(0, str(Path(__file__).with_name("nltk_data")))
from lm_eval.tasks.ifeval.utils import agg_inst_level_acc, process_results
"""
_ACC = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
_INSTRUCTIONS = [
    ("Write without any comma, in all lower case.", ["punctuation:no_comma", "change_case:english_lowercase"]),
    ("Add 12 and 30 without any comma.", ["punctuation:no_comma"]),
    (
        "Wrap your answer in quotation marks. Use no comma, and a title in double angular brackets.",
        ["startend:quotation", "punctuation:no_comma", "detectable_format:title"],
    ),
    ("Answer in capital letters. No comma.", ["change_case:english_capital", "punctuation:no_comma"]),
]


class Function(str):
    """A function of a Python file beside the YAML."""


yaml.SafeDumper.add_representer(Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def write_tasks(folder: Path, questions: int = 12) -> Path:
    """The folder with all tasks."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_yaml(folder, WORK, _work(folder, questions))
    stops = {"until": [", carry", " left\n", "add the"], "do_sample": False, "max_gen_toks": 64}
    write_task(folder, STOPPED, generation_kwargs=stops)
    for name, count in ((LARGEST, questions), (LENGTH, questions // 2)):
        _write_yaml(folder, name, _choice(folder, name, count))
    weighing = [{"metric": "acc", "weight_by_size": False}, {"metric": "acc_norm", "weight_by_size": True}]
    group = {"task": [LARGEST, LENGTH], "aggregate_metric_list": weighing, "metadata": {"version": 2.0}}
    _write_yaml(folder, NUMBERS, {"group": NUMBERS, **group})
    _write_yaml(folder, RULES, _rules(folder))
    (folder / "rules.py").write_text(_UTILS)
    (folder / "nltk_data" / "tokenizers" / "punkt_tab").mkdir(parents=True, exist_ok=True)
    return folder


def write_task(folder: Path, name: str, **changed: Any) -> None:
    """One more task: the one of gsm8k's form with other settings; None takes one away."""
    folder.mkdir(exist_ok=True)
    settings = {**_work(folder, 4), **changed}
    _write_yaml(folder, name, {key: value for key, value in settings.items() if value is not None})


def reference(model: Path, tasks: Path, names: Sequence[str], **arguments: Any) -> dict[str, Any]:
    """What lm-eval itself finds with its own model class on the same folder."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(str(model), device="cpu", dtype="float32", batch_size=4, enable_thinking=False)
    # where a model's folder has it, HFLM takes it in place of the task's own limit
    lm.model.generation_config.max_new_tokens = None
    found = simple_evaluate(
        lm,
        tasks=list(names),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        bootstrap_iters=0,
        **arguments,
    )
    assert found is not None
    return dict(found)


def _work(folder: Path, questions: int) -> dict[str, Any]:
    files = {"train": _questions(folder, 6, "prompts"), "test": _questions(folder, questions, "held-out")}
    exact = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}
    return {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "output_type": "generate_until",
        "training_split": "train",
        "fewshot_split": "train",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [exact],
        "generation_kwargs": {
            "until": ["Question:", "</s>"],
            "do_sample": False,
            "temperature": 0.0,
            "max_gen_toks": 64,
        },
        "filter_list": [
            {"name": "strict-match", "filter": [{"function": "regex", "regex_pattern": "Answer: (.+)"}, _FIRST]},
            {
                "name": "flexible-extract",
                "filter": [
                    {"function": "regex", "group_select": -1, "regex_pattern": "(-?[0-9.]{2,})|([0-9]+)"},
                    _FIRST,
                ],
            },
        ],
        "metadata": {"version": 3.0},
    }


_FIRST = {"function": "take_first"}


def _questions(folder: Path, count: int, split: Split) -> str:
    tasks = make_tasks(count, 3, split)
    return _write_lines(
        folder / f"{split}-{count}.jsonl", ({"question": t.question, "answer": t.result} for t in tasks)
    )


def _choice(folder: Path, name: str, count: int) -> dict[str, Any]:
    rows = []
    for place in range(count):
        numbers = [str(10 + (7 * place + 13 * other) % 83) for other in range(4)]
        best = max(range(4), key=lambda index, of=numbers: int(of[index]))
        rows.append({"question": f"Which is the largest, {', '.join(numbers)}?", "choices": numbers, "best": best})
    return {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": _write_lines(folder / f"{name}.jsonl", rows)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "description": "Choose a number.\n\n" if name == LARGEST else "",
        "doc_to_text": "{{question}}" if name == LARGEST else "Quick: {{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "best",
        "metric_list": _ACC,
        "metadata": {"version": 1.0},
    }


def _rules(folder: Path) -> dict[str, Any]:
    rows = [
        {"key": place, "prompt": prompt, "instruction_id_list": rules, "kwargs": [{"unused": None}] * len(rules)}
        for place, (prompt, rules) in enumerate(_INSTRUCTIONS)
    ]
    metrics = [
        {"metric": f"{level}_level_{kind}_acc", "aggregation": aggregation, "higher_is_better": True}
        for kind in ("strict", "loose")
        for level, aggregation in (("prompt", "mean"), ("inst", Function("rules.agg_inst_level_acc")))
    ]
    return {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"train": _write_lines(folder / "rules.jsonl", rows)}},
        "output_type": "generate_until",
        "test_split": "train",
        "num_fewshot": 0,
        "doc_to_text": "prompt",
        "doc_to_target": 0,
        "generation_kwargs": {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": 24},
        "process_results": Function("rules.process_results"),
        "metric_list": metrics,
        "metadata": {"version": 4.0},
    }


def _write_yaml(folder: Path, name: str, settings: dict[str, Any]) -> None:
    named = settings if "group" in settings else {"task": name, **settings}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(named, sort_keys=False))


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
