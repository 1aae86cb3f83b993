"""The words around a question: what the model was trained to read, and how its answers are tidied.

Data building and chat share this file. Two templates that differ by one character are the error
from which tools for this model have suffered most.
"""

import re

TEMPLATE_VERSION = "chatglm-6b-rounds-1"
"""Named in the manifest of built records; raise it when the text below changes."""

_FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
_HELD_ENDINGS = tuple(_FULL_WIDTH)
_TRAINING_TIME, _TRAINING_YEAR = "[[训练时间]]", "2023年"


def build_prompt(query: str, history: list[tuple[str, str]]) -> str:
    """The text that the model continues: the bare query, or all rounds in the released template."""
    if not history:
        return query
    rounds = [f"[Round {i}]\n问：{q}\n答：{a}\n" for i, (q, a) in enumerate(history)]
    return "".join(rounds) + f"[Round {len(history)}]\n问：{query}\n答："


def clean_response(text: str) -> str:
    """An answer as the released model shows it: stripped, dated, full-width beside Chinese."""
    return tidied(text.strip())


def tidied(text: str) -> str:
    """`clean_response` of a part; a mark is changed by its neighbours, and changes none."""
    cleaned = text.replace(_TRAINING_TIME, _TRAINING_YEAR)
    for ascii_mark, full_width in _FULL_WIDTH.items():
        if ascii_mark not in cleaned:  # a token's worth of text seldom has one
            continue
        mark = re.escape(ascii_mark)
        cleaned = re.sub(rf"([\u4e00-\u9fff]){mark}", rf"\1{full_width}", cleaned)
        cleaned = re.sub(rf"{mark}([\u4e00-\u9fff])", rf"{full_width}\1", cleaned)
    return cleaned


def settled_length(text: str) -> int:
    """How much of an unfinished, uncleaned answer later tokens can't change.

    Held back: a character whose bytes are not all there, a mark that becomes full-width if a
    Chinese character follows, a beginning of the training-time placeholder, and whitespace at the
    end, which an end of the answer would strip.
    """
    held = text.rstrip("\ufffd")
    for length in range(len(_TRAINING_TIME) - 1, 0, -1):
        if held.endswith(_TRAINING_TIME[:length]):
            held = held[:-length]
            break
    if held.endswith(_HELD_ENDINGS):
        held = held[:-1]
    return len(held.rstrip())
