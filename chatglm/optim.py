"""Optimizer and learning-rate schedule."""

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from .settings import TrainSettings


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trained parameters in two groups: matrices, which decay; biases and norms, which don't."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]


def build_optimizer(
    model: nn.Module, settings: TrainSettings, *, total_steps: int
) -> tuple[AdamW, LRScheduler]:
    """AdamW and its schedule over total_steps optimizer steps."""
    optimizer = AdamW(
        parameter_groups(model, settings.weight_decay),
        lr=settings.peak_learning_rate,
        betas=settings.optimizer_betas,
        eps=settings.adam_epsilon,
    )
    schedule = get_scheduler(
        settings.scheduler_type,
        optimizer,
        num_warmup_steps=min(settings.warmup_steps, total_steps // 10),
        num_training_steps=total_steps,
    )
    return optimizer, schedule
