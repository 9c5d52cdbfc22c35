"""What a group of linear layers is run on, as a recipe: rows, their norm, or a gated product, with its gradient.

A `Source` is a tuple of tensors with three methods: `forward` computes the layers' input; `recompute` computes it again
in backward, with the tensors that its gradient uses; `backward` turns the gradient of that input into one gradient for
each field (None for fields that are no tensors). Plain projections call `forward` alone, under autograd.

Shapes: N rows, P of them text rows, H hidden, F FFN width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

Grads = list[torch.Tensor | None]
Recomputed = tuple[torch.Tensor, ...]  # tensors of `recompute` that `backward` uses again


class Rows(NamedTuple):
    """Rows as they are, or the rows `at`; `back` is the inverse where `at` is a permutation."""

    x_NH: torch.Tensor
    at: torch.Tensor | None = None
    back: torch.Tensor | None = None

    def forward(self) -> torch.Tensor:
        return self.x_NH if self.at is None else self.x_NH.index_select(0, self.at)

    def recompute(self) -> tuple[torch.Tensor, Recomputed]:
        return self.forward(), ()

    def backward(self, grad_NH: torch.Tensor, _recomputed: Recomputed, _needed: Rows) -> Grads:
        if self.back is not None:
            grad_NH = grad_NH.index_select(0, self.back)
        elif self.at is not None:
            grad_NH = grad_NH.new_zeros(self.x_NH.shape).index_copy_(0, self.at.long(), grad_NH)
        return [grad_NH, None, None]


class Normed(NamedTuple):
    """RMSNorm (https://arxiv.org/abs/1910.07467): the first `text_rows` rows by one weight, the others by another."""

    x_NH: torch.Tensor
    weight_H: torch.Tensor
    audio_weight_H: torch.Tensor
    text_rows: int
    eps: float

    def forward(self) -> torch.Tensor:
        return self._weight(self._unit()[0].to(self.x_NH.dtype))

    def recompute(self) -> tuple[torch.Tensor, Recomputed]:
        unit_NH, scale_N1 = self._unit()
        return self._weight(unit_NH.to(self.x_NH.dtype, copy=True)), (unit_NH, scale_N1)

    def backward(self, grad_NH: torch.Tensor, recomputed: Recomputed, needed: Normed) -> Grads:
        unit_NH, scale_N1 = recomputed
        grad_weight_H = grad_audio_weight_H = None
        if needed.weight_H:
            grad_weight_H = _norm_weight_grad(grad_NH[: self.text_rows], unit_NH[: self.text_rows], self.weight_H)
        if needed.audio_weight_H:
            rows = grad_NH[self.text_rows :], unit_NH[self.text_rows :]
            grad_audio_weight_H = _norm_weight_grad(*rows, self.audio_weight_H)
        inner_NH = self._weight(grad_NH).to(unit_NH.dtype)
        inner_NH.addcmul_(unit_NH, (inner_NH * unit_NH).mean(-1, keepdim=True), value=-1).mul_(scale_N1)
        return [inner_NH.to(grad_NH.dtype), grad_weight_H, grad_audio_weight_H, None, None]

    def _unit(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of unit mean square [N, H] and their factors [N, 1], in float32 or a finer dtype."""
        dtype = torch.promote_types(self.x_NH.dtype, torch.float32)
        norm_N1 = torch.linalg.vector_norm(self.x_NH, dim=-1, keepdim=True, dtype=dtype)
        scale_N1 = torch.rsqrt(norm_N1.square() / self.x_NH.shape[1] + self.eps)
        return self.x_NH * scale_N1, scale_N1

    def _weight(self, x_NH: torch.Tensor) -> torch.Tensor:
        """Each row times its weight; in place where autograd does not watch."""
        text, audio = self.weight_H.to(x_NH.dtype), self.audio_weight_H.to(x_NH.dtype)
        parts = x_NH[: self.text_rows], x_NH[self.text_rows :]
        if torch.is_grad_enabled():
            return torch.cat([parts[0] * text, parts[1] * audio])
        parts[0].mul_(text)
        parts[1].mul_(audio)
        return x_NH


def _norm_weight_grad(grad_NH: torch.Tensor, unit_NH: torch.Tensor, weight_H: torch.Tensor) -> torch.Tensor:
    return (grad_NH * unit_NH).sum(0).to(weight_H.dtype)


class Gated(NamedTuple):
    """SiLU(gate) * up (https://arxiv.org/abs/2002.05202)."""

    gate_NF: torch.Tensor
    up_NF: torch.Tensor

    def forward(self) -> torch.Tensor:
        silu_NF = F.silu(self.gate_NF)
        return silu_NF * self.up_NF if torch.is_grad_enabled() else silu_NF.mul_(self.up_NF)

    def recompute(self) -> tuple[torch.Tensor, Recomputed]:
        silu_NF = F.silu(self.gate_NF)
        return silu_NF * self.up_NF, (silu_NF,)

    def backward(self, grad_NF: torch.Tensor, recomputed: Recomputed, _needed: Gated) -> Grads:
        grad_up_NF = recomputed[0].mul_(grad_NF)
        return [torch.ops.aten.silu_backward(grad_NF.mul_(self.up_NF), self.gate_NF), grad_up_NF]


Source = Rows | Normed | Gated
