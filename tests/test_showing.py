"""What is printed of a sample."""

import io

import pytest
from rich.console import Console

from chatglm.showing import MOST_SHOWN, show_sample
from chatglm.strategies import Sample, SpecialTokens, truncate
from chatglm.tokenizer import train_tokenizer

QUESTION, ANSWER = "南京有什么好吃的？", "盐水鸭。\n鸭血粉丝汤。"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(
        [QUESTION, ANSWER] * 9, str(tmp_path_factory.mktemp("v")), vocab_size=400
    )


def shown(sample, tokenizer, width=100):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    show_sample(sample, tokenizer, console, title="train, sample 0 of 1")
    return console.file.getvalue()


def sample_of(tokenizer, max_seq_length=64):
    special = SpecialTokens(
        tokenizer.gmask_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
    )
    texts = tokenizer.encode_texts([QUESTION, ANSWER])
    return truncate(*texts, special, max_seq_length=max_seq_length, ensure_answer_min_length=1)


def rows(text, name):
    lines = text[text.index("piece ") :].splitlines()
    return [cell for line in lines if line.startswith(name) for cell in line.split()[1:]]


@pytest.mark.parametrize("width", [40, 100, 400])
def test_every_token_stands_there_with_what_is_learned_and_both_positions(tokenizer, width):
    sample = sample_of(tokenizer)
    text, context = shown(sample, tokenizer, width), sample.context_length
    length = len(sample.input_ids)
    assert rows(text, "id") == [str(token) for token in sample.input_ids]
    assert rows(text, "learned") == ["."] * (context + 1) + ["#"] * (length - context - 1)
    positions = [*range(context), *[context - 1] * (length - context)]
    assert rows(text, "position") == list(map(str, positions))
    blocks = [0] * context + list(range(1, length - context + 1))
    assert rows(text, "block") == list(map(str, blocks))
    assert "鸭血粉丝汤" in text and "nothing cut" in " ".join(text.split())


def test_cuts_are_said(tokenizer):
    text = shown(sample_of(tokenizer, max_seq_length=10), tokenizer, width=200)
    assert "answer cut, so without <eop>" in text


def test_the_middle_of_a_long_sample_is_left_out_and_that_is_said(tokenizer):
    ids = [*[20] * 300, tokenizer.gmask_token_id, tokenizer.bos_token_id, 21]
    text = shown(Sample(ids, 301), tokenizer)
    assert len(rows(text, "id")) == MOST_SHOWN * 3 // 2
    assert f"tokens {MOST_SHOWN} to {303 - MOST_SHOWN // 2 - 1} are not shown" in text
