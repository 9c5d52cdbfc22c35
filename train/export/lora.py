"""LoRA merged into weights, rows at a time.

In: a weight and the LoRA of its layer. Out: rows of the merged weight, in float32. Guarantees (test_export.py): they
are those of PEFT's own merge, for LoRA, rsLoRA and DoRA, on linear layers and on embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from higgs_tune.train.export.tensors import Shape, Source


@dataclass(frozen=True)
class MergedWeight:
    """The weight [out, in] of a linear layer with LoRA, or that of an embedding, whose rows are its tokens.

    down: [r, in]. up: [out, r]. scaling: factor of their product. magnitude: [out], of DoRA
    (https://arxiv.org/abs/2402.09353); None without it. All float32.
    """

    base: Source
    down: torch.Tensor
    up: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> Shape:
        """Shape of the weight."""
        return self.base.shape

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Merged rows; those of DoRA have the length that their magnitude says."""
        merged = self.base.rows(start, stop).to(torch.float32, copy=True)
        merged.addmm_(self.up[start:stop], self.down, alpha=self.scaling)
        if self.magnitude is None:
            return merged
        return merged.mul_((self.magnitude[start:stop] / torch.linalg.vector_norm(merged, dim=1))[:, None])
