"""Score a model on a test or dev set: BLEU-4, ROUGE and perplexity; its answers are kept.

python evaluate.py                      # ./best_ckpt/last on test_file, else eval_file
python evaluate.py --checkpoint /path/to/chatglm-6b --eval_file ./my_dev.json --max_new_tokens 128

Every round of a paragraph is a sample, with the rounds before it in its prompt, as in training.
Label and prediction are compared as the tokenizer writes them, which turns the full-width marks of
both into ASCII. The likeliest token is taken at every step, so that a run can be repeated.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from chatglm.command_line import parse_settings, run_script
from chatglm.corpus import expand_files, read_paragraphs
from chatglm.errors import ToolkitError
from chatglm.evaluation import build_examples, check_lengths, mean_loss, predict, summarize
from chatglm.files import written_aside
from chatglm.formats import Rounds
from chatglm.settings import DataSettings, at_least
from chatglm.tuning.adapters import plain_model
from data_utils import GROUPS
from models import load_for_inference


@dataclass(frozen=True)
class EvaluateSettings:
    """What is scored, on what, and how."""

    checkpoint: str = "./best_ckpt/last"
    """Folder or hub name of what is scored: weights, an adapter or a prefix encoder."""
    model_name_or_path: str = ""
    """Weights under an adapter or a prefix encoder; empty: those that it was trained on."""
    quantization_bit: Literal[0, 4, 8] = 0
    """Quantise fp16 weights the released way while loading; 0: as stored, or as in the training."""
    test_file: list[str] | str = field(default_factory=list)
    """File to score, a pattern for several, or a list of either."""
    eval_file: list[str] | str = field(default_factory=list)
    """The same, scored without test_file; without both, train_info_args in data_utils.py names
    them."""
    output_file: str = "./output/predictions.json"
    """Gets a JSON line a sample; the means go into the .scores.json beside it."""
    eval_batch_size: int = 8
    """Samples read or answered at once."""
    max_seq_length: int = 1024
    """Longest sample in tokens, prompt and answer together; longer ones are cut as in training."""
    max_new_tokens: int = 512
    """Tokens at which a prediction is cut."""
    inference_precision: Literal["auto", "32", "bf16", "16"] = "auto"
    """Of the weights; auto: as stored on a GPU; on a CPU 32, over large int8 and int4 bf16."""
    device: str = "auto"
    """cuda, cuda:1, mps or cpu; auto: the GPU if there is one."""

    def __post_init__(self):
        at_least(self, 1, "eval_batch_size", "max_new_tokens")
        at_least(self, 4 + DataSettings().ensure_answer_min_length, "max_seq_length")

    @property
    def scored(self) -> str:
        """The setting whose files are scored."""
        return "test_file" if self.test_file else "eval_file"

    @property
    def files(self) -> list[str]:
        """What is scored."""
        named = self.test_file or self.eval_file
        return [named] if named and isinstance(named, str) else list(named)

    @property
    def scores_file(self) -> str:
        """Where the means are written."""
        return f"{self.output_file.removesuffix('.json')}.scores.json"


def read_settings(argv: Sequence[str] | None) -> EvaluateSettings:
    """Of the flags; without test_file and eval_file among them, these are those of training.

    Raises:
        ToolkitError: if there is nothing to score.
    """
    groups = [(EvaluateSettings, {}, "EvaluateSettings")]
    (settings,) = parse_settings(groups, argv, description="Score a model on a test or dev set.")
    if not settings.files:
        (train,) = parse_settings(GROUPS[:1], [], description="")
        settings = replace(settings, test_file=train.test_file, eval_file=train.eval_file)
    if not settings.files:
        raise ToolkitError("test_file and eval_file are both empty: name a file to score")
    return settings


def score(
    model, tokenizer, *, paragraphs: list[Rounds], settings: EvaluateSettings
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A line for each round, and their summary."""
    batch_size, max_new_tokens = settings.eval_batch_size, settings.max_new_tokens
    examples = build_examples(paragraphs, tokenizer, max_seq_length=settings.max_seq_length)
    longest = model.config.max_sequence_length
    check_lengths(examples, max_new_tokens=max_new_tokens, longest=longest)
    loss = mean_loss(model, [one.sample for one in examples], batch_size=batch_size)
    limits = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    lines = predict(model, tokenizer, examples=examples, **limits)
    return lines, summarize(lines, examples, loss=loss)


def report(summary: dict[str, float], settings: EvaluateSettings) -> None:
    """Print the summary as a table, and write it with the settings that gave it."""
    with written_aside(settings.scores_file) as file:
        json.dump({**summary, "settings": asdict(settings)}, file, ensure_ascii=False, indent=2)
    print(f"{'metric':<18}{'value':>12}")
    for name, value in summary.items():
        print(f"{name:<18}{value:>12.6g}")
    print(f"wrote {settings.output_file} and {settings.scores_file}")


def main(argv: Sequence[str] | None = None) -> None:
    """Loss and predictions of the checkpoint, then their scores."""
    settings = read_settings(argv)
    shown = f"{settings.scored} {', '.join(settings.files)}"
    paragraphs = list(read_paragraphs(expand_files(settings.files)))
    if not paragraphs:
        raise ToolkitError(f"{shown}: holds no paragraphs")
    print(f"scoring {shown}")
    with written_aside(settings.output_file) as output:
        model, tokenizer = load_for_inference(
            settings.checkpoint,
            precision=settings.inference_precision,
            device=settings.device,
            base=settings.model_name_or_path,
            quantization_bit=settings.quantization_bit,
        )
        model = plain_model(model)  # AdaLoRA's wrapper adds a term of its own to the loss
        lines, summary = score(model, tokenizer, paragraphs=paragraphs, settings=settings)
        output.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    report(summary, settings)


if __name__ == "__main__":
    run_script(main)
