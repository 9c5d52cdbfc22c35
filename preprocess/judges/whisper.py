"""Whisper of any size, by transformers. Longer clips than 30 s go through its long-form decoding, one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from higgs_tune.preprocess.judges.device import torch_device
from higgs_tune.preprocess.judges.interface import SAMPLE_RATE_HZ
from higgs_tune.shards.errors import UserError, first_line

WINDOW_SECONDS = 30


class WhisperRecogniser:
    """Greedy decoding; the language is forced where one is given.

    Args:
        folder: the checkpoint, with safetensors.

    Raises:
        UserError: the checkpoint cannot be loaded.
    """

    def __init__(self, folder: Path, name: str, revision: str, device: str) -> None:
        from transformers import WhisperForConditionalGeneration, WhisperProcessor

        self.name, self.revision, self.device = name, revision, torch_device(device)
        dtype = torch.float16 if self.device.startswith("cuda") else torch.float32
        try:
            self._processor: Any = WhisperProcessor.from_pretrained(folder)
            model: Any = WhisperForConditionalGeneration.from_pretrained(
                folder, torch_dtype=dtype, use_safetensors=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"cannot load Whisper: {first_line(error)}", where=folder) from error
        self._model = model.to(self.device).eval()

    def transcribe(self, waves_S: Sequence[np.ndarray], language: str) -> list[str]:
        """One transcript a clip.

        Raises:
            UserError: Whisper does not know the language.
        """
        texts = [""] * len(waves_S)
        short = [at for at, wave_S in enumerate(waves_S) if len(wave_S) <= WINDOW_SECONDS * SAMPLE_RATE_HZ]
        if short:
            said = self._generate([waves_S[at] for at in short], language, long=False)
            for at, text in zip(short, said, strict=True):
                texts[at] = text
        for at in sorted(set(range(len(waves_S))) - set(short)):
            (texts[at],) = self._generate([waves_S[at]], language, long=True)
        return texts

    def _generate(self, waves_S: list[np.ndarray], language: str, *, long: bool) -> list[str]:
        options = {"truncation": False, "padding": "longest"} if long else {}
        inputs = self._processor.feature_extractor(
            waves_S, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt", return_attention_mask=True, **options
        ).to(self.device)
        inputs["input_features"] = inputs["input_features"].to(self._model.dtype)
        forced: dict[str, Any] = {"return_timestamps": True} if long else {}
        if getattr(self._model.generation_config, "is_multilingual", False):
            forced |= {"task": "transcribe", "language": language or None}
        try:
            with torch.inference_mode():
                tokens = self._model.generate(**inputs, **forced, do_sample=False, num_beams=1)
        except ValueError as error:
            raise UserError(f"Whisper refuses: {first_line(error)}", where=self.name, got=language) from error
        return self._processor.batch_decode(tokens, skip_special_tokens=True)

    def detect_language(self, waves_S: Sequence[np.ndarray]) -> list[tuple[str, float]]:
        """The likeliest language of the first 30 s of each clip, and its probability; none of an English model."""
        tokens: dict[str, int] = getattr(self._model.generation_config, "lang_to_id", None) or {}
        if not tokens:
            return []
        first = [wave_S[: WINDOW_SECONDS * SAMPLE_RATE_HZ] for wave_S in waves_S]
        inputs = self._processor.feature_extractor(first, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt")
        features = inputs["input_features"].to(self.device, self._model.dtype)
        start = torch.full((len(first), 1), self._model.generation_config.decoder_start_token_id, device=self.device)
        with torch.inference_mode():
            logits = self._model(input_features=features, decoder_input_ids=start).logits[:, -1]
        names, ids = list(tokens), list(tokens.values())
        best = logits[:, ids].float().softmax(-1).max(-1)
        return [
            (names[at].strip("<|>"), share)
            for share, at in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
