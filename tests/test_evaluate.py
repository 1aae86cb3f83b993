"""Evaluation of a model that knows its dev set by heart, but for the last answer."""

import json
import math
import sys
from pathlib import Path

import lightning
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model

import evaluate
from chatglm import evaluation
from chatglm.batches import Item, collate
from chatglm.command_line import run_script
from chatglm.corpus import read_paragraphs
from chatglm.errors import ToolkitError
from chatglm.evaluation import build_examples, mean_loss
from chatglm.model import ChatGLMForConditionalGeneration
from chatglm.prompts import build_prompt
from chatglm.records import RecordFolder
from chatglm.scores import METRICS, mean_scores
from chatglm.settings import TrainSettings
from chatglm.tokenizer import train_tokenizer
from chatglm.training import ChatGLMTraining, TrainingData
from chatglm.weights import load_config, load_pretrained
from data_utils import DataHelper, read_settings

ROOT = Path(__file__).parents[1]
KNOWN = [
    [("南京有什么好吃的？", "盐水鸭，还有小笼包！"), ("第一种怎么做？", "先腌，再煮。")],
    [("写一首诗", "北风敲着旧窗棂，雪落无声满小庭，炉火微红茶正暖。")],
    [("你好", "你好：有事吗？")],
]
UNKNOWN = [[("从南京到上海怎么走？", "坐高铁去，一个半小时。")]]


def write_paragraphs(path, paragraphs):
    lines = [{"paragraph": [dict(zip("qa", one, strict=True)) for one in rounds]}
             for rounds in paragraphs]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model that was trained on KNOWN alone."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = json.loads((ROOT / "config" / "config_tiny.json").read_text())
    config |= {"num_layers": 2, "hidden_size": 64, "inner_hidden_size": 128}
    (folder / "config.json").write_text(json.dumps(config))
    bundled = read_paragraphs([str(ROOT / "data" / "finetune_train_examples.json")])
    texts = [text for rounds in [*bundled, *KNOWN] for one in rounds for text in one]
    tokenizer = train_tokenizer(texts, str(folder / "tokenizer"), vocab_size=config["vocab_size"])
    torch.manual_seed(0)
    model = ChatGLMForConditionalGeneration(load_config(str(folder / "config.json")))
    samples = [one.sample for one in build_examples(KNOWN, tokenizer, max_seq_length=99)]
    items = [(Item(0, tokens_per_batch=1), sample) for sample in samples]
    batch = collate(items, pad_token_id=config["pad_token_id"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for saved in (model, tokenizer):
        saved.save_pretrained(folder / "saved")
    return str(folder / "saved")


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_pretrained(checkpoint, device="cpu")


def arguments(folder, **settings):
    settings = {
        "eval_file": write_paragraphs(folder / "dev.json", KNOWN + UNKNOWN),
        "output_file": folder / "new" / "predictions.json",
        "eval_batch_size": 3,
        "max_new_tokens": 8,
        "device": "cpu",
        **settings,
    }
    return [f"--{name}={value}" for name, value in settings.items()]


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory):
    """Folder, prediction lines and summary of one evaluation."""
    folder = tmp_path_factory.mktemp("run")
    evaluate.main(arguments(folder, checkpoint=checkpoint))
    lines = (folder / "new" / "predictions.json").read_text(encoding="utf-8").splitlines()
    summary = json.loads((folder / "new" / "predictions.scores.json").read_text())
    return folder, [json.loads(line) for line in lines], summary


def test_every_round_has_its_line_in_order_and_its_history_in_the_prompt(run):
    _, lines, _ = run
    assert [line["prompt"] for line in lines] == [
        build_prompt(question, rounds[:index])
        for rounds in KNOWN + UNKNOWN
        for index, (question, _) in enumerate(rounds)
    ]


def test_an_answer_known_by_heart_scores_100_full_width_marks_and_all(run):
    _, lines, _ = run
    for index, text in ((0, "盐水鸭,还有小笼包!"), (1, "先腌,再煮。"), (3, "你好:有事吗?")):
        assert lines[index]["prediction"] == lines[index]["label"] == text
        assert all(lines[index][name] == 100 for name in METRICS)
        assert lines[index]["finish_reason"] == "stop"
    assert lines[4]["bleu-4"] < 50


def test_an_answer_cut_at_max_new_tokens_is_marked_and_counted(run):
    _, lines, summary = run
    poem = lines[2]
    assert poem["finish_reason"] == "length"
    assert poem["label"].startswith(poem["prediction"]) and 0 < poem["bleu-4"] < 100
    cut = sum(line["finish_reason"] == "length" for line in lines)
    assert summary["cut predictions"] == cut


def test_the_summary_holds_the_means_of_the_lines_and_the_settings(run):
    folder, lines, summary = run
    assert {name: summary[name] for name in METRICS} == mean_scores(lines)
    assert summary["samples"] == len(lines) == 5 and summary["cut prompts"] == 0
    assert summary["settings"]["max_new_tokens"] == 8
    assert {path.name for path in (folder / "new").iterdir()} == {
        "predictions.json", "predictions.scores.json"
    }  # fmt: skip


def test_packed_weights_are_scored_if_asked(run, checkpoint, tmp_path, capsys):
    _, _, summary = run
    evaluate.main(arguments(tmp_path, checkpoint=checkpoint, quantization_bit=8))
    assert ", int8 weights, " in capsys.readouterr().out
    scores = json.loads((tmp_path / "new" / "predictions.scores.json").read_text())
    assert scores["settings"]["quantization_bit"] == 8
    assert scores["perplexity"] == pytest.approx(summary["perplexity"], rel=0.1)
    assert scores["perplexity"] != summary["perplexity"]


def test_the_perplexity_is_e_to_the_dev_loss_of_training(run, checkpoint, tmp_path):
    folder, _, summary = run
    flags = {"model_name_or_path": checkpoint, "output_dir": tmp_path, "eval_batch_size": 2}
    flags |= {name: json.dumps([str(folder / "dev.json")]) for name in ("train_file", "eval_file")}
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    settings, _ = read_settings(arguments, description="")
    records = RecordFolder(DataHelper(settings).make_dataset_with_args("dev"))
    data = TrainingData({"train": records, "dev": records}, pad_token_id=3)
    model, _ = load_pretrained(checkpoint, device="cpu")
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    (found,) = trainer.validate(ChatGLMTraining(model, settings, data), verbose=False)
    assert summary["perplexity"] == pytest.approx(math.exp(found["dev_loss"]), rel=1e-4)


@pytest.mark.parametrize("config", [LoraConfig(r=2), AdaLoraConfig(total_step=9)])
def test_an_adapter_scores_as_the_weights_it_is_merged_into(config, checkpoint, tmp_path):
    config.task_type, config.target_modules = "CAUSAL_LM", ["query_key_value"]
    model, tokenizer = load_pretrained(checkpoint, device="cpu")
    tuned = get_peft_model(model, config)
    config.base_model_name_or_path = ""  # so that model_name_or_path is needed
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tuned.save_pretrained(tmp_path / "adapter")
    options = {"checkpoint": tmp_path / "adapter", "model_name_or_path": checkpoint}
    evaluate.main(arguments(tmp_path, **options))
    summary = json.loads((tmp_path / "new" / "predictions.scores.json").read_text())
    examples = build_examples(KNOWN + UNKNOWN, tokenizer, max_seq_length=99)
    merged = tuned.merge_and_unload().eval()
    loss = mean_loss(merged, [one.sample for one in examples], batch_size=2)
    assert summary["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)


def test_a_model_that_says_nothing_scores_0_and_is_counted(loaded, capsys, tmp_path, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(evaluate, "load_for_inference", lambda *a, **k: (model, tokenizer))
    monkeypatch.setattr(
        evaluation, "generate_answers", lambda m, prompts, **k: [[k["eos_token_id"]]] * len(prompts)
    )
    evaluate.main(arguments(tmp_path))
    printed = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert printed["empty predictions"] == printed["samples"] == "5"
    assert all(printed[name] == "0" for name in METRICS)


def test_prompts_are_cut_as_in_training_and_counted(checkpoint, tmp_path, capsys):
    evaluate.main(arguments(tmp_path, checkpoint=checkpoint, max_seq_length=12))
    assert "cut prompts                  1\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"max_new_tokens": 2040}, "max_new_tokens; this model reads at most .* 2048"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"max_seq_length": 4}, "max_seq_length 4: allowed is 5"),
        ({"output_file": str(ROOT)}, "a folder"),
        ({"output_file": str(ROOT / "README.md" / "predictions.json")}, "cannot be written"),
        ({"checkpoint": "./nowhere"}, "./nowhere: no such folder"),
    ],
)
def test_a_mistake_is_refused_and_leaves_nothing_behind(checkpoint, tmp_path, settings, complaint):
    with pytest.raises(ToolkitError, match=complaint):
        evaluate.main(arguments(tmp_path, **{"checkpoint": checkpoint, **settings}))
    assert {path.name for path in tmp_path.rglob("*")} <= {"dev.json", "new"}


def test_a_label_that_the_model_cannot_read_is_refused(checkpoint, tmp_path):
    dev = write_paragraphs(tmp_path / "long.json", [[("写诗", "盐鸭" * 1100)]])
    options = {"checkpoint": checkpoint, "eval_file": dev}
    with pytest.raises(ToolkitError, match="2048: lower max_seq_length"):
        evaluate.main(arguments(tmp_path, max_seq_length=4096, **options))
    evaluate.main(arguments(tmp_path, max_seq_length=40, **options))


def test_weights_whose_loss_is_not_a_number_are_refused(checkpoint, tmp_path, monkeypatch):
    model, tokenizer = load_pretrained(checkpoint, device="cpu")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    monkeypatch.setattr(evaluate, "load_for_inference", lambda *a, **k: (model, tokenizer))
    with pytest.raises(ToolkitError, match="the loss is nan"):
        evaluate.main(arguments(tmp_path))


def test_the_test_files_are_scored_before_the_dev_files_and_flags_before_the_dict(monkeypatch):
    named = {}
    monkeypatch.setattr(evaluate, "GROUPS", [(TrainSettings, named, "train_info_args")])

    def chosen(*flags):
        settings = evaluate.read_settings(flags)
        return settings.scored, settings.files

    assert chosen() == ("eval_file", ["./data/finetune_dev_examples.json"])
    named |= {"eval_file": ["dev.json"], "test_file": ["test.json", "t*.jsonl"]}
    assert chosen() == ("test_file", ["test.json", "t*.jsonl"])
    assert chosen("--eval_file=d.json") == ("eval_file", ["d.json"])
    assert chosen("--eval_file=d.json", '--test_file=["a", "b"]') == ("test_file", ["a", "b"])
    named |= {"eval_file": [], "test_file": []}
    for flags in ((), ("--eval_file=",)):
        with pytest.raises(ToolkitError, match="both empty: name a file to score"):
            chosen(*flags)


def test_what_is_scored_is_said_and_kept(loaded, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_for_inference", lambda *a, **k: loaded)
    path = write_paragraphs(tmp_path / "test.json", UNKNOWN)
    evaluate.main(arguments(tmp_path, test_file=path))
    assert f"scoring test_file {path}\n" in capsys.readouterr().out
    summary = json.loads((tmp_path / "new" / "predictions.scores.json").read_text())
    assert summary["samples"] == 1 and summary["settings"]["test_file"] == path


def test_a_file_without_paragraphs_is_refused(tmp_path):
    with pytest.raises(ToolkitError, match=r"empty\.json: .*no JSON object"):
        evaluate.main(arguments(tmp_path, eval_file=write_paragraphs(tmp_path / "empty.json", [])))


def test_a_missing_file_is_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--eval_file", "./nowhere.json"])
    with pytest.raises(SystemExit, match="2"):
        run_script(evaluate.main)
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ./nowhere.json: no such file")
    assert printed.err.count("\n") == 1 and not printed.out
