"""LoRA and AdaLoRA through PEFT: adding, saving, loading strictly, merging, ranks."""

import contextlib
import json
import os
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, load_peft_weights
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import ToolkitError
from ..model import ChatGLMForConditionalGeneration
from ..quantization.bnb import is_bitsandbytes
from ..quantization.linear import dequantize_packed, is_packed
from ..settings import AdaLoraSettings, LoraSettings
from ..tying import is_shared, part_head
from . import ADAPTER_CONFIG, ADAPTER_WEIGHTS

RESERVED_NAMES = {"", "none", "model", "base_model", "base_layer", "modules_to_save"}
"""What no adapter may be called: the chat's word for no adapter, and PEFT's own."""


def add_lora(model: ChatGLMForConditionalGeneration, settings: LoraSettings) -> PeftModel:
    """LoRA (Hu et al. 2021) around the target linears; everything else is frozen."""
    if settings.use_dora:
        _refuse_dora(model)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # PEFT takes any number
        lora_dropout=settings.lora_dropout,
        bias=settings.bias,
        target_modules=settings.target_modules,
        modules_to_save=settings.modules_to_save or None,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )
    return _add(model, config)


def add_adalora(
    model: ChatGLMForConditionalGeneration, settings: AdaLoraSettings, *, total_steps: int
) -> PeftModel:
    """AdaLoRA (Zhang et al. 2023): ranks are allotted over total_steps optimizer steps.

    Raises:
        ToolkitError: if the steps before the first and after the last cut leave none between.
    """
    total = total_steps if settings.total_step is None else settings.total_step
    tinit = total // 10 if settings.tinit is None else settings.tinit
    tfinal = total // 3 if settings.tfinal is None else settings.tfinal
    if tinit >= total - tfinal:
        raise ToolkitError(
            f"adalora_info_args: tinit {tinit} and tfinal {tfinal} leave no step of total_step"
            f" {total} to cut ranks in: train longer, or lower them"
        )
    if total != total_steps:
        print(f"adalora_info_args.total_step is {total}, this training has {total_steps} steps:"
              " ranks are final " + (f"from step {total - tfinal}" if total <= total_steps
              else "only if it is continued"))  # fmt: skip
    config = AdaLoraConfig(
        task_type="CAUSAL_LM",
        target_r=settings.target_r,
        init_r=settings.init_r,
        tinit=tinit,
        tfinal=tfinal,
        deltaT=settings.deltaT,
        beta1=settings.beta1,
        beta2=settings.beta2,
        orth_reg_weight=settings.orth_reg_weight,
        total_step=total,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=settings.lora_dropout,
        bias=settings.bias,
        target_modules=settings.target_modules,
        modules_to_save=settings.modules_to_save or None,
    )
    return _add(model, config)


def _add(model: ChatGLMForConditionalGeneration, config: LoraConfig) -> PeftModel:
    for name in config.modules_to_save or []:
        fault = _why_not_to_save(model, name, set(config.target_modules or []))
        if fault:
            raise ToolkitError(
                f"modules_to_save {name!r}: {fault}; allowed are such as lm_head, word_embeddings,"
                " input_layernorm, final_layernorm"
            )
    shared = is_shared(model)
    return _with_own_head(_with_settled_ranknum(get_peft_model(model, config)), shared=shared)


def _with_own_head(model: PeftModel, *, shared: bool) -> PeftModel:
    """A head that was the embedding's tensor gets its own if an adapter changes either of them.

    PEFT trains copies of modules_to_save; but merged into one of the two, LoRA would change both.
    """
    base: Any = model.get_base_model()
    ends = {"lm_head": base.get_output_embeddings(),
            "word_embeddings": base.get_input_embeddings()}  # fmt: skip
    changed = [n for n, m in ends.items() if isinstance(m, BaseTunerLayer | ModulesToSaveWrapper)]
    if shared and changed:
        if is_shared(base):
            part_head(base)
        print("head and embedding were one tensor: they are two now, as the adapter changes"
              f" {' and '.join(changed)}")  # fmt: skip
    return model


def _with_settled_ranknum(model: PeftModel) -> PeftModel:
    """AdaLoRA divides by `ranknum`, a constant in the precision of the model.

    PEFT makes a trained parameter of it when it moves it to another precision, and never saves it.
    """
    dtype = model.get_base_model().dtype
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(dtype)  # type: ignore[arg-type]
    return model


def _why_not_to_save(model: nn.Module, name: str, targets: set[str]) -> str:
    found = [module for path, module in model.named_modules() if path.split(".")[-1] == name]
    inside = {path.split(".")[-1] for module in found for path, _ in module.named_modules()}
    if not found:
        return "the model has no such module"
    if targets & (inside | {name}):
        return "linears that get an adapter can't be trained in full too"
    if not all(t.is_floating_point() for module in found for t in module.state_dict().values()):
        return "quantised weights can't be trained themselves"
    return ""


def save_adapter(model: PeftModel, state: dict[str, Tensor], folder: str) -> None:
    """PEFT's own format; state: the model's."""
    with _ranks_of_file(model):
        model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)


def adapter_state(model: PeftModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's tensors as `save_adapter` writes them, by their names in the file."""
    with _ranks_of_file(model):
        return get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)


@contextlib.contextmanager
def _ranks_of_file(model: PeftModel) -> Iterator[None]:
    """AdaLoRA's cut ranks are left out of the file while they hold.

    In the midst of the schedule a cut singular value may have grown again since the last cut, and
    leaving it out would change the model.
    """
    config: Any = model.peft_config["default"]
    pattern = config.rank_pattern
    if pattern and not _cuts_hold(model, pattern):
        config.rank_pattern = None
    try:
        yield
    finally:
        config.rank_pattern = pattern


def _cuts_hold(model: PeftModel, pattern: dict[str, list[bool]]) -> bool:
    values = {
        name.removesuffix(".default"): value
        for name, value in model.get_base_model().named_parameters()
        if ".lora_E." in name
    }
    return all(
        not values[name.removesuffix(".default")].flatten()[~torch.tensor(kept).flatten()].any()
        for name, kept in pattern.items()
    )


def load_adapters(model: ChatGLMForConditionalGeneration, folders: dict[str, str]) -> PeftModel:
    """The model with every named adapter on it; the first is active.

    Raises:
        ToolkitError: if a folder is no adapter of this model, a tensor is missing, surplus or
            misshapen, or an adapter was never trained (all its lora_B, or lora_E, are zero).
    """
    loaded: Any = None
    shared = is_shared(model)
    taken = {part for path in model.state_dict() for part in path.split(".")} | RESERVED_NAMES
    for name, folder in folders.items():
        if name in taken or "." in name:
            raise ToolkitError(
                f"adapters: {name!r} can't be a name: neither can 'none', what has a dot, and names"
                " of the model's own parts"
            )
        _check_files(model, folder)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what matters of them is an error below
                if loaded is None:
                    loaded = PeftModel.from_pretrained(model, folder, adapter_name=name)
                else:
                    loaded.load_adapter(folder, adapter_name=name)
        except (ValueError, KeyError, TypeError, RuntimeError, OSError, EOFError, SafetensorError,
                pickle.UnpicklingError) as error:  # fmt: skip
            reason = " ".join(str(error).split())[:300]
            raise ToolkitError(f"{folder}: not an adapter of this model ({reason})") from None
        _check_adapter(loaded, name, folder)
    return _with_own_head(_with_settled_ranknum(loaded), shared=shared).eval()


def _refuse_dora(model: nn.Module) -> None:
    """DoRA reckons with the weights themselves, which PEFT can't always dequantise."""
    if is_packed(model):
        raise ToolkitError("DoRA over weights in the released int8 or int4 can't be computed: name"
                           " the fp16 weights")  # fmt: skip
    if any(type(p).__name__ == "Int8Params" and p.device.type == "cpu" for p in model.parameters()):
        raise ToolkitError("DoRA over bitsandbytes' int8 needs a GPU: use load_in_4bit on a CPU")


def _check_files(model: nn.Module, folder: str) -> None:
    if read_adapter_config(folder).get("use_dora"):
        _refuse_dora(model)
    if not any(os.path.exists(os.path.join(folder, name)) for name in ADAPTER_WEIGHTS):
        raise ToolkitError(f"{folder}: missing {' or '.join(ADAPTER_WEIGHTS)}")


def read_adapter_config(folder: str) -> dict[str, Any]:
    """The adapter_config.json of a folder.

    Raises:
        ToolkitError: if it can't be read, or is neither LoRA's nor AdaLoRA's.
    """
    path = os.path.join(folder, ADAPTER_CONFIG)
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ToolkitError(f"{path}: not a PEFT adapter's config ({error!r})") from None
    if kind not in ("LORA", "ADALORA"):
        raise ToolkitError(f"{path}: peft_type {kind!r}; this toolkit loads LORA and ADALORA")
    return config


def _check_adapter(model: PeftModel, name: str, folder: str) -> None:
    """PEFT leaves what a file lacks at its new values, and only warns: hold them to each other."""
    stored = load_peft_weights(folder, device="cpu")
    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    faults = [
        f"{len(names)} {kind}: {', '.join(sorted(names)[:4])}"
        for kind, names in (
            ("missing", own.keys() - stored.keys()),
            ("surplus", stored.keys() - own.keys()),
        )
        if names
    ]
    if faults:
        raise ToolkitError(f"{folder}: the adapter does not fit the model: {'; '.join(faults)}")
    damaged = sorted(key for key, value in stored.items() if not torch.isfinite(value).all())
    if damaged:
        raise ToolkitError(f"{folder}: not finite: {', '.join(damaged[:4])}: train it anew")
    starts_at_zero = "lora_E" if any("lora_E" in key for key in stored) else "lora_B"
    if not any(value.any() for key, value in stored.items() if starts_at_zero in key):
        raise ToolkitError(
            f"{folder}: this adapter was never trained: all its {starts_at_zero} are zero"
        )


def describe_adapters(model: PeftModel) -> str:
    """One line an adapter: its name, kind, rank, and what it stands on."""
    lines = []
    configs: dict[str, Any] = model.peft_config
    for name, config in configs.items():
        targets = config.target_modules
        rank = getattr(config, "target_r", config.r)
        on = targets if isinstance(targets, str) else ", ".join(sorted(targets))
        lines.append(f"loaded adapter {name!r}: {config.peft_type.value}, rank {rank}, on {on}")
    return "\n".join(lines)


def merge_adapter(model: PeftModel) -> ChatGLMForConditionalGeneration:
    """The plain model with the active adapter added into its weights.

    Weights packed in int8 or int4 (released or bitsandbytes') are dequantised first; the result
    is no longer quantised.

    Raises:
        ToolkitError: if the sum is not finite.
    """
    whole = _on_dequantised(model) if needs_dequantising(model) else model
    try:
        return whole.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ToolkitError(f"the adapter can't be merged: {error}") from None


def _on_dequantised(model: PeftModel) -> PeftModel:
    """The active adapter on the plain weights of a quantised model, which is taken apart."""
    name = model.active_adapter
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    base: Any = model.unload()
    dtype = base.dtype
    if is_bitsandbytes(base):
        base = base.dequantize(dtype)
    dequantize_packed(base, dtype)
    base.config.quantization_bit, base.config.quantization_embeddings = 0, False
    again = get_peft_model(base, model.peft_config[name], adapter_name=name)
    set_peft_model_state_dict(again, state, adapter_name=name)
    return again.eval()


def needs_dequantising(model: nn.Module) -> bool:
    """True if merging changes how the weights are held."""
    return is_packed(model) or is_bitsandbytes(model)


def plain_model(model: nn.Module) -> nn.Module:
    """The model inside PEFT's wrapper, adapters in place; any other model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def adapter_ranks(model: nn.Module) -> dict[str, int]:
    """The rank of each adapted linear, as AdaLoRA has allotted them so far.

    A singular value (lora_E) that was cut is zero.
    """
    return {
        name.partition(".lora_E")[0].removeprefix("base_model.model."): int((values != 0).sum())
        for name, values in model.named_parameters()
        if ".lora_E." in name
    }
