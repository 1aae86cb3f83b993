"""Chat with pretrained weights.

python infer.py --model_name_or_path /path/to/chatglm-6b
python infer.py --model_name_or_path /path/to/chatglm-6b --query 你好
python infer.py --model_name_or_path /path/to/chatglm-6b --quantization_bit 4
"""

import dataclasses
from collections.abc import Sequence

from chatglm.command_line import run_script
from chatglm.errors import ToolkitError
from chatglm.run_settings import Settings
from chatglm.settings import ChatSettings
from chatglm.terminal import converse
from chatglm.weights import choose_device
from data_utils import DataHelper, read_settings
from models import build_model, load_for_inference, resolve_settings

GIBBERISH_TOKENS = 40


def main(argv: Sequence[str] | None = None) -> None:
    """Load what model_name_or_path names and talk."""
    settings, (chat,) = read_settings(
        argv, ChatSettings, description="Chat with pretrained weights.", trains=False
    )
    if settings.train.from_scratch:
        model, tokenizer, chat = build_tiny(settings, chat)
    else:
        model, tokenizer = load_for_inference(
            settings.train.model_name_or_path,
            precision=chat.inference_precision,
            device=chat.device,
            quantization_bit=settings.model.quantization_bit or 0,
            bitsandbytes_bits=settings.model.bitsandbytes_bits,
        )
    # Here model.quantize(4) would pack what was loaded, and model.save_pretrained(folder) keep it.
    converse(model, tokenizer, chat)


def build_tiny(settings: Settings, chat: ChatSettings):
    """The embedded model with random weights, its tokenizer, and a chat of a few tokens."""
    print(
        "model_name_or_path is empty: a tiny ChatGLM with random weights answers, in gibberish"
        f" of {GIBBERISH_TOKENS} tokens unless max_new_tokens is set."
        " Train it with: python train.py; then talk to it with: python infer_finetuning.py"
    )
    if settings.model.bitsandbytes_bits:
        raise ToolkitError(f"{settings.quantization}: name stored weights in model_name_or_path")
    if chat.max_new_tokens is None:
        chat = dataclasses.replace(chat, max_new_tokens=GIBBERISH_TOKENS)
    helper = DataHelper(settings)
    settings = resolve_settings(settings, helper.config)
    model = build_model(settings, helper.config, total_steps=1)
    model = model.eval().to(choose_device(chat.device))
    bits = settings.model.quantization_bit
    return model.quantize(bits) if bits else model, helper.tokenizer, chat


if __name__ == "__main__":
    run_script(main)
