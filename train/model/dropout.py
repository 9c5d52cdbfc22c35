"""Dropout by a seed: the mask is drawn in forward, and drawn again in backward, so none is kept.

Guarantees (test_lora_paths.py): the same mask for the same seed and shape; a resumed run draws the seeds that it would
have drawn.

Shapes: N rows, H width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812


def new_seed() -> int:
    """A seed for one mask, from torch's default generator on the host, whose state checkpoints hold.

    It waits for no device. Compiled code draws its masks by itself and takes no seed.
    """
    return 0 if torch.compiler.is_compiling() else torch.empty(1, dtype=torch.int64).random_().tolist()[0]


def drop(x_NH: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """The rows with a share of their elements set to zero; the others are not scaled up."""
    if not share:
        return x_NH
    if torch.compiler.is_compiling():
        return F.dropout(x_NH, share) * (1 - share)
    return x_NH * kept_elements(x_NH, share, seed)


class Mask:
    """The mask of a seed over rows [N, H] of a tensor's dtype, for its uses in one pass."""

    def __init__(self, seed: int, x_NH: torch.Tensor, share: float) -> None:
        self._kept_NH = kept_elements(x_NH, share, seed)

    def drop(self, x_NH: torch.Tensor) -> torch.Tensor:
        """The rows with the dropped elements at zero; the others are not scaled up."""
        return x_NH * self._kept_NH

    def add_dropped(self, into_NH: torch.Tensor, x_NH: torch.Tensor) -> torch.Tensor:
        """`into_NH` plus `drop(x_NH)`, in place."""
        return into_NH.addcmul_(x_NH, self._kept_NH)


def kept_elements(x_NH: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """1 where an element stays, 0 where it is dropped, each decided by 16 random bits: [N, H]."""
    generator = torch.Generator(x_NH.device).manual_seed(seed)
    words = torch.empty(-(-x_NH.numel() // 4), dtype=torch.int64, device=x_NH.device)
    words.random_(-(2**63), None, generator=generator)  # four elements a word
    bits = words.view(torch.int16)[: x_NH.numel()].view(x_NH.shape)
    return torch.ge(bits, round(share * 2**16) - 2**15, out=torch.empty_like(x_NH))
