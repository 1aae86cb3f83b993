"""Folders of weights: finding, checking, loading and saving them.

A folder is saved aside and renamed, so that an interrupted save leaves the last good one.
"""

import contextlib
import copy
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from .configuration import ChatGLMConfig
from .errors import ToolkitError
from .files import recover_folder, replace_folder
from .model import ChatGLMForConditionalGeneration
from .quantization.bnb import bitsandbytes_config, settle_nf4
from .quantization.linear import quantize_blocks
from .settings import LARGE_MODEL
from .tokenizer import VOCAB_FILE, ChatGLMTokenizer
from .tying import is_shared, share_head

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}
SMALL_MODEL = 100_000_000
"""Parameters below which saving shows no progress."""
UNREADABLE = (OSError, EOFError, SafetensorError, pickle.UnpicklingError, RuntimeError)
"""What a damaged file of weights raises."""
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "pytorch_model.bin")


def find_folder(name_or_path: str) -> str:
    """The local folder of a path or of a hub name, checked for completeness.

    A hub name (`THUDM/chatglm-6b`) comes from ModelScope if its package is installed, else from
    Hugging Face.

    Raises:
        ToolkitError: if files are missing, by name, or the hub can't be reached.
    """
    path = os.path.expanduser(name_or_path)
    recover_folder(path)
    if os.path.isdir(path):
        _check_files(path)
        return path
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") != 1:
        raise ToolkitError(
            f"{name_or_path}: no such folder. Give a folder with config.json, {VOCAB_FILE} and the"
            " weights, or a hub name such as THUDM/chatglm-6b"
        )
    folder = _download(name_or_path)
    _check_files(folder)
    return folder


def _download(name: str) -> str:
    try:
        from modelscope import snapshot_download
    except ImportError:
        from huggingface_hub import snapshot_download
    try:
        return snapshot_download(name)
    except Exception as error:  # hubs and HTTP libraries raise many kinds; the reason is passed on
        reason = " ".join(str(error).split())[:200]
        raise ToolkitError(
            f"{name}: neither a folder here nor reachable as a hub name ({reason}). Without a"
            f" network, place config.json, {VOCAB_FILE}, tokenizer_config.json and the"
            " pytorch_model*.bin or *.safetensors files into a folder and give its path"
        ) from None


def _check_files(folder: str) -> None:
    missing = [n for n in ("config.json", VOCAB_FILE) if not _exists(folder, n)]
    index = next((n for n in _INDEXES if _exists(folder, n)), None)
    if not any(_exists(folder, n) for n in _SINGLES):
        if index is None:
            missing.append("model.safetensors or pytorch_model.bin (or their shards and index)")
        else:
            shards = set(_read_index(os.path.join(folder, index)).values())
            missing += sorted(shard for shard in shards if not _exists(folder, shard))
    if missing:
        raise ToolkitError(f"{folder}: missing {', '.join(missing)}")


def _read_index(path: str) -> dict[str, str]:
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file)["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ToolkitError(f"{path}: not an index of shards ({error!r}); take it anew") from None


def _exists(folder: str, name: str) -> bool:
    return os.path.exists(os.path.join(folder, name))


def load_tokenizer(folder: str) -> ChatGLMTokenizer:
    """The tokenizer of a folder, whether or not it has a tokenizer_config.json."""
    if not _exists(folder, "tokenizer_config.json"):
        return ChatGLMTokenizer(os.path.join(folder, VOCAB_FILE))
    return ChatGLMTokenizer.from_pretrained(folder)


def load_config(path: str) -> ChatGLMConfig:
    """The checked shape in a config.json, or in a folder that has one.

    Raises:
        ToolkitError: if it can't be read, is another model's, or is impossible.
    """
    try:
        config = AutoConfig.from_pretrained(path)
        if isinstance(config, ChatGLMConfig):
            config.check()
    except ToolkitError:
        raise
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ToolkitError(f"{path}: not a readable config.json ({reason})") from None
    if not isinstance(config, ChatGLMConfig):
        raise ToolkitError(f"{path}: model_type is {config.model_type!r}, expected 'chatglm'")
    return config


def check_tokenizer(tokenizer: ChatGLMTokenizer, config: ChatGLMConfig, where: str) -> None:
    """Refuse a tokenizer that is not this model's.

    Raises:
        ToolkitError: naming every id that differs, or a vocabulary too large for the embedding.
    """
    pairs = {
        "<sop>": (tokenizer.bos_token_id, config.bos_token_id),
        "<eop>": (tokenizer.eos_token_id, config.eos_token_id),
        "[gMASK]": (tokenizer.gmask_token_id, config.gmask_token_id),
        "[MASK]": (tokenizer.mask_token_id, config.mask_token_id),
        "<pad>": (tokenizer.pad_token_id, config.pad_token_id),
    }
    wrong = [f"{t} is {has} but config.json says {needs}"
             for t, (has, needs) in pairs.items() if has != needs]  # fmt: skip
    if tokenizer.vocab_size > config.vocab_size:
        wrong.append(f"{tokenizer.vocab_size} pieces for {config.vocab_size} embedding rows")
    if wrong:
        raise ToolkitError(f"{where}: {VOCAB_FILE} is not this model's: {'; '.join(wrong)}")


def load_pretrained(
    name_or_path: str,
    *,
    precision: str = "auto",
    device: str = "auto",
    quantization_bit: int = 0,
    bitsandbytes_bits: int = 0,
) -> tuple[ChatGLMForConditionalGeneration, ChatGLMTokenizer]:
    """Model (in eval mode, on its device) and tokenizer of a folder or hub name, checked.

    precision: "32", "bf16", "16", or "auto": as stored on a GPU; on a CPU fp32, over large packed
    weights bf16. The bits: as in `load_model`.

    Raises:
        ToolkitError: if anything is missing or does not fit, with names.
    """
    folder = find_folder(name_or_path)
    config = load_config(folder)
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, config, folder)
    target = choose_device(device)
    packed = bool(config.quantization_bit or quantization_bit)
    model = load_model(
        folder,
        config,
        dtype=_usual_dtype(target, config, packed) if precision == "auto" else DTYPES[precision],
        device=target,
        quantization_bit=quantization_bit,
        bitsandbytes_bits=bitsandbytes_bits,
    )
    return model.eval(), tokenizer


def _usual_dtype(device: torch.device, config: ChatGLMConfig, packed: bool) -> torch.dtype | None:
    """None: as stored, on a GPU.

    On a CPU bf16 halves the head, which in fp32 would be most of what is read for a token of int4,
    and the time of a prompt; where a CPU has no products of it, and in small models, fp32 is best.
    """
    if device.type != "cpu":
        return None
    large = 12 * config.num_layers * config.hidden_size**2 > LARGE_MODEL
    multiplies = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if packed and large and multiplies else torch.float32


def load_model(
    folder: str,
    config: ChatGLMConfig,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    quantization_bit: int = 0,
    bitsandbytes_bits: int = 0,
    one_head: bool = True,
) -> ChatGLMForConditionalGeneration:
    """The weights of a checked folder on a device, in `dtype` (None: as stored).

    quantization_bit 8 or 4: pack fp16 weights the released way. bitsandbytes_bits 8 or 4: hold
    them in bitsandbytes' int8 or nf4. Both pack what is stored, whatever `dtype`, so that training
    and chat have the same weights. one_head: the embedding is the head too where both are equal.

    Raises:
        ToolkitError: if a file is damaged, tensors do not fit, or packed weights would be packed.
    """
    wanted = quantization_bit or bitsandbytes_bits
    if config.quantization_bit and wanted and config.quantization_bit != quantization_bit:
        raise ToolkitError(
            f"{folder}: its weights are int{config.quantization_bit} already; to hold them"
            " otherwise, name the fp16 weights"
        )
    pack = quantization_bit if not config.quantization_bit else 0
    as_stored = dtype is None or pack or bitsandbytes_bits
    options: dict[str, Any] = {}
    if bitsandbytes_bits:
        compute: Any = config.dtype if dtype is None else dtype
        options["quantization_config"] = bitsandbytes_config(
            bitsandbytes_bits, compute_dtype=compute or torch.float16
        )
    if device.type != "cpu" and not pack:  # packed one by one, a card need not hold both
        options["device_map"] = {"": device}
    model = _read_model(folder, config, dtype="auto" if as_stored else dtype, **options)
    if one_head:
        share_head(model)
    if pack:  # what is stored is mapped, and each linear read once
        quantize_blocks(model.transformer.layers, pack, device)
        model.config.quantization_bit = pack
        model.to(device)
    settle_nf4(model, dtype)
    if as_stored and dtype is not None:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    return model


def _read_model(folder: str, config: ChatGLMConfig, **options: Any) -> Any:
    try:
        return ChatGLMForConditionalGeneration.from_pretrained(folder, config=config, **options)
    except torch.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        files = ", ".join(os.path.basename(path) for path in weight_files(folder))
        raise ToolkitError(
            f"{folder}: the weights can't be read from {files} ({reason}); take them anew"
        ) from None


def weight_files(folder: str) -> list[str]:
    """Paths of the files that hold a folder's tensors: all shards, or the one file, or none."""
    for name in _SINGLES:
        if _exists(folder, name):
            return [os.path.join(folder, name)]
    for name in _INDEXES:
        if _exists(folder, name):
            shards = set(_read_index(os.path.join(folder, name)).values())
            return [os.path.join(folder, shard) for shard in sorted(shards)]
    return []


def choose_device(device: str) -> torch.device:
    """The device named, or for "auto" the GPU if there is one.

    Raises:
        ToolkitError: if it is not on this machine.
    """
    if device == "auto":
        found = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        return torch.device("cpu") if found is None else torch.device(found.type, 0)
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ToolkitError(f"device {device!r} is not usable here ({reason})") from None


def describe(model: PreTrainedModel, where: str) -> str:
    """One line: what was loaded, from where, in which precision, on which device."""
    count = sum(parameter.numel() for parameter in model.parameters())
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    count += sum(m.in_features * m.out_features - m.weight.numel() for m in linears)  # 2 a byte
    bits = model.config.quantization_bit
    held = {
        bool(bits): f"int{bits} weights, ",
        getattr(model, "is_loaded_in_8bit", False): "bitsandbytes int8 weights, ",
        getattr(model, "is_loaded_in_4bit", False): "nf4 weights, ",
    }.get(True, "")
    head = "head and embedding are one, " if is_shared(model) else ""
    return (
        f"loaded {where}: {model.config.num_layers} layers, {count / 1e6:,.1f} M parameters,"
        f" {held}{head}{str(model.dtype)[6:]}, on {model.device}"
    )


def save_folder(
    model: PreTrainedModel,
    state: dict[str, torch.Tensor],
    tokenizer: ChatGLMTokenizer,
    settings_json: str,
    folder: str,
    *,
    dtype: torch.dtype,
) -> None:
    """Weights as safetensors in `dtype`, config, tokenizer, settings.json; whole or not at all.

    state: the model's state dict.
    """
    aside = f"{os.path.normpath(folder)}.part"
    shutil.rmtree(aside, ignore_errors=True)
    state = {
        name: tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in state.items()
    }
    with _no_bar() if model.num_parameters() < SMALL_MODEL else contextlib.nullcontext():
        model.save_pretrained(aside, state_dict=state)
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    with open(os.path.join(aside, "settings.json"), "w", encoding="utf-8") as file:
        file.write(settings_json)
    replace_folder(aside, folder)


@contextlib.contextmanager
def _no_bar() -> Iterator[None]:
    """transformers' bar for files written in a blink would break the training's own."""
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.enable_progress_bar()
