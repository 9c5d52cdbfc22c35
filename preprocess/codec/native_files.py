"""A codec in the transformers-native layout: its weights by native names, and the files beside them.

In: weights of `HiggsCodec`, or a checkpoint in Boson's layout. Out: tensors and JSON. Source: transformers'
`HiggsAudioV2TokenizerModel` (5.3 and later). Guarantees (tests/native): its codes for the same sound are ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from higgs_tune.preprocess.codec.checkpoint import native_name
from higgs_tune.preprocess.codec.codec import CodecConfig
from higgs_tune.preprocess.codec.weights import NATIVE_TYPE, ORIGINAL

ACOUSTIC = ("encoder_hidden_size", "decoder_hidden_size", "hidden_size", "downsampling_ratios", "upsampling_ratios")
SEMANTIC = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "conv_dim", "conv_kernel"),
    *("conv_stride", "conv_bias", "feat_extract_norm", "feat_proj_layer_norm", "num_conv_pos_embeddings"),
    "num_conv_pos_embedding_groups",
)
FEATURES = {
    "feature_extractor_type": "DacFeatureExtractor", "feature_size": 1, "hop_length": 1, "padding_side": "right",
    "padding_value": 0.0, "return_attention_mask": True, "sampling_rate": 24000,
}  # fmt: skip
_POSITION = "semantic_model.encoder.pos_conv_embed.conv."
_CARRIED = re.compile(r"^(decoder_semantic|fc_post1)\.|\._codebook\.(inited|cluster_size|embed_avg)$")


def native_tensors(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a `HiggsCodec` by native names; HuBERT's position embedding gets its weight norm back."""
    native = {native_name(name): value for name, value in weights.items()}
    value = native.pop(f"{_POSITION}weight").float()  # the norm and the product are exact in no other way
    pair = (value.norm(dim=(0, 1), keepdim=True), value)
    return native | {f"{_POSITION}parametrizations.weight.original{i}": part for i, part in enumerate(pair)}


def carried_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of Boson's layout that neither encoding nor decoding uses, by native names."""
    if not (folder / ORIGINAL).is_file():
        return {}
    stored = torch.load(folder / ORIGINAL, map_location="cpu", weights_only=True, mmap=True)
    carried: dict[str, torch.Tensor] = {}
    for name, value in stored.items():
        if _CARRIED.search(name):
            told = re.sub(r"^fc_post1\.", "fc1.", re.sub(r"(conv\d?)\.conv\.(weight|bias)$", r"\1.\2", name))
            told = re.sub(r"^quantizer\.vq\.layers\.(\d+)\._codebook", r"quantizer.quantizers.\1.codebook", told)
            carried[told] = value
    return carried


def native_config(config: CodecConfig) -> dict[str, Any]:
    """config.json."""
    most = config.codebooks * config.frame_rate_hz * math.log2(config.codebook_size) / 1000  # kbit/s of all codebooks
    return {
        "model_type": NATIVE_TYPE,
        "architectures": ["HiggsAudioV2TokenizerModel"],
        "sample_rate": config.sample_rate_hz,
        "semantic_sample_rate": config.semantic_sample_rate_hz,
        "target_bandwidths": [share * most for share in (0.25, 0.5, 0.75, 1.0)],
        "codebook_size": config.codebook_size,
        "codebook_dim": config.codebook_dim,
        "channel_ratios": [1, 1],
        "acoustic_model_config": {"model_type": "dac"} | {name: getattr(config.acoustic, name) for name in ACOUSTIC},
        "semantic_model_config": {"model_type": "hubert"} | {name: getattr(config.semantic, name) for name in SEMANTIC},
    }
