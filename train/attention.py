"""Causal attention within each sample of a pack, blind across samples; the kernel that is fastest where the rows are.

In: queries, keys and values of a flat sequence, and the samples' lengths. Out: one row a query. Never: padding, a mask
of the whole pack, a host synchronisation.

Shapes: N rows of all samples, L rows of one, h query heads in k groups of g that share a key and a value head, D head
size, B query rows of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch.nn.attention.varlen import varlen_attn

BLOCK = 48  # query rows at a time on a CPU; the best of 32 to 256 with 1 MiB of cache a core


def causal_attention(
    q_NhD: torch.Tensor, k_NhD: torch.Tensor, v_NhD: torch.Tensor, lengths: list[int], cu_lengths: torch.Tensor
) -> torch.Tensor:
    """Causal attention within each sample: [N, h, D]. k and v may have fewer heads.

    Args:
        lengths: rows of each sample. cu_lengths: where they begin, int32 [samples + 1] on the device.
    """
    if not lengths:
        return torch.zeros_like(q_NhD)
    if q_NhD.is_cuda and q_NhD.dtype in (torch.bfloat16, torch.float16):
        return _flash(q_NhD, k_NhD, v_NhD, lengths, cu_lengths)
    if q_NhD.is_cuda or q_NhD.dtype != torch.float32:
        return _sample_by_sample(q_NhD, k_NhD, v_NhD, lengths)
    out_NhD = _Blocked.apply(q_NhD, k_NhD, v_NhD, lengths)
    assert isinstance(out_NhD, torch.Tensor)
    return out_NhD


def place(
    x_NhD: torch.Tensor,
    to_sequence: torch.Tensor | None,
    to_sorted: torch.Tensor | None,
    cos_ND: torch.Tensor | None = None,
    sin_ND: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows with their rotary position embedding, brought into sequence order.

    Args:
        to_sequence, to_sorted: the order and its inverse; None where the rows stand in it.
        cos_ND, sin_ND: in Llama's half-split form, the halves alike; None for no embedding.
    """
    if torch.compiler.is_compiling():  # it fuses plain operations by itself
        return _placed(x_NhD, to_sequence, cos_ND, sin_ND)
    placed_NhD = _Place.apply(x_NhD, to_sequence, to_sorted, cos_ND, sin_ND)
    assert isinstance(placed_NhD, torch.Tensor)
    return placed_NhD


class _Place(torch.autograd.Function):
    """The gradient is turned back and brought back: no sums over rows, nothing kept."""

    @staticmethod
    def forward(ctx: Any, x_NhD: torch.Tensor, to_sequence: Any, to_sorted: Any, cos: Any, sin: Any) -> torch.Tensor:
        ctx.given = to_sorted, cos, sin
        return _placed(x_NhD, to_sequence, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        to_sorted, cos_ND, sin_ND = ctx.given
        grad_NhD = grads[0] if to_sorted is None else grads[0].index_select(0, to_sorted)
        return _placed(grad_NhD, None, cos_ND, None if sin_ND is None else -sin_ND), None, None, None, None


def _placed(
    x_NhD: torch.Tensor, to_sequence: torch.Tensor | None, cos_ND: torch.Tensor | None, sin_ND: torch.Tensor | None
) -> torch.Tensor:
    if cos_ND is not None and sin_ND is not None:
        (first, second), (sin_first, sin_second) = x_NhD.chunk(2, -1), sin_ND[:, None].chunk(2, -1)
        x_NhD = x_NhD * cos_ND[:, None]
        half = first.shape[-1]
        x_NhD[..., :half].addcmul_(second, sin_first, value=-1)
        x_NhD[..., half:].addcmul_(first, sin_second)
    return x_NhD if to_sequence is None else x_NhD.index_select(0, to_sequence)


def _flash(
    q_NhD: torch.Tensor, k_NhD: torch.Tensor, v_NhD: torch.Tensor, lengths: list[int], cu_lengths: torch.Tensor
) -> torch.Tensor:
    """One call of torch's variable-length flash attention."""
    options: dict[str, Any] = {"window_size": (-1, 0)}  # causal
    if _varlen_takes_gqa():
        options["enable_gqa"] = True
    elif (groups := q_NhD.shape[1] // k_NhD.shape[1]) > 1:
        k_NhD, v_NhD = k_NhD.repeat_interleave(groups, 1), v_NhD.repeat_interleave(groups, 1)
    longest = max(lengths)
    out_NhD = varlen_attn(q_NhD, k_NhD, v_NhD, cu_lengths, cu_lengths, longest, longest, **options)
    assert isinstance(out_NhD, torch.Tensor)
    return out_NhD


@cache
def _varlen_takes_gqa() -> bool:
    """True from torch 2.12 on."""
    return "enable_gqa" in signature(varlen_attn).parameters


def _sample_by_sample(
    q_NhD: torch.Tensor, k_NhD: torch.Tensor, v_NhD: torch.Tensor, lengths: list[int]
) -> torch.Tensor:
    outputs = []
    for q, k, v in zip(*(x.split(lengths) for x in (q_NhD, k_NhD, v_NhD)), strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # noqa: PLW2901
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


class _Blocked(torch.autograd.Function):
    """A few query rows at a time against the keys up to theirs, as plain matrix products; made again in backward.

    On a CPU this takes three quarters of the time of torch's flash kernel at 400 rows, and as long at 2,000.
    """

    @staticmethod
    def forward(
        ctx: Any, q_NhD: torch.Tensor, k_NhD: torch.Tensor, v_NhD: torch.Tensor, lengths: list[int]
    ) -> torch.Tensor:
        out_NhD = torch.empty_like(q_NhD)
        groups, mask_BB = k_NhD.shape[1], _mask(q_NhD)
        for q, k, v, out in zip(*(x.split(lengths) for x in (q_NhD, k_NhD, v_NhD, out_NhD)), strict=True):
            q_kgLD, (k_kLD, v_kLD) = _scaled(q, groups), _keys(k, v)
            out_kgLD = _grouped(out, groups)
            for first in range(0, len(q), BLOCK):
                last = min(first + BLOCK, len(q))
                _, share_kRL = _shares(q_kgLD, k_kLD, first, last, mask_BB)
                block_kRD = share_kRL @ v_kLD[:, :last]
                out_kgLD[:, :, first:last] = block_kRD.view(out_kgLD[:, :, first:last].shape)
        ctx.lengths = lengths
        ctx.save_for_backward(q_NhD, k_NhD, v_NhD)
        return out_NhD

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_NhD, k_NhD, v_NhD = ctx.saved_tensors
        found = [torch.empty_like(x) for x in (q_NhD, k_NhD, v_NhD)]
        groups, mask_BB = k_NhD.shape[1], _mask(q_NhD)
        given = (x.split(ctx.lengths) for x in (q_NhD, k_NhD, v_NhD, grads[0], *found))
        for q, k, v, grad, of_q, of_k, of_v in zip(*given, strict=True):
            q_kgLD, (k_kLD, v_kLD) = _scaled(q, groups), _keys(k, v)
            grad_kgLD, of_q_kgLD = _grouped(grad, groups), _grouped(of_q, groups)
            of_k_kLD, of_v_kLD = torch.zeros_like(k_kLD), torch.zeros_like(v_kLD)
            for first in range(0, len(q), BLOCK):
                last = min(first + BLOCK, len(q))
                q_kRD, share_kRL = _shares(q_kgLD, k_kLD, first, last, mask_BB)
                grad_kRD = grad_kgLD[:, :, first:last].reshape(q_kRD.shape)
                of_v_kLD[:, :last].baddbmm_(share_kRL.transpose(1, 2), grad_kRD)
                of_share_kRL = grad_kRD @ v_kLD[:, :last].transpose(1, 2)
                of_score_kRL = torch.ops.aten._softmax_backward_data(of_share_kRL, share_kRL, -1, share_kRL.dtype)
                of_k_kLD[:, :last].baddbmm_(of_score_kRL.transpose(1, 2), q_kRD)
                block_kRD = (of_score_kRL @ k_kLD[:, :last]).mul_(q.shape[2] ** -0.5)
                of_q_kgLD[:, :, first:last] = block_kRD.view(of_q_kgLD[:, :, first:last].shape)
            of_k.copy_(of_k_kLD.transpose(0, 1))
            of_v.copy_(of_v_kLD.transpose(0, 1))
        return *found, None


def _grouped(x_LhD: torch.Tensor, groups: int) -> torch.Tensor:
    """A view [k, g, L, D]."""
    return x_LhD.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)


def _scaled(q_LhD: torch.Tensor, groups: int) -> torch.Tensor:
    """Queries over the root of their size, [k, g, L, D]."""
    return (_grouped(q_LhD, groups) * q_LhD.shape[2] ** -0.5).contiguous()


def _keys(*given_LkD: torch.Tensor) -> Sequence[torch.Tensor]:
    return [x_LkD.transpose(0, 1).contiguous() for x_LkD in given_LkD]


def _mask(like: torch.Tensor) -> torch.Tensor:
    """What is added to the scores of a block's own rows: minus infinity above the diagonal."""
    return like.new_full((BLOCK, BLOCK), -torch.inf).triu_(1)


def _shares(
    q_kgLD: torch.Tensor, k_kLD: torch.Tensor, first: int, last: int, mask_BB: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A block's queries [k, g * rows, D], and the share of each of their keys [k, g * rows, last]."""
    rows = last - first
    q_kRD = q_kgLD[:, :, first:last].reshape(len(k_kLD), -1, k_kLD.shape[2])
    score_kRL = q_kRD @ k_kLD[:, :last].transpose(1, 2)
    score_kRL.view(len(k_kLD), -1, rows, last)[..., first:].add_(mask_BB[:rows, :rows])
    return q_kRD, score_kRL.softmax(-1)
