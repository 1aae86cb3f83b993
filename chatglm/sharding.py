"""DeepSpeed: the strategy from a config file, and whole parameters out of split ones.

With ZeRO-3 a parameter is an empty tensor on every rank until it is gathered; all ranks gather
together, one parameter at a time, so that no device need hold the model.
"""

from importlib import import_module
from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from .errors import ToolkitError
from .files import read_json
from .run_settings import Settings

OURS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
        "gradient_clipping", "optimizer", "scheduler", "bf16", "fp16")  # fmt: skip
"""Keys of a DeepSpeed config that are settings of this toolkit."""


class AnyDeviceDeepSpeed(DeepSpeedStrategy):
    """Lightning's strategy, on CPUs too, where DeepSpeed works over gloo."""

    @property
    def root_device(self) -> torch.device:
        """DeepSpeed wants a number, which a CPU has none of."""
        device = super().root_device
        return device if device.type == "cuda" else torch.device("cpu", 0)

    def setup_environment(self) -> None:
        """As for any strategy; Lightning's own only refuses what is not CUDA."""
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """Lightning's checks the indices of GPUs, which CPUs don't have."""
        if self.root_device.type == "cuda":
            super().setup_distributed()
        else:
            leave_out_shared_memory()
            self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model, optimizer, lr_scheduler=None):
        """With ZeRO-3 each parameter is split by itself, and offloaded if so configured.

        DeepSpeed alone would first move the whole model to the device.
        """
        if self.zero_stage_3:
            import deepspeed

            deepspeed.zero.Init(module=model, config_dict_or_path=self.config)
            for buffer in model.buffers():
                buffer.data = buffer.data.to(self.root_device)
        return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)


def leave_out_shared_memory() -> None:
    """On a CPU, reduce over gloo alone.

    DeepSpeed would compile a reduction over shared memory at its first run, which takes a minute
    and a C++ compiler, and a kill meanwhile leaves a lock that every later run waits on for ever.
    """
    # Not the name torch in deepspeed.comm.
    communication: Any = import_module("deepspeed.comm.torch")
    communication.build_shm_op = lambda: None


def read_deepspeed_config(path: str) -> dict[str, Any]:
    """The content of a DeepSpeed config.

    Batch size, precision, optimizer and so on are settings of this toolkit.

    Raises:
        ToolkitError: if DeepSpeed is missing, or the file can't be read or sets what is ours.
    """
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise ToolkitError(f"enable_deepspeed: {error}; pip install deepspeed") from None
    config = read_json(path)
    ours = [key for key in OURS if key in config]
    if ours:
        raise ToolkitError(
            f"deepspeed_config {path}: {', '.join(ours)} follow from the settings of training:"
            " take them out of the file"
        )
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ToolkitError(f"deepspeed_config {path}: stage {stage!r}; allowed are 0 to 3")
    return config


def check_deepspeed(settings: Settings) -> None:
    """Refuse what DeepSpeed can't do, before anything is loaded.

    Raises:
        ToolkitError: for a config that can't be read, and for DoRA under ZeRO-3.
    """
    if not settings.train.enable_deepspeed:
        return
    config = read_deepspeed_config(settings.train.deepspeed_config)
    dora = settings.method == "lora" and settings.lora.use_dora
    if dora and config.get("zero_optimization", {}).get("stage", 0) == 3:
        raise ToolkitError(
            "lora_info_args.use_dora needs whole weights, which ZeRO-3 splits up: use stage 2"
            " (./config/deepspeed.json), or leave use_dora off"
        )


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with every tensor whole and on the CPU; every rank calls it.

    Names of `model.state_dict()`. Under ZeRO-3 only rank 0 gets the values.
    """
    named = model.named_parameters(remove_duplicate=False)  # a head may be the embedding
    split = {name: p for name, p in named if hasattr(p, "ds_id")}
    state = {name: t.detach().cpu() for name, t in model.state_dict().items() if name not in split}
    for name, parameter in split.items():
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            state[name] = parameter.detach().to("cpu", copy=True)
    return state


def is_split(model: nn.Module) -> bool:
    """True if ZeRO-3 holds the parameters in parts."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def whole_gradient(parameter: nn.Parameter) -> Tensor | None:
    """A parameter's gradient, gathered if DeepSpeed holds it; every rank calls it."""
    if parameter.grad is not None or (
        not hasattr(parameter, "_hp_mapping") and not hasattr(parameter, "ds_id")
    ):
        return parameter.grad
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter)
