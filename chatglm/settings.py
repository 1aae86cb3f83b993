"""Every setting, typed, with a line of help; and the order in which they are read.

Later wins: the defaults here < the dicts in data_utils.py and models.py < `--config FILE` < flags.
A key is spelled the same in all of them and in the settings.json that a run saves.
jsonargparse does the reading; unknown names are refused with the nearest known one.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

import jsonargparse
import yaml

from .errors import ToolkitError, nearest

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclass(frozen=True)
class TrainSettings:
    """What is trained, on what, and how (`train_info_args` in data_utils.py)."""

    model_name_or_path: str = ""
    """Folder or hub name of the weights; empty: a tiny model, trained from scratch."""
    config_name: str = "./config/config_tiny.json"
    """Shape of the model when model_name_or_path is empty."""
    train_file: list[str] = field(default_factory=lambda: ["./data/finetune_train_examples.json"])
    """JSON-lines files of question/answer paragraphs to learn."""
    eval_file: list[str] = field(default_factory=lambda: ["./data/finetune_dev_examples.json"])
    """Files for the dev loss; an empty list turns it off."""
    output_dir: str = "./output"
    """Folder of the built records and of the embedded model's tokenizer."""
    save_dir: str = "./best_ckpt"
    """Folder of the trained weights: best/ by dev loss, and last/."""
    max_seq_length: int = 1024
    """Longest sample in tokens, prompt and answer together."""
    max_epochs: int | None = None
    """Passes over the data; null: 24 from scratch, 3 with weights."""
    max_steps: int = -1
    """Optimizer steps at the most; -1: as many as the epochs take."""
    train_batch_size: int = 8
    """Samples a step and device."""
    eval_batch_size: int = 8
    """Samples a dev step."""
    gradient_accumulation_steps: int = 1
    """Batches summed before an optimizer step."""
    learning_rate: float | None = None
    """Peak learning rate; null: 3e-3 from scratch, 2e-5 with weights."""
    scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up."""
    warmup_steps: int = 20
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW decay; never on biases and norms."""
    adam_epsilon: float = 1e-8
    """AdamW epsilon."""
    optimizer_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    precision: Literal["auto", "32", "bf16", "16"] = "auto"
    """Arithmetic of training; auto: bf16 where the GPU has it, else 32."""
    devices: int = 1
    """GPUs (or CPU processes) to train on."""
    seed: int = 42
    """Of weights, order and dropout."""

    def __post_init__(self):
        _at_least(self, 1, "max_seq_length", "train_batch_size", "eval_batch_size", "devices")
        _at_least(self, 1, "gradient_accumulation_steps", "max_epochs")
        _at_least(self, 0, "warmup_steps", "weight_decay", "learning_rate", "max_grad_norm")
        _at_least(self, 0, "seed", "adam_epsilon")
        if self.seed >= 2**32:
            raise ToolkitError(f"seed {self.seed}: allowed is 0 to {2**32 - 1}")
        if not all(0 <= beta < 1 for beta in self.optimizer_betas):
            raise ToolkitError(f"optimizer_betas {self.optimizer_betas}: each is 0 up to below 1")
        if not self.train_file:
            raise ToolkitError("train_file is empty: name at least one file")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ToolkitError(f"max_steps {self.max_steps}: allowed is -1 (off) or at least 1")

    @property
    def from_scratch(self) -> bool:
        """True when no weights are named."""
        return not self.model_name_or_path

    @property
    def epochs(self) -> int:
        """max_epochs with its null filled in."""
        if self.max_epochs is not None:
            return self.max_epochs
        return 24 if self.from_scratch else 3

    @property
    def peak_learning_rate(self) -> float:
        """learning_rate with its null filled in."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 3e-3 if self.from_scratch else 2e-5


@dataclass(frozen=True)
class DataSettings:
    """How samples are cut from paragraphs (`data_conf` in data_utils.py)."""

    strategy: Literal["truncation"] = "truncation"
    """What happens to a sample longer than max_seq_length."""
    ensure_answer_min_length: int = 1
    """Answer tokens that a cut leaves, at the expense of the oldest prompt tokens."""

    def __post_init__(self):
        _at_least(self, 1, "ensure_answer_min_length")


@dataclass(frozen=True)
class ChatSettings:
    """How the chat scripts answer."""

    query: str | None = None
    """Answer this one question and end."""
    max_length: int | None = None
    """Tokens of prompt and answer together; null: as many as the model reads."""
    max_new_tokens: int | None = None
    """Tokens of the answer alone; null: up to max_length."""
    do_sample: bool = True
    """Draw from the likely tokens; false: always the likeliest."""
    top_p: float = 0.7
    """Draw from the likeliest tokens that hold this share together."""
    top_k: int = 50
    """Draw from so many likeliest tokens; 0: no limit."""
    temperature: float = 0.95
    """Below 1 sharpens, above 1 flattens."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens already seen less likely."""
    generation_seed: int | None = None
    """Makes sampled answers repeatable."""
    inference_precision: Literal["auto", "32", "bf16", "16"] = "auto"
    """Of the weights; auto: as stored on a GPU, 32 on a CPU."""
    device: str = "auto"
    """cuda, cuda:1, mps or cpu; auto: the GPU if there is one."""


def _at_least(settings: Any, bound: float, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < bound:
            raise ToolkitError(f"{name} {value}: allowed is {bound} and above")


def parse_settings(
    groups: Sequence[tuple[type, dict[str, Any], str]],
    argv: Sequence[str] | None,
    *,
    description: str,
) -> list[Any]:
    """One instance of each group's class, from its edited dict, `--config` and the flags.

    groups: (dataclass, edited values, where they stand). argv: None for the command line.

    Raises:
        ToolkitError: for an unknown name (with the nearest known one) or a value of a wrong type.
    """
    parser = jsonargparse.ArgumentParser(description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of settings")
    names: dict[str, list[str]] = {}
    for group, edited, where in groups:
        names[group.__name__] = [f.name for f in dataclasses.fields(group)]
        _refuse_unknown(edited, names[group.__name__], where)
        parser.add_class_arguments(group, help=group.__doc__)
    known = [name for group in names.values() for name in group]
    arguments = list(sys.argv[1:] if argv is None else argv)
    _check_arguments(arguments, known)
    try:
        for _, edited, _ in groups:  # defaults are not checked for their types, arguments are
            parser.parse_args([_as_flag(name, value) for name, value in edited.items()])
            parser.set_defaults(edited)
        parsed = parser.parse_args(_files_first(arguments))
        parser.validate(parsed)
    except (jsonargparse.ArgumentError, TypeError, ValueError, KeyError) as error:
        raise ToolkitError(" ".join(str(error).split())) from None
    values = parsed.as_dict()
    for group, _, _ in groups:
        _refuse_null(group, values)
    return [group(**{n: values[n] for n in names[group.__name__]}) for group, _, _ in groups]


def _as_flag(name: str, value: Any) -> str:
    return f"--{name}={value if isinstance(value, str) else json.dumps(value)}"


def _refuse_null(group: type, values: dict[str, Any]) -> None:
    hints = get_type_hints(group)
    for item in dataclasses.fields(group):
        if values[item.name] is None and type(None) not in get_args(hints[item.name]):
            raise ToolkitError(f"{item.name}: null is not allowed; expected {item.type}")


def _files_first(arguments: list[str]) -> list[str]:
    """--config and its value before the flags, which then win wherever they stand."""
    files: list[str] = []
    flags: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--config":
            files += [argument, *[value for value in [next(rest, None)] if value is not None]]
        else:
            (files if argument.startswith("--config=") else flags).append(argument)
    return files + flags


def _refuse_unknown(keys: Any, known: list[str], where: str) -> None:
    for key in keys:
        if key not in known:
            raise ToolkitError(f"{where}: unknown setting {key!r}.{nearest(str(key), known)}")


def _check_arguments(arguments: list[str], known: list[str]) -> None:
    flags: list[str] = [a[2:].split("=")[0] for a in arguments if a.startswith("--")]
    _refuse_unknown(flags, [*known, "config", "help", "print_config"], "command line")
    for position, argument in enumerate(arguments):
        if argument.split("=")[0] != "--config":
            continue
        path = argument.partition("=")[2] or (arguments[position + 1 : position + 2] or [""])[0]
        try:
            with open(path, encoding="utf-8") as file:
                content = yaml.safe_load(file) or {}
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise ToolkitError(f"--config {path}: cannot be read as YAML ({reason})") from None
        if not isinstance(content, dict):
            raise ToolkitError(f"--config {path}: expected `name: value` lines")
        _refuse_unknown(content, known, path)


def settings_as_json(*groups: Any) -> str:
    """All settings of a run as one JSON object, what settings.json holds."""
    merged: dict[str, Any] = {}
    for group in groups:
        merged.update(dataclasses.asdict(group))
    return json.dumps(merged, ensure_ascii=False, indent=2) + "\n"


def run_script(main: Callable[[Sequence[str] | None], None]) -> None:
    """Run a script's main; a user's mistake is one line and exit code 2."""
    try:
        main(None)
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
