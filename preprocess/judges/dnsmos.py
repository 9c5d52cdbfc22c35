"""DNSMOS P.835 by Microsoft's speechmos (an extra): predicted opinion of speech, background and overall quality."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import numpy as np
from higgs_tune.preprocess.judges.interface import SAMPLE_RATE_HZ
from higgs_tune.shards.errors import UserError

SCORES = {"overall": "ovrl_mos", "speech": "sig_mos", "background": "bak_mos"}


class DnsmosModel:
    """Raises UserError where speechmos is not installed."""

    name = "DNSMOS P.835"

    def __init__(self) -> None:
        try:
            from speechmos import dnsmos  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            hint = "pip install higgs-tune[dnsmos]"
            raise UserError(f"the quality model needs speechmos ({error})", hint=hint) from error
        self.revision = f"speechmos {importlib.metadata.version('speechmos')}"
        self._dnsmos: Any = dnsmos

    def score(self, wave_S: np.ndarray) -> dict[str, float]:
        """Scores of 1 to 5: overall, speech, background. Short clips are repeated to 9 s by the model's own rule."""
        given = self._dnsmos.run(np.clip(wave_S, -1, 1), SAMPLE_RATE_HZ)
        return {name: float(given[theirs]) for name, theirs in SCORES.items()}
