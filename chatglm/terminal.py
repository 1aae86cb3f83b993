"""A conversation in the terminal, from one question, or from lines on standard input."""

import logging
import sys
from collections.abc import Iterator

from .settings import ChatSettings

HELP = "/clear forgets the conversation, /exit ends it, Ctrl-C stops an answer"
ADAPTER_HELP = ", /adapter NAME changes the adapter (none: the bare weights)"


def converse(model, tokenizer, chat: ChatSettings) -> None:
    """Hold the conversation that the settings and standard input ask for.

    --query: one answer. Otherwise rounds until /exit or the end of the input; the history is kept.
    """
    logging.basicConfig(format="note: %(message)s", level=logging.WARNING)
    history: list[tuple[str, str]] = []
    if chat.query is not None:
        _answer(model, tokenizer, chat, chat.query, history)
        return
    help_line = HELP + (ADAPTER_HELP if hasattr(model, "peft_config") else "")
    if sys.stdin.isatty():
        print(help_line)
    for question in _questions():
        if question == "/exit":
            return
        if question == "/clear":
            history = []
            print("the conversation starts anew")
        elif question.startswith("/adapter") and hasattr(model, "peft_config"):
            history = _change_adapter(model, question.removeprefix("/adapter").strip(), history)
        elif question.startswith("/"):
            print(f"unknown command {question}; {help_line}")
        elif question:
            history = _answer(model, tokenizer, chat, question, history)


def _change_adapter(model, name: str, history):
    """Make the named adapter answer from here on; a change starts the conversation anew."""
    if name == "none":
        model.base_model.disable_adapter_layers()
    elif name in model.peft_config:
        model.base_model.enable_adapter_layers()
        model.set_adapter(name)
    else:
        print(f"adapters: {', '.join(model.peft_config)}, none")
        return history
    print(f"adapter {name}; the conversation starts anew")
    return []


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
        prompt_lookup_tokens=chat.prompt_lookup_tokens,
        kv_cache_bits=chat.kv_cache_bits,
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
