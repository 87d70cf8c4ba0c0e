"""The objectives against TRL's own code: its trainers' losses on a tiny model, values and gradients of every weight.

TRL's trainers compute the loss of a batch from two models; here the same batch goes through plain forward passes, whose
logps our functions take. TRL's KL is of one micro-batch on one rank, which is what is compared.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from drawn_logps import draw_pairs, losses_and_gradients, make_settings
from tiny_models import make_model, make_tokenizer
from torch import Tensor
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from anchored.objectives.losses import AnswerLogps, PairLogps, find_objective, losses_of

BETA = 0.3

ROWS = [
    ("Add 348 and 275.", "The answer is 623.", "First the ones: 8 plus 5 is 13. The answer is 613, I think."),
    ("Sort 17, 4, 92 and 30.", "4, 17, 30, 92.", "92, 30."),
    ("How many coins make 68 cents?", "Six coins: 50, 10, 5 and 3 of 1.", "Sixty."),
    ("When does the train arrive?", "It arrives at 13:15.", "A train leaves at 10:45 and takes 2 hours."),
]
COMMON: dict[str, Any] = {
    "beta": BETA,
    "per_device_train_batch_size": 4,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_dropout": True,
}


@pytest.fixture(scope="module")
def policy() -> PreTrainedModel:
    return noisy_model(seed=6)


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return noisy_model(seed=5)


def noisy_model(seed: int) -> PreTrainedModel:
    """A model whose logps differ from another's by enough to leave the straight part of a sigmoid."""
    model = make_model()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=random)
    return model


@pytest.fixture(scope="module")
def dpo_trainer(
    policy: PreTrainedModel, reference: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory
) -> DPOTrainer:
    pairs = [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt, good, bad in ROWS]
    return DPOTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(output_dir=folder(tmp_path_factory), **COMMON),
        train_dataset=Dataset.from_list(pairs),
        processing_class=make_tokenizer(),
    )


@pytest.fixture(scope="module", params=["kto", "apo_zero_unpaired"])
def kto_trainer(
    request: pytest.FixtureRequest,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> KTOTrainer:
    labels = [True, False, False, True]
    rows = [
        {"prompt": prompt, "completion": good if label else bad, "label": label}
        for (prompt, good, bad), label in zip(ROWS, labels, strict=True)
    ]
    config = {"loss_type": request.param, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    return KTOTrainer(
        model=policy,
        ref_model=reference,
        args=KTOConfig(output_dir=folder(tmp_path_factory), train_sampling_strategy="sequential", **config, **COMMON),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
    )


def folder(factory: pytest.TempPathFactory) -> str:
    return str(Path(factory.mktemp("trl")))


@pytest.mark.parametrize(
    ("theirs", "name", "knobs"),
    [
        ({"loss_types": ["sigmoid"]}, "dpo", {}),
        ({"loss_types": ["sigmoid_norm"], "beta": 3.0}, "dpo", {"length_normalised": True, "beta": 3.0}),
        ({"loss_types": ["hinge"]}, "slic-hinge", {}),
        ({"loss_types": ["ipo"]}, "ipo", {}),
        ({"loss_types": ["robust"], "label_smoothing": 0.2}, "robust-dpo", {"label_smoothing": 0.2}),
        ({"loss_types": ["apo_zero"]}, "apo-zero", {}),
        ({"loss_types": ["apo_down"]}, "apo-down", {}),
    ],
)
def test_losses_over_pairs_are_those_of_the_dpo_trainer(
    dpo_trainer: DPOTrainer,
    monkeypatch: pytest.MonkeyPatch,
    theirs: dict[str, Any],
    name: str,
    knobs: dict[str, Any],
) -> None:
    for key, value in theirs.items():
        monkeypatch.setattr(dpo_trainer, key, value)
    settings = make_settings(name, **{"beta": BETA, **knobs})
    batch = next(iter(dpo_trainer.get_train_dataloader()))
    logps = pair_logps(dpo_trainer, batch)
    spread = BETA * (logps.policy_chosen - logps.reference_chosen).detach()
    assert spread.max() - spread.min() > 1
    ours = losses_of(find_objective(name), logps, settings).mean()
    assert_same(dpo_trainer, batch, ours)


def test_sft_is_that_of_the_dpo_trainer(dpo_trainer: DPOTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpo_trainer, "loss_types", ["sft"])
    batch = next(iter(dpo_trainer.get_train_dataloader()))
    pairs = pair_logps(dpo_trainer, batch)
    answers = AnswerLogps(
        torch.cat([pairs.policy_chosen, pairs.policy_rejected]),
        torch.cat([pairs.reference_chosen, pairs.reference_rejected]),
        torch.cat([pairs.chosen_tokens, pairs.rejected_tokens]),
        torch.arange(8) < 4,
    )
    losses = losses_of(find_objective("sft"), answers, make_settings("sft"))
    assert_same(dpo_trainer, batch, losses.sum() / pairs.chosen_tokens.sum())


def test_losses_over_answers_are_those_of_the_kto_trainer(kto_trainer: KTOTrainer) -> None:
    name = kto_trainer.loss_type.replace("_", "-")
    settings = make_settings(name, beta=BETA, desirable_weight=1.5, undesirable_weight=0.7)
    batch = next(iter(kto_trainer.get_train_dataloader()))
    objective = find_objective(name)
    logps = answer_logps(kto_trainer, batch, mismatched=objective.mismatched)
    step = {name: values(logps, settings).mean().detach() for name, values in objective.step_means.items()}
    assert logps.desirable.tolist() == [True, False, False, True]
    # a KL that the clamp hides would not be compared
    assert all(mean > 1 for mean in step.values())
    logps = AnswerLogps(*(getattr(logps, name) for name in logps.__slots__[:6]), step=step)
    assert_same(kto_trainer, batch, losses_of(objective, logps, settings).mean())


@pytest.mark.parametrize(
    ("theirs", "name", "knobs"),
    [
        ({"loss_type": "sigmoid"}, "cpo", {}),
        ({"loss_type": "sigmoid", "label_smoothing": 0.1}, "cpo", {"label_smoothing": 0.1}),
        ({"loss_type": "simpo", "simpo_gamma": 0.6}, "simpo", {"margin": 0.6}),
        (
            {"loss_type": "simpo", "simpo_gamma": 0.6, "label_smoothing": 0.1},
            "simpo",
            {"margin": 0.6, "label_smoothing": 0.1},
        ),
    ],
)
def test_losses_without_reference_are_those_of_the_cpo_trainer(
    theirs: dict[str, Any], name: str, knobs: dict[str, Any]
) -> None:
    trainer = SimpleNamespace(
        **{"alpha": 0.0, "beta": BETA, "label_smoothing": 0.0, "accelerator": SimpleNamespace(device="cpu"), **theirs}
    )
    settings = make_settings(name, beta=BETA, sft_weight=0.0, **knobs)
    pairs = no_margins(draw_pairs())
    chosen, rejected = normalised(pairs, settings.length_normalised)
    losses, _, _ = CPOTrainer.cpo_loss(trainer, chosen, rejected)
    assert_same_gradients(pairs, losses, settings)


def test_the_odds_ratio_term_is_that_of_the_orpo_trainer() -> None:
    trainer = SimpleNamespace(beta=BETA, accelerator=SimpleNamespace(device="cpu"))
    pairs = no_margins(draw_pairs())
    chosen, rejected = normalised(pairs, True)
    negative, *_ = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)
    # TRL computes this term in float32
    assert_same_gradients(pairs, -negative, make_settings("orpo", beta=BETA, sft_weight=0.0), rtol=1e-4)


def assert_same(trainer: DPOTrainer | KTOTrainer, batch: dict[str, Tensor], ours: Tensor) -> None:
    """The same loss, and the same gradient of every weight of the policy."""
    weights = list(trainer.model.parameters())
    theirs = trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for expected, found in zip(torch.autograd.grad(theirs, weights), torch.autograd.grad(ours, weights), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def assert_same_gradients(pairs: PairLogps, theirs: Tensor, settings: Any, rtol: float = 1e-9) -> None:
    """The same losses, and the same gradients by the logps."""
    losses, gradients = losses_and_gradients(pairs, settings)
    torch.testing.assert_close(losses, theirs.detach().double(), rtol=rtol, atol=1e-9)
    expected = torch.autograd.grad(theirs.sum(), [pairs.policy_chosen, pairs.policy_rejected])
    torch.testing.assert_close(gradients, list(expected), rtol=rtol, atol=1e-6 if rtol > 1e-6 else 1e-12)


def no_margins(pairs: PairLogps) -> PairLogps:
    return PairLogps(*(getattr(pairs, name) for name in pairs.__slots__[:6]), torch.zeros_like(pairs.margins))


def normalised(pairs: PairLogps, per_token: bool) -> tuple[Tensor, Tensor]:
    if not per_token:
        return pairs.policy_chosen, pairs.policy_rejected
    return pairs.policy_chosen / pairs.chosen_tokens, pairs.policy_rejected / pairs.rejected_tokens


def pair_logps(trainer: DPOTrainer, batch: dict[str, Tensor]) -> PairLogps:
    """The logps of TRL's batch, whose first half are the winners."""
    policy = summed_logps(trainer.model, batch).chunk(2)
    with torch.no_grad():
        reference = summed_logps(trainer.ref_model, batch).chunk(2)
    tokens = batch["completion_mask"].sum(1).chunk(2)
    return PairLogps(*policy, *reference, *tokens, margins=torch.zeros(len(policy[0])))


def answer_logps(trainer: KTOTrainer, batch: dict[str, Tensor], mismatched: bool) -> AnswerLogps:
    with torch.no_grad():
        others = [summed_logps(model, batch, "KL_") for model in (trainer.model, trainer.ref_model) if mismatched]
        reference = summed_logps(trainer.ref_model, batch)
    return AnswerLogps(
        summed_logps(trainer.model, batch),
        reference,
        batch["completion_mask"].sum(1),
        torch.as_tensor(batch["label"]),
        *others,
    )


def summed_logps(model: PreTrainedModel, batch: dict[str, Tensor], prefix: str = "") -> Tensor:
    """Of each completion, by a plain forward pass."""
    ids, mask, scored = (batch[f"{prefix}{name}"] for name in ("input_ids", "attention_mask", "completion_mask"))
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (logps * scored[:, 1:]).sum(1)
