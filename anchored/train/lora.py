"""Low-rank adapters (LoRA, arXiv 2106.09685): what is trained when the model's own weights stay as they are.

In: a loaded model, and the settings. Out: the same model with float32 adapters beside its linear layers (through peft,
which everyone loads them with), or the whole model with trained adapters added to its weights. With the adapters off
it is the model that training started from, the reference. Nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from anchored.errors import TrainError
from anchored.llm.model_folder import import_peft, load_model, without_future_warnings
from anchored.train.settings import LoraSettings


def add_adapter(model: PreTrainedModel, base: str | Path, settings: LoraSettings, seed: int) -> dict[str, nn.Parameter]:
    """Freeze `model`, loaded from `base`, and put adapters beside it; returns these, the parameters left to train.

    The first factor is drawn by `seed` and the second is zero, so the model computes what it did.
    """
    peft = import_peft("train.lora")
    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    config = peft.LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets, task_type="CAUSAL_LM")
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            model.add_adapter(config)
        except ValueError as error:
            raise TrainError(
                f"train.lora.targets: none of {targets!r} is among the model's linear layers ({_linear_names(model)}); "
                "name some of these, or all-linear"
            ) from error
    if settings.merge:
        _check_mergeable(model)
    config.base_model_name_or_path = str(Path(base).resolve() if Path(base).is_dir() else base)
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for parameter in weights.values():
        parameter.data = parameter.data.float()
    return weights


@contextmanager
def adapters_off(model: PreTrainedModel) -> Iterator[None]:
    """The model without its adapters, while the block lasts."""
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


@torch.no_grad()
def merged(base: str | Path, adapters: Mapping[str, Tensor], config: Any, dtypes: Mapping[str, torch.dtype]) -> Any:
    """`base`, loaded anew, on the CPU, with `adapters`, of peft's `config`, added to its weights in float32.

    Each parameter is rounded once, to its type in `dtypes`.
    """
    # peft writes the base's name into the configuration, and warns where another stood
    config = replace(config, base_model_name_or_path=None)
    with without_future_warnings():
        adapted = import_peft("train.lora").get_peft_model(load_model(base, dtype=torch.float32), config)
    parameters = dict(adapted.get_base_model().named_parameters())
    for name, adapter in adapters.items():
        parameters[name].copy_(adapter)
    whole = adapted.merge_and_unload()
    for name, parameter in whole.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    return whole


def quantization(settings: LoraSettings | None, device: torch.device) -> BitsAndBytesConfig | None:
    """How the frozen weights are held: NF4 with doubly quantized scales (QLoRA, arXiv 2305.14314), if at all."""
    if settings is None or settings.quantize is None:
        return None
    if device.type != "cuda":
        raise TrainError(
            f"train.lora.quantize is {settings.quantize!r}, which needs a GPU, and training is on the {device.type}; "
            "set it to null"
        )
    if find_spec("bitsandbytes") is None:
        raise TrainError(
            f"train.lora.quantize is {settings.quantize!r}, which needs bitsandbytes; pip install bitsandbytes, or set "
            "it to null"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _check_mergeable(model: PreTrainedModel) -> None:
    """Where input and output embeddings are one weight, what is added to it for one of them changes the other too."""
    layers: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    shared = {id(getattr(layer, "base_layer", layer).weight) for layer in layers}
    adapted = [name for name, module in model.named_modules() if module in layers and hasattr(module, "base_layer")]
    if len(shared) == 1 and adapted:
        raise TrainError(
            f"train.lora.targets: {adapted[0]} is one weight with the other end of the model (tied embeddings), so its "
            "adapter cannot be merged; leave it out, or set train.lora.merge to false"
        )


def _linear_names(model: PreTrainedModel) -> str:
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return ", ".join(sorted(names))
