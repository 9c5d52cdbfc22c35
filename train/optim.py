"""AdamW and the learning rate's schedule.

Parameters fall into groups with peak rates of their own: `lora`, `head` (heads and embeddings trained in full), `new`
(audio self-attention, tower, projector). Norm weights and biases are not decayed. The rate is a function of the step
alone, so a resumed run needs no scheduler state but the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from .config import TrainConfig
from .lora import parameter_group


def make_optimizer(parameters: dict[str, nn.Parameter], config: TrainConfig, device: torch.device) -> AdamW:
    """AdamW over the trainable parameters, fused where the device has a kernel for it."""
    rates = {
        "lora": config.learning_rate,
        "head": config.head_learning_rate or config.learning_rate / 10,
        "new": config.new_module_learning_rate or config.learning_rate,
    }
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decays = parameter.ndim > 1
        groups.setdefault((parameter_group(name), decays), []).append(parameter)
    options = [
        {"params": members, "lr": rates[kind], "weight_decay": config.weight_decay if decays else 0.0, "name": kind}
        for (kind, decays), members in groups.items()
    ]
    return AdamW(options, betas=(config.adam_beta1, config.adam_beta2), fused=device.type == "cuda")


def make_scheduler(optimizer: AdamW, config: TrainConfig, total_steps: int) -> LambdaLR:
    """The learning rate of every step."""
    warmup = math.ceil(0.03 * total_steps) if config.warmup_steps is None else config.warmup_steps
    decay = max(1, math.ceil(config.lr_decay_fraction * total_steps))
    shape = partial(SHAPES[config.lr_scheduler_type], total=total_steps, decay=decay)
    return LambdaLR(optimizer, partial(share_of_peak, warmup=warmup, total=total_steps, shape=shape))


def share_of_peak(step: int, *, warmup: int, total: int, shape: Callable[..., float]) -> float:
    """Share of the peak learning rate for step `step + 1`: linear warm-up, then the schedule's shape."""
    if step < warmup:
        return (step + 1) / warmup
    return shape(step, (step - warmup) / max(1, total - warmup))


def _cosine(step: int, done: float, *, total: int, decay: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def _linear(step: int, done: float, *, total: int, decay: int) -> float:
    return 1 - done


def _constant(step: int, done: float, *, total: int, decay: int) -> float:
    return 1.0


def _wsd(step: int, done: float, *, total: int, decay: int) -> float:
    """Warm up, stay, decay (https://arxiv.org/abs/2404.06395)."""
    return min(1.0, (total - step) / decay)


SHAPES: dict[str, Callable[..., float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "wsd": _wsd,
}
