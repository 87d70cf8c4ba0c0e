"""Checkpoints: what transformers loads is what was trained, in the model's own precision; what is broken is named."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_models import save_folder
from training_pairs import InterruptAt, make_pairs, make_settings, trained, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from anchored.errors import DataError, TrainError
from anchored.runs import Run, read_lines

TURNS = [{"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "3."}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("policy"))


@pytest.mark.parametrize(("dtype", "tied"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_a_checkpoint_loads_as_any_model_does(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    start = save_folder(tmp_path / "start", "qwen2", dtype=dtype, tied=tied)
    summary = trained(tmp_path / "run", start, make_settings(), make_pairs(6))
    assert summary.checkpoints == {"epoch-01": 2, "epoch-02": 4}
    before = AutoModelForCausalLM.from_pretrained(start)
    for name in summary.checkpoints:
        folder = tmp_path / "run" / "checkpoints" / name
        loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        assert loaded.dtype == dtype
        assert {weight.dtype for weight in weights(folder).values()} == {dtype}
        assert weights(folder).keys() == weights(start).keys()
        assert not torch.equal(loaded.get_input_embeddings().weight, before.get_input_embeddings().weight)
        assert loaded.generation_config.to_dict() == before.generation_config.to_dict()
        # what is written without weights is what came in
        assert json.loads((folder / "config.json").read_text()) == json.loads((start / "config.json").read_text())
        tokenizer, original = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(start)
        assert tokenizer.apply_chat_template(TURNS) == original.apply_chat_template(TURNS)
        assert tokenizer.get_vocab() == original.get_vocab()


def test_only_finished_folders_are_left_and_no_resume_point(model: Path, tmp_path: Path) -> None:
    trained(tmp_path, model, make_settings(epochs=3, save_every_steps=1), make_pairs(6))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["epoch-01", "epoch-02", "epoch-03"]


def test_small_updates_reach_a_bfloat16_model(tmp_path: Path) -> None:
    """Steps too small for bfloat16 one by one add up, as they do where the model itself runs in float32."""
    start = save_folder(tmp_path / "start", dtype=torch.bfloat16)
    moved = {}
    for precision in ("float32", "bfloat16"):
        settings = make_settings(precision=precision, epochs=1, optimizer={"lr": 2e-5, "schedule": "constant"})
        trained(tmp_path / precision, start, settings, make_pairs(80))
        after = weights(tmp_path / precision / "checkpoints" / "epoch-01")
        moved[precision] = torch.cat([(after[k].float() - w.float()).flatten() for k, w in weights(start).items()])
    alike = torch.nn.functional.cosine_similarity(moved["float32"], moved["bfloat16"], dim=0)
    assert alike > 0.95
    assert (moved["bfloat16"] != 0).float().mean() > 0.3


def interrupted(folder: Path, model: Path, **changes: object) -> Path:
    """A run stopped after its first epoch; returns where its resume point lies."""
    settings = make_settings(**changes)
    with pytest.raises(KeyboardInterrupt):
        trained(folder, model, settings, make_pairs(6), progress=InterruptAt("train", 3))
    return folder / "checkpoints" / "resume"


def test_other_settings_or_pairs_do_not_go_on_from_a_saved_moment(model: Path, tmp_path: Path) -> None:
    interrupted(tmp_path, model)
    with pytest.raises(TrainError, match=r"resume: training was begun with train\.epochs 2, not 5"):
        trained(tmp_path, model, make_settings(epochs=5), make_pairs(6))
    with pytest.raises(TrainError, match=r"begun with other contents of the pairs; .* delete this folder"):
        trained(tmp_path, model, make_settings(), make_pairs(6, seed=1))
    assert Run(tmp_path).summary("train") is None


def test_how_it_runs_may_change_when_it_goes_on(model: Path, tmp_path: Path) -> None:
    interrupted(tmp_path, model)
    trained(tmp_path, model, make_settings(tokens_per_batch=100, save_every_steps=1), make_pairs(6))
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.parametrize("tear", ["rows", "weights", "moment"])
def test_a_torn_resume_point_is_named_with_the_way_out(model: Path, tmp_path: Path, tear: str) -> None:
    resume = interrupted(tmp_path, model)
    (step,) = resume.iterdir()
    (weights,) = step.glob("*.safetensors")
    if tear == "rows":
        weights.unlink()
    else:
        torn = weights if tear == "weights" else step / "moment.json"
        torn.write_bytes(torn.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"resume/step-2: cannot be read .* delete .*resume to train from the begin"):
        trained(tmp_path, model, make_settings(), make_pairs(6))


def test_a_moment_that_was_half_written_is_passed_over(model: Path, tmp_path: Path) -> None:
    resume = interrupted(tmp_path, model)
    (resume / ".step-4.partial").mkdir()
    (resume / ".step-4.partial" / "moment.json").write_text("{")
    trained(tmp_path, model, make_settings(), make_pairs(6))
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_resume_point_runs_no_code(model: Path, tmp_path: Path) -> None:
    files = sorted(path.name for path in next(interrupted(tmp_path, model).iterdir()).iterdir())
    assert files == ["moment.json", "rank-00000-00000.safetensors"]


def test_checkpoints_of_a_longer_run_do_not_outlive_a_new_beginning(model: Path, tmp_path: Path) -> None:
    shutil.rmtree(interrupted(tmp_path, model, epochs=5))
    (tmp_path / "checkpoints" / "epoch-01").rename(tmp_path / "checkpoints" / "epoch-05")
    summary = trained(tmp_path, model, make_settings(), make_pairs(6))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == sorted(summary.checkpoints)


@contextmanager
def no_file_past(size: int) -> Iterator[None]:
    """Writing more than `size` bytes to a file fails, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("size", "file"), [(5_000, "reference.sqlite"), (60_000, "epoch-01"), (250_000, "resume")])
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(
    model: Path, tmp_path: Path, size: int, file: str
) -> None:
    with no_file_past(size), pytest.raises(DataError, match=f"{file}: cannot be .*; free disk space") as raised:
        trained(tmp_path, model, make_settings(), make_pairs(6))
    assert "\n" not in str(raised.value)
    trained(tmp_path, model, make_settings(), make_pairs(6))
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_full_disk_between_checkpoints_is_named_too(model: Path, tmp_path: Path) -> None:
    interrupted(tmp_path, model)
    with no_file_past(200), pytest.raises(DataError, match=f"{tmp_path}: .*too large; .* run the same command again"):
        trained(tmp_path, model, make_settings(), make_pairs(6))
    trained(tmp_path, model, make_settings(), make_pairs(6))
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
