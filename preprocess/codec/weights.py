"""The weight files of a codec folder and their SHA-256. Imports no torch, so that `higgs-inspect verify` needs none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from higgs_tune.preprocess.checkpoints.weights import partial_downloads, weight_files
from higgs_tune.preprocess.filetype import refuse_pointer
from higgs_tune.shards import durable
from higgs_tune.shards.errors import UserError, few
from higgs_tune.shards.writer import file_sha256

NATIVE_TYPE = "higgs_audio_v2_tokenizer"
ORIGINAL = "model.pth"


def read_codec_config(folder: Path) -> dict[str, Any]:
    """A codec's config.json, of either layout.

    Raises:
        UserError: it is missing, is not JSON, or describes another model.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError("no audio tokenizer here", where=folder, expected="config.json")
    refuse_pointer(file, "the audio tokenizer's config")
    config = durable.from_json(file.read_bytes(), "the audio tokenizer's config", file)
    if config.get("model_type") != NATIVE_TYPE and ("ratios" not in config or "sample_rate" not in config):
        raise UserError(
            "not the config of a Higgs audio tokenizer",
            where=file,
            expected=f"model_type {NATIVE_TYPE}, or Boson's keys (ratios, sample_rate, n_q)",
            got=f"model_type {config.get('model_type')}",
        )
    return config


def codec_weight_files(folder: Path) -> list[Path]:
    """model.pth of the original layout, the safetensors files of the native one.

    Raises:
        UserError: they are missing or damaged; see `checkpoints.weights`.
    """
    original = folder / ORIGINAL
    native = read_codec_config(folder).get("model_type") == NATIVE_TYPE
    if not native and original.is_file():
        refuse_pointer(original, "the audio tokenizer's weight file")
        return [original]
    if native or any(folder.glob("*.safetensors")):
        return weight_files(folder)
    got = few(partial_downloads(folder)) or None
    raise UserError("the audio tokenizer has no weights", where=folder, expected=ORIGINAL, got=got)


def weights_sha256(path: str | Path) -> str:
    """SHA-256 of a codec's weight files, for the provenance of codes."""
    return ",".join(file_sha256(file) for file in codec_weight_files(Path(path)))
