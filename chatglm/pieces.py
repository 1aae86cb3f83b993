"""Texts to ids through SentencePiece, with newlines, tabs and runs of spaces as pieces.

What ChatGLMTokenizer is to transformers, without it: a process that builds records starts in a
tenth of the time.
"""

import re
from typing import Any

import numpy as np
import sentencepiece

from .errors import ToolkitError

VOCAB_FILE = "ice_text.model"
NEWLINE, TAB, LONGEST_BLANK = "<n>", "<|tab|>", 80
_SEPARATOR = "\x1e"  # ASCII record separator
_SPACES = re.compile("  +")  # with an upper bound it is three times as slow
_PLAIN = (False, -1, 0.1, False, False, False)
"""Of SentencePiece's arguments: no sampling, nbest_size, alpha; no bos, no eos, not reversed."""
_BLANK = re.compile(r"<\|blank_(\d{1,2})\|>")


def blank_token(length: int) -> str:
    """The piece for a run of 2 to 80 spaces."""
    return f"<|blank_{length}|>"


def mark_whitespace(text: str) -> str:
    """Newlines, tabs and runs of spaces (longest first) as the pieces that stand for them."""
    marked = text.replace("\n", NEWLINE).replace("\t", TAB)
    return _SPACES.sub(_mark_run, marked)


def _mark_run(run: re.Match) -> str:
    whole, rest = divmod(len(run.group()), LONGEST_BLANK)
    return blank_token(LONGEST_BLANK) * whole + (blank_token(rest) if rest > 1 else " " * rest)


def _mark_all(texts: list[str]) -> list[str]:
    """Whitespace marked in one pass over the join of all texts, in a third of the time.

    Texts that hold the separator themselves go one by one.
    """
    marked = mark_whitespace(_SEPARATOR.join(texts)).split(_SEPARATOR)
    return marked if len(marked) == len(texts) else [mark_whitespace(text) for text in texts]


def unmark_whitespace(text: str) -> str:
    """The inverse of `mark_whitespace`."""
    plain = text.replace(NEWLINE, "\n").replace(TAB, "\t")
    return _BLANK.sub(lambda blank: " " * int(blank.group(1)), plain)


class Pieces:
    """A SentencePiece model, and the ids it gives texts; control tokens are never among them.

    Raises:
        ToolkitError: if the file is not a SentencePiece model.
    """

    def __init__(self, vocab_file: str):
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.Load(vocab_file)
        except (OSError, RuntimeError, TypeError) as error:
            raise ToolkitError(
                f"{vocab_file}: not a SentencePiece model ({error}); a ChatGLM-6B folder has"
                f" {VOCAB_FILE} beside config.json"
            ) from None

    def encode(self, texts: list[str], *, num_threads: int = -1) -> list[list[int]]:
        """Ids of each text."""
        return self.processor.encode(_mark_all(texts), num_threads=num_threads)

    def encode_bytes(self, texts: list[str]) -> list[bytes]:
        """As `encode` in one thread, each text's ids as the bytes of an int32 array.

        For the building of records, where ids need not become Python objects. SentencePiece has
        them as bytes, but makes arrays of them before it hands them out, at a seventh of the time.
        """
        marked = _mark_all(texts)
        inner: Any = getattr(self.processor, "_processor", None)
        if hasattr(inner, "_EncodeAsBufferBatch"):
            return list(map(bytes, inner._EncodeAsBufferBatch(marked, 1, None, *_PLAIN)))
        encoded = self.processor.encode(marked, num_threads=1)
        return [np.array(ids, dtype=np.int32).tobytes() for ids in encoded]
