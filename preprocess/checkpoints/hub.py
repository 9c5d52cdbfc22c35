"""Checkpoints by name: a local folder, or a repository of the Hugging Face Hub. Shared by all commands.

In: a path, or `owner/name[@revision]`. Out: a local folder. Boson's repositories are taken at their last revisions in
the original layout unless a revision is given (tests/test_preprocess.py).
"""

from __future__ import annotations

import re
from pathlib import Path

from higgs_tune.shards.errors import UserError, first_line

# the last revisions in Boson's original layout, which later ones replaced
PINNED = {
    "bosonai/higgs-audio-v2-generation-3B-base": "10840182ca4ad5d9d9113b60b9bb3c1ef1ba3f84",
    "bosonai/higgs-audio-v2-tokenizer": "9d4988fbd4ad07b4cac3a5fa462741a41810dbec",
}
MODEL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")  # config and tokenizer, without the weights
WEIGHT_FILES = ("*.json", "*.safetensors", "*.pth")
_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")
TIMEOUT_S = 10.0


def local_checkpoint(given: Path, files: tuple[str, ...] = WEIGHT_FILES) -> Path:
    """The absolute folder of a checkpoint, downloaded if `given` names a repository.

    Args:
        given: a folder, or `owner/name[@revision]`.
        files: patterns of the files that are needed of a repository.

    Raises:
        UserError: `given` is neither a folder nor a repository that can be downloaded.
    """
    if given.is_dir():
        return given.absolute()
    named = _NAME.fullmatch(given.as_posix())
    if named is None or given.exists():
        raise UserError("no checkpoint here", where=given, expected="a folder, or owner/name of a Hub repository")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, revision = named[1], named[2] or PINNED.get(named[1])
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=list(files), etag_timeout=TIMEOUT_S)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        hint = "Give a folder, or a repository that this machine can download."
        where = f"{name}@{revision}" if revision else name
        raise UserError(
            f"no such folder, and as a Hub repository: {first_line(error)}", where=where, hint=hint
        ) from error
    return Path(folder)


def name_of(given: Path) -> dict[str, str]:
    """Origin of a checkpoint, for the provenance: a folder's name, or a repository's name and revision."""
    named = None if given.exists() else _NAME.fullmatch(given.as_posix())
    if named is None:
        return {"name": given.resolve().name}
    return {"name": named[1], "revision": named[2] or PINNED.get(named[1], "main")}
