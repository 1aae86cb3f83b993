"""Question/answer paragraphs from files, one JSON object a line; and the samples they make.

    {"id": 0, "paragraph": [{"q": "question", "a": "answer" or ["line", "line"]}, ...]}

Every complaint names file and line. Training's records and the evaluation take their samples from
here, so that a model is scored on what it was trained to read.
"""

import codecs
import glob
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from .errors import ToolkitError
from .prompts import build_prompt
from .strategies import Sample, SpecialTokens, truncate

Rounds = list[tuple[str, str]]


def expand_files(patterns: list[str]) -> list[str]:
    """The files that names and globs stand for, each pattern's sorted.

    Raises:
        ToolkitError: if a pattern matches nothing.
    """
    files = []
    for pattern in patterns:
        found = sorted(glob.glob(pattern))
        if not found:
            raise ToolkitError(f"{pattern}: no such file; check train_file and eval_file")
        for path in found:
            if not os.path.isfile(path):
                raise ToolkitError(
                    f"{path}: a folder; name files, or a pattern such as {path}/*.json"
                )
        files.extend(found)
    return files


def read_paragraphs(files: list[str]) -> Iterator[Rounds]:
    """The rounds of each paragraph, as (question, answer) pairs.

    Raises:
        ToolkitError: at the first line that is not a paragraph, with file, line and reason.
    """
    for path in files:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.removeprefix(codecs.BOM_UTF8).strip():
                    yield _parse(line, f"{path}:{number}")


def _parse(line: bytes, where: str) -> Rounds:
    try:
        content = json.loads(line.decode("utf-8-sig"))
    except (
        ValueError,
        RecursionError,
    ) as error:  # bad UTF-8, bad JSON, numbers or nesting too long
        reason = str(error)[:200]
        raise ToolkitError(f"{where}: not a JSON object in UTF-8 ({reason})") from None
    rounds = content.get("paragraph") if isinstance(content, dict) else None
    if not isinstance(rounds, list) or not rounds:
        raise ToolkitError(f'{where}: expected {{"id": 0, "paragraph": [{{"q": ..., "a": ...}}]}}')
    return [_parse_round(one, f"{where}: round {index}") for index, one in enumerate(rounds)]


def _parse_round(content: Any, where: str) -> tuple[str, str]:
    if not isinstance(content, dict) or not {"q", "a"} <= content.keys():
        raise ToolkitError(f'{where}: expected {{"q": "question", "a": "answer"}}')
    question, answer = content["q"], content["a"]
    if isinstance(answer, list) and all(isinstance(line, str) for line in answer):
        answer = "\n".join(answer)
    if not isinstance(question, str) or not isinstance(answer, str):
        raise ToolkitError(f'{where}: "q" must be text, "a" text or a list of lines')
    if not question.strip() or not answer.strip():
        raise ToolkitError(f"{where}: empty question or answer")
    if any("\ud800" <= character <= "\udfff" for character in question + answer):
        raise ToolkitError(f"{where}: half a surrogate pair, which is no character")
    return question, answer


def build_samples(
    paragraphs: Iterable[Rounds], tokenizer, *, max_seq_length: int, ensure_answer_min_length: int
) -> Iterator[tuple[str, list[int], Sample]]:
    """A round's prompt, the ids of its whole answer, and its sample; all rounds, in order.

    The earlier rounds of the paragraph stand in the prompt. Only the sample is cut.
    """
    special = SpecialTokens(
        tokenizer.gmask_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
    )
    for rounds in paragraphs:
        prompts = [build_prompt(q, rounds[:i]) for i, (q, _) in enumerate(rounds)]
        answers = [answer for _, answer in rounds]
        encoded = tokenizer.encode_texts([*prompts, *answers])
        ids = zip(prompts, encoded[: len(rounds)], encoded[len(rounds) :], strict=True)
        for prompt, prompt_ids, answer_ids in ids:
            sample = truncate(
                prompt_ids,
                answer_ids,
                special,
                max_seq_length=max_seq_length,
                ensure_answer_min_length=ensure_answer_min_length,
            )
            yield prompt, answer_ids, sample
