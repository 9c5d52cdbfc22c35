"""Checkpoints of judges: folders of one's own, or repositories of the Hub, whose size is told before a download.

In: a folder, a file, or `owner/name[@revision]`. Out: where it lies, and its revision.
"""

from __future__ import annotations

import hashlib
import sys
from fnmatch import fnmatch
from pathlib import Path

from higgs_tune.preprocess.checkpoints.hub import TIMEOUT_S, is_repository_name, local_checkpoint
from higgs_tune.shards.errors import UserError, first_line
from higgs_tune.shards.writer import file_sha256

WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.bin")  # no pickles, no second copy
FILES = ("*.json", "*.txt", "*.model", *WEIGHTS)
EXPECTED = "a folder, or owner/name of a Hub repository"


def locate(given: str, files: tuple[str, ...] = FILES) -> Path:
    """The folder of a checkpoint, downloaded if it is not here.

    Args:
        files: patterns of the files that are needed of a repository.

    Raises:
        UserError: neither a folder nor a repository that can be had.
    """
    if Path(given).is_dir():
        return Path(given).absolute()
    if not is_repository_name(given) or Path(given).exists():
        raise UserError("no checkpoint here", where=given, expected=EXPECTED)
    _announce(given, files)
    return local_checkpoint(Path(given), files)


def locate_file(given: str) -> Path:
    """One weight file: a path, or `owner/name[@revision]/FILE` of a repository.

    Raises:
        UserError: neither a file nor in a repository that can be had.
    """
    if Path(given).is_file():
        return Path(given).absolute()
    repository, name = "/".join(given.split("/")[:2]), "/".join(given.split("/")[2:])
    file = locate(repository, (name,)) / name if name and is_repository_name(repository) else None
    if file is None or not file.is_file():
        raise UserError("no such weight file", where=given, expected="a file, or owner/name/FILE of a Hub repository")
    return file


def revision_of(place: Path, given: str) -> str:
    """The commit of a repository's checkpoint; of one's own a hash of the weights, so that other weights have another.

    Args:
        place: where `locate` or `locate_file` found it.
    """
    if not Path(given).exists():  # the Hub's cache names the folder of a snapshot by its commit
        parts = place.parts
        return parts[parts.index("snapshots") + 1] if "snapshots" in parts else place.name
    files = [place] if place.is_file() else sorted(path for path in place.iterdir() if _is_weights(path.name))
    hashes = "".join(file_sha256(path) for path in files)
    return f"sha256 {hashlib.sha256(hashes.encode()).hexdigest()[:12]}" if files else ""


def _is_weights(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in (*WEIGHTS, "*.safetensors"))


def _announce(given: str, files: tuple[str, ...]) -> None:
    """Print the name, revision and size of what is about to be fetched."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    name, _, revision = given.partition("@")
    try:
        info = HfApi().model_info(name, revision=revision or None, files_metadata=True, timeout=TIMEOUT_S)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        print(f"{given}: the Hub does not answer ({first_line(error)}); looking for a copy here", file=sys.stderr)
        return
    wanted = [file for file in info.siblings or () if any(fnmatch(file.rfilename, pattern) for pattern in files)]
    size = sum(file.size or 0 for file in wanted)
    print(f"{name}@{info.sha}: {size / 1e6:.0f} MB, downloaded unless it is here", file=sys.stderr, flush=True)
