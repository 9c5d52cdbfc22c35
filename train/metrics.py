"""The numbers of a report, under the keys of metrics.jsonl.

In: sums over all ranks. Out: names and values. Never: a mean of means; every loss is a sum divided by its own label
count.
"""

from __future__ import annotations

import resource
from typing import Any

import torch

from .loss import LossOptions


def loss_metrics(stats: list[float], options: LossOptions) -> dict[str, Any]:
    """Losses and accuracies from `Window.stats`, summed over all ranks; None where there is no label."""
    width = (len(stats) - 2 + 2) // 5  # 3 * (1 + K) + 2 * K + 2 values
    sums, hits, counts = (stats[i * width : (i + 1) * width] for i in range(3))
    eos, (pair_sum, pairs) = stats[3 * width : -2], stats[-2:]
    codebooks = width - 1
    means, shares = _ratios(sums, counts), options.codebook_shares(codebooks)
    right = _ratios(hits, counts)
    audio = _weighted(means[1:], shares) if options.with_audio else None
    contrastive = pair_sum / pairs if pairs else None
    parts = ((options.text, means[0]), (options.audio, audio), (options.contrastive, contrastive))
    found = {
        "loss": sum(weight * value for weight, value in parts if value is not None),
        "text_loss": means[0],
        "audio_loss": audio,
        "audio_loss_per_codebook": means[1:] if options.with_audio else None,
        "eos_loss": _ratios([sum(eos[:codebooks])], [sum(eos[codebooks:])])[0],
        "text_accuracy": right[0],
        "audio_accuracy": _ratios([sum(hits[1:])], [sum(counts[1:])])[0],
        "audio_accuracy_per_codebook": right[1:] if options.with_audio else None,
        "text_labels": int(counts[0]),
        "audio_labels": int(sum(counts[1:])),
    }
    return found | ({"contrastive_loss": contrastive} if options.contrastive else {})


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
