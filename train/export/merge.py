"""Merge an adapter into its base checkpoint: one folder in Boson's layout that needs neither PEFT nor us.

    python -m higgs_tune.train.export.merge --adapter OUT2 --out MERGED

In: a training output folder. Out: config, safetensors and tokenizer files. Never: a half-written checkpoint under the
final name.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from higgs_tune.shards import durable
from higgs_tune.shards.errors import UserError, run_command
from higgs_tune.train.checkpoint.output import whole_weights, write_model
from higgs_tune.train.model.load import HiggsAudioModel, load_model
from higgs_tune.train.model.lora import has_audio_attention
from higgs_tune.train.resolve import resolve_model
from peft import PeftModel


@dataclass(frozen=True)
class ExportConfig:
    """Merge an adapter into its base checkpoint."""

    adapter: Path
    """Output folder of a training run."""
    out: Path
    """Folder that receives the merged checkpoint."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the merged weights."""
    debug: bool = False
    """Show tracebacks of user errors."""


def load_adapter(folder: Path, *, device: torch.device, dtype: torch.dtype) -> PeftModel:
    """A training output folder's model: base checkpoint and adapter.

    Raises:
        UserError: the folder holds no adapter, or the base checkpoint is not there.
    """
    base, adapter = resolve_model(folder)
    if adapter is None:
        raise UserError("no adapter here", where=folder, expected="adapter_config.json")
    loaded = load_model(base, device=device, dtype=dtype, audio_attention=has_audio_attention(folder))
    return PeftModel.from_pretrained(loaded.model, str(folder))  # pyright: ignore[reportArgumentType]


def export(config: ExportConfig) -> None:
    """Write the merged checkpoint.

    Raises:
        UserError: the output folder exists, or the adapter cannot be loaded.
    """
    if config.out.exists():
        raise UserError("the output folder exists already", where=config.out)
    durable.check_writable(config.out.parent)
    base, _ = resolve_model(config.adapter)
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    peft_model = load_adapter(config.adapter, device=torch.device("cpu"), dtype=torch.float32)
    model: HiggsAudioModel = peft_model.merge_and_unload()  # pyright: ignore[reportCallIssue]
    model.config.torch_dtype = dtype
    temp = config.out.with_name(f"{durable.TEMP_PREFIX}{config.out.name}")
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir()
    write_model(temp, model.config, whole_weights(model, dtype), base)
    temp.rename(config.out)
    durable.fsync_folder(config.out.parent)
    print(f"merged checkpoint in {config.out}")


def main() -> None:
    run_command(lambda: export(tyro.cli(ExportConfig, prog="higgs_tune.train.export.merge")))


if __name__ == "__main__":
    main()
