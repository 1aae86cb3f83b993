"""LoRA and AdaLoRA through PEFT: adding, loading strictly, merging, ranks."""

import json
import os
from typing import Any

from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.utils import load_peft_weights
from torch import nn

from ..errors import ToolkitError
from ..model import ChatGLMForConditionalGeneration
from ..quantization.linear import QuantizedLinear, dequantize_blocks
from ..settings import AdaLoraSettings, LoraSettings

CONFIG_FILE = "adapter_config.json"


def add_lora(model: ChatGLMForConditionalGeneration, settings: LoraSettings) -> PeftModel:
    """LoRA (Hu et al. 2021) around the target linears; everything else is frozen."""
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
    known = [name for name, _ in model.named_modules()]
    for name in config.modules_to_save or []:
        if not any(path.rpartition(".")[2] == name for path in known):
            raise ToolkitError(
                f"modules_to_save: the model has no module {name!r}; allowed are such as lm_head,"
                " word_embeddings, input_layernorm, final_layernorm"
            )
    return get_peft_model(model, config)


def load_adapters(model: ChatGLMForConditionalGeneration, folders: dict[str, str]) -> PeftModel:
    """The model with every named adapter on it; the first is active.

    Raises:
        ToolkitError: if a folder is no adapter of this model, a tensor is missing, surplus or
            misshapen, or an adapter was never trained (all its lora_B, or lora_E, are zero).
    """
    loaded: Any = None
    for name, folder in folders.items():
        read_adapter_config(folder)
        try:
            if loaded is None:
                loaded = PeftModel.from_pretrained(model, folder, adapter_name=name)
            else:
                loaded.load_adapter(folder, adapter_name=name)
        except (ValueError, KeyError, RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ToolkitError(f"{folder}: not an adapter of this model ({reason})") from None
        _check_adapter(loaded, name, folder)
    return loaded.eval()


def read_adapter_config(folder: str) -> dict[str, Any]:
    """The adapter_config.json of a folder.

    Raises:
        ToolkitError: if it can't be read, or is neither LoRA's nor AdaLoRA's.
    """
    path = os.path.join(folder, CONFIG_FILE)
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
    own = {
        key.replace(".modules_to_save", "").replace(f".{name}", ""): value
        for key, value in model.state_dict().items()
        if f".{name}" in key and not key.endswith(f".ranknum.{name}")
    }
    stored_names = {key.replace(".modules_to_save", "") for key in stored}
    with_biases = read_adapter_config(folder).get("bias", "none") != "none"
    surplus = {n for n in stored_names - own.keys() if not (with_biases and n.endswith(".bias"))}
    missing = own.keys() - stored_names
    if missing or surplus:
        faults = [
            f"{len(names)} {kind}: {', '.join(sorted(names)[:4])}"
            for kind, names in (("missing", missing), ("surplus", surplus))
            if names
        ]
        raise ToolkitError(f"{folder}: the adapter does not fit the model: {'; '.join(faults)}")
    starts_at_zero = "lora_E" if any("lora_E" in key for key in stored) else "lora_B"
    if not any(value.any() for key, value in stored.items() if starts_at_zero in key):
        raise ToolkitError(
            f"{folder}: this adapter was never trained: all its {starts_at_zero} are zero"
        )


def describe_adapters(model: PeftModel) -> str:
    """One line an adapter: its name, kind, rank, and what it stands on."""
    return "\n".join(
        f"loaded adapter {name!r}: {config.peft_type.value}, rank"
        f" {getattr(config, 'target_r', None) or config.r}, on {', '.join(config.target_modules)}"
        for name, config in model.peft_config.items()
    )


def merge_adapter(model: PeftModel) -> ChatGLMForConditionalGeneration:
    """The plain model with the active adapter added into its weights.

    Weights packed in int8 or int4 (released or bitsandbytes') are dequantised first; the result
    is no longer quantised.
    """
    base = model.get_base_model()
    dtype = base.dtype
    if any(isinstance(module, QuantizedLinear) for module in base.modules()):
        dequantize_blocks(base, dtype)
        base.config.quantization_bit = 0
    return model.merge_and_unload(safe_merge=True)


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


def needs_dequantising(model: nn.Module) -> bool:
    """True if merging changes how the weights are held."""
    return any(
        isinstance(module, QuantizedLinear)
        or type(module.weight).__name__ in ("Int8Params", "Params4bit")
        for module in model.modules()
        if isinstance(module, nn.Linear)
    )
