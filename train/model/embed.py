"""Embeddings of a batch: text tokens, Whisper features, and codes.

In: boson's model and a `Batch`. Out: the rows that enter the first layer, in the dtype of the residual stream, also
where float32 copies of embeddings, tower or projector train (test_trained_modules.py).

Shapes: P text rows, of them M Whisper frames; A audio rows, H hidden, K codebooks, S segments with features, C mel bins
or tower channels, F log-mel frames.
"""

from __future__ import annotations

from typing import Any

import torch
from higgs_tune.train.data.batch import Batch
from higgs_tune.train.model.fused_linear import fused_project
from higgs_tune.train.model.layer_input import Rows
from higgs_tune.train.model.linear import layers_of, linear
from higgs_tune.train.model.load import HiggsAudioModel
from torch import nn


def stream_dtype(model: HiggsAudioModel) -> torch.dtype:
    """The dtype of the residual stream: that of the checkpoint's embeddings, also where their float32 copy trains."""
    embedding: Any = model.embed_tokens
    return getattr(embedding, "original_module", embedding).weight.dtype


def embed_tokens(model: HiggsAudioModel, ids_n: torch.Tensor) -> torch.Tensor:
    """The embeddings of text tokens [n, H]."""
    return model.embed_tokens(ids_n).to(stream_dtype(model))


def embed_text(model: HiggsAudioModel, batch: Batch) -> torch.Tensor:
    """The text rows [P, H]: token embeddings, and Whisper features where the model takes them."""
    tokens_PH = embed_tokens(model, batch["text_ids"])
    if model.audio_tower is None:
        return tokens_PH
    if batch.mels is None:  # DDP waits for a gradient of whatever trains, also where a pack has no use for it
        parts: tuple[Any, ...] = (model.audio_tower, model.audio_encoder_proj)
        unused = [p for part in parts for p in part.parameters() if p.requires_grad]
        return tokens_PH + 0 * sum(p.sum() for p in unused) if unused else tokens_PH
    features_MH = embed_whisper(model, batch, batch.mels).to(tokens_PH.dtype)
    order = torch.cat([batch["token_rows"], batch["mel_rows"]])
    return torch.cat([tokens_PH, features_MH])[torch.argsort(order)]


def embed_whisper(model: HiggsAudioModel, batch: Batch, mels: torch.Tensor) -> torch.Tensor:
    """What stands at the rows of Whisper features: [M, H]. The tower is boson's.

    Args:
        mels: see `Batch`.
    """
    projector: Any = model.audio_encoder_proj
    states_MC = mels if mels.ndim == 2 else _tower_states(model, batch, mels)
    return _project(projector.linear, states_MC.to(projector.linear.weight.dtype))


def _tower_states(model: HiggsAudioModel, batch: Batch, mels_SCF: torch.Tensor) -> torch.Tensor:
    """The tower's output for log-mel windows [M, C], under the attention mask of boson's `_apply_audio_tower`."""
    tower: Any = model.audio_tower
    rows = (mels_SCF.shape[-1] - 1) // 2 + 1
    lengths = (batch["mel_frames"] - 1) // 2 + 1
    mask = torch.arange(rows, device=mels_SCF.device) < lengths[:, None]
    mask = mask[:, None, None].expand(-1, 1, rows, rows)
    out_SFC = tower(mels_SCF.to(tower.conv1.weight.dtype), attention_mask=mask).last_hidden_state
    return out_SFC.flatten(0, 1).index_select(0, batch["mel_source"])


def embed_audio(model: HiggsAudioModel, codes_KA: torch.Tensor) -> torch.Tensor:
    """Sum (or mean) of the codebooks' embeddings of each frame: [A, H]."""
    first_row = torch.arange(len(codes_KA), device=codes_KA.device, dtype=torch.int32) * model.audio_codebook_size
    embedded_KAH = model.audio_codebook_embeddings(codes_KA + first_row[:, None])
    embedded_KAH = embedded_KAH.to(stream_dtype(model))
    embedded_AH = embedded_KAH.mean(0) if model.config.audio_embed_avg else embedded_KAH.sum(0)
    return (
        _project(model.audio_out_embed_projector, embedded_AH) if model.use_audio_out_embed_projector else embedded_AH
    )


def _project(module: nn.Module, rows_NH: torch.Tensor) -> torch.Tensor:
    """A linear layer; without gradients by `linear`, whose rows do not depend on each other's number."""
    return fused_project(Rows(rows_NH), layers_of(module))[0] if torch.is_grad_enabled() else linear(module, rows_NH)
