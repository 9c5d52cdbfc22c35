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

    Args:
        quick: score one of nine of the package's windows, which start a second apart: up to nine times as fast, for
            choosing clips; figures that are compared with others' need all.

    Raises:
        UserError: speechmos is not installed.
    """

    name = "DNSMOS P.835"

    def __init__(self, *, quick: bool = False) -> None:
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
        self._quick = quick
        self._calibrate: Any = dnsmos.DNSMOS.get_polyfit_val

    def score(self, wave_S: np.ndarray) -> dict[str, float]:
        """Scores of 1 to 5: overall, speech, background. Clips of less than 9 s are doubled until they are longer."""
        wave_S = np.clip(wave_S, -1, 1).astype(np.float32)
        while len(wave_S) < WINDOW:
            wave_S = np.append(wave_S, wave_S)
        starts = (every_ninth if self._quick else every_second)(len(wave_S))
        raw = [self._session.run(None, {"input_1": wave_S[None, at : at + WINDOW]})[0][0] for at in starts]
        scores = np.mean([self._calibrate(None, *one, False) for one in raw], axis=0)
        return dict(zip(SCORES, map(float, scores), strict=True))


def every_second(length: int) -> list[int]:
    """First samples of the package's windows in a clip of at least one window."""
    count = int(length // SAMPLE_RATE_HZ - WINDOW / SAMPLE_RATE_HZ) + 1
    return [at * HOP for at in range(count) if at * HOP + WINDOW <= length]


def every_ninth(length: int) -> list[int]:
    """One of nine of these windows, from the middle."""
    starts = every_second(length)
    return starts[min(4, len(starts) // 2) :: 9]
