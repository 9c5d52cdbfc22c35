"""Judges by name: which class runs a checkpoint, an endpoint or a package.

In: `--asr`, `--speaker_model`, `--quality` as a user writes them. Out: a judge. A repository of the Hub is named on the
screen with its size before it is downloaded. Weights are safetensors, CTranslate2 or ONNX: no pickles, no remote code.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from higgs_tune.preprocess.checkpoints.hub import TIMEOUT_S, is_repository_name, local_checkpoint
from higgs_tune.preprocess.judges.edits import count_edits
from higgs_tune.preprocess.judges.interface import QualityModel, Recogniser, SpeakerEncoder
from higgs_tune.shards.errors import UserError, first_line

FILES = ("*.json", "*.txt", "*.model", "*.safetensors", "model.bin", "preprocessor_config.json")
PACKAGES = ("resemblyzer",)  # speaker encoders that bring their weights
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
    folder, revision = fetch(given)
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
        given: `resemblyzer`, or a folder or Hub name of a WavLM x-vector checkpoint.

    Raises:
        UserError: there is no such checkpoint, or it is of no kind that is known.
    """
    if given == "resemblyzer":
        from higgs_tune.preprocess.judges.ge2e import ResemblyzerEncoder

        return ResemblyzerEncoder(device)
    folder, revision = fetch(given)
    architectures = _config(folder).get("architectures")
    if architectures != ["WavLMForXVector"]:
        expected = "WavLMForXVector, or the name resemblyzer"
        raise UserError("no speaker encoder in this checkpoint", where=given, expected=expected, got=architectures)
    from higgs_tune.preprocess.judges.xvector import XVectorEncoder

    return XVectorEncoder(folder, given, revision, device)


def load_quality_model(given: str, device: str = "auto") -> QualityModel:
    """The quality model that `--quality` names.

    Raises:
        UserError: it is unknown, or not installed.
    """
    if given != "dnsmos":
        raise UserError("unknown quality model", expected="dnsmos", got=given)
    from higgs_tune.preprocess.judges.dnsmos import DnsmosModel

    return DnsmosModel()


def check_judges(recogniser: str | None, speaker: str | None) -> None:
    """Make sure that judges can be had, before anything is loaded; fetches what is not here.

    Raises:
        UserError: no such checkpoint, or no rapidfuzz to count errors with.
    """
    if recogniser:
        count_edits("", "")
    for given in (recogniser, speaker):
        if given and given not in PACKAGES and not given.startswith(("http://", "https://")):
            _config(fetch(given)[0])


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the checkpoint's config: {error}", where=folder) from error
    return config if isinstance(config, dict) else {}


def fetch(given: str) -> tuple[Path, str]:
    """The folder of a checkpoint, and its revision (of the Hub's; empty for a folder of one's own).

    Raises:
        UserError: neither a folder nor a repository that can be had.
    """
    if Path(given).is_dir():
        return Path(given).absolute(), ""
    if not is_repository_name(given) or Path(given).exists():
        raise UserError("no checkpoint here", where=given, expected="a folder, or owner/name of a Hub repository")
    _announce(given)
    folder = local_checkpoint(Path(given), FILES)
    return folder, folder.name  # the Hub's cache names the folder of a snapshot by its commit


def _announce(given: str) -> None:
    """Print the name, revision and size of the repository that is about to be fetched."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    name, _, revision = given.partition("@")
    try:
        info = HfApi().model_info(name, revision=revision or None, files_metadata=True, timeout=TIMEOUT_S)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        print(f"{given}: the Hub does not answer ({first_line(error)}); looking for a copy here", file=sys.stderr)
        return
    wanted = [file for file in info.siblings or () if any(Path(file.rfilename).match(pattern) for pattern in FILES)]
    size = sum(file.size or 0 for file in wanted)
    print(f"{name}@{info.sha}: {size / 1e6:.0f} MB, downloaded unless it is here", file=sys.stderr, flush=True)
