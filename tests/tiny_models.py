"""Tiny random decoders and a tiny tokenizer, made in the test: real architectures, real chat templates, no download.

In: a family, a seed. Out: transformers objects, or a Hugging Face folder with both. Nothing here is trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

Family = Literal["llama", "qwen2", "qwen3"]

PAD, BOS, START, END = "<|endoftext|>", "<|bos|>", "<|im_start|>", "<|im_end|>"

CHATML = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen's: a newline follows the end-of-turn token. Begins with the BOS token where the tokenizer has one."""

TRIMMED = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n\n' + message['content'] | trim + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
"""As Llama 3's: content is trimmed, nothing follows the end-of-turn token."""

CORPUS = [
    "Add 348 and 275. First the ones: 8 plus 5 is 13, write 3 and carry 1. The answer is 623.",
    "Which number is larger? Sort 17, 4, 92 and 30 from the smallest to the largest.\n4, 17, 30, 92.",
    "A train leaves at 10:45 and takes 2 hours and 30 minutes. It arrives at 13:15.",
    "You are a helpful assistant.\nHow many coins make 68 cents? user system assistant",
    "The quick brown fox jumps over the lazy dog; naïve cafés cost 5 € — 你好 🙂.",
]


def make_tokenizer(
    chat_template: str | None = CHATML, bos: bool = False, vocab_size: int = 448
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` entries; with `bos`, encoding text prepends the BOS, as Llama's."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = [PAD, START, END, *([BOS] if bos else [])]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS * 4, trainer)
    if bos:
        bpe.post_processor = TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        bos_token=BOS if bos else None,
        additional_special_tokens=[START],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def make_model(
    family: Family = "llama",
    vocab_size: int = 448,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    *,
    width: int = 32,
    layers: int = 2,
    context: int = 2048,
    tied: bool = False,
) -> PreTrainedModel:
    """A random decoder in eval mode: 4 query heads on 2 key heads, weights drawn widely enough that logits differ."""
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "llama":
            model = LlamaForCausalLM(LlamaConfig(**shape))
        elif family == "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**shape))
        else:
            model = Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=width // 4))
    return model.to(dtype).eval()


def save_folder(
    path: Path,
    family: Family = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    chat_template: str | None = CHATML,
    bos: bool = False,
    **shape: int | bool,
) -> Path:
    """A Hugging Face folder with a random model and its tokenizer; returns `path`."""
    tokenizer = make_tokenizer(chat_template, bos)
    model = make_model(family, len(tokenizer), seed, dtype, **shape)  # type: ignore[arg-type]
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
