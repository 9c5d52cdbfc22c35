"""The output folder before the first step: apart from every input, locked, cleared of an earlier run.

In: the options, and the folders that the run reads. Out: a folder that this run alone writes.
Guarantees: no input is removed or written over; an earlier run's files are removed only on request, and only after the
new run has read all its inputs; one run at a time (test_output_folder.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import yaml
from higgs_tune.preprocess.checkpoints.training_record import RECORD
from higgs_tune.shards import durable
from higgs_tune.shards.errors import UserError, few
from higgs_tune.shards.lock import locked
from higgs_tune.train.checkpoint.folder import checkpoint_step, is_valid, list_checkpoints
from higgs_tune.train.checkpoint.output import (
    ADAPTER,
    ADAPTER_CONFIG,
    CONFIG,
    DIAGNOSTICS,
    FULL,
    METRICS,
    MODEL_CONFIG,
    STOPPED,
)
from higgs_tune.train.config import TrainConfig
from higgs_tune.train.model.whisper_tower import TOWER_FILE

RESULTS = (METRICS, DIAGNOSTICS, ADAPTER, ADAPTER_CONFIG, TOWER_FILE, FULL, MODEL_CONFIG, RECORD, "samples")
LOCK = ".lock"
PATIENCE_S = 5.0  # a job that is started again may meet the end of its own last start
OVERWRITE, RESUME = "--overwrite_output_dir", "--resume_from_checkpoint"
Identity = tuple[int, int]  # device and inode


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Within the block no other run writes to the output folder; what killed saves left there is removed.

    Raises:
        UserError: another run writes there; names its process.
    """
    hint = "Wait for its end, stop it, or choose another --output_dir."
    with locked(folder / LOCK, "run", folder, patience_s=PATIENCE_S, hint=hint):
        durable.remove_leftovers(folder)
        yield


def check_apart(folder: Path, inputs: Mapping[str, Path]) -> None:
    """Check that the output folder is no input, lies in none and contains none.

    Folders are compared by device and inode, so links, bind mounts and spellings do not matter.

    Args:
        inputs: folders by name; those that do not exist are ignored.

    Raises:
        UserError: names the input.
    """
    for name, path in inputs.items():
        if relation := _relation(folder, path):
            hint = "A run must not write where it reads. Choose another --output_dir."
            raise UserError(f"--output_dir {relation} {name}", where=folder, got=path, hint=hint)


def _relation(folder: Path, read: Path) -> str:
    """How an output folder lies to an input, in words; empty if they are apart or there is no such input."""
    own, other = _identity(folder), _identity(read)
    if other is None:
        return ""
    if own == other:
        return "is"
    spelled, read_spelled = (Path(os.path.normpath(path.absolute())) for path in (folder, read))
    if other in _identities_above(folder) or spelled.is_relative_to(read_spelled):
        return "lies in"
    if (own and own in _identities_above(read)) or read_spelled.is_relative_to(spelled):
        return "contains"
    return ""


def _identities_above(path: Path) -> list[Identity | None]:
    return [_identity(folder) for folder in path.resolve().parents]


def _identity(path: Path) -> Identity | None:
    """Device and inode of what a path leads to; None where that is nothing."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def earlier_files(config: TrainConfig, checkpoint: Path | None) -> list[Path]:
    """The files of an earlier run that must go before this one writes.

    Args:
        checkpoint: the checkpoint that is resumed; if it is in the output folder, the earlier run's files stay.

    Raises:
        UserError: the folder holds a run, and the user has not asked to remove it; or it holds files of no run.
    """
    folder, options = config.output_dir, config.checkpoints
    checkpoints, stopped = list_checkpoints(folder), [path for path in (folder / STOPPED,) if path.exists()]
    if checkpoint and _identity(checkpoint.parent) == _identity(folder):
        _check_newest(checkpoint, checkpoints)
        if options.overwrite_output_dir:
            print(f"{OVERWRITE} removes nothing: the run resumes from {checkpoint.name}", flush=True)
        return stopped
    results = [folder / name for name in RESULTS if (folder / name).exists()]
    saved = [*checkpoints, *folder.glob("best-*")]
    if (results or saved) and not _is_run(folder):
        hint = "No run has written them. Choose another --output_dir."
        got = few([path.name for path in [*results, *saved]])
        raise UserError("the output folder holds other files", where=folder, got=got, hint=hint)
    if options.overwrite_output_dir and options.resume_from_checkpoint and checkpoints and not checkpoint:
        hint = f"{OVERWRITE} without {RESUME} removes them."
        raise UserError(
            "no checkpoint of the output folder is valid", where=folder, expected="one to resume", hint=hint
        )
    auto = options.resume_from_checkpoint == "auto"
    unfinished = auto and not any((folder / name).exists() for name in (ADAPTER, FULL))
    if (results or saved) and not (options.overwrite_output_dir or unfinished):
        got = ", ".join(path.name for path in [*results, *saved])
        goes_on = "it has no checkpoint to resume from." if auto else f"{RESUME} auto goes on."
        hint = f"Choose another --output_dir, or give {OVERWRITE}; {goes_on}"
        raise UserError("the output folder holds a run already", where=folder, got=got, hint=hint)
    kept = [] if options.overwrite_output_dir else saved  # damaged checkpoints may still be of use to someone
    board = [path for path in (folder / "tensorboard",) if path.exists() and _is_run(folder)]
    return [path for path in [*results, *saved, *board, *stopped] if path not in kept]


def _is_run(folder: Path) -> bool:
    """Whether a run of this trainer has written to a folder."""
    try:
        content = yaml.safe_load((folder / CONFIG).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(content, dict) and content.keys() >= {"options", "versions"}


def _check_newest(checkpoint: Path, checkpoints: list[Path]) -> None:
    """Refuse to resume in a folder with newer valid checkpoints: they would mix with those of the resumed run."""
    later = [path for path in checkpoints if checkpoint_step(path) > checkpoint_step(checkpoint)]
    newer = [path.name for path in later if is_valid(path)]
    if newer:
        hint = f"Choose another --output_dir, or remove the newer ones. {RESUME} auto resumes from the newest."
        raise UserError(f"the output folder holds newer checkpoints than {checkpoint.name}",
                        where=checkpoint.parent, got=few(newer), hint=hint)  # fmt: skip


def size_of(paths: Iterable[Path]) -> int:
    """Bytes of files and folders."""
    return sum(path.lstat().st_size for top in paths for path in _tree(top) if not path.is_dir())


def remove_files(paths: Iterable[Path], inputs: Mapping[str, Path]) -> None:
    """Remove files and folders, unless one of them belongs to an input (through a link or a mount within it).

    Raises:
        UserError: names the input's file, or what cannot be removed; in the first case nothing is removed.
    """
    doomed = list(paths)
    read = (
        {_identity(path): (name, path) for name, top in inputs.items() for path in _tree(top.resolve())}
        if doomed
        else {}
    )
    for path in (path for top in doomed for path in _tree(top)):
        if not path.is_symlink() and (hit := read.get(_identity(path))) and path.exists():
            name, file = hit
            hint = "Choose another --output_dir."
            raise UserError(f"the output folder holds a file of {name}", where=path, got=file, hint=hint)
    for path in doomed:
        try:
            durable.remove(path)
        except OSError as error:
            raise UserError(f"cannot remove an earlier run's file: {error.strerror}", where=path) from error


def _tree(top: Path) -> Iterator[Path]:
    """A path and everything below it; links are not followed."""
    yield top
    if not top.is_symlink():
        yield from top.rglob("*")
