"""Write a codec in both layouts: safetensors and JSON, float16 (one weight-normed pair: float32).

`FOLDER/native` is what transformers writes; `FOLDER/original` has Boson's names, in safetensors in place of a pickle.
`load_codec` reads both, and both give the same codes.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from higgs_tune.preprocess.codec.checkpoint import boson_name, native_name
from higgs_tune.preprocess.codec.codec import HiggsCodec
from higgs_tune.preprocess.codec.weights import NATIVE_TYPE
from higgs_tune.shards.durable import write_bytes
from higgs_tune.train.toy import boson_codec_config
from safetensors.torch import save

POSITION = "encoder.pos_conv_embed.conv.weight"
ACOUSTIC = ("encoder_hidden_size", "decoder_hidden_size", "hidden_size", "downsampling_ratios", "upsampling_ratios")
SEMANTIC = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "conv_dim")


def _write(folder: Path, weights: dict[str, torch.Tensor], config: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: value.contiguous() for name, value in weights.items()}
    write_bytes(folder / "model.safetensors", save(stored, {"format": "pt"}))
    write_bytes(folder / "config.json", json.dumps(config, indent=1).encode() + b"\n")


def write_codec(codec: HiggsCodec, folder: Path) -> None:
    """Write `folder/native` and `folder/original`; the weight norm of HuBERT's position embedding is folded."""
    weights, config = {name: value.half() for name, value in codec.state_dict().items()}, codec.config
    native = {native_name(name): value for name, value in weights.items()}
    stem = f"semantic_model.{POSITION}"
    value = native.pop(stem).float()  # the norm and the product are exact in no other way
    stem = stem.replace(".weight", ".parametrizations.weight.original")
    native |= {f"{stem}0": value.norm(dim=(0, 1), keepdim=True), f"{stem}1": value}
    acoustic = {"model_type": "dac"} | {name: getattr(config.acoustic, name) for name in ACOUSTIC}
    semantic = {"model_type": "hubert"} | {name: getattr(config.semantic, name) for name in SEMANTIC}
    _write(
        folder / "native",
        native,
        {
            "model_type": NATIVE_TYPE,
            "architectures": ["HiggsAudioV2TokenizerModel"],
            "sample_rate": config.sample_rate_hz,
            "semantic_sample_rate": config.semantic_sample_rate_hz,
            "codebook_size": config.codebook_size,
            "codebook_dim": config.codebook_dim,
            "channel_ratios": [1, 1],
            "acoustic_model_config": acoustic,
            "semantic_model_config": semantic,
        },
    )
    original = {boson_name(name): value for name, value in weights.items()}
    _write(folder / "original", original, boson_codec_config(config))
