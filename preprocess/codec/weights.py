"""The weight files of a codec folder and their SHA-256. Imports no torch, so that `higgs-inspect verify` needs none."""

from __future__ import annotations

from pathlib import Path

from higgs_tune.shards.errors import UserError
from higgs_tune.shards.writer import file_sha256


def weights_sha256(path: str | Path) -> str:
    """SHA-256 over the weight files of a codec folder: what the provenance of codes names."""
    files = weight_files(Path(path))
    return file_sha256(files[0]) if len(files) == 1 else ",".join(file_sha256(file) for file in files)


def weight_files(folder: Path) -> list[Path]:
    original = folder / "model.pth"
    files = [original] if original.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError("the audio tokenizer has no weights", where=folder, expected="model.pth or *.safetensors")
    return files
