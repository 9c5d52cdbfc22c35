"""Finds audio files by the names that data sets give them, and says what would find the missing ones.

In: names as lists have them: relative or absolute paths, `file://` URLs, paths with backslashes, `%20` or `~`. Out:
local paths. A name is taken literally where that file exists; its other readings are tried after that.
Guarantees: a name never leads out of `--audio_root` (tests/test_bad_input.py, tests/test_audio_paths.py).
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

from higgs_tune.preprocess.input.arrow import arrow_cell

AUDIO_SUFFIXES = (
    *("wav", "flac", "mp3", "ogg", "opus", "oga", "aif", "aiff", "au", "w64", "rf64"),
    *("m4a", "mp4", "aac", "wma", "webm", "amr"),  # not readable, but audio
)
_FILE_URL = re.compile(r"file:(//(localhost)?)?(?=/)", re.IGNORECASE)
_SPECIAL = re.compile(r"[\\%~]|\.\.|[^\x00-\x7f]")  # may be meant in another way
_SUFFIX = re.compile(rf"\.({'|'.join(AUDIO_SUFFIXES)})$", re.IGNORECASE)
PARENTS_TRIED = 4
NAMES_TRIED = 50
LONGEST_NAME = 4096  # of a path, in bytes


def looks_like_audio(name: object) -> bool:
    """Whether a value is the name of an audio file, by its suffix, or of a cell with audio."""
    if not isinstance(name, str) or len(name) > LONGEST_NAME:
        return False
    return bool(_SUFFIX.search(name.strip())) or arrow_cell(name) is not None


@dataclass(frozen=True)
class AudioPaths:
    """Where audio is looked for.

    Attributes:
        base: the start of relative paths.
        cells: the folder of Arrow and Parquet files whose cells hold audio.
        root: `--audio_root`; None: paths may lead anywhere.
    """

    base: Path
    cells: Path = Path()
    root: Path | None = None

    def locate(self, name: str) -> str:
        """The local path of an audio name: the first of its readings that exists, else the literal one."""
        if arrow_cell(name):
            return str(self.cells / name)
        name = plain_path(name)
        literal = str(self.base / name)
        if not _SPECIAL.search(name) or exists(literal):
            return literal
        readings = (str(self.base / reading) for reading in self._readings(name))
        return next(filter(exists, readings), literal)

    def _readings(self, name: str) -> Iterator[str]:
        """Other meanings of a name, the likeliest first."""
        names = [name]
        for read in (_with_slashes, unquote, os.path.expanduser, self._below_root):
            names += [other for known in names if (other := read(known)) not in names]
        for form in ("NFC", "NFD"):
            names += [unicodedata.normalize(form, known) for known in names[:]]
        yield from dict.fromkeys(names[1:])

    def _below_root(self, name: str) -> str:
        """A relative path that climbs out of `--audio_root`, as if `..` stopped there (as in a chroot)."""
        if self.root is None or not os.path.normpath(name).startswith(".."):
            return name
        return os.path.normpath(f"/{name}").lstrip("/")

    def same_file(self, one: str, two: str) -> bool:
        """Whether two names lead to one file, through links too."""
        try:
            return one == two or os.path.realpath(self.locate(one)) == os.path.realpath(self.locate(two))
        except ValueError:  # a name with a NUL byte; reading the file gives the reject
            return False

    def advice(self, missing: Iterable[str]) -> str:
        """What would make missing files found: an `--audio_root`, or other names; empty where nothing does."""
        names = [plain_path(name) for name in _first(missing, NAMES_TRIED) if not arrow_cell(name)]
        names = [name for name in names if "\0" not in name]
        relative = [name for name in names if not Path(name).is_absolute()]
        best, most = "", 0
        for folder in self._folders() if relative else ():
            root = _smallest_root(folder, relative)
            trial = replace(self, base=root, root=root)
            count = sum(exists(path) and _is_below(path, root) for path in map(trial.locate, relative))
            if count > most:
                best, most = f"--audio_root {root} finds {count} of {len(names)}", count
        return best or self._moved(names)

    def _folders(self) -> Iterator[Path]:
        """Folders from which relative paths may have been meant: the list's, the current one, their parents and
        sub-folders."""
        starts = [self.base, self.cells, Path.cwd()]
        above = [parent for start in starts for parent in start.resolve().parents[:PARENTS_TRIED]]
        yield from dict.fromkeys([start.resolve() for start in starts] + above)
        for start in dict.fromkeys(starts):
            yield from sorted(child for child in _children(start) if child.is_dir())

    def _moved(self, names: list[str]) -> str:
        """Advice for absolute paths of another machine whose ends exist below the list's folder."""
        for name in names:
            parts = re.split(r"[\\/]+", name)
            for start in range(1, len(parts)):
                if exists(str(self.base / Path(*parts[start:]))):
                    prefix = name[: len(name) - len("/".join(parts[start:]))]
                    return f"{'/'.join(parts[start:])} exists below {self.base}: take {prefix} off the paths"
        return ""


def _smallest_root(folder: Path, names: list[str]) -> Path:
    """The folder itself, or the parent that holds all that the names lead to when they start in it."""
    places = [os.path.normpath(folder / _with_slashes(name)) for name in names]
    return Path(os.path.commonpath([str(folder), *map(os.path.dirname, places)]))


def _is_below(path: str, root: Path) -> bool:
    return Path(path).resolve().is_relative_to(root.resolve())


def plain_path(name: str) -> str:
    """The path of a `file://` URL; other names unchanged."""
    url = _FILE_URL.match(name)
    return unquote(name[url.end() :]) if url else name


def _with_slashes(name: str) -> str:
    return name.replace("\\", "/")


def exists(path: str) -> bool:
    """Whether there is such a file; false for names that no file can have."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long, or with a NUL byte
        return False


def _children(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _first(names: Iterable[str], count: int) -> list[str]:
    """The first distinct names."""
    distinct: dict[str, None] = {}
    for name in names:
        distinct[name] = None
        if len(distinct) == count:
            break
    return list(distinct)
