"""Chat with weights that train.py saved.

python infer_finetuning.py                      # ./best_ckpt/last
python infer_finetuning.py --checkpoint ./best_ckpt/best --query 从南京到上海的路线
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from chatglm.command_line import parse_settings, run_script
from chatglm.errors import ToolkitError
from chatglm.settings import ChatSettings
from chatglm.terminal import converse
from models import load_for_inference


@dataclass(frozen=True)
class CheckpointSettings:
    """Which trained weights to talk to."""

    checkpoint: str = "./best_ckpt/last"
    """Folder that train.py saved: last, or best (the epoch of the lowest dev loss)."""


def main(argv: Sequence[str] | None = None) -> None:
    """Load the checkpoint and talk."""
    groups = [(CheckpointSettings, {}, "CheckpointSettings"), (ChatSettings, {}, "ChatSettings")]
    where, chat = parse_settings(groups, argv, description="Chat with fine-tuned weights.")
    if not os.path.isdir(where.checkpoint):
        raise ToolkitError(f"{where.checkpoint}: no such folder; train first: python train.py")
    model, tokenizer = load_for_inference(
        where.checkpoint, precision=chat.inference_precision, device=chat.device
    )
    converse(model, tokenizer, chat)


if __name__ == "__main__":
    run_script(main)
