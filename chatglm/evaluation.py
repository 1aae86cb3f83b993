"""What a model says to the prompts of a dev set, how it scores, and how much it is surprised.

Every round of a paragraph is an example, with the rounds before it in its prompt. A label is what
the tokenizer makes of it: it turns full-width marks into ASCII, in labels and predictions alike,
and text compared past it would count them as mistakes. Prompts of like lengths share a batch: in
the order of the file, most of a batch would be padding.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from .batches import Item, collate, model_inputs
from .corpus import encode_rounds
from .decoding import generate_tokens
from .errors import ToolkitError
from .formats import Rounds
from .sampling import Sampling
from .scores import mean_scores, score_answer
from .settings import DataSettings
from .strategies import Sample, SpecialTokens, truncate


@dataclass(frozen=True)
class Example:
    """One round: its prompt and answer as text, and the sample that training reads."""

    prompt: str
    label: str
    sample: Sample

    @property
    def prompt_ids(self) -> list[int]:
        """What the model continues, [gMASK] and <sop> included."""
        return self.sample.input_ids[: self.sample.context_length + 1].tolist()


def build_examples(
    paragraphs: Sequence[Rounds], tokenizer, *, max_seq_length: int
) -> list[Example]:
    """One example a round, in order."""
    special = SpecialTokens(
        tokenizer.gmask_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
    )
    return [
        Example(
            prompt,
            tokenizer.decode(np.frombuffer(answer, dtype=np.int32).tolist()),
            truncate(
                np.frombuffer(question, dtype=np.int32),
                np.frombuffer(answer, dtype=np.int32),
                special,
                max_seq_length=max_seq_length,
                ensure_answer_min_length=DataSettings().ensure_answer_min_length,
            ),
        )
        for prompt, question, answer in encode_rounds(paragraphs, tokenizer.pieces)
    ]


def check_lengths(examples: Sequence[Example], *, max_new_tokens: int, longest: int) -> None:
    """Refuse what the model can't read.

    Raises:
        ToolkitError: if a prompt with its answer, or with max_new_tokens, is above longest.
    """
    with_label = max(len(example.sample.input_ids) for example in examples)
    with_prediction = max(len(example.prompt_ids) for example in examples) + max_new_tokens
    if max(with_label, with_prediction) > longest:
        raise ToolkitError(
            f"up to {with_label} tokens of prompt and label, {with_prediction} of prompt and"
            f" max_new_tokens; this model reads at most max_sequence_length {longest}: lower"
            " max_seq_length or max_new_tokens"
        )


def batches_by_length(lengths: Sequence[int], batch_size: int, *, name: str) -> Iterator[list[int]]:
    """Indices of like lengths, the longest first, so that memory fails at once or never."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    with tqdm(total=len(order), desc=name, unit=" samples", disable=None) as bar:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            yield indices
            bar.update(len(indices))


@torch.inference_mode()
def mean_loss(model, samples: Sequence[Sample], *, batch_size: int) -> float:
    """Training's dev loss: the mean over the tokens of all answers, <eop> included.

    Raises:
        ToolkitError: if it is not the loss of a working model.
    """
    total, num_tokens = 0.0, 0
    lengths = [len(sample.input_ids) for sample in samples]
    for indices in batches_by_length(lengths, batch_size, name="loss"):
        # Divided by 1, the loss of a batch is the sum over its tokens.
        items = [(Item(index, tokens_per_batch=1), samples[index]) for index in indices]
        batch = collate(items, pad_token_id=model.config.pad_token_id, packing=True)
        total += model(
            **model_inputs(batch, model.device),
            num_items_in_batch=batch["num_items_in_batch"],
            use_cache=False,
            loss_only=True,
        ).loss.item()
        num_tokens += int(batch["learned_tokens"])
    loss = total / num_tokens
    if not loss < 100:  # NaN is not below either
        raise ToolkitError(f"the loss is {loss}: use inference_precision bf16 or 32")
    return loss


def generate_answers(
    model, prompts: Sequence[list[int]], *, max_new_tokens: int, eos_token_id: int
) -> list[list[int]]:
    """The greedy answer to each prompt, <eop> included where it was reached; one padded batch."""
    pad = model.config.pad_token_id
    rows = [torch.tensor(ids) for ids in prompts]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")
    input_ids = input_ids.to(model.device)
    steps = generate_tokens(
        model,
        input_ids,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(do_sample=False),
        eos_token_ids=[eos_token_id],
        attention_mask=(input_ids != pad).long(),
    )
    answers = torch.stack(list(steps), dim=1).tolist()
    return [ids[: ids.index(eos_token_id) + 1] if eos_token_id in ids else ids for ids in answers]


def predict(
    model, tokenizer, *, examples: Sequence[Example], batch_size: int, max_new_tokens: int
) -> list[dict[str, Any]]:
    """For each example in order: prompt, label, prediction, its scores and its finish reason."""
    lines: list[dict[str, Any]] = [{}] * len(examples)
    lengths = [len(example.prompt_ids) for example in examples]
    for indices in batches_by_length(lengths, batch_size, name="answers"):
        answers = generate_answers(
            model,
            [examples[index].prompt_ids for index in indices],
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
        )
        for index, ids in zip(indices, answers, strict=True):
            example, prediction = examples[index], tokenizer.decode(ids)
            lines[index] = {
                "prompt": example.prompt,
                "label": example.label,
                "prediction": prediction,
                **score_answer(prediction, example.label),
                "finish_reason": "stop" if ids[-1] == tokenizer.eos_token_id else "length",
            }
    return lines


def summarize(
    lines: Sequence[dict[str, Any]], examples: Sequence[Example], *, loss: float
) -> dict[str, float]:
    """The means, and what to know before trusting them."""
    return {
        **mean_scores(lines),
        "perplexity": math.exp(loss),
        "samples": len(lines),
        "empty predictions": sum(not line["prediction"].strip() for line in lines),
        "cut predictions": sum(line["finish_reason"] == "length" for line in lines),
        "cut prompts": sum(example.sample.prompt_cut for example in examples),
    }
