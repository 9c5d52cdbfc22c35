"""A folder of spoken lines on disk: ID.wav, `spoken.jsonl`, `failures.jsonl`.

In: results. Out: files. `spoken.jsonl` grows while lines are spoken, so that a killed list continues; at the end it is
written anew, a line an id. A line is there if its key and the bytes of its file are those that were written. Where
several processes speak into one folder, each has files of its own (`spoken.part-1.jsonl`), which `merge_parts` joins.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from higgs_tune.evaluate.speak.plan import Failure, Utterance
from higgs_tune.shards import durable
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.writer import file_sha256

SPOKEN, FAILURES = "spoken.jsonl", "failures.jsonl"


@dataclass(frozen=True)
class Spoken:
    """A line of `spoken.jsonl`.

    file: relative to the folder. key: see `Utterance`. codes_sha256: of the codes of all pieces, as int64 [K, T] one
    after another. ended: whether every piece came to its end before --max_seconds.
    """

    id: str
    file: str
    text: str
    seconds: float
    pieces: int
    ended: bool
    key: str
    codes_sha256: str
    sha256: str


class SpokenFolder:
    """The lines that are spoken in a folder.

    Args:
        part: the number of this process, where several speak into the folder.

    Raises:
        UserError: it cannot be written, or `spoken.jsonl` is damaged.
    """

    def __init__(self, folder: Path, part: int | None = None) -> None:
        self.folder, self.path = folder, _part(folder / SPOKEN, part)
        self.failures_path = _part(folder / FAILURES, part)
        self._lines: dict[str, Spoken] = {}
        for path in dict.fromkeys((folder / SPOKEN, self.path)):
            if path.exists():
                self._load(path)
        self._file = self.path.open("ab")

    def _load(self, path: Path) -> None:
        """Read the whole lines; cut off the last one where a killed run left a part of it."""
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        names = {item.name for item in fields(Spoken)}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                given = json.loads(line)
                spoken = Spoken(**{name: given[name] for name in names})
            except (ValueError, TypeError, KeyError) as error:
                hint = "Remove the file to speak all lines anew."
                raise UserError("damaged line", where=f"{path}, line {number}", hint=hint) from error
            self._lines[spoken.id] = spoken
        if len(whole) < len(data):
            with path.open("r+b") as file:
                file.truncate(len(whole))

    def has(self, utterance: Utterance) -> bool:
        """Whether a line is spoken already, with the same key, and its file is the one that was written."""
        spoken = self._lines.get(utterance.id)
        if spoken is None or spoken.key != utterance.key:
            return False
        file = self.folder / spoken.file
        return file.is_file() and file_sha256(file) == spoken.sha256

    def is_cut_off(self, name: str) -> bool:
        """Whether the speech of a line did not end before --max_seconds."""
        spoken = self._lines.get(name)
        return spoken is not None and not spoken.ended

    def forget(self, ids: Iterable[str]) -> None:
        """Remove the files of lines that are to be spoken anew, so that none keeps another text's sound."""
        for name in ids:
            if spoken := self._lines.pop(name, None):
                (self.folder / spoken.file).unlink(missing_ok=True)

    def add(self, spoken: Spoken) -> None:
        """Note a line whose file is written."""
        self._lines[spoken.id] = spoken
        self._file.write(durable.to_json(asdict(spoken)) + b"\n")
        self._file.flush()

    def close(self, failures: Sequence[Failure]) -> None:
        """Write `spoken.jsonl` anew, and `failures.jsonl`, or remove it where nothing failed."""
        self._file.close()
        durable.write_bytes(self.path, _json_lines(self._lines.values()))
        if failures:
            durable.write_bytes(self.failures_path, _json_lines(failures))
        else:
            self.failures_path.unlink(missing_ok=True)


def _part(path: Path, part: int | None) -> Path:
    return path if part is None else path.with_suffix(f".part-{part}.jsonl")


def _json_lines(items: Iterable[Spoken | Failure]) -> bytes:
    return b"".join(durable.to_json(asdict(item)) + b"\n" for item in items)


def merge_parts(folder: Path) -> tuple[SpokenFolder, list[Failure]]:
    """Join what several processes spoke into a folder; none of them may be at work.

    Returns:
        The folder, closed, and the lines that failed.
    """
    parts = sorted(folder.glob(f"{Path(SPOKEN).stem}.part-*.jsonl"))
    failures_paths = sorted(folder.glob(f"{Path(FAILURES).stem}.part-*.jsonl")) or [folder / FAILURES]
    failures = [
        Failure(**json.loads(line))
        for path in failures_paths
        if path.is_file()
        for line in path.read_bytes().splitlines()
    ]
    merged = SpokenFolder(folder)
    for path in parts:
        merged._load(path)
    merged.close(failures)
    for path in [*parts, *(path for path in failures_paths if path.name != FAILURES)]:
        path.unlink()
    return merged, failures
