"""The loss: next-token cross entropy over text labels and over each codebook's labels, with global means.

In: the residual stream, the batch, and the label counts of the whole optimizer step. Out: the step's loss share of
this pack, and the sums that metrics need. Never: a logit where there is no label; a full [N, vocabulary] tensor.

text  = mean CE over all text labels of the step
audio = weighted mean over codebooks of the mean CE over that codebook's labels of the step
total = text_loss_weight * text + audio_loss_weight * audio

"of the step" means over all ranks and accumulation steps: the result does not depend on how samples are spread.

Shapes: n label rows, K codebooks (1 for text), V classes, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from .batch import Batch
from .model import HiggsAudioModel

CHUNK_ELEMENTS = 1 << 25  # logits held at a time: 128 MB in float32
IGNORE = -100


@dataclass(frozen=True)
class LossWeights:
    """text and audio: weight of each part; codebooks: relative weight of each codebook, or None for equal ones."""

    text: float
    audio: float
    codebooks: tuple[float, ...] | None = None

    def per_label(self, counts: torch.Tensor) -> torch.Tensor:
        """Weight of one label in the total loss: float32 [1 + K], for text and each codebook.

        Args:
            counts: [1 + K], labels of the whole optimizer step; where there are none, the weight does not matter.
        """
        codebooks = len(counts) - 1
        share = torch.tensor(self.codebooks or [1.0] * codebooks, dtype=torch.float32)
        part = torch.cat([torch.tensor([self.text]), self.audio * share / share.sum()])
        return part.to(counts.device) / counts.clamp(min=1)


class _HeadCrossEntropy(torch.autograd.Function):
    """Linear head and cross entropy, a chunk of rows at a time; gradients are made in the forward pass.

    Args of `apply`: hidden [n, H]; head weight [K * V, H]; targets int [n, K], -100 for none; label weights [K].
    Returns: the weighted sum (differentiable); sums [K] of the cross entropies; hits [K] of the largest logit.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_nH: torch.Tensor, head_VH: torch.Tensor, targets_nK: torch.Tensor, weights_K: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        codebooks = targets_nK.shape[1]
        need_hidden, need_head = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden_nH) if need_hidden else None
        grad_head = torch.zeros_like(head_VH, dtype=torch.float32) if need_head else None
        sums, hits = torch.zeros_like(weights_K), torch.zeros_like(weights_K)
        step = max(1, CHUNK_ELEMENTS // len(head_VH))
        for start in range(0, len(hidden_nH), step):
            rows = hidden_nH[start : start + step]
            targets = targets_nK[start : start + step].long()
            logits_nKV = F.linear(rows, head_VH).float().view(len(rows), codebooks, -1)
            labelled = targets >= 0
            index = targets.clamp(min=0)[..., None]
            log_norm = logits_nKV.logsumexp(-1)
            chosen = logits_nKV.gather(-1, index)[..., 0]
            sums += ((log_norm - chosen) * labelled).sum(0)
            hits += ((logits_nKV.argmax(-1) == targets) & labelled).sum(0)
            if need_hidden or need_head:
                grad = logits_nKV.sub_(log_norm[..., None]).exp_()
                grad.scatter_add_(-1, index, grad.new_full(index.shape, -1.0))
                grad.mul_((labelled * weights_K)[..., None])
                grad_nV = grad.flatten(1).to(hidden_nH.dtype)
                if grad_hidden is not None:
                    grad_hidden[start : start + step] = grad_nV @ head_VH
                if grad_head is not None:
                    grad_head += (grad_nV.t() @ rows).float()
        ctx.save_for_backward(*(grad for grad in (grad_hidden, grad_head) if grad is not None))
        ctx.head_dtype = head_VH.dtype
        ctx.mark_non_differentiable(sums, hits)
        return (sums * weights_K).sum(), sums, hits

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        grad_hidden = saved.pop(0).mul(grads[0]) if ctx.needs_input_grad[0] else None
        grad_head = (saved.pop(0) * grads[0]).to(ctx.head_dtype) if ctx.needs_input_grad[1] else None
        return grad_hidden, grad_head, None, None


@dataclass(frozen=True)
class LossParts:
    """total: this pack's share of the step's loss (a scalar with gradient). sums, hits, counts: [1 + K], not reduced:
    cross entropies, right predictions and labels of text and of each codebook."""

    total: torch.Tensor
    sums: torch.Tensor
    hits: torch.Tensor
    counts: torch.Tensor


def pack_loss(
    model: HiggsAudioModel, hidden_NH: torch.Tensor, batch: Batch, label_weights: torch.Tensor, *, with_audio: bool
) -> LossParts:
    """The loss share of one pack.

    Args:
        hidden_NH: what `hidden_states` returned.
        label_weights: [1 + K], from `LossWeights.per_label`.
        with_audio: False leaves the audio head out (stage 1); its sums are 0.
    """
    heads = model.audio_decoder_proj
    text = _head_loss(
        model, heads.text_lm_head, hidden_NH, batch["text_rows"], batch["text_labels"][:, None], label_weights[:1]
    )
    counts = batch["label_counts"].float()
    if with_audio:
        audio = _head_loss(
            model, heads.audio_lm_head, hidden_NH, batch["audio_rows"], batch["audio_labels_KL"].t(), label_weights[1:]
        )
    else:
        nothing = label_weights.new_zeros(len(label_weights) - 1)
        audio, counts = (nothing.sum(), nothing, nothing), torch.cat([counts[:1], nothing])
    return LossParts(text[0] + audio[0], torch.cat([text[1], audio[1]]), torch.cat([text[2], audio[2]]), counts)


def _head_loss(
    model: HiggsAudioModel,
    head: torch.nn.Module,
    hidden_NH: torch.Tensor,
    rows: torch.Tensor,
    labels_nK: torch.Tensor,
    weights_K: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    normed_nH = model.norm(hidden_NH.index_select(0, rows))
    weight = head.weight
    assert isinstance(weight, torch.Tensor)
    return _HeadCrossEntropy.apply(normed_nH, weight, labels_nK, weights_K)  # pyright: ignore[reportReturnType]
