"""An audio tokenizer from Boson's layout into the native one, which AutoProcessor and vllm-omni read.

In: a codec's folder. Out: a folder, verified before it gets its name. Guarantees (test_export_codec.py, tests/native):
the codes of the result are those of the source, in our codec and in transformers' class.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from higgs_tune.preprocess.checkpoints.weights import SINGLE
from higgs_tune.preprocess.codec.checkpoint import load_codec
from higgs_tune.preprocess.codec.native_files import FEATURES, carried_tensors, native_config, native_tensors
from higgs_tune.preprocess.codec.weights import NATIVE_TYPE
from higgs_tune.shards import durable
from higgs_tune.shards.errors import UserError
from higgs_tune.train.export.folder import copy_legal_files, new_folder, verify_weights, write_files
from higgs_tune.train.export.tensors import Held, Source, byte_count, write_tensors


def codec_layout(folder: Path) -> str | None:
    """`original` or `native`, the layout of a codec's folder; None where it is no codec."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict):
        return None
    if config.get("model_type") == NATIVE_TYPE:
        return "native"
    return "original" if {"ratios", "n_q", "sample_rate"} <= config.keys() else None


def export_codec(folder: Path, out: Path, dtype: torch.dtype | None) -> None:
    """Write the codec in the native layout.

    Args:
        dtype: of the weights; None for float32.

    Raises:
        UserError: it cannot be read, or is in the native layout already; or the disk fails.
    """
    if codec_layout(folder) == "native":
        raise UserError("the audio tokenizer is in the native layout already", where=folder)
    codec = load_codec(folder)
    tensors = native_tensors(codec.state_dict()) | carried_tensors(folder)
    weights: dict[str, Source] = {
        name: Held(value.to(dtype) if dtype and value.is_floating_point() else value) for name, value in tensors.items()
    }
    config = native_config(codec.config) | {"dtype": str(dtype or torch.float32).removeprefix("torch.")}
    with new_folder(out, sum(map(byte_count, weights.values()))) as temp:
        files = {"config.json": config, "preprocessor_config.json": FEATURES}
        write_files(temp, {name: durable.to_json(value, indent=2) + b"\n" for name, value in files.items()})
        verify_weights(temp / SINGLE, weights, write_tensors(temp / SINGLE, weights))
        load_codec(temp)
        copy_legal_files(folder, temp)
