"""The flat script in examples/ runs as its first line says, and does what the package does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import STUCK_SECONDS
from safetensors.torch import load_file
from tiny_models import save_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from anchored.progress import Silent
from anchored.records import Answer, Pair, user_prompt
from anchored.runs import Run, read_lines
from anchored.train.settings import TrainSettings
from anchored.train.stage import TrainInputs, train

THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{{ ('<think>\n\n</think>\n\n' if message.role == 'assistant' else '') }}"
    "{{ message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
"""As Qwen3's, for answers without thoughts."""

SCRIPT = Path(__file__).parents[1] / "examples" / "apo_loop.py"


def write(path: Path, pairs: list[Pair]) -> None:
    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    rows = [
        {
            "prompt": turn("user", pair.prompt.messages[0].content),
            "chosen": turn("assistant", pair.chosen.text),
            "rejected": turn("assistant", pair.rejected.text),
        }
        for pair in pairs
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def test_the_flat_script_trains_as_the_package_does(tmp_path: Path) -> None:
    pairs = [
        Pair(user_prompt(f"Add {n} and 2."), Answer(f"It is {n + 2}."), Answer(f"It is {n + 3}, or so."))
        for n in range(5)
    ]
    model = save_folder(tmp_path / "model", chat_template=THINKING)
    write(tmp_path / "pairs.jsonl", pairs)
    command = [sys.executable, str(SCRIPT), str(model), str(tmp_path / "pairs.jsonl"), str(tmp_path / "aligned")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=STUCK_SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    # the same settings, the paper's, are the package's defaults
    train(Run(tmp_path / "run"), TrainSettings(threads=1), TrainInputs(model, pairs), Silent())
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    printed = [line.split() for line in done.stdout.splitlines() if line.startswith("step")]
    assert [words[1] for words in printed] == [f"{line['step']}/18" for line in lines]
    losses = [float(words[3]) for words in printed]
    assert losses == pytest.approx([line["loss"] for line in lines], abs=2e-6)
    assert losses[-1] < losses[0]
    start, flat, ours = (
        load_file(tmp_path / folder / "model.safetensors")
        for folder in ("model", "aligned", "run/checkpoints/epoch-18")
    )
    for name, weight in ours.items():
        assert (flat[name] - weight).norm() < 0.02 * (weight - start[name]).norm(), name
    assert AutoTokenizer.from_pretrained(tmp_path / "aligned").chat_template
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "aligned").dtype == torch.float32
