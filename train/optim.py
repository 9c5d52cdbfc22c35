"""AdamW and the learning rate's schedule.

Parameters fall into groups with peak rates of their own: `lora`, `head` (heads, embeddings and norms trained in full),
`new` (audio self-attention, tower), `projector` (of Whisper features, with a warm-up of its own). Norm weights and
biases are not decayed. The rate is a function of the step alone, so a resumed run needs no state of it but the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from higgs_tune.train.model.trainable import parameter_group
from higgs_tune.train.options import OptimArgs
from torch import nn
from torch.optim import AdamW, Optimizer


def make_optimizer(parameters: dict[str, nn.Parameter], options: OptimArgs) -> Optimizer:
    """AdamW over the trainable parameters, fused: the kernel passes over a step whose `found_inf` is set.

    With `adamw8bit`, that of bitsandbytes, with moments in 8 bits (https://arxiv.org/abs/2110.02861).
    """
    new = options.new_module_learning_rate or options.learning_rate
    rates = {
        "lora": options.learning_rate,
        "head": options.head_learning_rate or options.learning_rate / 10,
        "new": new,
        "projector": options.projector_learning_rate or new,
    }
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decays = parameter.ndim > 1
        groups.setdefault((parameter_group(name), decays), []).append(parameter)
    param_groups = [
        {
            "params": members,
            "peak": rates[kind],
            "weight_decay": options.weight_decay if decays else 0.0,
            "name": kind,
        }
        for (kind, decays), members in groups.items()
    ]
    given: dict[str, Any] = {"lr": options.learning_rate, "betas": (options.adam_beta1, options.adam_beta2)}
    if options.optim == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

        return AdamW8bit(param_groups, **given)
    return AdamW(param_groups, **given, fused=True)


def learning_rates(options: OptimArgs, total_steps: int, kind: str = "lora") -> Callable[[int], float]:
    """Share of the peak learning rates by steps done.

    Args:
        kind: the group of parameters.
    """
    given = options.projector_warmup_steps if kind == "projector" else None
    warmup = warmup_of(options, total_steps) if given is None else given
    decay = max(1, math.ceil(options.lr_decay_fraction * total_steps))
    shape = partial(SHAPES[options.lr_scheduler_type], total=total_steps, decay=decay)
    return partial(share_of_peak, warmup=warmup, total=total_steps, shape=shape)


def warmup_of(options: OptimArgs, total_steps: int) -> int:
    """Steps of linear warm-up."""
    return math.ceil(0.03 * total_steps) if options.warmup_steps is None else options.warmup_steps


def set_rates(optimizer: Optimizer, options: OptimArgs, total_steps: int, step: int) -> None:
    """Set every group's learning rate for the next step, after `step` steps."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * learning_rates(options, total_steps, group["name"])(step)


def reported_rates(optimizer: Optimizer) -> dict[str, float]:
    """`learning_rate`: LoRA's, or that of most of the weights where LoRA does not train; and the projector's own."""
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    main = next(rates[name] for name in ("lora", "new", "head", "projector") if name in rates)
    projector = {"projector_learning_rate": rates["projector"]} if "projector" in rates else {}
    return {"learning_rate": main} | projector


class Ema:
    """An exponential moving average of the trainable parameters."""

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.decay, self.parameters = decay, parameters
        self.values = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Add the weights after a step to the average."""
        averages, weights = list(self.values.values()), [parameter.data for parameter in self.parameters.values()]
        torch._foreach_lerp_(averages, weights, 1 - self.decay)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights within the block."""
        own = {name: parameter.data for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.data = self.values[name]
        try:
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = own[name]


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
