"""A short training: what it leaves behind, and how it stops."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import train
from chatglm.callbacks import LossCurve, build_trainer
from chatglm.errors import ToolkitError
from chatglm.model import ChatGLMForConditionalGeneration
from chatglm.optim import build_optimizer, parameter_groups
from chatglm.settings import TrainSettings
from chatglm.training import ChatGLMTraining
from chatglm.weights import load_config, load_pretrained

ROOT = Path(__file__).parents[1]
SAVED = {"model.safetensors", "config.json", "ice_text.model", "settings.json"}


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    """The bundled tiny config, smaller yet."""
    config = json.loads((ROOT / "config" / "config_tiny.json").read_text())
    config |= {"num_layers": 2, "hidden_size": 32, "inner_hidden_size": 64}
    path = tmp_path_factory.mktemp("shape") / "config.json"
    path.write_text(json.dumps(config))
    return str(path)


def arguments(folder, shape, **settings):
    data = ROOT / "data"
    settings = {
        "config_name": shape,
        "train_file": json.dumps([str(data / "finetune_train_examples.json")]),
        "eval_file": json.dumps([str(data / "finetune_dev_examples.json")]),
        "output_dir": folder / "output",
        "save_dir": folder / "saved",
        "max_epochs": 1,
        "precision": 32,
        **settings,
    }
    return [f"--{name}={value}" for name, value in settings.items()]


@pytest.fixture(scope="module")
def run(tmp_path_factory, shape):
    """The folder of one finished epoch."""
    folder = tmp_path_factory.mktemp("run")
    train.main(arguments(folder, shape, train_batch_size=32))
    return folder / "saved"


def test_an_epoch_leaves_the_best_and_the_last_weights(run):
    for name in ("best", "last"):
        assert {path.name for path in (run / name).iterdir()} >= SAVED
        settings = json.loads((run / name / "settings.json").read_text())
        assert settings["max_epochs"] == 1 and settings["strategy"] == "truncation"
        model, tokenizer = load_pretrained(str(run / name), device="cpu")
        assert model.config.num_layers == 2 and tokenizer.bos_token_id == 7


def test_an_epoch_leaves_a_curve_and_events(run):
    assert (run / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "events").rglob("events.out.tfevents*"))
    assert not list(run.rglob("*.part")) and not list(run.rglob("*.old"))


def test_the_trained_weights_differ_from_the_new_ones(run, shape):
    torch.manual_seed(TrainSettings().seed)
    new = ChatGLMForConditionalGeneration(load_config(shape)).state_dict()
    trained = load_pretrained(str(run / "last"), device="cpu")[0].state_dict()
    assert any(not torch.equal(new[name].cpu(), trained[name]) for name in new)


def test_a_loss_that_is_not_a_number_stops_with_step_and_samples(tmp_path, shape, monkeypatch):
    def poisoned(settings, config):
        model = ChatGLMForConditionalGeneration(config)
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))
        return model

    monkeypatch.setattr(train, "build_model", poisoned)
    with pytest.raises(ToolkitError, match=r"nan at step 1 on samples \[\d+, \d+, \d+\]"):
        train.main(arguments(tmp_path, shape, train_batch_size=3))
    assert not (tmp_path / "saved" / "best").exists()
    assert not (tmp_path / "saved" / "last").exists()


def test_norms_and_biases_do_not_decay_and_all_else_does(shape):
    model = ChatGLMForConditionalGeneration(load_config(shape))
    decaying, others = parameter_groups(model, 0.1)
    assert decaying["weight_decay"] == 0.1 and others["weight_decay"] == 0.0
    ids = {id(parameter) for parameter in others["params"]}
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        assert (id(parameter) in ids) == (name.endswith("bias") or isinstance(owner, nn.LayerNorm))
    assert len(decaying["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_frozen_parameters_are_in_no_group(shape):
    model = ChatGLMForConditionalGeneration(load_config(shape)).requires_grad_(False)
    assert [group["params"] for group in parameter_groups(model, 0.1)] == [[], []]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_the_rate_rises_in_the_warm_up_to_its_peak(kind):
    settings = TrainSettings(scheduler_type=kind, learning_rate=1.0, warmup_steps=5)
    optimizer, schedule = build_optimizer(nn.Linear(2, 2), settings, total_steps=100)
    rates = []
    for _ in range(100):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert max(rates) == pytest.approx(1.0)
    if kind != "constant":
        assert rates[:6] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
        assert rates[5:] == sorted(rates[5:], reverse=True) and rates[-1] < 0.05


class Constant(nn.Module):
    """A model whose loss is always 2; stops the training at the call named."""

    def __init__(self, interrupt_at=None):
        super().__init__()
        self.weight, self.calls, self.interrupt_at = nn.Parameter(torch.ones(1)), 0, interrupt_at

    def forward(self, **batch):
        self.calls += 1
        if self.calls == self.interrupt_at:
            raise KeyboardInterrupt
        return type("Output", (), {"loss": 2 + 0 * self.weight.sum()})


def fit(folder, model, *, saves, **settings):
    settings = TrainSettings(save_dir=str(folder), precision="32", **settings)
    batch = {name: torch.ones(2, 3, dtype=torch.long)
             for name in ("input_ids", "labels", "context_lengths", "mask_positions")}  # fmt: skip
    batch |= {"sample_index": torch.arange(2), "num_tokens": torch.tensor(6)}
    loader = torch.utils.data.DataLoader([batch] * 4, batch_size=None)
    trainer = build_trainer(settings, lambda name: saves.append(Path(name).name), has_dev_set=False)
    trainer.fit(ChatGLMTraining(model, settings), loader)
    return trainer


def test_the_curve_shows_the_loss_itself_when_batches_are_accumulated(tmp_path):
    trainer = fit(tmp_path, Constant(), saves=[], max_epochs=1, gradient_accumulation_steps=2)
    curve = next(c for c in trainer.callbacks if isinstance(c, LossCurve))
    assert [loss for _, loss in curve.train] == pytest.approx([2.0] * len(curve.train))


def test_an_interrupted_training_leaves_its_last_weights(tmp_path):
    saves: list[str] = []
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(tmp_path, Constant(interrupt_at=3), saves=saves, max_epochs=2)
    assert saves == ["last"]


def test_each_epoch_saves_last_once_and_best_only_when_the_loss_fell(tmp_path):
    saves: list[str] = []
    fit(tmp_path, Constant(), saves=saves, max_epochs=3)
    assert saves == ["best", "last", "last", "last"]
