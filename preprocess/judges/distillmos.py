"""DistillMOS by Microsoft (the package `distillmos`, an extra): one predicted opinion score, distilled from XLS-R."""

from __future__ import annotations

import importlib.metadata
import sys
from types import ModuleType
from typing import Any

import numpy as np
import torch
from higgs_tune.preprocess.judges.device import torch_device
from higgs_tune.shards.errors import UserError

UNUSED = "torchaudio"  # the package imports it for its own command alone


class DistillMosModel:
    """Raises UserError where distillmos is not installed."""

    name = "DistillMOS"

    def __init__(self, device: str) -> None:
        model, weights = _package()
        self.revision = f"distillmos {importlib.metadata.version('distillmos')}"
        self.device = torch_device(device)
        self._model: Any = model(load_weights=False)
        self._model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True)["model"])
        self._model.to(self.device).eval()

    def score(self, wave_S: np.ndarray) -> dict[str, float]:
        """A score of 1 to 5; long clips are judged in windows of 7.68 s, whose mean it is."""
        with torch.inference_mode():
            return {"overall": float(self._model(torch.from_numpy(wave_S)[None].to(self.device)))}


def _package() -> tuple[Any, str]:
    """The package's model class, and the file of its weights."""
    absent = UNUSED not in sys.modules
    sys.modules.setdefault(UNUSED, ModuleType(UNUSED))
    try:
        from distillmos.sqa import (  # pyright: ignore[reportMissingImports]
            DEFAULT_WEIGHTS_CHKPT,
            ConvTransformerSQAModel,
        )
    except ImportError as error:
        hint = "pip install --no-deps distillmos xls-r-sqa"
        raise UserError(f"the quality model needs distillmos ({error})", hint=hint) from error
    finally:
        if absent:
            del sys.modules[UNUSED]
    return ConvTransformerSQAModel, DEFAULT_WEIGHTS_CHKPT
