"""What two trainers are compared on: one model with random weights, its tokenizer, and 128 pairs.

In: the folder of real data, or none. Out: a folder with `model/`, `pairs.jsonl` (text, in no particular order) and
`rows.jsonl` (token ids, in the order in which a run of one epoch sees them). Real pairs are ten revisions three times
over, and two models' answers to the first AlpacaEval instructions. Without them, `lengths.json` gives as many pairs
the same numbers of tokens, and the tokens are random.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from anchored.records import Answer, Pair, user_prompt
from anchored.train.examples import prepare
from anchored.train.policy import sketch_policy
from anchored.train.settings import TrainSettings
from anchored.train.step import epoch_order

PAIRS = 128
VOCABULARY = 16384
LENGTHS = Path(__file__).with_name("lengths.json")
"""Of each real pair: tokens of prompt, chosen and rejected answer, and how many the answers share at their start."""
END, START = "<|eot_id|>", "<|start_header_id|>"
SPECIALS = ["<|end_of_text|>", "<|begin_of_text|>", START, "<|end_header_id|>", END]

TEMPLATE = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

WORDS_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] + ' ' }}"
    "{% if message['role'] == 'assistant' %}{{ '<|eot_id|>' }}{% endif %}{% endfor %}"
)
"""For random tokens: a word is a token, and nothing but the end of an answer is added."""


@dataclass(frozen=True)
class Facts:
    """What is said of the data beside the results."""

    about: str
    pairs: int
    tokens: int
    """Of each answer with its prompt, over all pairs."""
    unique_tokens: int
    """The same with every token that a pair's answers share counted once."""


SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
"""The model's, where no other is asked for."""


def settings(**how: Any) -> TrainSettings:
    """Of our run, with what says how it is done; the other trainer's are made equal to them."""
    what = {
        "objective": {"name": "apo-zero", "beta": 0.1},
        "optimizer": {"name": "rmsprop", "lr": 1e-5, "schedule": "linear"},
        "epochs": 1,
        "pairs_per_step": 16,
        "ranks": 1,
    }
    return TrainSettings.model_validate(what | how)


def write_data(
    folder: Path, data: Path | None, shape: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.float32
) -> Facts:
    """Fill `folder`; `data` is where the real pairs' files lie, `shape` is a LlamaConfig's."""
    if data is not None:
        pairs = real_pairs(data)
        tokenizer = _byte_level_bpe([text for pair in pairs for text in _texts(pair)])
    else:
        pairs, tokenizer = _random_pairs(), _words()
    _save_model(folder / "model", tokenizer, shape or SHAPE, dtype)
    _write_lines(folder / "pairs.jsonl", map(asdict, pairs))
    rows = _rows(folder / "model", pairs)
    _write_lines(folder / "rows.jsonl", rows)
    return Facts(
        about="10 real revisions three times over, 98 pairs of real answers" if data else "random tokens, real lengths",
        pairs=len(rows),
        tokens=sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows),
        unique_tokens=sum(_unique(row) for row in rows),
    )


def real_data() -> Path | None:
    """The folder with the real pairs' files, if it is there."""
    folder = Path(os.environ.get("ANCHORED_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
    return folder if (folder / "clair" / "triples.jsonl").exists() else None


def real_pairs(data: Path) -> list[Pair]:
    """Revisions of answers (chosen) three times over, then GPT-4-turbo's (chosen) and Llama-3-8B-Instruct's answers."""
    with (data / "clair" / "triples.jsonl").open() as lines:
        triples = [json.loads(line) for line in lines]
    pairs = [_pair(row["prompt"], row["expected"]["chosen"], row["rejected"]) for row in triples] * 3
    instructions = [row["instruction"] for row in _gzipped(data / "alpaca_eval" / "instructions.jsonl.gz")]
    chosen = _gzipped(data / "alpaca_eval" / "outputs_gpt-4-turbo-2024-04-09.jsonl.gz")
    rejected = _gzipped(data / "alpaca_eval" / "outputs_Meta-Llama-3-8B-Instruct.jsonl.gz")
    pairs += map(_pair, instructions, chosen, rejected)
    return pairs[:PAIRS]


def read_pairs(folder: Path) -> list[Pair]:
    with (folder / "pairs.jsonl").open() as lines:
        rows = [json.loads(line) for line in lines]
    return [
        _pair(row["prompt"]["messages"][0]["content"], row["chosen"]["text"], row["rejected"]["text"]) for row in rows
    ]


def write_lengths(folder: Path) -> None:
    """Keep the lengths of a folder's pairs for machines that have no real ones."""
    with (folder / "rows.jsonl").open() as lines:
        rows = [json.loads(line) for line in lines]
    lengths = [[len(row["prompt_ids"]), len(row["chosen_ids"]), len(row["rejected_ids"]), _shared(row)] for row in rows]
    # sorted: the numbers alone remain
    LENGTHS.write_text(json.dumps(sorted(lengths)).replace("], ", "],\n ") + "\n")


def _pair(prompt: str, chosen: str, rejected: str) -> Pair:
    return Pair(user_prompt(prompt), Answer(chosen), Answer(rejected))


def _texts(pair: Pair) -> tuple[str, str, str]:
    return pair.prompt.messages[0].content, pair.chosen.text, pair.rejected.text


def _gzipped(path: Path) -> list:
    with gzip.open(path, "rt") as lines:
        return [json.loads(line) for line in lines]


def _byte_level_bpe(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return _tokenizer(bpe, TEMPLATE)


def _words() -> PreTrainedTokenizerFast:
    names = [*SPECIALS, *(f"t{index}" for index in range(VOCABULARY - len(SPECIALS)))]
    words = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token=SPECIALS[0]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _tokenizer(words, WORDS_TEMPLATE)


def _tokenizer(inner: Tokenizer, template: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=SPECIALS[0],
        eos_token=END,
        bos_token=SPECIALS[1],
        additional_special_tokens=SPECIALS[2:4],
    )
    tokenizer.chat_template = template
    return tokenizer


def _random_pairs() -> list[Pair]:
    random = Random(0)

    def words(count: int) -> list[str]:
        return [f"t{random.randrange(VOCABULARY - len(SPECIALS))}" for _ in range(count)]

    pairs = []
    for prompt, chosen, rejected, shared in json.loads(LENGTHS.read_text()):
        start = words(shared)
        # the end-of-turn token is one of an answer's tokens; the first words after the start differ
        answers = ([*start, f"t{side}", *words(count - shared - 2)] for side, count in enumerate((chosen, rejected)))
        pairs.append(_pair(*map(" ".join, (words(prompt), *answers))))
    return pairs


def _save_model(folder: Path, tokenizer: PreTrainedTokenizerFast, shape: Mapping[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    names = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(**shape, **names, dtype=dtype)
    # billions of random numbers come faster from a GPU
    device = "cuda" if torch.cuda.is_available() and dtype is torch.bfloat16 else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _rows(model: Path, pairs: Sequence[Pair]) -> list[dict[str, list[int]]]:
    """Token ids in the order of a run's first epoch."""
    chosen = settings()
    examples = prepare(pairs, sketch_policy(model, chosen), chosen).kept
    assert len(examples) == len(pairs), "every pair is trained on"
    rows = []
    for place in epoch_order(len(examples), chosen.seed, 0):
        tree = examples[place].tree
        parts = (tree.prompt, *tree.answers)
        rows.append(dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), map(list, parts), strict=True)))
    return rows


def _shared(row: dict[str, list[int]]) -> int:
    both = zip(row["chosen_ids"], row["rejected_ids"], strict=False)
    return sum(1 for _ in takewhile(lambda tokens: tokens[0] == tokens[1], both))


def _unique(row: dict[str, list[int]]) -> int:
    return sum(map(len, row.values())) - _shared(row)


def _write_lines(path: Path, rows: Iterator[dict] | Sequence[dict]) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
