"""Make a folder that the chat scripts read out of a checkpoint that DeepSpeed or Lightning wrote.

python convert_checkpoint.py --checkpoint ./old/last.ckpt --model_name_or_path /path/to/chatglm-6b
python convert_checkpoint.py --checkpoint ./best_ckpt/resume    # an unfinished run of train.py
"""

from collections.abc import Sequence
from dataclasses import dataclass

from chatglm.command_line import parse_settings, run_script
from chatglm.conversion import convert
from chatglm.errors import ToolkitError


@dataclass(frozen=True)
class ConversionSettings:
    """What is converted, and what no file of it says."""

    checkpoint: str = ""
    """Folder of DeepSpeed, Lightning or the Hugging Face Trainer, a .ckpt, .bin or .safetensors
    file, or resume/ of a run of train.py that was cut off."""
    model_name_or_path: str = ""
    """The weights it was trained on; empty: those that a run of train.py names."""
    save_dir: str = "./converted"
    """Folder to write; it may not exist yet."""
    lora_alpha: float | None = None
    """What LoRA was scaled by; null: as a config beside the checkpoint says."""
    trust_pickle: bool = False
    """Run code that a pickle names if it can't be read without; only for files of your own."""


def main(argv: Sequence[str] | None = None) -> None:
    """Convert, read back, and say how to chat with it."""
    groups = [(ConversionSettings, {}, "ConversionSettings")]
    (settings,) = parse_settings(groups, argv, description="Convert an old checkpoint.")
    if not settings.checkpoint:
        raise ToolkitError("give --checkpoint: a file or folder that DeepSpeed or Lightning wrote")
    line = convert(
        settings.checkpoint,
        settings.save_dir,
        model_name_or_path=settings.model_name_or_path,
        lora_alpha=settings.lora_alpha,
        trust_pickle=settings.trust_pickle,
    )
    print(line)


if __name__ == "__main__":
    run_script(main)
