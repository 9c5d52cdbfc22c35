"""What a model speaks with, known before its weights are read: folders, prompt layout, fixed texts, normalization.

In: the options. Out: `Settings`, and a fingerprint that changes with anything that changes the codes. What the model
was trained on comes from its training record (`higgs_tune.json`).
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from higgs_tune.evaluate.speak.config import VoiceConfig
from higgs_tune.preprocess.checkpoints.checkpoint import read_config, special_ids
from higgs_tune.preprocess.checkpoints.hub import local_checkpoint
from higgs_tune.preprocess.checkpoints.training_record import read_record
from higgs_tune.preprocess.checkpoints.weights import weight_files
from higgs_tune.preprocess.codec.weights import codec_weight_files
from higgs_tune.preprocess.input.layout import PromptLayout, Wording
from higgs_tune.preprocess.text_normalization import TextNormalization
from higgs_tune.shards import durable
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.sequence import SpecialIds

if TYPE_CHECKING:
    from higgs_tune.train.model.whisper_tower import WhisperTower


@dataclass(frozen=True)
class Settings:
    """base, adapter, codec: folders. tower: the Whisper tower that the adapter was trained with, if the base has none.
    notes: for the user, where no training record says what to take."""

    base: Path
    adapter: Path | None
    tower: WhisperTower | None
    codec: Path
    ids: SpecialIds
    layout: PromptLayout
    wording: Wording
    normalization: TextNormalization
    sampling: dict[str, Any]
    notes: tuple[str, ...]

    def fingerprint(self) -> dict[str, Any]:
        """What the codes depend on besides text and references; weight files by name, size and time."""
        files = [*weight_files(self.base), *codec_weight_files(self.codec)]
        if self.adapter:
            files += sorted(path for path in self.adapter.iterdir() if path.name.startswith("adapter_"))
        stats = [(str(file.resolve()), file.stat()) for file in files]
        return {
            "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
            "tower": self.tower.sha256 if self.tower else None,
            "layout": self.layout,
            "wording": asdict(self.wording),
            "normalization": self.normalization,
            "sampling": self.sampling,
        }


def resolve_settings(config: VoiceConfig) -> Settings:
    """The settings of the options.

    Raises:
        UserError: no such checkpoint, adapter or codec; or one that cannot be spoken with.
    """
    from higgs_tune.train.model.base import resolve_model
    from higgs_tune.train.model.whisper_tower import TOWER_FILE, find_tower

    base, adapter = resolve_model(config.model_path, config.base_model)
    raw = read_config(base)
    weight_files(base)
    if config.whisper_path and not (adapter and (adapter / TOWER_FILE).is_file()):
        raise UserError("--whisper_path is for adapters that were trained with a Whisper tower",
                        where=config.model_path, expected=TOWER_FILE)  # fmt: skip
    tower = find_tower(config.whisper_path, adapter)
    assert config.audio_tokenizer_path is not None
    codec = local_checkpoint(config.audio_tokenizer_path)
    codec_weight_files(codec)
    record, notes = read_record(adapter or base), []
    layout = config.layout
    if layout == "auto":
        known = record.prompt_layout if record else None
        layout = known or "serve"
        counts = _counts(record.layouts) if record and known else ""
        notes.append(f"layout {layout}: " + (f"the training data has {counts}" if counts else "no record of training"))
    if layout == "chat" and (record is None or record.instruction is record.plain_instruction is None):
        notes.append("the instruction of the training data is not known: taking this package's own")
    wording = record.wording if record else Wording()
    normalization = config.text_normalization
    if normalization == "auto":
        normalization = record.text_normalization if record else "none"
    if config.system is not None:
        wording = replace(wording, system=config.system)
    ids = special_ids(raw, base)
    return Settings(base, adapter, tower, codec, ids, layout, wording, normalization, config.sampling, tuple(notes))


def _counts(layouts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in layouts.items() if count)


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(durable.to_json(value)).hexdigest()
