"""The loss: next-token cross entropy over text labels and over each codebook's labels, with global means.

In: the residual stream, the batch, and the label counts of the whole optimizer step. Out: the step's loss share of
this pack, and the sums for the metrics. Guarantees (test_loss.py): the loss of a naive loop over labels; logits exist
at labels only, a chunk of rows at a time.

text  = mean CE over all text labels of the step
audio = weighted mean over codebooks of the mean CE over that codebook's labels of the step
total = text_loss_weight * text + audio_loss_weight * audio + contrastive_loss_weight * contrastive

"of the step" means over all ranks and accumulation steps: the result does not depend on how samples are spread. The
contrastive part compares the samples of one pack, so it alone depends on packing.

Shapes: n label rows, K codebooks (1 for text), V classes, H hidden, S samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from higgs_tune.train.data.batch import Batch
from higgs_tune.train.model.dropout import Mask, new_seed
from higgs_tune.train.model.linear import Layer, layer_of, linear, normed
from higgs_tune.train.model.load import HiggsAudioModel
from higgs_tune.train.model.lora_math import dora_scales, layer_grads, run_layers
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 1 << 25  # logits held at a time: 128 MB in float32
IGNORE = -100
TEMPERATURE = 0.1  # of the contrastive loss


@dataclass(frozen=True)
class LossOptions:
    """text, audio, contrastive: weight of each part. codebooks: relative weight of each codebook, or None for equal
    ones. smoothing: label smoothing, 0 to 1. with_text, with_audio: whether the part is computed at all."""

    text: float = 1.0
    audio: float = 1.0
    contrastive: float = 0.0
    codebooks: tuple[float, ...] | None = None
    smoothing: float = 0.0
    with_text: bool = True
    with_audio: bool = True

    def codebook_shares(self, codebooks: int) -> list[float]:
        """Each codebook's share of the audio loss; they sum to 1."""
        weights = self.codebooks or (1.0,) * codebooks
        return [weight / sum(weights) for weight in weights]

    def per_label(self, counts: torch.Tensor) -> torch.Tensor:
        """Weight of one label in the total loss: float32 [2 + K], for text, each codebook, and contrastive pairs.

        Args:
            counts: [2 + K], of the whole optimizer step; where there are none, the weight does not matter.
        """
        shares = [self.audio * share for share in self.codebook_shares(len(counts) - 2)]
        parts = torch.tensor([self.text, *shares, self.contrastive], dtype=torch.float32)
        return parts.to(counts.device, non_blocking=True) / counts.clamp(min=1)


class _HeadCrossEntropy(torch.autograd.Function):
    """Linear head and cross entropy, a chunk of rows at a time; the forward pass computes the gradients, too.

    Args of `apply`: hidden [n, H]; targets int [n, K], -100 for none; label weights [K]; label smoothing; a class whose
    loss is summed apart (end of stream), or -1; seed of the dropout; the fields of the head's `Layer` (K * V outputs).
    Returns: the weighted sum (differentiable); [5, K]: sums of the cross entropies, right predictions, sums over
    targets of the marked class, number of such targets, right predictions of them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_nH: torch.Tensor,
        targets_nK: torch.Tensor,
        weights_K: torch.Tensor,
        smoothing: float,
        marked: int,
        seed: int,
        *fields: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needed, head = Layer(*ctx.needs_input_grad[6:]), Layer(*fields)
        grad_hidden = torch.empty_like(hidden_nH) if ctx.needs_input_grad[0] else None
        grads = [
            torch.zeros_like(value, dtype=torch.float32) if wanted and isinstance(value, torch.Tensor) else None
            for value, wanted in zip(head, needed, strict=True)
        ]
        used = head._replace(weight_OH=head.weight_OH.to(hidden_nH.dtype))
        scales, stats_5K = dora_scales([used]), torch.zeros(5, targets_nK.shape[1], device=hidden_nH.device)
        step = _chunk_rows(len(hidden_nH), len(head.weight_OH))
        for start in range(0, len(hidden_nH), step):
            rows_nH = hidden_nH[start : start + step]
            target_nK = targets_nK[start : start + step].long()
            mask_of = partial(Mask, seed + start)
            (logits_nV,), kept = run_layers(rows_nH, [used], mask_of=mask_of, scales=scales)
            log_share_nKV, part_5K = _label_losses(logits_nV.float(), target_nK, smoothing, marked)
            stats_5K += part_5K
            if not any(ctx.needs_input_grad):
                continue
            labelled_nK, index_nK1 = target_nK >= 0, target_nK.clamp(min=0)[..., None]
            grad_nKV = log_share_nKV.exp_()
            if smoothing:
                grad_nKV -= smoothing / grad_nKV.shape[-1]
            grad_nKV.scatter_add_(-1, index_nK1, grad_nKV.new_full(index_nK1.shape, smoothing - 1.0))
            grad_nV = grad_nKV.mul_((labelled_nK * weights_K)[..., None]).flatten(1).to(hidden_nH.dtype)
            del logits_nV, log_share_nKV, grad_nKV  # the gradients below take their place
            part_nH, (parts,) = layer_grads(
                [grad_nV], rows_nH, [used], kept, [needed], mask_of, needs_input=grad_hidden is not None
            )
            if grad_hidden is not None and part_nH is not None:
                grad_hidden[start : start + step] = part_nH
            for grad, part in zip(grads, parts, strict=True):
                if grad is not None and part is not None:
                    grad.add_(part)
        ctx.save_for_backward(*(grad for grad in (grad_hidden, *grads) if grad is not None))
        ctx.dtypes = [
            value.dtype if wanted and isinstance(value, torch.Tensor) else None
            for value, wanted in zip(head, needed, strict=True)
        ]
        ctx.mark_non_differentiable(stats_5K)
        return (stats_5K[0] * weights_K).sum(), stats_5K

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)  # scaled in place: backward runs once
        grad_hidden = next(saved).mul_(grads[0]) if ctx.needs_input_grad[0] else None
        of_head = [None if dtype is None else next(saved).mul_(grads[0]).to(dtype) for dtype in ctx.dtypes]
        return grad_hidden, None, None, None, None, None, *of_head


@dataclass(frozen=True)
class LossSums:
    """Sums over labels, not divided by anything, so that they can be added over packs, steps and ranks.

    cross_entropy, correct, labels: [1 + K], of text, then of each codebook.
    eos_cross_entropy, eos_labels, eos_correct: [K], the part of the sums above whose label ends the stream.
    contrastive, pairs: [1], the sum of the contrastive loss, and the number of pairs of reference and target.
    """

    cross_entropy: torch.Tensor
    correct: torch.Tensor
    labels: torch.Tensor
    eos_cross_entropy: torch.Tensor
    eos_labels: torch.Tensor
    eos_correct: torch.Tensor
    contrastive: torch.Tensor
    pairs: torch.Tensor

    @staticmethod
    def _sizes(codebooks: int) -> list[int]:
        return [1 + codebooks] * 3 + [codebooks] * 3 + [1, 1]

    @classmethod
    def zeros(cls, codebooks: int, device: torch.device) -> torch.Tensor:
        """The packed form of no labels at all."""
        return torch.zeros(sum(cls._sizes(codebooks)), device=device, dtype=torch.float64)

    def pack(self) -> torch.Tensor:
        """One float64 vector of every field, in order."""
        return torch.cat([getattr(self, field.name) for field in fields(self)]).double()

    @classmethod
    def unpack(cls, packed: torch.Tensor, codebooks: int) -> LossSums:
        """The inverse of `pack`."""
        return cls(*packed.split(cls._sizes(codebooks)))


class LossParts(NamedTuple):
    """This pack's share of the step's loss (a scalar with gradient), and the sums over its labels."""

    total: torch.Tensor
    sums: LossSums


def pack_loss(
    model: HiggsAudioModel,
    hidden_NH: torch.Tensor,
    batch: Batch,
    label_weights: torch.Tensor,
    options: LossOptions,
    *,
    at_labels: bool = False,
) -> LossParts:
    """The loss share of one pack.

    Args:
        hidden_NH: from `hidden_states`; with `at_labels`, from `label_states`.
        label_weights: [2 + K], from `LossOptions.per_label`.
    """
    assert not (at_labels and options.contrastive), "the contrastive loss takes every audio row"
    text_rows, audio_rows = (batch[f"{kind}_in_labels" if at_labels else f"{kind}_rows"] for kind in ("text", "audio"))
    heads, codebooks = model.audio_decoder_proj, len(label_weights) - 2
    counts = batch["label_counts"].float()
    total, text_5K = label_weights.new_zeros(()), label_weights.new_zeros(5, 1)
    audio_5K, contrastive, pairs = label_weights.new_zeros(5, codebooks), *label_weights.new_zeros(2, 1)
    if options.with_text:
        normed_nH = normed(model.norm, hidden_NH.index_select(0, text_rows))
        labels_n1, weights_1 = batch["text_labels"][:, None], label_weights[:1]
        part, text_5K = head_cross_entropy(normed_nH, heads.text_lm_head, labels_n1, weights_1, options.smoothing)
        total = total + part
    if options.with_audio:
        normed_nH = normed(model.norm, hidden_NH.index_select(0, audio_rows))
        labels_nK, weights_K, eos = batch["audio_labels_KL"].t(), label_weights[1:-1], model.config.audio_stream_eos_id
        part, audio_5K = head_cross_entropy(
            normed_nH, heads.audio_lm_head, labels_nK, weights_K, options.smoothing, eos
        )
        total = total + part
    if options.contrastive:
        part = contrastive_loss(normed(model.norm, hidden_NH[len(hidden_NH) - batch["codes_KA"].shape[1] :]), batch)
        total = total + part * label_weights[-1]
        contrastive, pairs = part.detach().view(1), batch["pairs"].float()
    (cross_entropy, correct, *_), (*_, eos_loss, eos_labels, eos_right) = (
        torch.cat([text_5K, audio_5K], dim=1),
        audio_5K,
    )
    labels = torch.cat([counts[:1] * options.with_text, counts[1:] * options.with_audio])
    sums = LossSums(cross_entropy, correct, labels, eos_loss, eos_labels, eos_right, contrastive, pairs)
    return LossParts(total, sums)


def head_cross_entropy(
    normed_nH: torch.Tensor,
    head: torch.nn.Module,
    labels_nK: torch.Tensor,
    weights_K: torch.Tensor,
    smoothing: float = 0.0,
    marked: int = -1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of a linear head; arguments and results as those of `_HeadCrossEntropy`.

    A head that is no `Layer` runs by PEFT, a chunk at a time, and backward recomputes its logits.
    """
    layer = layer_of(head)
    if layer is not None:
        seed = new_seed() if layer.dropout else 0
        return _HeadCrossEntropy.apply(normed_nH, labels_nK, weights_K, smoothing, marked, seed, *layer)  # pyright: ignore

    def chunk(rows_nH: torch.Tensor, target_nK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, stats_5K = _label_losses(linear(head, rows_nH).float(), target_nK.long(), smoothing, marked)
        return (stats_5K[0] * weights_K).sum(), stats_5K.detach()

    count = int(labels_nK.shape[1])
    total, stats_5K = normed_nH.new_zeros((), dtype=torch.float32), normed_nH.new_zeros(5, count, dtype=torch.float32)
    step = _chunk_rows(len(normed_nH), head.out_features)  # pyright: ignore[reportArgumentType]
    for start in range(0, max(1, len(normed_nH)), step):  # no labels give a gradient of zero
        part = slice(start, start + step)
        loss, part_5K = checkpoint(chunk, normed_nH[part], labels_nK[part], use_reentrant=False)  # pyright: ignore
        total, stats_5K = total + loss, stats_5K + part_5K
    return total, stats_5K


def _chunk_rows(rows: int, outputs: int) -> int:
    """Rows of a chunk: chunks are even, since a product of a few rows takes nearly the time of one of many."""
    most = max(1, CHUNK_ELEMENTS // outputs)
    return max(1, math.ceil(rows / max(1, math.ceil(rows / most))))


def _label_losses(
    logits_nV: torch.Tensor, target_nK: torch.Tensor, smoothing: float, marked: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-softmax of the logits [n, K, V / K], and the sums over labels that `_HeadCrossEntropy` returns [5, K]."""
    log_share_nKV = logits_nV.unflatten(1, (target_nK.shape[1], -1)).log_softmax(-1)
    wanted_nK = log_share_nKV.gather(-1, target_nK.clamp(min=0)[..., None])[..., 0]
    if smoothing:
        wanted_nK = (1 - smoothing) * wanted_nK + smoothing * log_share_nKV.mean(-1)
    losses_nK = -wanted_nK * (target_nK >= 0)
    is_marked_nK = target_nK == marked
    right_nK = logits_nV.view_as(log_share_nKV).argmax(-1) == target_nK
    counted = (losses_nK, right_nK, losses_nK * is_marked_nK, is_marked_nK, right_nK & is_marked_nK)
    return log_share_nKV, torch.stack([values.float().sum(0) for values in counted])


def contrastive_loss(audio_AH: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Voice similarity: a sample's mean target state should be nearest to mean reference states of its own speaker.

    Supervised InfoNCE (https://arxiv.org/abs/2004.11362, with one anchor a sample) over the samples of the pack that
    have both, summed over them: -log of the share of softmax(cosine / 0.1) that falls on references of the speaker.
    With one sample it is 0; it is finite for any pack.

    Args:
        audio_AH: normed hidden states of the audio rows.
    """
    samples = len(batch.lengths)
    pooled_2SH = audio_AH.new_zeros(2 * samples, audio_AH.shape[1], dtype=torch.float32)
    owners = batch["owners"]  # 2 * sample, and 1 more for a target
    pooled_2SH = pooled_2SH.index_add(0, owners, audio_AH.float())
    frames = torch.zeros(2 * samples, device=owners.device).index_add(0, owners, torch.ones_like(owners).float())
    unit_2SH = F.normalize(pooled_2SH / frames.clamp(min=1)[:, None], dim=1)
    has_both = (frames.view(-1, 2) > 0).all(1)
    cosine_SS = unit_2SH[1::2] @ unit_2SH[0::2].t() / TEMPERATURE
    same_SS = batch["speakers"][:, None] == batch["speakers"]
    absent_1S, absent_S1 = ~has_both[None], ~has_both[:, None]
    every_SS = cosine_SS.masked_fill(absent_1S, -torch.inf).masked_fill(absent_S1, 0.0)
    own_SS = cosine_SS.masked_fill(absent_1S | ~same_SS, -torch.inf).masked_fill(absent_S1, 0.0)
    losses_S = torch.logsumexp(every_SS, 1) - torch.logsumexp(own_SS, 1)
    return (losses_S * batch.weight).sum()
