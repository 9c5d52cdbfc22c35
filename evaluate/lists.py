"""Evaluation lists: the lines that every system speaks, from each form that the field uses.

In: a file or folder. Out: `Line`s in the list's order, paths absolute. A bad line keeps its place, with its fault: it
counts as wrong, and costs no other line.

| form | told by | ids |
|---|---|---|
| our JSONL, OmniVoice's JSONL | `.jsonl`, `.json` | `id` |
| Seed-TTS-eval, `utt|prompt_text|prompt_wav|text[|gt_wav]` | any other file | `utt` |
| MiniMax multilingual, a folder or one file of its `text/` | `text/` and `speaker/` | `arabic-001`, by line |
| Habibi, a `datasets` folder on disk | `state.json` | `MSA-00000`, by row |

Sources: BytedanceSpeech/seed-tts-eval, MiniMaxAI/TTS-Multilingual-Test-Set, SWivid/Habibi, k2-fsa/OmniVoice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from higgs_tune.preprocess.input.arrow import read_rows
from higgs_tune.preprocess.input.text_file import open_text
from higgs_tune.preprocess.judges.normalisers import Normaliser
from higgs_tune.shards.errors import UserError, few

NOT_UTF8 = "the line is not UTF-8"
_UNDECODED = re.compile("[\udc80-\udcff]")
SHOWN = 10  # bad lines that an error spells out
MINIMAX_LANGUAGES = {
    "arabic": "ar", "cantonese": "yue", "chinese": "zh", "czech": "cs", "dutch": "nl", "english": "en", "finnish": "fi",
    "french": "fr", "german": "de", "greek": "el", "hindi": "hi", "indonesian": "id", "italian": "it", "japanese": "ja",
    "korean": "ko", "polish": "pl", "portuguese": "pt", "romanian": "ro", "russian": "ru", "spanish": "es",
    "thai": "th", "turkish": "tr", "ukrainian": "uk", "vietnamese": "vi",
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One line to speak.

    Attributes:
        id: outputs are matched by it.
        ref_audio, ref_text: the voice to speak in, and what it says.
        target_audio: a real recording of the text in that voice.
        language: a code; empty: unknown. speaker, dialect: to group by.
        other_references: (audio, text) of more voices, for a text with several speakers.
        place: in the list.
        fault: why it cannot be judged.
        Absent values are empty.
    """

    id: str
    text: str
    ref_audio: str = ""
    ref_text: str = ""
    language: str = ""
    target_audio: str = ""
    speaker: str = ""
    dialect: str = ""
    other_references: tuple[tuple[str, str], ...] = ()
    place: str = field(default="", compare=False)
    fault: str = ""


_STRINGS = tuple(name for name in Line.__dataclass_fields__ if name not in ("other_references", "place", "fault"))


class BadLine(Exception):
    """A line that cannot be used; the message says why."""


def read_list(path: Path) -> list[Line]:
    """All lines of a list, the bad ones with their faults (see `find_faults`).

    Raises:
        UserError: no such list, or an empty one.
    """
    lines = placed(list_lines(path), path.name)
    if not lines:
        raise UserError("the list holds no lines", where=path)
    return lines


def list_lines(path: Path) -> Iterator[tuple[str, Line | BadLine]]:
    """(place, line) of a list in any of the forms; ids and texts are not checked. Bytes that are not UTF-8 make their
    own line bad.

    Raises:
        UserError: no such list, or one in another encoding.
    """
    if not path.exists():
        raise UserError("no such list", where=path)
    for place, line in _lines_of(path):
        if isinstance(line, Line) and is_utf8(line.id + line.text + line.ref_text):
            yield place, line
        else:
            yield place, line if is_utf8(str(line)) and isinstance(line, BadLine) else BadLine(NOT_UTF8)


def is_utf8(text: str) -> bool:
    """Whether a text has no bytes that could not be decoded (see `open_text`)."""
    return not _UNDECODED.search(text)


def _lines_of(path: Path) -> Iterator[tuple[str, Line | BadLine]]:
    if path.is_dir():
        return _minimax(path, sorted((path / "text").glob("*.txt"))) if (path / "text").is_dir() else _habibi(path)
    if path.suffix.lower() in (".jsonl", ".json"):
        return _jsonl(path)
    if path.parent.name == "text" and (path.parents[1] / "speaker").is_dir():
        return _minimax(path.parents[1], [path])
    return _seedtts(path)


def placed(lines: Iterable[tuple[str, Line | BadLine]], name: str) -> list[Line]:
    """The lines of (place, line) pairs of the list `name`; one that cannot be read is called by its place."""
    listed = [(f"{name} {place}", line) for place, line in lines]
    return [
        Line(place, "", place=place, fault=str(line)) if isinstance(line, BadLine) else replace(line, place=place)
        for place, line in listed
    ]


def line_fault(line: Line) -> str:
    """Why a line cannot be used: its id is no file name, or it has no text; empty where it can."""
    parts = PurePosixPath(line.id).parts
    if not parts or "\0" in line.id or ".." in parts or line.id.startswith("/"):
        return f"id {line.id!r:.60} is no file name"
    return "" if line.text.strip() else f"empty text (id {line.id})"


def find_faults(lines: list[Line], chosen: Normaliser) -> list[Line]:
    """The lines of all lists, each with its fault: it could not be read, its id is no file name or another line's too
    (then neither can be told from the other), or the normaliser leaves nothing of its text.

    Raises:
        UserError: no line can be used; names them.
    """
    places: dict[str, list[str]] = {}
    for line in lines:
        places.setdefault(line_name(line.id), []).append(line.place)
    found = [replace(line, fault=line.fault or _fault(line, places[line_name(line.id)], chosen)) for line in lines]
    if all(line.fault for line in found):
        bad = [f"{line.place}: {line.fault}" for line in found]
        raise UserError(f"none of {len(bad)} lines can be used: {few(bad, SHOWN)}")
    return found


def _fault(line: Line, places: list[str], chosen: Normaliser) -> str:
    others = [place for place in places if place != line.place]
    if fault := line_fault(line):
        return fault
    if others:
        return f"duplicate id {line.id}, also in {few(others)}"
    return "" if chosen.words(line.text) else f"normaliser {chosen.name} leaves nothing of the text (id {line.id})"


def line_name(key: str) -> str:
    """The name of a line's file by its id, without its ending; `/` stands for folders."""
    return str(PurePosixPath(key))


def _text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, line) of the lines that are not empty."""
    try:
        with open_text(path) as file:
            text = file.read()
    except OSError as error:
        raise UserError(f"cannot read the list: {error}", where=path) from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", line.strip()


def _beside(path: Path, name: str) -> str:
    """The path `name`, which starts from the list's folder, absolute; empty for none."""
    return str((path.parent / name).absolute()) if name else ""


def _jsonl(path: Path) -> Iterator[tuple[str, Line | BadLine]]:
    for place, line in _text_lines(path):
        try:
            yield place, _json_line(path, json.loads(line))
        except (ValueError, RecursionError):
            yield place, BadLine(f"not JSON: {line:.60}")
        except BadLine as bad:
            yield place, bad


def _json_line(path: Path, given: Any) -> Line:
    if not isinstance(given, dict):
        raise BadLine(f"expected an object, got {given!r:.60}")
    if "language" not in given and "language_id" in given:  # OmniVoice's
        given["language"] = given["language_id"]
    first, others = _references(path, given)
    values = {name: first.get(name, given.get(name)) for name in _STRINGS}
    for name, value in values.items():
        if isinstance(value, int) and not isinstance(value, bool) and name in ("id", "speaker"):
            values[name] = str(value)
        elif value is not None and not isinstance(value, str):
            raise BadLine(f"{name}: expected a string, got {value!r:.60}")
    for name in ("id", "text"):
        if values[name] is None:
            raise BadLine(f"{name} is missing")
    strings = {name: value or "" for name, value in values.items()}
    audio = {name: _beside(path, strings[name]) for name in ("ref_audio", "target_audio")}
    return Line(**(strings | audio), other_references=others)


def _references(path: Path, given: dict[str, Any]) -> tuple[dict[str, Any], tuple[tuple[str, str], ...]]:
    """`ref_audio` and `ref_text` of the first voice, and the other voices, of a line that lists several."""
    audios, texts = given.get("ref_audio"), given.get("ref_text")
    if not isinstance(audios, list):
        return {}, ()
    texts = texts if isinstance(texts, list) else [texts] * len(audios) if texts in (None, "") else []
    if not audios or len(texts) != len(audios) or not all(isinstance(item, str) and item for item in audios):
        raise BadLine(f"expected as many ref_text as ref_audio, got {len(audios)} files and {len(texts)} texts")
    if not all(isinstance(item, str | None) for item in texts):
        raise BadLine(f"ref_text: expected strings, got {texts!r:.60}")
    pairs = [(_beside(path, audio), text or "") for audio, text in zip(audios, texts, strict=True)]
    return {"ref_audio": audios[0], "ref_text": texts[0]}, tuple(pairs[1:])


def _seedtts(path: Path) -> Iterator[tuple[str, Line | BadLine]]:
    language = path.parent.name if path.parent.name in ("en", "zh") else ""
    for place, line in _text_lines(path):
        fields = [field.strip() for field in line.split("|")]
        if len(fields) not in (4, 5):
            yield place, BadLine(f"expected utt|prompt_text|prompt_wav|text[|gt_wav], got {line!r:.60}")
            continue
        name, ref_text, ref_audio, text, target = [*fields, ""][:5]
        key = name.removesuffix(".wav")
        yield place, Line(key, text, _beside(path, ref_audio), ref_text, language, _beside(path, target))


def _minimax(folder: Path, files: list[Path]) -> Iterator[tuple[str, Line | BadLine]]:
    said = {}
    for _place, line in _text_lines(folder / "speaker" / "prompt_text.txt"):
        name, _, text = line.partition("|")
        said[PurePosixPath(name.strip()).name] = text.strip()
    for file in files:
        prompts: dict[str, Path | None] = {}
        for number, (place, line) in enumerate(_text_lines(file), 1):
            label, bar, text = line.partition("|")
            if label not in prompts:
                prompts[label] = min((folder / "speaker" / file.stem / label).glob("*.mp3"), default=None)
            prompt, where = prompts[label], f"{file.name} {place}"
            if not bar or not prompt:
                fault = f"no speaker/{file.stem}/{label:.60}/*.mp3" if bar else f"expected label|text, got {line!r:.60}"
                yield where, BadLine(fault)
                continue
            language = MINIMAX_LANGUAGES.get(file.stem, "")
            ref_text = said.get(prompt.name, "")
            key = f"{file.stem}-{number:03d}"
            yield where, Line(key, text.strip(), str(prompt.absolute()), ref_text, language, speaker=label)


def _habibi(folder: Path) -> Iterator[tuple[str, Line | BadLine]]:
    """A line's reference is the same speaker's clip before it; the first of a speaker takes the speaker's last."""
    rows = [(number, _habibi_row(folder, number, row)) for number, row in enumerate(read_rows(folder))]
    last = {line.speaker: line for _number, line in rows if isinstance(line, Line)}
    for number, line in rows:
        if isinstance(line, BadLine):
            yield f"row {number}", line
            continue
        before, last[line.speaker] = last[line.speaker], line
        if before.target_audio == line.target_audio:
            yield f"row {number}", BadLine(f"speaker {line.speaker:.60} has no other clip")
            continue
        yield f"row {number}", replace(line, ref_audio=before.target_audio, ref_text=before.text)


def _habibi_row(folder: Path, number: int, row: dict[str, Any]) -> Line | BadLine:
    audio, text, speaker = row.get("audio"), row.get("text"), row.get("speaker_id")
    if not isinstance(audio, str) or not isinstance(text, str) or not isinstance(speaker, str | int):
        wanted = {"audio": audio, "text": text, "speaker_id": speaker}
        return BadLine(f"expected audio, text and speaker_id, got {wanted!r:.120}")
    dialect = str(row.get("dialect") or "")
    key = f"{dialect or 'row'}-{number:05d}"
    target = str((folder / audio).absolute())
    return Line(key, text, language="ar", target_audio=target, speaker=str(speaker), dialect=dialect)
