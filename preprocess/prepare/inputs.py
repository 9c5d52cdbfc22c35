"""Which recordings are prepared: files, folders of them, and lists."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from higgs_tune.preprocess.input.audio_paths import AUDIO_SUFFIXES
from higgs_tune.preprocess.input.text_file import open_text
from higgs_tune.shards.errors import UserError

_RARE = ("wave", "aifc", "snd", "caf", "m4b", "m4v", "mkv", "mka", "mov", "3gp", "avi", "mpg", "mpeg")
SUFFIXES = frozenset(f".{name}" for name in (*AUDIO_SUFFIXES, *_RARE))  # of what libsndfile or ffmpeg reads
LISTS = (".txt", ".list", ".jsonl")


def list_recordings(given: Sequence[Path], out: Path) -> list[str]:
    """The recordings' paths: as they are given, each file once; folders in the order of their names.

    Args:
        out: the folder of the results; nothing in it is a recording.

    Raises:
        UserError: a path does not exist, a list cannot be read, or there is no recording.
    """
    if not given:
        raise UserError("no recordings given", expected="files, folders or lists of audio")
    listed: dict[str, None] = {}
    for path in given:
        if not os.path.lexists(path):
            raise UserError("no such file or folder", where=path)
        listed |= dict.fromkeys(map(str, _from_one(path, out.absolute())))
    if not listed:
        shown = ", ".join(map(str, given[:3]))
        raise UserError("no recordings here", where=shown, expected="files named .wav, .flac, .mp3, .m4a, …")
    return list(listed)


def _from_one(path: Path, out: Path) -> Iterator[Path]:
    if path.is_dir():
        if out == path.absolute():
            raise UserError("--out is the folder of the recordings", where=path, hint="Choose another folder.")
        yield from _walk(path, out)
    elif path.suffix.lower() in LISTS:
        yield from (path.parent / name for name in _lines(path))
    else:
        yield path


def _walk(folder: Path, out: Path) -> Iterator[Path]:
    for top, folders, files in os.walk(folder, followlinks=True):
        here = Path(top)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and (here / name).absolute() != out)
        for name in sorted(files):
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield here / name


def _lines(path: Path) -> Iterator[str]:
    """The names in a list."""
    try:
        with open_text(path) as file:
            lines = [line.strip("\r\n") for line in file]
    except OSError as error:
        raise UserError(f"cannot read the list: {error.strerror}", where=path) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix.lower() != ".jsonl":
            yield line.strip()
            continue
        try:
            name = json.loads(line)["audio"]
        except (ValueError, KeyError, TypeError):
            name = None
        if not isinstance(name, str):
            raise UserError("no path in this line", where=f"{path}, line {number}", expected='{"audio": "PATH"}')
        yield name
