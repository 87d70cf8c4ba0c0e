"""The model card: true numbers, a header that the Hub takes, and no text from outside that is taken for markup."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from tiny_models import save_folder
from training_pairs import make_answers, make_pairs, make_settings, trained
from transformers import AutoModelForCausalLM, AutoTokenizer

from anchored.runs import read_lines
from anchored.train.model_card import CardFacts, model_card

FACTS = CardFacts(
    base_model="meta-llama/Meta-Llama-3-8B-Instruct",
    settings=make_settings(data="openbmb/UltraFeedback", objective={"name": "dpo", "beta": 0.3, "margin": 0.5}),
    precision="bfloat16",
    rows=29_000,
    paired=True,
    methods=("clair",),
    held_out=100,
    left_out={"identical": 3},
    steps=36,
)


def test_the_card_of_a_checkpoint_tells_what_was_done(tmp_path: Path) -> None:
    model = save_folder(tmp_path / "tiny policy")
    pairs = make_pairs(7)
    same = replace(pairs[0], rejected=pairs[0].chosen)
    settings = make_settings(objective={"name": "apo-zero", "beta": 0.25}, optimizer={"lr": 3e-5})
    trained(tmp_path / "run", model, settings, [*pairs, same], make_pairs(2, seed=1))
    folder = tmp_path / "run" / "checkpoints" / "epoch-01"
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers"
    assert "apo-zero" in (card.data.tags or [])
    assert card.data.base_model is None, "a folder of this machine is no model of the Hub"
    text = card.text
    for says in (
        "`tiny policy` trained with `apo-zero` by Anchored: after 1 of 2 epochs, 2 of 4 steps.",
        "- 7 pairs\n- 2 more held out\n- left out: 1 `identical`",
        "- objective: `apo-zero`, beta 0.25",
        "- optimizer: rmsprop, learning rate 3e-05, linear",
        "- pairs per step: 4",
        "- precision: float32, updates in float32",
        f"transformers {version('transformers')}",
        "arXiv:2408.06266",
    ):
        assert says in text
    (line,) = [line for line in read_lines(tmp_path / "run" / "trajectories.jsonl") if line["step"] == 2]
    for name in ("loss", "reward_margin", "logp_chosen"):
        assert f"| {name} | {line[name]:.4g} |" in text
    assert str(tmp_path) not in text
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == len(AutoTokenizer.from_pretrained(folder))


def test_the_header_names_what_the_hub_knows() -> None:
    data = ModelCard(model_card(FACTS, epoch=1, step=2, held_out=None)).data
    assert data.base_model == "meta-llama/Meta-Llama-3-8B-Instruct"
    assert data.datasets == ["openbmb/UltraFeedback"]
    data.to_dict()
    adapter = replace(FACTS, settings=FACTS.settings.model_copy(update={"lora": {"rank": 4}}))
    settings = make_settings(lora={"rank": 4})
    assert ModelCard(model_card(replace(adapter, settings=settings), 1, 2, None)).data.library_name == "peft"
    merged = replace(FACTS, settings=make_settings(lora={"rank": 4, "merge": True}))
    assert ModelCard(model_card(merged, 1, 2, None)).data.library_name == "transformers"


def test_options_of_the_objective_and_the_absence_of_held_out_rows_are_told() -> None:
    card = model_card(FACTS, epoch=1, step=2, held_out=None)
    assert "- objective: `dpo`, beta 0.3, margin 0.5" in card
    assert "None were held out." in card
    assert "29,000 pairs of `openbmb/UltraFeedback` made by `clair`" in card


def test_single_answers_are_not_called_pairs(tmp_path: Path) -> None:
    model = save_folder(tmp_path / "model")
    trained(tmp_path / "run", model, make_settings(objective={"name": "kto"}, epochs=1), make_answers(6))
    card = (tmp_path / "run" / "checkpoints" / "epoch-01" / "README.md").read_text("utf-8")
    assert "- 8 labelled answers\n" in card
    assert "- answers per step: 8\n" in card


@pytest.mark.parametrize(
    "name",
    [
        "/data/<img src=x onerror=alert(1)>.jsonl",
        "/data/`code` and ``more`` | a table.jsonl",
        "/data/two\nlines\n---\n# A title.jsonl",
        "/data/key: [value, *alias] &anchor #x.jsonl",
    ],
)
def test_names_from_outside_stay_names(name: str) -> None:
    facts = replace(FACTS, base_model=Path(name), settings=make_settings(data=name), methods=(name,))
    card = ModelCard(model_card(facts, epoch=1, step=2, held_out={"step": 2, "epoch": 1.0, "loss": 0.5}))
    assert card.data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}
    tokens = [inner for token in MarkdownIt().parse(card.text) for inner in [token, *(token.children or [])]]
    assert not [token for token in tokens if token.type.startswith("html") or token.type == "hr"]
    assert Counter(token.tag for token in tokens if token.type == "heading_open") == {"h1": 1, "h2": 5}
    spans = [token.content for token in tokens if token.type == "code_inline"]
    assert spans.count(" ".join(name.split()).removeprefix("/data/")) == 3, "of the model, twice, and of the data"
