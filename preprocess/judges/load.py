"""Judges by name: which class runs a checkpoint, an endpoint or a package.

In: `--asr`, `--speaker_model`, `--quality` as a user writes them. Out: a judge. Weights are safetensors, CTranslate2 or
ONNX, or a state dict that is read as weights only: no pickles run, no remote code.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from higgs_tune.preprocess.judges.edits import count_edits
from higgs_tune.preprocess.judges.fetch import locate, locate_file, revision_of
from higgs_tune.preprocess.judges.interface import QualityModel, Recogniser, SoundModel, SpeakerEncoder
from higgs_tune.shards.errors import UserError

PACKAGES = ("resemblyzer",)  # speaker encoders that bring their weights
STATE_DICT = ".pth"  # ends the name of Seed-TTS-eval's speaker encoder
QUALITY_MODELS = ("dnsmos", "distillmos")
CTRANSLATE2 = ("model.bin", "vocabulary.json", "vocabulary.txt")


def load_recogniser(given: str, device: str = "auto") -> Recogniser:
    """The recogniser that `--asr` names.

    Args:
        given: URL of an endpoint; a folder or Hub name of a Whisper or CTC checkpoint, or of a CTranslate2 Whisper.
        device: auto, cpu, cuda, cuda:1.

    Raises:
        UserError: there is no such checkpoint, or it is of no kind that is known.
    """
    if given.startswith(("http://", "https://")):
        from higgs_tune.preprocess.judges.endpoint import EndpointRecogniser

        return EndpointRecogniser(given)
    folder = locate(given)
    revision = revision_of(folder, given)
    if (folder / CTRANSLATE2[0]).is_file() and any((folder / name).is_file() for name in CTRANSLATE2[1:]):
        from higgs_tune.preprocess.judges.ctranslate import FasterWhisperRecogniser

        return FasterWhisperRecogniser(folder, given, revision, device)
    config = _config(folder)
    if config.get("model_type") == "whisper":
        from higgs_tune.preprocess.judges.whisper import WhisperRecogniser

        return WhisperRecogniser(folder, given, revision, device)
    if any(str(name).endswith("ForCTC") for name in config.get("architectures") or ()):
        from higgs_tune.preprocess.judges.ctc import CtcRecogniser

        return CtcRecogniser(folder, given, revision, device)
    got = f"{config.get('model_type')} {config.get('architectures')}"
    raise UserError("no recogniser in this checkpoint", where=given, expected="Whisper or a CTC model", got=got)


def load_speaker_encoder(given: str, device: str = "auto") -> SpeakerEncoder:
    """The speaker encoder that `--speaker_model` names.

    Args:
        given: `resemblyzer`; a folder or Hub name of a WavLM x-vector checkpoint; the file wavlm_large_finetune.pth of
            Seed-TTS-eval.

    Raises:
        UserError: there is no such checkpoint, or it is of no kind that is known.
    """
    if given == "resemblyzer":
        from higgs_tune.preprocess.judges.ge2e import ResemblyzerEncoder

        return ResemblyzerEncoder(device)
    if given.endswith(STATE_DICT):
        from higgs_tune.preprocess.judges.wavlm_ecapa import WavlmEcapaEncoder

        file = locate_file(given)
        return WavlmEcapaEncoder(file, given, revision_of(file, given), device)
    folder = locate(given)
    architectures = _config(folder).get("architectures")
    if architectures != ["WavLMForXVector"]:
        expected = "WavLMForXVector, a file wavlm_large_finetune.pth, or the name resemblyzer"
        raise UserError("no speaker encoder in this checkpoint", where=given, expected=expected, got=architectures)
    from higgs_tune.preprocess.judges.xvector import XVectorEncoder

    return XVectorEncoder(folder, given, revision_of(folder, given), device)


def load_quality_model(given: str, device: str = "auto", *, quick: bool = False) -> QualityModel:
    """The quality model that `--quality` names.

    Args:
        quick: DNSMOS on fewer windows; see `DnsmosModel`.

    Raises:
        UserError: it is unknown, or not installed.
    """
    if given == "dnsmos":
        from higgs_tune.preprocess.judges.dnsmos import DnsmosModel

        return DnsmosModel(quick=quick)
    if given == "distillmos":
        from higgs_tune.preprocess.judges.distillmos import DistillMosModel

        return DistillMosModel(device)
    raise UserError("unknown quality model", expected=" or ".join(QUALITY_MODELS), got=given)


def load_sound_model(given: str, labels: Sequence[str], device: str = "auto") -> SoundModel:
    """The audio classifier that `--sound_model` names, for the classes of `--sound_labels`.

    Raises:
        UserError: there is no such checkpoint, it is of another kind, or has no such class.
    """
    from higgs_tune.preprocess.judges.sounds import SoundClassifier

    folder = locate(given)
    return SoundClassifier(folder, given, revision_of(folder, given), labels, device)


def check_judges(recogniser: str | None, speaker: str | None) -> None:
    """Make sure that judges can be had, before anything is loaded; fetches what is not here.

    Raises:
        UserError: no such checkpoint, or no rapidfuzz to count errors with.
    """
    if recogniser:
        count_edits("", "")
    for given in (recogniser, speaker):
        if given and given.endswith(STATE_DICT):
            locate_file(given)
        elif given and given not in PACKAGES and not given.startswith(("http://", "https://")):
            _config(locate(given))


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the checkpoint's config: {error}", where=folder) from error
    return config if isinstance(config, dict) else {}
