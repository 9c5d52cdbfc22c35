"""DNSMOS P.835 by Microsoft's speechmos (an extra): predicted opinion of speech, background and overall quality."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
from higgs_tune.preprocess.judges.interface import SAMPLE_RATE_HZ
from higgs_tune.shards.errors import UserError

SCORES = ("speech", "background", "overall")  # in the model's order
WINDOW, HOP = 144_160, SAMPLE_RATE_HZ  # samples: windows of 9.01 s, one a second


class DnsmosModel:
    """The package's network and calibration on one thread; its second model (P.808), whose score is not used, is not
    run.

    Raises:
        UserError: speechmos is not installed.
    """

    name = "DNSMOS P.835"

    def __init__(self) -> None:
        try:
            import onnxruntime  # pyright: ignore[reportMissingImports]
            from speechmos import dnsmos  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            hint = "pip install higgs-tune[dnsmos]"
            raise UserError(f"the quality model needs speechmos ({error})", hint=hint) from error
        self.revision = f"speechmos {importlib.metadata.version('speechmos')}"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        file = Path(dnsmos.__file__).parent / "dnsmos_models" / "sig_bak_ovr.onnx"
        self._session: Any = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._calibrate: Any = dnsmos.DNSMOS.get_polyfit_val

    def score(self, wave_S: np.ndarray) -> dict[str, float]:
        """Scores of 1 to 5: overall, speech, background. Short clips are repeated to 9 s by the model's own rule."""
        wave_S = np.clip(wave_S, -1, 1).astype(np.float32)
        while len(wave_S) < WINDOW:
            wave_S = np.append(wave_S, wave_S)
        count = int(len(wave_S) // SAMPLE_RATE_HZ - WINDOW / SAMPLE_RATE_HZ) + 1
        windows = [wave_S[at * HOP : at * HOP + WINDOW] for at in range(count)]
        raw = [
            self._session.run(None, {"input_1": window_S[None]})[0][0]
            for window_S in windows
            if len(window_S) == WINDOW
        ]
        scores = np.mean([self._calibrate(None, *one, False) for one in raw], axis=0)
        return dict(zip(SCORES, map(float, scores), strict=True))
