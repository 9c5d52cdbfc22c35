"""Matrix products of frozen weights, by the fastest kernel of the device.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812

WIDE = 32_768  # outputs from which on oneDNN is faster on every CPU that was measured


def product(
    x_NI: torch.Tensor, weight_OI: torch.Tensor, plus_NO: torch.Tensor | None = None, *, overwrite: bool = False
) -> torch.Tensor:
    """x W^T, plus `plus_NO` if given, which is overwritten if `overwrite`; without gradient."""
    if _by_onednn(x_NI, len(weight_OI)):
        y_NO = _onednn_product(x_NI, weight_OI)
        return y_NO if plus_NO is None else y_NO.add_(plus_NO)
    if plus_NO is None:
        return F.linear(x_NI, weight_OI)
    return plus_NO.addmm_(x_NI, weight_OI.t()) if overwrite else torch.addmm(plus_NO, x_NI, weight_OI.t())


def scaled_product(
    x_NI: torch.Tensor, weight_OI: torch.Tensor, scale: float, into_NO: torch.Tensor | None = None
) -> torch.Tensor:
    """`scale` x W^T, in `into_NO` if given; without gradient. One operation, except where oneDNN is faster."""
    if _by_onednn(x_NI, len(weight_OI)) and x_NI.is_contiguous():
        y_NO = _onednn_product(x_NI, weight_OI).mul_(scale)
        return y_NO if into_NO is None else into_NO.copy_(y_NO)
    unread = x_NI.new_empty(1) if into_NO is None else into_NO
    return torch.addmm(unread, x_NI, weight_OI.t(), beta=0, alpha=scale, out=into_NO)


def _by_onednn(x_NI: torch.Tensor, outputs: int) -> bool:
    """Whether oneDNN is there, and faster than MKL, which F.linear calls: by 5 to 30 % on a CPU with AVX-512.

    Where there is only AVX2 it is 11 to 15 % slower, but for outputs as many as a text head's: there it takes down to
    half of MKL's time.
    """
    if x_NI.device.type != "cpu" or x_NI.dtype != torch.float32 or not x_NI.numel():
        return False
    return _has_onednn() and (outputs >= WIDE or torch.backends.cpu.get_cpu_capability() == "AVX512")


def _onednn_product(x_NI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """x W^T by oneDNN, by an operator of torch's own that may go; `product` takes F.linear where it is missing."""
    return torch.ops.mkldnn._linear_pointwise(x_NI, weight_OI, None, "none", [], "")


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
