"""Starting ranks: an error is raised once, nobody is left behind, and torchrun trains as one process does."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ENVIRONMENT, STUCK_SECONDS
from ranks_ending import Ending
from tiny_models import save_folder
from training_pairs import make_pairs, steady, weights

from anchored.errors import Stopped, TrainError
from anchored.progress import Silent
from anchored.runs import read_lines
from anchored.train.launch import run_ranks

# a port that the system chooses, on the loopback interface
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "anchored"]


class Noted(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class InterruptAtNote(Silent):
    def note(self, text: str) -> None:
        raise KeyboardInterrupt


def alive(folder: Path) -> list[int]:
    """The ranks that noted their process in `folder` and still run."""
    return [pid for path in folder.glob("*.pid") if Path(f"/proc/{(pid := int(path.read_text()))}/cmdline").exists()]


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("error", TrainError, "^step 3: the loss is nan$"),
        ("killed", Stopped, r"^rank 1 was killed by SIGKILL \(often .*\); the same command goes on from here$"),
        ("fault", Exception, r"^rank 1: Traceback(.|\n)*LookupError: no such thing"),
    ],
)
def test_what_ends_one_rank_is_raised_once_and_ends_all(
    how: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    progress = Noted()
    began = time.monotonic()
    with pytest.raises(error, match=message):
        run_ranks(2, "cpu", Ending(how, tmp_path), progress)
    assert progress.notes == ["all are here"]
    assert time.monotonic() - began < 200, "the others were waited for"
    assert len(list(tmp_path.glob("*.pid"))) == 2
    assert not alive(tmp_path)


def test_an_interruption_ends_all_ranks(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_ranks(2, "cpu", Ending("asleep", tmp_path), InterruptAtNote())
    assert len(list(tmp_path.glob("*.pid"))) == 2
    assert not alive(tmp_path)


def test_no_rank_outlives_a_killed_parent(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "from pathlib import Path\n"
        "from ranks_ending import Ending\n"
        "from anchored.progress import Silent\n"
        "from anchored.train.launch import run_ranks\n"
        f"run_ranks(2, 'cpu', Ending('asleep', Path({str(tmp_path)!r})), Silent())"
    )
    with subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT) as parent:
        until = time.monotonic() + STUCK_SECONDS
        while len([path for path in tmp_path.glob("*.pid") if path.read_text()]) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        assert len(alive(tmp_path)) == 2
        parent.kill()
    while alive(tmp_path) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(tmp_path)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe that trains a tiny model on pairs in a file."""
    data = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": pair.prompt.messages[0].content, "chosen": pair.chosen.text, "rejected": pair.rejected.text}
        for pair in make_pairs(12)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = save_folder(tmp_path / "policy")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"policy: {{model: {model}}}\n"
        f"train: {{data: {data}, epochs: 2, pairs_per_step: 4, tokens_per_batch: 150, optimizer: {{lr: 1.0e-4}}}}\n"
    )
    return recipe


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=STUCK_SECONDS,
        check=False,
    )


@pytest.mark.slow
def test_torchrun_and_local_ranks_train_as_one_process_does(recipe: Path, tmp_path: Path) -> None:
    anchored = [sys.executable, "-m", "anchored", "train", recipe]
    torchrun = [*TORCHRUN, "train", recipe, "train.parallel=fsdp"]
    assert run(*anchored, "--out", tmp_path / "alone").returncode == 0
    for name, command in (("local", [*anchored, "train.ranks=2"]), ("joined", torchrun)):
        done = run(*command, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("train in ") == 1
    expected = steady(read_lines(tmp_path / "alone" / "metrics.jsonl"))
    assert len(expected) == 6
    last = Path("checkpoints", "epoch-02")
    start, whole = weights(tmp_path / "policy"), weights(tmp_path / "alone" / last)
    for name in ("local", "joined"):
        found = steady(read_lines(tmp_path / name / "metrics.jsonl"))
        for one, other in zip(expected, found, strict=True):
            assert one == pytest.approx(other, rel=2e-4, abs=2e-5)
        for key, weight in weights(tmp_path / name / last).items():
            assert (weight - whole[key]).norm() <= 0.01 * (weight - start[key]).norm()


def test_an_error_under_torchrun_is_told_by_one_rank(recipe: Path, tmp_path: Path) -> None:
    done = run(*TORCHRUN, "train", recipe, "train.optimizer.lr=1e30", "--out", tmp_path / "run")
    assert done.returncode != 0
    assert done.stderr.count("error: step 2: ") == 1, done.stderr
    assert "this is a fault of anchored" not in done.stderr
