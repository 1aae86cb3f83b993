"""What the tensors of an old checkpoint are: released names, and what they tell of the training.

Every wrapper put its own words before the names: `_forward_module.`, `module.`, `model.`,
`_TransformerLightningModule__backbone.`, `base_model.model.` and so on. They are not listed: a
tensor of ChatGLM-6B is one with `transformer.` or `lm_head.` in its name, and is called from there.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .errors import ToolkitError
from .old_files import OldCheckpoint, Unknown
from .settings import AdaLoraSettings, LoraSettings
from .tuning.prompt import PREFIX

_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")
"""Tables that the released code stores and anybody computes."""
_ADAPTED = re.compile(
    r"(?P<path>.+)\.(?P<part>lora_[ABE]|lora_magnitude_vector|ranknum)"
    r"(?:\.(?!weight$)(?P<adapter>[^.]+))?(?P<tail>\.weight)?"
)
_SAVED_MODULE = re.compile(
    r"(?P<path>.+)\.(?P<part>modules_to_save)\.(?P<adapter>[^.]+)(?P<tail>\..+)"
)


@dataclass
class Parts:
    """The tensors of a checkpoint by the released names, sorted by what they are."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    prefix: dict[str, Tensor] = field(default_factory=dict)
    adapter: dict[str, Tensor] = field(default_factory=dict)
    """By the names that PEFT gives an adapter called "default", less base_model.model."""


def sort_tensors(state: dict[str, Tensor], where: str) -> Parts:
    """Each tensor by its released name.

    Raises:
        ToolkitError: for a name that is none of this model's, for two adapters, or if two tensors
            come to one name and differ.
    """
    parts, unknown, adapters = Parts(), [], set()
    for stored, tensor in state.items():
        words = stored.split(".")
        start = max((i for i, w in enumerate(words) if w in ("transformer", "lm_head")), default=-1)
        name = ".".join(words[start:])
        if start < 0:
            unknown.append(stored)
            continue
        if _COMPUTED.search(name):
            continue
        found = _SAVED_MODULE.fullmatch(name) or _ADAPTED.fullmatch(name)
        if found:
            adapters.add(found["adapter"] or "default")
            if len(adapters) > 1:
                listed = ", ".join(sorted(adapters))
                raise ToolkitError(f"{where}: the adapters {listed} together; one is read")
            name = f"{found['path']}.{found['part']}.default{found['tail'] or ''}"
            group = parts.adapter
        else:
            name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
            group = parts.prefix if name.startswith(PREFIX) else parts.weights
        if name in group and not same(group[name], tensor):
            raise ToolkitError(f"{where}: two different tensors are {name}, one of them {stored}")
        group[name] = tensor
    if unknown:
        raise ToolkitError(f"{where}: not of a ChatGLM-6B: {some(unknown)}")
    return parts


def packed_bits(weights: dict[str, Tensor], *, hidden_size: int) -> int:
    """8 or 4 if the blocks are packed the released way, else 0."""
    name = next((name for name in weights if name.endswith("attention.dense.weight_scale")), "")
    packed = weights.get(name.removesuffix("_scale")) if name else None
    return 0 if packed is None else 8 if packed.shape[-1] == hidden_size else 4


def first_difference(weights: dict[str, Tensor], others: dict[str, Tensor]) -> str:
    """The first name under which `others` has another value, rounded to the precision here."""
    for name, tensor in weights.items():
        if name not in others or not same(tensor, others[name].to(tensor.dtype)):
            return name
    return ""


def same(tensor: Tensor, other: Tensor) -> bool:
    """Equal in type, shape and every value."""
    return tensor.shape == other.shape and tensor.dtype == other.dtype and tensor.equal(other)


def some(names: Collection[str]) -> str:
    """The first four."""
    return ", ".join(sorted(names)[:4]) + (" ..." if len(names) > 4 else "")


# Adapters.


def adapter_settings(
    adapter: dict[str, Tensor], old: OldCheckpoint, *, lora_alpha: float | None
) -> LoraSettings | AdaLoraSettings:
    """Rank and modules out of the tensors; the scale out of a config beside them, or as given.

    Raises:
        ToolkitError: if neither says by what the adapter is scaled, or they say different things.
    """
    options = old.adapter_config or _find_options(old.rest)
    ranks = [t.shape[0] for name, t in adapter.items() if ".lora_A." in name and t.dim()]
    if not ranks:
        raise ToolkitError(f"{old.where}: an adapter without lora_A")
    adalora = any(".lora_E." in name for name in adapter)
    _check_options(options, old.where, rank=ranks[0], rank_key="init_r" if adalora else "r")
    saved = {name.split(".modules_to_save.")[0] for name in adapter if ".modules_to_save." in name}
    tuned = {name.split(".lora_")[0] for name in adapter if ".lora_" in name}
    common: dict[str, Any] = {
        "with_lora": True,
        "lora_alpha": _lora_alpha(options, old.where, lora_alpha),
        "lora_dropout": options.get("lora_dropout", 0.0),
        "bias": options.get("bias", "none"),
        "target_modules": sorted({path.rpartition(".")[2] for path in tuned}),
        "modules_to_save": sorted({path.rpartition(".")[2] for path in saved}),
    }
    if adalora:
        target = min(options.get("target_r") or ranks[0], ranks[0])
        return AdaLoraSettings(**common, init_r=ranks[0], target_r=target)
    return LoraSettings(
        **common,
        r=ranks[0],
        use_rslora=bool(options.get("use_rslora", False)),
        use_dora=any("lora_magnitude_vector" in name for name in adapter),
    )


def _check_options(options: dict[str, Any], where: str, *, rank: int, rank_key: str) -> None:
    """What was found is of this very adapter, and scales all of it alike."""
    if options.get(rank_key, rank) != rank:
        raise ToolkitError(
            f"{where}: its lora_A have {rank} rows, but the config found with it says {rank_key}"
            f" {options[rank_key]}: take that config away and give --lora_alpha"
        )
    if options.get("alpha_pattern"):
        raise ToolkitError(f"{where}: its config has an alpha_pattern; one lora_alpha is read")


def _lora_alpha(options: dict[str, Any], where: str, given: float | None) -> float:
    found = options.get("lora_alpha")
    if given is None and not isinstance(found, int | float):
        raise ToolkitError(
            f"{where}: no file says by what its LoRA is scaled: give --lora_alpha as it was in"
            " training"
        )
    if given is not None and found not in (None, given):
        raise ToolkitError(f"--lora_alpha {given:g}, but {where} was trained with {found}")
    alpha = found if given is None else given
    assert isinstance(alpha, int | float)
    return alpha


def _find_options(value: Any, depth: int = 0) -> dict[str, Any]:
    """The first dict or object with a lora_alpha in what a trainer stored beside the weights."""
    content = value.state if isinstance(value, Unknown) else value
    if not isinstance(content, dict) or depth > 6:
        return {}
    if "lora_alpha" in content:
        return content
    return next(filter(None, (_find_options(v, depth + 1) for v in content.values())), {})


def trained_names(
    parts: Parts, trained: Collection[str], where: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors by the names of PEFT's trained parameters; and the weights that are not trained.

    What has no such name keeps its own, and is refused where it is put into the model.
    """
    state, left = {}, {}
    for name, tensor in parts.adapter.items():
        full = f"base_model.model.{name}"
        if ".ranknum." in name:
            _check_ranknum(name, tensor, parts.adapter, where)
        else:
            state[f"{full}.weight" if f"{full}.weight" in trained else full] = tensor
    for name, tensor in parts.weights.items():
        module, _, last = name.rpartition(".")
        ways = (f"base_model.model.{name}", f"base_model.model.{module}.base_layer.{last}")
        full = next((way for way in ways if way in trained), "")
        if full:
            state[full] = tensor
        else:
            left[name] = tensor
    return state, left


def _check_ranknum(name: str, value: Tensor, adapter: dict[str, Tensor], where: str) -> None:
    """AdaLoRA divides by it; what loads the adapter sets it to the number of rows."""
    rows = adapter.get(name.replace(".ranknum.", ".lora_E."))
    if rows is not None and value.numel() == 1 and float(value) != len(rows):
        raise ToolkitError(f"{where}: {name} is {float(value):g}, but lora_E has {len(rows)} rows")
