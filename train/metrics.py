"""Metrics of a logging interval, under the keys of metrics.jsonl.

In: sums over all ranks. Out: names and values. Guarantees: every loss is a sum divided by its number of labels, not a
mean of means (test_weighting.py).
"""

from __future__ import annotations

import ctypes
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from higgs_tune.train.model.loss import LossOptions, LossSums


def loss_metrics(sums: LossSums, options: LossOptions) -> dict[str, Any]:
    """Losses and accuracies from sums over all ranks, on the host; None where there is no label."""
    codebooks = len(sums.eos_labels)
    labels, correct = sums.labels.tolist(), sums.correct.tolist()
    means, accuracies = _ratios(sums.cross_entropy.tolist(), labels), _ratios(correct, labels)
    audio = _weighted(means[1:], options.codebook_shares(codebooks)) if options.with_audio else None
    contrastive = _ratios(sums.contrastive.tolist(), sums.pairs.tolist())[0]
    parts = ((options.text, means[0]), (options.audio, audio), (options.contrastive, contrastive))
    metrics = {
        "loss": sum(weight * value for weight, value in parts if value is not None),
        "text_loss": means[0],
        "audio_loss": audio,
        "audio_loss_per_codebook": means[1:] if options.with_audio else None,
        "eos_loss": _ratios([float(sums.eos_cross_entropy.sum())], [float(sums.eos_labels.sum())])[0],
        "eos_labels": int(sums.eos_labels.sum()),
        "eos_accuracy": _ratios([float(sums.eos_correct.sum())], [float(sums.eos_labels.sum())])[0],
        "text_accuracy": accuracies[0],
        "audio_accuracy": _ratios([sum(correct[1:])], [sum(labels[1:])])[0],
        "audio_accuracy_per_codebook": accuracies[1:] if options.with_audio else None,
        "text_labels": int(labels[0]),
        "audio_labels": int(sum(labels[1:])),
    }
    return metrics | ({"contrastive_loss": contrastive} if options.contrastive else {})


def _ratios(sums: list[float], counts: list[float]) -> list[float | None]:
    return [total / count if count else None for total, count in zip(sums, counts, strict=True)]


def _weighted(means: list[float | None], shares: list[float]) -> float | None:
    if all(mean is None for mean in means):
        return None
    return sum(share * (mean or 0.0) for share, mean in zip(shares, means, strict=True))


def max_memory_gb(device: torch.device) -> float:
    """Peak memory of this process: of the GPU, or resident on a CPU; in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class PeakMemory:
    """Peak memory that a block needs beyond what was there before it: of the GPU, or resident on Linux; `more_gb`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.more_gb = device, 0.0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            with suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)  # memory that was freed before goes back first
                Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            self._before = _status_bytes("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        on_gpu = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else _status_bytes("VmHWM")
        self.more_gb = (peak - self._before) / 1e9


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
