"""`anchored plan`: checks what training would check, estimates what it would take, and leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
from commands import ENVIRONMENT, anchored
from tiny_models import save_folder
from training_pairs import make_pairs, make_settings

from anchored.batches.tree import plant
from anchored.datasets_io import write_pairs
from anchored.train.estimate import available_memory, estimate_disk, estimate_memory, ways_to_fit

MEASURE = """
import re, sys
from test_plan import drawn_trees
from training_pairs import make_settings
from anchored.train.optimizer import build_optimizer
from anchored.train.policy import load_policy

def train(model, trees, steps):
    policy = load_policy(model, settings)
    optimizer = build_optimizer(policy.weights.values(), settings.optimizer)
    for _ in range(steps):
        for _ in range(2):
            policy.logps(trees).sum().backward()
        optimizer.step()
        policy.update_model()
        optimizer.zero_grad()

settings = make_settings(**eval(sys.argv[3]))
status = lambda name: 1024 * int(re.search(rf"{name}:\\s+(\\d+)", open("/proc/self/status").read())[1])
train(sys.argv[1], drawn_trees(1), 1)
before = status("RssAnon")
train(sys.argv[2], drawn_trees(4), 2)
# what getrusage says is not less than the parent's peak; of the libraries' files, what is mapped is chance
print(status("VmHWM") - status("RssFile") - before)
"""


def drawn_trees(count: int) -> list[Any]:
    random = Random(0)
    ids = [[random.randrange(300) for _ in range(length)] for length in (50, 150, 125)]
    return [plant(ids[0], ids[1:])] * count


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_checkpointing": True}, {"lora": {"rank": 8}}],
    ids=["all-weights", "checkpointing", "adapters"],
)
def test_estimated_memory_is_what_training_takes(changes: dict[str, Any], tmp_path: Path) -> None:
    tiny, model = save_folder(tmp_path / "tiny"), save_folder(tmp_path / "model", width=768, layers=6)
    # freed memory goes back at once, so that the peak is that of what is held
    environment = {**ENVIRONMENT, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", MEASURE, tiny, model, repr(changes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    estimated = estimate_memory(model, make_settings(**changes), drawn_trees(4)).peak
    assert estimated == pytest.approx(int(done.stdout), rel=0.25)


def test_what_is_kept_shrinks_as_settings_say(tmp_path: Path) -> None:
    model = save_folder(tmp_path, width=128, layers=4)
    whole = estimate_memory(model, make_settings(), drawn_trees(6))
    parameters = whole.gradients // 4
    assert whole.weights >= 4 * parameters == whole.optimizer
    adamw = estimate_memory(model, make_settings(optimizer={"name": "adamw"}), drawn_trees(6))
    assert adamw.optimizer == 8 * parameters
    halves = estimate_memory(model, make_settings(precision="bfloat16"), drawn_trees(6))
    assert 5.9 * parameters < halves.weights < 6.1 * parameters
    assert halves.row < 0.7 * whole.row
    again = estimate_memory(model, make_settings(gradient_checkpointing=True), drawn_trees(6))
    assert again.state == whole.state
    assert again.row < 0.5 * whole.row
    adapters = estimate_memory(model, make_settings(lora={"rank": 2}), drawn_trees(6))
    assert adapters.gradients < 0.1 * whole.gradients


def test_every_way_that_is_offered_fits(tmp_path: Path) -> None:
    model = save_folder(tmp_path, width=128, layers=4)
    settings, trees = make_settings(), drawn_trees(6)
    needed = estimate_memory(model, settings, trees)
    room = needed.state + needed.row // 2
    ways = ways_to_fit(model, settings, trees, room)
    assert ways
    assert all(way.memory.peak < room for way in ways)
    assert ways[0].change == "train.gradient_checkpointing=true"
    assert not ways_to_fit(model, settings, trees, room=1000)


@pytest.mark.parametrize("changes", [{}, {"lora": {"rank": 4}}, {"lora": {"rank": 4, "merge": True}}])
def test_estimated_disk_is_what_checkpoints_take(changes: dict[str, Any], tmp_path: Path) -> None:
    from training_pairs import trained

    model = save_folder(tmp_path / "model", width=128, tied=True)
    trained(tmp_path / "run", model, make_settings(**changes, epochs=1), make_pairs(4))
    checkpoint = tmp_path / "run" / "checkpoints" / "epoch-01"
    written = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert estimate_disk(model, make_settings(**changes)).checkpoint == pytest.approx(written, rel=0.1)


def test_a_machine_has_memory() -> None:
    assert 2**26 < available_memory("cpu") < 2**50


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    model = save_folder(folder / "model")
    write_pairs(folder / "pairs.jsonl", make_pairs(20))
    path = folder / "recipe.yaml"
    path.write_text(
        f"policy: {{model: {model}}}\n"
        f"train: {{data: {folder / 'pairs.jsonl'}, held_out: 4, epochs: 3, threads: 1, tokens_per_batch: 400}}\n"
    )
    return path


def test_the_plan_counts_what_training_would_do_and_writes_nothing(recipe: Path) -> None:
    before = sorted(recipe.parent.rglob("*"))
    done = anchored("plan", recipe, "--json", "--out", recipe.parent / "run")
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    assert (plan["data"]["examples"], plan["data"]["held_out"], plan["steps"]) == (16, 4, 3)
    assert plan["data"]["tree_tokens"] < plan["data"]["separate_tokens"] <= plan["data"]["padded_tokens"]
    assert plan["memory"]["peak"] >= sum(plan["memory"][part] for part in ("weights", "gradients", "optimizer", "row"))
    assert plan["tokens_per_second"] > 0
    low, high = plan["seconds"]
    assert 0 < low < high
    assert sorted(recipe.parent.rglob("*")) == before
    shown = anchored("plan", recipe, "--limit", "12")
    assert shown.code == 0, shown.err
    for words in ("Memory of cpu", "gradients", "tree rows", "tokens per second", "12 to train on"):
        assert words.replace("12", "8") in shown.out


def test_before_pairs_exist_the_plan_is_an_upper_bound(recipe: Path) -> None:
    there = "create.reviser={model: pocket-teacher, serve: pocket}"
    done = anchored("plan", recipe, "train.data=null", "train.held_out=null", "create.prompts.take=48", there, "--json")
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    assert plan["steps"] == 9
    assert not plan["data"]["created"]
    assert "upper bounds" in plan["notes"][0]


def test_unpaired_rows_stop_the_plan_of_an_objective_of_pairs(recipe: Path, tmp_path: Path) -> None:
    rows = tmp_path / "labels.csv"
    rows.write_text("prompt,completion,label\n" + "".join(f"Add {n} and 1.,It is {n}.,false\n" for n in range(6)))
    done = anchored("plan", recipe, f"train.data={rows}", "train.held_out=2")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "'apo-zero', which compares two answers to a prompt, but the data is unpaired" in done.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("train.epoch=2", "train.epoch: unknown key; did you mean 'epochs'?"),
        ("train.data=nowhere.jsonl", "nowhere.jsonl"),
        ("policy.model=nowhere/at/all", "nowhere/at/all: no such folder"),
        ("train.lora.targets=[query]", "train.lora.targets"),
        ("train.optimizer.warmup_steps=9", "train.optimizer.warmup_steps is 9, but the run has only 3 steps"),
        ("train.objective.name=my_loss:gone", "there is no module 'my_loss'"),
    ],
)
def test_what_would_stop_training_stops_the_plan_in_one_line(change: str, words: str, recipe: Path) -> None:
    done = anchored("plan", recipe, change)
    assert done.code == 2
    assert words in done.err
    assert done.err.count("\n") == 1
