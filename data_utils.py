"""Settings to edit, and the building of training records.

python data_utils.py                # build the records of train_file, eval_file and test_file
python data_utils.py --show 3       # and print three samples of each
python data_utils.py --help         # every setting as a flag
"""

import contextlib
import os
import pathlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from filelock import FileLock
from rich.console import Console
from tqdm import tqdm

from chatglm import builder, corpus, records, strategies
from chatglm.command_line import parse_settings, run_script
from chatglm.configuration import ChatGLMConfig
from chatglm.errors import ToolkitError
from chatglm.files import read_json, recover_folder
from chatglm.prompts import TEMPLATE_VERSION
from chatglm.ray_workers import build_shards_with_ray
from chatglm.run_settings import Settings
from chatglm.settings import (
    AdaLoraSettings,
    DataSettings,
    LoraSettings,
    ModelSettings,
    TrainSettings,
    at_least,
)
from chatglm.shards import BuildPlan, InputFile
from chatglm.showing import show_sample
from chatglm.sources import file_format
from chatglm.tokenizer import ChatGLMTokenizer
from chatglm.workers import build_shards
from models import build_tokenizer, model_switches

# What to train. An empty model_name_or_path trains a tiny ChatGLM from scratch in a minute; give
# the folder of the real weights to fine-tune them. `python train.py --help` explains each line.
train_info_args = {
    "model_name_or_path": "",
    "config_name": None,
    "train_file": ["./data/finetune_train_examples.json"],
    "train_file_weights": [],
    "eval_file": ["./data/finetune_dev_examples.json"],
    "test_file": [],
    "data_backend": "record",
    "mix_file": [],
    "mix_ratio": 0.0,
    "output_dir": "./output",
    "save_dir": "./best_ckpt",
    "save_every_steps": 500,
    "resume": None,
    "max_seq_length": 1024,
    "max_epochs": None,
    "max_steps": -1,
    "train_batch_size": 8,
    "eval_batch_size": 8,
    "eval_every_steps": None,
    "early_stopping_patience": None,
    "gradient_accumulation_steps": 1,
    "drop_last": False,
    "packing": True,
    "gradient_checkpointing": None,
    "fused_kernels": True,
    "optimizer": "adamw",
    "learning_rate": None,
    "scheduler_type": "linear",
    "scheduler": {},
    # "scheduler_type": "CAWR", "scheduler": {"T_mult": 1, "rewarm_epoch_num": 0.5},
    # "scheduler_type": "CAL", "scheduler": {"rewarm_epoch_num": 2},
    # "scheduler_type": "Step", "scheduler": {"decay_rate": 0.999, "decay_steps": 100},
    "warmup_steps": 20,
    "weight_decay": 0.0,
    "adam_epsilon": 1e-8,
    "optimizer_betas": (0.9, 0.999),
    "max_grad_norm": 1.0,
    "precision": "auto",
    "trained_precision": "32",
    "devices": None,
    "rank_timeout_seconds": 60,
    "seed": 42,
}

# Train with DeepSpeed; ./config/deepspeed_offload.json is ZeRO-3 with the CPU's memory.
enable_deepspeed = False
deepspeed_config = "./config/deepspeed.json"

# LoRA: with_lora switches it on. It, AdaLoRA, p-tuning and freezing (models.py) exclude each other.
lora_info_args = {
    "with_lora": False,
    "r": 8,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "bias": "none",
    "target_modules": ["query_key_value"],
    "modules_to_save": [],
    "use_rslora": False,
    "use_dora": False,
}

# AdaLoRA: every matrix starts with rank init_r and ends with target_r on average.
adalora_info_args = {
    "with_lora": False,
    "target_r": 8,
    "init_r": 12,
    "tinit": None,
    "tfinal": None,
    "deltaT": 1,
    "beta1": 0.85,
    "beta2": 0.85,
    "orth_reg_weight": 0.5,
    "total_step": None,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "bias": "none",
    "target_modules": ["query_key_value"],
    "modules_to_save": [],
}

# What happens to samples longer than max_seq_length.
data_conf = {
    "strategy": "truncation",
    "ensure_answer_min_length": 1,
    "sliding_size": None,
    "p": 1,
    "data_format": "auto",
    "max_rejected": 0.01,
    "num_process_worker": None,
    "build_with": "processes",
    "verify": False,
}

_train = {
    **train_info_args,
    "enable_deepspeed": enable_deepspeed,
    "deepspeed_config": deepspeed_config,
}
GROUPS = (
    (TrainSettings, _train, "train_info_args in data_utils.py"),
    (DataSettings, data_conf, "data_conf in data_utils.py"),
    (ModelSettings, model_switches, "the switches in models.py"),
    (LoraSettings, lora_info_args, "lora_info_args in data_utils.py"),
    (AdaLoraSettings, adalora_info_args, "adalora_info_args in data_utils.py"),
)


def read_settings(
    argv: Sequence[str] | None, *extra: type, description: str, trains: bool = True
) -> tuple[Settings, list[Any]]:
    """The checked settings of the dicts, `--config` and the flags; and those of `extra` groups."""
    groups = [*GROUPS, *((group, {}, group.__name__) for group in extra)]
    parsed = parse_settings(groups, argv, description=description)
    settings = Settings(*parsed[: len(GROUPS)], trains=trains)
    name = settings.train.config_name
    return settings.completed(read_json(name) if name else {}), parsed[len(GROUPS) :]


SPLITS = {"train": "train_file", "mix": "mix_file", "dev": "eval_file", "test": "test_file"}
"""Folders of records, and the settings that name their files."""


class DataHelper:
    """Builds the tokenizer and the records that the settings ask for, of all splits or of some."""

    def __init__(self, settings: Settings, *, splits: Iterable[str] = SPLITS):
        self.train, self.data = train, data = settings.train, settings.data
        self.files = {
            split: [InputFile(path, file_format(path, data.data_format))
                    for path in corpus.expand_files(getattr(train, SPLITS[split]))]
            for split in splits
        }  # fmt: skip
        weighted = train.train_file if train.train_file_weights else []
        self.files_per_entry = corpus.count_files(weighted)
        self.tokenizer: ChatGLMTokenizer
        self.config: ChatGLMConfig
        with self._lock() if train.from_scratch else contextlib.nullcontext():
            self.tokenizer, self.config = build_tokenizer(settings, self._texts())
        self.plan = self._build_plan()

    def _texts(self) -> list[str]:
        """The training text, from which the embedded tokenizer learns; with weights none."""
        if not self.train.from_scratch:
            return []
        paragraphs = [
            corpus.read_paragraphs([file.path], data_format=file.form, skip_bad=True)
            for file in self.files["train"]
        ]
        return [text for many in paragraphs for rounds in many for one in rounds for text in one]

    def _build_plan(self) -> BuildPlan:
        tokenizer, data = self.tokenizer, self.data
        return BuildPlan(
            vocab_file=tokenizer.vocab_file,
            special=strategies.SpecialTokens(
                tokenizer.gmask_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
            ),
            rules=strategies.CutRules(
                max_seq_length=self.train.max_seq_length,
                strategy=data.strategy,
                ensure_answer_min_length=data.ensure_answer_min_length,
                sliding_size=data.sliding_size,
                p=data.p,
            ),
            backend=self.train.data_backend,
            seed=self.train.seed,
        )

    def _lock(self) -> FileLock:
        """Held while building: torchrun and srun start all processes of a machine at once."""
        folder = self.train.output_dir
        try:
            os.makedirs(folder, exist_ok=True)
            pathlib.Path(folder, ".lock").touch()
        except OSError as error:
            raise ToolkitError(f"output_dir {folder}: cannot be written ({error})") from None
        return FileLock(f"{folder}/.lock")

    def make_dataset_with_args(self, split: str) -> str | None:
        """Folder of the records of "train", "mix", "dev" or "test", built now if anything changed.

        None when the split has no files.
        """
        files = self.files[split]
        if not files:
            return None
        folder = os.path.join(self.train.output_dir, split)
        if builder.reason_to_rebuild(folder, files, self._source()):
            with self._lock():
                self._build(folder, files)
        found = records.RecordFolder(folder)
        print(f"{folder}: {_summary(records.Counts.from_json(found.manifest['counts']))}")
        if self.data.verify:
            bar = tqdm(found.verify(), f"verifying {split}", total=len(found), disable=None)
            for _ in bar:
                pass
            print(f"{folder}: every sample has its checksum")
        return folder

    def _build(self, folder: str, files: list[InputFile]) -> None:
        """Unless the process that held the lock before has done it."""
        recover_folder(folder)
        reason = builder.reason_to_rebuild(folder, files, self._source())
        if not reason:
            return
        forms = sorted({file.form for file in files})
        print(f"{folder}: building ({reason}) from {len(files)} files, format {', '.join(forms)}")
        builder.build_records(
            folder,
            files,
            self.plan,
            self._source(),
            num_workers=self.data.num_process_worker or os.cpu_count() or 1,
            max_rejected=self.data.max_rejected,
            build_shards=build_shards_with_ray if self.data.build_with == "ray" else build_shards,
        )

    def record_folders(self) -> dict[str, records.RecordFolder]:
        """The records of every split that has files, built now if anything changed."""
        paths = {split: self.make_dataset_with_args(split) for split in self.files}
        return {split: records.RecordFolder(path) for split, path in paths.items() if path}

    def _source(self) -> dict:
        rules = self.plan.rules
        return {
            "tokenizer": builder.file_hash(self.tokenizer.vocab_file),
            "template": TEMPLATE_VERSION,
            "max_seq_length": rules.max_seq_length,
            "strategy": [rules.strategy, rules.ensure_answer_min_length, rules.sliding_size,
                         rules.p, self.train.seed if rules.p < 0 else None],
            "strategy version": strategies.VERSION,
            "data_backend": self.plan.backend,
        }  # fmt: skip


def _summary(counts: records.Counts) -> str:
    said = (
        f"{counts.samples:,} samples, {counts.tokens:,} tokens ({counts.learned_tokens:,} learned),"
        f" longest {counts.longest}, {counts.prompts_cut} prompts and {counts.answers_cut} answers"
        " cut"
    )
    if counts.rounds_in_windows:
        said += f", {counts.rounds_in_windows} rounds cut into windows"
    return said + (f", {counts.rejected} bad records left out" if counts.rejected else "")


@dataclass(frozen=True)
class ShowSettings:
    """What is printed of the records."""

    show: int = 0
    """Print the first so many samples of each split: pieces, ids, what is learned, positions."""

    def __post_init__(self):
        at_least(self, 0, "show")


def main(argv: Sequence[str] | None = None) -> None:
    """Build the records; show some."""
    settings, (look,) = read_settings(argv, ShowSettings, description="Build training records.")
    helper, console = DataHelper(settings), Console()
    for split, folder in helper.record_folders().items():
        for number in range(min(look.show, len(folder))):
            title = f"{split}, sample {number} of {len(folder):,}"
            show_sample(folder[number], helper.tokenizer, console, title=title)


if __name__ == "__main__":
    run_script(main)
