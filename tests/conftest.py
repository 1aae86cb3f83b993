"""A tiny released model, its golden numbers, and checkpoints made from it. No network."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file

from chatglm.model import ChatGLMForConditionalGeneration

from .tiny_weights import write_weights

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared"
WEIGHTS = "pytorch_model.bin"
BLOCK_LINEARS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
RELEASED_DIGESTS = {
    8: "c8429206fc321c29acc033aa6a5eace94a7a52ba61d9b898779e80e0a2fa8665",
    4: "b4cb9b2547e85e57c1381c03b9f08779382540ca526c7bd03ee0ab24d99b1a8b",
}

torch.set_num_threads(1)  # tiny tensors: threads cost more than they give
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def golden_folder():
    return GOLDEN


@pytest.fixture(scope="session")
def golden():
    """The golden tensors of the plain model, by name."""
    return load_file(GOLDEN / "model.safetensors")


@pytest.fixture(scope="session")
def checkpoint_folder():
    return GOLDEN / "checkpoint"


@pytest.fixture(scope="session")
def released_state():
    """The stored state dict, fp16, inv_freq included. Copy before changing."""
    return torch.load(GOLDEN / "checkpoint" / WEIGHTS, weights_only=True)


@pytest.fixture(scope="session")
def released(checkpoint_folder):
    """The tiny model in fp32. Tests leave it as they found it."""
    return load(checkpoint_folder)


@pytest.fixture(scope="session")
def sharded_folder(tmp_path_factory, released_state):
    """The checkpoint in two shards with an index, as the released one is laid out."""
    folder = tmp_path_factory.mktemp("sharded")
    shutil.copy(GOLDEN / "checkpoint" / "config.json", folder)
    names, weight_map = list(released_state), {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        shard = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: released_state[name].clone() for name in part}, folder / shard)
        weight_map.update(dict.fromkeys(part, shard))
    total = sum(tensor.nbytes for tensor in released_state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def quantized_folders(tmp_path_factory, released_state):
    """{bits: folder}, equal byte for byte to the checkpoints the released code writes."""
    return {
        bits: write_quantized(tmp_path_factory.mktemp(f"int{bits}"), released_state, bits)
        for bits in (8, 4)
    }


@pytest.fixture(scope="session")
def weights_folder(tmp_path_factory):
    """Two layers in fp16 with their tokenizer, to be tuned. Tests leave it as they found it."""
    return write_weights(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def write_checkpoint(tmp_path, released_state):
    """write_checkpoint(change, **config): a folder with an edited state dict and config."""

    def write(change=lambda state: None, **config):
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        state = dict(released_state)
        change(state)
        torch.save(state, folder / WEIGHTS)
        write_config(folder, **config)
        return folder

    return write


@pytest.fixture(scope="session")
def vocabulary_file():
    """The released ice_text.model, which is not part of this repository."""
    path = SHARED / "tokenizer" / "ice_text.model"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


def load(folder, dtype=torch.float32, **options):
    return ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=dtype, **options).eval()


def write_config(folder, **changes):
    config = json.loads((GOLDEN / "checkpoint" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def write_quantized(folder, released_state, bits):
    """Quantised in NumPy, apart from the package, so that the two can be held to each other."""
    state, digest = dict(released_state), hashlib.sha256()
    for name in released_state:
        if name.split(".")[-2] in BLOCK_LINEARS and name.endswith(".weight"):
            weight = released_state[name].numpy()
            scale = (np.abs(weight).max(axis=1) / np.float32(2 ** (bits - 1) - 1)).astype("f2")
            values = np.rint(weight / scale[:, None]).astype(np.int8)
            if bits == 4:
                low = values[:, 1::2].view(np.uint8) & 15
                values = (values[:, 0::2].view(np.uint8) << 4 | low).view(np.int8)
            state[name] = torch.from_numpy(values)
            state[f"{name}_scale"] = torch.from_numpy(scale)
    for name in sorted(name for name in state if _is_packed(name, state)):
        digest.update(name.encode() + state[name].numpy().tobytes())
    assert digest.hexdigest() == RELEASED_DIGESTS[bits]
    torch.save(state, folder / WEIGHTS)
    write_config(folder, quantization_bit=bits, quantization_embeddings=False)
    return folder


def _is_packed(name, state):
    return name.endswith("_scale") or f"{name}_scale" in state


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(path)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs can't be mounted here: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def fill(disk, *, leave):
    """Write a file until so many bytes are free."""
    with open(disk / "filler", "wb") as file:
        file.write(bytes(shutil.disk_usage(disk).free - leave))
