"""A model out of settings: shape, weights, method; and any saved folder to chat with."""

import copy
import dataclasses
import os
from typing import Any, Literal

import torch
from torch import nn

from .configuration import ChatGLMConfig
from .errors import ToolkitError
from .files import read_json, recover_folder
from .model import ChatGLMForConditionalGeneration
from .run_settings import Settings
from .saved import kind_of, load_prefix, read_settings_json
from .settings import EMBEDDED_CONFIG, LARGE_MODEL
from .tokenizer import ChatGLMTokenizer, train_tokenizer
from .weights import (
    DTYPES,
    check_tokenizer,
    describe,
    find_folder,
    load_config,
    load_model,
    load_pretrained,
    load_tokenizer,
)


def build_tokenizer(settings: Settings, texts: list[str]) -> tuple[ChatGLMTokenizer, ChatGLMConfig]:
    """Tokenizer and shape: those of the weights, or the embedded ones trained on `texts`."""
    train = settings.train
    if train.from_scratch:
        where = EMBEDDED_CONFIG if train.config_name is None else train.config_name
        config = load_config(where)
        folder = f"{train.output_dir}/tiny_tokenizer"
        tokenizer = train_tokenizer(texts, folder, vocab_size=config.vocab_size)
    else:
        where = find_folder(train.model_name_or_path)
        config, tokenizer = load_config(where), load_tokenizer(where)
    check_tokenizer(tokenizer, config, where)
    if train.max_seq_length > config.max_sequence_length:
        raise ToolkitError(
            f"max_seq_length {train.max_seq_length}: this model reads at most"
            f" max_sequence_length {config.max_sequence_length}"
        )
    return tokenizer, config


def build_model(settings: Settings, config: ChatGLMConfig, *, total_steps: int) -> nn.Module:
    """The model to train, with `settings.method` applied.

    Frozen weights are held in the precision of the arithmetic, trained ones in trained_precision.
    New weights are drawn from the seed.

    Raises:
        ToolkitError: if the weights can't be trained that way.
    """
    from .tuning.apply import apply_method  # with PEFT, which a chat need not wait for

    torch.manual_seed(settings.train.seed)
    model = _load_to_train(settings, config)
    model.train()
    model.recompute(_recomputed(settings, config))
    model.use_fused_kernels(settings.train.fused_kernels)
    return apply_method(model, settings, total_steps=total_steps)


def _load_to_train(settings: Settings, config: ChatGLMConfig) -> ChatGLMForConditionalGeneration:
    train, own = settings.train, _tied_as_set(settings, config)
    if train.from_scratch:
        model = ChatGLMForConditionalGeneration(own)
        where = EMBEDDED_CONFIG if train.config_name is None else train.config_name
        print(describe(model, f"{where} (new weights)"))
        return model
    folder = find_folder(train.model_name_or_path)
    _refuse_untrainable(settings, config, folder)
    gpu = torch.cuda.is_available() and not train.enable_deepspeed  # which places it itself
    whole = settings.method == "full" and not train.enable_deepspeed
    model = load_model(
        folder,
        own,
        dtype=torch.float32 if whole else DTYPES[train.precision],
        device=torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if gpu else "cpu"),
        quantization_bit=settings.model.quantization_bit or 0,
        bitsandbytes_bits=settings.model.bitsandbytes_bits,
        one_head=settings.method not in ("full", "freeze"),  # which train the head
    )
    print(describe(model, folder))
    return model


def _tied_as_set(settings: Settings, config: ChatGLMConfig) -> ChatGLMConfig:
    """The config with tie_word_embeddings as the settings have it, if they do.

    Raises:
        ToolkitError: if the head would train and the embedding, one with it, not.
    """
    own: Any = copy.deepcopy(config)
    if settings.model.tie_word_embeddings is not None:
        own.tie_word_embeddings = settings.model.tie_word_embeddings
    if own.tie_word_embeddings and settings.method == "freeze":
        raise ToolkitError(
            "config.json has tie_word_embeddings, but global_num_layers_freeze trains the head"
            " without the embedding: set tie_word_embeddings false, and they train apart"
        )
    return own


def _refuse_untrainable(settings: Settings, config: ChatGLMConfig, folder: str) -> None:
    packed = f"int{config.quantization_bit}" if config.quantization_bit else ""
    if packed and settings.method in ("full", "freeze"):
        raise ToolkitError(
            f"{folder}: {packed} weights can't be trained themselves; name the fp16 weights, or"
            " train LoRA, AdaLoRA or p-tuning on them"
        )
    if packed and settings.method == "lora" and settings.lora.use_dora:
        raise ToolkitError(
            f"{folder}: lora_info_args.use_dora needs unquantised weights, these are {packed}"
        )
    bias = {"lora": settings.lora.bias, "adalora": settings.adalora.bias}.get(settings.method)
    if settings.model.bitsandbytes_bits and bias not in (None, "none"):
        raise ToolkitError(
            f"{settings.method}_info_args.bias {bias} with {settings.quantization}: bitsandbytes"
            " rounds biases to the precision of the arithmetic; leave bias at none, or use"
            " quantization_bit"
        )


def resolve_settings(settings: Settings, config: ChatGLMConfig) -> Settings:
    """The settings with "auto" and null filled in where they depend on the weights.

    Raises:
        ToolkitError: if settings and config.json contradict each other.
    """
    train = settings.train
    named = getattr(config, "precision", None)
    if not train.from_scratch and train.config_name is not None:
        named = _check_config_file(train.config_name, config, named)
    if named not in (None, 16, 32):
        raise ToolkitError(f"config.json: precision {named!r}; allowed are 16 and 32")
    if named is not None and train.precision not in ("auto", str(named)):
        raise ToolkitError(
            f"precision {train.precision} contradicts config.json's precision {named}: change one"
        )
    precision: Any = train.precision if named is None else str(named)
    if precision == "16" and not torch.cuda.is_available():
        raise ToolkitError("precision 16 needs a GPU; on a CPU use 32 or bf16")
    if precision == "auto":
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        precision = "bf16" if has_bf16 else "32"
    if train.trained_precision == "bf16" and precision != "bf16":
        raise ToolkitError(
            f"trained_precision bf16 with precision {precision}: set precision bf16 as well, or"
            " leave trained_precision at 32"
        )
    changed = dataclasses.replace(
        train, precision=precision, gradient_checkpointing=_recomputed(settings, config)
    )
    return dataclasses.replace(settings, train=changed)


def _recomputed(settings: Settings, config: ChatGLMConfig) -> Literal["none", "selective", "full"]:
    chosen = settings.train.gradient_checkpointing
    if isinstance(chosen, str):
        return chosen
    if chosen is not None:
        return "full" if chosen else "none"
    width = config.hidden_size * (4 * config.hidden_size + 2 * config.inner_hidden_size)
    if config.num_layers * width <= LARGE_MODEL:
        return "none"
    return "full" if settings.quantization or config.quantization_bit else "selective"


def _check_config_file(path: str, config: ChatGLMConfig, named: Any) -> Any:
    """The precision that stands in config_name's file; its shape must be the weights'."""
    content = read_json(path)
    for name, value in content.items():
        if name in ("precision", "pre_seq_len", "prefix_projection", "quantization_bit"):
            continue
        if hasattr(config, name) and getattr(config, name) != value and name in config.SHAPE:
            raise ToolkitError(
                f"{path}: {name} {value!r}, but the weights have {getattr(config, name)!r}"
            )
    return content.get("precision", named)


def load_for_inference(
    folder: str,
    *,
    precision: str = "auto",
    device: str = "auto",
    base: str = "",
    adapters: dict[str, str] | None = None,
    quantization_bit: int = 0,
    bitsandbytes_bits: int = 0,
) -> tuple[Any, ChatGLMTokenizer]:
    """Model and tokenizer, ready to chat, of whatever the folder holds; says what was loaded.

    folder: weights, a hub name, a prefix encoder or a LoRA or AdaLoRA adapter; the last two are put
    on `base`, or on the weights that they were trained on. adapters: more of them by name, beside
    the folder's, which is "default". The bits: as in `load_model`; 0 and 0: as stored, or as the
    training held the weights.

    Raises:
        ToolkitError: if anything is missing or does not fit.
    """
    if "default" in (adapters or {}):
        raise ToolkitError(f"adapters: 'default' is {folder}: give the other another name")
    for path in (folder, *(adapters or {}).values()):
        recover_folder(path)
    kind = kind_of(folder) if os.path.isdir(folder) else "weights"
    if kind == "weights":
        model, tokenizer = load_pretrained(
            folder,
            precision=precision,
            device=device,
            quantization_bit=quantization_bit,
            bitsandbytes_bits=bitsandbytes_bits,
        )
        print(describe(model, folder))
        return model, tokenizer
    run = read_settings_json(folder)
    under = base or run.get("model_name_or_path") or ""
    if not under and kind == "adapter":
        from .tuning.adapters import read_adapter_config

        under = read_adapter_config(folder).get("base_model_name_or_path") or ""
    if not under:
        raise ToolkitError(
            f"{folder} holds {'an adapter' if kind == 'adapter' else 'a prefix encoder'} alone and"
            " does not say on which weights: give --model_name_or_path"
        )
    held = _held_in_training(folder, run, asked=(quantization_bit, bitsandbytes_bits))
    try:
        model, tokenizer = load_pretrained(
            under,
            precision=precision,
            device=device,
            quantization_bit=held[0],
            bitsandbytes_bits=held[1],
        )
    except ToolkitError as error:
        raise ToolkitError(
            f"{folder} stands on {under} (--model_name_or_path names other weights): {error}"
        ) from None
    print(describe(model, under))
    if kind == "prefix":
        load_prefix(model, folder)
        print(f"loaded {folder}: {model.config.pre_seq_len} virtual tokens")
        return model, tokenizer
    from .tuning.adapters import describe_adapters, load_adapters

    tuned = load_adapters(model, {"default": folder, **(adapters or {})})
    print(describe_adapters(tuned))
    return tuned, tokenizer


def _held_in_training(
    folder: str, run: dict[str, Any], *, asked: tuple[int, int]
) -> tuple[int, int]:
    """Bits of quantization_bit and of bitsandbytes for the weights under a trained folder.

    What was trained on quantised weights has learned to make up for their rounding.

    Raises:
        ToolkitError: if other bits are asked for than it was trained on.
    """
    trained = (
        run.get("quantization_bit") or 0,
        8 if run.get("load_in_8bit") else 4 if run.get("load_in_4bit") else 0,
    )
    if not any(asked):
        return trained
    if any(trained) and asked != trained:
        raise ToolkitError(
            f"{_named(asked)}: {folder} was trained on weights with {_named(trained)}; leave it"
            " out, and they are held so again"
        )
    if not any(trained):
        print(f"{folder} was trained without {_named(asked)}: its answers may differ a little")
    return asked


def _named(held: tuple[int, int]) -> str:
    """The setting that holds weights so."""
    return f"quantization_bit {held[0]}" if held[0] else f"load_in_{held[1]}bit"
