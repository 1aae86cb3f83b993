"""Every setting, typed, with a line of help, and checked by itself; run_settings.py has the rest.

`train_info_args`, `data_conf`, `lora_info_args` and `adalora_info_args` in data_utils.py and the
switches in models.py are the edited values of these classes; command_line.py reads them.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from .errors import ToolkitError, nearest

EMBEDDED_CONFIG = "./config/config_tiny.json"
"""Shape of the model that is trained from scratch when no weights are named."""
LARGE_MODEL = 1_000_000_000
"""Parameters from which activations are computed again unless it is set otherwise."""
BLOCK_LINEARS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")

Optimizer = Literal[
    "adamw", "adamw_torch", "adamw_hf", "adam", "adafactor", "lamb", "lion",
    "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit",
    "lion_8bit", "paged_lion_8bit", "paged_lion_32bit",
]  # fmt: skip
Schedule = Literal[
    "linear", "WarmupCosine", "cosine", "constant", "CAWR", "CAL", "Step", "ReduceLROnPlateau",
]  # fmt: skip


@dataclass(frozen=True)
class TrainSettings:
    """What is trained, on what, and how (`train_info_args` in data_utils.py)."""

    model_name_or_path: str = ""
    """Folder or hub name of the weights; empty: a tiny model, trained from scratch."""
    config_name: str | None = None
    """Shape of the model without weights (null: the tiny one); with weights, a file that adds
    pre_seq_len, prefix_projection, quantization_bit or precision, such as config_ptv2.json."""
    train_file: list[str] = field(default_factory=lambda: ["./data/finetune_train_examples.json"])
    """Files to learn: .json, .jsonl, either as .gz, .parquet; patterns too."""
    train_file_weights: list[float] = field(default_factory=list)
    """For each entry of train_file, how often its samples come in an epoch, 0.5 or 3 say; empty:
    once."""
    data_backend: Literal["record", "lmdb"] = "record"
    """Built samples are TFRecord files, or LMDB files, which take a fifth more room."""
    eval_file: list[str] = field(default_factory=lambda: ["./data/finetune_dev_examples.json"])
    """Files for the dev loss; an empty list turns it off."""
    test_file: list[str] = field(default_factory=list)
    """Files that evaluate.py scores; training never reads them."""
    mix_file: list[str] = field(default_factory=list)
    """Files of general data mixed into every epoch, against forgetting."""
    mix_ratio: float = 0.0
    """Share of the samples of an epoch that is drawn from mix_file, 0 up to below 1."""
    output_dir: str = "./output"
    """Folder of the built records and of the embedded model's tokenizer."""
    save_dir: str = "./best_ckpt"
    """Folder of what is trained: best/ by dev loss, last/, and resume/ while it runs."""
    save_every_steps: int = 500
    """Optimizer steps between writing resume/, beside once an epoch; 0: only then, -1: never, and
    a run that is cut off starts anew."""
    resume: bool | None = None
    """Go on from resume/ in save_dir; null: if there is one, true: it must be there, false:
    start anew."""
    max_seq_length: int = 1024
    """Longest sample in tokens, prompt and answer together."""
    max_epochs: int | None = None
    """Passes over the data; null: 24 from scratch, 3 with weights."""
    max_steps: int = -1
    """Optimizer steps at the most; -1: as many as the epochs take."""
    train_batch_size: int = 8
    """Samples a step and device."""
    eval_batch_size: int = 8
    """Samples a dev step and device."""
    eval_every_steps: int | None = None
    """Optimizer steps between dev losses; null: once an epoch."""
    early_stopping_patience: int | None = None
    """Stop after so many dev losses without a new lowest; null: never."""
    gradient_accumulation_steps: int = 1
    """Batches summed before an optimizer step."""
    drop_last: bool = False
    """Leave out the samples of an epoch that don't fill its last optimizer step."""
    packing: bool = True
    """Lay the samples of a batch side by side in one row, unseen by each other; false: padded rows,
    which give the same losses, slower."""
    gradient_checkpointing: Literal["none", "selective", "full"] | bool | None = None
    """What the backward pass computes again instead of keeping it: nothing, what is within each
    half of a block, or all of a block (true); null: none for models below a billion parameters,
    selective for larger ones, full over quantised weights."""
    fused_kernels: bool = True
    """Norms, heads, loss and LoRA by GPU kernels where they are in half precision and not split by
    ZeRO-3 (DoRA and AdaLoRA have none); false: by plain torch, to debug."""
    optimizer: Optimizer = "adamw"
    """Of torch, pytorch_optimizer (lamb, lion) or bitsandbytes (8-bit, and paged on a GPU)."""
    learning_rate: float | None = None
    """Peak learning rate; null: 3e-3 from scratch, with weights 2e-5 (full, freeze), 2e-4 (LoRA),
    1e-3 (AdaLoRA), 2e-2 (p-tuning)."""
    scheduler_type: Schedule = "linear"
    """Course of the learning rate after the warm-up."""
    scheduler: dict[str, float] = field(default_factory=dict)
    """Options of CAWR (T_mult, rewarm_epoch_num, eta_min), CAL (rewarm_epoch_num, eta_min), Step
    (decay_rate, decay_steps) and ReduceLROnPlateau (factor, patience)."""
    warmup_steps: int = 20
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Decay of matrices; never of biases and norms."""
    adam_epsilon: float = 1e-8
    """Epsilon of the Adam kind."""
    optimizer_betas: tuple[float, float] = (0.9, 0.999)
    """Betas of the Adam kind and of lion."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0: never."""
    precision: Literal["auto", "32", "bf16", "16"] = "auto"
    """Arithmetic of training; auto: what config.json names, else bf16 where the GPU has it, else
    32."""
    trained_precision: Literal["32", "bf16"] = "32"
    """Of the trained weights themselves; bf16 halves their memory and loses small updates."""
    devices: int | None = None
    """GPUs (or CPU processes) of this machine to train on; null: all GPUs, or one CPU process."""
    rank_timeout_seconds: int = 60
    """A rank silent for so long stops the others, which name it."""
    enable_deepspeed: bool = False
    """Train with DeepSpeed."""
    deepspeed_config: str = "./config/deepspeed.json"
    """Its settings; deepspeed_offload.json beside it is ZeRO-3 with the CPU's memory."""
    seed: int = 42
    """Of weights, order and dropout."""

    def __post_init__(self):
        at_least(self, 1, "max_seq_length", "train_batch_size", "eval_batch_size", "devices")
        at_least(self, 1, "gradient_accumulation_steps", "max_epochs", "eval_every_steps")
        at_least(self, 1, "early_stopping_patience", "rank_timeout_seconds")
        at_least(self, 0, "warmup_steps", "weight_decay", "learning_rate", "max_grad_norm")
        at_least(self, 0, "seed", "adam_epsilon", "mix_ratio")
        at_least(self, -1, "save_every_steps")
        if self.seed >= 2**32:
            raise ToolkitError(f"seed {self.seed}: allowed is 0 to {2**32 - 1}")
        if not all(0 <= beta < 1 for beta in self.optimizer_betas):
            raise ToolkitError(f"optimizer_betas {self.optimizer_betas}: each is 0 up to below 1")
        if not self.train_file:
            raise ToolkitError("train_file is empty: name at least one file")
        self._check_weights()
        if self.max_steps == 0 or self.max_steps < -1:
            raise ToolkitError(f"max_steps {self.max_steps}: allowed is -1 (off) or at least 1")
        if self.mix_ratio >= 1:
            raise ToolkitError(f"mix_ratio {self.mix_ratio}: allowed is 0 up to below 1")
        if bool(self.mix_file) != bool(self.mix_ratio):
            raise ToolkitError("mix_file and mix_ratio have an effect only together: set both")
        if self.scheduler_type == "ReduceLROnPlateau" and not self.eval_file:
            raise ToolkitError(
                "scheduler_type ReduceLROnPlateau follows the dev loss: set eval_file"
            )
        for name in ("early_stopping_patience", "eval_every_steps"):
            if getattr(self, name) is not None and not self.eval_file:
                raise ToolkitError(f"{name} needs a dev loss: set eval_file")

    def _check_weights(self) -> None:
        weights, entries = self.train_file_weights, self.train_file
        if weights and len(weights) != len(entries):
            raise ToolkitError(
                f"train_file_weights has {len(weights)} for the {len(entries)} entries of"
                " train_file: give each entry one, in their order"
            )
        if not all(0 < weight < math.inf for weight in weights):
            raise ToolkitError(f"train_file_weights {weights}: each is above 0 and finite")

    @property
    def from_scratch(self) -> bool:
        """True when no weights are named."""
        return not self.model_name_or_path


@dataclass(frozen=True)
class DataSettings:
    """How samples are cut from paragraphs (`data_conf` in data_utils.py)."""

    strategy: Literal["truncation", "single_sliding", "double_sliding"] = "truncation"
    """What happens to a sample longer than max_seq_length: truncation cuts its answer's end, then
    the prompt's beginning; single_sliding makes several samples of it, through a window that moves
    over prompt and answer; double_sliding too, but the prompt's end stands before every stretch of
    the answer."""
    ensure_answer_min_length: int = 1
    """Answer tokens that truncation leaves, at the expense of the oldest prompt tokens."""
    sliding_size: int | None = None
    """Tokens by which a sliding window moves on; null: two thirds of max_seq_length."""
    data_format: Literal["auto", "paragraph", "alpaca", "sharegpt", "openai"] = "auto"
    """What the records of files look like; auto: each file's is recognised, and said."""
    max_rejected: float = 0.01
    """Share of bad records that is put up with; they are written to a file beside the records."""
    num_process_worker: int | None = None
    """Processes that build records; null: as many as there are cores."""
    build_with: Literal["processes", "ray"] = "processes"
    """Build records with processes of this machine, or as a Ray Data job on the cluster at
    RAY_ADDRESS (requirements-ray.txt), all of whose machines see the files and output_dir."""
    verify: bool = False
    """Read all records, for their checksums, before anything else."""
    p: int = 1
    """Last tokens that a sliding window inside a long prompt learns; below 0: a number drawn for
    each window, 0: none, only answers are learned."""

    def __post_init__(self):
        at_least(self, 1, "ensure_answer_min_length", "sliding_size", "num_process_worker")
        at_least(self, 0, "max_rejected")
        if self.strategy == "truncation":
            self._refuse_without_effect("sliding_size", "p")
        else:
            self._refuse_without_effect("ensure_answer_min_length")

    def _refuse_without_effect(self, *names: str) -> None:
        for name in names:
            value, default = getattr(self, name), getattr(type(self), name)
            if value != default:
                raise ToolkitError(
                    f"{name} {value} has no effect with strategy {self.strategy}: leave it at"
                    f" {'null' if default is None else default}, or set another strategy"
                )


@dataclass(frozen=True)
class ModelSettings:
    """What is changed about the weights before training (the switches in models.py)."""

    global_num_layers_freeze: int = 0
    """Freeze the embedding and the first so many layers, train the rest; 0: none."""
    pre_seq_len: int | None = None
    """p-tuning v2 with so many virtual tokens; null: what config_name says, else no p-tuning."""
    prefix_projection: bool | None = None
    """Compute the virtual tokens through two linears; null: what config_name says, else false."""
    quantization_bit: Literal[0, 4, 8] | None = None
    """Quantise fp16 weights the released way while loading; null and 0: as stored."""
    load_in_8bit: bool = False
    """Hold the frozen weights in bitsandbytes int8."""
    load_in_4bit: bool = False
    """Hold the frozen weights in bitsandbytes nf4."""
    tie_word_embeddings: bool | None = None
    """Train head and embedding, in full, as one tensor; null: what config.json says, else false."""

    def __post_init__(self):
        at_least(self, 0, "global_num_layers_freeze")
        at_least(self, 1, "pre_seq_len")

    @property
    def bitsandbytes_bits(self) -> int:
        """8 or 4 bits of bitsandbytes; 0: it is not used."""
        return 8 if self.load_in_8bit else 4 if self.load_in_4bit else 0


@dataclass(frozen=True)
class LoraSettings:
    """LoRA through PEFT (`lora_info_args` in data_utils.py)."""

    section: ClassVar[str] = "lora_info_args"
    with_lora: bool = False
    """Train a LoRA adapter."""
    r: int = 8
    """Rank of the adapter."""
    lora_alpha: float = 32
    """The adapter's output is scaled by lora_alpha / r."""
    lora_dropout: float = 0.1
    """Dropout on the adapter's input."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained too."""
    target_modules: list[str] = field(default_factory=lambda: ["query_key_value"])
    """Linears that get an adapter: query_key_value, dense, dense_h_to_4h, dense_4h_to_h."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules trained in full and saved with the adapter, such as lm_head."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead (rsLoRA)."""
    use_dora: bool = False
    """Train the magnitude of each row apart (DoRA)."""

    def __post_init__(self):
        at_least(self, 1, "r", name_in=self.section)
        _check_adapter(self)


@dataclass(frozen=True)
class AdaLoraSettings:
    """AdaLoRA through PEFT (`adalora_info_args` in data_utils.py)."""

    section: ClassVar[str] = "adalora_info_args"
    with_lora: bool = False
    """Train an AdaLoRA adapter."""
    target_r: int = 8
    """Average rank at the end."""
    init_r: int = 12
    """Rank of every matrix at the start."""
    tinit: int | None = None
    """Steps before ranks are cut; null: a tenth of total_step."""
    tfinal: int | None = None
    """Steps at the end with ranks as they are; null: a third of total_step."""
    deltaT: int = 1
    """Steps between two cuts."""
    beta1: float = 0.85
    """Smoothing of the sensitivity."""
    beta2: float = 0.85
    """Smoothing of its uncertainty."""
    orth_reg_weight: float = 0.5
    """Weight of the term that keeps the singular vectors orthogonal."""
    total_step: int | None = None
    """Steps of the whole schedule; null: those of this training."""
    lora_alpha: float = 32
    """The adapter's output is scaled by lora_alpha / rank."""
    lora_dropout: float = 0.1
    """Dropout on the adapter's input."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained too."""
    target_modules: list[str] = field(default_factory=lambda: ["query_key_value"])
    """Linears that get an adapter: query_key_value, dense, dense_h_to_4h, dense_4h_to_h."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules trained in full and saved with the adapter, such as lm_head."""

    def __post_init__(self):
        at_least(self, 1, "target_r", "init_r", "deltaT", "total_step", name_in=self.section)
        at_least(self, 0, "tinit", "tfinal", "orth_reg_weight", name_in=self.section)
        if self.target_r > self.init_r:
            raise ToolkitError(
                f"{self.section}: target_r {self.target_r} is above init_r {self.init_r}: ranks are"
                " only ever cut"
            )
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ToolkitError(f"{self.section}.{name} {getattr(self, name)}: between 0 and 1")
        _check_adapter(self)


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
    prompt_lookup_tokens: int = 0
    """Draft up to so many tokens at a time where the answer repeats what was said; needs do_sample
    false, and gives the same answer; 0: off."""
    kv_cache_bits: Literal[8, 16] = 16
    """Of keys and values on a GPU: 8 halves their memory, at a small error."""
    inference_precision: Literal["auto", "32", "bf16", "16"] = "auto"
    """Of the weights; auto: as stored on a GPU; on a CPU 32, over large int8 and int4 bf16."""
    device: str = "auto"
    """cuda, cuda:1, mps or cpu; auto: the GPU if there is one."""


def at_least(settings: Any, bound: float, *names: str, name_in: str = "") -> None:
    """Refuse the first of these settings that is set to less than the bound, or to NaN.

    name_in: the section that stands before their names in what the user reads.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= bound:  # NaN is not
            full = f"{name_in}.{name}".removeprefix(".")
            raise ToolkitError(f"{full} {value}: allowed is {bound} and above")


def _check_adapter(settings: LoraSettings | AdaLoraSettings) -> None:
    where = settings.section
    if not settings.target_modules:
        raise ToolkitError(
            f"{where}.target_modules is empty: allowed are {', '.join(BLOCK_LINEARS)}"
        )
    for name in settings.target_modules:
        if name not in BLOCK_LINEARS:
            raise ToolkitError(
                f"{where}.target_modules: unknown {name!r}.{nearest(name, BLOCK_LINEARS)} Allowed"
                f" are {', '.join(BLOCK_LINEARS)}"
            )
    if not 0 <= settings.lora_dropout < 1:
        raise ToolkitError(f"{where}.lora_dropout {settings.lora_dropout}: 0 up to below 1")
    if settings.lora_alpha <= 0:
        raise ToolkitError(f"{where}.lora_alpha {settings.lora_alpha}: allowed is above 0")
