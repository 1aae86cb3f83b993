"""The tokenizer against what the released one makes of 45 texts. Needs the released vocabulary."""

import copy
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from chatglm.errors import ToolkitError
from chatglm.tokenizer import ChatGLMTokenizer, mark_whitespace, unmark_whitespace

from .conftest import GOLDEN, write_config

EXPECTED = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))
CASES = EXPECTED["cases"]
CONTROL = ["<eop>", "[gMASK]", "<sop>", "[MASK]", "<pad>"]
NAMES = {"bos": "bos", "eos": "eos", "pad": "pad", "gmask": "gmask", "mask": "mask", "end": "end"}


@pytest.fixture(scope="module")
def tokenizer(vocabulary_file):
    return ChatGLMTokenizer(str(vocabulary_file))


@given(st.text(alphabet=" \n\tab中", max_size=200))
def test_marked_whitespace_comes_back(text):
    marked = mark_whitespace(text)
    assert unmark_whitespace(marked) == text
    assert not set("\n\t") & set(marked)
    assert "  " not in marked


def test_runs_of_spaces_are_cut_longest_first():
    assert mark_whitespace(" " * 83) == "<|blank_80|><|blank_3|>"
    assert mark_whitespace(" " * 81) == "<|blank_80|> "


def test_all_45_cases_are_here():
    assert len(CASES) == 45


@pytest.mark.parametrize("case", CASES, ids=[str(i) for i in range(len(CASES))])
def test_texts_become_the_released_ids_and_come_back(tokenizer, case):
    text, ids = case["text"], case["ids"]
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer.encode(text) == case["with_special"]
    assert tokenizer.encode_prompt(text) == case["with_special"]
    assert tokenizer.tokenize(text) == case["tokens"]
    assert tokenizer.decode(ids) == case["decoded"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == case["decoded_skip_special"]


def test_many_texts_at_once_give_the_ids_of_each(tokenizer):
    texts = [case["text"] for case in CASES]
    assert tokenizer.encode_texts(texts) == [case["ids"] for case in CASES]
    assert tokenizer.encode_texts([]) == []
    odd = ["a\x1eb", "中 ", ""]
    assert tokenizer.encode_texts(odd) == [tokenizer.encode_texts([text])[0] for text in odd]


@given(st.lists(st.text(max_size=30), max_size=8))
def test_the_bytes_of_many_texts_are_those_of_their_ids(tokenizer, texts):
    pieces = tokenizer.pieces
    slower = copy.copy(pieces)
    slower.processor = SimpleNamespace(encode=pieces.processor.encode)  # another SentencePiece
    for one in (pieces, slower):
        encoded = one.encode_bytes(texts)
        ids = [np.frombuffer(data, dtype=np.int32).tolist() for data in encoded]
        assert ids == tokenizer.encode_texts(texts)


def test_special_tokens_have_the_released_ids(tokenizer):
    assert tokenizer.vocab_size == EXPECTED["vocab_size"]
    for name, attribute in NAMES.items():
        assert getattr(tokenizer, f"{attribute}_token_id") == EXPECTED[name], name
    for token, token_id in EXPECTED["special_ids"].items():
        assert tokenizer.convert_tokens_to_ids(token) == token_id, token
        assert tokenizer.convert_ids_to_tokens(token_id) == token


@pytest.mark.parametrize("token", CONTROL)
def test_forged_control_tokens_stay_text(tokenizer, token):
    forged = tokenizer.convert_tokens_to_ids(token)
    for text in (token, f"你好{token}", f"{token}{token} x", f" {token}\n"):
        for ids in (
            tokenizer.encode(text, add_special_tokens=False),
            tokenizer(text, add_special_tokens=False)["input_ids"],
            tokenizer.encode_texts([text])[0],
        ):
            assert forged not in ids, text
            assert token in tokenizer.decode(ids)
        assert tokenizer.encode_prompt(text).count(forged) == (token in ("[gMASK]", "<sop>"))


def test_a_pair_becomes_prompt_and_answer(tokenizer):
    assert EXPECTED["pair"] == tokenizer.build_inputs_with_special_tokens(
        EXPECTED["pair"][:2], EXPECTED["pair"][4:5]
    )


def test_a_batch_is_padded_as_the_released_one(tokenizer):
    wanted = EXPECTED["batch"]
    texts = [tokenizer.decode([i for i in row if i not in (3, 130001, 130004)])
             for row in wanted["input_ids"]]  # fmt: skip
    batch = tokenizer(texts, padding=True, return_tensors="np")
    for name in ("input_ids", "attention_mask", "position_ids"):
        assert np.array_equal(batch[name], np.array(wanted[name])), name


def test_padding_on_the_right_is_refused(tokenizer):
    with pytest.raises(ToolkitError, match="left"):
        tokenizer(["你好", "一二三四五"], padding=True, padding_side="right")


def test_a_saved_tokenizer_comes_back_through_auto_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    write_config(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(again, ChatGLMTokenizer)
    assert again.encode("你好\n  x") == tokenizer.encode("你好\n  x")


def test_code_beside_a_tokenizer_is_never_run(vocabulary_file, tmp_path):
    shutil.copy(vocabulary_file, tmp_path)
    write_config(tmp_path)
    marker = tmp_path / "marker"
    (tmp_path / "tokenization_chatglm.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    auto_map = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
    config = {"tokenizer_class": "ChatGLMTokenizer", "auto_map": auto_map}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for trust in (False, True):
        loaded = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=trust)
        assert isinstance(loaded, ChatGLMTokenizer)
    assert not marker.exists()


def test_the_first_release_is_recognised(vocabulary_file):
    with pytest.raises(ToolkitError, match="num_image_tokens"):
        ChatGLMTokenizer(str(vocabulary_file), num_image_tokens=20000)


def test_a_file_that_is_no_vocabulary_is_refused(tmp_path):
    (tmp_path / "ice_text.model").write_text("no")
    with pytest.raises(ToolkitError, match=r"ice_text\.model"):
        ChatGLMTokenizer(str(tmp_path / "ice_text.model"))
