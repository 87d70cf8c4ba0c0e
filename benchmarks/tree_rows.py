"""Tree rows against a plain padded batch: forward and backward of the same pairs, in time and in memory.

    python benchmarks/tree_rows.py [--regime small|large ...] [--threads 1] [--repeats 7]

`padded` is what a general trainer does: every answer with its prompt, padded to the longest, all logits. `tree` is what
`anchored train` does. Both give the same log-probabilities, which is checked first. Times are CPU seconds, the two
methods taking turns; memory is what a fresh process needs beyond the loaded model, for one forward and backward.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from anchored.batches.answer_logps import answer_logps
from anchored.batches.tree import Tree, plant

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Regime:
    """A model and pairs like those it would be trained on."""

    about: str
    pairs: int
    prompt: int
    """Tokens, on average."""
    answer: int
    shared: float
    """Part of an answer that both answers of a pair begin with."""
    model: dict[str, Any] = field(repr=False)


REGIMES = {
    "small": Regime(
        "half a million parameters, 16 pairs of 36 + 68 tokens",
        pairs=16,
        prompt=36,
        answer=68,
        shared=0.2,
        model={
            "vocab_size": 448,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "large": Regime(
        "40 million parameters, 4 pairs of 100 + 250 tokens",
        pairs=4,
        prompt=100,
        answer=250,
        shared=0.15,
        model={
            "vocab_size": 16384,
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
        },
    ),
}


def make_trees(regime: Regime) -> list[Tree]:
    """Random tokens; lengths vary by 30 % either way."""
    random = Random(0)

    def ids(mean: float, vary: bool = True) -> list[int]:
        count = max(2, int(mean * (random.uniform(0.7, 1.3) if vary else 1)))
        return [random.randrange(3, regime.model["vocab_size"]) for _ in range(count)]

    trees = []
    for _ in range(regime.pairs):
        start = ids(regime.answer * regime.shared, vary=False)
        answers = [start + ids(regime.answer * (1 - regime.shared)) for _ in range(2)]
        trees.append(plant(ids(regime.prompt), answers))
    return trees


def make_model(regime: Regime) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**regime.model)).eval()


def tree_logps(model: LlamaForCausalLM, trees: Sequence[Tree]) -> Tensor:
    return answer_logps(model, trees, CPU)


def padded_logps(model: LlamaForCausalLM, trees: Sequence[Tree]) -> Tensor:
    rows = [(tree.prompt, answer) for tree in trees for answer in tree.answers]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    read, scored = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(rows):
        length = len(prompt) + len(answer)
        ids[row, :length] = torch.tensor([*prompt, *answer])
        read[row, :length] = 1
        scored[row, len(prompt) : length] = 1
    logits = model(input_ids=ids, attention_mask=read, use_cache=False).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (logps * scored[:, 1:]).sum(-1).view(len(trees), -1)


METHODS = {"padded": padded_logps, "tree": tree_logps}


def forward_backward(method: str, model: LlamaForCausalLM, trees: Sequence[Tree]) -> float:
    """CPU seconds."""
    model.zero_grad()
    began = time.process_time()
    METHODS[method](model, trees).sum().backward()
    return time.process_time() - began


def seconds(regime: Regime, repeats: int) -> dict[str, float]:
    """The median of each method."""
    model, trees = make_model(regime), make_trees(regime)
    with torch.no_grad():
        torch.testing.assert_close(tree_logps(model, trees), padded_logps(model, trees), rtol=1e-5, atol=1e-4)
    for method in METHODS:
        forward_backward(method, model, trees)
    taken: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(repeats):
        for method, times in taken.items():
            times.append(forward_backward(method, model, trees))
    return {method: statistics.median(times) for method, times in taken.items()}


def peak_megabytes(name: str, method: str, threads: int) -> float:
    command = [sys.executable, __file__, "--regime", name, "--peak-of", method, "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(regime: Regime, method: str) -> None:
    model, trees = make_model(regime), make_trees(regime)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    forward_backward(method, model, trees)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def print_table(names: Sequence[str], threads: int, repeats: int) -> None:
    # first of all: a process's peak begins with that of the process that started it
    peaks = {(name, method): peak_megabytes(name, method, threads) for name in names for method in METHODS}
    print("| regime | method | tokens | CPU seconds | pairs per second | speed | peak memory, MB |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for name in names:
        regime = REGIMES[name]
        trees, medians = make_trees(regime), seconds(regime, repeats)
        answers = [len(tree.prompt) + len(answer) for tree in trees for answer in tree.answers]
        tokens = {"padded": max(answers) * len(answers), "tree": sum(tree.size for tree in trees)}
        for method, median in medians.items():
            print(
                f"| {name} | {method} | {tokens[method]} | {median:.3f} | {regime.pairs / median:.3g} "
                f"| {medians['padded'] / median:.1f}x | {peaks[name, method]:.0f} |"
            )
    for name in names:
        print(f"\n{name}: {REGIMES[name].about}", end="")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--regime", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds of each method")
    parser.add_argument("--peak-of", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak_of:
        print_peak(REGIMES[arguments.regime[0]], arguments.peak_of)
    else:
        print_table(arguments.regime, arguments.threads, arguments.repeats)


if __name__ == "__main__":
    main()
