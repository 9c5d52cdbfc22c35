"""Makes the rows of a list a manifest: other tools' column names, texts in files of their own, bare names of clips.

In: rows as a list has them. Out: rows under our names with `audio`, `text`, and what else is known (columns). A row
that is a reject stays in its place.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from higgs_tune.preprocess.config import Job
from higgs_tune.preprocess.input.audio_paths import AUDIO_SUFFIXES, AudioPaths, exists, looks_like_audio
from higgs_tune.preprocess.input.columns import our_names
from higgs_tune.preprocess.input.folders import text_beside
from higgs_tune.preprocess.reject import Reject
from higgs_tune.shards.errors import UserError

FOLDERS = ("wavs", "clips", "wav", "audio")  # of lists with bare names: LJSpeech's ids, Common Voice's file names
TIMES = (("start", "end"), ("start_time", "end_time"), ("begin", "end"))  # of pieces of recordings
MAX_TEXT_BYTES = 1 << 20  # of a text in a file of its own
TRIED = 20  # rows that tell where all rows have their files
NO_SPEAKER = (
    "References are chosen among the clips of one speaker: add a column speaker or ref_audio, or give --speaker NAME "
    "where one voice reads all, or --ref_drop 1 to train without references."
)
NO_TEXT = "Add a column text, or put a .txt beside each clip."


def manifest_rows(rows: Iterable[Any], job: Job) -> list[Any]:
    """The rows under our names, with their texts.

    Raises:
        UserError: a column is missing or ambiguous.
    """
    renamed = _renamed(rows, job.data)
    good = [row for row in renamed if isinstance(row, dict)]
    _place(good, job.audio_paths)
    if not any("text" in row or "text_file" in row for row in good):
        _texts_beside(good, job.audio_paths)
    if job.config.speaker:
        for row in good:
            row["speaker"] = row.get("speaker") or job.config.speaker
    _require_columns(good, job)
    return [_with_texts(row, job) if isinstance(row, dict) else row for row in renamed]


def _renamed(rows: Iterable[Any], where: Path) -> list[Any]:
    names: dict[tuple[str, ...], dict[str, str]] = {}
    made = []
    for row in rows:
        if isinstance(row, dict):
            key = tuple(map(str, row))
            ours = names.get(key) or names.setdefault(key, our_names(key, where))
            made.append({ours[str(name)]: value for name, value in row.items()})
        else:
            made.append(row)
    return made


def find_clip(name: str, paths: AudioPaths) -> tuple[str, str] | None:
    """(folder, suffix) with which a bare name of a clip becomes the path of a file; None where none does."""
    if not name.strip() or "/" in name or "\\" in name:
        return None
    suffixes = ("",) if looks_like_audio(name) else tuple(f".{suffix}" for suffix in AUDIO_SUFFIXES)
    for suffix in suffixes:
        for folder in ("", *FOLDERS):
            if exists(paths.locate(_joined(folder, name + suffix))):
                return folder, suffix
    return None


def _joined(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _place(rows: list[dict[str, Any]], paths: AudioPaths) -> None:
    """Complete bare names of clips where the first of them are found in one of the usual folders, or with a suffix."""
    names = [row["audio"] for row in rows[:TRIED] if isinstance(row.get("audio"), str)]
    if any(exists(paths.locate(name)) for name in names):
        return
    place = next((place for name in names if (place := find_clip(name, paths))), None)
    for row in rows if place else ():
        for column in ("audio", "ref_audio"):
            name = row.get(column)
            if isinstance(name, str) and name and "/" not in name and "\\" not in name and place:
                row[column] = _joined(place[0], name + ("" if looks_like_audio(name) else place[1]))


def _texts_beside(rows: list[dict[str, Any]], paths: AudioPaths) -> None:
    """Give rows without a text the file beside their clip, where the first rows have one."""

    def beside(row: dict[str, Any]) -> str | None:
        return text_beside(paths.locate(row["audio"])) if isinstance(row.get("audio"), str) else None

    if any(beside(row) for row in rows[:TRIED]):
        for row in rows:
            row["text_file"] = beside(row) or "(none beside the clip)"


def _require_columns(rows: list[dict[str, Any]], job: Job) -> None:
    columns = {name for row in rows for name in row}
    spoken = any(row.get("speaker") not in (None, "") for row in rows)
    needs_speaker = job.config.ref_drop < 1 and not all(row.get("ref_audio") for row in rows)
    missing = ["audio"] if "audio" not in columns else []
    missing += ["speaker"] if needs_speaker and not spoken and "speaker" not in columns else []
    missing += ["text"] if not columns & {"text", "text_file"} else []
    if missing:
        hints = [NO_SPEAKER] if missing == ["speaker"] else [NO_TEXT] if missing == ["text"] else []
        first = rows[0].get("audio")
        if "text" in missing and isinstance(first, str):
            sidecar = Path(job.audio_paths.locate(first)).with_suffix(".json")
            hints += [f"{sidecar.name} is not read: write its words into a column text."] if sidecar.is_file() else []
        raise UserError("the manifest lacks columns", where=job.data, expected=missing, got=sorted(columns),
                        hint=" ".join(hints))  # fmt: skip
    times = next((pair for pair in TIMES if columns.issuperset(pair)), None)
    files = [row.get("audio") for row in rows]
    if times and "offset" not in columns and len(set(map(str, files))) < len(files):
        hint = f"Name {times[0]} offset, and give duration (in seconds) in place of {times[1]}."
        raise UserError("rows are pieces of recordings, but not cut", where=job.data,
                        got=f"columns {times[0]} and {times[1]}", hint=hint)  # fmt: skip


def _with_texts(row: dict[str, Any], job: Job) -> dict[str, Any] | Reject:
    """The row with the texts that stand in files of their own."""
    row = dict(row)
    for column in ("text", "ref_text"):
        file = row.pop(f"{column}_file", None)
        if file and row.get(column) in (None, ""):
            try:
                row[column] = _read_text(file, row.get("audio"), job)
            except Reject as reject:
                return reject
    return row


def _read_text(name: Any, clip: Any, job: Job) -> str:
    """The text in a file whose path starts where the audio's does, or beside the clip.

    Raises:
        Reject: there is no such file, it leaves `--audio_root`, or it is not UTF-8.
    """
    folder = Path(job.audio_paths.locate(clip)).parent if isinstance(clip, str) else job.audio_paths.base
    places = [job.audio_paths.locate(str(name)), str(folder / str(name))]
    place = next((place for place in places if exists(place)), None)
    if place is None:
        raise Reject("missing_text", f"no such file: {places[0]}", str(name))
    root = job.config.audio_root
    if root and not Path(place).resolve().is_relative_to(root.resolve()):
        raise Reject("outside_audio_root", f"expected a file below {root}, got {place}", str(name))
    try:
        if Path(place).stat().st_size > MAX_TEXT_BYTES:
            raise Reject("text_too_long", f"expected at most {MAX_TEXT_BYTES} bytes in {place}", str(name))
        return Path(place).read_bytes().decode("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Reject("missing_text", f"cannot read {place}: {error}", str(name)) from error
