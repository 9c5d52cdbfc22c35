"""Finding the model: from `--model_path` to a base checkpoint and, if the path is a run's output, its adapter.

In: a folder, a name on the Hub, or the folder of an adapter. Out: local folders. An adapter's config names its base by
its name on the Hub, or by a path relative to the adapter's folder, so that both can move together.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml
from higgs_tune.preprocess.checkpoints.hub import CHECKPOINT_FILES, CONFIG_FILES, is_repository_name, local_checkpoint
from higgs_tune.shards.errors import UserError
from higgs_tune.train.model.adapter import ADAPTER_FILE, CONFIG_FILE, read_adapter_config

_CACHED = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([^/]+)$")  # a repository in the Hub's cache


def resolve_model(
    path: Path, base: Path | None = None, *, flag: str = "--base_model", files: tuple[str, ...] = CHECKPOINT_FILES
) -> tuple[Path, Path | None]:
    """The base checkpoint of `--model_path`, and the adapter in it, if it is the output folder of a stage.

    Args:
        path: a folder, or `owner/name[@revision]` of the Hub.
        base: the base checkpoint to take, whatever the adapter's config says.
        flag: the option that gives it.
        files: patterns of the files that are needed of a base on the Hub.

    Raises:
        UserError: there is no such checkpoint, or the adapter's base checkpoint is not there.
    """
    path = _fetched(path)
    config = read_adapter_config(path)
    if config is None and base is None:
        return local_checkpoint(path, files), None
    if config is None:
        raise UserError(f"{flag} is for adapters", where=path, expected=CONFIG_FILE)
    return (local_checkpoint(base, files) if base else _base_of(path, config, flag, files)), path


def _fetched(path: Path) -> Path:
    """The folder of an adapter that `path` names on the Hub, downloaded; every other path as it is."""
    if path.exists() or not is_repository_name(path.as_posix()):
        return path
    folder = local_checkpoint(path, CONFIG_FILES)
    return local_checkpoint(path, (*CONFIG_FILES, ADAPTER_FILE)) if (folder / CONFIG_FILE).is_file() else path


def _base_of(adapter: Path, config: dict[str, Any], flag: str, files: tuple[str, ...]) -> Path:
    """The base checkpoint that an adapter's config names."""
    where, hint = adapter / CONFIG_FILE, f"{flag} PATH names it."
    named = config.get("base_model_name_or_path")
    if not named:
        raise UserError("the adapter's config names no base checkpoint", where=where, got=named, hint=hint)
    places = [adapter / named, Path(named), *recorded_places(adapter, "base_model")]
    for place in places:
        if (place / "config.json").is_file():
            return place.resolve() if ".." in place.parts else place.absolute()
    looked = ", ".join(dict.fromkeys(os.path.normpath(place.absolute()) for place in places))
    if not is_repository_name(named):
        raise UserError("the adapter's base checkpoint is not there", where=where, got=named,
                        expected=f"one of {looked}", hint=hint)  # fmt: skip
    revision = config.get("revision")
    try:
        return local_checkpoint(Path(f"{named}@{revision}" if revision else named), files)
    except UserError as error:
        raise UserError(f"the adapter's base checkpoint is neither on the Hub ({error}) nor here", where=where,
                        got=named, expected=f"one of {looked}", hint=hint) from error  # fmt: skip


def recorded_places(adapter: Path, name: str) -> list[Path]:
    """Where the run that made an adapter, or the checkpoint that it lies in, had its `base_model` or `whisper_path`."""
    for file in (adapter / "config.yaml", adapter.parent / "config.yaml"):
        try:
            return [Path(yaml.safe_load(file.read_text())["resolved"][name])]
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            continue
    return []


def base_reference(base: Path, adapter: Path) -> tuple[str, str | None]:
    """How an adapter's config names its base: (name, revision) on the Hub, or a path relative to the adapter's folder.

    Args:
        base: the local folder of the base checkpoint.
        adapter: the folder that the adapter is written to.
    """
    cached = _CACHED.search(base.absolute().as_posix())
    if cached:
        return f"{cached[1]}/{cached[2]}", cached[3]
    return os.path.relpath(base.absolute(), adapter.resolve()), None
