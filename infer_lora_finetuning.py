"""Chat with LoRA or AdaLoRA adapters that train.py saved, or merge one into its weights.

python infer_lora_finetuning.py                      # ./best_ckpt/last
python infer_lora_finetuning.py --adapters '{"law": "./law/last", "poems": "./poems/best"}'
python infer_lora_finetuning.py --enable_merge_weight --merge_dir ./merged
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from chatglm.command_line import parse_settings, run_script
from chatglm.errors import ToolkitError
from chatglm.saved import kind_of, read_settings_json
from chatglm.settings import ChatSettings
from chatglm.terminal import converse
from chatglm.tuning.adapters import merge_adapter, needs_dequantising
from chatglm.weights import save_folder
from models import load_for_inference

# Write the adapter, merged into its weights, to merge_dir as a plain folder, then chat with it.
enable_merge_weight = False


@dataclass(frozen=True)
class AdapterSettings:
    """Which adapters to talk to, and on which weights."""

    checkpoint: str = "./best_ckpt/last"
    """Folder of the adapter that answers first."""
    adapters: dict[str, str] = field(default_factory=dict)
    """More adapters by name, for /adapter NAME; checkpoint is "default"."""
    model_name_or_path: str = ""
    """The weights under the adapter; empty: those it was trained on."""
    quantization_bit: Literal[0, 4, 8] = 0
    """Quantise fp16 weights the released way while loading; 0: as in the training."""
    enable_merge_weight: bool = False
    """Merge the adapter into its weights and save them."""
    merge_dir: str = "./best_ckpt/merged"
    """Where merged weights go: a plain folder that infer.py reads, new or of an earlier merge."""

    def __post_init__(self):
        if self.enable_merge_weight and self.quantization_bit:
            raise ToolkitError(
                f"quantization_bit {self.quantization_bit} with enable_merge_weight would merge"
                " into rounded weights: merge without, then python infer.py --model_name_or_path"
                f" {self.merge_dir} --quantization_bit {self.quantization_bit}"
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Load, maybe merge, and talk."""
    edited = {"enable_merge_weight": enable_merge_weight}
    groups = [(AdapterSettings, edited, __file__), (ChatSettings, {}, "ChatSettings")]
    where, chat = parse_settings(groups, argv, description="Chat with LoRA or AdaLoRA adapters.")
    if kind_of(where.checkpoint) != "adapter":
        raise ToolkitError(
            f"{where.checkpoint} holds no adapter: python infer_finetuning.py --checkpoint"
            f" {where.checkpoint}"
        )
    if where.enable_merge_weight and not may_replace(where.merge_dir):
        raise ToolkitError(f"merge_dir {where.merge_dir} is there already: name another")
    model, tokenizer = load_for_inference(
        where.checkpoint,
        precision=chat.inference_precision,
        device=chat.device,
        base=where.model_name_or_path,
        adapters=where.adapters,
        quantization_bit=where.quantization_bit,
    )
    if where.enable_merge_weight:
        model = merge(model, tokenizer, where.merge_dir)
    converse(model, tokenizer, chat)


def may_replace(folder: str) -> bool:
    """True where nothing is lost: a merged folder alone has a settings.json of nothing."""
    if not os.path.exists(folder):
        return True
    return os.path.exists(os.path.join(folder, "settings.json")) and not read_settings_json(folder)


def merge(model, tokenizer, folder: str):
    """Merge the active adapter, save a plain folder, and give the merged model."""
    if needs_dequantising(model):
        print(
            "the weights are quantised: they are dequantised for the merge, and saved unquantised"
        )
    merged = merge_adapter(model)
    save_folder(merged, merged.state_dict(), tokenizer, "{}\n", folder, dtype=merged.dtype)
    print(f"saved {folder}: python infer.py --model_name_or_path {folder}")
    return merged


if __name__ == "__main__":
    run_script(main)
