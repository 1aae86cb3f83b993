"""Fine-tune ChatGLM-6B, or train the embedded tiny one.

python train.py                     # data_utils.py and models.py hold the settings
python train.py --help              # every setting as a flag
"""

import functools
import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from chatglm.callbacks import LossCurve, Rehearsal, SaveResume, SaveTrained, find_resume
from chatglm.checkpoints import check_saved, save_trained
from chatglm.cluster import cluster_from_environment
from chatglm.command_line import run_script
from chatglm.estimates import checkpoint_bytes, estimate_memory
from chatglm.guards import check_disk, explaining_memory
from chatglm.optim import schedule_options, warmup_steps
from chatglm.run_settings import Settings
from chatglm.sharding import check_deepspeed
from chatglm.trainer import build_trainer
from chatglm.training import ChatGLMTraining, TrainingData
from chatglm.tuning.adapters import adapter_ranks
from chatglm.tuning.apply import parameter_table
from data_utils import DataHelper, read_settings
from models import build_model, resolve_settings


def main(argv: Sequence[str] | None = None) -> None:
    """Settings, records, model, fit."""
    settings, _ = read_settings(argv, description="Train ChatGLM.")
    schedule_options(settings.train)
    check_deepspeed(settings)
    cluster = cluster_from_environment(
        settings.train.devices, available=torch.cuda.device_count(), environ=os.environ
    )
    if not cluster.is_first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    helper = DataHelper(settings, splits=("train", "mix", "dev"))
    settings = resolve_settings(settings, helper.config)
    records, pad = helper.record_folders(), helper.config.pad_token_id
    data = TrainingData(
        records, pad_token_id=pad, files_per_entry=helper.files_per_entry,
        packing=settings.train.packing,
    )  # fmt: skip
    steps = data.total_steps(settings, world_size=cluster.world_size)
    state = find_resume(settings, data.digest())
    with explaining_memory(settings):
        model = build_model(settings, helper.config, total_steps=steps)
        if cluster.is_first:
            world_size = cluster.world_size
            epoch = [*data.describe_epoch(settings, world_size=world_size),
                     data.describe_batches(settings, world_size=world_size)]  # fmt: skip
            report_before(settings, model, helper.config, data, steps=steps, epoch=epoch)
        callbacks = build_callbacks(settings, model, helper.tokenizer, data, state=state)
        trainer = build_trainer(settings, callbacks, cluster, has_dev_set="dev" in data.records)
        metrics = fit(trainer, ChatGLMTraining(model, settings, data), settings, state)
    if cluster.is_first:
        report_after(settings, model, {"steps": trainer.global_step, **metrics})


def build_callbacks(
    settings: Settings, model, tokenizer, data: TrainingData, *, state: str | None
) -> list:
    """What happens beside the steps, in this order."""
    folder, two = settings.train.save_dir, data.longest_batch(2, packing=False)
    save = functools.partial(save_and_check, model, settings, tokenizer, two)
    return [
        Rehearsal(longest_batch(settings, data)),
        LossCurve(os.path.join(folder, "loss_curve.png")),
        SaveTrained(folder, save, has_dev_set="dev" in data.records),
        SaveResume(settings, data.digest(), state),
    ]


def longest_batch(settings: Settings, data: TrainingData) -> dict[str, Any]:
    """The batch that takes the most memory."""
    return data.longest_batch(settings.train.train_batch_size, packing=settings.train.packing)


def fit(trainer, module, settings: Settings, state: str | None) -> dict[str, float]:
    """Train; the last metrics."""
    trainer.fit(module, ckpt_path=state, weights_only=False)
    metrics = dict(trainer.callback_metrics)
    if settings.train.eval_file and module.dev_step != trainer.global_step:
        trainer.validate(module, verbose=False)  # max_steps ended between two dev runs
    for process in getattr(trainer.strategy.launcher, "procs", []):
        process.wait()  # a container ends with its first process
    metrics |= {**trainer.callback_metrics, "train_loss": module.train_loss}
    return {name: float(value) for name, value in metrics.items()}


def save_and_check(model, settings: Settings, tokenizer, batch, state: dict, folder: str) -> None:
    """Write what was trained and read it back."""
    save_trained(model, state, settings, folder, tokenizer=tokenizer)
    device = next(model.parameters()).device
    names = ("input_ids", "context_lengths", "mask_positions")
    check_saved(model, state, settings, folder, {n: batch[n].to(device) for n in names})


def report_before(
    settings: Settings, model, config, data: TrainingData, *, steps: int, epoch: Iterable[str]
) -> None:
    """What will be trained, and whether disk and memory suffice; `epoch`: lines about one."""
    train = settings.train
    table = parameter_table(model)
    print(table)
    os.makedirs(train.save_dir, exist_ok=True)
    with open(os.path.join(train.save_dir, "parameters.txt"), "w", encoding="utf-8") as file:
        file.write(f"{table}\n")
    check_disk(train.save_dir, checkpoint_bytes(model, settings))
    num_tokens = longest_batch(settings, data)["input_ids"].numel()
    estimate = estimate_memory(model, config, settings, num_tokens=num_tokens)
    has = ""
    if torch.cuda.is_available():
        has = f" of {torch.cuda.get_device_properties(0).total_memory / 2**30:.1f}"
    print(f"memory for the longest batch, about {estimate}{has}")
    print(
        f"training ({settings.method}) for {train.max_epochs} epochs, {steps} steps, learning rate"
        f" {train.learning_rate:g} ({train.optimizer}, {train.scheduler_type}), precision"
        f" {train.precision}"
    )
    for line in epoch:
        print(line)
    given = warmup_steps(train, steps)
    if given < train.warmup_steps:
        print(f"warmup_steps {train.warmup_steps} is more than a tenth of the steps: {given}")


def report_after(settings: Settings, model, metrics: dict[str, float]) -> None:
    """What it took, where the result is, and how to talk to it; also as summary.json."""
    train, ranks = settings.train, adapter_ranks(model)
    names = ("steps", "train_loss", "dev_loss", "tokens_per_second")
    summary: dict[str, Any] = {n: round(metrics[n], 6) for n in names if n in metrics}
    if torch.cuda.is_available():
        summary["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    print(", ".join(f"{name} {value}" for name, value in summary.items()))
    for name, rank in ranks.items():
        print(f"rank {rank:3}  {name}")
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    summary |= {"trained_parameters": trained, **({"ranks": ranks} if ranks else {})}
    with open(os.path.join(train.save_dir, "summary.json"), "w", encoding="utf-8") as file:
        json.dump(summary, file, indent=2)
    script = "infer_lora_finetuning.py" if "lora" in settings.method else "infer_finetuning.py"
    print(f"saved {train.save_dir}/best and {train.save_dir}/last")
    print(f"talk to it with: python {script} --checkpoint {train.save_dir}/last")


if __name__ == "__main__":
    run_script(main)
