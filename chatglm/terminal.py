"""A conversation in the terminal, from one question, or from lines on standard input."""

import logging
import sys
from collections.abc import Iterator

from .settings import ChatSettings

HELP = "/clear forgets the conversation, /exit ends it, Ctrl-C stops an answer"


def converse(model, tokenizer, chat: ChatSettings) -> None:
    """Hold the conversation that the settings and standard input ask for.

    --query: one answer. Otherwise rounds until /exit or the end of the input; the history is kept.
    """
    logging.basicConfig(format="note: %(message)s", level=logging.WARNING)
    history: list[tuple[str, str]] = []
    if chat.query is not None:
        _answer(model, tokenizer, chat, chat.query, history)
        return
    if sys.stdin.isatty():
        print(HELP)
    for question in _questions():
        if question == "/exit":
            return
        if question == "/clear":
            history = []
            print("the conversation starts anew")
        elif question.startswith("/"):
            print(f"unknown command {question}; {HELP}")
        elif question:
            history = _answer(model, tokenizer, chat, question, history)


def _questions() -> Iterator[str]:
    if not sys.stdin.isatty():
        for line in sys.stdin:
            question = line.strip()
            print(f"问：{question}")
            yield question
        return
    while True:
        try:
            yield input("问：").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return


def _answer(model, tokenizer, chat: ChatSettings, question: str, history):
    """Print the answer as it grows; gives the history with it, also when it was stopped."""
    length = chat.max_length
    stream = model.stream_chat(
        tokenizer,
        question,
        history,
        model.config.max_sequence_length if length is None else length,
        chat.do_sample,
        chat.top_p,
        chat.temperature,
        top_k=chat.top_k,
        repetition_penalty=chat.repetition_penalty,
        max_new_tokens=chat.max_new_tokens,
        seed=chat.generation_seed,
    )
    shown, rounds = "", history
    print("答：", end="", flush=True)
    try:
        for text, grown in stream:
            print(text[len(shown) :], end="", flush=True)
            shown, rounds = text, grown
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    print()
    return rounds
