"""Speaker embeddings of Resemblyzer (GE2E, an extra): small, on a CPU."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import numpy as np
from higgs_tune.preprocess.judges.device import torch_device
from higgs_tune.shards.errors import UserError


class ResemblyzerEncoder:
    """Raises UserError where Resemblyzer is not installed."""

    def __init__(self, device: str) -> None:
        try:
            from resemblyzer import VoiceEncoder  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            hint = "pip install higgs-tune[resemblyzer]"
            raise UserError(f"the speaker encoder needs Resemblyzer ({error})", hint=hint) from error
        self.name, self.revision = "resemblyzer", importlib.metadata.version("resemblyzer")
        self._encoder: Any = VoiceEncoder(torch_device(device), verbose=False)

    def embed(self, wave_S: np.ndarray) -> np.ndarray:
        """float32 [256]; the clip is brought to the level of the encoder's training first, never made quieter."""
        from resemblyzer.audio import normalize_volume  # pyright: ignore[reportMissingImports]
        from resemblyzer.hparams import audio_norm_target_dBFS  # pyright: ignore[reportMissingImports]

        level_S = normalize_volume(wave_S, audio_norm_target_dBFS, increase_only=True)
        return np.asarray(self._encoder.embed_utterance(level_S), np.float32)
