"""Chat and its stream over the tiny model, with a tokenizer of one character a token."""

import logging

import pytest
import torch

from chatglm.chat import fit_prompt
from chatglm.errors import ToolkitError
from chatglm.prompts import build_prompt, clean_response

WARM = {"max_length": 256, "temperature": 2.0, "top_p": 0.95, "max_new_tokens": 24}
MARKS = {10: ",", 11: " ", 12: "a", 13: "\n", 14: "!", 15: "[[训练时间]]", 16: "[", 17: "\ufffd"}


class OneCharacterTokenizer:
    """Ids 10 to 299 are texts; [gMASK] 301 and <sop> 304 close a prompt."""

    def encode_prompt(self, text):
        return [*(20 + ord(character) % 280 for character in text), 301, 304]

    def decode(self, ids):
        return "".join(MARKS.get(i, chr(0x4E00 + i)) for i in ids if i < 300)


@pytest.fixture(scope="module")
def tokenizer():
    return OneCharacterTokenizer()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_chat_gives_the_last_of_the_stream(released, tokenizer, seed):
    answers = list(released.stream_chat(tokenizer, "你好", [("一", "二")], seed=seed, **WARM))
    assert released.chat(tokenizer, "你好", [("一", "二")], seed=seed, **WARM) == answers[-1]


@pytest.mark.parametrize("seed", range(4))
def test_every_answer_of_the_stream_begins_with_the_one_before(released, tokenizer, seed):
    before = ""
    for text, history in released.stream_chat(tokenizer, "天气", seed=seed, **WARM):
        assert text.startswith(before)
        assert history == [("天气", text)]
        before = text


def test_greedy_chat_gives_what_generate_gives(released, tokenizer):
    ids = tokenizer.encode_prompt("你好")
    answer, _ = released.chat(tokenizer, "你好", max_length=40, do_sample=False)
    output = released.generate(torch.tensor([ids]), max_length=40, do_sample=False)
    assert answer == clean_response(tokenizer.decode(output[0, len(ids) :].tolist()))


def test_beams_give_what_generate_gives(released, tokenizer):
    ids = tokenizer.encode_prompt("你好")
    options = {"max_length": 24, "num_beams": 2, "do_sample": False}
    answer, history = released.chat(tokenizer, "你好", **options)
    output = released.generate(torch.tensor([ids]), **options)
    assert answer == clean_response(tokenizer.decode(output[0, len(ids) :].tolist()))
    assert history == [("你好", answer)]


def test_the_round_is_appended_to_a_copy_of_the_history(released, tokenizer):
    history = [("一", "二")]
    answer, longer = released.chat(tokenizer, "三", history, seed=0, **WARM)
    assert longer == [("一", "二"), ("三", answer)]
    assert history == [("一", "二")]


def test_old_rounds_are_dropped_and_the_log_says_so(released, tokenizer, caplog):
    history = [(f"问{i}" * 20, f"答{i}" * 20) for i in range(3)]
    ids, dropped = fit_prompt(tokenizer, "好", history, max_length=256, max_new_tokens=24)
    assert 0 < dropped < 3
    assert ids == tokenizer.encode_prompt(build_prompt("好", history[dropped:]))
    assert len(ids) + 24 <= 256
    longer = build_prompt("好", history[dropped - 1 :])
    assert len(tokenizer.encode_prompt(longer)) + 24 > 256
    with caplog.at_level(logging.WARNING, logger="chatglm"):
        _, rounds = released.chat(tokenizer, "好", history, seed=0, **WARM)
    assert f"the oldest {dropped} of 3 rounds" in caplog.text
    assert rounds[:3] == history


def test_a_question_that_is_too_long_is_refused(released, tokenizer):
    with pytest.raises(ToolkitError, match="252 tokens"):
        released.chat(tokenizer, "长" * 250, [("一", "二")], seed=0, **WARM)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_an_answer_is_cut_at_max_new_tokens_and_the_log_says_so(
    released, tokenizer, caplog, num_beams
):
    with caplog.at_level(logging.WARNING, logger="chatglm"):
        answer, _ = released.chat(
            tokenizer, "你好", max_length=256, max_new_tokens=5, do_sample=False,
            num_beams=num_beams, eos_token_id=319,
        )  # fmt: skip
    assert 0 < len(answer) <= 5
    assert "cut after 5 tokens" in caplog.text


def test_an_answer_that_ends_by_itself_is_not_called_cut(released, tokenizer, caplog):
    ids = tokenizer.encode_prompt("你好")
    output = released.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)
    with caplog.at_level(logging.WARNING, logger="chatglm"):
        released.chat(
            tokenizer, "你好", max_length=256, max_new_tokens=5, do_sample=False,
            eos_token_id=int(output[0, -1]),
        )  # fmt: skip
    assert "cut" not in caplog.text


@pytest.mark.parametrize(
    "options",
    [{"max_length": 257}, {"max_length": 1}, {"max_length": 64, "max_new_tokens": 64},
     {"max_length": 64, "max_new_tokens": 0}, {"max_length": 64, "top_p": 2.0},
     {"max_length": 64, "num_beams": 2, "seed": 1}, {"max_length": 64, "num_beams": 0},
     {"max_length": 64, "num_beams": 2, "top_p": 2.0}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(released, tokenizer, options):
    with pytest.raises(ToolkitError):
        released.chat(tokenizer, "你好", **options)
