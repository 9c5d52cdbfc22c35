"""higgs-export: a checkpoint of either layout from a run's adapter and its base, or the adapter alone.

    higgs-export OUT2 --out MERGED
    higgs-export OUT2 --out NATIVE --layout native
    higgs-export OUT2 --out ADAPTER --layout native --adapter_only

In: a run's output folder, a checkpoint whose layout is to change, or an audio tokenizer. Out: a folder, verified before
it gets its name, with config, weights, tokenizer, licence files, training record and model card. Guarantees
(test_export.py, test_handover.py, tests/native): the merged model has the adapted model's logits, in boson's class and
in transformers' native one; host memory does not grow with the model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from higgs_tune.shards.errors import UserError, run_command

if TYPE_CHECKING:  # the flags are parsed before torch and transformers are imported
    import torch
    from higgs_tune.train.export.plan import Start
    from higgs_tune.train.export.tensors import Source
    from peft import PeftModel

Layout = Literal["original", "native"]
Kind = Literal["adapter", "merged checkpoint", "converted checkpoint"]


@dataclass(frozen=True)
class ExportConfig:
    """Merge an adapter into its base checkpoint, in either layout; or convert an adapter or a checkpoint."""

    adapter: tyro.conf.Positional[Path]
    """Output folder of a training run; or a checkpoint, folder or Hub name[@revision], to convert; or the folder of an
    audio tokenizer in Boson's layout, which becomes native."""
    out: Path
    """New folder for the result."""
    layout: Layout = "original"
    """original: Boson's, which this package, boson-multimodal and mlx-audio read. native: that of transformers 5.3 and
    later, which vllm-omni reads too."""
    adapter_only: bool = False
    """Write the adapter alone, for PEFT on the layout's class."""
    base: Path | None = None
    """Base checkpoint, in place of the one that the adapter's config names."""
    whisper_path: Path | None = None
    """Whisper checkpoint of an adapter with a tower, in place of the one that it names."""
    audio_tokenizer_path: str | None = None
    """Audio tokenizer that the native layout's processor names: a Hub name, or a folder on the machine that uses it. By
    default that of the base, or Boson's."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of the weights. By default bfloat16 for merged ones; an adapter and a converted checkpoint keep theirs."""
    eval_dir: Path | None = None
    """Folder of higgs-eval; its figures go into the model card."""
    push_to_hub: str | None = None
    """Hub repository, owner/name, that the finished folder is uploaded to; it is made if it does not exist."""
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
    """Write the folder; push it, if asked to.

    Raises:
        UserError: the output folder exists, there is no adapter or nothing to convert, base and adapter do not fit, or
            the layout cannot hold the result.
    """
    if config.out.exists():
        raise UserError("the output folder exists already", where=config.out)
    import torch
    from higgs_tune.train.export.codec import codec_layout, export_codec

    if codec_layout(config.adapter):
        if config.layout == "original" or config.adapter_only or config.push_to_hub:
            raise UserError("an audio tokenizer is converted to the native layout, and nothing else",
                            where=config.adapter, expected="--out and --layout native")  # fmt: skip
        export_codec(config.adapter, config.out, getattr(torch, config.dtype) if config.dtype else None)
        print(f"audio tokenizer in {config.out}", flush=True)
        return
    from higgs_tune.train.export.card import CARD, CardFacts, model_card
    from higgs_tune.train.export.folder import copy_legal_files, new_folder, write_files
    from higgs_tune.train.export.hub import check_push, push
    from higgs_tune.train.export.plan import Start
    from higgs_tune.train.export.tensors import byte_count
    from higgs_tune.train.model.base import resolve_model
    from higgs_tune.train.model.whisper_tower import find_tower

    if config.push_to_hub:
        check_push(config.push_to_hub)
    base, adapter = resolve_model(config.adapter, config.base, flag="--base")
    if config.adapter_only and adapter is None:
        raise UserError("no adapter here", where=config.adapter, expected="adapter_config.json")
    facts = CardFacts.read(base, adapter, config.eval_dir)
    tower = find_tower(config.whisper_path, adapter)
    start = Start(base, adapter, tower)
    parts = _adapter_alone(config, start) if config.adapter_only else _model(config, start)
    with new_folder(config.out, sum(map(byte_count, parts.weights.values()))) as folder:
        _write_weights(folder, parts, start)
        card = model_card(facts, config.layout, parts.kind, copy_legal_files(base, folder), config.push_to_hub)
        write_files(folder, {**facts.carried, CARD: card})
    print(f"{parts.kind} in {config.out}", flush=True)
    if config.push_to_hub:
        print(f"pushed to {push(config.out, config.push_to_hub)}", flush=True)


@dataclass(frozen=True)
class _Parts:
    """What is written: small files, weights, and what the folder then is."""

    kind: Kind
    files: dict[str, bytes]
    weights: dict[str, Source]


def _model(config: ExportConfig, start: Start) -> _Parts:
    """A whole checkpoint.

    Raises:
        UserError: there is nothing to do, or base, adapter and layout do not fit together.
    """
    import torch
    from higgs_tune.preprocess.checkpoints.native import is_native, native_weight_name
    from higgs_tune.train.export.native import NativeFiles, original_files, refuse_what_native_lacks
    from higgs_tune.train.export.plan import in_dtype, plan_weights

    base, to_native = start.base, config.layout == "native"
    if start.adapter is None and config.dtype is None and is_native(base) == to_native:
        raise UserError(f"no adapter here, and the checkpoint is in the {config.layout} layout already",
                        where=config.adapter, expected="adapter_config.json")  # fmt: skip
    plan = plan_weights(start)
    if to_native:
        refuse_what_native_lacks(plan.config, base)
    dtype: torch.dtype | None = getattr(torch, config.dtype or "bfloat16") if start.adapter or config.dtype else None
    weights = in_dtype(plan.weights, dtype)
    told = dtype or next(iter(weights.values())).dtype
    if to_native:
        files = NativeFiles(plan.config, base, config.audio_tokenizer_path).to_bytes(told)
        weights = {native_weight_name(name): source for name, source in weights.items()}
    else:
        files = original_files(plan.config, base, told)
    return _Parts("merged checkpoint" if start.adapter else "converted checkpoint", files, weights)


def _adapter_alone(config: ExportConfig, start: Start) -> _Parts:
    """The adapter without its base.

    Raises:
        UserError: base, adapter and layout do not fit together.
    """
    import torch
    from higgs_tune.train.export.adapters import adapter_config, adapter_tensors
    from higgs_tune.train.export.plan import adapter_on_meta, in_dtype
    from higgs_tune.train.model.adapter import CONFIG_FILE
    from higgs_tune.train.model.whisper_tower import TOWER_FILE

    on_meta = adapter_on_meta(start)
    weights = in_dtype(adapter_tensors(on_meta, config.layout), getattr(torch, config.dtype) if config.dtype else None)
    files = {CONFIG_FILE: adapter_config(on_meta, config.layout, start.base, config.out)}
    if start.tower and config.layout == "original":
        files[TOWER_FILE] = start.tower.reference(config.out)
    return _Parts("adapter", files, weights)


def _write_weights(folder: Path, parts: _Parts, start: Start) -> None:
    """Write files and weights, and read the result as the trainer would.

    Raises:
        UserError: it cannot be written, or is not what it should be.
    """
    from higgs_tune.train.export.folder import verify_weights, write_files, write_weights
    from higgs_tune.train.export.plan import Start, adapter_on_meta, plan_weights
    from higgs_tune.train.export.tensors import write_tensors
    from higgs_tune.train.model.adapter import ADAPTER_FILE

    write_files(folder, parts.files)
    if parts.kind == "adapter":
        file = folder / ADAPTER_FILE
        verify_weights(file, parts.weights, write_tensors(file, parts.weights))
        adapter_on_meta(replace(start, adapter=folder))
    else:
        write_weights(folder, parts.weights)
        plan_weights(Start(folder))


def main() -> None:
    run_command(lambda: export(tyro.cli(ExportConfig, prog="higgs-export")))


if __name__ == "__main__":
    main()
