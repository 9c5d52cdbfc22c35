"""Whisper features of a clip: log-mel as `WhisperFeatureExtractor` gives it, or the output of a frozen audio tower.

In: mono float32 at the codec's rate. Out: one array for each chunk of at most 30 s, as boson's collator splits long
audio, and its number of frames without padding. The padding to 30 s is not stored: `shards.sequence.mel_window`
restores it.

A chunk of F frames keeps up to two more: the extractor's windows are 400 samples wide at a hop of 160, so the first two
frames of the padding still contain the end of the signal, and the tower sees them.

Shapes: S samples, C mel bins or tower channels, F frames (100 a second; after the tower 25).
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from higgs_tune.preprocess.audio.resample import resample_soxr
from higgs_tune.preprocess.checkpoints.weights import all_finite, read_header, weight_files
from higgs_tune.preprocess.workdir import Features
from higgs_tune.shards import durable
from higgs_tune.shards.errors import UserError, few
from higgs_tune.shards.format import MEL_TAIL
from higgs_tune.shards.sequence import MEL_WINDOW, mel_window, tower_frames
from safetensors import safe_open
from transformers import WhisperFeatureExtractor

if TYPE_CHECKING:
    from boson_multimodal.model.higgs_audio.configuration_higgs_audio import HiggsAudioEncoderConfig

RATE_HZ = 16_000
HOP = 160
CHUNK_SAMPLES = MEL_WINDOW * HOP
TOWER_PREFIXES = ("audio_tower.", "model.encoder.", "encoder.")  # in a Higgs model, WhisperFor…, WhisperModel


def log_mel(wave_S: np.ndarray, rate_hz: int, mel_bins: int) -> list[Features]:
    """Log-mel of each chunk, float32 [C, F and up to MEL_TAIL].

    Args:
        wave_S: float32 [S], mono.
    """
    wave_S = resample_soxr(wave_S, rate_hz, RATE_HZ)
    return [_chunk(wave_S[at : at + CHUNK_SAMPLES], mel_bins) for at in range(0, len(wave_S), CHUNK_SAMPLES)]


def _chunk(wave_S: np.ndarray, mel_bins: int) -> Features:
    frames = -(-len(wave_S) // HOP)
    kept = min(frames + MEL_TAIL, MEL_WINDOW)
    # silence beyond the kept frames changes neither them nor their maximum, so it is left out
    samples = min((kept + 2) * HOP, CHUNK_SAMPLES)
    values = _extractor(mel_bins)(
        [wave_S], sampling_rate=RATE_HZ, padding="max_length", max_length=samples, return_tensors="np"
    )["input_features"]
    return Features(values[0, :, :kept], frames)


@lru_cache(maxsize=2)
def _extractor(mel_bins: int) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=mel_bins)


def extractor_settings(mel_bins: int) -> dict[str, Any]:
    """Settings of the log-mel, for the provenance."""
    names = ("feature_size", "sampling_rate", "hop_length", "n_fft", "chunk_length", "padding_value")
    return {name: getattr(_extractor(mel_bins), name) for name in names}


def mel_bins_of(model: Path) -> int:
    """Mel bins of the audio tower that the checkpoint's config describes."""
    return _tower_config(model).get("num_mel_bins", 128)


def channels_of(folder: Path, kind: str) -> int:
    """Channels of the stored features: mel bins, or the tower's width."""
    return mel_bins_of(folder) if kind == "mel" else _tower_config(folder).get("d_model", 1280)


# the tower


def _tower_config(folder: Path) -> dict[str, Any]:
    """The tower's settings: `audio_encoder_config` of a Higgs model, the whole config of a Whisper model."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError("no checkpoint here", where=folder, expected=file.name)
    config = durable.from_json(file.read_bytes(), "the checkpoint's config", file)
    return config if config.get("model_type") == "whisper" else config.get("audio_encoder_config") or {}


class Tower:
    """A frozen audio tower: boson's `HiggsAudioEncoder` with the weights of a checkpoint."""

    def __init__(self, folder: Path, device: str) -> None:
        from boson_multimodal.model.higgs_audio.modeling_higgs_audio import HiggsAudioEncoder

        weights = tower_weights(folder)
        with torch.device("meta"):
            encoder = HiggsAudioEncoder(tower_config(folder))
        placed = {name: value.to(device, torch.float32) for name, value in weights.items()}
        encoder.load_state_dict(placed, assign=True)
        self.encoder = encoder.requires_grad_(False).eval()
        self.device = device

    @torch.inference_mode()
    def __call__(self, mel: Features) -> Features:
        """The tower's output for one chunk, float32 [d_model, F], under the attention mask of boson's model."""
        features_1CF = torch.from_numpy(mel_window(mel.values_CF))[None].to(self.device)
        length = (mel.frames - 1) // 2 + 1
        mask = torch.arange(MEL_WINDOW // 2, device=self.device) < length
        out_1FC = self.encoder(features_1CF, attention_mask=mask.expand(1, 1, len(mask), len(mask))).last_hidden_state
        frames = tower_frames(mel.frames)
        return Features(out_1FC[0, :frames].T.float().cpu().numpy(), frames)


def tower_config(folder: Path) -> HiggsAudioEncoderConfig:
    """The config of boson's encoder for a checkpoint's tower, of whatever size.

    Raises:
        UserError: no checkpoint, or its window is not Whisper's 30 s.
    """
    from boson_multimodal.model.higgs_audio.configuration_higgs_audio import HiggsAudioEncoderConfig

    fields = ("num_mel_bins", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "d_model")
    fields += ("max_source_positions", "scale_embedding", "activation_function")
    given = _tower_config(folder)
    config = HiggsAudioEncoderConfig(**{name: given[name] for name in fields if name in given})
    if config.max_source_positions != MEL_WINDOW // 2:
        got, expected = config.max_source_positions, f"max_source_positions {MEL_WINDOW // 2}"
        raise UserError("the audio tower's window is not Whisper's 30 s", where=folder, expected=expected, got=got)
    config._attn_implementation = "sdpa"
    return config


def tower_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tower's tensors by the names of `HiggsAudioEncoder`, as they are stored.

    Raises:
        UserError: there is no tower, its weights do not fit its config, or are NaN or infinite.
    """
    from boson_multimodal.model.higgs_audio.modeling_higgs_audio import HiggsAudioEncoder

    weights = _stored_tower(folder)
    with torch.device("meta"):
        own = HiggsAudioEncoder(tower_config(folder)).state_dict()
    wrong = sorted(own.keys() ^ weights.keys())
    wrong += [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    if wrong:
        raise UserError("the audio tower's weights do not fit its config", where=folder, got=few(wrong))
    return weights


def _stored_tower(folder: Path) -> dict[str, torch.Tensor]:
    require_tower(folder)
    weights: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                prefix = next((p for p in TOWER_PREFIXES if name.startswith(p)), None)
                if prefix:
                    weights[name.removeprefix(prefix)] = tensors.get_tensor(name)
    if broken := [name for name, value in weights.items() if not all_finite(value)]:
        raise UserError("the audio tower's weights are NaN or infinite", where=folder, got=few(sorted(broken)))
    return weights


def require_tower(folder: Path) -> None:
    """Make sure that a checkpoint has an audio tower.

    Raises:
        UserError: its weights hold no tower, or cannot be read.
    """
    if any(name.startswith(TOWER_PREFIXES) for file in weight_files(folder) for name in read_header(file)):
        return
    hint = "Name one that has it with --whisper_path, or use --whisper_features mel."
    raise UserError(
        "the checkpoint has no audio tower", where=folder, expected=f"weights {TOWER_PREFIXES[0]}*", hint=hint
    )


def tower_sha256(folder: Path) -> str:
    """SHA-256 over the tower's tensors in order of their names, for the provenance of its features."""
    digest = hashlib.sha256()
    for name, value in sorted(_stored_tower(folder).items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
