"""Training on a GPU: the numbers of a CPU's, in float32 and in bfloat16; memory that does not suffice; estimates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import save_folder
from training_pairs import make_pairs, make_settings, trained

from anchored.errors import TrainError
from anchored.runs import read_lines

pytestmark = pytest.mark.gpu

PAIRS, HELD_OUT = make_pairs(24), make_pairs(6, seed=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("policy"), width=128)


@pytest.fixture
def little_memory() -> Iterator[None]:
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.001)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("name", ["rmsprop", "adamw"])
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-3), ("bfloat16", 3e-2)])
def test_a_gpu_trains_as_a_cpu_does(name: str, precision: str, tolerance: float, model: Path, tmp_path: Path) -> None:
    lines = {}
    for device, exactly in (("cpu", "float32"), ("cuda", precision)):
        settings = make_settings(device=device, precision=exactly, optimizer={"name": name, "lr": 1e-4})
        trained(tmp_path / device, model, settings, PAIRS, HELD_OUT)
        lines[device] = list(read_lines(tmp_path / device / "metrics.jsonl"))
    assert lines["cpu"][-1]["loss"] < lines["cpu"][0]["loss"]
    for there, here in zip(lines["cuda"], lines["cpu"], strict=True):
        for measured in ("loss", "logp_chosen", "logp_rejected"):
            assert there[measured] == pytest.approx(here[measured], rel=tolerance, abs=tolerance)


def test_memory_that_does_not_suffice_is_told_with_what_to_do(little_memory: None, model: Path, tmp_path: Path) -> None:
    big = save_folder(tmp_path / "big", width=1024)
    with pytest.raises(TrainError, match=r"out of memory: lower train\.tokens_per_batch .*anchored plan"):
        trained(tmp_path / "run", big, make_settings(device="cuda", precision="bfloat16"), PAIRS)
