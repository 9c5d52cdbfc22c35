"""Write a codec in both layouts: safetensors and JSON, float16 (one weight-normed pair: float32).

`FOLDER/native` is what transformers writes; `FOLDER/original` has Boson's names, in safetensors in place of a pickle.
`load_codec` reads both, and both give the same codes.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from higgs_tune.preprocess.codec.checkpoint import boson_name
from higgs_tune.preprocess.codec.codec import HiggsCodec
from higgs_tune.preprocess.codec.native_files import native_config, native_tensors
from higgs_tune.shards.durable import write_bytes
from higgs_tune.train.toy import boson_codec_config
from safetensors.torch import save


def _write(folder: Path, weights: dict[str, torch.Tensor], config: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: value.contiguous() for name, value in weights.items()}
    write_bytes(folder / "model.safetensors", save(stored, {"format": "pt"}))
    write_bytes(folder / "config.json", json.dumps(config, indent=1).encode() + b"\n")


def write_codec(codec: HiggsCodec, folder: Path) -> None:
    """Write `folder/native` and `folder/original`; the weight norm of HuBERT's position embedding is folded."""
    weights, config = {name: value.half() for name, value in codec.state_dict().items()}, codec.config
    _write(folder / "native", native_tensors(weights), native_config(config))
    original = {boson_name(name): value for name, value in weights.items()}
    _write(folder / "original", original, boson_codec_config(config))
