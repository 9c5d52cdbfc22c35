"""Speaker embeddings of transformers' WavLMForXVector, such as microsoft/wavlm-base-plus-sv."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from higgs_tune.preprocess.judges.device import torch_device
from higgs_tune.preprocess.judges.interface import SAMPLE_RATE_HZ, voice_part
from higgs_tune.shards.errors import UserError, first_line


class XVectorEncoder:
    """Raises UserError where the checkpoint cannot be loaded."""

    def __init__(self, folder: Path, name: str, revision: str, device: str) -> None:
        from transformers import AutoFeatureExtractor, WavLMForXVector

        self.name, self.revision, self.device = name, revision, torch_device(device)
        try:
            self._extractor: Any = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=False)
            model: Any = WavLMForXVector.from_pretrained(folder, use_safetensors=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"cannot load the speaker encoder: {first_line(error)}", where=folder) from error
        self._model = model.to(self.device).eval()

    def embed(self, wave_S: np.ndarray) -> np.ndarray:
        """float32 [D]."""
        inputs = self._extractor(voice_part(wave_S), sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            return self._model(**inputs).embeddings[0].float().cpu().numpy()
