"""The round template, the tidying of answers, and what may be shown before an answer ends."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chatglm.prompts import build_prompt, clean_response, settled_length

pieces = st.sampled_from(
    [*"[]训练时间年中文a1 \n\t,!:;?，。\ufffd", "[[训练时间]]", "[[", "]]", "[[训练"]
)
answers = st.lists(pieces, max_size=14).map("".join)


def settled_part(text):
    return clean_response(text[: settled_length(text)])


def test_the_first_round_is_the_bare_query():
    assert build_prompt("你好", []) == "你好"


def test_later_rounds_stand_in_the_released_template():
    prompt = build_prompt("三", [("一", "甲"), ("二", "乙")])
    assert prompt == (
        "[Round 0]\n问：一\n答：甲\n[Round 1]\n问：二\n答：乙\n[Round 2]\n问：三\n答："
    )


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=4), st.text())
def test_a_prompt_goes_on_from_the_prompt_before_it(history, query):
    *earlier, (last_query, last_answer) = history
    if earlier:
        before = build_prompt(last_query, earlier)
        assert build_prompt(query, history).startswith(f"{before}{last_answer}\n")


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  你好 \n", "你好"),
        ("现在是[[训练时间]]。", "现在是2023年。"),
        ("你好,世界!", "你好，世界！"),
        ("a,b", "a,b"),
        ("a,中", "a，中"),
        ("中:a;文?!", "中：a；文？!"),
        ("[[训练时间]],好", "2023年，好"),
        ("", ""),
    ],
)
def test_answers_are_tidied_as_the_released_chat_does(raw, clean):
    assert clean_response(raw) == clean


@given(answers)
def test_tidying_a_tidy_answer_changes_nothing_but_marks_beside_new_marks(text):
    clean = clean_response(text)
    assert clean == clean.strip()
    assert "[[训练时间]]" not in clean


@settings(max_examples=1000)
@given(answers)
@example("现在是[[训练时间]],好")
@example("a,!中")
@example("a [[训练\ufffd")
def test_what_is_shown_early_is_the_beginning_of_the_whole_answer(text):
    whole, shown = clean_response(text), ""
    for end in range(len(text) + 1):
        settled = settled_part(text[:end])
        assert whole.startswith(settled), (text[:end], settled, whole)
        assert settled.startswith(shown), (text[:end], settled, shown)
        shown = settled


@settings(max_examples=500)
@given(st.text(max_size=20), st.text(max_size=20))
def test_any_text_goes_on_from_what_was_shown(first, second):
    assert clean_response(first + second).startswith(settled_part(first))


@given(st.text(alphabet="ab中文。", max_size=20))
def test_plain_text_is_shown_at_once(text):
    assert settled_part(text) == text
