import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatglm.growing_text import GrowingText
from chatglm.prompts import clean_response
from chatglm.tokenizer import ChatGLMTokenizer, train_tokenizer

WORDS = ["你好", "，", ",", "中", "文!", " ", "  ", "\n", "\t", "def f():", "𝄞", "🙂",
         "[[训练", "时间]]", "a", ":", "?", "。", "[", "]]", "3.5"]  # fmt: skip
texts = st.lists(st.sampled_from(WORDS), max_size=24).map("".join)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    lines = ["你好，我是一个人工智能助手。", "def f(): return 3.5", "[[训练时间]] 中文!"] * 3
    return train_tokenizer(lines, str(tmp_path_factory.mktemp("pieces")), vocab_size=420)


def grown(tokenizer, ids, stops=()):
    growing = GrowingText(tokenizer.decode, stops)
    parts = [growing.add(token) for token in ids]
    parts.append(growing.finish())
    assert "".join(parts) == growing.text
    return growing


@settings(max_examples=300)
@given(text=texts)
def test_the_text_is_that_of_the_whole_answer(tokenizer, text):
    ids = tokenizer.encode_texts([text])[0]
    assert grown(tokenizer, ids).text == clean_response(tokenizer.decode(ids))


@settings(max_examples=300)
@given(data=st.data())
def test_the_text_is_that_of_the_whole_answer_for_any_tokens(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    whole = clean_response(tokenizer.decode(ids))
    if not {"\ufffd", "<"} & set(whole):  # broken bytes may be split otherwise
        assert grown(tokenizer, ids).text == whole


@settings(max_examples=300)
@given(text=texts, stops=st.lists(st.sampled_from(WORDS[:10]), min_size=1, max_size=3))
def test_it_ends_before_the_first_stop_string(tokenizer, text, stops):
    ids = tokenizer.encode_texts([text])[0]
    whole = clean_response(tokenizer.decode(ids))
    growing = grown(tokenizer, ids, tuple(stops))
    if growing.is_stopped:
        assert not any(stop in growing.text for stop in stops)
        assert any(whole.startswith(growing.text + stop) for stop in stops)
    else:
        assert growing.text == whole and not any(stop in whole for stop in stops)


def test_a_long_stop_string_costs_no_more_than_the_text_so_far():
    growing = GrowingText(lambda ids: "1" * len(ids), ("1" * 10**6 + "2",))
    started = time.perf_counter()
    for _ in range(100):
        growing.add(1)
    assert time.perf_counter() - started < 1
    growing.finish()
    assert set(growing.text) == {"1"}


def test_half_a_character_waits_for_its_other_half(tokenizer):
    ids = tokenizer.encode_texts(["好🙂好"])[0]
    growing = GrowingText(tokenizer.decode)
    shown = [growing.add(token) for token in ids]
    assert "🙂" in shown and not any("\ufffd" in part for part in shown)


def test_the_real_tokenizer_gives_the_same(vocabulary_file):
    tokenizer = ChatGLMTokenizer(str(vocabulary_file))
    text = (
        "你好，这是  一个\n\n```python\ndef f(x):\n    return x  # 🙂𝄞\n```\n 1. 南京, 2. 上海!\n"
    )
    ids = tokenizer.encode_texts([text * 5])[0]
    assert grown(tokenizer, ids).text == clean_response(tokenizer.decode(ids))
