"""Batch encoding beside bare SentencePiece on the same texts, one thread each, in turn.

python benchmarks/tokenizer.py ice_text.model texts.json ...    # lists of objects with text values
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from chatglm.tokenizer import ChatGLMTokenizer

ROUNDS = 15


def seconds(work) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Print the medians and the ratio, pair by pair."""
    tokenizer = ChatGLMTokenizer(sys.argv[1])
    rows = [row for path in sys.argv[2:] for row in json.loads(Path(path).read_text("utf-8"))]
    texts = [value for row in rows for value in row.values() if isinstance(value, str) and value]
    bare = tokenizer.sp_model
    pairs = [
        (
            seconds(lambda: bare.encode(texts, num_threads=1)),
            seconds(lambda: tokenizer.encode_texts(texts, num_threads=1)),
        )
        for _ in range(ROUNDS)
    ]
    ratio = statistics.median(ours / theirs for theirs, ours in pairs)
    for name, column in (("bare SentencePiece", 0), ("encode_texts", 1)):
        median = statistics.median(pair[column] for pair in pairs)
        print(f"{name:20} {median * 1e3:8.1f} ms  {len(texts) / median:10,.0f} texts/s")
    print(f"ratio, median of {ROUNDS} pairs: {ratio:.3f}")


if __name__ == "__main__":
    main()
