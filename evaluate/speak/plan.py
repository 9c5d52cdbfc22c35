"""Lines to speak, from options and lists: each is checked on its own, so that a bad one costs no other.

In: a text, or a list in any form that higgs-eval reads, or a .txt file. Out: `Utterance`s (pieces of normalized text,
references, output file) and `Failure`s (a line, and why it cannot be spoken).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from higgs_tune.evaluate.lists import NOT_UTF8, BadLine, Line, is_utf8, line_fault, line_name, list_lines
from higgs_tune.evaluate.speak.config import SpeakConfig
from higgs_tune.evaluate.speak.sentences import SPEAKER_TAG, split_text
from higgs_tune.evaluate.speak.settings import Settings, digest
from higgs_tune.preprocess.audio.source import audio_sha256
from higgs_tune.preprocess.input.arrow import arrow_cell
from higgs_tune.preprocess.input.chatml import usable_text
from higgs_tune.preprocess.input.text_file import open_text
from higgs_tune.preprocess.reject import Reject
from higgs_tune.preprocess.text_normalization import TextOptions
from higgs_tune.shards.errors import UserError

MAX_CHARS = 1_000_000  # of one text
MAX_NAME = 240  # bytes of a file's name without its suffix


@dataclass(frozen=True)
class Utterance:
    """A line that can be spoken.

    pieces: of its text, normalized. references: (path, normalized text) of each. key: changes with anything that
    changes its codes.
    """

    id: str
    text: str
    pieces: tuple[str, ...]
    references: tuple[tuple[str, str], ...]
    key: str


@dataclass(frozen=True)
class Failure:
    """A line that was not spoken. id: empty where the line has none that can be read. place: in the list."""

    id: str
    place: str
    reason: str


def read_lines(config: SpeakConfig) -> list[tuple[str, Line | BadLine]]:
    """(place, line) of everything that is to be spoken.

    Raises:
        UserError: the list is not there, cannot be read, or is empty.
    """
    if config.text is not None:
        return [("--text", Line(config.output.stem, config.text))]
    assert config.input is not None
    if config.input.suffix.lower() == ".txt" and config.input.is_file():
        lines = list(_text_lines(config.input, whole=config.to_file))
    else:
        lines = list(list_lines(config.input))
    if not lines:
        raise UserError("the list holds no lines", where=config.input)
    if config.to_file and len(lines) > 1:
        hint = "Give a folder."
        raise UserError("--output is one file for a list", where=config.output, got=f"{len(lines)} lines", hint=hint)
    return lines


def _text_lines(path: Path, *, whole: bool) -> Iterator[tuple[str, Line | BadLine]]:
    """A text file as one text, or as one text a line; a list of Seed-TTS-eval as that."""
    try:
        with open_text(path) as file:
            text = file.read()
    except OSError as error:
        raise UserError(f"cannot read the text: {error.strerror}", where=path) from error
    if whole and not is_utf8(text):
        raise UserError("the text is not UTF-8", where=path)
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if whole:
        yield "the text", Line(path.stem, text)
    elif lines and all(line.count("|") in (3, 4) for _, line in lines):
        yield from list_lines(path)
    else:
        for number, line in lines:
            spoken = Line(f"{path.stem}-{number:04d}", line) if is_utf8(line) else BadLine(NOT_UTF8)
            yield f"line {number}", spoken


def plan(
    lines: list[tuple[str, Line | BadLine]], config: SpeakConfig, settings: Settings
) -> tuple[list[Utterance], list[Failure]]:
    """What can be spoken, and what cannot; together they are all lines."""
    counts = Counter(line_name(line.id) for _, line in lines if isinstance(line, Line) and line.id)
    fingerprint, hashes = settings.fingerprint(), dict[str, str]()
    utterances: list[Utterance] = []
    failures: list[Failure] = []
    for place, line in lines:
        if isinstance(line, BadLine):
            failures.append(Failure("", place, str(line)))
            continue
        fault = line_fault(line)
        if not fault and len(PurePosixPath(line.id).name.encode("utf-8", "replace")) > MAX_NAME:
            fault = f"id {line.id!r:.60} is too long for a file name"
        if not fault and counts[line_name(line.id)] > 1:
            fault = f"duplicate id {line.id}: {counts[line_name(line.id)]} lines have it, none of them is spoken"
        try:
            if fault:
                raise Reject("line", fault)
            utterances.append(_utterance(line, config, settings, fingerprint, hashes))
        except Reject as reject:
            failures.append(Failure(line.id, place, reject.detail))
    return utterances, failures


def _utterance(
    line: Line, config: SpeakConfig, settings: Settings, fingerprint: object, hashes: dict[str, str]
) -> Utterance:
    """The line, checked.

    Raises:
        Reject: its text or a reference's text cannot be used, or a reference is not there.
    """
    texts = TextOptions(MAX_CHARS, settings.normalization)
    text = usable_text(line.text, "text", texts)
    own = ((line.ref_audio, line.ref_text), *line.other_references) if line.ref_audio else ()
    given, references = own or config.references, list[tuple[str, str]]()
    tags = len(given) > 1 and bool(SPEAKER_TAG.search(text))
    for number, (path, known) in enumerate(given):
        said = usable_text(known, "ref_text", texts).strip() if known.strip() else ""
        tag = f"[SPEAKER{number}] " if tags and said and not SPEAKER_TAG.match(said) else ""
        references.append((path, tag + said))
        if path not in hashes:
            hashes[path] = _hash(path)
    pieces = tuple(split_text(text, config.max_chars))
    key = digest([pieces, [[hashes[path], said] for path, said in references], fingerprint])
    return Utterance(line_name(line.id), text, pieces, tuple(references), key)


def _hash(path: str) -> str:
    """SHA-256 of a reference, a file or a cell of a datasets folder.

    Raises:
        Reject: it is not there, or cannot be read.
    """
    try:
        if not arrow_cell(path) and not Path(path).is_file():
            raise Reject("missing_audio", f"no such reference: {path}", path)
        return audio_sha256(path)
    except (OSError, ValueError) as error:
        raise Reject("unreadable_audio", f"cannot read the reference: {error}", path) from error
