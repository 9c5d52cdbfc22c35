"""Whisper in a run: the model's tower, the features that it takes from the sets, and whether its projector trains.

In: options, adapter, sets. Out: a `WhisperTower` or None, and `none`, `mel` or `encoder`. Sets and tower that do not
fit together are refused before any weight of the model is read.
"""

from __future__ import annotations

from pathlib import Path

from higgs_tune.preprocess.audio.whisper import tower_sha256
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.reader import ShardSet
from higgs_tune.train.checkpoint.folder import list_checkpoints
from higgs_tune.train.config import TrainConfig
from higgs_tune.train.model.load import HiggsAudioConfig
from higgs_tune.train.model.whisper_tower import TOWER_FILE, WhisperTower, find_tower, holds_tower
from higgs_tune.train.set_checks import require_mel_bins, require_tower_of_features


def resolve_tower(config: TrainConfig, adapter: Path | None) -> WhisperTower | None:
    """The tower to attach: that of --whisper_path, of the adapter, or of the checkpoint that the run resumes from.

    Raises:
        UserError: see `find_tower`.
    """
    wanted = config.checkpoints.resume_from_checkpoint
    if wanted and not (config.model.whisper_path or adapter):
        places = [Path(wanted), *list_checkpoints(Path(wanted)), *list_checkpoints(config.output_dir)]
        adapter = next((place for place in places if (place / TOWER_FILE).is_file()), None)
    return find_tower(config.model.whisper_path, adapter)


def resolve_features(
    config: TrainConfig,
    model: HiggsAudioConfig,
    sets: list[ShardSet],
    tower: WhisperTower | None,
    base: Path,
    adapter: Path | None,
) -> str:
    """Whisper features that the model takes from the sets: `none`, `mel` or `encoder`.

    Args:
        model: the config, with the attached tower. base, adapter: what the run starts from.

    Raises:
        UserError: sets, tower and options do not fit together.
    """
    kind = feature_kind(config, model, sets)
    if kind == "encoder":
        if adapter and holds_tower(adapter):
            hint = "Make the sets with --whisper_features mel."
            raise UserError("the adapter has trained the Whisper tower, and encoder features are of the tower before",
                            where=adapter, expected="mel features", got="encoder", hint=hint)  # fmt: skip
        require_tower_of_features(sets, lambda: tower.sha256 if tower else tower_sha256(base))
    if kind == "mel":
        require_mel_bins(sets, model.audio_encoder_config.num_mel_bins)
    return kind


def feature_kind(config: TrainConfig, model: HiggsAudioConfig, sets: list[ShardSet]) -> str:
    """Whisper features that the model takes from the sets: `none`, `mel` or `encoder`.

    Raises:
        UserError: the model has a tower and a set has no features, or an option needs a tower that is not there.
    """
    if model.skip_audio_tower:
        hint = "--whisper_path attaches one, with a new audio_encoder_proj that trains."
        for flag in ("train_audio_tower", "train_audio_encoder_proj"):
            if getattr(config.lora, flag):
                raise UserError(f"--{flag}: the checkpoint has no Whisper tower", where=config.model_path, hint=hint)
        if config.model.encode_whisper_embed:
            raise UserError("--encode_whisper_embed: the checkpoint has no Whisper tower", hint=hint)
        return "none"
    kinds = {shards.features for shards in sets}
    if len(kinds) > 1 or "none" in kinds:
        hint = "Make the sets with --whisper_features mel or encoder."
        raise UserError("the model has a Whisper tower, and the sets do not all have its features",
                        expected="mel or encoder", got=", ".join(sorted(kinds)), hint=hint)  # fmt: skip
    kind = kinds.pop()
    if kind == "encoder" and (config.lora.train_audio_tower or config.model.forward == "reference"):
        flag = "--train_audio_tower" if config.lora.train_audio_tower else "--forward reference"
        raise UserError(f"{flag} needs the tower's input", expected="--whisper_features mel", got=kind)
    return kind


def trains_projector(config: TrainConfig, tower: WhisperTower | None) -> bool:
    """Whether the projector of Whisper features trains in full: if asked for, or new, except in stage 1."""
    is_new = tower is not None and config.training_stage != "stage1"
    return config.lora.train_audio_encoder_proj or is_new
