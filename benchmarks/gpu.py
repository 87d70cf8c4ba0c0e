"""What one GPU makes of training: pairs per second, share of the card's matrix rate, memory. Nothing is downloaded.

    python benchmarks/gpu.py [--shapes 1b 3b 8b] [--write]      bfloat16 with float32-precise updates, on a GPU
    python benchmarks/gpu.py --small                            the same on a CPU with a tiny model, in a minute

Models have the shapes of Llama 3 and random weights; pairs have the lengths of `lengths.json` and random tokens. Steps
are those of `anchored train`: apo-zero, RMSProp, 16 pairs, the reference computed before and not timed. TRL's
DPOTrainer, where it is installed, runs the smallest shape beside it at its best settings, SDPA, float32 weights under
bfloat16 autocast. Every run is a process of its own.

Model FLOPs count what one forward and backward pass over unique tokens needs: 6 for each weight of the layers and each
token, 6 for each weight of the head and each scored token, and the products of attention. What a trainer computes twice
counts once. The matrix rate is that of a large bfloat16 product, measured here.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from train_vs_trl import PAIRS_PER_STEP, run_side, write

SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "vocab_size": 16384,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "3b": {
        "vocab_size": 128256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
"""Of Llama 3.2 1B and 3B, and of Llama 3 8B."""

TOKENS_PER_BATCH = {"small": 2048, "1b": 16384, "3b": 8192, "8b": 4096}
"""Rows that leave room for weights, gradients and optimizer state on 141 GB."""

WARM_UP = 2
"""Steps that are not timed: kernels are compiled in the first, and for rows of any length in the second."""

_MATRIX_RATE = """
import sys, time, torch
device, size = sys.argv[1], int(sys.argv[2])
left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
best = 0.0
for _ in range(10):
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(10):
        left @ right
    if device == "cuda":
        torch.cuda.synchronize()
    best = max(best, 10 * 2 * size**3 / (time.perf_counter() - began))
print(best, torch.cuda.get_device_name() if device == "cuda" else "CPU", sep="\\t")
"""


def matrix_rate(device: str) -> tuple[float, str]:
    """FLOPs per second of a large bfloat16 product, and what computed it."""
    command = [sys.executable, "-c", _MATRIX_RATE, device, "8192" if device == "cuda" else "256"]
    rate, name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().split("\t")
    return float(rate), name


def step_flops(shape: dict[str, Any], row: dict[str, list[int]]) -> float:
    """Model FLOPs of one pair."""
    width, heads = shape["hidden_size"], shape["num_attention_heads"]
    dim = width // heads
    key_values = 2 * shape["num_key_value_heads"] * dim
    layer = width * (2 * width + key_values) + 3 * width * shape["intermediate_size"]
    prompt, chosen, rejected = (len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    pairs = zip(row["chosen_ids"], row["rejected_ids"], strict=False)
    shared = next((place for place, (one, other) in enumerate(pairs) if one != other), min(chosen, rejected))
    tokens, scored = prompt + chosen + rejected - shared, chosen + rejected - shared
    trunk, branch = prompt + chosen, rejected - shared
    # each query meets the keys up to its own: two products of `dim` numbers per head
    met = trunk * (trunk + 1) / 2 + branch * (prompt + shared) + branch * (branch + 1) / 2
    layers = shape["num_hidden_layers"] * (2 * layer * tokens + 4 * width * met)
    return 3 * (layers + 2 * width * shape["vocab_size"] * scored)


def measure(name: str, side: str, folder: Path, options: list[str]) -> dict[str, Any] | str:
    """Pairs per second and peak memory in GB; or why there are none."""
    try:
        found = run_side(side, folder, options)
    except SystemExit as failed:
        print(f"{name}: {failed}", file=sys.stderr)
        return next((line for line in reversed(str(failed).splitlines()) if line.strip()), "failed")
    seconds = mean(stop - start for start, stop in list(pairwise(found["ends"]))[WARM_UP:])
    return {"speed": PAIRS_PER_STEP / seconds, "peak": found["peak"] / 1000, "lines": found["lines"]}


def measure_shape(name: str, arguments: argparse.Namespace, rate: float) -> list[str]:
    """Rows of the table."""
    shape, device = SHAPES[name], "cpu" if arguments.small else "cuda"
    common = ["--device", device, "--precision", "bfloat16"]
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        facts = run_side("data", folder, ["--random", "--shape", json.dumps(shape), *common])
        with (folder / "rows.jsonl").open() as lines:
            flops = mean(step_flops(shape, json.loads(line)) for line in lines)
        common += ["--steps", str(arguments.steps)]
        tokens = arguments.tokens_per_batch or TOKENS_PER_BATCH[name]
        runs = {"anchored": measure(name, "ours", folder, [*common, "--tokens-per-batch", str(tokens)])}
        if find_spec("trl") and name in ("small", "1b"):
            for size in arguments.micro_batches:
                options = [*common, "--micro-batch", str(size)]
                runs[f"TRL, micro-batch {size}"] = measure(name, "trl-best", folder, options)
    unique = facts["unique_tokens"] / facts["pairs"]
    rows = []
    for trainer, found in runs.items():
        if isinstance(found, str):
            rows.append(f"| {name} | {trainer} | {found[:80].replace('|', '/')} | | | | |")
            continue
        speed, share = found["speed"], 100 * found["speed"] * flops / rate
        measured = f"{speed:.2f} | {speed * unique:.0f} | {share:.1f} % | {found['peak']:.1f}"
        losses = ", ".join(f"{line['loss']:.4f}" for line in found["lines"])
        rows.append(f"| {name} | {trainer} | {measured} | {losses} |")
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1b", "3b", "8b"])
    parser.add_argument("--small", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--steps", type=int, default=6, help="of 16 pairs, at most 8; two warm up")
    parser.add_argument("--tokens-per-batch", type=int, help="of ours; not given: by shape")
    parser.add_argument("--micro-batches", type=int, nargs="*", default=[4, 8, 16], help="of TRL")
    parser.add_argument("--write", action="store_true", help="keep the results in docs/benchmarks.md")
    arguments = parser.parse_args()
    rate, device = matrix_rate("cpu" if arguments.small else "cuda")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    said = [
        f"    {shlex.join(['python', 'benchmarks/gpu.py', *sys.argv[1:]])}",
        "",
        f"{datetime.date.today():%Y-%m-%d}, {device}, {versions}; a large bfloat16 product: {rate / 1e12:.3g} TFLOP/s.",
        "",
        "| shape | trainer | pairs/s | unique tokens/s | of the matrix rate | peak memory, GB | losses |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for name in ["small"] if arguments.small else arguments.shapes:
        said += measure_shape(name, arguments, rate)
    print("\n".join(said))
    if arguments.write:
        write("\n".join(said), "gpu", "On one GPU")


if __name__ == "__main__":
    main()
