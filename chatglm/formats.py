"""The formats of training data: one record, a parsed JSON object, to its rounds.

    paragraph  {"id": 0, "paragraph": [{"q": text or lines, "a": text or lines}, ...]}
    alpaca     {"instruction": ..., "input": ..., "output": ..., "history": [[q, a], ...]}
    sharegpt   {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}, ...]}
    openai     {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}, ...]}

ChatGLM-6B has no system role: a system text stands before the first question, with a newline. In
a conversation, a last question without an answer holds nothing to learn and is left out. Rounds and
messages are counted from 0, as in a Python list.
"""

from collections.abc import Callable
from typing import Any

Rounds = list[tuple[str, str]]

SHAPES = {
    "paragraph": '{"id": 0, "paragraph": [{"q": ..., "a": ...}]}',
    "alpaca": '{"instruction": ..., "output": ...}',
    "sharegpt": '{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}',
    "openai": '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}',
}
"""What a record of each format looks like, for complaints."""

_KEYS = {
    "paragraph": {"paragraph"},
    "alpaca": {"instruction", "output"},
    "sharegpt": {"conversations"},
    "openai": {"messages"},
}

_QUESTION, _ANSWER, _SYSTEM = "a question", "an answer", "a system text"

_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), _QUESTION),
    **dict.fromkeys(("gpt", "assistant", "chatglm", "bing", "bard"), _ANSWER),
    "system": _SYSTEM,
}
_OPENAI_ROLES = {
    "user": _QUESTION,
    "assistant": _ANSWER,
    **dict.fromkeys(("system", "developer"), _SYSTEM),
}


class BadRecord(ValueError):
    """A record that can't be learned from; its text is the reason, in one line."""


def recognise(record: Any) -> str | None:
    """The format that a record has by its keys, or None."""
    if not isinstance(record, dict):
        return None
    return next((form for form, keys in _KEYS.items() if keys <= record.keys()), None)


def parse_record(content: Any, form: str) -> Rounds:
    """The (question, answer) pairs of a record; one at least.

    content: the parsed record, or the BadRecord that stands for one which could not be parsed.

    Raises:
        BadRecord: with the reason, if it isn't a record of that format.
    """
    if isinstance(content, BadRecord):
        raise content
    if not isinstance(content, dict) or not content.keys() >= _KEYS[form]:
        raise BadRecord(f"expected {SHAPES[form]}")
    return FORMATS[form](content)


def _parse_paragraph(record: dict) -> Rounds:
    rounds: Rounds = []
    for index, one in enumerate(_filled_list(record["paragraph"], "paragraph")):
        try:
            rounds.append(_parse_round(one))
        except BadRecord as bad:
            raise BadRecord(f"round {index}: {bad}") from None
    return rounds


def _parse_round(content: Any) -> tuple[str, str]:
    if not isinstance(content, dict) or "q" not in content or "a" not in content:
        raise BadRecord('expected {"q": "question", "a": "answer"}')
    question, answer = content["q"], content["a"]
    plain = type(question) is str and type(answer) is str
    if plain and not (question.isspace() or answer.isspace()) and question and answer:
        return question, answer  # most are so, and are spared the calls
    return _checked(_joined_lines(question), '"q"'), _checked(_joined_lines(answer), '"a"')


def _joined_lines(content: Any) -> Any:
    if isinstance(content, list) and all(isinstance(line, str) for line in content):
        return "\n".join(content)
    return content


def _parse_alpaca(record: dict) -> Rounds:
    """The history's rounds, then instruction and input as a question with output as its answer."""
    question = _checked(record["instruction"], '"instruction"')
    more = _checked_if_any(record.get("input"), '"input"')
    answer = _checked(record["output"], '"output"')
    last = (f"{question}\n{more}" if more else question, answer)
    return _after_system([_system_of(record)], [*_parse_history(record.get("history")), last])


def _parse_history(content: Any) -> Rounds:
    if content is not None and not isinstance(content, list):
        raise BadRecord('"history" must be a list of [question, answer]')
    return [_parse_pair(pair, f"history {index}") for index, pair in enumerate(content or [])]


def _parse_pair(content: Any, where: str) -> tuple[str, str]:
    if not isinstance(content, list) or len(content) != 2:
        raise BadRecord(f"{where}: expected [question, answer]")
    return _checked(content[0], f"{where}: question"), _checked(content[1], f"{where}: answer")


def _parse_sharegpt(record: dict) -> Rounds:
    messages = _filled_list(record["conversations"], "sharegpt")
    spoken = [
        _read_message(one, f"message {index}", ("from", "value"), _SHAREGPT_ROLES)
        for index, one in enumerate(messages)
    ]
    return _paired(spoken, _system_of(record))


def _parse_openai(record: dict) -> Rounds:
    messages = _filled_list(record["messages"], "openai")
    spoken = [
        _read_message(one, f"message {index}", ("role", "content"), _OPENAI_ROLES)
        for index, one in enumerate(messages)
    ]
    return _paired(spoken, "")


def _read_message(
    message: Any, where: str, keys: tuple[str, str], roles: dict[str, str]
) -> tuple[str, str]:
    """What a message is, and its text."""
    role_key, text_key = keys
    if not isinstance(message, dict) or not {*keys} <= message.keys():
        raise BadRecord(f'{where}: expected {{"{role_key}": ..., "{text_key}": ...}}')
    role, text = message[role_key], message[text_key]
    if not isinstance(role, str) or role not in roles:
        given = repr(role[:40]) if isinstance(role, str) else type(role).__name__
        raise BadRecord(f'{where}: "{role_key}" is {given}; allowed: {", ".join(roles)}')
    if text_key == "content":
        text = _joined_parts(text, where)
    check = _checked_if_any if roles[role] == _SYSTEM else _checked
    return roles[role], check(text, f'{where}: "{text_key}"')


def _joined_parts(content: Any, where: str) -> Any:
    if not isinstance(content, list):
        return content
    if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
        raise BadRecord(f'{where}: only parts {{"type": "text", "text": ...}} can be read')
    return "\n".join(_checked(part.get("text"), f'{where}: "text"') for part in content)


def _paired(spoken: list[tuple[str, str]], system: str) -> Rounds:
    """The rounds of messages that alternate, after a system message if there is one."""
    first = int(spoken[0][0] == _SYSTEM)
    systems = [system, *[text for _, text in spoken[:first]]]
    for index, (kind, _) in enumerate(spoken[first:]):
        expected = _ANSWER if index % 2 else _QUESTION
        if kind != expected:
            raise BadRecord(f"message {index + first}: {kind} where {expected} must stand")
    questions, answers = spoken[first::2], spoken[first + 1 :: 2]
    if not answers:
        raise BadRecord("no question with an answer")
    pairs = zip(questions, answers, strict=False)  # a last question may have no answer
    return _after_system(systems, [(question, answer) for (_, question), (_, answer) in pairs])


def _system_of(record: dict) -> str:
    return _checked_if_any(record.get("system"), '"system"')


def _after_system(systems: list[str], rounds: Rounds) -> Rounds:
    if not any(systems):
        return rounds
    question, answer = rounds[0]
    return [("\n".join([*filter(None, systems), question]), answer), *rounds[1:]]


def _filled_list(content: Any, form: str) -> list:
    if not isinstance(content, list) or not content:
        raise BadRecord(f"expected {SHAPES[form]}")
    return content


def _checked_if_any(text: Any, where: str) -> str:
    """A text that may be missing, null or blank; empty then. Parquet writes what misses as null."""
    blank = text is None or (isinstance(text, str) and not text.strip())
    return "" if blank else _checked(text, where)


def _checked(text: Any, where: str) -> str:
    """A text with something in it; neither orjson nor pyarrow gives one that is no Unicode."""
    if not isinstance(text, str):
        raise BadRecord(f"{where} must be text, not {type(text).__name__}")
    if not text or text.isspace():
        raise BadRecord(f"{where} is empty")
    return text


FORMATS: dict[str, Callable[[dict], Rounds]] = {
    "paragraph": _parse_paragraph,
    "alpaca": _parse_alpaca,
    "sharegpt": _parse_sharegpt,
    "openai": _parse_openai,
}
"""What turns a record with the keys of its format into rounds."""
