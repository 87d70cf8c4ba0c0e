"""Which checkpoints stay: the newest, the best, and never none; the same after kills as without."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from pydantic import ValidationError
from tiny_models import save_folder
from training_pairs import InterruptAt, make_pairs, make_settings, trained

from anchored import recipe as recipes
from anchored.errors import DataError, TrainError
from anchored.pipeline import _checkpoints
from anchored.records import Pair
from anchored.report.stage import report
from anchored.runs import Run, read_lines
from anchored.train.keep import best_epoch, kept_epochs

PAIRS = make_pairs(6)
# the same prompts with the answers changed round: what is learned from PAIRS makes them worse, so the first is best
AGAINST = [Pair(pair.prompt, pair.rejected, pair.chosen) for pair in PAIRS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("policy"))


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_best_epoch_has_the_lowest_loss_at_its_end() -> None:
    losses = {0: 0.1, 3: 0.5, 4: 0.9, 6: 0.8, 8: 0.4, 12: 0.4, 16: float("nan")}
    lines = [{"step": step, "loss": loss} for step, loss in losses.items()]
    assert best_epoch(lines, steps_per_epoch=4) == 2
    assert best_epoch(lines[:2], steps_per_epoch=4) is None


@pytest.mark.parametrize(
    ("changes", "done", "best", "expected"),
    [
        ({}, 3, 1, {1, 2, 3}),
        ({"keep_last": 2}, 5, 1, {4, 5}),
        ({"keep_last": 2}, 1, 1, {1}),
        ({"keep_last": 1, "keep_best": True}, 5, 2, {2, 5}),
        ({"keep_last": 1, "keep_best": True}, 5, 5, {5}),
        ({"keep_last": 1, "keep_best": True}, 5, None, {5}),
    ],
)
def test_what_stays(changes: dict[str, object], done: int, best: int | None, expected: set[int]) -> None:
    assert kept_epochs(make_settings(**changes), done, best) == expected


def test_the_newest_and_the_best_stay_and_the_summary_says_which(model: Path, tmp_path: Path) -> None:
    settings = make_settings(epochs=4, keep_last=1, keep_best=True)
    summary = trained(tmp_path, model, settings, PAIRS, AGAINST)
    losses = [line["loss"] for line in read_lines(tmp_path / "trajectories.jsonl") if line["step"] in (2, 4, 6, 8)]
    assert losses == sorted(losses)
    assert kept(tmp_path) == ["epoch-01", "epoch-04"]
    assert summary.checkpoints == {"epoch-01": 2, "epoch-04": 8}
    assert summary.best == "epoch-01"


def test_without_either_all_stay_and_the_best_is_still_told(model: Path, tmp_path: Path) -> None:
    summary = trained(tmp_path, model, make_settings(epochs=3), PAIRS, PAIRS)
    assert kept(tmp_path) == ["epoch-01", "epoch-02", "epoch-03"]
    assert summary.best == "epoch-03"


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7])
def test_an_interrupted_run_keeps_what_the_undisturbed_keeps(model: Path, tmp_path: Path, steps: int) -> None:
    settings = make_settings(epochs=4, keep_last=2, keep_best=True, save_every_steps=1)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, model, settings, PAIRS, AGAINST, InterruptAt("train", steps))
    assert len([name for name in kept(tmp_path) if name.startswith("epoch")]) == min(steps // 2, 3)
    summary = trained(tmp_path, model, settings, PAIRS, AGAINST)
    assert kept(tmp_path) == sorted(summary.checkpoints) == ["epoch-01", "epoch-03", "epoch-04"]
    assert summary.best == "epoch-01"


def test_an_older_checkpoint_goes_only_when_the_newer_one_is_safe(model: Path, tmp_path: Path) -> None:
    settings = make_settings(epochs=3, keep_last=1)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, model, settings, PAIRS, progress=InterruptAt("train", 3))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))  # as on a full disk
    try:
        with pytest.raises(DataError, match="epoch-02: cannot be written"):
            trained(tmp_path, model, settings, PAIRS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "checkpoints" / "epoch-01" / "model.safetensors").exists()
    trained(tmp_path, model, settings, PAIRS)
    assert kept(tmp_path) == ["epoch-03"]


def test_what_a_kill_left_undeleted_goes_when_the_run_goes_on(model: Path, tmp_path: Path) -> None:
    settings = make_settings(epochs=2, keep_last=1, save_every_steps=1)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, model, settings, PAIRS, progress=InterruptAt("train", 4))
    assert "epoch-02" in kept(tmp_path)
    (tmp_path / "checkpoints" / "epoch-01").mkdir()
    assert trained(tmp_path, model, settings, PAIRS).checkpoints == {"epoch-02": 4}
    assert kept(tmp_path) == ["epoch-02"]


def test_keep_best_needs_held_out_rows_and_one_reference(model: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"keep_best is true, but no rows are held out .* leave keep_best out"):
        trained(tmp_path, model, make_settings(keep_best=True), PAIRS)
    with pytest.raises(ValidationError, match="after each refresh of the reference"):
        make_settings(keep_best=True, refresh_reference_epochs=1)


def test_evaluation_and_report_take_what_was_kept(model: Path, tmp_path: Path) -> None:
    train = make_settings(epochs=3, keep_last=1, keep_best=True).model_dump()
    recipe = recipes.parse({"policy": {"model": str(model)}, "train": train}, "test")
    run = Run(tmp_path)
    recipes.begin(run, recipe)
    trained(tmp_path, model, recipe.train, PAIRS, AGAINST)
    found = _checkpoints(run, recipe)
    assert [checkpoint.name for checkpoint in found] == ["start", "epoch-01", "epoch-03"]
    assert all(Path(checkpoint.folder).is_dir() for checkpoint in found)
    report(run)
    assert "reward" in run.report.read_text("utf-8").lower()
