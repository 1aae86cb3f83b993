"""Host memory and time to load a released-style checkpoint of the true size.

    python benchmarks/load.py --folder /tmp/chatglm-6b-random           # writes it first (13.4 GB)

Writes random fp16 weights in 8 `pytorch_model-*.bin` shards with an index, the config and a
tokenizer file made by this project; then loads them in a process of its own and prints the peak
of its resident memory. With mapped files, pages of the checkpoint count as resident.
"""

import argparse
import json
import os
import subprocess
import sys
import time

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from chatglm.configuration import ChatGLMConfig  # noqa: E402
from chatglm.model import ChatGLMForConditionalGeneration  # noqa: E402

NUM_SHARDS = 8

LOADER = """
import resource, sys, time, torch
sys.path.insert(0, sys.argv[2])
from chatglm.model import ChatGLMForConditionalGeneration
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
start = time.perf_counter()
model = ChatGLMForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.float16)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
stored = sum(p.numel() * p.element_size() for p in model.parameters())
total = sum(float(p.detach().view(-1)[::1024].sum()) for p in model.parameters())  # every page
touched = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(f"weights {stored / 1e9:.2f} GB, before {base / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB,"
      f" peak with every page read {touched / 1e9:.2f} GB, {seconds:.1f} s, sum {total:.4g}")
"""


def write_checkpoint(folder: str) -> None:
    """Random fp16 weights of the true shape, one shard in memory at a time."""
    os.makedirs(folder, exist_ok=True)
    config = ChatGLMConfig()
    with torch.device("meta"):
        shapes = {
            k: v.shape for k, v in ChatGLMForConditionalGeneration(config).state_dict().items()
        }
    total = sum(shape.numel() for shape in shapes.values())
    generator, weight_map, shard, held, number = torch.Generator().manual_seed(0), {}, {}, 0, 1
    for position, (name, shape) in enumerate(shapes.items(), start=1):
        shard[name] = torch.empty(shape, dtype=torch.float16).normal_(0, 0.02, generator=generator)
        held += shape.numel()
        if held >= total / NUM_SHARDS or position == len(shapes):
            file = f"pytorch_model-{number:05d}-of-{NUM_SHARDS:05d}.bin"
            torch.save(shard, os.path.join(folder, file))
            weight_map.update(dict.fromkeys(shard, file))
            print(f"wrote {file}", flush=True)
            shard, held, number = {}, 0, number + 1
    with open(os.path.join(folder, "pytorch_model.bin.index.json"), "w") as file:
        json.dump({"metadata": {"total_size": 2 * total}, "weight_map": weight_map}, file)
    config.save_pretrained(folder)


def main() -> None:
    """Write if needed, then measure in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="/tmp/chatglm-6b-random")
    folder = parser.parse_args().folder
    if not os.path.exists(os.path.join(folder, "config.json")):
        start = time.perf_counter()
        write_checkpoint(folder)
        print(f"written in {time.perf_counter() - start:.0f} s")
    subprocess.run([sys.executable, "-c", LOADER, folder, ROOT], check=True)


if __name__ == "__main__":
    main()
