"""Every method and precision on one new domain: what each trains, reaches, and saves.

    python train.py                     # the base: the embedded model
    python benchmarks/methods.py --base ./best_ckpt/last

Writes a small domain that the base has never seen (weather reports from a template, the dev set of
other combinations of city and month), trains each row on it through train.py's main, then loads
what was saved and reckons the dev loss anew. fp16 rows, and DoRA over
bitsandbytes' int8, need a GPU and are left out without one.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import random
import shutil
import sys
import time

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import train  # noqa: E402
from chatglm.corpus import read_paragraphs  # noqa: E402
from chatglm.evaluation import build_examples, mean_loss  # noqa: E402
from chatglm.tuning.adapters import plain_model  # noqa: E402
from models import load_for_inference  # noqa: E402

CITIES = ("北京", "上海", "南京", "杭州", "苏州", "成都", "西安", "武汉", "广州", "深圳")
MONTHS = ("一月", "四月", "七月", "十月")
SKIES = ("多云", "晴", "小雨", "大风")

LORA = {"lora_info_args.with_lora": True}
METHODS: dict[str, dict] = {
    "full": {"learning_rate": 1e-3},
    "freeze 2 of 4": {"global_num_layers_freeze": 2, "learning_rate": 1e-3},
    "p-tuning": {"pre_seq_len": 16, "learning_rate": 2e-1},
    "p-tuning, projection": {"pre_seq_len": 16, "prefix_projection": True, "learning_rate": 5e-3},
    "LoRA": {**LORA, "learning_rate": 5e-3},
    "rsLoRA": {**LORA, "lora_info_args.use_rslora": True, "learning_rate": 5e-3},
    "DoRA": {**LORA, "lora_info_args.use_dora": True, "learning_rate": 5e-3},
    "AdaLoRA": {"adalora_info_args.with_lora": True, "learning_rate": 1e-2},
}
BASES: dict[str, dict] = {
    "fp32": {"precision": "32"},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "16"},
    "int8": {"precision": "bf16", "quantization_bit": 8},
    "int4": {"precision": "bf16", "quantization_bit": 4},
    "bnb int8": {"precision": "bf16", "load_in_8bit": True},
    "bnb nf4": {"precision": "bf16", "load_in_4bit": True},
}


def allowed(method: str, base: str) -> bool:
    """What Settings allows: see README."""
    if base == "fp16":
        return torch.cuda.is_available()
    if method in ("full", "freeze 2 of 4"):
        return base in ("fp32", "bf16")
    if method == "DoRA" and base == "bnb int8":
        return torch.cuda.is_available()
    return not (method == "DoRA" and base in ("int8", "int4"))


def write_domain(folder: str) -> tuple[str, str]:
    """Paths of 32 training and 8 dev paragraphs."""
    pairs = list(itertools.product(CITIES, MONTHS))
    random.Random(0).shuffle(pairs)
    paths = (os.path.join(folder, "domain_train.json"), os.path.join(folder, "domain_dev.json"))
    for path, part in zip(paths, (pairs[:32], pairs[32:]), strict=True):
        with open(path, "w", encoding="utf-8") as file:
            for city, month in part:
                sky = SKIES[MONTHS.index(month)]
                answer = f"{city}{month}的天气以{sky}为主，出门请带好衣物。"
                rounds = [{"q": f"{city}{month}天气怎么样？", "a": answer}]
                file.write(json.dumps({"paragraph": rounds}, ensure_ascii=False) + "\n")
    return paths


def dev_loss(folder: str, dev: str, *, precision: str) -> float:
    """The dev loss of what a folder holds, loaded as for inference."""
    with contextlib.redirect_stdout(io.StringIO()):
        model, tokenizer = load_for_inference(folder, precision=precision)
    examples = build_examples(list(read_paragraphs([dev])), tokenizer, max_seq_length=1024)
    samples = [example.sample for example in examples]
    return mean_loss(plain_model(model), samples, batch_size=8)


def run_row(method: str, base: str, *, folder: str, work: str, files: tuple[str, str]) -> str:
    """Train, load, compare; a table row."""
    save = os.path.join(work, f"{method}-{base}".replace(" ", "-"))
    shutil.rmtree(save, ignore_errors=True)
    settings = {
        "model_name_or_path": folder,
        "train_file": json.dumps([files[0]]),
        "eval_file": json.dumps([files[1]]),
        "output_dir": os.path.join(work, "records"),
        "save_dir": save,
        "max_epochs": 10,
        "warmup_steps": 0,
        "devices": 1,
        **METHODS[method],
        **BASES[base],
    }
    start = time.perf_counter()
    log = io.StringIO()
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        train.main([f"--{name}={value}" for name, value in settings.items()])
    seconds = time.perf_counter() - start
    with open(os.path.join(save, "summary.json"), encoding="utf-8") as file:
        summary = json.load(file)
    precision = BASES[base]["precision"]
    before = dev_loss(folder, files[1], precision=precision)
    reloaded = dev_loss(os.path.join(save, "last"), files[1], precision=precision)
    return (
        f"| {method} | {base} | {summary['trained_parameters']:,} | {before:.3f}"
        f" | {summary['dev_loss']:.4f} | {reloaded:.4f} | {seconds:.1f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default=f"{ROOT}/best_ckpt/last")
    parser.add_argument("--work", default="/tmp/chatglm-methods")
    parser.add_argument("--only", nargs="*", choices=sorted(METHODS), default=list(METHODS))
    arguments = parser.parse_args()
    os.makedirs(arguments.work, exist_ok=True)
    files = write_domain(arguments.work)
    print("| method | weights | trained | dev loss before | after | reloaded | seconds |")
    print("|---|---|---|---|---|---|---|")
    for method, base in itertools.product(arguments.only, BASES):
        if allowed(method, base):
            row = run_row(method, base, folder=arguments.base, work=arguments.work, files=files)
            print(row, flush=True)


if __name__ == "__main__":
    main()
