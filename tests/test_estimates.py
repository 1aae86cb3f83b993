"""What is estimated before a training against what it then takes."""

import io

import pytest
import torch
from safetensors.torch import save
from torch import nn

from chatglm.configuration import ChatGLMConfig
from chatglm.estimates import checkpoint_bytes, estimate_memory, state_bytes
from chatglm.model import ChatGLMForConditionalGeneration
from chatglm.optim import OPTIMIZERS, build_optimizer
from chatglm.run_settings import Settings
from chatglm.settings import (
    AdaLoraSettings,
    DataSettings,
    LoraSettings,
    ModelSettings,
    TrainSettings,
)
from chatglm.tuning.apply import apply_method

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
GMASK, SOP = 6, 7
CONFIG = {
    "vocab_size": 300, "hidden_size": 128, "inner_hidden_size": 512, "num_layers": 6,
    "num_attention_heads": 4, "max_sequence_length": 64, "bos_token_id": SOP, "eos_token_id": 8,
    "mask_token_id": 4, "gmask_token_id": GMASK, "pad_token_id": 3,
}  # fmt: skip
LOGITS = 3 * 256 * CONFIG["vocab_size"] * 4


def settings(*, lora=False, **train):
    train = {"model_name_or_path": "w", "precision": "32", "learning_rate": 1e-3, **train}
    groups = (DataSettings(), ModelSettings(), LoraSettings(with_lora=lora), AdaLoraSettings())
    return Settings(TrainSettings(**train), *groups)


def build(chosen):
    torch.manual_seed(0)
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**CONFIG)).train()
    return apply_method(model, chosen, total_steps=10)


def learn(model, *, rows=2, tokens=32):
    """The loss of a batch of rows * tokens tokens."""
    ids = torch.randint(10, 300, (rows, tokens), generator=torch.Generator().manual_seed(0))
    ids[:, 3], ids[:, 4] = GMASK, SOP
    labels = ids.masked_fill(torch.arange(tokens) < 5, -100)
    return model(input_ids=ids, labels=labels, use_cache=False, loss_only=True).loss


def kept_bytes(model):
    """What autograd keeps of a forward pass, beside the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that none is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        learn(model)
    return sum(size for pointer, (size, _) in kept.items() if pointer not in own)


def test_the_activations_are_what_autograd_keeps():
    chosen = settings(gradient_checkpointing="none")
    model = build(chosen)
    found = estimate_memory(model, model.config, chosen, num_tokens=64)
    assert found.activations - LOGITS == pytest.approx(kept_bytes(model), rel=0.05)


def test_checkpointing_keeps_less_and_the_estimate_covers_it():
    plain, chosen = settings(gradient_checkpointing="none"), settings(gradient_checkpointing="full")
    model = build(chosen)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = estimate_memory(model, model.config, chosen, num_tokens=64)
    assert kept_bytes(model) < found.activations - LOGITS
    without = estimate_memory(model, model.config, plain, num_tokens=64)
    assert found.activations < without.activations


@pytest.mark.parametrize("lora", [False, True])
def test_weights_gradients_and_total_are_those_of_the_model(lora):
    chosen = settings(lora=lora)
    model = build(chosen)
    learn(model).backward()
    found = estimate_memory(model, model.config if not lora else model.get_base_model().config,
                            chosen, num_tokens=64)  # fmt: skip
    tensors = {*model.parameters(), *model.buffers()}
    assert found.weights == sum(tensor.nbytes for tensor in tensors)
    gradients = [tensor.grad.nbytes for tensor in model.parameters() if tensor.grad is not None]
    assert found.gradients == sum(gradients)
    assert found.total == found.weights + found.gradients + found.optimizer + found.activations
    assert str(found).startswith(f"{found.total / 2**30:.2f} GiB (weights ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "paged" not in name])
def test_the_bytes_of_an_optimizer_are_what_it_keeps_for_a_value(name, dtype):
    model = nn.Linear(256, 256, bias=False, dtype=dtype)
    chosen = settings(optimizer=name).train
    optimizer = build_optimizer(model, chosen, total_steps=9, steps_per_epoch=9)["optimizer"]
    model(torch.ones(1, 256, dtype=dtype)).sum().backward()
    optimizer.step()
    state = optimizer.state[model.weight].values()
    kept = sum(value.nbytes for value in state if isinstance(value, torch.Tensor))
    assert state_bytes(name, dtype) == pytest.approx(kept / model.weight.numel(), abs=0.15)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "paged" in name])
def test_a_paged_optimizer_may_leave_the_card_altogether(name):
    assert state_bytes(name, torch.float32) == 0


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor", "paged_adamw_32bit"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_the_room_for_checkpoints_is_that_of_the_files(lora, optimizer):
    chosen = settings(lora=lora, optimizer=optimizer)
    model = build(chosen)
    built = build_optimizer(model, chosen.train, total_steps=9, steps_per_epoch=9)["optimizer"]
    learn(model).backward()
    built.step()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    saved = len(save({name: p.detach().clone() for name, p in trained.items()}))
    file = io.BytesIO()
    torch.save({"state_dict": trained, "optimizer_states": built.state_dict()}, file)
    resume = len(file.getvalue())
    expected = 2 * saved + resume + max(saved, resume)
    assert checkpoint_bytes(model, chosen) == pytest.approx(expected, rel=0.15)
    never = settings(lora=lora, optimizer=optimizer, save_every_steps=-1)
    assert checkpoint_bytes(model, never) == pytest.approx(3 * saved, rel=0.1)


def test_half_precision_halves_the_saved_weights_and_not_the_state():
    model = build(settings())
    whole = checkpoint_bytes(model, settings(save_every_steps=-1))
    assert 2 * checkpoint_bytes(model, settings(save_every_steps=-1, precision="bf16")) == whole
    resume = checkpoint_bytes(model, settings()) - 2 * whole / 3
    in_half = checkpoint_bytes(model, settings(precision="bf16")) - whole / 3
    assert in_half == resume
