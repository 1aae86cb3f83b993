"""The settings of one run, checked against each other before anything is loaded.

Which groups exclude each other, what a null stands for (a learning_rate of 2e-4 because LoRA is on,
say), and which settings, when they change, make it another run.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from .errors import ToolkitError
from .settings import AdaLoraSettings, DataSettings, LoraSettings, ModelSettings, TrainSettings

Method = Literal["full", "freeze", "ptuning", "lora", "adalora"]
DEFAULT_LEARNING_RATES: dict[Method, float] = {
    "full": 2e-5,
    "freeze": 2e-5,
    "ptuning": 2e-2,
    "lora": 2e-4,
    "adalora": 1e-3,
}
"""Peak rates for tuning given weights; those of the LoRA paper's kind and THUDM's p-tuning."""
FROM_SCRATCH_LEARNING_RATE = 3e-3
BEFORE = {"packing": False, "fused_kernels": False}
"""Of settings that are younger than a run, where the default is another."""
RECOMPUTED = {True: "full", False: "none"}
"""The names of what gradient_checkpointing says by a truth value."""
WITHOUT_EFFECT_ON_THE_RESULT = (
    "output_dir",
    "save_dir",
    "test_file",
    "resume",
    "save_every_steps",
    "rank_timeout_seconds",
)


@dataclass(frozen=True)
class Settings:
    """All groups of one run.

    Raises:
        ToolkitError: for a pair that cannot work, with the reason.
    """

    train: TrainSettings
    data: DataSettings
    model: ModelSettings
    lora: LoraSettings
    adalora: AdaLoraSettings
    trains: bool = True
    """False for a chat, which holds weights in ways that nothing can train."""

    def __post_init__(self):
        chosen = self._chosen()
        if len(chosen) > 1:
            raise ToolkitError(
                f"{' and '.join(chosen.values())} exclude each other: each says which weights are"
                " trained; switch all but one off"
            )
        self._check_quantization()
        if self.model.tie_word_embeddings and self.method != "full":
            raise ToolkitError(
                f"tie_word_embeddings with {chosen[self.method]}: head and embedding train as one"
                " only where both train in full; leave it out"
            )
        if self.train.from_scratch and self.method != "full":
            raise ToolkitError(
                f"{chosen[self.method]} tunes given weights, but model_name_or_path is empty:"
                " train the tiny model first (python train.py), then give"
                " --model_name_or_path ./best_ckpt/last and another --save_dir"
            )

    def _chosen(self) -> dict[Method, str]:
        """The methods that are switched on, each with the switch's name."""
        switches: dict[Method, tuple[bool, str]] = {
            "freeze": (self.model.global_num_layers_freeze > 0, "global_num_layers_freeze"),
            "ptuning": (self.model.pre_seq_len is not None, "p-tuning (pre_seq_len)"),
            "lora": (self.lora.with_lora, "LoRA (lora_info_args.with_lora)"),
            "adalora": (self.adalora.with_lora, "AdaLoRA (adalora_info_args.with_lora)"),
        }
        return {method: name for method, (on, name) in switches.items() if on}

    @property
    def method(self) -> Method:
        """Which weights are trained."""
        return next(iter(self._chosen()), "full")

    @property
    def quantization(self) -> str:
        """The setting that quantises the frozen weights, or ""."""
        names = ("quantization_bit", "load_in_8bit", "load_in_4bit")
        return next((name for name in names if getattr(self.model, name)), "")

    def _check_quantization(self) -> None:
        names = ("quantization_bit", "load_in_8bit", "load_in_4bit")
        on = [name for name in names if getattr(self.model, name)]
        if len(on) > 1:
            raise ToolkitError(f"{' and '.join(on)} exclude each other: each says how the frozen"
                               " weights are held")  # fmt: skip
        if on and self.trains and self.method in ("full", "freeze"):
            raise ToolkitError(
                f"{on[0]}: quantised weights can't be trained themselves; train LoRA, AdaLoRA or"
                " p-tuning on them, or leave them unquantised"
            )
        if self.lora.use_dora and self.model.quantization_bit:
            raise ToolkitError(
                "lora_info_args.use_dora needs the unquantised weights or bitsandbytes':"
                " leave quantization_bit out, or set load_in_8bit or load_in_4bit"
            )
        if self.train.enable_deepspeed and on and on[0] != "quantization_bit":
            raise ToolkitError(f"{on[0]} can't be split by DeepSpeed: use quantization_bit instead")
        if self.train.enable_deepspeed and self.method == "adalora":
            raise ToolkitError("AdaLoRA allots ranks by whole gradients, which DeepSpeed splits up:"
                               " leave enable_deepspeed off")  # fmt: skip

    def completed(self, config: dict[str, Any]) -> "Settings":
        """The same with every null filled in, from the config_name file and the defaults.

        config: content of the config_name file; only its tuning keys are looked at.
        """
        model = dataclasses.replace(
            self.model,
            pre_seq_len=_first_set(self.model.pre_seq_len, config.get("pre_seq_len")),
            prefix_projection=_first_set(
                self.model.prefix_projection, config.get("prefix_projection"), False
            ),
            quantization_bit=_first_set(
                self.model.quantization_bit, config.get("quantization_bit"), 0
            ),
        )
        if model.prefix_projection and model.pre_seq_len is None:
            raise ToolkitError("prefix_projection has an effect only with pre_seq_len: set both")
        method = dataclasses.replace(self, model=model).method
        rate = FROM_SCRATCH_LEARNING_RATE if self.train.from_scratch else None
        train = dataclasses.replace(
            self.train,
            max_epochs=_first_set(self.train.max_epochs, 24 if self.train.from_scratch else 3),
            learning_rate=_first_set(
                self.train.learning_rate, rate, DEFAULT_LEARNING_RATES[method]
            ),
        )
        return dataclasses.replace(self, model=model, train=train)

    def as_dict(self) -> dict[str, Any]:
        """All settings as one object, each under its one name."""
        merged: dict[str, Any] = {}
        for group in (self.train, self.data, self.model):
            merged |= dataclasses.asdict(group)
        for section in (self.lora, self.adalora):
            merged[section.section] = dataclasses.asdict(section)
        return merged

    def as_json(self) -> str:
        """What settings.json holds; it can be read again as `--config`."""
        return json.dumps(self.as_dict(), ensure_ascii=False, indent=2) + "\n"

    def differing(self, other: dict[str, Any]) -> list[str]:
        """Names of the settings whose value in `other` would make another run of this one.

        A setting that `other` lacks is younger than it; what was done before is in BEFORE, or its
        default.
        """
        own, defaults = (_flat(json.loads(s.as_json())) for s in (self, _defaults()))
        others = defaults | BEFORE | _flat(other)
        for values in (own, others):
            recomputed = values["gradient_checkpointing"]
            values["gradient_checkpointing"] = RECOMPUTED.get(recomputed, recomputed)
        names = (own.keys() | others.keys()) - set(WITHOUT_EFFECT_ON_THE_RESULT)
        return sorted(name for name in names if own.get(name) != others.get(name))


def _defaults() -> Settings:
    return Settings(
        TrainSettings(), DataSettings(), ModelSettings(), LoraSettings(), AdaLoraSettings()
    )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """`section.name` for what stands in a section."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        inside = isinstance(value, dict)
        flat |= {f"{name}.{key}": value[key] for key in value} if inside else {name: value}
    return flat


def _first_set(*values: Any) -> Any:
    """The first value that is not null."""
    return next((value for value in values if value is not None), None)
