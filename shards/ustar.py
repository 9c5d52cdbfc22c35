"""USTAR archives: the bytes of a member, and back.

The same name and payload always give the same bytes: no time, owner or host. Format: POSIX.1-1988; docs/format.md.
"""

from __future__ import annotations

import tarfile

from higgs_tune.shards.errors import ShardError

TAR_BLOCK = 512


def tar_header(name: str, size: int) -> bytes:
    """The header of a member: 512 bytes."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


def tar_member(name: str, payload: bytes) -> bytes:
    """One member: header, payload, zero padding to a multiple of 512 bytes."""
    return tar_header(name, len(payload)) + payload + bytes(-len(payload) % TAR_BLOCK)


def tar_end(size: int) -> bytes:
    """The end of an archive whose members have `size` bytes: two zero blocks, padded to the record size."""
    return bytes(2 * TAR_BLOCK + -(size + 2 * TAR_BLOCK) % tarfile.RECORDSIZE)


def parse_header(header: bytes | memoryview, where: str) -> tuple[str, int]:
    """Name and payload size of a header.

    Raises:
        ShardError: a field cannot be parsed, or the header's checksum is wrong.
    """
    header = bytes(header)
    try:
        stated, size = int(header[148:154], 8), int(header[124:135], 8)
        name = header[:100].rstrip(b"\0").decode("ascii")
    except ValueError as error:
        raise ShardError("damaged tar header: a field cannot be parsed", where=where, got=header[:32]) from error
    actual = sum(header[:148]) + 8 * 32 + sum(header[156:])
    if len(header) != TAR_BLOCK or actual != stated or header[257:263] != b"ustar\0":
        raise ShardError("damaged tar header: wrong checksum", where=where, expected=f"{stated:o}", got=f"{actual:o}")
    return name, size


def split_members(block: bytes, where: str) -> list[tuple[str, memoryview]]:
    """The (name, payload) pairs of consecutive members.

    Raises:
        ShardError: a header is damaged, or a payload ends beyond the block.
    """
    view, members, at = memoryview(block), [], 0
    while at < len(block):
        name, size = parse_header(view[at : at + TAR_BLOCK], where)
        start, end = at + TAR_BLOCK, at + TAR_BLOCK + size
        if end > len(block):
            raise ShardError("a member ends beyond its sample", where=f"{where}, {name}", got=f"{size} bytes")
        members.append((name, view[start:end]))
        at = end + -size % TAR_BLOCK
    return members
