"""A checkpoint of another writer made into a folder that the chat scripts read.

What is in it decides: virtual tokens alone become a prefix folder, LoRA an adapter, anything else a
folder of full weights. The tensors are put into a skeleton of the model without values, so that
names and shapes are held to the very model that will read them, and are saved as training saves.
"""

import contextlib
import copy
import dataclasses
import functools
import io
import json
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from .building import load_for_inference
from .checkpoints import save_trained
from .configuration import ChatGLMConfig
from .errors import ToolkitError
from .files import replace_folder
from .model import ChatGLMForConditionalGeneration
from .old_base import Base, find_base, settings_of_run
from .old_files import OldCheckpoint, read_old
from .old_parts import (
    Parts,
    adapter_settings,
    first_difference,
    packed_bits,
    same,
    some,
    sort_tensors,
    trained_names,
)
from .run_settings import Settings
from .saved import kind_of
from .settings import (
    AdaLoraSettings,
    DataSettings,
    LoraSettings,
    ModelSettings,
    TrainSettings,
)
from .tuning.adapters import adapter_state, add_adalora, add_lora
from .tuning.prompt import PREFIX
from .weights import DTYPES

PRECISIONS: dict[torch.dtype, Any] = {dtype: name for name, dtype in DTYPES.items()}
SCRIPTS = {"adapter": "infer_lora_finetuning.py", "prefix": "infer_finetuning.py",
           "weights": "infer_finetuning.py"}  # fmt: skip
ADAPTERS = {"lora": "a LoRA adapter", "adalora": "an AdaLoRA adapter"}


@dataclass(frozen=True)
class Converted:
    """A skeleton that holds what is to be written."""

    model: Any
    state: dict[str, Tensor]
    settings: Settings
    known: dict[str, Any]
    """What is known of its training, for settings.json; {}: that has all of `settings`."""
    what: str


def convert(
    checkpoint: str,
    save_dir: str,
    *,
    model_name_or_path: str = "",
    lora_alpha: float | None = None,
    trust_pickle: bool = False,
) -> str:
    """Write save_dir and load it back; a line that says what it is and how to chat with it.

    Raises:
        ToolkitError: if a tensor is unknown, missing or misshapen, something needed is not told,
            or save_dir exists.
    """
    if os.path.exists(save_dir) and not (os.path.isdir(save_dir) and not os.listdir(save_dir)):
        raise ToolkitError(f"save_dir {save_dir}: exists already; name a new folder")
    old = read_old(checkpoint, trust_pickle=trust_pickle)
    run = settings_of_run(old.run) if old.run else None
    base = find_base(model_name_or_path, run)
    if run is not None:
        train = dataclasses.replace(run.train, model_name_or_path=base.name)
        run = dataclasses.replace(run, train=train)
    parts = sort_tensors(old.state, old.where)
    made = _Conversion(parts, old, base, run, lora_alpha).make()
    if run is not None:
        made = dataclasses.replace(made, known={})
    kind = _write(made, base, save_dir)
    return (
        f"wrote {save_dir}: {made.what}, from {old.where} ({old.kind}), and read it back; talk to"
        f" it with: python {SCRIPTS[kind]} --checkpoint {save_dir}"
    )


class _Conversion:
    """What the parts of one checkpoint become; run: its settings if it is of our own."""

    def __init__(
        self,
        parts: Parts,
        old: OldCheckpoint,
        base: Base,
        run: Settings | None,
        lora_alpha: float | None,
    ):
        self.parts, self.old, self.base, self.run = parts, old, base, run
        self.lora_alpha = lora_alpha
        self.bits = packed_bits(parts.weights, hidden_size=base.config.hidden_size)
        self.known: dict[str, Any] = {"model_name_or_path": base.name}
        if self.bits and not base.config.quantization_bit:
            self.known["quantization_bit"] = self.bits

    def make(self) -> Converted:
        """The one thing that is worth keeping of it."""
        parts, where = self.parts, self.old.where
        if parts.adapter and parts.prefix:
            raise ToolkitError(f"{where}: an adapter and a prefix encoder together, which no chat"
                               " script reads")  # fmt: skip
        if self.lora_alpha is not None and (self.run is not None or not parts.adapter):
            reason = (
                "run.json says what it was" if parts.adapter else f"there is no LoRA in {where}"
            )
            raise ToolkitError(f"--lora_alpha {self.lora_alpha:g}: {reason}; leave it out")
        if parts.adapter:
            return self.adapter()
        if not parts.weights:
            return self.prefix()
        whole = self.whole()
        if self.run is None and parts.prefix and not self._first_change():
            alone = self.prefix()
            left_out = f"{alone.what} (the weights beside them are those of {self.base.name})"
            return dataclasses.replace(alone, what=left_out)
        return whole

    def _first_change(self) -> str:
        return first_difference(self.parts.weights, self.base_weights)

    @functools.cached_property
    def base_weights(self) -> dict[str, Tensor]:
        """The base's, packed as they are in the checkpoint."""
        return self.base.weights(bits=self.known.get("quantization_bit", 0))

    def prefix(self) -> Converted:
        """The virtual tokens alone."""
        state = self.parts.prefix
        model = _skeleton(self.base.config, state)
        names = [name for name in model.state_dict() if name.startswith(PREFIX)]
        _fill(model, state, names, self.old.where)
        shape = {n: getattr(model.config, n) for n in ("pre_seq_len", "prefix_projection")}
        settings = self._settings(model=ModelSettings(**shape))
        what = f"{model.config.pre_seq_len} virtual tokens on {self.base.name}"
        return Converted(model, state, settings, {**self.known, **shape}, what)

    def whole(self) -> Converted:
        """Full weights, and the virtual tokens if there are any."""
        config, state = copy.deepcopy(self.base.config), self.parts.weights | self.parts.prefix
        config.quantization_bit = self.bits
        config.quantization_embeddings = "transformer.word_embeddings.weight_scale" in state
        if self.run is not None and self.run.method == "freeze":
            state = self.base_weights | state
        prefix = {name: tensor for name, tensor in state.items() if name.startswith(PREFIX)}
        model = _skeleton(config, prefix)
        tied = set(model._tied_weights_keys) if config.tie_word_embeddings else set()
        state = {name: tensor for name, tensor in state.items() if name not in tied}
        _fill(model, state, model.state_dict().keys() - tied, self.old.where)
        model.tie_weights()
        state |= {head: state[model._tied_weights_keys[head]] for head in tied}
        dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
        dtype = functools.reduce(torch.promote_types, dtypes)
        if dtype not in PRECISIONS:
            raise ToolkitError(f"{self.old.where}: {dtype} weights; expected fp32, bf16 or fp16")
        settings = self._settings(precision=PRECISIONS[dtype])
        saved = str(DTYPES[settings.train.precision]).removeprefix("torch.")
        what = f"int{self.bits} weights" if self.bits else f"full weights in {saved}"
        what += f" and {model.config.pre_seq_len} virtual tokens" if prefix else ""
        return Converted(model, state, settings, {"model_name_or_path": self.base.name}, what)

    def adapter(self) -> Converted:
        """LoRA or AdaLoRA; weights beside it must be the base's."""
        where = self.old.where
        settings = self.run or self._adapter_settings()
        model: Any = _skeleton(_plain(self.base), {})
        if settings.method == "lora":
            options: Any = settings.lora
            model, rank = add_lora(model, options), options.r
        elif settings.method == "adalora":  # a schedule that ended where this was written
            steps = max(int(self.old.rest.get("global_step") or 1), 1)
            options = settings.adalora
            options = dataclasses.replace(options, tinit=0, tfinal=0, total_step=steps)
            model, rank = add_adalora(model, options, total_steps=steps), options.init_r
            model.peft_config["default"].rank_pattern = self.old.rest.get("rank_pattern")
        else:
            raise ToolkitError(f"{where}: an adapter, but run.json is of {settings.method}")
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        state, beside = trained_names(self.parts, trained, where)
        _fill(model, state, trained, where)
        differing = first_difference(beside, self.base_weights) if beside else ""
        if differing:
            raise ToolkitError(
                f"{where}: {differing} under the adapter is not that of {self.base.name}: give the"
                " weights that it was trained on"
            )
        what = (
            f"{ADAPTERS[settings.method]} of rank {rank}, lora_alpha {options.lora_alpha:g}, for"
            f" {', '.join(options.target_modules)} of {self.base.name}"
        )
        known = {**self.known, options.section: dataclasses.asdict(options)}
        return Converted(model, state, settings, known, what)

    def _adapter_settings(self) -> Settings:
        found = adapter_settings(self.parts.adapter, self.old, lora_alpha=self.lora_alpha)
        if isinstance(found, LoraSettings):
            return self._settings(lora=found)
        return self._settings(adalora=found)

    def _settings(
        self,
        *,
        precision: Any = "32",
        model: ModelSettings | None = None,
        lora: LoraSettings | None = None,
        adalora: AdaLoraSettings | None = None,
    ) -> Settings:
        """Those of our own run, or as much of them as saving looks at."""
        return self.run or Settings(
            TrainSettings(model_name_or_path=self.base.name, precision=precision),
            DataSettings(),
            model or ModelSettings(),
            lora or LoraSettings(),
            adalora or AdaLoraSettings(),
        )


def _plain(base: Base) -> ChatGLMConfig:
    config: Any = copy.deepcopy(base.config)
    config.quantization_bit, config.quantization_embeddings = 0, False
    config.name_or_path = base.name
    return config


def _skeleton(config: ChatGLMConfig, prefix: dict[str, Tensor]) -> ChatGLMForConditionalGeneration:
    """The model without values, with the prefix encoder that these tensors are of."""
    own: Any = copy.deepcopy(config)
    table = prefix.get(f"{PREFIX}embedding.weight")
    own.pre_seq_len = None if not prefix else 1 if table is None or not table.dim() else len(table)
    own.prefix_projection = any(name.startswith(f"{PREFIX}trans.") for name in prefix)
    with torch.device("meta"):
        return ChatGLMForConditionalGeneration(own)


def _fill(model: Any, state: dict[str, Tensor], names: Collection[str], where: str) -> None:
    """Put the tensors into the skeleton; they must be those of `names`, in its shapes."""
    own = {name: tensor.shape for name, tensor in model.state_dict().items() if name in names}
    misshapen = [
        f"{name} {list(tensor.shape)} != {list(own[name])}"
        for name, tensor in state.items()
        if name in own and tensor.shape != own[name]
    ]
    faults = [
        f"{len(found)} {kind}: {some(found)}"
        for kind, found in (
            ("missing", own.keys() - state.keys()),
            ("unknown", state.keys() - own.keys()),
            ("misshapen (stored != expected)", misshapen),
        )
        if found
    ]
    if faults:
        raise ToolkitError(f"{where}: does not fit the model: {'; '.join(faults)}")
    model.load_state_dict(state, strict=False, assign=True)


def _write(made: Converted, base: Base, save_dir: str) -> str:
    """Aside, read back, then renamed; gives the kind of folder that it is."""
    folder = save_dir.rstrip("/")
    aside = f"{folder}.part"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        save_trained(made.model, made.state, made.settings, aside, tokenizer=base.tokenizer)
        if made.known:
            known = json.dumps(made.known, ensure_ascii=False, indent=2)
            Path(aside, "settings.json").write_text(f"{known}\n", encoding="utf-8")
        _prove(made, aside)
        replace_folder(aside, folder)
    except ToolkitError as error:
        raise ToolkitError(str(error).replace(aside, folder)) from None
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ToolkitError(f"{folder}: could not be written ({reason})") from error
    finally:
        for leftover in (aside, f"{aside}.part"):
            shutil.rmtree(leftover, ignore_errors=True)
    return kind_of(folder)


def _prove(made: Converted, folder: str) -> None:
    """The folder loads as the chat scripts load it, and holds the tensors that were meant."""
    whole = made.settings.method in ("full", "freeze")
    precision = made.settings.train.precision if whole else "bf16"
    with contextlib.redirect_stdout(io.StringIO()):
        load_for_inference(folder, precision=precision, device="cpu")
    expected = made.state
    if made.settings.method in ADAPTERS:
        expected = adapter_state(made.model, made.state)
    stored: dict[str, Tensor] = {}
    for path in Path(folder).glob("*.safetensors"):
        stored |= read_old(str(path)).state
    for name in expected.keys() | stored.keys():
        found = stored.get(name)
        if found is None or name not in expected or not same(found, expected[name].to(found)):
            raise ToolkitError(f"{folder}: read back, {name} is not what was converted")
