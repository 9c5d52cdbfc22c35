"""Audio classifiers of transformers (AST, wav2vec2, HuBERT, WavLM): how likely a clip holds music or other sounds.

Which sounds are known depends on the checkpoint: those trained on AudioSet, such as
MIT/ast-finetuned-audioset-10-10-0.4593, know 527, among them Music.

Shapes: W windows, S samples, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from higgs_tune.preprocess.judges.interface import SAMPLE_RATE_HZ
from higgs_tune.shards.errors import UserError, few, first_line

WINDOW = 10 * SAMPLE_RATE_HZ  # the longest part of a clip that is classified at once, in samples
AUDIOSET_CLASSES = 527  # its classes do not exclude each other, whatever the config says
NO_CLASSES = "MIT/ast-finetuned-audioset-10-10-0.4593, for example, knows Music"


def class_numbers(folder: Path, labels: Sequence[str]) -> list[int]:
    """The numbers of classes in a checkpoint; no model is loaded.

    Raises:
        UserError: it is no audio classifier, or has no such class.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
        classes = {str(name): int(number) for number, name in config["id2label"].items()}
        classifies = any(str(name).endswith("Classification") for name in config["architectures"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        classes, classifies = {}, False
    if not classifies:
        raise UserError("no audio classifier in this checkpoint", where=folder, hint=NO_CLASSES)
    missing = [label for label in labels if label not in classes]
    if missing or not labels:
        raise UserError("the classifier has no such sound", where=folder, expected=few(sorted(classes)),
                        got=few(missing) or "none")  # fmt: skip
    return [classes[label] for label in labels]


class SoundClassifier:
    """The probability of some classes.

    Raises:
        UserError: the checkpoint cannot be loaded, or has no such class.
    """

    def __init__(self, folder: Path, name: str, revision: str, labels: Sequence[str], device: str) -> None:
        from higgs_tune.preprocess.judges.device import torch_device
        from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

        self.name, self.revision, self.device = name, revision, torch_device(device)
        self._classes = class_numbers(folder, labels)
        try:
            self._extractor: Any = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=False)
            model: Any = AutoModelForAudioClassification.from_pretrained(
                folder, use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"cannot load the classifier: {first_line(error)}", where=folder) from error
        self._model = model.to(self.device).eval()
        several = model.config.problem_type == "multi_label_classification"
        self._several = several or model.config.num_labels == AUDIOSET_CLASSES

    def probability(self, wave_S: np.ndarray) -> float:
        """The largest probability of one of the classes, over parts of at most 10 s."""
        import torch

        parts = np.array_split(wave_S, -(-len(wave_S) // WINDOW))
        shares = []
        for part_S in parts:
            inputs = self._extractor(part_S, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt").to(self.device)
            with torch.inference_mode():
                logits_C = self._model(**inputs).logits[0].float()
            shares_C = logits_C.sigmoid() if self._several else logits_C.softmax(-1)
            shares.append(float(shares_C[self._classes].max()))
        return max(shares)
