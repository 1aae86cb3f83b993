"""Memory and speed of every way of training the true 6B shape, on one GPU, with random weights.

    python benchmarks/training.py --folder /tmp/chatglm-6b-random --steps 20

Writes the weights first (13.4 GB of fp16 safetensors, with this project's tiny tokenizer) and a
file of samples of one length; then runs train.py in a process of its own for each row, and prints
the rows as a table. `--only lora-bf16` runs one row.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from safetensors.torch import save_file  # noqa: E402

from chatglm.configuration import ChatGLMConfig  # noqa: E402
from chatglm.corpus import read_paragraphs  # noqa: E402
from chatglm.model import ChatGLMForConditionalGeneration  # noqa: E402
from chatglm.tokenizer import train_tokenizer  # noqa: E402

IDS = {"mask_token_id": 4, "gmask_token_id": 6, "bos_token_id": 7, "eos_token_id": 8}
LORA = ["--lora_info_args.with_lora", "true"]
DEEPSPEED = ["--enable_deepspeed", "true", "--deepspeed_config"]
ROWS: dict[str, tuple[int, int, list[str]]] = {  # batch, tokens a sample, flags
    "lora-bf16": (4, 1024, [*LORA, "--precision", "bf16"]),
    "lora-int4": (2, 1024, [*LORA, "--precision", "16", "--quantization_bit", "4"]),
    "ptuning-int4": (2, 1024, ["--pre_seq_len", "32", "--precision", "16",
                               "--quantization_bit", "4"]),
    "ptuning-int4-small": (1, 128, ["--pre_seq_len", "128", "--precision", "16",
                                    "--quantization_bit", "4"]),
    "full-paged-8bit": (1, 1024, ["--optimizer", "paged_adamw_8bit", "--precision", "bf16"]),
    "full-bf16-8bit": (1, 1024, ["--optimizer", "adamw_8bit", "--precision", "bf16",
                                 "--trained_precision", "bf16"]),
    "lora-zero2": (2, 1024, [*LORA, "--precision", "bf16", *DEEPSPEED,
                             f"{ROOT}/config/deepspeed.json"]),
    "lora-zero3-offload": (2, 1024, [*LORA, "--precision", "bf16", *DEEPSPEED,
                                     f"{ROOT}/config/deepspeed_offload.json"]),
}  # fmt: skip


def write_weights(folder: str) -> None:
    """Random weights of the released shape and names, two tensors at a time."""
    config = ChatGLMConfig(**IDS, max_sequence_length=2048)
    with torch.device("meta"):
        shapes = {
            n: t.shape for n, t in ChatGLMForConditionalGeneration(config).state_dict().items()
        }
    aside = f"{folder}.part"
    shutil.rmtree(aside, ignore_errors=True)
    os.makedirs(aside)
    texts = [t for rounds in read_paragraphs([f"{ROOT}/data/finetune_train_examples.json"])
             for one in rounds for t in one]  # fmt: skip
    train_tokenizer(texts, aside, vocab_size=2432).save_pretrained(aside)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        tensor = torch.empty(shape, dtype=torch.float16, device=device)
        if "layernorm" in name:
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            tensor.normal_(0, 0.02, generator=generator)
        state[name] = tensor.cpu()
    save_file(state, os.path.join(aside, "model.safetensors"), metadata={"format": "pt"})
    config.dtype = torch.float16
    config.save_pretrained(aside)
    os.replace(aside, folder)


def write_samples(path: str, count: int, characters: int) -> None:
    """Paragraphs longer than any sample, so that each is cut to max_seq_length."""
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            answer = "从南京到上海的路线很多" * (characters // 11 + 1)
            line = {"id": number, "paragraph": [{"q": f"问题{number}", "a": answer}]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def run_row(name: str, folder: str, work: str, steps: int) -> str:
    """One training in its own process; a table row."""
    batch, length, flags = ROWS[name]
    samples = f"{work}/samples-{length}.json"
    write_samples(samples, count=batch * steps, characters=6 * length)
    save = f"{work}/{name}"
    command = [
        sys.executable, f"{ROOT}/train.py", "--model_name_or_path", folder, "--train_file",
        json.dumps([samples]), "--eval_file", "[]", "--output_dir", f"{work}/records-{length}",
        "--save_dir", save, "--max_seq_length", str(length), "--train_batch_size", str(batch),
        "--max_epochs", "1", "--max_steps", str(steps), "--save_every_steps", "-1", *flags,
    ]  # fmt: skip
    start = time.perf_counter()
    with open(f"{work}/{name}.log", "w", encoding="utf-8") as file:
        done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, check=False)
    seconds = time.perf_counter() - start
    with open(f"{work}/{name}.log", encoding="utf-8") as file:
        log = file.read()
    if done.returncode:
        return f"| {name} | {batch} x {length} | failed: {log.strip().splitlines()[-1][:200]} |"
    with open(f"{save}/summary.json", encoding="utf-8") as file:
        found = json.load(file)
    shutil.rmtree(save)
    estimate = re.search(r"about ([\d.]+) GiB", log)
    return (
        f"| {name} | {batch} x {length} | {found['peak_memory_gib']}"
        f" | {estimate[1] if estimate else ''} | {found['tokens_per_second']:,.0f}"
        f" | {seconds:.0f} |"
    )


def main() -> None:
    """Write what is missing, run the rows, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="/tmp/chatglm-6b-random")
    parser.add_argument("--work", default="/tmp/chatglm-training")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="*", choices=sorted(ROWS), default=list(ROWS))
    arguments = parser.parse_args()
    if not os.path.isdir(arguments.folder):
        write_weights(arguments.folder)
    os.makedirs(arguments.work, exist_ok=True)
    print("| method | batch | peak GiB | estimated | tokens/s | seconds in all |", flush=True)
    print("|---|---|---|---|---|---|", flush=True)
    for name in arguments.only:
        print(run_row(name, arguments.folder, arguments.work, arguments.steps), flush=True)


if __name__ == "__main__":
    main()
