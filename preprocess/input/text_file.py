"""Opens a list as text: finds its encoding, and names what is no text or not UTF-8.

In: a path. Out: its lines. A byte-order mark says UTF-8, UTF-16 or UTF-32; without one the file is UTF-8. Single lines
that are not UTF-8 come with lone surrogates, for a reject of their row; a file in another encoding is refused, with
the command that converts it.
"""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import IO

from higgs_tune.shards.errors import UserError

HEAD_BYTES = 1 << 22  # read to tell the encoding
MOST_CONTROL = 0.05  # share of control bytes in a text
LEAST_BAD_SHARE = 0.05  # of lines, for a file to be in another encoding and not merely damaged
SIGNATURES = {
    b"PK\x03\x04": ("a zip file or Excel workbook", "Save the sheet as CSV UTF-8, or unpack the archive."),
    b"\xd0\xcf\x11\xe0": ("an Excel workbook of the old kind", "Save the sheet as CSV UTF-8."),
    b"\x1f\x8b": ("a gzip file", "Unpack it first: gunzip FILE."),
    b"BZh": ("a bzip2 file", "Unpack it first: bunzip2 FILE."),
    b"\xfd7zXZ": ("an xz file", "Unpack it first: unxz FILE."),
    b"\x28\xb5\x2f\xfd": ("a zstandard file", "Unpack it first: unzstd FILE."),
    b"7z\xbc\xaf": ("a 7z file", "Unpack it first."),
    b"ARROW1": ("an Arrow file", "Give the folder that save_to_disk wrote, or a Parquet file."),
    b"SQLite format 3": ("an SQLite database", "Export the table as CSV UTF-8."),
    b"\x93NUMPY": ("a NumPy array", "Write the rows as JSON lines."),
    b"%PDF": ("a PDF file", "Write the rows as CSV UTF-8."),
    b"RIFF": ("audio", "Give a list of audio files and texts, or a folder with a .txt beside each clip."),
    b"fLaC": ("audio", "Give a list of audio files and texts, or a folder with a .txt beside each clip."),
    b"OggS": ("audio", "Give a list of audio files and texts, or a folder with a .txt beside each clip."),
    b"ID3": ("audio", "Give a list of audio files and texts, or a folder with a .txt beside each clip."),
}
NO_TEXT = "not a ChatML file or manifest"
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def open_text(path: Path) -> IO[str]:
    """The file's text, line ends as they are; undecodable bytes of single lines as lone surrogates.

    Raises:
        UserError: it is no text, or in an encoding without a mark that is not UTF-8.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        whole = not file.read(1)
    encoding = text_encoding(head, path, whole=whole)
    if encoding == "utf-8-sig":
        return path.open(encoding=encoding, errors="surrogateescape", newline="")
    return path.open(encoding=encoding, newline="")


def text_encoding(head: bytes, path: Path, *, whole: bool = True) -> str:
    """The encoding of a text by its first bytes; `whole`: they are all.

    Raises:
        UserError: see `open_text`.
    """
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            _check_marked(head, encoding, path)
            return encoding
    for signature, (kind, hint) in SIGNATURES.items():
        if head.startswith(signature):
            raise UserError(NO_TEXT, where=path, got=kind, hint=hint)
    if head.startswith(b"PAR1"):
        raise UserError(NO_TEXT, where=path, got="a Parquet file", hint="Name it .parquet.")
    for encoding in ("utf-16-le", "utf-16-be"):
        text = head[:4096].decode(encoding, "replace")
        if head[:4096].count(0) and "\n" in text and all(c.isprintable() or c.isspace() for c in text[:-1]):
            raise UserError("the data is not UTF-8", where=path, got=f"{encoding.upper()} without a byte-order mark",
                            hint=_convert(encoding))  # fmt: skip
    if sum(byte < 32 and byte not in b"\t\n\r" for byte in head[:4096]) > MOST_CONTROL * len(head[:4096]):
        raise UserError(NO_TEXT, where=path, got="binary data")
    _refuse_other_encoding(head if whole else head[: head.rfind(b"\n") + 1] or head, path)
    return "utf-8-sig"


def _check_marked(head: bytes, encoding: str, path: Path) -> None:
    unit = {"utf-16": 2, "utf-32": 4}.get(encoding, 1)
    try:
        if unit > 1:
            codecs.getincrementaldecoder(encoding)().decode(head[: len(head) // unit * unit])
    except UnicodeDecodeError as error:
        got = f"a byte-order mark of {encoding}, then other data: {error}"
        raise UserError(NO_TEXT, where=path, got=got) from error


def _refuse_other_encoding(head: bytes, path: Path) -> None:
    """Refuse a file none of whose lines with other letters than ASCII's is UTF-8."""
    lines = head.splitlines()
    marked = [(number, line) for number, line in enumerate(lines, 1) if not line.isascii()]
    bad = [(number, line) for number, line in marked if not _is_utf8(line)]
    if not bad or len(bad) < len(marked) or len(bad) < LEAST_BAD_SHARE * len(lines):
        return
    from charset_normalizer import from_bytes

    guess = from_bytes(b"\n".join(line for _, line in bad)[:50_000]).best()
    number, line = bad[0]
    if guess is None:
        hint = "Find out its encoding, and convert it: iconv -f ENCODING -t UTF-8 FILE > NEW"
        raise UserError("the data is not UTF-8", where=f"{path}, line {number}", hint=hint)
    shown = "".join(c if c.isprintable() else " " for c in line.decode(guess.encoding, "replace"))[:60]
    hint = f"As {guess.encoding} line {number} reads: {shown}. If that is right: {_convert(guess.encoding)}"
    raise UserError("the data is not UTF-8", where=f"{path}, line {number}", hint=hint)


def _convert(encoding: str) -> str:
    return f"iconv -f {encoding.replace('_', '-').upper()} -t UTF-8 FILE > NEW"


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True
