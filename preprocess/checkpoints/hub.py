"""Checkpoints by name: a local folder, or a repository of the Hugging Face Hub at a pinned revision.

In: a path, or `owner/name[@revision]`. Out: a local folder. Never: a repository's newest revision where we know one
whose layout is Boson's original; remote code.
"""

from __future__ import annotations

import re
from pathlib import Path

from higgs_tune.shards.errors import UserError, first_line

# the last revisions in Boson's original layout; later ones replaced it in place
PINNED = {
    "bosonai/higgs-audio-v2-generation-3B-base": "10840182ca4ad5d9d9113b60b9bb3c1ef1ba3f84",
    "bosonai/higgs-audio-v2-tokenizer": "9d4988fbd4ad07b4cac3a5fa462741a41810dbec",
}
MODEL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")  # config and tokenizer, without the weights
WEIGHT_FILES = ("*.json", "*.safetensors", "*.pth")
_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")
TIMEOUT_S = 10.0


def local_checkpoint(given: Path, files: tuple[str, ...] = WEIGHT_FILES) -> Path:
    """The folder of a checkpoint, absolute; downloaded where `given` is the name of a repository.

    Args:
        given: a folder, or `owner/name[@revision]`.
        files: patterns of what is needed of a repository.

    Raises:
        UserError: neither a folder nor a repository that can be had.
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
    """What the provenance says of where a checkpoint came from: its name, and the revision of a repository."""
    named = None if given.exists() else _NAME.fullmatch(given.as_posix())
    if named is None:
        return {"name": given.resolve().name}
    return {"name": named[1], "revision": named[2] or PINNED.get(named[1], "main")}
