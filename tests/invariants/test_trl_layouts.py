"""What we write, in TRL's trainers: the file as it is, with all its further columns, and one real step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset
from tiny_models import make_model, make_tokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from anchored.contrast import contrasts
from anchored.datasets_io import write_pairs
from anchored.datasets_io.converting import convert
from anchored.records import Answer, Message, Pair, Prompt, prompt_id

TALK = (Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", "Add 3."))
SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 4,
    "max_steps": 1,
    "learning_rate": 1e-3,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs with all that we ever write beside them."""
    pairs = [
        Pair(
            Prompt(TALK, prompt_id(TALK))
            if number == 0
            else Prompt((Message("user", f"Add {number} and 4."),), f"{number}"),
            Answer(f"The answer is {number + 4}.", "teacher"),
            Answer("The answer is 5, I think.", "policy"),
            method="clair",
            rational="It guesses." if number else "",
            margin=float(number),
        )
        for number in range(4)
    ]
    each = contrasts(pairs)
    extra: dict[str, list[Any]] = {
        name: [getattr(one, name) for one in each] for name in ("jaccard", "levenshtein", "length_ratio")
    }
    extra |= {"score_chosen": [9.0] * 4, "score_rejected": [2.5] * 4, "source": ["evol", "evol", None, "flan"]}
    path = tmp_path_factory.mktemp("data") / "pairs.parquet"
    write_pairs(path, pairs, extra)
    return path


def loaded(path: Path) -> Dataset:
    data: Any = load_dataset("parquet", data_files=str(path), cache_dir=str(path.parent / "cache"))
    return data["train"]


@pytest.mark.parametrize("layout", ["trl", "implicit"])
def test_the_dpo_trainer_takes_a_step_on_our_pairs(layout: Any, source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out.parquet", layout)
    data = loaded(tmp_path / "out.parquet")
    assert {"rational", "margin", "score_chosen", "jaccard", "source"} <= set(data.column_names)
    model = make_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = DPOTrainer(
        model=model,
        ref_model=make_model(),
        args=DPOConfig(output_dir=str(tmp_path / "trl"), **SETTINGS),
        train_dataset=data,
        processing_class=make_tokenizer(),
    )
    trainer.train()
    assert_learned(trainer, before)
    shown = trainer.processing_class.decode(trainer.data_collator([trainer.train_dataset[0]])["input_ids"][0])
    assert shown.count("Be brief.") == shown.count("Add 3.") == shown.count("The answer is 4.") == 1, "no turn twice"


def test_the_kto_trainer_takes_a_step_on_our_answers(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out.parquet", "unpaired")
    data = loaded(tmp_path / "out.parquet")
    assert data["label"][:] == [True, False] * 4
    assert {"rational", "margin", "score", "jaccard", "source"} <= set(data.column_names)
    model = make_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = KTOTrainer(
        model=model,
        ref_model=make_model(),
        args=KTOConfig(output_dir=str(tmp_path / "trl"), **SETTINGS),
        train_dataset=data,
        processing_class=make_tokenizer(),
    )
    trainer.train()
    assert_learned(trainer, before)


def assert_learned(trainer: DPOTrainer | KTOTrainer, before: dict[str, torch.Tensor]) -> None:
    assert trainer.state.global_step == 1
    after = trainer.model.state_dict()
    assert all(weight.isfinite().all() for weight in after.values())
    assert any(not torch.equal(after[name], weight) for name, weight in before.items())
