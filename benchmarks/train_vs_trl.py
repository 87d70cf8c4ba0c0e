"""`anchored train` against TRL's DPOTrainer: speed and memory of the same training, in one run, taking turns.

    python benchmarks/train_vs_trl.py [--threads 2] [--steps 4] [--rounds 3] [--micro-batches 2 4 8 16] [--write]

Both train the same model in float32 on the same pairs, token for token, in the same order: apo-zero, RMSProp, 16 pairs
a step. Every run is a process of its own. TRL's best: reference computed beforehand and not timed, no gradient
checkpointing, SDPA, and within each step its pairs sorted by length, as its own `batch_rebalance` sampler would (which
draws other steps); whichever micro-batch is fastest (the two that were so in the first round go on to the others).
TRL's defaults: its micro-batch of 8, gradient checkpointing, the reference run beside the policy. The first step warms
up; that both sides do the same work shows in their losses and logps, compared here.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# nothing heavy is imported here: a process's peak memory begins with that of the process that started it

SIDES = Path(__file__).with_name("comparison_sides.py")
DOCS = Path(__file__).parents[1] / "docs" / "benchmarks.md"
PAIRS_PER_STEP = 16
OURS = "anchored"

GO_ON = 2
"""Of TRL's micro-batches, the fastest of the first round that run in the others too."""


@dataclass(frozen=True)
class Contender:
    """One way to train."""

    name: str
    side: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """A contender's runs."""

    seconds: float
    """Of a step: the median over rounds of each round's mean."""
    cpu_seconds: float
    peak: float
    """MB, the median over rounds."""
    beyond_imports: float
    padding: float
    """Part of the places in its batches that hold no token."""
    lines: list[dict[str, float]]
    """Loss and logps of each step."""

    @property
    def pairs_per_second(self) -> float:
        return PAIRS_PER_STEP / self.seconds


def run_side(side: str, folder: Path, options: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, str(SIDES), side, str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(runs: Sequence[dict[str, Any]]) -> Result:
    def per_step(name: str) -> float:
        # the first interval is the warm-up
        return statistics.median(
            statistics.mean(stop - start for start, stop in list(pairwise(run[name]))[1:]) for run in runs
        )

    return Result(
        seconds=per_step("ends"),
        cpu_seconds=per_step("cpu"),
        peak=statistics.median(run["peak"] for run in runs),
        beyond_imports=statistics.median(run["peak"] - run["bare"] for run in runs),
        padding=runs[0]["padding"],
        lines=runs[0]["lines"],
    )


def check_same_work(results: dict[str, Result]) -> list[str]:
    """One line per contender on how its losses and logps compare with ours; a difference ends the benchmark."""
    ours, said = results[OURS].lines, []
    for name, result in results.items():
        far = [
            abs(mine[key] - theirs[key]) / max(1.0, abs(mine[key]))
            for mine, theirs in zip(ours, result.lines, strict=True)
            for key in ("loss", "logp_chosen", "logp_rejected")
        ]
        first = result.lines[0]
        losses = ", ".join(f"{line['loss']:.4f}" for line in result.lines)
        said.append(
            f"{name}: losses {losses}; first logps {first['logp_chosen']:.3f} and {first['logp_rejected']:.3f}; "
            f"at most {max(far):.1e} from ours"
        )
        if max(far) > 1e-3:
            raise SystemExit("the trainers do not do the same work:\n" + "\n".join(said))
    return said


def table(results: dict[str, Result], facts: dict[str, Any]) -> list[str]:
    """Rows by contender; ratios are against ours."""
    ours = results[OURS]
    tokens_per_pair = facts["tokens"] / facts["pairs"]
    rows = [
        "| trainer | pairs/s | tokens/s | ours is | CPU s per step | peak MB | beyond imports | ours needs | padding |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, result in results.items():
        speed = result.pairs_per_second
        rows.append(
            f"| {name} | {speed:.3f} | {speed * tokens_per_pair:.0f} | {ours.pairs_per_second / speed:.2f}x "
            f"| {result.cpu_seconds:.1f} | {result.peak:.0f} | {result.beyond_imports:.0f} "
            f"| {ours.peak / result.peak:.2f} | {100 * result.padding:.1f} % |"
        )
    return rows


def verdict(results: dict[str, Result]) -> str:
    ours = results[OURS]
    best = max((name for name in results if "best" in name), key=lambda name: results[name].pairs_per_second)
    text = (
        f"Against {best}: {ours.pairs_per_second / results[best].pairs_per_second:.2f}x the pairs per second, "
        f"{ours.peak / results[best].peak:.2f} of the memory"
    )
    defaults = next((name for name in results if "defaults" in name), None)
    if defaults:
        text += f"; against its defaults {ours.pairs_per_second / results[defaults].pairs_per_second:.2f}x"
    return text + "."


def section(results: dict[str, Result], facts: dict[str, Any], arguments: argparse.Namespace) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "trl"))
    shared = 100 * (1 - facts["unique_tokens"] / facts["tokens"])
    about = (
        f"{datetime.date.today():%Y-%m-%d}, {_cpu()}, {arguments.threads} threads, float32, {versions}. "
        f"Data: {facts['about']}; {facts['pairs']} pairs, {facts['tokens']} tokens, of which {shared:.1f} % are "
        f"shared by a pair's answers. {arguments.steps - 1} timed steps after a warm-up, medians of {arguments.rounds} "
        "rounds in which all take turns, but for TRL's slower micro-batches, which run in the first alone. Ours runs "
        "with the process settings that the command `anchored` makes (anchored/process.py), TRL with PyTorch's; "
        "tokens are those of each answer with its prompt, padding left out."
    )
    said = [f"- {line}" for line in check_same_work(results)]
    command = shlex.join(["python", "benchmarks/train_vs_trl.py", *sys.argv[1:]])
    return "\n".join([f"    {command}", "", about, "", *table(results, facts), "", verdict(results), "", *said])


def write(text: str, name: str, title: str) -> None:
    """Put `text` between the marks called `name` in docs/benchmarks.md, or at its end under a title."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    marked, page = f"{begin}\n{text}\n{end}", DOCS.read_text("utf-8")
    before, found, rest = page.partition(begin)
    if found:
        page = before + marked + rest.partition(end)[2]
    else:
        page = f"{page.rstrip()}\n\n## {title}\n\n{marked}\n"
    DOCS.write_text(page, "utf-8")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def contenders(arguments: argparse.Namespace) -> list[Contender]:
    tokens = ("--tokens-per-batch", str(arguments.tokens_per_batch)) if arguments.tokens_per_batch else ()
    return [
        Contender(OURS, "ours", tokens),
        *(
            Contender(f"TRL, best, micro-batch {size}", "trl-best", ("--micro-batch", str(size)))
            for size in arguments.micro_batches
        ),
        *([] if arguments.no_defaults else [Contender("TRL, defaults", "trl-defaults", ("--micro-batch", "8"))]),
    ]


def sits_out(contender: Contender, runs: dict[str, list[dict[str, Any]]]) -> bool:
    """Whether it is a micro-batch that the first round, now over, showed not to be TRL's best."""
    if contender.side != "trl-best" or contender.name not in runs:
        return False
    speeds = {name: summary(found[:1]).pairs_per_second for name, found in runs.items() if "best" in name}
    return contender.name not in sorted(speeds, key=lambda name: -speeds[name])[:GO_ON]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="of 16 pairs, at most 8; the first warms up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--micro-batches", type=int, nargs="*", default=[2, 4, 8, 16], help="of TRL's best settings")
    parser.add_argument("--no-defaults", action="store_true", help="leave TRL's defaults out")
    parser.add_argument("--tokens-per-batch", type=int, help="of ours; not given: what `anchored train` chooses")
    parser.add_argument("--random", action="store_true", help="random tokens although there is real data")
    parser.add_argument("--write", action="store_true", help="keep the results in docs/benchmarks.md")
    arguments = parser.parse_args()
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        facts = run_side("data", folder, ["--random"] if arguments.random else [])
        runs: dict[str, list[dict[str, Any]]] = {}
        for turn in range(arguments.rounds):
            for contender in filter(lambda one: not sits_out(one, runs), contenders(arguments)):
                common = ["--steps", str(arguments.steps), "--threads", str(arguments.threads)]
                runs.setdefault(contender.name, []).append(
                    run_side(contender.side, folder, [*common, *contender.options])
                )
                speed = summary(runs[contender.name][-1:]).pairs_per_second
                print(f"round {turn + 1}: {contender.name}: {speed:.3f} pairs/s", file=sys.stderr, flush=True)
    text = section({name: summary(found) for name, found in runs.items()}, facts, arguments)
    print(text)
    if arguments.write:
        write(text, "train_vs_trl", "Training against TRL")


if __name__ == "__main__":
    main()
