"""higgs-export: merge an adapter into its base checkpoint, so that neither PEFT nor this package is needed.

    higgs-export OUT2 --out MERGED

In: a training output folder. Out: a folder in Boson's layout with config, safetensors and tokenizer files. Guarantees
(test_handover.py): the merged model has the adapted model's logits; boson's `from_pretrained` reads it; a folder under
the final name is whole.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from higgs_tune.shards import durable
from higgs_tune.shards.errors import UserError, run_command

if TYPE_CHECKING:  # the flags are parsed before torch and transformers are imported
    import torch
    from peft import PeftModel


@dataclass(frozen=True)
class ExportConfig:
    """Merge an adapter into its base checkpoint."""

    adapter: tyro.conf.Positional[Path]
    """Output folder of a training run."""
    out: Path
    """Folder that receives the merged checkpoint."""
    layout: Literal["original", "native"] = "original"
    """original: Boson's, which this package, boson-multimodal and mlx-audio read. native: not written yet."""
    base: Path | None = None
    """Base checkpoint, in place of the one that the adapter's config names."""
    whisper_path: Path | None = None
    """Whisper checkpoint of an adapter with a tower, in place of the one that it names."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the merged weights."""
    debug: bool = False
    """Show tracebacks of user errors."""


def load_adapter(
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    base: Path | None = None,
    whisper_path: Path | None = None,
) -> PeftModel:
    """A training output folder's model: base checkpoint and adapter.

    Args:
        base: the base checkpoint, in place of the one that the adapter's config names.
        whisper_path: the checkpoint of its Whisper tower, in place of the one that its whisper_tower.json names.

    Raises:
        UserError: the folder holds no adapter, the base checkpoint is not there or has no text head, or the adapter
            does not fit it.
    """
    from higgs_tune.train.model.adapter import apply_adapter, read_adapter
    from higgs_tune.train.model.base import resolve_model
    from higgs_tune.train.model.load import load_model
    from higgs_tune.train.model.whisper_tower import find_tower

    base, adapter = resolve_model(folder, base, flag="--base")
    if adapter is None:
        raise UserError("no adapter here", where=folder, expected="adapter_config.json")
    tensors = read_adapter(adapter)
    tower = find_tower(whisper_path, adapter)
    attention, whisper = tensors.has_audio_attention, tower.folder if tower else None
    loaded = load_model(base, device=device, dtype=dtype, audio_attention=attention, tower=whisper)
    if not loaded.has_text_head:
        hint = "Take a base that holds it, as the released checkpoint does in both layouts."
        raise UserError("the base checkpoint has no text head, which Boson's layout needs", where=base, hint=hint)
    return apply_adapter(loaded.model, tensors)


def export(config: ExportConfig) -> None:
    """Write the merged checkpoint.

    Raises:
        UserError: the output folder exists, the layout is not written yet, or the adapter cannot be loaded.
    """
    if config.layout == "native" and (config.adapter / "whisper_tower.json").is_file():
        hint = "Boson's layout holds both: --layout original."
        raise UserError("--layout native has no place for a Whisper tower and its projector", where=config.adapter,
                        expected="an adapter without --whisper_path", hint=hint)  # fmt: skip
    if config.layout == "native":
        raise UserError("--layout native is not written yet", expected="original")
    if config.out.exists():
        raise UserError("the output folder exists already", where=config.out)
    durable.check_writable(config.out.parent)
    import torch
    from higgs_tune.train.checkpoint.output import whole_weights, write_model
    from higgs_tune.train.model.base import resolve_model

    base, adapter = resolve_model(config.adapter, config.base, flag="--base")
    if adapter is None:
        raise UserError("no adapter here", where=config.adapter, expected="adapter_config.json")
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    cpu = torch.device("cpu")
    adapted = load_adapter(config.adapter, device=cpu, dtype=torch.float32, base=base, whisper_path=config.whisper_path)
    model: Any = adapted.merge_and_unload()  # pyright: ignore[reportCallIssue]
    model.config.torch_dtype = dtype
    temp = config.out.with_name(f"{durable.TEMP_PREFIX}{config.out.name}")
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir()
    write_model(temp, model.config, whole_weights(model, dtype), base)
    temp.rename(config.out)
    durable.fsync_folder(config.out.parent)
    print(f"merged checkpoint in {config.out}")


def main() -> None:
    run_command(lambda: export(tyro.cli(ExportConfig, prog="higgs-export")))


if __name__ == "__main__":
    main()
