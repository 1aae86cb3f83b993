"""How many tokens a pass gives by prompt lookup, on instruction data.

    python benchmarks/lookup.py ice_text.model alpaca_zh_*.json

A model is supposed that answers as the data does: its likeliest token is the reference's. So what
is counted is how far the references repeat their prompts and themselves, of summaries and
rewritings (told by their instructions) and of all others. What a pass costs, decode.py measures.
"""

import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from chatglm.corpus import read_paragraphs
from chatglm.drafts import checked_tokens
from chatglm.tokenizer import ChatGLMTokenizer

WORDS = {
    "summaries": ("总结", "摘要", "概括", "归纳", "概述"),
    "rewritings": ("改写", "重写", "改为", "改成", "纠正", "修改", "编辑", "修正", "转换", "润色"),
}
DRAFTED = (3, 7, 15)


class Reference:
    """A model whose likeliest tokens are those of an answer; counts its passes."""

    def __init__(self, answer: list[int]):
        self.answer, self.length, self.passes = answer, 0, 1

    def start(self) -> int:
        """The first token."""
        return self.answer[0]

    def check(self, tokens: list[int]) -> list[int]:
        """The answer's next token after each; after a wrong draft it does not matter."""
        self.passes += 1
        first = self.length + 1
        return [self.answer[min(n, len(self.answer) - 1)]
                for n in range(first, first + len(tokens))]  # fmt: skip

    def keep(self, number: int) -> None:
        """So many more tokens are behind."""
        self.length += number


def kind_of(question: str) -> str:
    """Of a question with its input, by the words of its first line; "others" without an input."""
    instruction, has_input, _ = question.partition("\n")
    if not has_input:
        return "others"
    return next((kind for kind, words in WORDS.items() if any(w in instruction for w in words)),
                "others")  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer")
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--most", type=int, default=4000, help="records read")
    given = parser.parse_args()
    tokenizer = ChatGLMTokenizer(given.tokenizer)
    samples: dict[str, list[tuple[list[int], list[int]]]] = {}
    for number, rounds in enumerate(read_paragraphs(given.sources, skip_bad=True)):
        if number == given.most:
            break
        question, answer = rounds[-1]
        ids = tokenizer.encode_texts([question, answer])
        samples.setdefault(kind_of(question), []).append(
            (ids[0], [*ids[1], tokenizer.eos_token_id])
        )
    print("| answers | number | tokens | " + " | ".join(f"of {n} drafted" for n in DRAFTED) + " |")
    print(f"|{'---|' * (3 + len(DRAFTED))}")
    for kind, pairs in sorted(samples.items()):
        tokens = sum(len(answer) for _, answer in pairs)
        cells = []
        for most_drafted in DRAFTED:
            passes = 0
            for prompt, answer in pairs:
                model = Reference(answer)
                found = checked_tokens(
                    model, prompt, most_drafted=most_drafted, max_new_tokens=len(answer)
                )
                assert list(found) == answer
                passes += model.passes
            cells.append(f"{tokens / passes:.2f}")
        print(f"| {kind} | {len(pairs):,} | {tokens:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
