"""Whisper in CTranslate2 form, by faster-whisper (an extra)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from higgs_tune.shards.errors import UserError, first_line

BEAMS = 5


class FasterWhisperRecogniser:
    """Beam search at temperature 0, every clip on its own.

    Raises:
        UserError: faster-whisper is not installed, or the checkpoint cannot be loaded.
    """

    def __init__(self, folder: Path, name: str, revision: str, device: str) -> None:
        try:
            import faster_whisper  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            hint = "pip install higgs-tune[faster-whisper]"
            raise UserError("this recogniser needs faster-whisper", where=folder, hint=hint) from error
        self.name, self.revision = name, revision or f"faster-whisper {faster_whisper.__version__}"
        kind, _, index = device.partition(":")
        try:
            self._model: Any = faster_whisper.WhisperModel(
                str(folder), device=kind, device_index=int(index or 0), local_files_only=True
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"cannot load Whisper: {first_line(error)}", where=folder) from error

    def transcribe(self, waves_S: Sequence[np.ndarray], language: str) -> list[str]:
        """One transcript a clip.

        Raises:
            UserError: Whisper does not know the language.
        """
        return [self._transcribe(wave_S, language) for wave_S in waves_S]

    def _transcribe(self, wave_S: np.ndarray, language: str) -> str:
        try:
            parts, _info = self._model.transcribe(
                wave_S,
                language=language or None,
                beam_size=BEAMS,
                temperature=0.0,
                condition_on_previous_text=False,
                without_timestamps=True,
            )
            return "".join(part.text for part in parts).strip()
        except ValueError as error:
            raise UserError(f"Whisper refuses: {first_line(error)}", where=self.name, got=language) from error

    def detect_language(self, waves_S: Sequence[np.ndarray]) -> list[tuple[str, float]]:
        """The likeliest language of the first 30 s of each clip, and its probability."""
        return [(str(said[0]), float(said[1])) for said in map(self._model.detect_language, waves_S)]
