"""Causal attention within each sample of a pack, blind across samples, by the kernel that is fastest on the device.

In: queries, keys and values of a flat sequence, and the samples' lengths. Out: one row for each query. Guarantees: the
values and gradients of a naive loop over samples and heads (test_attention.py), without padding, a mask of the whole
pack, or a wait for the device.

Shapes: N positions of all samples, L of one, B of a block; h query heads, of which those of a group share one of k key
heads; R rows of a group's query heads; D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch.nn.attention.varlen import varlen_attn

BLOCK = 64  # positions at a time on a CPU; of 32 to 256, 48 to 96 are best, with 1 MiB of cache a core

FLASH, BLOCKED, PLAIN = "variable-length flash", "blocked", "torch's own, a sample at a time"


def causal_attention(
    q_NhD: torch.Tensor, k_NhD: torch.Tensor, v_NhD: torch.Tensor, lengths: list[int], cu_lengths: torch.Tensor
) -> torch.Tensor:
    """Causal attention within each sample: [N, h, D]. k and v may have fewer heads.

    Args:
        lengths: rows of each sample. cu_lengths: where they begin, int32 [samples + 1] on the device.
    """
    lengths = [length for length in lengths if length]
    if not lengths:  # nothing to attend to; the gradient still reaches all three
        return q_NhD + 0 * (k_NhD.sum() + v_NhD.sum())
    kernel = attention_kernel(q_NhD.device, q_NhD.dtype)
    if kernel == FLASH:
        return _flash(q_NhD, k_NhD, v_NhD, lengths, cu_lengths)
    if kernel == PLAIN:
        return plain_attention(q_NhD, k_NhD, v_NhD, lengths)
    out_NhD = _BlockedAttention.apply(q_NhD, k_NhD, v_NhD, lengths)
    assert isinstance(out_NhD, torch.Tensor)
    return out_NhD


def attention_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """The kernel that `causal_attention` takes: FLASH, BLOCKED or PLAIN."""
    if device.type == "cuda":
        return FLASH if dtype in (torch.bfloat16, torch.float16) else PLAIN
    return BLOCKED if dtype == torch.float32 else PLAIN


def plain_attention(
    q_NhD: torch.Tensor, k_NhD: torch.Tensor, v_NhD: torch.Tensor, lengths: list[int], _cu_lengths: object = None
) -> torch.Tensor:
    """`causal_attention` by one call of torch's own for each sample."""
    outputs, lengths = [], [length for length in lengths if length]
    for q_LhD, k_LhD, v_LhD in zip(*(x.split(lengths) for x in (q_NhD, k_NhD, v_NhD)), strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in (q_LhD, k_LhD, v_LhD))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs) if outputs else q_NhD


def rope_and_reorder(
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
    ordered_NhD = _RopeAndReorder.apply(x_NhD, to_sequence, to_sorted, cos_ND, sin_ND)
    assert isinstance(ordered_NhD, torch.Tensor)
    return ordered_NhD


def plain_rope_and_reorder(
    x_NhD: torch.Tensor,
    to_sequence: torch.Tensor | None,
    _to_sorted: torch.Tensor | None,
    cos_ND: torch.Tensor | None = None,
    sin_ND: torch.Tensor | None = None,
) -> torch.Tensor:
    """`rope_and_reorder` under autograd."""
    if cos_ND is not None and sin_ND is not None:
        (first, second), (sin_first, sin_second) = x_NhD.chunk(2, -1), sin_ND[:, None].chunk(2, -1)
        x_NhD = x_NhD * cos_ND[:, None]
        half = first.shape[-1]
        x_NhD[..., :half].addcmul_(second, sin_first, value=-1)
        x_NhD[..., half:].addcmul_(first, sin_second)
    return x_NhD if to_sequence is None else x_NhD.index_select(0, to_sequence)


class _RopeAndReorder(torch.autograd.Function):
    """The gradient is reordered back, then rotated back; no activation is saved for it."""

    @staticmethod
    def forward(ctx: Any, x_NhD: torch.Tensor, to_sequence: Any, to_sorted: Any, cos: Any, sin: Any) -> torch.Tensor:
        ctx.save_for_backward(to_sorted, cos, sin)
        out_NhD = plain_rope_and_reorder(x_NhD, to_sequence, to_sorted, cos, sin)
        return out_NhD.clone() if out_NhD is x_NhD else out_NhD  # values in a block with queries and keys would keep it

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        to_sorted, cos_ND, sin_ND = ctx.saved_tensors
        grad_NhD = grads[0] if to_sorted is None else grads[0].index_select(0, to_sorted)
        backwards = None if sin_ND is None else -sin_ND
        return plain_rope_and_reorder(grad_NhD, None, None, cos_ND, backwards), None, None, None, None


def _flash(
    q_NhD: torch.Tensor, k_NhD: torch.Tensor, v_NhD: torch.Tensor, lengths: list[int], cu_lengths: torch.Tensor
) -> torch.Tensor:
    """One call of torch's variable-length flash attention."""
    options: dict[str, Any] = {"window_size": (-1, 0)}  # causal
    if _varlen_asks_for_gqa():
        options["enable_gqa"] = True
    longest = max(lengths)
    out_NhD = varlen_attn(q_NhD, k_NhD, v_NhD, cu_lengths, cu_lengths, longest, longest, **options)
    assert isinstance(out_NhD, torch.Tensor)
    return out_NhD


@cache
def _varlen_asks_for_gqa() -> bool:
    """True from torch 2.12 on; before, the kernel shared keys among query heads without being asked."""
    return "enable_gqa" in signature(varlen_attn).parameters


class _BlockedAttention(torch.autograd.Function):
    """A few query rows at a time against the keys up to theirs, as plain matrix products; backward recomputes them.

    On a CPU this takes three quarters of the time of torch's flash kernel at 400 rows, and as long at 2,000.
    """

    @staticmethod
    def forward(
        ctx: Any, q_NhD: torch.Tensor, k_NhD: torch.Tensor, v_NhD: torch.Tensor, lengths: list[int]
    ) -> torch.Tensor:
        out_NhD = torch.empty_like(q_NhD)
        groups, mask_RB = k_NhD.shape[1], _mask(q_NhD, k_NhD)
        for q, k, v, out in zip(*(x.split(lengths) for x in (q_NhD, k_NhD, v_NhD, out_NhD)), strict=True):
            q_kRD, k_kLD, v_kLD = (_by_group(x, groups) for x in (q, k, v))
            q_kRD, out_kRD = q_kRD * q.shape[2] ** -0.5, torch.empty_like(q_kRD)
            for keys, rows in _blocks(q_kRD, k_kLD):
                out_kRD[:, rows] = _shares(q_kRD[:, rows], k_kLD[:, keys], mask_RB) @ v_kLD[:, keys]
            _put_back(out, out_kRD)
        ctx.lengths = lengths
        ctx.save_for_backward(q_NhD, k_NhD, v_NhD)
        return out_NhD

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs = ctx.saved_tensors
        input_grads = [torch.empty_like(x) for x in inputs]
        groups, mask_RB = inputs[1].shape[1], _mask(*inputs[:2])
        split = (x.split(ctx.lengths) for x in (*inputs, grads[0], *input_grads))
        for q, k, v, grad, *into in zip(*split, strict=True):
            q_kRD, k_kLD, v_kLD, grad_kRD = (_by_group(x, groups) for x in (q, k, v, grad))
            scale = q.shape[2] ** -0.5
            q_kRD = q_kRD * scale
            grad_q_kRD, grad_k_kLD, grad_v_kLD = (
                torch.empty_like(q_kRD),
                torch.zeros_like(k_kLD),
                torch.zeros_like(v_kLD),
            )
            for keys, rows in _blocks(q_kRD, k_kLD):
                share_kRL = _shares(q_kRD[:, rows], k_kLD[:, keys], mask_RB)
                grad_v_kLD[:, keys] += share_kRL.transpose(1, 2) @ grad_kRD[:, rows]
                grad_share_kRL = grad_kRD[:, rows] @ v_kLD[:, keys].transpose(1, 2)
                grad_score_kRL = softmax_backward(grad_share_kRL, share_kRL)
                grad_k_kLD[:, keys] += grad_score_kRL.transpose(1, 2) @ q_kRD[:, rows]
                grad_q_kRD[:, rows] = grad_score_kRL @ k_kLD[:, keys]
            for out, values in zip(into, (grad_q_kRD.mul_(scale), grad_k_kLD, grad_v_kLD), strict=True):
                _put_back(out, values)
        return *input_grads, None


def softmax_backward(grad_kRL: torch.Tensor, share_kRL: torch.Tensor) -> torch.Tensor:
    """The gradient of the scores, from that of their softmax over the last dimension.

    torch's operator is one pass over memory, but its own and may go; without it, plain operations do the same.
    """
    if _has_softmax_backward():
        return torch.ops.aten._softmax_backward_data(grad_kRL, share_kRL, -1, share_kRL.dtype)
    return share_kRL * (grad_kRL - (grad_kRL * share_kRL).sum(-1, keepdim=True))


@cache
def _has_softmax_backward() -> bool:
    return hasattr(torch.ops.aten, "_softmax_backward_data")


def _by_group(x_LhD: torch.Tensor, groups: int) -> torch.Tensor:
    """[k, R, D]: for each key head, the rows of its query heads, position after position."""
    return x_LhD.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 2).contiguous()


def _put_back(out_LhD: torch.Tensor, x_kRD: torch.Tensor) -> None:
    """Undo `_by_group`, into `out_LhD`."""
    out_LhD.unflatten(1, (len(x_kRD), -1)).copy_(x_kRD.unflatten(1, (len(out_LhD), -1)).transpose(0, 1))


def _mask(q_NhD: torch.Tensor, k_NhD: torch.Tensor) -> torch.Tensor:
    """Added to the scores of a block with its own keys [R, B]: minus infinity for later keys."""
    later_BB = q_NhD.new_full((BLOCK, BLOCK), -torch.inf).triu_(1)
    return later_BB.repeat_interleave(q_NhD.shape[1] // k_NhD.shape[1], 0)


def _blocks(q_kRD: torch.Tensor, k_kLD: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """For each block, the keys that it may see and its query rows."""
    length = k_kLD.shape[1]
    shared = q_kRD.shape[1] // length
    for first in range(0, length, BLOCK):
        last = min(first + BLOCK, length)
        yield slice(0, last), slice(first * shared, last * shared)


def _shares(q_kRD: torch.Tensor, k_kLD: torch.Tensor, mask_RB: torch.Tensor) -> torch.Tensor:
    """Attention weights [k, R, L] of a block's scaled queries over their keys, the last of which are its own."""
    score_kRL = q_kRD @ k_kLD.transpose(1, 2)
    rows = q_kRD.shape[1]
    own = rows * BLOCK // len(mask_RB)
    score_kRL[..., -own:] += mask_RB[:rows, :own]
    return score_kRL.softmax(-1)
