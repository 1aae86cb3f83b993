"""Records of four formats: the rounds they give, and why some give none."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatglm.formats import FORMATS, SHAPES, BadRecord, parse_record, recognise


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def said(role, content):
    return {"role": role, "content": content}


def sharegpt(*messages, **more):
    return parse_record({"conversations": list(messages), **more}, "sharegpt")


def openai(*messages):
    return parse_record({"messages": list(messages)}, "openai")


def alpaca(**record):
    return parse_record({"instruction": "问", "output": "答", **record}, "alpaca")


def paragraph(*rounds):
    return parse_record({"id": 0, "paragraph": list(rounds)}, "paragraph")


EVERY_WAY = {
    "q": lambda text: paragraph({"q": text, "a": "y"}),
    "a": lambda text: paragraph({"q": "x", "a": text}),
    "instruction": lambda text: alpaca(instruction=text),
    "output": lambda text: alpaca(output=text),
    "history question": lambda text: alpaca(history=[[text, "y"]]),
    "history answer": lambda text: alpaca(history=[["x", text]]),
    "from human": lambda text: sharegpt(human(text), gpt("y")),
    "from gpt": lambda text: sharegpt(human("x"), gpt(text)),
    "user": lambda text: openai(said("user", text), said("assistant", "y")),
    "assistant": lambda text: openai(said("user", "x"), said("assistant", text)),
    "part": lambda text: openai(
        said("user", [{"type": "text", "text": text}]), said("assistant", "y")
    ),
}
OPTIONAL = {
    "input": lambda text: alpaca(input=text),
    "system of alpaca": lambda text: alpaca(system=text),
    "system of sharegpt": lambda text: sharegpt(human("问"), gpt("答"), system=text),
    "system in sharegpt": lambda text: sharegpt(
        {"from": "system", "value": text}, human("问"), gpt("答")
    ),
    "system in openai": lambda text: openai(
        said("system", text), said("user", "问"), said("assistant", "答")
    ),
}


def test_a_record_is_recognised_by_its_keys():
    assert recognise({"id": 0, "paragraph": 1}) == "paragraph"
    assert recognise({"instruction": 1, "output": 1, "more": 1}) == "alpaca"
    assert recognise({"conversations": 1}) == "sharegpt"
    assert recognise({"messages": 1}) == "openai"
    for other in ({}, {"instruction": "x"}, {"prompt": "x"}, [], None, "messages"):
        assert recognise(other) is None


def test_question_and_answer_of_a_paragraph_may_be_lists_of_lines():
    rounds = paragraph({"q": ["一", "二"], "a": "答"}, {"q": "问", "a": ["三", "", "四"]})
    assert rounds == [("一\n二", "答"), ("问", "三\n\n四")]


def test_instruction_and_input_of_alpaca_make_the_question():
    assert alpaca(input="句子") == [("问\n句子", "答")]
    assert alpaca(input=" \n") == alpaca(input=None) == alpaca() == [("问", "答")]


def test_the_history_of_alpaca_comes_first_and_its_system_text_before_all():
    rounds = alpaca(history=[["一", "二"], ["三", "四"]], system="简短")
    assert rounds == [("简短\n一", "二"), ("三", "四"), ("问", "答")]
    assert alpaca(history=[]) == alpaca(history=None) == [("问", "答")]


def test_the_speakers_of_sharegpt_have_several_names():
    for speaker in ("gpt", "assistant", "chatglm", "bing", "bard"):
        for asker in ("human", "user"):
            said = {"from": asker, "value": "问"}, {"from": speaker, "value": "答"}
            assert sharegpt(*said, *said) == [("问", "答")] * 2


def test_the_system_texts_of_sharegpt_stand_before_the_first_question():
    talk = [human("一"), gpt("二"), human("三"), gpt("四")]
    rules = {"from": "system", "value": "规则"}
    assert sharegpt(rules, *talk) == [("规则\n一", "二"), ("三", "四")]
    assert sharegpt(*talk, system="规则") == sharegpt(rules, *talk)
    assert sharegpt(rules, *talk, system="总则")[0] == ("总则\n规则\n一", "二")


def test_a_last_question_without_an_answer_is_left_out():
    assert sharegpt(human("一"), gpt("二"), human("三")) == [("一", "二")]
    assert openai(said("user", "一"), said("assistant", "二"), said("user", "三")) == [("一", "二")]


def test_developer_and_system_of_openai_are_one():
    for role in ("system", "developer"):
        rounds = openai(said(role, "规则"), said("user", "问"), said("assistant", "答"))
        assert rounds == [("规则\n问", "答")]


def test_the_text_parts_of_openai_are_joined_by_newline():
    parts = [{"type": "text", "text": "一"}, {"type": "text", "text": "二"}]
    rounds = openai(said("system", parts), said("user", parts), said("assistant", parts))
    assert rounds == [("一\n二\n一\n二", "一\n二")]


def test_a_conversation_in_parquet_has_null_for_what_is_missing():
    message = {"role": "user", "content": "问", "name": None, "tool_calls": None}
    assert openai(message, {**message, "role": "assistant"}) == [("问", "问")]


@pytest.mark.parametrize("place", EVERY_WAY)
@pytest.mark.parametrize("text", ["", " \n", "\u3000", None, 1, {}, [1]])
def test_every_text_is_there_and_is_text(place, text):
    with pytest.raises(BadRecord) as caught:
        EVERY_WAY[place](text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", OPTIONAL)
def test_a_text_that_may_be_missing_may_be_blank_but_is_a_text(place):
    for text in ("", " \n", None):
        assert OPTIONAL[place](text) == [("问", "答")]
    assert "规则" in OPTIONAL[place]("规则")[0][0]
    for text in (1, {}):
        with pytest.raises(BadRecord, match="must be text"):
            OPTIONAL[place](text)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("content", [None, 3, "x", [], {}, {"prompt": "x"}])
def test_what_has_other_keys_is_told_what_is_expected(form, content):
    with pytest.raises(BadRecord, match=re.escape(f"expected {SHAPES[form]}")):
        parse_record(content, form)


@pytest.mark.parametrize("value", [None, 3, "x", [], {}])
@pytest.mark.parametrize(
    ("form", "key"),
    [("paragraph", "paragraph"), ("sharegpt", "conversations"), ("openai", "messages")],
)
def test_a_conversation_is_a_list_that_is_not_empty(form, key, value):
    with pytest.raises(BadRecord, match=re.escape(f"expected {SHAPES[form]}")):
        parse_record({key: value}, form)


@pytest.mark.parametrize(
    ("rounds", "reason"),
    [
        ([1], 'round 0: expected {"q": "question", "a": "answer"}'),
        ([{"q": "x", "a": "y"}, {"q": "x"}], 'round 1: expected {"q"'),
        ([{"q": "x", "a": "y"}, {"q": "x", "a": " "}], 'round 1: "a" is empty'),
        ([{"q": ["x", 1], "a": "y"}], 'round 0: "q" must be text, not list'),
        ([{"q": "x", "a": []}], 'round 0: "a" is empty'),
    ],
)
def test_a_bad_round_is_named(rounds, reason):
    with pytest.raises(BadRecord, match=re.escape(reason)):
        paragraph(*rounds)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([gpt("x"), human("y")], "message 0: an answer where a question must stand"),
        ([human("x"), human("y")], "message 1: a question where an answer must stand"),
        ([human("x"), gpt("y"), gpt("z")], "message 2: an answer where a question"),
        ([{"from": "system", "value": "s"}, gpt("y")], "message 1: an answer where a question"),
        ([human("x"), {"from": "system", "value": "s"}], "message 1: a system text where an"),
        (
            [human("x"), {"from": "tool", "value": "s"}],
            "message 1: \"from\" is 'tool'; allowed: hu",
        ),
        ([{"from": "developer", "value": "s"}], "message 0: \"from\" is 'developer'"),
        ([human("x"), {"from": {}, "value": "s"}], 'message 1: "from" is dict; allowed'),
        ([human("x"), {"from": "gpt\n" * 99, "value": "s"}], 'message 1: "from" is \'gpt\\n'),
        ([human("x"), {"from": "gpt"}], 'message 1: expected {"from": ..., "value": ...}'),
        ([human("x"), 3], "message 1: expected"),
        ([human("x")], "no question with an answer"),
        ([{"from": "system", "value": "s"}], "no question with an answer"),
    ],
)
def test_a_message_out_of_order_is_named_by_its_number(messages, reason):
    with pytest.raises(BadRecord, match=re.escape(reason)) as caught:
        sharegpt(*messages)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([said("tool", "x")], "message 0: \"role\" is 'tool'; allowed: user, assistant, system"),
        ([said("user", "x"), said("assistant", None)], 'message 1: "content" must be text'),
        ([said("user", [{"type": "image_url"}])], "message 0: only parts"),
        ([said("user", ["x"])], "message 0: only parts"),
        ([said("user", [])], 'message 0: "content" is empty'),
        ([said("user", [{"type": "text"}])], 'message 0: "text" must be text'),
        ([said("assistant", "x")], "message 0: an answer where a question must stand"),
    ],
)
def test_a_bad_message_of_openai_is_named_by_its_number(messages, reason):
    with pytest.raises(BadRecord, match=re.escape(reason)):
        openai(*messages)


@pytest.mark.parametrize("history", ["x", {}, [["x"]], [["x", "y", "z"]], ["xy"], [None]])
def test_a_history_is_a_list_of_pairs(history):
    with pytest.raises(BadRecord, match="history"):
        alpaca(history=history)


keys = st.sampled_from(
    [
        *("paragraph", "q", "a", "instruction", "input", "output", "history", "system"),
        *("conversations", "from", "value", "human", "gpt"),
        *("messages", "role", "content", "type", "text", "user", "assistant"),
    ]
)
anything = st.recursive(
    st.none() | st.integers() | st.text(st.characters(), max_size=3) | keys,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


@given(content=anything, form=st.sampled_from(sorted(FORMATS)))
def test_anything_gives_rounds_or_a_reason_in_one_line(content, form):
    try:
        rounds = parse_record(content, form)
    except BadRecord as bad:
        assert str(bad) and "\n" not in str(bad)
    else:
        assert rounds and all(text.strip() for pair in rounds for text in pair)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(rounds=st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
def test_all_formats_of_one_talk_give_the_same_rounds(rounds):
    *history, (question, answer) = rounds
    assert paragraph(*({"q": q, "a": a} for q, a in rounds)) == rounds
    assert alpaca(instruction=question, output=answer, history=[list(h) for h in history]) == rounds
    assert sharegpt(*(say for q, a in rounds for say in (human(q), gpt(a)))) == rounds
    assert (
        openai(*(s for q, a in rounds for s in (said("user", q), said("assistant", a)))) == rounds
    )
