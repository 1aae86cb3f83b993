"""Checkpoints written by DeepSpeed and Lightning themselves, each with the logits of its model.

python -m tests.old_checkpoints FOLDER NAME ...     # writes FOLDER/NAME and FOLDER/NAME.logits,
                                                    # beside FOLDER/base

A process of its own, since DeepSpeed leaves much behind in the one that it runs in. A name that
begins with `engine` is written by a plain DeepSpeed engine around a wrapper with old names, all
others by train.py that is cut off.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from chatglm.callbacks import LossCurve, SaveResume
from chatglm.sharding import leave_out_shared_memory
from chatglm.tuning.prompt import train_prefix
from chatglm.weights import load_config, load_model
from tests.tiny_run import ROOT, arguments, write_inputs

PROMPT = [[40, 41, 42, 43, 44, 6, 7], [50, 51, 52, 53, 54, 6, 7]]
"""Ids of the embedded tokenizer: any text, [gMASK], <sop>."""
TUNED = '["query_key_value", "dense_4h_to_h"]'
LORA = {
    "lora_info_args.with_lora": "true",
    "lora_info_args.r": 2,
    "lora_info_args.lora_alpha": 7,
    "lora_info_args.target_modules": TUNED,
}
METHODS = {
    "scratch": {},
    "full": {},
    "freeze": {"global_num_layers_freeze": 1},
    "ptuning": {"pre_seq_len": 3},
    "projection": {"pre_seq_len": 3, "prefix_projection": "true"},
    "lora": LORA,
    "rich": {
        **LORA,
        "lora_info_args.use_dora": "true",
        "lora_info_args.use_rslora": "true",
        "lora_info_args.bias": "all",
        "lora_info_args.modules_to_save": '["lm_head"]',
    },
    "adalora": {
        "adalora_info_args.with_lora": "true",
        "adalora_info_args.target_r": 1,
        "adalora_info_args.init_r": 3,
        "adalora_info_args.tinit": 1,
        "adalora_info_args.tfinal": 2,
        "adalora_info_args.target_modules": TUNED,
    },
}


class WrittenError(Exception):
    """The checkpoint is there; the run is cut off."""


def logits(model):
    training = model.training
    with torch.no_grad():
        found = model.eval()(torch.tensor(PROMPT), use_cache=False).logits
    model.train(training)
    return found


def train_py(folder, name):
    """NAME is method-stage-precision; stage "none" is without DeepSpeed."""
    import train

    method, stage, precision = name.split("-")
    options = {"precision": precision, **METHODS[method]}
    if stage != "none":
        config = {"zero_optimization": {"stage": int(stage)}, "zero_allow_untested_optimizer": True,
                  "zero_force_ds_cpu_optimizer": False}  # fmt: skip
        (folder / "deepspeed.json").write_text(json.dumps(config))
        options |= {"enable_deepspeed": "true", "deepspeed_config": folder / "deepspeed.json"}
    base = None if method == "scratch" else folder / "base"
    options |= {
        "model_name_or_path": base,
        "config_name": folder / "config.json" if base is None else None,
        "save_every_steps": 4,
        "learning_rate": 0.05,
    }

    def save(self, trainer):
        saves(self, trainer)
        shutil.copytree(self.folder, folder / name)
        torch.save(logits(trainer.lightning_module.model), folder / f"{name}.logits")
        raise WrittenError

    saves, SaveResume._save = SaveResume._save, save
    try:
        train.main(arguments(folder, folder / "saved", resume="false", **options))
    except WrittenError:
        return
    finally:
        SaveResume._save = saves
    raise AssertionError(f"{name}: trained to the end")


class TransformerLightningModule(nn.Module):
    """Names its backbone as the older project does."""

    def __init__(self, model):
        super().__init__()
        self.__backbone = nn.ModuleDict({"transformer_base": model})

    def forward(self, ids):
        model = self._TransformerLightningModule__backbone["transformer_base"]
        return model(ids, labels=ids, use_cache=False).loss


def engine(folder, name):
    """NAME is engine-stage: a prefix encoder and the frozen weights under it."""
    import deepspeed

    leave_out_shared_memory()
    stage = name.split("-")[1]
    config = load_config(str(folder / "base"))
    model = load_model(
        str(folder / "base"), config, dtype=torch.float32, device=torch.device("cpu")
    )
    train_prefix(model, pre_seq_len=5, prefix_projection=False)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": int(stage)},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    wrapped = TransformerLightningModule(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ready, *_ = deepspeed.initialize(model=wrapped, optimizer=optimizer, config=config)
    for _ in range(2):
        ready.backward(ready(torch.tensor(PROMPT)))
        ready.step()
    ready.save_checkpoint(str(folder / name))
    found = logits(model)
    if os.environ.get("RANK", "0") == "0":
        torch.save(found, folder / f"{name}.logits")


def environments(ranks):
    """Of each of so many processes that meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    return [{**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def write(folder, names, *, ranks=None):
    """Run this file in a process, or in so many ranks for `engine` names."""
    command = [sys.executable, "-m", "tests.old_checkpoints", str(folder), *names]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    logs = [open(f"{folder}/{ranks}.{rank}.log", "w+") for rank in range(ranks or 1)]  # noqa: SIM115
    processes = [
        subprocess.Popen(command, cwd=ROOT, env={**common, **own}, stdout=log, stderr=log)
        for own, log in zip(environments(ranks) if ranks else [{}], logs, strict=True)
    ]
    try:
        codes = [process.wait(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        raise AssertionError(Path(logs[0].name).read_text()[-3000:])


def main(folder, names):
    torch.set_num_threads(1)
    LossCurve.draw = lambda self: None
    if not (folder / "base").exists():
        import train

        write_inputs(folder)
        train.main(arguments(folder, folder / "first", eval_file="[]"))
        shutil.copytree(folder / "first" / "last", folder / "base")
    for name in names:
        (engine if name.startswith("engine") else train_py)(folder, name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
