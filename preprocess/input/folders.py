"""Reads a folder: `datasets`, Parquet, Kaldi, or clips with a text beside each.

In: a folder. Out: rows, as a list of the same content would give them; a list under its usual name (`metadata.csv`) is
for `entries` to read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from higgs_tune.preprocess.input import arrow
from higgs_tune.preprocess.input.audio_paths import looks_like_audio
from higgs_tune.preprocess.input.text_file import open_text
from higgs_tune.preprocess.reject import Reject
from higgs_tune.shards.errors import UserError, few
from higgs_tune.shards.writer import file_sha256

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.parquet")  # of an audiofolder, of LJSpeech
LIST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".list", ".txt")
TEXT_SUFFIXES = (".txt", ".lab", ".normalized.txt")  # of a text beside its clip
COLUMNAR = (".arrow", ".parquet")
KALDI = ("text", "wav.scp", "utt2spk", "segments")


def list_in(folder: Path) -> Path | None:
    """The list of a folder of clips under its usual name; None without one."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def read_folder(folder: Path) -> Iterator[Any]:
    """The rows of a folder without such a list.

    Raises:
        UserError: it is of no known kind, or holds several lists to choose from.
    """
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return arrow.read_rows(folder)
    if all((folder / name).is_file() for name in KALDI[:2]):
        return _read_kaldi(folder)
    if files := arrow.parquet_files(folder):
        return arrow.read_parquet(files, folder)
    names = sorted(path.name for path in folder.iterdir())
    if clips := [name for name in names if looks_like_audio(name)]:
        return _read_clips(folder, clips)
    expected = "state.json, as save_to_disk writes it, metadata.csv, Kaldi's text and wav.scp, or clips and their texts"
    lists = [name for name in names if name.endswith(LIST_SUFFIXES)]
    hint = f"Give one of its lists: {few(lists)}." if lists else ""
    raise UserError("not a datasets folder", where=folder, expected=expected, hint=hint)


def listing_files(folder: Path) -> list[Path]:
    """The files that tell a folder's rows, in order, a list of its own first; a restart compares them."""
    if metadata := list_in(folder):
        return [metadata]
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return [folder / "state.json", *arrow.data_files(folder)]
    if all((folder / name).is_file() for name in KALDI[:2]):
        return [folder / name for name in KALDI if (folder / name).is_file()]
    return arrow.parquet_files(folder) or sorted(path for path in folder.iterdir() if path.is_file())


def data_digest(data: Path) -> str:
    """Identifies the data: SHA-256 of a file, of a folder's lists and texts; sizes of a folder's other files."""
    if data.is_file():
        return file_sha256(data)
    return ", ".join(
        f"{file.name} {file.stat().st_size}"
        if file.suffix in COLUMNAR or looks_like_audio(file.name)
        else file_sha256(file)
        for file in listing_files(data)
    )


def text_beside(clip: str) -> str | None:
    """The path of the text beside a clip (`u0.txt` beside `u0.wav`); None without one."""
    stem = Path(clip).with_suffix("")
    texts = (stem.with_name(stem.name + suffix) for suffix in TEXT_SUFFIXES)
    return next((str(text) for text in texts if text.is_file()), None)


def _read_clips(folder: Path, clips: list[str]) -> Iterator[dict[str, Any]]:
    """One row a clip; its text is read from the file beside it later."""
    if not any(text_beside(str(folder / clip)) for clip in clips):
        hint = "Give a list of clips and texts, or put a .txt beside each clip."
        raise UserError("a folder of clips without texts", where=folder, hint=hint)
    for clip in clips:
        text = text_beside(str(folder / clip))
        yield {"audio": clip, "text_file": Path(text).name if text else f"{Path(clip).stem}.txt"}


def _read_kaldi(folder: Path) -> Iterator[Any]:
    """One row an utterance of `text`, with its piece of the recording where there are `segments`.

    Raises:
        UserError: a recording is a command or an archive, a line is malformed, or the files name different utterances.
    """
    texts, recordings, speakers, segments = (_kaldi_table(folder / name) for name in KALDI)
    for name, place in recordings.items():
        if place.endswith("|") or not looks_like_audio(place):
            hint = "Write the recordings to files first, and give their paths."
            raise UserError("a recording of wav.scp is not an audio file", where=folder / "wav.scp",
                            got=f"{name} {place}"[:120], hint=hint)  # fmt: skip
    known = segments or recordings
    missing = [name for name in texts if name not in known] + [name for name in known if name not in texts]
    if missing:
        hint = "Kaldi's utils/fix_data_dir.sh removes the others."
        raise UserError("the folder's files name different utterances", where=folder, got=few(missing), hint=hint)
    for name, text in texts.items():
        row: dict[str, Any] = {"id": name, "text": text, "speaker": speakers.get(name)}
        if not segments:
            yield row | {"audio": recordings[name]}
            continue
        try:
            recording, start, end = segments[name].split()
            row |= {"audio": recordings[recording], "offset": float(start), "duration": float(end) - float(start)}
        except (ValueError, KeyError) as error:
            yield Reject("malformed_manifest", f"segments: {name} {segments[name]}: {error!r}")
        else:
            yield row


def _kaldi_table(file: Path) -> dict[str, str]:
    """What a Kaldi file says of each name; empty without the file."""
    table: dict[str, str] = {}
    if not file.is_file():
        return table
    with open_text(file) as lines:
        for number, line in enumerate(lines, 1):
            name, _, value = line.strip().partition(" ") if "\t" not in line else line.strip().partition("\t")
            if name in table:
                raise UserError(f"{name} stands twice", where=f"{file}, line {number}")
            if name:
                table[name] = value.strip()
    return table
