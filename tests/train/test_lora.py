"""Adapters: what is trained, what is saved, and that everyone loads it; the reference is the model without them."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import save_folder
from training_pairs import InterruptAt, make_pairs, make_settings, trained, weights
from transformers import AutoModelForCausalLM

from anchored.batches.answer_logps import answer_logps_plain
from anchored.errors import ModelError, TrainError
from anchored.llm.chat import Request
from anchored.llm.local_chat import LocalChat
from anchored.llm.model_folder import fingerprint, load_model
from anchored.objectives.losses import find_objective
from anchored.records import Message
from anchored.runs import Run, read_lines
from anchored.train.examples import prepare
from anchored.train.optimizer import build_optimizer
from anchored.train.policy import Policy, load_policy
from anchored.train.ranks import Ranks
from anchored.train.reference import reference_logps
from anchored.train.settings import TrainSettings
from anchored.train.step import Training, take_step

CPU = torch.device("cpu")
PAIRS, HELD_OUT = make_pairs(12), make_pairs(5, seed=1)


def lora_settings(lora: dict[str, Any] | None = None, **changes: Any) -> TrainSettings:
    optimizer = {"name": "rmsprop", "lr": 3e-3}
    return make_settings(**{"lora": {"rank": 4, **(lora or {})}, "optimizer": optimizer, **changes})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("policy"), width=64)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Run:
    folder = tmp_path_factory.mktemp("run")
    trained(folder, model, lora_settings(), PAIRS, HELD_OUT)
    return Run(folder)


def moved(policy: Policy, settings: TrainSettings, folder: Path, steps: int = 2) -> Training:
    """The policy after a few steps."""
    examples = prepare(PAIRS, policy, settings).kept
    with policy.as_started():
        reference = reference_logps(policy, examples, folder / "reference.sqlite", Ranks(), _nobody())
    objective = find_objective(settings.objective.name)
    optimizer = build_optimizer(policy.weights.values(), settings.optimizer)
    training = Training(policy, optimizer, settings, objective, examples, (), Ranks(), reference.logps)
    for step in range(1, steps + 1):
        take_step(training, step)
    return training


def _nobody() -> Any:
    return InterruptAt("nothing", 1)


def test_only_adapters_change_and_only_they_have_gradients(model: Path, tmp_path: Path) -> None:
    settings = lora_settings()
    policy = load_policy(model, settings)
    before = {name: parameter.detach().clone() for name, parameter in policy.model.named_parameters()}
    moved(policy, settings, tmp_path)
    assert policy.weights
    for name, parameter in policy.model.named_parameters():
        assert ("lora_" in name) == (name in policy.weights) == (parameter.grad is not None)
        assert torch.equal(parameter, before[name]) == (name not in policy.weights), name


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_the_reference_is_the_model_without_its_adapters(targets: Any, model: Path, tmp_path: Path) -> None:
    settings = lora_settings({"targets": targets})
    policy = load_policy(model, settings)
    with pytest.warns(UserWarning, match="all logits of a row") if "lm_head" in targets else nullcontext():
        trees = [example.tree for example in moved(policy, settings, tmp_path).examples]
    base = answer_logps_plain(load_model(model), trees, CPU)
    with torch.no_grad():
        with policy.as_started():
            torch.testing.assert_close(policy.logps(trees), base)
        assert (policy.logps(trees) - base).abs().max() > 0.1
        torch.testing.assert_close(policy.logps(trees), answer_logps_plain(policy.model, trees, CPU))


def test_the_reference_is_known_from_a_run_that_trained_all_weights(model: Path, run: Run, tmp_path: Path) -> None:
    shutil.copy(run.reference, tmp_path)
    assert trained(tmp_path, model, make_settings(), PAIRS, HELD_OUT).reference_computed == 0


def test_a_checkpoint_is_an_adapter_with_which_peft_has_the_logps_of_training(model: Path, run: Run) -> None:
    folder = run.checkpoints / "epoch-02"
    adapter = load_file(folder / "adapter_model.safetensors")
    assert {weight.dtype for weight in adapter.values()} == {torch.float32}
    assert not (folder / "model.safetensors").exists()
    said = json.loads((folder / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(model)
    assert "model.layers.0.self_attn.q_proj" in said["target_modules"]
    loaded: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder)
    examples = prepare(HELD_OUT, load_policy(model, make_settings()), make_settings()).kept
    with torch.no_grad():
        logps = answer_logps_plain(loaded.eval(), [example.tree for example in examples], CPU).mean(0)
    start, *_, end = read_lines(run.trajectories)
    assert [end["logp_chosen"], end["logp_rejected"]] == pytest.approx(logps.tolist(), rel=1e-5)
    assert abs(end["logp_chosen"] - start["logp_chosen"]) > 0.1


def answers(folder: Path, count: int = 3) -> list[str]:
    chat = LocalChat(folder, batch_size=8, device="cpu")

    async def ask() -> list[str]:
        try:
            turns = [(Message("user", f"Add {number} and 275."),) for number in range(count)]
            requests = [Request(messages, temperature=0.0, max_tokens=12) for messages in turns]
            return [str(reply.raw) for reply in await asyncio.gather(*map(chat.reply, requests))]
        finally:
            await chat.close()

    return asyncio.run(ask())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_checkpoint_is_the_model_with_its_adapters(dtype: torch.dtype, tmp_path: Path) -> None:
    start = save_folder(tmp_path / "start", "qwen3", dtype=dtype, tied=True)
    for name, merge in (("adapter", False), ("whole", True)):
        trained(tmp_path / name, start, lora_settings({"merge": merge}, epochs=1), PAIRS)
    adapter, whole = (tmp_path / name / "checkpoints" / "epoch-01" for name in ("adapter", "whole"))
    assert {path.name for path in whole.iterdir()} - {"README.md"} == {path.name for path in start.iterdir()}
    assert weights(whole).keys() == weights(start).keys()
    assert {weight.dtype for weight in weights(whole).values()} == {dtype}
    examples = prepare(HELD_OUT, load_policy(start, make_settings()), make_settings()).kept
    trees = [example.tree for example in examples]
    with torch.no_grad():
        apart, together, before = (
            answer_logps_plain(load_model(folder, dtype=torch.float32), trees, CPU)
            for folder in (adapter, whole, start)
        )
    rounding = 1e-4 if dtype == torch.float32 else 0.3
    assert (apart - together).abs().max() < rounding < (apart - before).abs().max()
    if dtype == torch.float32:
        assert answers(adapter) == answers(whole) != answers(start)


@pytest.mark.filterwarnings("error")
def test_merging_and_loading_warn_of_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_folder(tmp_path / "start")
    monkeypatch.chdir(tmp_path)  # a base named by a relative path
    trained(tmp_path / "run", Path("start"), lora_settings({"merge": True}, epochs=1), PAIRS)
    load_model(run.checkpoints / "epoch-01")


def test_frozen_weights_keep_their_precision_and_adapters_are_float32(tmp_path: Path) -> None:
    start = save_folder(tmp_path / "start", dtype=torch.bfloat16)
    settings = lora_settings(precision="bfloat16")
    policy = load_policy(start, settings)
    moved(policy, settings, tmp_path)
    for name, parameter in policy.model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in policy.weights else torch.bfloat16)


def test_an_interrupted_run_ends_as_the_uninterrupted(model: Path, run: Run, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, model, lora_settings(save_every_steps=1), PAIRS, HELD_OUT, progress=InterruptAt("train", 4))
    trained(tmp_path, model, lora_settings(save_every_steps=1), PAIRS, HELD_OUT)
    for file in (run.checkpoints / "epoch-02").iterdir():
        assert file.read_bytes() == (tmp_path / "checkpoints" / "epoch-02" / file.name).read_bytes(), file


def test_an_adapters_fingerprint_is_of_its_content_and_its_base(model: Path, run: Run, tmp_path: Path) -> None:
    first, second = (run.checkpoints / f"epoch-0{epoch}" for epoch in (1, 2))
    assert len({fingerprint(folder) for folder in (model, first, second)}) == 3
    elsewhere = Path(shutil.copytree(second, tmp_path / "adapter"))
    config = json.loads((elsewhere / "adapter_config.json").read_text())
    base = Path(shutil.copytree(model, tmp_path / "base"))
    config["base_model_name_or_path"] = str(base)
    (elsewhere / "adapter_config.json").write_text(json.dumps(config))
    assert fingerprint(elsewhere) == fingerprint(second)
    save_folder(base, seed=1, width=64)
    assert fingerprint(elsewhere) != fingerprint(second)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"targets": ["query"]}, r"train\.lora\.targets: none of \['query'\] .* \(down_proj, gate_proj"),
        ({"quantize": "4bit"}, r"train\.lora\.quantize is '4bit', which needs a GPU, .* set it to null"),
    ],
)
def test_what_cannot_be_adapted_is_named_in_one_line(lora: dict[str, Any], words: str, model: Path) -> None:
    with pytest.raises(TrainError, match=words) as raised:
        load_policy(model, lora_settings(lora, device="cpu"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_of_tied_embeddings_is_never_merged_into_both(target: str, model: Path, tmp_path: Path) -> None:
    tied = save_folder(tmp_path, tied=True)
    targets = {"targets": [target, "q_proj"]}
    with pytest.raises(TrainError, match=rf"train\.lora\.targets: \S*{target} .* set train\.lora\.merge to false"):
        load_policy(tied, lora_settings(targets | {"merge": True}))
    load_policy(model, lora_settings(targets | {"merge": True}))
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        load_policy(tied, lora_settings(targets))


def test_without_peft_the_way_out_is_named(model: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"train\.lora needs peft; pip install 'anchored\[lora\]'"):
        load_policy(model, lora_settings())
    with pytest.raises(ModelError, match=r"epoch-01: an adapter needs peft; pip install 'anchored\[lora\]'"):
        load_model(run.checkpoints / "epoch-01")


def test_training_does_not_start_from_an_adapter(run: Run) -> None:
    with pytest.raises(TrainError, match=r"epoch-01: an adapter, .* train\.lora\.merge: true"):
        load_policy(run.checkpoints / "epoch-01", make_settings())


def test_an_adapter_whose_base_is_gone_says_where_it_was_looked_for(run: Run, tmp_path: Path) -> None:
    orphan = Path(shutil.copytree(run.checkpoints / "epoch-01", tmp_path / "orphan"))
    config = json.loads((orphan / "adapter_config.json").read_text())
    (orphan / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/no/model"}))
    with pytest.raises(ModelError, match=r"orphan/adapter_config\.json: base_model_name_or_path: /no/model: no such"):
        fingerprint(orphan)


@pytest.mark.gpu
def test_a_model_in_four_bits_is_trained_and_loads_back(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    start = save_folder(tmp_path / "start", dtype=torch.bfloat16, width=128)
    settings = lora_settings({"quantize": "4bit"}, device="cuda")
    policy = load_policy(start, settings)
    assert policy.model.model.layers[0].self_attn.q_proj.base_layer.weight.dtype == torch.uint8
    trained(tmp_path / "run", start, settings, PAIRS, HELD_OUT)
    first, *_, last = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert last["loss"] < first["loss"]
    load_model(tmp_path / "run" / "checkpoints" / "epoch-02", device="cuda")
