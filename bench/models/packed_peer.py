"""The strongest public technique: boson's modules with PEFT's layers, run over a pack under autograd.

What a good engineer writes without this project: one flat sequence of many samples; each FFN on the rows of its kind;
attention causal within a sample (compiled FlexAttention with a block mask on a GPU, `flex_attend`; on a CPU, whose
FlexAttention has no backward, torch's flash kernel sample by sample, `sdpa_attend`: the same mask without the work that
it hides); heads at labelled positions; cross entropy a chunk of rows at a time, whose logits backward computes again.
Every linear layer and norm is the module's own call. Guarantees (test_packed_peer.py): both attentions, and ours, give
one loss and one gradient.

Shapes: N positions, H hidden, h heads, D head size, n labelled rows, K codebooks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from higgs_tune.train.data.batch import Batch
from higgs_tune.train.model.load import HiggsAudioModel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

CHUNK_ROWS = 256
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def peer_step(model: HiggsAudioModel, weights: torch.Tensor, batch: Batch, attend: Attend) -> torch.Tensor:
    """Forward and backward of a pack; its loss.

    Args:
        weights: [2 + K], of a label of text, of each codebook, and of a pair, which counts for nothing here.
        attend: the pack's attention, see `attend_of`.
    """
    autocast = torch.autocast(weights.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16)
    with autocast:
        hidden_NH = packed_hidden(model, batch, attend)
        to_sorted, heads = batch["to_sorted"].long(), model.audio_decoder_proj
        text_nH = hidden_NH[to_sorted[batch["text_rows"].long()]]
        audio_nH = hidden_NH[to_sorted[batch["audio_rows"].long()]]
        loss = _chunked_loss(model.norm, heads.text_lm_head, text_nH, batch["text_labels"][:, None], weights[:1])
        labels_nK = batch["audio_labels_KL"].t()
        loss = loss + _chunked_loss(model.norm, heads.audio_lm_head, audio_nH, labels_nK, weights[1:-1])
    loss.backward()
    return loss.detach()


def packed_hidden(model: HiggsAudioModel, batch: Batch, attend: Attend) -> torch.Tensor:
    """The states after the last layer, before the final norm, in sequence order: [N, H]."""
    to_sequence, to_sorted = batch["to_sequence"].long(), batch["to_sorted"].long()
    with torch.autocast(to_sorted.device.type, enabled=False):  # on a GPU autocast makes float32 of a sum
        embedded = model.embed_tokens(batch["text_ids"]), model._embed_audio_ids(batch["codes_KA"])
    hidden_NH = torch.cat(embedded)[to_sequence]
    rotary = model.rotary_emb(hidden_NH, batch["positions"][to_sequence][None])
    text, audio = to_sorted.split([len(batch["text_ids"]), len(to_sorted) - len(batch["text_ids"])])
    for layer in model.layers:
        hidden_NH = _layer(layer, hidden_NH, text, audio, to_sequence, rotary, attend)
    return hidden_NH


def _layer(
    layer: Any,
    hidden_NH: torch.Tensor,
    text: torch.Tensor,
    audio: torch.Tensor,
    back: torch.Tensor,
    rotary: Any,
    attend: Attend,
) -> torch.Tensor:
    """One dual-FFN layer.

    Args:
        text, audio: rows of each kind. back: the order that brings them, one after the other, into the sequence.
    """
    normed = layer.input_layernorm(hidden_NH[text]), layer.audio_input_layernorm(hidden_NH[audio])
    hidden_NH = hidden_NH + _attention(layer.self_attn, torch.cat(normed)[back], rotary, attend)
    text_PH = layer.mlp(layer.post_attention_layernorm(hidden_NH[text]))
    audio_AH = layer.audio_mlp(layer.audio_post_attention_layernorm(hidden_NH[audio]))
    return hidden_NH + torch.cat([text_PH, audio_AH])[back]


def _attention(module: Any, x_NH: torch.Tensor, rotary: Any, attend: Attend) -> torch.Tensor:
    q, k, v = (
        project(x_NH).unflatten(1, (-1, module.head_dim)).transpose(0, 1)[None]
        for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    out_1hND = attend(*apply_rotary_pos_emb(q, k, *rotary), v)
    return module.o_proj(out_1hND[0].transpose(0, 1).flatten(1))


def attend_of(batch: Batch) -> Attend:
    """The attention of a pack on its device: queries, keys and values [1, h, N, D], causal within each sample.

    A loader makes the mask with the batch, so this is called beforehand.
    """
    return flex_attend(batch) if batch["positions"].is_cuda else sdpa_attend(batch)


def sdpa_attend(batch: Batch) -> Attend:
    """By torch's own kernel, sample by sample."""

    def attend(*qkv_1hND: torch.Tensor) -> torch.Tensor:
        parts = zip(*(x.split(batch.lengths, 2) for x in qkv_1hND), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts], 2)

    return attend


def flex_attend(batch: Batch, *, compiled: bool = True) -> Attend:
    """By FlexAttention and the pack's block mask.

    Args:
        compiled: into one kernel; else plain operations over all pairs of positions, for tests.
    """
    device = batch["positions"].device
    counts = torch.tensor(batch.lengths, device=device)
    sample_N = torch.repeat_interleave(torch.arange(len(counts), device=device), counts)

    def may_see(_batch: Any, _head: Any, q: Any, k: Any) -> Any:
        return (q >= k) & (sample_N[q] == sample_N[k])

    size = len(sample_N)
    mask = create_block_mask(may_see, None, None, size, size, device=str(device))
    run: Any = _compiled_flex_attention() if compiled else flex_attention
    return lambda q_1hND, k_1hND, v_1hND: run(q_1hND, k_1hND, v_1hND, block_mask=mask, enable_gqa=True)


@cache
def _compiled_flex_attention() -> Any:
    """Anew for each size of pack; more sizes than torch's limit end the run instead of running uncompiled."""
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _chunked_loss(
    norm: Any, head: Any, rows_nH: torch.Tensor, labels_nK: torch.Tensor, weights_K: torch.Tensor
) -> torch.Tensor:
    """The sum of each label's cross entropy times its weight."""

    def chunk(part_nH: torch.Tensor, target_nK: torch.Tensor) -> torch.Tensor:
        logits_nKV = head(norm(part_nH)).float().unflatten(1, (target_nK.shape[1], -1))
        losses = F.cross_entropy(logits_nKV.flatten(0, 1), target_nK.long().flatten(), reduction="none")
        return (losses.view_as(target_nK) * weights_K).sum()

    total = weights_K.new_zeros(())
    for rows, targets in zip(rows_nH.split(CHUNK_ROWS), labels_nK.split(CHUNK_ROWS), strict=True):
        part = checkpoint(chunk, rows, targets, use_reentrant=False)
        assert isinstance(part, torch.Tensor)
        total = total + part
    return total
