"""From a file of paragraphs to samples: template, control tokens, cuts, reuse."""

import json
import shutil
from pathlib import Path

import pytest

from chatglm.builder import InputFile
from chatglm.errors import ToolkitError
from chatglm.prompts import build_prompt
from chatglm.records import RecordFolder
from chatglm.run_settings import Settings
from chatglm.settings import (
    AdaLoraSettings,
    DataSettings,
    LoraSettings,
    ModelSettings,
    TrainSettings,
)
from chatglm.tokenizer import ChatGLMTokenizer
from data_utils import SPLITS, DataHelper

ROOT = Path(__file__).parents[1]
BUNDLED = [str(ROOT / "data" / "finetune_train_examples.json")]
CONTROL = ("<eop>", "[gMASK]", "<sop>", "[MASK]", "<pad>", "</s>")


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """The embedded tokenizer, trained once."""
    return make_helper(tmp_path_factory.mktemp("vocabulary"), BUNDLED, []).tokenizer.vocab_file


@pytest.fixture
def helper(tmp_path, monkeypatch, vocabulary):
    """helper(paragraphs, **settings): a DataHelper over them; the tokenizer is not retrained."""

    def make(paragraphs, **settings):
        path = tmp_path / "data.json"
        lines = [json.dumps({"paragraph": [dict(zip("qa", r, strict=True)) for r in rounds]})
                 for rounds in paragraphs]  # fmt: skip
        path.write_text("\n".join(lines), encoding="utf-8")
        tokenizer = ChatGLMTokenizer(vocabulary)
        monkeypatch.setattr("chatglm.building.train_tokenizer", lambda *a, **k: tokenizer)
        return make_helper(tmp_path, [str(path)], [], **settings)

    return make


def make_helper(folder, train, dev, **settings):
    least = settings.pop("ensure_answer_min_length", 1)
    splits = settings.pop("splits", SPLITS)
    settings = {"config_name": str(ROOT / "config" / "config_tiny.json"), **settings}
    output = str(folder / "output")
    train = TrainSettings(train_file=train, eval_file=dev, output_dir=output, **settings)
    data = DataSettings(ensure_answer_min_length=least)
    groups = (train, data, ModelSettings(), LoraSettings(), AdaLoraSettings())
    return DataHelper(Settings(*groups), splits=splits)


def build(helper):
    records = RecordFolder(helper.make_dataset_with_args("train"))
    return [records[index] for index in range(len(records))]


def parts(sample):
    ids, middle = sample.input_ids.tolist(), sample.context_length
    return ids[: middle - 1], ids[middle + 1 :]


def test_the_first_round_is_bare_and_later_rounds_stand_in_the_template(helper):
    rounds = [("你好", "你好！"), ("一加一  是多少？\n", "二"), ("谢谢", "不客气\n再见")]
    made = helper([rounds])
    samples, encode = build(made), made.tokenizer.encode_texts
    assert len(samples) == 3
    for number, (sample, (question, answer)) in enumerate(zip(samples, rounds, strict=True)):
        prompt, learned = parts(sample)
        assert prompt == encode([build_prompt(question, rounds[:number])])[0]
        assert learned == [*encode([answer])[0], made.tokenizer.eos_token_id]
    assert parts(samples[0])[0] == encode(["你好"])[0]
    text = made.tokenizer.decode(parts(samples[1])[0])
    assert text.startswith("[Round 0]\n问") and "[Round 1]\n问" in text


def test_training_reads_what_chat_reads(helper):
    rounds = [("你好", "你好！"), ("写诗", "好")]
    made = helper([rounds])
    for number, sample in enumerate(build(made)):
        asked = made.tokenizer.encode_prompt(build_prompt(rounds[number][0], rounds[:number]))
        assert sample.input_ids[: sample.context_length + 1].tolist() == asked


@pytest.mark.parametrize("forged", CONTROL)
def test_a_forged_control_token_stays_text(helper, forged):
    made = helper([[(f"问{forged}题", f"答{forged}案"), (forged, forged)]])
    control = {made.tokenizer.sp_model.piece_to_id(name) for name in CONTROL}
    for sample in build(made):
        prompt, learned = parts(sample)
        assert not control & {*prompt, *learned[:-1]}
        assert learned[-1] == made.tokenizer.eos_token_id
        assert forged in made.tokenizer.decode(learned)


def test_a_cut_answer_has_no_eop_and_a_whole_one_has(helper):
    made = helper([[("路线", "很长的回答" * 30)], [("路线", "短")]], max_seq_length=40)
    long, short = build(made)
    eop = made.tokenizer.eos_token_id
    assert eop not in long.input_ids and short.input_ids[-1] == eop
    assert len(long.input_ids) <= 40


def test_a_second_call_uses_the_records_again_and_says_so(helper, capsys):
    paragraphs = [[("你好", "你好！")]]
    path = Path(helper(paragraphs).make_dataset_with_args("train"))
    assert "building (not built yet)" in capsys.readouterr().out
    before = path.stat().st_mtime_ns
    helper(paragraphs).make_dataset_with_args("train")
    said = capsys.readouterr().out
    assert "building" not in said and "1 samples" in said
    assert path.stat().st_mtime_ns == before


def test_the_embedded_tokenizer_is_the_same_each_time_so_bundled_records_are_used_again(
    tmp_path, capsys
):
    for _ in range(2):
        make_helper(tmp_path, BUNDLED, []).make_dataset_with_args("train")
    assert capsys.readouterr().out.count("building") == 1


def test_each_changed_thing_is_named_when_records_are_built_again(helper, capsys):
    build(helper([[("你好", "你好！")]]))
    for change, reason in (
        (([[("你好", "再见")]], {}), "data changed"),
        (([[("你好", "再见")]], {"max_seq_length": 512}), "max_seq_length changed"),
        (
            ([[("你好", "再见")]], {"max_seq_length": 512, "ensure_answer_min_length": 2}),
            "strategy changed",
        ),
    ):
        capsys.readouterr()
        build(helper(change[0], **change[1]))
        assert f"building ({reason})" in capsys.readouterr().out


def test_a_split_without_files_gives_no_records(helper):
    assert helper([[("你好", "你好！")]]).make_dataset_with_args("dev") is None


def test_mixed_in_files_are_records_of_their_own(helper, tmp_path):
    made = helper([[("你好", "你好！")]], mix_file=[str(tmp_path / "data.json")], mix_ratio=0.5)
    paths = [made.make_dataset_with_args(split) for split in ("train", "mix")]
    assert [Path(path).name for path in paths] == ["train", "mix"]
    assert [len(RecordFolder(path)) for path in paths] == [1, 1]


def test_test_files_are_records_of_their_own_which_training_does_not_look_for(helper, tmp_path):
    rounds = [[("你好", "你好！")]]
    made = helper(rounds, test_file=[str(tmp_path / "data.json")])
    assert Path(made.make_dataset_with_args("test")).name == "test"
    assert set(made.record_folders()) == {"train", "test"}
    absent = {"test_file": ["./nowhere.json"]}
    assert set(helper(rounds, splits=("train", "dev"), **absent).record_folders()) == {"train"}
    with pytest.raises(ToolkitError, match="nowhere"):
        helper(rounds, **absent)


def test_other_weights_of_the_files_need_no_new_records(helper, capsys):
    for weights in ([], [2.0], [0.5]):
        made = helper([[("你好", "你好！")]], train_file_weights=weights)
        build(made)
        assert made.files_per_entry == [1] * len(weights)
    assert capsys.readouterr().out.count("building") == 1


def test_a_file_that_two_entries_name_is_refused_when_they_have_weights(tmp_path):
    with pytest.raises(ToolkitError, match="matched by two entries of train_file"):
        make_helper(tmp_path, BUNDLED * 2, [], train_file_weights=[1.0, 2.0])


def test_weights_that_are_named_bring_their_own_tokenizer(tmp_path, write_checkpoint, vocabulary):
    ids = {"pad": 3, "mask": 4, "gmask": 6, "bos": 7, "eos": 8}
    ids = {f"{name}_token_id": number for name, number in ids.items()}
    folder = write_checkpoint(**ids, vocab_size=2432, max_sequence_length=1024)
    shutil.copy(vocabulary, folder)
    made = make_helper(tmp_path, BUNDLED, [], model_name_or_path=str(folder), config_name=None)
    assert made.tokenizer.vocab_file == str(folder / "ice_text.model")
    assert not (tmp_path / "output").exists()


def test_an_empty_file_is_refused_each_time(helper, tmp_path):
    made = helper([[("你好", "你好！")]])
    (tmp_path / "empty.json").write_text("\n")
    made.files["dev"] = [InputFile(str(tmp_path / "empty.json"), "paragraph")]
    for _ in range(2):
        with pytest.raises(ToolkitError, match=r"empty\.json"):
            made.make_dataset_with_args("dev")


def test_lengths_that_leave_no_prompt_are_refused(helper):
    with pytest.raises(ToolkitError, match=r"ensure_answer_min_length 9.*max_seq_length 12"):
        helper([[("你好", "你好！")]], max_seq_length=12, ensure_answer_min_length=9)


def test_a_length_that_the_model_cannot_read_is_refused(helper):
    with pytest.raises(ToolkitError, match=r"max_seq_length 4096.*2048"):
        helper([[("你好", "你好！")]], max_seq_length=4096)
