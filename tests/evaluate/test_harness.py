"""lm-eval's tasks in the stage: its own scores to the last digit, nothing asked twice, what cannot be is refused."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from harness_world import LARGEST, LENGTH, NUMBERS, RULES, STOPPED, WORK, Function, reference, write_task, write_tasks
from peft import LoraConfig, get_peft_model
from tiny_models import CHATML, save_folder

from anchored import recipe as recipes
from anchored.errors import EvaluationError, ReplyError, Stopped
from anchored.evaluate import statistics
from anchored.evaluate.benchmark import Examinee
from anchored.evaluate.harness import Harness
from anchored.evaluate.likelihoods import Likelihoods
from anchored.evaluate.questions import Questions
from anchored.evaluate.settings import EvaluateSettings
from anchored.evaluate.stage import Checkpoint, evaluate
from anchored.llm.chat import Chat, Reply, Request
from anchored.llm.local_chat import LocalChat
from anchored.llm.model_folder import load_model, load_tokenizer, without_future_warnings
from anchored.llm.replies import ReplyStore
from anchored.pipeline import Plan, execute
from anchored.plan import make_plan
from anchored.pocket.world import policy_folder
from anchored.progress import Silent
from anchored.runs import Run, read_lines

NAMES = (WORK, STOPPED, RULES, NUMBERS)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def theirs(tasks: Path) -> dict[str, Any]:
    return reference(policy_folder(), tasks, NAMES)


@pytest.fixture(scope="module")
def run(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The pocket's policy, and what always says the same, on all tasks."""
    run = Run(tmp_path_factory.mktemp("run"))
    stage(run, tasks, NAMES, {"start": policy_folder(), "epoch-01": None})
    return run


def settings(tasks: Path, **more: Any) -> EvaluateSettings:
    return EvaluateSettings.model_validate({"lm_eval": {"include": str(tasks), **more}, "resamples": 200})


def benchmark(tasks: Path, name: str, limit: int | None = None, **more: Any) -> Harness:
    return Harness(name, settings(tasks, **more), limit, ("pocket",))


def stage(run: Run, tasks: Path, names: Sequence[str], models: Mapping[str, Path | None]) -> dict[str, Any]:
    """The stage with real models in this process; a model without a folder has a script."""
    with ReplyStore(run.replies) as store:

        def open_chat(checkpoint: Checkpoint) -> Chat:
            folder = models[checkpoint.name]
            return store.remember(LocalChat(folder, batch_size=8, name=checkpoint.name)) if folder else Scripted()

        def open_likelihoods(checkpoint: Checkpoint) -> Chat:
            folder = models[checkpoint.name]
            return store.remember(Likelihoods(folder, batch_size=8, name=checkpoint.name)) if folder else Scripted()

        checkpoints = [Checkpoint(name, step, folder or "") for step, (name, folder) in enumerate(models.items())]
        benchmarks = [benchmark(tasks, name) for name in names]
        return asyncio.run(
            evaluate(run, settings(tasks), benchmarks, checkpoints, open_chat, Silent(), {}, None, open_likelihoods)
        )


class Scripted:
    """Says one thing to everything, and finds the first ending the likeliest; fails at some questions, or is down."""

    name, fingerprint = "scripted", "scripted"

    def __init__(self, text: str = "ANSWER: 4", failing: str = "\0", down_after: int = sys.maxsize) -> None:
        self.asked: list[Request] = []
        self._text, self._failing, self._down_after = text, failing, down_after

    async def reply(self, request: Request) -> Reply:
        if len(self.asked) >= self._down_after:
            raise Stopped("it is down")
        self.asked.append(request)
        said = request.messages[-1].content
        if self._failing in said:
            raise ReplyError("it cannot")
        if said.startswith("[["):
            endings = [ending for _, some in json.loads(said) for ending in some]
            return Reply(json.dumps([[-float(place), place == 0] for place in range(len(endings))]), "stop", self.name)
        return Reply(self._text, "stop", self.name)

    async def close(self) -> None: ...


def examined(one: Harness, chat: Chat, name: str = "start", folder: Path | None = None) -> dict[str, Any]:
    rows = asyncio.run(one.examine(Examinee(name, folder, chat, chat), Silent()))
    return {row.item.id: row for row in rows}


def names_of(task: str) -> Iterator[tuple[str, str]]:
    """Each view of a task with lm-eval's name for it."""
    for view in {
        WORK: (exact := ["exact_match,strict-match", "exact_match,flexible-extract"]),
        STOPPED: exact,
        NUMBERS: ["acc", "acc_norm"],
        RULES: [f"{level}_level_{kind}_acc" for kind in ("strict", "loose") for level in ("prompt", "inst")],
    }[task]:
        yield view, view if "," in view else f"{view},none"


def test_every_score_is_lm_evals_own(theirs: dict[str, Any], run: Run) -> None:
    ours = {
        (line["benchmark"], line["view"], line["category"]): line
        for line in read_lines(run.scores)
        if line["checkpoint"] == "start"
    }
    expected = {(task, view, None): theirs["results"][task][key] for task in NAMES for view, key in names_of(task)}
    for task in (LARGEST, LENGTH):
        expected |= {(NUMBERS, view, task): theirs["results"][task][key] for view, key in names_of(NUMBERS)}
    assert {key: line["score"] for key, line in ours.items()} == pytest.approx(
        {key: 100 * value for key, value in expected.items()}, abs=1e-9
    )
    assert len({round(value, 6) for value in expected.values()}) > 5
    assert ours[WORK, "exact_match,strict-match", None]["version"] == "lm-eval 0.4.13, version 3.0, 0-shot"
    assert ours[NUMBERS, "acc", None]["n"] == 18


def test_every_answer_and_grade_is_lm_evals_own(theirs: dict[str, Any], run: Run) -> None:
    for task in NAMES:
        rows = {row["id"]: row for row in read_lines(run.answers / task / "start.jsonl")}
        parts = (LARGEST, LENGTH) if task == NUMBERS else (task,)
        seen = set()
        for part in parts:
            for sample in theirs["samples"][part]:
                row = rows[f"{part}/{sample['doc_id']}" if task == NUMBERS else str(sample["doc_id"])]
                seen.add(row["id"])
                if task != NUMBERS:
                    assert row["answer"] == sample["resps"][0][0]
                for view, key in names_of(task):
                    metric, _, filtered = key.partition(",")
                    if filtered == sample["filter"]:
                        assert row["grades"][view] == pytest.approx(np.mean(sample[metric]), abs=1e-12)
        assert seen == set(rows)
    exported = json.loads((run.answers / RULES / "start" / "results.json").read_text())
    key = "inst_level_loose_acc,none"
    assert (
        exported["results"][RULES]["inst_level_loose_acc,none"] == theirs["results"][RULES]["inst_level_loose_acc,none"]
    )


def test_the_model_stops_where_a_task_says(run: Run) -> None:
    with ReplyStore(run.replies) as store:
        rows = store._reader.execute(
            "select reply, raw, request from replies where request like '%, carry%'"
        ).fetchall()
    stopped = 0
    for reply, raw, request in rows:
        past = json.loads(raw)["text"].removeprefix(json.loads(reply)["text"])
        stopped += any(past.startswith(stop) for stop in json.loads(request)["stop"])
        assert len(past) < 12  # nothing is written past the token that ends it
    assert (len(rows), stopped) == (4, 3)


def test_likelihoods_are_lm_evals_own(theirs: dict[str, Any], run: Run) -> None:
    with ReplyStore(run.replies) as store:
        asked = store._reader.execute("select request, reply from replies where model like '%likelihoods%'").fetchall()
    ours = {}
    for request, reply in asked:
        ((context, endings),) = json.loads(json.loads(request)["messages"][0]["content"])
        ours[json.loads(context)[-1]["content"], tuple(endings)] = json.loads(json.loads(reply)["text"])
    assert len(ours) == 18
    for task in (LARGEST, LENGTH):
        for sample in theirs["samples"][task]:
            question = ("" if task == LARGEST else "Quick: ") + sample["doc"]["question"]
            found = ours[question, tuple(ending for _, ending in sample["arguments"])]
            assert [value for value, _ in found] == pytest.approx(
                [value for ((value, _),) in sample["resps"]], abs=1e-3
            )


def test_an_adapter_is_measured_on_its_base_model(tasks: Path, tmp_path: Path) -> None:
    base = save_folder(tmp_path / "base")
    torch.manual_seed(0)
    adapters = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with without_future_warnings():
        adapted: Any = get_peft_model(load_model(base), adapters)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    load_tokenizer(base).save_pretrained(tmp_path / "merged")
    load_tokenizer(base).save_pretrained(tmp_path / "adapter")
    asked = Scripted()
    examined(benchmark(tasks, LARGEST, limit=3), asked)

    async def values(folder: Path) -> list[Any]:
        chat = Likelihoods(folder, batch_size=2, name=folder.name)
        replies = await asyncio.gather(*map(chat.reply, asked.asked))
        await chat.close()
        return [value for reply in replies for value, _ in json.loads(reply.text)]

    found = {name: asyncio.run(values(tmp_path / name)) for name in ("base", "adapter", "merged")}
    assert found["adapter"] == pytest.approx(found["merged"], abs=1e-3)
    assert found["adapter"] != pytest.approx(found["base"], abs=1e-2)


def test_improvements_are_paired_and_ratios_weigh_their_parts(run: Run) -> None:
    rows = {
        (row["benchmark"], row["view"], row["category"]): row for row in (run.summary("evaluate") or {})["improvement"]
    }
    view = "inst_level_strict_acc"
    answers = [read_lines(run.answers / RULES / f"{name}.jsonl") for name in ("start", "epoch-01")]
    grades = np.array([[row["grades"][view] for row in one] for one in answers])
    parts = np.array([2, 1, 3, 2])
    resampled = [
        100 * ((grades[1] - grades[0]) * parts * counts).sum() / (parts * counts).sum()
        for counts in statistics.draws(4, 200, 0)
    ]
    row = rows[RULES, view, None]
    assert row["last"]["value"] == pytest.approx(100 * ((grades[1] - grades[0]) @ parts) / 8)
    assert [row["last"]["low"], row["last"]["high"]] == pytest.approx(np.quantile(resampled, [0.025, 0.975]).tolist())
    assert {key[2] for key in rows if key[0] == NUMBERS} == {None, LARGEST, LENGTH}


def test_what_was_answered_is_never_asked_again(tasks: Path, tmp_path: Path) -> None:
    for name in (WORK, NUMBERS):
        with ReplyStore(tmp_path / f"{name}.sqlite") as store:
            first, second = Scripted(down_after=5), Scripted()
            with pytest.raises(Stopped, match="it is down"):
                examined(benchmark(tasks, name), store.remember(first))
            rows = examined(benchmark(tasks, name), store.remember(second))
        keys = [{request.messages for request in chat.asked} for chat in (first, second)]
        assert len(keys[0]) == 5
        assert not keys[0] & keys[1]
        assert len(keys[0] | keys[1]) == len(rows)


def test_an_answer_that_cannot_be_had_is_in_no_score(tasks: Path) -> None:
    one = benchmark(tasks, WORK)
    rows = examined(one, Scripted())
    question = rows["3"].item.prompt.messages[-1].content
    other = benchmark(tasks, WORK)
    rows = examined(other, Scripted(failing=question))
    assert rows["3"].grades is None
    assert (rows["3"].grade.note, rows["3"].grade.remarks) == ("it cannot", ("without an answer",))
    assert sum(row.grades is not None for row in rows.values()) == 11
    with pytest.raises(EvaluationError, match="no item got an answer; the first one: it cannot"):
        examined(benchmark(tasks, WORK), Scripted(failing=""))


def test_a_stop_ends_an_answer_and_a_limit_cuts_it(tasks: Path) -> None:
    class Cut(Scripted):
        async def reply(self, request: Request) -> Reply:
            text = "4\nQuestion: more" if "coins" in request.messages[-1].content else "4 and so on"
            return Reply(text, "length", self.name)

    rows = examined(benchmark(tasks, WORK), Cut()).values()
    assert {row.answer for row in rows} == {"4\n", "4 and so on"}
    assert all((row.answer == "4\n") == (row.grade.remarks == ()) for row in rows)


def test_examples_stand_before_each_question_as_turns(tasks: Path) -> None:
    chat = Scripted()
    one = benchmark(tasks, WORK, limit=2, fewshot=2)
    examined(one, chat)
    assert one.version.endswith("2-shot")
    assert [len(request.messages) for request in chat.asked] == [5, 5]
    shown = [json.loads(line) for line in (tasks / "prompts-6.jsonl").read_text().splitlines()]
    for request in chat.asked:
        turns = [message.content for message in request.messages]
        assert {"question": turns[0], "answer": turns[1]} in shown
        assert (request.max_tokens, request.temperature) == (64, 0.0)


def test_several_samples_of_an_answer_are_drawn_apart(tmp_path: Path) -> None:
    drawn = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "until": []}
    greedy = {"do_sample": False, "until": []}
    for name, how in (("drawn", drawn), ("greedy", greedy)):
        write_task(tmp_path, name, repeats=3, generation_kwargs=how)
    for name, how in (("drawn", drawn), ("greedy", greedy)):
        chat = Scripted()
        examined(benchmark(tmp_path, name, limit=1), chat)
        assert [request.index for request in chat.asked] == ([0, 1, 2] if how is drawn else [0, 0, 0])
        asked = {(request.temperature, request.top_p, request.max_tokens) for request in chat.asked}
        assert asked == {(0.5, 0.9, 256) if how is drawn else (0.0, 1.0, 256)}


def test_a_group_may_mix_texts_and_likelihoods(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    both = [{"metric": "acc", "weight_by_size": True}, {"metric": "exact_match", "weight_by_size": True}]
    group = {"group": "both", "task": [LARGEST, WORK], "aggregate_metric_list": both}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(group))
    one = benchmark(tmp_path, "both")
    rows = examined(one, Scripted("Answer: 1"))
    assert one.needs_weights
    views = {view.name: {name.partition("/")[0] for name in view.left_out} for view in one.views}
    assert views == {"acc": {WORK}, "exact_match,flexible-extract": {LARGEST}, "exact_match,strict-match": {LARGEST}}
    assert {row.answer for name, row in rows.items() if name.startswith(WORK)} == {"Answer: 1"}


def test_a_question_is_known_by_its_document_whatever_the_prompt(tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    filtered = {"function": "take_first"}
    write_task(
        tasks,
        "thoughtful",
        dataset_kwargs={"data_files": {"test": str(tasks / "held-out-12.jsonl")}},
        doc_to_text="Q: {{question}}\n\nA: Let's think step by step.",
        training_split=None,
        fewshot_split=None,
        filter_list=[{"name": "other", "filter": [filtered]}],
    )
    asked = (tasks / "held-out-12.jsonl").read_text().splitlines()
    (tmp_path / "mine.jsonl").write_text("\n".join([*asked[:3], '{"question": "Another?", "answer": "yes"}']))
    ours, theirs = benchmark(tasks, WORK), benchmark(tasks, "thoughtful")
    for one in (ours, theirs):
        examined(one, Scripted())
    mine = Questions(tmp_path / "mine.jsonl")
    known = {one.name: [item.known_by for item in one.items()] for one in (ours, theirs, mine)}
    assert not {item.asked for item in ours.items()} & {item.asked for item in theirs.items()}
    assert all(one & other for one, other in zip(known[WORK], known["thoughtful"], strict=True))
    assert not any(one & other for place, one in enumerate(known[WORK]) for other in known["thoughtful"][:place])
    assert [any(one & other for other in known[WORK]) for one in known["mine"]] == [True] * 3 + [False]


def test_a_limit_is_of_all_tasks_together(tasks: Path) -> None:
    rows = examined(benchmark(tasks, NUMBERS, limit=5), Scripted())
    assert list(rows) == [f"{LARGEST}/{place}" for place in range(3)] + [f"{LENGTH}/{place}" for place in range(2)]
    assert list(examined(benchmark(tasks, NUMBERS, limit=1), Scripted())) == [f"{LARGEST}/0"]


def test_a_template_without_a_system_turn_is_asked_without(tmp_path: Path) -> None:
    write_task(tmp_path, "described", description="Be exact.\n\n")
    refusing = CHATML.replace(
        "{% for", "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for", 1
    )
    asked = []
    for name, template in (("takes", CHATML), ("refuses", refusing)):
        chat = Scripted()
        folder = save_folder(tmp_path / name, chat_template=template)
        examined(benchmark(tmp_path, "described"), chat, folder=folder)
        asked.append([message.role for message in chat.asked[0].messages])
    assert asked == [["system", "user"], ["user"]]


METRICS = """
def process_results(doc, results):
    place = len(doc["question"])
    some = float("nan") if place % 2 else 1
    return {"good": 0.5, "fewer": 0.2, "percent": 50.0, "most": 0.25 * (place % 4), "some": some}

def most(values):
    return max(values)
"""
AGGREGATION = {"good": "mean", "fewer": "mean", "percent": "mean", "most": Function("metrics.most"), "some": "nanmean"}


def write_metrics(folder: Path, name: str, *metrics: str) -> None:
    (folder / "metrics.py").write_text(METRICS)
    listed = [
        {"metric": metric, "aggregation": AGGREGATION[metric], "higher_is_better": metric != "fewer"}
        for metric in metrics
    ]
    write_task(folder, name, metric_list=listed, process_results=Function("metrics.process_results"), filter_list=None)


def test_a_metric_that_is_no_mean_of_grades_is_left_out_by_name(tmp_path: Path) -> None:
    write_metrics(tmp_path, "mixed", *AGGREGATION)
    write_metrics(tmp_path, "poor", "most", "fewer")
    one = benchmark(tmp_path, "mixed")
    rows = examined(one, Scripted())
    good, some = one.views
    assert (good.name, good.left_out, some.name) == ("good", frozenset(), "some")
    assert some.left_out == {name for name, row in rows.items() if len(row.item.prompt.messages[0].content) % 2}
    assert one.notes(rows) == [
        "fewer is left out: lower is better",
        "percent is left out: its values are not from 0 to 1 (as 50)",
        "most is left out: it is no mean over questions",
    ]
    with pytest.raises(EvaluationError, match=r"poor has no score that is a mean.*most: it is no mean.*fewer: lower"):
        benchmark(tmp_path, "poor")


@pytest.mark.parametrize(
    ("changed", "more", "says"),
    [
        ({"unsafe_code": True}, {}, r"odd runs code that the model writes.*lm_eval\.unsafe_code to true"),
        ({"gen_prefix": "Answer:"}, {}, r"odd begins the answer itself \(gen_prefix\)"),
        ({"generation_kwargs": {"do_sample": True, "temperature": 1.0, "top_k": 5}}, {}, "odd generates with top_k: 5"),
        ({"generation_kwargs": {"num_beams": 10}}, {}, "odd generates with num_beams: 10"),
        ({"output_type": "loglikelihood_rolling", "filter_list": None}, {}, "odd measures perplexity"),
        (
            {"dataset_kwargs": {"data_files": "gone.jsonl"}},
            {},
            r"lm-eval cannot load odd: .*gone\.jsonl.*its data must be",
        ),
        (
            {"process_results": Function("odd.of")},
            {},
            "odd needs what cannot be imported: .*No module named 'nowhere_to_be_found'",
        ),
        ({}, {"include": "nowhere"}, "evaluate.lm_eval.include: nowhere is no folder"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    changed: dict[str, Any], more: dict[str, Any], says: str, tmp_path: Path
) -> None:
    write_task(tmp_path, "odd", **changed)
    (tmp_path / "odd.py").write_text("import nowhere_to_be_found\n")
    with pytest.raises(EvaluationError, match=says):
        benchmark(tmp_path, "odd", **more)


def test_a_group_without_a_score_names_its_members(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    (tmp_path / "loose.yaml").write_text(f"group: loose\ntask: [{LARGEST}, {LENGTH}]\n")
    with pytest.raises(
        EvaluationError, match=f"loose has no score of its own in lm-eval; name its members: {LARGEST}, "
    ):
        benchmark(tmp_path, "loose")


def test_without_the_extra_the_way_out_is_named(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(
        EvaluationError, match=r"'gsm8k' is not known; choose from pocket.*pip install 'anchored\[lm-eval\]'"
    ):
        benchmark(tasks, "gsm8k")


@pytest.mark.slow
def test_a_misspelt_name_has_hints_and_lm_evals_own_tasks_are_known(tasks: Path) -> None:
    with pytest.raises(EvaluationError, match=r"'gsm8kk' is none of pocket.*no task of lm-eval; did you mean gsm8k"):
        benchmark(tasks, "gsm8kk")
    with pytest.raises(EvaluationError, match=r"ai2_arc has no score of its own.*: arc_challenge, arc_easy"):
        benchmark(tasks, "ai2_arc")
    with pytest.raises(EvaluationError, match="humaneval runs code"):
        benchmark(tasks, "humaneval")


def plan(folder: Path, tasks: Path, names: Sequence[str], **more: Any) -> Plan:
    evaluation = {"benchmarks": list(names), "lm_eval": {"include": str(tasks)}, "resamples": 100, **more}
    recipe = recipes.parse({"policy": {"model": "pocket"}, "evaluate": evaluation, "limit": 4}, "recipe")
    return Plan(recipe, folder, stages=("evaluate",))


def test_a_run_is_evaluated_and_complete_stages_load_nothing(tasks: Path, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.complete("train", {"checkpoints": {}})
    execute(plan(tmp_path, tasks, ["pocket", WORK, NUMBERS], sample={"max_tokens": 8}), Silent())
    lines = [line for line in read_lines(run.scores) if line["category"] is None]
    assert {line["benchmark"]: line["n"] for line in lines} == {"pocket": 4, WORK: 4, NUMBERS: 4}
    assert (run.summary("evaluate") or {})["ungraded"] == 0


def test_data_that_is_not_there_is_found_before_training(tmp_path: Path) -> None:
    write_task(tmp_path / "tasks", "odd", dataset_kwargs={"data_files": "gone.jsonl"})
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "x", "chosen": "y", "rejected": "z"}\n' * 4)
    more = {"train": {"data": str(pairs)}, "policy": {"model": "pocket"}}
    evaluation = {"benchmarks": ["odd"], "lm_eval": {"include": str(tmp_path / "tasks")}}
    recipe = recipes.parse({**more, "evaluate": evaluation}, "recipe")
    for attempt in (
        lambda: make_plan(recipe, tmp_path / "run"),
        lambda: execute(Plan(recipe, tmp_path / "run"), Silent()),
    ):
        with pytest.raises(EvaluationError, match="lm-eval cannot load odd"):
            attempt()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_model_at_an_endpoint_has_no_likelihoods(tasks: Path, tmp_path: Path) -> None:
    stronger = {"model": "big", "base_url": "http://127.0.0.1:9/v1"}
    with pytest.raises(EvaluationError, match=f"at an endpoint, and {NUMBERS} needs"):
        execute(plan(tmp_path, tasks, [NUMBERS], stronger=stronger), Silent())


def test_whoever_waits_for_an_examination_can_leave(tasks: Path) -> None:
    class Slow(Scripted):
        async def reply(self, request: Request) -> Reply:
            await asyncio.sleep(3600)
            raise AssertionError

    async def leave() -> None:
        chat = Slow()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(benchmark(tasks, WORK).examine(Examinee("x", None, chat, chat), Silent()), 1)

    asyncio.run(leave())  # returns when lm-eval's thread has ended
