"""Names what a file really is, whatever its name says: for files that cannot be read as audio, weights or a tokenizer.

In: the first bytes of a file. Out: a description, with the way to a usable file where there is one.
"""

from __future__ import annotations

from pathlib import Path

HEAD_BYTES = 512
LFS_POINTER = "a Git LFS pointer, not the file itself"
LFS_HINT = "Fetch the file with: git lfs pull"
_FFMPEG = "convert it: ffmpeg -i IN -c:a flac OUT.flac"
_DOWNLOAD = "download the file again"

# offset, magic bytes, description, advice
_MAGIC: tuple[tuple[int, bytes, str, str], ...] = (
    (4, b"ftyp", "an MPEG-4 file (m4a, mp4, 3gp, mov)", _FFMPEG),
    (4, b"moov", "a QuickTime file (mov)", _FFMPEG),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM file", _FFMPEG),
    (0, b"#!AMR", "an AMR file", _FFMPEG),
    (0, bytes.fromhex("3026b2758e66cf11"), "a Windows Media file (wma, asf)", _FFMPEG),
    (0, b"ADIF", "an AAC file", _FFMPEG),
    (0, b"FLV\x01", "a Flash video file", _FFMPEG),
    (8, b"AVI ", "an AVI file", _FFMPEG),
    (0, b".RMF", "a RealMedia file", _FFMPEG),
    (0, b".ra\xfd", "a RealAudio file", _FFMPEG),
    (0, b"\x00\x00\x01\xba", "an MPEG video file", _FFMPEG),
    (0, b"wvpk", "a WavPack file", _FFMPEG),
    (0, b"MAC ", "a Monkey's Audio file (ape)", _FFMPEG),
    (0, b"TTA1", "a True Audio file (tta)", _FFMPEG),
    (0, b"MPCK", "a Musepack file", _FFMPEG),
    (0, b"MP+", "a Musepack file", _FFMPEG),
    (0, b"DSD ", "a DSD file (dsf)", _FFMPEG),
    (0, b"FRM8", "a DSD file (dff)", _FFMPEG),
    (0, b"\x0b\x77", "an AC-3 file", _FFMPEG),
    (0, b"\x7f\xfe\x80\x01", "a DTS file", _FFMPEG),
    (0, b"BW64", "a BW64 file", _FFMPEG),
    (0, b"MThd", "a MIDI file: notes, no recording", ""),
    (0, b"PK\x03\x04", "a ZIP archive", "unpack it"),
    (0, b"\x1f\x8b", "a gzip archive", "unpack it"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (0, b"Rar!", "a RAR archive", "unpack it"),
    (0, b"BZh", "a bzip2 archive", "unpack it"),
    (0, b"\xfd7zXZ", "an xz archive", "unpack it"),
    (0, b"\x28\xb5\x2f\xfd", "a zstandard archive", "unpack it"),
    (257, b"ustar", "a tar archive", "unpack it"),
    (0, b"%PDF", "a PDF file", ""),
    (0, b"\x89PNG", "a PNG image", ""),
    (0, b"\xff\xd8\xff", "a JPEG image", ""),
    (0, b"GIF8", "a GIF image", ""),
    (0, b"PAR1", "a Parquet file", ""),
    (0, b"GGUF", "GGUF weights", ""),
    (0, b"\x93NUMPY", "a NumPy array", ""),
)


def is_lfs_pointer(head: bytes) -> bool:
    """Whether a file that begins with these bytes is the pointer that Git LFS leaves in place of a file."""
    return head.startswith(b"version https://git-lfs.github.com/spec/")


def file_kind(head: bytes) -> str:
    """What a file that begins with these bytes is, and what to do about it; empty if it is not recognized."""
    if not head:
        return "an empty file"
    if is_lfs_pointer(head):
        return f"{LFS_POINTER}; fetch it with: git lfs pull"
    for offset, magic, name, advice in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return f"{name}; {advice}" if advice else name
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:  # ADTS: an MPEG frame of layer 0
        return f"an AAC file; {_FFMPEG}"
    if not head.strip(b"\0"):
        return "nothing but zero bytes: a download or a copy that was not finished"
    return _text_kind(head)


def _text_kind(head: bytes) -> str:
    try:
        text = head.decode("utf-8", "ignore").lstrip("\ufeff \t\r\n").lower()
    except ValueError:
        return ""
    if text.startswith(("<!doctype html", "<html", "<head", "<body")):
        return f"an HTML page; {_DOWNLOAD}"
    if text.startswith("<?xml") or (text.startswith("<") and "<error" in text):
        return f"an XML document, such as a server's error message; {_DOWNLOAD}"
    if text.startswith(("{", "[")) and b"\0" not in head:
        return f"JSON text, such as a server's error message; {_DOWNLOAD}"
    printable = sum(byte >= 32 or byte in b"\t\r\n" for byte in head)
    if printable == len(head) and (head.isascii() or _is_utf8(head)):
        return "plain text"
    return ""


def _is_utf8(head: bytes) -> bool:
    try:
        head[: len(head) - 4].decode()  # the last character may be cut
    except UnicodeDecodeError:
        return False
    return True


def refuse_pointer(file: Path, what: str) -> None:
    """Make sure that a file is not a Git LFS pointer.

    Raises:
        UserError: it is.
    """
    from higgs_tune.shards.errors import UserError

    with file.open("rb") as stream:
        if is_lfs_pointer(stream.read(HEAD_BYTES)):
            raise UserError(f"{what} is {LFS_POINTER}", where=file, hint=LFS_HINT)
