"""Chat with what train.py saved: full weights, or a prefix encoder on the weights under it.

python infer_finetuning.py                      # ./best_ckpt/last
python infer_finetuning.py --checkpoint ./best_ckpt/best --query 从南京到上海的路线
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from chatglm.command_line import parse_settings, run_script
from chatglm.errors import ToolkitError
from chatglm.saved import kind_of
from chatglm.settings import ChatSettings
from chatglm.terminal import converse
from models import load_for_inference


@dataclass(frozen=True)
class CheckpointSettings:
    """Which trained weights to talk to."""

    checkpoint: str = "./best_ckpt/last"
    """Folder that train.py saved: last, or best (of the lowest dev loss)."""
    model_name_or_path: str = ""
    """The weights under a prefix encoder; empty: those it was trained on."""
    quantization_bit: Literal[0, 4, 8] = 0
    """Quantise fp16 weights the released way while loading; 0: as stored, or as in the training."""


def main(argv: Sequence[str] | None = None) -> None:
    """Load the checkpoint and talk."""
    groups = [(CheckpointSettings, {}, "CheckpointSettings"), (ChatSettings, {}, "ChatSettings")]
    where, chat = parse_settings(groups, argv, description="Chat with fine-tuned weights.")
    if kind_of(where.checkpoint) == "adapter":
        raise ToolkitError(
            f"{where.checkpoint} holds an adapter: python infer_lora_finetuning.py --checkpoint"
            f" {where.checkpoint}"
        )
    model, tokenizer = load_for_inference(
        where.checkpoint,
        precision=chat.inference_precision,
        device=chat.device,
        base=where.model_name_or_path,
        quantization_bit=where.quantization_bit,
    )
    converse(model, tokenizer, chat)


if __name__ == "__main__":
    run_script(main)
