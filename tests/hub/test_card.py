"""The data set card: true numbers, a header that the Hub takes, and nothing of this machine or of a hostile name."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from commands import anchored
from huggingface_hub import DatasetCard
from markdown_it import MarkdownIt

from anchored.contrast import MeanContrast, contrast
from anchored.datasets_io import read_pairs, write_pairs
from anchored.hub.card import Facts, Observer, TeacherPrompt, data_card
from anchored.llm.prompt_files import load
from anchored.records import Answer, LabelledAnswer, Outcome, Pair, prompt_id, user_prompt
from anchored.runs import Run

FACTS = Facts(
    name="lab/clair-pairs",
    file="data/train-00000-of-00001.parquet",
    layout="trl",
    rows=29_000,
    pairs=29_000,
    answers=0,
    methods={"clair": 29_000},
    chosen_models={"gpt-4-0125-preview": 29_000},
    rejected_models={"meta-llama/Meta-Llama-3-8B-Instruct": 28_000, "": 1_000},
    prompts=28_500,
    prompts_sha256="ab" * 32,
    outcomes={Outcome.LEAK: 1_000, Outcome.OK: 29_000, Outcome.LENGTH_RATIO: 2_000},
    contrast=MeanContrast(29_000, "whitespace", 43.114, 1108.04, 0.3712, 1.02, 24.31, 0.0151, 0.0021),
    recipe={"create": {"method": "clair"}},
    teacher_prompts=(TeacherPrompt("create/reviser", "cd" * 32),),
    license="cc-by-4.0",
)

CARD = """\
---
license: cc-by-4.0
pretty_name: clair-pairs
task_categories:
- text-generation
tags:
- anchored
- preference-alignment
- dpo
- clair
size_categories:
- 10K<n<100K
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-00000-of-00001.parquet
---

# `lab/clair-pairs`

29,000 preference pairs to 28,500 prompts, made by `clair`. Written by Anchored.

## Rows

- 29,000 rows in the layout `trl`: `prompt` (messages), `chosen`, `rejected` (the answers alone), for TRL's `DPOTrainer`
- method: `clair` (29,000)
- chosen answers by: `gpt-4-0125-preview` (29,000)
- rejected answers by: `meta-llama/Meta-Llama-3-8B-Instruct` (28,000), not recorded (1,000)
- prompts: 28,500 distinct; sha256 of their sorted ids, one a line: `PROMPTS`
- the teacher was asked with `create/reviser`, sha256 `TEACHER`
- each row has the content name of its prompt in `prompt_id`

## Yield

| outcome | rows | share |
|---|---|---|
| `ok` | 29,000 | 90.6 % |
| `length_ratio` | 2,000 | 6.2 % |
| `leak` | 1,000 | 3.1 % |

## Contrast

| mean over 29,000 pairs | |
|---|---|
| Jaccard similarity x 100, tokenizer `whitespace` | 43.11 |
| Levenshtein distance, characters | 1,108.0 |
| Levenshtein distance per character of the longer answer | 0.371 |
| characters of the chosen answer per character of the rejected one | 1.02 |
| characters that both begin with | 24.3 |
| the same per character of the shorter answer | 0.015 |
| share of chosen answers that speak of being a revision | 0.0021 |

## Recipe

What the pairs depend on; of local paths the last name.

```yaml
create:
  method: clair
```

## Licence

`cc-by-4.0`, as its publisher says.

## Citation

"""


def test_the_card_is_this_text() -> None:
    text = data_card(FACTS)
    expected = CARD.replace("PROMPTS", "ab" * 32).replace("TEACHER", "cd" * 32)
    assert text.startswith(expected), text
    assert "arXiv:2408.06266" in text.removeprefix(expected)


def test_the_hub_takes_the_header() -> None:
    data = DatasetCard(data_card(FACTS)).data
    assert data.license == "cc-by-4.0"
    assert data.size_categories == ["10K<n<100K"]
    assert "dpo" in (data.tags or [])


def test_without_a_licence_the_card_says_who_has_to_say() -> None:
    card = DatasetCard(data_card(replace(FACTS, license=None)))
    assert card.data.license is None
    assert "None was given" in card.text


@pytest.mark.parametrize(("rows", "size"), [(999, "n<1K"), (1000, "1K<n<10K"), (99_999, "10K<n<100K"), (10**6, "n>1M")])
def test_sizes_are_the_hubs_classes(rows: int, size: str) -> None:
    assert DatasetCard(data_card(replace(FACTS, rows=rows))).data.size_categories == [size]


@pytest.mark.parametrize(
    "name", ["a`b", "# <script>alert(1)</script>", "[x](http://example.org)", "| a | b |", "\n---\n"]
)
def test_names_from_outside_are_no_markup(name: str) -> None:
    facts = replace(FACTS, chosen_models={name: 5}, methods={name: 5}, recipe={"note": f"```\n{name}"})
    html = MarkdownIt().enable("table").render(DatasetCard(data_card(facts)).text)
    assert "<script>" not in html
    assert 'href="http://example.org"' not in html
    assert html.count("<h1>") == 1
    assert html.count("<h2>") == 6


def test_what_is_counted_while_rows_go_by() -> None:
    pairs = [
        Pair(user_prompt(prompt), Answer(f"{prompt} good", "m"), Answer(f"{prompt} bad", model), method)
        for prompt, model, method in (("b", "x", "clair"), ("a", "x", ""), ("b", "y", "clair"))
    ]
    seen = Observer()
    for row in (*pairs, LabelledAnswer(user_prompt("c"), Answer("z", "w"), False)):
        seen.see(row)
    assert (seen.pairs, seen.answers, seen.prompts) == (3, 1, 3)
    assert seen.methods == {"clair": 2, "": 1}
    assert (seen.chosen_models, seen.rejected_models) == ({"m": 3}, {"x": 2, "y": 1, "w": 1})
    ids = sorted(prompt_id(user_prompt(text).messages) for text in "abc")
    assert seen.prompts_sha256 == hashlib.sha256("\n".join(ids).encode()).hexdigest()
    assert seen.contrast == contrast(pairs)
    assert Observer().contrast is None


def test_the_card_beside_the_file_tells_true_numbers(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Why {n}?", "chosen": "Here is the revised answer: so.", "rejected": "So.", "chosen_model": "m"}
        for n in range(3)
    ]
    rows.append({**rows[0], "rejected": rows[0]["chosen"]})
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    done = anchored("convert", source, tmp_path / "out.parquet", "--card")
    assert done.code == 0, done.err
    card = DatasetCard.load(tmp_path / "README.md")
    text = card.text
    assert "3 preference pairs to 3 prompts." in text
    assert "| `ok` | 3 | 75.0 % |\n| `identical` | 1 | 25.0 % |" in text
    assert "- chosen answers by: `m` (3)\n- rejected answers by: not recorded (3)" in text
    assert "| share of chosen answers that speak of being a revision | 1.0000 |" in text
    mean = contrast(read_pairs(source).pairs)
    assert not math.isnan(mean.jaccard)
    assert f"tokenizer `whitespace` | {mean.jaccard:.2f} |" in text
    assert str(tmp_path) not in text
    again = anchored("convert", source, tmp_path / "other.parquet", "--card")
    assert again.code == 2
    assert "README.md: exists already" in again.err
    assert not (tmp_path / "other.parquet").exists()


def test_a_run_folders_card_tells_its_recipe_without_secrets_and_paths(tmp_path: Path) -> None:
    run = Run(tmp_path / "my run")
    pairs = [Pair(user_prompt("Why?"), Answer("a b", "gpt"), Answer("a c", str(tmp_path / "tiny")), "clair")]
    write_pairs(run.pairs, pairs)
    recipe = {
        "policy": {"model": str(tmp_path / "models" / "tiny")},
        "create": {
            "method": "clair",
            "prompts": {"data": f"{tmp_path}/prompts.jsonl", "seed": 7},
            "sample": {"temperature": 0.6, "batch_size": 3},
            "reviser": {
                "model": "gpt",
                "prompt": "create/reviser",
                "base_url": "http://10.1.2.3:8000/v1",
                "key_env": "MY_KEY",
                "extra_body": {"api_key": "sk-secret", "reasoning_effort": "low"},
            },
            "judge": {"model": "unused"},
        },
        "train": {"epochs": 18},
        "versions": {"anchored": "0.1.0"},
    }
    run.recipe.write_text(yaml.safe_dump(recipe))
    sha256 = hashlib.sha256(load("create/reviser").encode()).hexdigest()
    files = {"teacher": {"prompt": "create/reviser", "sha256": sha256}}
    run.complete("create", {"outcomes": {"ok": 1, "leak": 3}, "prompt_files": files})
    done = anchored("convert", run.folder, tmp_path / "out.parquet", "--card")
    assert done.code == 0, done.err
    text = (tmp_path / "README.md").read_text()
    told = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert told == {
        "policy": {"model": "tiny"},
        "create": {
            "method": "clair",
            "prompts": {"data": "prompts.jsonl", "seed": 7},
            "sample": {"temperature": 0.6},
            "reviser": {"model": "gpt", "prompt": "create/reviser", "extra_body": {"reasoning_effort": "low"}},
        },
        "versions": {"anchored": "0.1.0"},
    }
    assert "| `ok` | 1 | 25.0 % |\n| `leak` | 3 | 75.0 % |" in text
    assert f"the teacher was asked with `create/reviser`, sha256 `{sha256}`" in text
    assert "- rejected answers by: `tiny` (1)" in text
    for private in (str(tmp_path), "10.1.2.3", "MY_KEY", "sk-secret"):
        assert private not in text
