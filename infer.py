"""Chat with pretrained weights.

python infer.py --model_name_or_path /path/to/chatglm-6b
python infer.py --model_name_or_path /path/to/chatglm-6b --query 你好
"""

import dataclasses
from collections.abc import Sequence

from chatglm.command_line import run_script
from chatglm.settings import ChatSettings
from chatglm.terminal import converse
from chatglm.weights import choose_device
from data_utils import DataHelper, read_settings
from models import build_model, load_for_inference, resolve_settings

GIBBERISH_TOKENS = 40


def main(argv: Sequence[str] | None = None) -> None:
    """Load what model_name_or_path names and talk."""
    settings, (chat,) = read_settings(
        argv, ChatSettings, description="Chat with pretrained weights."
    )
    train = settings.train
    if train.from_scratch:
        print(
            "model_name_or_path is empty: a tiny ChatGLM with random weights answers, in gibberish"
            f" of {GIBBERISH_TOKENS} tokens unless max_new_tokens is set."
            " Train it with: python train.py; then talk to it with: python infer_finetuning.py"
        )
        if chat.max_new_tokens is None:
            chat = dataclasses.replace(chat, max_new_tokens=GIBBERISH_TOKENS)
        helper = DataHelper(settings)
        settings = resolve_settings(settings, helper.config)
        model = build_model(settings, helper.config, total_steps=1)
        model = model.eval().to(choose_device(chat.device))
        tokenizer = helper.tokenizer
    else:
        model, tokenizer = load_for_inference(
            train.model_name_or_path, precision=chat.inference_precision, device=chat.device
        )
    converse(model, tokenizer, chat)


if __name__ == "__main__":
    run_script(main)
