"""The knobs of training, with the paper's values as defaults."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from anchored.objectives.settings import ObjectiveSettings
from anchored.settings import Settings


class OptimizerSettings(Settings):
    """How the weights follow the gradient. State and weights are kept in float32 whatever the model's own precision."""

    name: Literal["rmsprop", "adamw"] = "rmsprop"
    """PyTorch's RMSprop (alpha 0.99) or AdamW (betas 0.9 and 0.999)."""
    lr: float = Field(default=2e-7, gt=0, allow_inf_nan=False)
    """Learning rate at its highest; small models want far more (1e-5 to 1e-4)."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate goes on after the warm-up: to 0 at the end of the last epoch, or not at all."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate first rises."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """AdamW's decoupled decay, of all weights, norms and biases too; with RMSprop an L2 penalty."""
    max_grad_norm: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Scale gradients down to this norm when they exceed it; null leaves them as they are."""


class LoraSettings(Settings):
    """Adapters that are trained instead of the model's own weights; needs `pip install 'anchored[lora]'`."""

    rank: int = Field(default=16, ge=1)
    """Inner width of the adapters."""
    alpha: float = Field(default=32.0, gt=0, allow_inf_nan=False)
    """An adapter's output is scaled by alpha / rank."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Which linear layers get one: all but the output layer, or a list of names (`[q_proj, v_proj]`)."""
    merge: bool = False
    """Checkpoints are whole models with the adapters added to the weights, in the model's own precision; else they are
    the adapters alone."""
    quantize: Literal["4bit"] | None = None
    """Hold the frozen weights in 4 bits (QLoRA); needs a GPU and bitsandbytes. Not run yet."""


class TrainSettings(Settings):
    """The `train:` section."""

    data: str | None = None
    """Train on this data set of pairs (a file, a folder or a Hub id) instead of the pairs that `create` makes."""
    split: str | None = None
    """Which split of `data`, where it has several; null: train."""
    held_out: int | None = Field(default=None, ge=0)
    """Prompts of `data` whose pairs are set apart for trajectories; null: 100, or a tenth of fewer than 1000. Created
    pairs have `create.prompts.held_out`."""
    objective: ObjectiveSettings = ObjectiveSettings()
    """The loss."""
    epochs: int = Field(default=18, ge=1)
    """Passes over the pairs; a checkpoint follows each."""
    refresh_reference_epochs: int | None = Field(default=None, ge=1)
    """Let the policy become its own reference every so many epochs; null: the starting model stays the reference."""
    pairs_per_step: int = Field(default=16, ge=1)
    """Pairs per optimizer step, or half the single answers of unpaired data. The last step of an epoch holds the rest,
    and each of its pairs weighs 1/rest."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """The optimizer and its schedule."""
    lora: LoraSettings | None = None
    """Train low-rank adapters; null: all weights."""
    max_prompt_tokens: int = Field(default=512, ge=1)
    """A longer prompt keeps its end."""
    max_answer_tokens: int = Field(default=512, ge=1)
    """A longer answer keeps its start; the end-of-turn token counts."""
    seed: int = 0
    """Of the pairs' order, which depends on this and the epoch alone, and of kto's mismatched answers."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the forward and backward pass; auto: bfloat16 on a GPU for a model saved in 16 bits, else float32."""
    tokens_per_batch: int | None = Field(default=None, ge=1)
    """Tokens that go through the model at once: lower it when memory runs out; the steps stay the same. Null: 2048 on a
    CPU, 8192 on a GPU."""
    gradient_checkpointing: bool = False
    """Compute each layer again for its gradients instead of keeping what lies inside it: less memory, about a third
    more time."""
    save_every_steps: int | None = Field(default=None, ge=1)
    """Also keep what resuming needs every so many steps; null: at the end of each epoch only."""
    keep_last: int | None = Field(default=None, ge=1)
    """Keep the checkpoints of so many newest epochs only; null: all."""
    keep_best: bool = False
    """With `keep_last`, also keep the checkpoint with the lowest held-out loss."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    """Where metrics are also sent to; each needs `pip install 'anchored[NAME]'`. TensorBoard and MLflow write into the
    run folder, unless MLFLOW_TRACKING_URI says otherwise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: a GPU if there is one."""
    ranks: int | None = Field(default=None, ge=1)
    """Processes of this machine that share each step; null: one per GPU, or one on a CPU. Under torchrun its own."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """How ranks share the model: ddp, each has it whole; fsdp, each has a part; auto: fsdp where the weights with their
    gradients and optimizer state do not fit a device."""
    offload: bool = False
    """Keep weights, gradients and optimizer state in the machine's memory, with fsdp; needs a GPU to save anything."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; null is PyTorch's choice (one per core), 1 is better on a busy machine."""

    how_only: ClassVar[frozenset[str]] = frozenset(
        {
            "tokens_per_batch",
            "gradient_checkpointing",
            "save_every_steps",
            "keep_last",
            "keep_best",
            "trackers",
            "device",
            "threads",
            "ranks",
            "parallel",
            "offload",
        }
    )

    @model_validator(mode="after")
    def _check_best(self) -> TrainSettings:
        if self.keep_best and self.refresh_reference_epochs is not None:
            raise ValueError(
                "keep_best compares held-out losses, which mean something else after each refresh of the reference; "
                "leave keep_best or refresh_reference_epochs out"
            )
        return self

    @property
    def sharded(self) -> bool:
        """Whether fsdp is asked for; without, it may still be chosen."""
        return self.parallel == "fsdp" or self.offload

    @model_validator(mode="after")
    def _check_offload(self) -> TrainSettings:
        if self.offload and self.parallel == "ddp":
            raise ValueError("offload is fsdp's; set parallel to fsdp or auto, or offload to false")
        return self
