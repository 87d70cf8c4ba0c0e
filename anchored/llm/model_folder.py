"""Models and tokenizers from a Hugging Face folder or the Hub, checked before they are used, and their content's hash.

In: a folder's path or a Hub id; a folder may hold an adapter of peft, which names its base model. Out: transformers
objects. A folder is read without a look at the network; of the Hub only what is needed comes, once, into its usual
cache. Weights load from safetensors alone and no code from the folder runs. Whatever is missing or broken is a
ModelError that says so. Generation and rendering are not here.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchored.errors import ModelError
from anchored.records import content_hash
from anchored.runs import one_line

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

_TOKENIZER_DATA = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
_ADAPTER, _BASE = "adapter_config.json", "base_model_name_or_path"
_TEXTS = ("added_tokens.json", "merges.txt", "chat_template.jinja", *_TOKENIZER_DATA)
_HISTORY = {"transformers_version", "_name_or_path"}
_SEGMENT = 1 << 26  # bytes hashed at a time, so that threads share the shards of a big model


def load_model(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    quantization: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """The causal language model in `source`, in eval mode; dtype `auto` is the one that its weights are stored in.

    An adapter comes on its base model, in float32. On the device `meta` it is the model's shape alone, without weights.
    """
    from transformers import AutoModelForCausalLM

    folder = model_folder(source)
    if is_adapter(folder):
        base = load_model(base_folder(folder), dtype=dtype, device=device, attn_implementation=attn_implementation)
        return _with_adapter(base, folder)
    if str(device) == "meta":
        return _shape(folder, dtype)
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=attn_implementation,
                quantization_config=quantization,
                device_map=None if quantization is None else {"": device},
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # transformers, safetensors and a broken config raise many kinds
        way_out = _way_out(
            error, "it must be a causal language model that this version of transformers knows, without code of its own"
        )
        raise ModelError(f"{source}: the model cannot be loaded: {one_line(error)}; {way_out}") from error
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"{source}: {len(missing)} weights are not in the safetensors files ({missing[0]}, ...); the folder is "
            "incomplete, or its config.json belongs to another model"
        )
    # quantized weights are where they belong, and cannot be moved
    return (model if quantization else model.to(device)).eval()


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `source`, with its chat template."""
    from transformers import AutoTokenizer

    folder = model_folder(source)
    if not any((folder / name).is_file() for name in _TOKENIZER_DATA):
        raise ModelError(f"{source}: no tokenizer ({', '.join(_TOKENIZER_DATA[:2])}, ...); copy the base model's there")
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(
            f"{source}: the tokenizer cannot be loaded: {one_line(error)}; copy the base model's"
        ) from error
    if not tokenizer.chat_template:
        raise ModelError(
            f"{source}: the tokenizer has no chat template; put a chat_template.jinja into the folder, or choose the "
            "model's -Instruct variant"
        )
    return tokenizer


def end_of_turn_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end an answer: the generation config's, the tokenizer's EOS, and what the template writes."""
    return _ends(model.generation_config.eos_token_id if model.generation_config else None, tokenizer)


def end_of_turn_ids_in(source: str | Path) -> tuple[int, ...]:
    """The same, of a folder whose model is not loaded."""
    folder = model_folder(source)
    files = [file for name in ("generation_config.json", "config.json") if (file := folder / name).is_file()]
    configured = (_settings(file).get("eos_token_id") for file in files)
    return _ends(next((ids for ids in configured if ids is not None), None), load_tokenizer(folder))


def fingerprint(source: str | Path) -> str:
    """A hash (64 hex digits) of all that shapes replies: weights, settings, tokenizer; not where the folder lies.

    Of an adapter: its own content and its base model's hash.
    """
    folder = model_folder(source)
    settings = {name: _settings(folder / name) for name in _SETTINGS if (folder / name).is_file()}
    files = [*(folder / name for name in _TEXTS if (folder / name).is_file()), *_weight_files(folder)]
    digests = {file.name: _digest(file.resolve(), file.stat().st_size, file.stat().st_mtime_ns) for file in files}
    if is_adapter(folder):
        adapter = {name: value for name, value in _settings(folder / _ADAPTER).items() if name != _BASE}
        return content_hash([fingerprint(base_folder(folder)), adapter, settings, digests])
    return content_hash([settings, digests])


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter instead of a whole model."""
    return (folder / _ADAPTER).is_file() and not (folder / "config.json").is_file()


def base_folder(folder: Path) -> Path:
    """The folder of the model that an adapter belongs to; a whole model's is its own."""
    if not is_adapter(folder):
        return folder
    base = _settings(folder / _ADAPTER).get(_BASE)
    if not base:
        raise ModelError(f"{folder / _ADAPTER}: {_BASE} is missing; name the model that the adapter was trained on")
    try:
        return model_folder(base)
    except ModelError as error:
        raise ModelError(f"{folder / _ADAPTER}: {_BASE}: {error}") from error


def import_peft(what: str) -> Any:
    """peft, which `what` needs."""
    try:
        import peft
    except ImportError as error:
        raise ModelError(f"{what} needs peft; pip install 'anchored[lora]'") from error
    return peft


@contextmanager
def without_future_warnings() -> Iterator[None]:
    """Silence while peft is called: it uses names that transformers is about to drop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def model_folder(source: str | Path) -> Path:
    """The folder of `source`, downloaded if it is a Hub id; checked to hold a config and safetensors weights."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise ModelError(f"{source}: a file, where a model's folder is expected; name the folder it lies in")
        if not _may_be_hub_id(source):
            raise ModelError(f"{source}: no such folder{_nearest(folder)}; correct the path")
        folder = _download(str(source))
    if not (folder / "config.json").is_file() and not is_adapter(folder):
        raise ModelError(
            f"{source}: no config.json, so this is not a Hugging Face model folder{_nearest_inside(folder)}"
        )
    if not _weight_files(folder):
        pickled = sorted(file.name for ending in ("*.bin", "*.pt", "*.pth") for file in folder.glob(ending))
        if pickled:
            raise ModelError(
                f"{source}: weights only as pickle ({pickled[0]}), which can run code and is never loaded; save them "
                "as safetensors (model.save_pretrained with a recent transformers)"
            )
        raise ModelError(f"{source}: no weights (model.safetensors); copy them there, or save the model again")
    return folder


def weight_shapes(source: str | Path) -> list[tuple[int, ...]]:
    """The shapes of all weights in the files of `source`, which are not loaded for it."""
    from safetensors import safe_open

    shapes = []
    for file in _weight_files(model_folder(source)):
        with safe_open(file, "pt") as weights:
            shapes += [tuple(weights.get_slice(name).get_shape()) for name in weights.keys()]  # noqa: SIM118
    return shapes


def _shape(folder: Path, dtype: str | torch.dtype) -> PreTrainedModel:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        kind = (config.dtype or torch.float32) if dtype == "auto" else dtype
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=kind).eval()
    except Exception as error:  # transformers and a broken config raise many kinds
        raise ModelError(f"{folder}: config.json describes no known model: {one_line(error)}") from error


def _with_adapter(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    peft = import_peft(f"{folder}: an adapter")
    try:
        with without_future_warnings():
            adapted = peft.PeftModel.from_pretrained(base, folder, torch_device=str(base.device))
    except Exception as error:  # peft's, safetensors' and torch's own kinds
        way_out = _way_out(error, f"it must belong to {base.name_or_path}")
        raise ModelError(f"{folder}: the adapter cannot be loaded: {one_line(error)}; {way_out}") from error
    if adapted.active_peft_config.is_prompt_learning:
        raise ModelError(f"{folder}: the adapter adds to the prompt; only such as change layers can be used here")
    return adapted.get_base_model().eval()


def _way_out(error: Exception, otherwise: str) -> str:
    from safetensors import SafetensorError

    if isinstance(error, SafetensorError):
        return "a file of weights is damaged or cut short; copy, download or make it again"
    return otherwise


def _may_be_hub_id(source: str | Path) -> bool:
    return isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source) is not None


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.safetensors.index.json", _ADAPTER, *_SETTINGS, *_TEXTS]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]))
    except Exception as error:  # the Hub's own errors, httpx's, the disk's
        raise ModelError(
            f"{hub_id}: no such folder{_nearest(Path(hub_id))}, and not to be had from the Hub: {_hub_problem(error)}"
        ) from error


def _hub_problem(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "it is gated; ask for access on its page, then `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return "no such model there, or a private one; correct the name, or `hf auth login`"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "it was never downloaded here and the Hub cannot be reached; correct the path or mend the network"
    return f"{one_line(error)[:200]}; try again, or download it and name the folder"


def _nearest(folder: Path) -> str:
    """A hint for a mistyped path: the folder beside it whose name is the closest."""
    parent = folder.absolute().parent
    siblings = [path.name for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, siblings, n=1)
    return f" (did you mean {folder.with_name(near[0])}?)" if near else ""


def _nearest_inside(folder: Path) -> str:
    inside = sorted(path.parent for path in folder.glob("*/config.json"))
    return f" (did you mean {inside[-1]}?)" if inside else ""


def _weight_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.safetensors") if file.is_file())


def _settings(file: Path) -> Any:
    """A settings file's values, without the note of what wrote it."""
    try:
        values = json.loads(file.read_bytes())
    except ValueError as error:
        raise ModelError(f"{file}: not JSON ({one_line(error)}); copy the file from the base model again") from error
    return {key: value for key, value in values.items() if key not in _HISTORY} if isinstance(values, dict) else values


@lru_cache(maxsize=4096)
def _digest(file: Path, size: int, mtime_ns: int) -> str:
    """The hash of a file's content, in segments; size and time are there for the cache to see a change."""
    with file.open("rb") as handle, ThreadPoolExecutor() as pool:
        read = handle.fileno()
        parts = pool.map(
            lambda start: hashlib.sha256(os.pread(read, _SEGMENT, start)).hexdigest(), range(0, size, _SEGMENT)
        )
        return content_hash([size, *parts])


def _ends(configured: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    ids = [*(configured if isinstance(configured, list) else [configured])]
    ids += [tokenizer.eos_token_id, _template_end(tokenizer)]
    known = tuple(sorted({id for id in ids if id is not None}))
    if not known:
        raise ModelError(
            f"{tokenizer.name_or_path}: nothing says which token ends an answer; set eos_token_id in "
            "generation_config.json"
        )
    return known


def _template_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The added token that the template puts after an answer's text, if any."""
    text = "ANSWER"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
    try:
        rendered = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception as error:  # whatever a template's author raises, or jinja
        raise ModelError(
            f"{tokenizer.name_or_path}: the chat template fails on a question and its answer: {one_line(error)}; mend "
            "it or take the base model's"
        ) from error
    after = rendered.rpartition(text)[2].strip()
    ends = (id for id, token in tokenizer.added_tokens_decoder.items() if after.startswith(str(token)))
    return max(ends, key=lambda id: len(str(tokenizer.added_tokens_decoder[id])), default=None)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars: the command shows its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
