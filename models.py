"""The model's classes, and building a model from the settings."""

import torch

from chatglm.configuration import ChatGLMConfig
from chatglm.errors import ToolkitError
from chatglm.model import ChatGLMForConditionalGeneration
from chatglm.settings import TrainSettings
from chatglm.tokenizer import ChatGLMTokenizer, train_tokenizer
from chatglm.weights import (
    check_tokenizer,
    describe,
    find_folder,
    load_config,
    load_pretrained,
    load_tokenizer,
)

__all__ = [
    "ChatGLMConfig",
    "ChatGLMForConditionalGeneration",
    "ChatGLMTokenizer",
    "build_model",
    "build_tokenizer",
    "load_for_inference",
]


def build_tokenizer(
    settings: TrainSettings, texts: list[str]
) -> tuple[ChatGLMTokenizer, ChatGLMConfig]:
    """Tokenizer and shape: those of the weights, or the embedded ones trained on `texts`."""
    if settings.from_scratch:
        config = load_config(settings.config_name)
        folder = f"{settings.output_dir}/tiny_tokenizer"
        tokenizer = train_tokenizer(texts, folder, vocab_size=config.vocab_size)
        where = settings.config_name
    else:
        where = find_folder(settings.model_name_or_path)
        config, tokenizer = load_config(where), load_tokenizer(where)
    check_tokenizer(tokenizer, config, where)
    if settings.max_seq_length > config.max_sequence_length:
        raise ToolkitError(
            f"max_seq_length {settings.max_seq_length}: this model reads at most"
            f" max_sequence_length {config.max_sequence_length}"
        )
    return tokenizer, config


def build_model(settings: TrainSettings, config: ChatGLMConfig) -> ChatGLMForConditionalGeneration:
    """The model to train: the named weights in fp32, or new ones drawn from the seed."""
    if settings.from_scratch:
        torch.manual_seed(settings.seed)
        model = ChatGLMForConditionalGeneration(config)
        print(describe(model, f"{settings.config_name} (new weights)"))
        return model
    if config.quantization_bit:
        raise ToolkitError(
            f"{settings.model_name_or_path}: int{config.quantization_bit} weights can't be trained"
            " in full; name the fp16 weights"
        )
    folder = find_folder(settings.model_name_or_path)
    model = ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    print(describe(model, folder))
    return model


def load_for_inference(
    folder: str, *, precision: str, device: str
) -> tuple[ChatGLMForConditionalGeneration, ChatGLMTokenizer]:
    """Model and tokenizer of a folder or hub name, ready to chat; says what was loaded."""
    model, tokenizer = load_pretrained(folder, precision=precision, device=device)
    print(describe(model, folder))
    return model, tokenizer
