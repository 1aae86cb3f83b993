"""Score a model on a dev set: BLEU-4, ROUGE and perplexity; its answers are kept.

python evaluate.py                      # ./best_ckpt/last on the bundled dev set
python evaluate.py --checkpoint /path/to/chatglm-6b --eval_file ./my_dev.json --max_new_tokens 128

Every round of a paragraph is a sample, with the rounds before it in its prompt, as in training.
Label and prediction are compared as the tokenizer writes them, which turns the full-width marks of
both into ASCII. The likeliest token is taken at every step, so that a run can be repeated.
"""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TextIO

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from chatglm.batches import Item, collate
from chatglm.command_line import parse_settings, run_script
from chatglm.corpus import Rounds, expand_files, read_paragraphs
from chatglm.decoding import generate_tokens
from chatglm.errors import ToolkitError
from chatglm.prompts import build_prompt
from chatglm.sampling import Sampling
from chatglm.scores import mean_scores, score_answer
from chatglm.settings import DataSettings, _at_least
from chatglm.strategies import Sample, SpecialTokens, truncate
from chatglm.tuning.adapters import plain_model
from models import load_for_inference


@dataclass(frozen=True)
class EvaluateSettings:
    """What is scored, on what, and how."""

    checkpoint: str = "./best_ckpt/last"
    """Folder or hub name of what is scored: weights, an adapter or a prefix encoder."""
    model_name_or_path: str = ""
    """Weights under an adapter or a prefix encoder; empty: those that it was trained on."""
    eval_file: str = "./data/finetune_dev_examples.json"
    """JSON-lines file of question/answer paragraphs, or a pattern for several."""
    output_file: str = "./output/predictions.json"
    """Gets a JSON line a sample; the means go into the .scores.json beside it."""
    eval_batch_size: int = 8
    """Samples read or answered at once."""
    max_seq_length: int = 1024
    """Longest sample in tokens, prompt and answer together; longer ones are cut as in training."""
    max_new_tokens: int = 512
    """Tokens at which a prediction is cut."""
    inference_precision: Literal["auto", "32", "bf16", "16"] = "auto"
    """Of the weights; auto: as stored on a GPU, 32 on a CPU."""
    device: str = "auto"
    """cuda, cuda:1, mps or cpu; auto: the GPU if there is one."""

    def __post_init__(self):
        _at_least(self, 1, "eval_batch_size", "max_new_tokens")
        _at_least(self, 4 + DataSettings().ensure_answer_min_length, "max_seq_length")

    @property
    def scores_file(self) -> str:
        """Where the means are written."""
        return f"{self.output_file.removesuffix('.json')}.scores.json"


@dataclass(frozen=True)
class Example:
    """One round: its prompt and answer as text, and the sample that training reads."""

    prompt: str
    label: str
    sample: Sample

    @property
    def prompt_ids(self) -> list[int]:
        """What the model continues, [gMASK] and <sop> included."""
        return self.sample.input_ids[: self.sample.context_length + 1]


def build_examples(
    paragraphs: Sequence[Rounds], tokenizer, *, max_seq_length: int
) -> list[Example]:
    """One example a round, in order."""
    special = SpecialTokens(
        tokenizer.gmask_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
    )
    examples = []
    for rounds in paragraphs:
        for index, (question, answer) in enumerate(rounds):
            prompt = build_prompt(question, rounds[:index])
            prompt_ids, answer_ids = tokenizer.encode_texts([prompt, answer])
            sample = truncate(
                prompt_ids,
                answer_ids,
                special,
                max_seq_length=max_seq_length,
                ensure_answer_min_length=DataSettings().ensure_answer_min_length,
            )
            examples.append(Example(prompt, tokenizer.decode(answer_ids), sample))
    return examples


def check_lengths(examples: Sequence[Example], settings: EvaluateSettings, *, longest: int) -> None:
    """Refuse what the model can't read.

    Raises:
        ToolkitError: if a prompt with its answer, or with max_new_tokens, is above longest.
    """
    with_label = max(len(example.sample.input_ids) for example in examples)
    with_prediction = max(len(example.prompt_ids) for example in examples) + settings.max_new_tokens
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
        batch = collate(items, pad_token_id=model.config.pad_token_id)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        total += model(**batch, use_cache=False, loss_only=True).loss.item()
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
    model, tokenizer, *, examples: Sequence[Example], settings: EvaluateSettings
) -> list[dict[str, Any]]:
    """For each example in order: prompt, label, prediction, its scores and its finish reason."""
    lines: list[dict[str, Any]] = [{}] * len(examples)
    lengths = [len(example.prompt_ids) for example in examples]
    for indices in batches_by_length(lengths, settings.eval_batch_size, name="answers"):
        answers = generate_answers(
            model,
            [examples[index].prompt_ids for index in indices],
            max_new_tokens=settings.max_new_tokens,
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


def report(summary: dict[str, float], settings: EvaluateSettings) -> None:
    """Print the summary as a table, and write it with the settings that gave it."""
    with written_aside(settings.scores_file) as file:
        json.dump({**summary, "settings": asdict(settings)}, file, ensure_ascii=False, indent=2)
    print(f"{'metric':<18}{'value':>12}")
    for name, value in summary.items():
        print(f"{name:<18}{value:>12.6g}")
    print(f"wrote {settings.output_file} and {settings.scores_file}")


@contextlib.contextmanager
def written_aside(path: str) -> Iterator[TextIO]:
    """A text file that takes its place when it is whole.

    Raises:
        ToolkitError: before anything else is done, if it can't be written there.
    """
    aside = f"{path}.part"
    if os.path.isdir(path):
        raise ToolkitError(f"{path}: a folder; name a file")
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        file = open(aside, "w", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise ToolkitError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        with file:
            yield file
        os.replace(aside, path)
    finally:
        pathlib.Path(aside).unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Loss and predictions of the checkpoint, then their scores."""
    groups = [(EvaluateSettings, {}, "EvaluateSettings")]
    (settings,) = parse_settings(groups, argv, description="Score a model on a dev set.")
    paragraphs = list(read_paragraphs(expand_files([settings.eval_file])))
    if not paragraphs:
        raise ToolkitError(f"{settings.eval_file}: holds no paragraphs")
    with written_aside(settings.output_file) as output:
        model, tokenizer = load_for_inference(
            settings.checkpoint,
            precision=settings.inference_precision,
            device=settings.device,
            base=settings.model_name_or_path,
        )
        model = plain_model(model)  # AdaLoRA's wrapper adds a term of its own to the loss
        examples = build_examples(paragraphs, tokenizer, max_seq_length=settings.max_seq_length)
        check_lengths(examples, settings, longest=model.config.max_sequence_length)
        samples = [example.sample for example in examples]
        loss = mean_loss(model, samples, batch_size=settings.eval_batch_size)
        lines = predict(model, tokenizer, examples=examples, settings=settings)
        output.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    report(summarize(lines, examples, loss=loss), settings)


if __name__ == "__main__":
    run_script(main)
