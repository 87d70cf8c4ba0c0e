"""One trainer's run in a process of its own: a warm-up step and some timed ones; prints one line of JSON.

    python benchmarks/comparison_sides.py {data,ours,trl-best,trl-defaults} FOLDER [--steps 4] [--micro-batch 4] ...

`ours` is the train stage itself; `trl-best` and `trl-defaults` are TRL's DPOTrainer itself, given the same token ids.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from anchored.process import settle_environment

PAIRS_PER_STEP = 16


class Enough(Exception):
    """The steps that were asked for are done."""


@dataclass
class Watch:
    """Marks the end of each step, from outside."""

    steps: int
    ends: list[float] = field(default_factory=list)
    """Wall-clock seconds; the first is when the first step begins."""
    cpu: list[float] = field(default_factory=list)
    """CPU seconds at the same moments."""

    def mark(self) -> bool:
        """Whether that was the last step."""
        self.ends.append(time.perf_counter())
        self.cpu.append(time.process_time())
        return len(self.ends) > self.steps

    # as the listener of a stage
    def start(self, task: str, total: int | None, done: int = 0) -> None:
        if task == "train":
            self.mark()

    def advance(self, task: str, by: int = 1, **facts: object) -> None:
        if task == "train" and self.mark():
            raise Enough

    def finish(self, task: str) -> None: ...

    def note(self, text: str) -> None: ...


def peak_megabytes(device: str = "cpu") -> float:
    """The most memory that this process has held, of the machine's or of the GPU's."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_ours(folder: Path, watch: Watch, arguments: argparse.Namespace) -> dict[str, Any]:
    # as the command `anchored` does, before torch is there
    settle_environment()
    from comparison_data import read_pairs, settings

    from anchored.runs import Run, read_lines
    from anchored.train.stage import TrainInputs, train

    bare = peak_megabytes()
    pairs = read_pairs(folder)
    how = {name: getattr(arguments, name) for name in ("threads", "tokens_per_batch", "device", "precision")}
    with TemporaryDirectory() as scratch:
        run = Run(scratch)
        # of all pairs, not only of the steps that are timed: computed in the first run, kept for the others
        known = folder / "reference.sqlite"
        if known.exists():
            shutil.copy(known, run.reference)
        try:
            inputs = TrainInputs(folder / "model", pairs)
            train(run, settings(**how), inputs, watch)
        except Enough:
            lines = list(read_lines(run.metrics))
            shutil.copy(run.reference, known)
    names = ("loss", "logp_chosen", "logp_rejected")
    return {"bare": bare, "padding": 0.0, "lines": [{name: line[name] for name in names} for line in lines]}


def run_trl(folder: Path, watch: Watch, arguments: argparse.Namespace) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Marks(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            watch.mark()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = watch.mark()

    class TokenIds(DPOTrainer):
        """Takes token ids as they are: TRL has no separate limits for prompt and answers."""

        def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
            return dataset

    class Padding:
        """The trainer's own collator, counting."""

        read = places = 0

        def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            batch = collator(examples)
            Padding.read += int(batch["attention_mask"].sum())
            Padding.places += batch["attention_mask"].numel()
            return batch

    torch.set_num_threads(arguments.threads)
    bare = peak_megabytes()
    best = arguments.side == "trl-best"
    rows = read_rows(folder, by_length=best)
    with TemporaryDirectory() as scratch:
        config = DPOConfig(
            output_dir=scratch,
            use_cpu=arguments.device == "cpu",
            bf16=arguments.precision == "bfloat16",
            # what both trainers are to do
            loss_type=["apo_zero"],
            beta=0.1,
            optim="rmsprop",
            learning_rate=1e-5,
            lr_scheduler_type="linear",
            max_steps=len(rows) // PAIRS_PER_STEP,
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            # how
            per_device_train_batch_size=arguments.micro_batch,
            gradient_accumulation_steps=PAIRS_PER_STEP // arguments.micro_batch,
            **(
                {
                    "gradient_checkpointing": False,
                    "precompute_ref_log_probs": True,
                    "precompute_ref_batch_size": arguments.micro_batch,
                    "logging_nan_inf_filter": False,
                    # float32 weights in any case: 16-bit ones would lose the updates
                    "model_init_kwargs": {"attn_implementation": "sdpa", "dtype": "float32"},
                }
                if best
                else {}
            ),
            dataloader_pin_memory=False,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
        )
        data = Dataset.from_list(rows[: watch.steps * PAIRS_PER_STEP])
        trainer = TokenIds(str(folder / "model"), args=config, train_dataset=data, callbacks=[Marks()])
        collator, trainer.data_collator = trainer.data_collator, Padding()
        trainer.train()
    names = {"loss": "loss", "logps/chosen": "logp_chosen", "logps/rejected": "logp_rejected"}
    lines = [
        {new: float(line[old]) for old, new in names.items()} for line in trainer.state.log_history if "loss" in line
    ]
    return {"bare": bare, "padding": 1 - Padding.read / Padding.places, "lines": lines}


def read_rows(folder: Path, by_length: bool) -> list[dict[str, list[int]]]:
    """Pairs as token ids, step by step; `by_length` sorts within each step, so that micro-batches pad least."""
    with (folder / "rows.jsonl").open() as lines:
        rows = [json.loads(line) for line in lines]
    if not by_length:
        return rows
    steps = (rows[start : start + PAIRS_PER_STEP] for start in range(0, len(rows), PAIRS_PER_STEP))
    return [row for step in steps for row in sorted(step, key=_longest)]


def _longest(row: dict[str, list[int]]) -> int:
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("side", choices=["data", "ours", "trl-best", "trl-defaults"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=4, help="the first of them warms up")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--tokens-per-batch", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--shape", type=json.loads, help="of the model, as JSON of a LlamaConfig")
    parser.add_argument("--random", action="store_true", help="random tokens although there is real data")
    arguments = parser.parse_args()
    if arguments.side == "data":
        import torch
        from comparison_data import real_data, write_data

        data = None if arguments.random else real_data()
        facts = write_data(arguments.folder, data, arguments.shape, getattr(torch, arguments.precision))
        print(json.dumps(asdict(facts)))
        return
    watch = Watch(arguments.steps)
    found = (run_ours if arguments.side == "ours" else run_trl)(arguments.folder, watch, arguments)
    print(json.dumps({**found, "peak": peak_megabytes(arguments.device), "ends": watch.ends, "cpu": watch.cpu}))


if __name__ == "__main__":
    main()
