"""Weights of a second's training, every way to tune them, and a tokenizer of the golden ids."""

import contextlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2

from chatglm.building import build_model
from chatglm.configuration import ChatGLMConfig
from chatglm.model import ChatGLMForConditionalGeneration
from chatglm.run_settings import Settings
from chatglm.settings import (
    AdaLoraSettings,
    DataSettings,
    LoraSettings,
    ModelSettings,
    TrainSettings,
)
from chatglm.tokenizer import ChatGLMTokenizer
from chatglm.tuning.adapters import adapter_ranks
from chatglm.weights import load_config, save_folder

CONTROL = {1: "<s>", 2: "</s>", 3: "<pad>", 300: "[MASK]", 301: "[gMASK]", 304: "<sop>",
           305: "<eop>"}  # fmt: skip
SHAPE = {"vocab_size": 320, "hidden_size": 64, "inner_hidden_size": 128, "num_layers": 2,
         "num_attention_heads": 4, "max_sequence_length": 128, "bos_token_id": 304,
         "eos_token_id": 305, "mask_token_id": 300, "gmask_token_id": 301}  # fmt: skip
ADAPTER = {"with_lora": True, "lora_dropout": 0.0}
METHODS = {
    "full": {},
    "freeze": {"model": {"global_num_layers_freeze": 1}},
    "ptuning": {"model": {"pre_seq_len": 3}},
    "projection": {"model": {"pre_seq_len": 3, "prefix_projection": True}},
    "lora": {"lora": {**ADAPTER, "target_modules": ["query_key_value", "dense_4h_to_h"]}},
    "rslora": {"lora": {**ADAPTER, "use_rslora": True}},
    "dora": {"lora": {**ADAPTER, "use_dora": True}},
    "biases": {"lora": {**ADAPTER, "bias": "all"}},
    "saved modules": {"lora": {**ADAPTER, "modules_to_save": ["lm_head", "final_layernorm"]}},
    "adalora": {"adalora": {**ADAPTER, "init_r": 4, "target_r": 2}},
}
"""Each as the groups of settings that switch it on."""
QUANTIZED = {
    "int8": {"quantization_bit": 8},
    "int4": {"quantization_bit": 4},
    "bnb int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True},
}
"""How fp16 weights are held under a method."""
HALVES = {"32": None, "bf16": torch.bfloat16, "16": torch.float16}


def settings(folder, method="full", *, model=None, train=None, **changes):
    """Settings that tune the folder's weights; model, lora and adalora are further values."""
    groups = {"model": {}, "lora": {}, "adalora": {}, **METHODS[method]}
    groups["model"] = groups["model"] | (model or {})
    for name, values in changes.items():
        groups[name] = groups[name] | values
    if any(name.startswith("load_in") for name in groups["model"]):
        pytest.importorskip("bitsandbytes")
    return Settings(
        TrainSettings(**{"model_name_or_path": str(folder), "precision": "32", **(train or {})}),
        DataSettings(),
        ModelSettings(**groups["model"]),
        LoraSettings(**groups["lora"]),
        AdaLoraSettings(**groups["adalora"]),
    ).completed({})


def build(chosen, *, total_steps=12, nudged=True):
    """The model to train. Nudged: as a few steps would leave it, no trained value at its start."""
    model = build_model(chosen, load_config(chosen.train.model_name_or_path),
                        total_steps=total_steps)  # fmt: skip
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad and nudged:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.05 * noise.to(parameter.dtype)
    return model


def arithmetic(chosen):
    """The context in which Lightning runs a model of these settings."""
    half = HALVES[chosen.train.precision]
    return torch.autocast("cpu", half) if half else contextlib.nullcontext()


def batch():
    """Two prompts of 5 tokens with their answers."""
    ids = torch.randint(10, 299, (2, 12), generator=torch.Generator().manual_seed(3))
    ids[:, 5], ids[:, 6] = 301, 304
    lengths = torch.tensor([6, 6])
    return {"input_ids": ids, "context_lengths": lengths, "mask_positions": lengths - 1}


def logits(model, chosen=None, *, training=False):
    """Of `batch`; under the settings' arithmetic if they are given."""
    model.train(training)
    with torch.no_grad(), arithmetic(chosen) if chosen else contextlib.nullcontext():
        return model(**batch(), use_cache=False).logits


def gradients(model, chosen):
    """{name: gradient} of every parameter, None where none arrives; dropout off."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train().zero_grad(set_to_none=True)
    labels = batch()["input_ids"].clone()
    labels[:, :7] = -100
    with arithmetic(chosen):
        loss = model(**batch(), labels=labels, use_cache=False, loss_only=True).loss
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def every_pair():
    """(method, how the weights are held), "whole" included, as far as they go together."""
    refused = {
        "full": [*QUANTIZED],
        "freeze": [*QUANTIZED],
        "dora": ["int8", "int4", "bnb int8"],  # the last one on a CPU
        "biases": ["bnb int8", "nf4"],
    }
    return [
        (method, held)
        for method in METHODS
        for held in ("whole", *QUANTIZED)
        if held not in refused.get(method, [])
    ]


def train_adalora(model, chosen, steps):
    """As the LightningModule does it; gives the ranks' sum after every step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    sums = []
    for step in range(1, steps + 1):
        gradients(model, chosen)
        optimizer.step()
        model.base_model.update_and_allocate(step)
        sums.append(sum(adapter_ranks(model).values()))
    return sums


def write_weights(folder, std=0.12):
    """A folder of fp16 weights with their tokenizer, as a training leaves it.

    With a std of 0.36 an answer depends on every token before it.
    """
    torch.manual_seed(0)
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**SHAPE)).eval()
    for name, parameter in model.named_parameters():  # new ones hide much: biases are zero
        if "layernorm.weight" not in name:
            parameter.data.normal_(std=std)
    write_tokenizer(folder)
    tokenizer = ChatGLMTokenizer(str(folder / "ice_text.model"))
    save_folder(model, model.state_dict(), tokenizer, "{}\n", str(folder / "weights"),
                dtype=torch.float16)  # fmt: skip
    return folder / "weights"


def write_tokenizer(folder):
    """An ice_text.model of single characters whose control tokens have the golden model's ids."""
    vocabulary = sentencepiece_model_pb2.ModelProto()
    for index in range(320):
        text, kind = CONTROL.get(index), vocabulary.SentencePiece.CONTROL
        if index == 0:
            text, kind = "<unk>", vocabulary.SentencePiece.UNKNOWN
        elif text is None:
            text, kind = chr(0x4E00 + index), vocabulary.SentencePiece.NORMAL
        vocabulary.pieces.add(piece=text, score=0.0, type=kind)
    vocabulary.normalizer_spec.add_dummy_prefix = False
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "ice_text.model").write_bytes(vocabulary.SerializeToString())


def with_tokenizer(source, folder):
    """A copy of a folder of the golden model, with the tokenizer that it lacks."""
    shutil.copytree(source, folder)
    write_tokenizer(folder)
    return folder


def with_equal_head(source, folder, **config):
    """A copy of a folder whose head is its embedding, as in the pretrained weights."""
    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["transformer.word_embeddings.weight"].clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **config}))
    return folder
