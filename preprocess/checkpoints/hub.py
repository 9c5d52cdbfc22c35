"""Checkpoints by name: a local folder, or a repository of the Hugging Face Hub. Shared by all commands.

In: a path, or `owner/name[@revision]`. Out: a local folder. Boson's repositories are taken at their last revisions in
the original layout unless a revision is given; one copy of the weights is fetched (tests/test_hub.py).
"""

from __future__ import annotations

import re
from pathlib import Path

from higgs_tune.shards.errors import UserError, few, first_line

BASE_MODEL = "bosonai/higgs-audio-v2-generation-3B-base"
# the last revisions in Boson's original layout, which later ones replaced
PINNED = {
    BASE_MODEL: "10840182ca4ad5d9d9113b60b9bb3c1ef1ba3f84",
    "bosonai/higgs-audio-v2-tokenizer": "9d4988fbd4ad07b4cac3a5fa462741a41810dbec",
}
LEGAL_FILES = ("LICEN[CS]E*", "NOTICE*", "COPYING*", "USE_POLICY*")
CONFIG_FILES = ("*.json", "*.txt", "*.model", "*.jinja", *LEGAL_FILES)  # config, tokenizer, and what travels with them
WEIGHT_FILES = ("model.safetensors", "model-*-of-*.safetensors", "*.pth")  # no second copy, as model.fp32-*
_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
CHECKPOINT_FILES = (*CONFIG_FILES, *WEIGHT_FILES)
TIMEOUT_S = 10.0


def local_checkpoint(given: Path, files: tuple[str, ...] = CHECKPOINT_FILES) -> Path:
    """The absolute folder of a checkpoint, downloaded if `given` names a repository.

    Args:
        given: a folder, `owner/name[@revision]`, or a repository's folder in the Hub's cache.
        files: patterns of the files that are needed of a repository.

    Raises:
        UserError: `given` is neither a folder nor a repository that can be downloaded.
    """
    if given.is_dir():
        return _snapshot(given.absolute())
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


def is_repository_name(text: str) -> bool:
    """Whether a text has the form `owner/name[@revision]`; a relative path may have it, too."""
    return _NAME.fullmatch(text) is not None


def name_of(given: Path) -> dict[str, str]:
    """Origin of a checkpoint, for the provenance: a folder's name, or a repository's name and revision."""
    if given.exists():
        snapshot, repository = _snapshot(given.absolute()), _repository(given)
        return {"name": repository, "revision": snapshot.name} if repository else {"name": given.resolve().name}
    named = _NAME.fullmatch(given.as_posix())
    if named is None:
        return {"name": given.resolve().name}
    return {"name": named[1], "revision": named[2] or PINNED.get(named[1], "main")}


def _repository(folder: Path) -> str:
    """`owner/name` of a repository's folder in the Hub's cache; empty for other folders."""
    cached = _CACHED.fullmatch(folder.absolute().name)
    return f"{cached[1]}/{cached[2]}" if cached and (folder / "snapshots").is_dir() else ""


def _snapshot(folder: Path) -> Path:
    """The revision to use of a repository's folder in the Hub's cache; another folder as it is.

    Raises:
        UserError: several revisions, none of them ours or `main`; or the cache of several repositories.
    """
    if (folder / "config.json").exists():
        return folder
    repositories = sorted(path.name for path in folder.glob("models--*--*") if path.is_dir())
    if repositories:
        expected = "the folder of one checkpoint, or owner/name"
        raise UserError("this is the cache of the Hub", where=folder, expected=expected, got=few(repositories))
    folder = folder.parent if folder.name == "snapshots" else folder
    repository = _repository(folder)
    if not repository:
        return folder
    revisions = sorted(path.name for path in (folder / "snapshots").iterdir() if path.is_dir())
    main = folder / "refs" / "main"
    for revision in (PINNED.get(repository), main.read_text().strip() if main.is_file() else None):
        if revision in revisions:
            return folder / "snapshots" / revision
    if len(revisions) != 1:
        raise UserError("the folder of a Hub repository without a main revision", where=folder,
                        expected="one of its snapshots", got=few(revisions) or "none")  # fmt: skip
    return folder / "snapshots" / revisions[0]
