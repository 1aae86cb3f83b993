"""Every optimizer learns, decays and resumes; every schedule follows its formula."""

import io
import math
import sys
from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn

from chatglm.errors import ToolkitError
from chatglm.optim import (
    OPTIMIZERS,
    SCHEDULES,
    build_optimizer,
    parameter_groups,
    schedule_options,
    warmup_steps,
)
from chatglm.settings import TrainSettings

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
on_both_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
PEAK, WARMUP, TOTAL, PER_EPOCH = 2.0, 4, 44, 8
OPTIONS = {
    "CAWR": {"rewarm_epoch_num": 0.5, "T_mult": 2, "eta_min": 0.1},
    "CAL": {"rewarm_epoch_num": 0.75, "eta_min": 0.1},
    "Step": {"decay_steps": 3, "decay_rate": 0.5},
}
STEPPED = [kind for kind in SCHEDULES if kind != "ReduceLROnPlateau"]


def build(model, *, optimizer="adamw", scheduler_type="constant", rate=0.01, **settings):
    settings = TrainSettings(
        optimizer=optimizer, scheduler_type=scheduler_type, learning_rate=rate, **settings
    )
    built = build_optimizer(model, settings, total_steps=TOTAL, steps_per_epoch=PER_EPOCH)
    return built["optimizer"], built["lr_scheduler"]["scheduler"]


class Regression(nn.Module):
    """Learns the first of 64 numbers; its matrix is large enough for 8-bit state (4096)."""

    def __init__(self, device="cpu", bias=True):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.inner, self.outer = nn.Linear(64, 64, bias=bias), nn.Linear(64, 1, bias=bias)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1, generator=generator)
        self.input = torch.randn(32, 64, generator=generator).to(device)
        self.to(device)

    def train_steps(self, count, optimizer, schedule):
        """The loss before each step."""
        losses = []
        for _ in range(count):
            loss = (self.outer(self.inner(self.input).tanh())[:, 0] - self.input[:, 0]).square()
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.mean().item())
        return losses


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_resumes_exactly(device, **settings):
    model = Regression(device)
    parts = build(model, **settings)
    model.train_steps(3, *parts)
    saved = through_a_file([part.state_dict() for part in (model, *parts)])
    model.train_steps(3, *parts)
    resumed = Regression(device)
    resumed_parts = build(resumed, **settings)
    for part, state in zip((resumed, *resumed_parts), saved, strict=True):
        part.load_state_dict(state)
    resumed.train_steps(3, *resumed_parts)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def rates(kind, *, steps=TOTAL, **settings):
    optimizer, schedule = build(
        nn.Linear(2, 2), scheduler_type=kind, rate=PEAK, scheduler=OPTIONS.get(kind, {}), **settings
    )
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return values


def formula(kind, step, length):
    """The rate so many steps after the warm-up, of length steps after it."""

    def cosine(position, lowest=0.0):
        return lowest + (PEAK - lowest) * (1 + math.cos(math.pi * position)) / 2

    if kind == "CAWR":  # cycles of 4, 8, 16, ... steps
        cycle = math.floor(math.log2(step / 4 + 1))
        return cosine((step - 4 * (2**cycle - 1)) / (4 * 2**cycle), lowest=0.1)
    return {
        "linear": PEAK * (1 - step / length),
        "WarmupCosine": cosine(step / length),
        "cosine": cosine(step / length),
        "constant": PEAK,
        "CAL": cosine(step / 6, lowest=0.1),
        "Step": PEAK * 0.5 ** (step // 3),
    }[kind]


def test_the_settings_allow_exactly_the_names_that_can_be_built():
    hints = get_type_hints(TrainSettings)
    assert set(get_args(hints["optimizer"])) == set(OPTIMIZERS)
    assert set(get_args(hints["scheduler_type"])) == set(SCHEDULES)


@on_both_devices
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_a_model_of_matrices_only(name, device):
    model = Regression(device, bias=False)
    losses = model.train_steps(20, *build(model, optimizer=name))
    assert losses[-1] < 0.8 * losses[0]


@on_both_devices
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_decays_matrices_alone_and_by_the_rate(name, device):
    model = Regression(device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    optimizer, _ = build(model, optimizer=name, weight_decay=0.5, warmup_steps=0)
    optimizer.step()
    for key, tensor in model.state_dict().items():
        if key.endswith("bias"):
            assert torch.equal(tensor, before[key])
        elif name == "adam":  # its decay is a gradient, which it brings to length 1
            expected = before[key] - 0.01 * before[key].sign()
            torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-3)
        else:
            torch.testing.assert_close(tensor, before[key] * (1 - 0.01 * 0.5))


@on_both_devices
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_resumes_from_a_file_to_the_bit(name, device):
    assert_resumes_exactly(device, optimizer=name, weight_decay=0.1)


@on_both_devices
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "bit" in name])
def test_the_optimizers_of_bitsandbytes_learn_like_the_plain_ones(name, device):
    plain, small = Regression(device), Regression(device)
    expected = plain.train_steps(20, *build(plain, optimizer="lion" if "lion" in name else "adamw"))
    optimizer, schedule = build(small, optimizer=name)
    assert small.train_steps(20, optimizer, schedule) == pytest.approx(expected, abs=0.02)
    stored = optimizer.state[small.inner.weight]["state1"].dtype
    assert stored == (torch.uint8 if "8bit" in name else torch.float32)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ToolkitError, match="lion needs pytorch_optimizer: pip install"):
        build(nn.Linear(2, 2), optimizer="lion")


def test_norms_and_biases_do_not_decay_and_all_else_does(released):
    decaying, others = parameter_groups(released, 0.1)
    assert decaying["weight_decay"] == 0.1 and others["weight_decay"] == 0.0
    ids = {id(parameter) for parameter in others["params"]}
    for name, parameter in released.named_parameters():
        owner = released.get_submodule(name.rpartition(".")[0])
        assert (id(parameter) in ids) == (name.endswith("bias") or isinstance(owner, nn.LayerNorm))
    assert len(decaying["params"]) + len(others["params"]) == len(list(released.parameters()))


def test_frozen_parameters_are_in_no_group():
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    groups = parameter_groups(model, 0.1)
    assert [len(group["params"]) for group in groups] == [1, 1]
    assert groups[0]["params"][0] is model[1].weight


@pytest.mark.parametrize("kind", STEPPED)
def test_a_schedule_rises_from_0_to_the_peak_and_then_follows_its_formula(kind):
    values = rates(kind, warmup_steps=WARMUP)
    assert values[:WARMUP] == pytest.approx([PEAK * step / WARMUP for step in range(WARMUP)])
    assert values[WARMUP] == PEAK
    expected = [formula(kind, step, TOTAL - WARMUP) for step in range(TOTAL - WARMUP)]
    assert values[WARMUP:] == pytest.approx(expected)


@pytest.mark.parametrize("kind", STEPPED)
def test_without_a_warm_up_a_schedule_starts_at_the_peak(kind):
    expected = [formula(kind, step, TOTAL) for step in range(TOTAL)]
    assert rates(kind, warmup_steps=0) == pytest.approx(expected)


@pytest.mark.parametrize("warmup", [2, 4])
@pytest.mark.parametrize("kind", STEPPED)
def test_a_schedule_resumes_to_the_bit_in_and_after_the_warm_up(kind, warmup):
    options = OPTIONS.get(kind, {})
    assert_resumes_exactly("cpu", scheduler_type=kind, scheduler=options, warmup_steps=warmup)


def test_the_default_cycle_is_an_epoch_and_a_shorter_one_than_a_step_is_a_step():
    optimizer, schedule = build(nn.Linear(2, 2), scheduler_type="CAWR", rate=PEAK, warmup_steps=0)
    seen = []
    for _ in range(PER_EPOCH + 1):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert [step for step, rate in enumerate(seen) if rate == PEAK] == [0, PER_EPOCH]
    options = {"rewarm_epoch_num": 0.01}
    optimizer, schedule = build(
        nn.Linear(2, 2), scheduler_type="CAWR", rate=PEAK, warmup_steps=0, scheduler=options
    )
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == PEAK


def test_a_plateau_starts_at_the_peak_and_falls_when_patience_is_at_an_end():
    optimizer, schedule = build(
        nn.Linear(2, 2),
        scheduler_type="ReduceLROnPlateau",
        rate=PEAK,
        scheduler={"factor": 0.5, "patience": 1},
    )
    seen = []
    for dev_loss in (3.0, 2.0, 2.0, 2.0, 1.0):
        schedule.step(dev_loss)
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen == [PEAK, PEAK, PEAK, PEAK / 2, PEAK / 2]


def test_the_warm_up_takes_a_tenth_of_the_steps_at_most():
    settings = TrainSettings(warmup_steps=20)
    assert [warmup_steps(settings, total) for total in (9, 100, 200, 1000)] == [0, 10, 20, 20]
    on_plateau = TrainSettings(warmup_steps=20, scheduler_type="ReduceLROnPlateau")
    assert warmup_steps(on_plateau, 1000) == 0


def test_options_left_out_have_defaults_and_a_whole_float_is_a_whole_number():
    settings = TrainSettings(scheduler_type="CAWR", scheduler={"T_mult": 2.0})
    options = schedule_options(settings)
    assert options == {"rewarm_epoch_num": 1.0, "T_mult": 2, "eta_min": 0.0}
    assert type(options["T_mult"]) is int


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("CAWR", {"T_mul": 2}, "CAWR has no option 'T_mul'.* Did you mean 'T_mult'"),
        ("CAL", {"T_mult": 2}, "allowed: rewarm_epoch_num, eta_min"),
        ("linear", {"eta_min": 0.1}, "allowed: none"),
        ("Step", {"verbose": False}, "'verbose'.* It has no effect"),
        ("CAWR", {"T_mult": 1.5}, "T_mult 1.5; allowed: a whole number above 0"),
        ("CAWR", {"T_mult": True}, "T_mult True; allowed: a whole number"),
        ("CAL", {"rewarm_epoch_num": 0}, "rewarm_epoch_num 0; allowed: a number above 0"),
        ("CAL", {"rewarm_epoch_num": math.inf}, "rewarm_epoch_num inf; allowed: a number above 0"),
        ("CAL", {"eta_min": -0.1}, "eta_min -0.1; allowed: a number from 0"),
        ("Step", {"decay_rate": "0.9"}, "decay_rate '0.9'; allowed: a number between 0 and 1"),
        ("Step", {"decay_steps": 0}, "decay_steps 0; allowed: a whole number above 0"),
        ("ReduceLROnPlateau", {"factor": 1.0}, "factor 1.0; allowed: a number between 0 and 1"),
        ("ReduceLROnPlateau", {"patience": math.nan}, "patience nan; allowed: a whole number"),
    ],
)
def test_an_option_that_a_schedule_lacks_or_cannot_use_is_refused(kind, options, message):
    with pytest.raises(ToolkitError, match=message):
        schedule_options(TrainSettings(scheduler_type=kind, scheduler=options))
