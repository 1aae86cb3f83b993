"""A training that takes a second: its shape, its data and the arguments of train.py."""

import json
import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
DATA = ROOT / "data"
WEIGHT_FILES = ("model.safetensors", "adapter_model.safetensors", "prefix_encoder.safetensors")


def write_inputs(folder):
    """Shape, 9 samples to train on, 5 to evaluate with and 9 to mix in."""
    config = json.loads((ROOT / "config" / "config_tiny.json").read_text())
    config |= {"num_layers": 2, "hidden_size": 32, "inner_hidden_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    lines = (DATA / "finetune_train_examples.json").read_text().splitlines(keepends=True)
    (folder / "train.json").write_text("".join(lines[:8]))
    (folder / "mix.json").write_text("".join(lines[20:28]))
    lines = (DATA / "finetune_dev_examples.json").read_text().splitlines(keepends=True)
    (folder / "dev.json").write_text("".join(lines[:4]))


def arguments(inputs, save_dir, **settings):
    """Of 5 batches an epoch; a setting of None is left out."""
    settings = {
        "config_name": inputs / "config.json",
        "train_file": json.dumps([str(inputs / "train.json")]),
        "eval_file": json.dumps([str(inputs / "dev.json")]),
        "output_dir": inputs / "output",
        "save_dir": save_dir,
        "max_epochs": 1,
        "max_seq_length": 64,
        "train_batch_size": 2,
        "precision": 32,
        **settings,
    }
    return [f"--{name}={value}" for name, value in settings.items() if value is not None]


def stay_on_the_cpu(patch):
    """Same bytes need the same order of every sum, which a GPU doesn't keep."""
    patch.setenv("CUDA_VISIBLE_DEVICES", "")  # for other processes
    patch.setattr(torch.cuda, "is_available", lambda: False)
    patch.setattr(torch.cuda, "device_count", lambda: 0)


def weights(folder):
    """The bytes of the weights in best/ and last/, by their paths."""
    found = {}
    for name in ("best", "last"):
        for file in WEIGHT_FILES:
            if (folder / name / file).exists():
                found[f"{name}/{file}"] = (folder / name / file).read_bytes()
    return found


def leftovers(folder):
    """What an unfinished save leaves."""
    return [*folder.rglob("*.part"), *folder.rglob("*.old")]


def train_in_child(argv, log):
    """Run train.py in a process of multiprocessing; what it prints goes to the file `log`."""
    import train
    from chatglm.command_line import run_script

    torch.set_num_threads(1)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["train.py", *argv]
    run_script(train.main)
