"""A short training: what it leaves behind, when it looks at the dev set, and how it stops."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from peft.tuners.adalora import AdaLoraModel
from torch.optim.lr_scheduler import ReduceLROnPlateau

import train
from chatglm import optim
from chatglm.callbacks import LossCurve
from chatglm.errors import ToolkitError
from chatglm.model import ChatGLMForConditionalGeneration
from chatglm.saved import read_settings_json
from chatglm.training import ChatGLMTraining
from chatglm.weights import load_config, load_pretrained
from models import load_for_inference
from tests.tiny_run import arguments, leftovers, stay_on_the_cpu, weights, write_inputs

SAVED = {"model.safetensors", "config.json", "ice_text.model", "settings.json"}
MULTIPLE = {"train_batch_size": 1, "eval_every_steps": 3}  # of 9 steps an epoch


@pytest.fixture(scope="module", autouse=True)
def no_gpu():
    with pytest.MonkeyPatch.context() as patch:
        stay_on_the_cpu(patch)
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture
def fit(tmp_path, inputs, monkeypatch):
    """fit(**settings): the Trainer after a training into tmp_path/saved."""

    def run(**settings):
        trainers = []

        def build(*args, **options):
            trainers.append(build_trainer(*args, **options))
            return trainers[0]

        monkeypatch.setattr(train, "build_trainer", build)
        train.main(arguments(inputs, tmp_path / "saved", **settings))
        return trainers[0]

    build_trainer = train.build_trainer
    return run


@pytest.fixture
def saves(monkeypatch):
    """Names of the folders in the order in which they are saved; none is written."""
    names = []
    monkeypatch.setattr(train, "save_and_check", lambda *args: names.append(Path(args[-1]).name))
    return names


@pytest.fixture
def curves(monkeypatch):
    """(train, dev) points of each curve that is drawn."""
    drawn = []
    monkeypatch.setattr(LossCurve, "draw", lambda self: drawn.append((self.train, self.dev)))
    return drawn


@pytest.fixture(scope="module")
def run(tmp_path_factory, inputs):
    """The folder of two finished epochs."""
    folder = tmp_path_factory.mktemp("run") / "saved"
    train.main(arguments(inputs, folder, max_epochs=2))
    return folder


# What is left behind.


def test_a_training_leaves_the_best_and_the_last_weights_and_its_settings(run):
    for name in ("best", "last"):
        assert {path.name for path in (run / name).iterdir()} >= SAVED
        settings = read_settings_json(str(run / name))
        assert settings["max_epochs"] == 2 and settings["strategy"] == "truncation"
        assert settings["learning_rate"] == 3e-3 and settings["lora_info_args"]["r"] == 8
        model, tokenizer = load_pretrained(str(run / name), device="cpu")
        assert model.config.num_layers == 2 and tokenizer.bos_token_id == 7


def test_a_training_leaves_a_curve_events_and_its_parameters_and_nothing_half_done(run):
    assert (run / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "events").rglob("events.out.tfevents*"))
    table = (run / "parameters.txt").read_text()
    assert re.search(r"trained +77,824 +float32 +word_embeddings\.weight", table)
    assert "trained 172,800 of 172,800 stored values (100.000%)" in table
    assert not leftovers(run) and not (run / "resume").exists()


def test_the_trained_weights_differ_from_the_new_ones(run, inputs):
    torch.manual_seed(42)
    new = ChatGLMForConditionalGeneration(load_config(str(inputs / "config.json"))).state_dict()
    trained = load_pretrained(str(run / "last"), device="cpu")[0].state_dict()
    assert all(not torch.equal(new[name].cpu(), trained[name]) for name in new)


def test_the_same_command_gives_the_same_weights_and_another_seed_others(run, fit, tmp_path):
    fit(max_epochs=2)
    assert weights(tmp_path / "saved") == weights(run)
    fit(max_epochs=2, seed=1)
    assert weights(tmp_path / "saved").keys() == weights(run).keys()
    assert not weights(tmp_path / "saved").items() & weights(run).items()


def test_an_epoch_is_a_line_with_both_losses_and_the_perplexity(fit, capsys):
    fit(max_epochs=2)
    lines = re.findall(
        r"epoch (\d): train loss ([\d.]+), dev loss ([\d.]+), perplexity ([\d.]+)\n",
        capsys.readouterr().out,
    )
    assert [line[0] for line in lines] == ["1", "2"]
    for _, _, loss, perplexity in lines:
        assert float(perplexity) == pytest.approx(math.exp(float(loss)), rel=1e-3)


@pytest.mark.parametrize("eval_every_steps", [None, 3, 5])
def test_the_summary_has_the_losses_of_the_end(fit, tmp_path, capsys, eval_every_steps):
    fit(max_epochs=2, gradient_accumulation_steps=2, eval_every_steps=eval_every_steps)
    shown = capsys.readouterr().out
    train_loss = float(re.findall(r"train loss ([\d.]+)", shown)[-1])
    dev_loss = float(re.findall(r"dev loss ([\d.]+)", shown)[-1])
    summary = json.loads((tmp_path / "saved" / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["tokens_per_second"] > 0
    assert (summary["train_loss"], summary["dev_loss"]) == pytest.approx(
        (train_loss, dev_loss), abs=1e-4
    )


def test_the_train_loss_of_an_epoch_is_the_mean_over_its_learned_tokens(fit, capsys, saves):
    fit(max_epochs=3, learning_rate=0.0)
    fit(train_batch_size=9, learning_rate=0.0)
    losses = re.findall(r"epoch \d: train loss ([\d.]+)", capsys.readouterr().out)
    assert len(losses) == 4 and len(set(losses)) == 1


@pytest.mark.parametrize("has_dev", [True, False])
def test_each_epoch_saves_last_once_and_best_only_when_the_loss_fell(fit, saves, has_dev):
    options = {} if has_dev else {"eval_file": "[]"}
    fit(max_epochs=3, learning_rate=0.0, train_batch_size=9, **options)
    assert saves == ["best", "last", "last", "last"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_without_a_dev_set_the_best_is_by_the_train_loss(fit, saves, capsys, accumulate):
    options = {"eval_file": "[]", "gradient_accumulation_steps": accumulate}
    fit(max_epochs=2, learning_rate=0.01, **options)
    assert saves == ["best", "last", "best", "last"]
    assert "dev loss" not in capsys.readouterr().out


def test_the_curve_shows_the_loss_itself_when_batches_are_accumulated(fit, curves, saves):
    fit(learning_rate=0.0)
    fit(learning_rate=0.0, gradient_accumulation_steps=2)
    (single, dev), (accumulated, same_dev) = curves
    assert len(single) == 5 and all(6 < loss < 9 for _, loss in single)
    assert [loss for _, loss in accumulated] == pytest.approx([loss for _, loss in single])
    assert [loss for _, loss in dev] == pytest.approx([loss for _, loss in same_dev])


def test_an_update_is_the_same_however_it_is_accumulated(fit, tmp_path):
    found = []
    for size, accumulate in ((4, 1), (2, 2), (1, 4)):
        fit(train_batch_size=size, gradient_accumulation_steps=accumulate, optimizer="adafactor")
        model, _ = load_pretrained(str(tmp_path / "saved" / "last"), device="cpu")
        found.append(model.state_dict())
    for name, tensor in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[name], tensor, atol=1e-5, rtol=0)


def test_a_weighted_file_is_trained_as_often_as_is_said(
    fit, inputs, monkeypatch, saves, capsys, tmp_path
):
    seen = []

    def remember(self, batch, batch_index):
        seen.extend(batch["sample_index"].tolist())

    monkeypatch.setattr(ChatGLMTraining, "on_train_batch_start", remember)
    train_file = [str(inputs / "train.json"), str(inputs / "mi*.json")]
    options = {"train_file": json.dumps(train_file), "output_dir": tmp_path / "output"}
    assert fit(**options, train_file_weights="[0.67, 2]").global_step == 15
    times = [seen.count(index) for index in range(21)]
    assert sorted(times[:9]) == [0] * 3 + [1] * 6 and times[9:] == [2] * 12
    said = capsys.readouterr().out
    assert f"{train_file[0]}: 9 samples x 0.67 = 6 an epoch\n" in said
    assert f"{train_file[1]}: 12 samples x 2 = 24 an epoch\n" in said


@pytest.mark.parametrize("packing", ["true", "false"])
def test_the_start_says_how_full_batches_are(fit, capsys, packing):
    fit(max_steps=1, packing=packing)
    said = capsys.readouterr().out
    words = "packing: all tokens of a batch are real" if packing == "true" else "without packing"
    assert re.search(rf"{words}.*\b[1-9]\d?% of the tokens of padded batches are real", said)


def test_packed_and_padded_batches_train_the_same(fit):
    losses = [fit(max_epochs=2, packing=on).callback_metrics for on in ("true", "false")]
    for name in ("train_loss", "dev_loss"):
        assert float(losses[0][name]) == pytest.approx(float(losses[1][name]), rel=1e-4)


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_a_fused_optimizer_clips_and_learns_as_another_does(fit, monkeypatch, precision):
    settings = {"max_epochs": 2, "max_grad_norm": 0.01, "precision": precision}
    expected = fit(**settings)
    monkeypatch.setattr(optim, "FUSED_ON", ("cpu",))
    found = fit(**settings)
    kinds = [trainer.optimizers[0].defaults["fused"] for trainer in (expected, found)]
    assert kinds == [None, True]
    for name in ("train_loss", "dev_loss"):
        losses = [float(trainer.callback_metrics[name]) for trainer in (expected, found)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_drop_last_says_what_it_leaves_out_and_refuses_to_leave_nothing(fit, saves, capsys):
    assert fit(max_epochs=2, drop_last="true").global_step == 8
    line = "drop_last: 1 of the 9 samples of each epoch are left out\n"
    assert capsys.readouterr().out.count(line) == 1
    with pytest.raises(ToolkitError, match=r"the 9 samples of an epoch: a step takes 10 \(train_b"):
        fit(train_batch_size=5, gradient_accumulation_steps=2, drop_last="true")


def test_the_test_files_are_not_read_in_training(fit, inputs, saves):
    fit(max_steps=1, test_file='["./nowhere.json"]')
    assert not (inputs / "output" / "test").exists()


def test_mixed_in_data_is_trained_with_the_others(fit, inputs, monkeypatch, saves):
    seen = []

    def remember(self, batch, batch_index):
        seen.extend(batch["sample_index"].tolist())

    monkeypatch.setattr(ChatGLMTraining, "on_train_batch_start", remember)
    mix = json.dumps([str(inputs / "mix.json")])
    trainer = fit(max_epochs=2, mix_file=mix, mix_ratio=0.25)
    assert trainer.global_step == 12  # 9 samples and 3 of 9, twice
    assert sorted(index for index in seen if index < 9) == sorted([*range(9), *range(9)])
    mixed = [index for index in seen if index >= 9]
    assert len(mixed) == 6 and all(index < 18 for index in mixed)
    assert sorted(mixed[:3]) != sorted(mixed[3:])


# The dev set.


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_epochs": 3}, [5, 10, 15]),
        ({"max_epochs": 2, "max_steps": 7}, [5, 7]),
        ({"max_epochs": 2, "max_steps": 5}, [5]),
        ({"max_epochs": 2, "eval_every_steps": 4}, [4, 8, 10]),
        ({"max_epochs": 2, "eval_every_steps": 5}, [5, 10]),
        (
            {"max_epochs": 3, "eval_every_steps": 2, "gradient_accumulation_steps": 2},
            [2, 4, 6, 8, 9],
        ),
        ({"max_epochs": 1, "eval_every_steps": 50}, [5]),
        ({"max_epochs": 2, "max_steps": 7, "eval_every_steps": 3}, [3, 6, 7]),
    ],
)
def test_the_dev_set_is_run_when_it_is_due_and_at_the_end(fit, saves, curves, settings, expected):
    trainer = fit(**settings, learning_rate=0.01)
    assert [step for step, _ in curves[-1][1]] == expected
    assert trainer.global_step == expected[-1]
    losses = [loss for _, loss in curves[-1][1]]
    lowest = [loss for i, loss in enumerate(losses) if loss < min([math.inf, *losses[:i]])]
    assert saves.count("best") == len(lowest) > 0


def test_the_picture_has_the_dev_loss_of_the_end(fit, saves, monkeypatch):
    drawn = []
    monkeypatch.setattr(LossCurve, "draw", lambda self: drawn.append([*self.dev]))
    fit(max_epochs=2, eval_every_steps=4)
    assert [step for step, _ in drawn[-1]] == [4, 8, 10]


@pytest.mark.parametrize("eval_batch_size", [1, 2, 8])
def test_the_dev_loss_is_the_mean_over_all_learned_tokens(fit, curves, saves, eval_batch_size):
    fit(learning_rate=0.0, eval_batch_size=5)
    fit(learning_rate=0.0, eval_batch_size=eval_batch_size)
    assert curves[1][1][0][1] == pytest.approx(curves[0][1][0][1], abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "dev_runs"), [({"max_epochs": 4}, 4), ({"max_epochs": 2, **MULTIPLE}, 6)]
)
def test_a_plateau_is_judged_once_a_dev_run(fit, monkeypatch, saves, curves, settings, dev_runs):
    judged = []
    step = ReduceLROnPlateau.step
    monkeypatch.setattr(
        ReduceLROnPlateau, "step", lambda self, loss: (judged.append(float(loss)), step(self, loss))
    )
    options = json.dumps({"factor": 0.5, "patience": 1})
    trainer = fit(
        scheduler_type="ReduceLROnPlateau", scheduler=options, learning_rate=1e-7, **settings
    )
    assert judged == [loss for _, loss in curves[-1][1]] and len(judged) == dev_runs
    # Nothing falls by the threshold: the first run is the best, each second one after it cuts.
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-7 * 0.5 ** ((dev_runs - 1) // 2)


@pytest.mark.parametrize(
    ("settings", "steps"), [({"max_epochs": 9}, 15), ({"max_epochs": 9, **MULTIPLE}, 9)]
)
def test_early_stopping_waits_for_so_many_dev_losses_without_a_new_lowest(
    fit, saves, curves, settings, steps
):
    trainer = fit(early_stopping_patience=2, learning_rate=0.0, **settings)
    assert trainer.global_step == steps
    assert len(curves[-1][1]) == 3
    assert saves[-1] == "last" and saves.count("best") == 1


# How it stops.


def poison(model, name="transformer.layers.1.mlp.dense_h_to_4h.weight"):
    with torch.no_grad():
        dict(model.named_parameters())[name].flatten()[5] = float("nan")


def test_a_poisoned_model_stops_with_step_layer_and_samples_and_leaves_no_weights(
    fit, tmp_path, monkeypatch
):
    def poisoned(*args, **options):
        model = build_model(*args, **options)
        poison(model)
        return model

    build_model = train.build_model
    monkeypatch.setattr(train, "build_model", poisoned)
    expected = (
        r"nan at step 1, first in transformer\.layers\.1\.mlp\.dense_h_to_4h, on samples \[\d"
    )
    with pytest.raises(ToolkitError, match=expected):
        fit()
    assert not [name for name in ("best", "last", "resume") if (tmp_path / "saved" / name).exists()]


def test_a_model_that_breaks_later_leaves_the_weights_of_before(fit, tmp_path, monkeypatch):
    def break_at_step_7(self, batch, batch_index):
        if self.global_step == 7:
            poison(self.model)

    monkeypatch.setattr(ChatGLMTraining, "on_train_batch_start", break_at_step_7)
    with pytest.raises(ToolkitError, match=r"nan at step 8, first in .*dense_h_to_4h"):
        fit(max_epochs=2)
    for name in ("best", "last"):
        model, _ = load_pretrained(str(tmp_path / "saved" / name), device="cpu")
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert (tmp_path / "saved" / "resume" / "state.ckpt").exists()
    assert not leftovers(tmp_path)


def test_a_parameter_that_the_loss_does_not_reach_stops_before_the_first_step(
    fit, tmp_path, monkeypatch
):
    def with_another(*args, **options):
        model = build_model(*args, **options)
        model.transformer.register_parameter("unused", torch.nn.Parameter(torch.ones(2)))
        return model

    build_model = train.build_model
    monkeypatch.setattr(train, "build_model", with_another)
    with pytest.raises(ToolkitError, match=r"no gradient reaches transformer\.unused"):
        fit()
    assert not (tmp_path / "saved" / "last").exists()


def test_an_interrupted_training_leaves_its_last_weights(fit, saves, monkeypatch):
    def interrupt_at_step_3(self, batch, batch_index):
        if self.global_step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(ChatGLMTraining, "on_train_batch_start", interrupt_at_step_3)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit()
    assert saves == ["last"]


def test_a_disk_without_room_is_refused_before_the_first_step(fit, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "checkpoint_bytes", lambda *args: 2**60)
    with pytest.raises(ToolkitError, match=r"saved: .* GiB are free, but the checkpoints"):
        fit()
    assert not (tmp_path / "saved" / "last").exists()


# AdaLoRA's ranks.


@pytest.mark.parametrize("accumulate", [1, 2])
def test_adalora_allots_ranks_every_optimizer_step_down_to_its_target(
    run, fit, tmp_path, monkeypatch, accumulate
):
    driven = []
    allocate = AdaLoraModel.update_and_allocate
    monkeypatch.setattr(
        AdaLoraModel,
        "update_and_allocate",
        lambda self, step: (driven.append(step), allocate(self, step)),
    )
    trainer = fit(
        config_name=None, model_name_or_path=run / "last", max_epochs=3,
        gradient_accumulation_steps=accumulate,
        **{"adalora_info_args.with_lora": "true", "adalora_info_args.target_r": 2,
           "adalora_info_args.init_r": 4,
           "adalora_info_args.target_modules": '["query_key_value", "dense"]'},
    )  # fmt: skip
    assert trainer.global_step == (15 if accumulate == 1 else 9)
    assert driven == list(range(trainer.global_step))
    ranks = json.loads((tmp_path / "saved" / "summary.json").read_text())["ranks"]
    assert len(ranks) == 4 and sum(ranks.values()) == 4 * 2
    assert len(set(ranks.values())) > 1
    model, _ = load_for_inference(str(tmp_path / "saved" / "last"), device="cpu")
    sizes = [p.numel() for name, p in model.named_parameters() if ".lora_E." in name]
    assert sorted(sizes) == sorted(ranks.values())
