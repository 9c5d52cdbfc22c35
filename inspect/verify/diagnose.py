"""Names for damage: which field of a tar header, which member, which bytes.

In: bytes that are not what they should be. Out: findings in words. Never: a repair.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from higgs_tune.shards.errors import ShardError
from higgs_tune.shards.format import (
    CODES,
    META,
    TOKENS,
    decode_mels,
    parse_npy,
)
from higgs_tune.shards.ustar import TAR_BLOCK, parse_header, tar_end, tar_header

# fields of a USTAR header (POSIX.1-1988): name, first byte, end
USTAR_FIELDS = (
    ("name", 0, 100),
    ("mode", 100, 108),
    ("uid", 108, 116),
    ("gid", 116, 124),
    ("size", 124, 136),
    ("mtime", 136, 148),
    ("chksum", 148, 156),
    ("typeflag", 156, 157),
    ("linkname", 157, 257),
    ("magic", 257, 263),
    ("version", 263, 265),
    ("uname", 265, 297),
    ("gname", 297, 329),
    ("devmajor", 329, 337),
    ("devminor", 337, 345),
    ("prefix", 345, 500),
    ("padding", 500, 512),
)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: a short fixed name, to count by.
        detail: what was expected and what was found.
        file: name of the file within the set; key: of the sample; offset: in bytes of the file. Empty where none.
    """

    kind: str
    detail: str
    file: str = ""
    key: str = ""
    offset: int | None = None

    def to_dict(self) -> dict[str, str | int | None]:
        return asdict(self)


@dataclass(frozen=True)
class Member:
    """A tar member: its name, where its header starts, the bytes of its payload."""

    name: str
    offset: int
    size: int

    @property
    def end(self) -> int:
        """Where the next header is."""
        return self.offset + TAR_BLOCK + self.size + -self.size % TAR_BLOCK


def walk(data: memoryview, file: str) -> tuple[list[Member], list[Finding]]:
    """The members of a shard, read from header to header; after a damaged header, from the next sound one."""
    members, findings, at = [], [], 0
    while at < len(data):
        header = bytes(data[at : at + TAR_BLOCK])
        if not any(header) and _is_end(data, at):
            return members, findings
        try:
            member = Member(*_fields(header, file, at))
        except ShardError:
            text = "a header that cannot be read" if len(header) == TAR_BLOCK else "the file ends inside a header"
            findings.append(Finding("damaged_header", text, file, offset=at))
            at = _next_header(data, at + TAR_BLOCK)
            continue
        if at + TAR_BLOCK + member.size > len(data):
            detail = f"the file ends inside the payload of {member.name}, at byte {len(data)}"
            return members, [*findings, Finding("cut_member", detail, file, member.name.partition(".")[0], at)]
        members.append(member)
        at = member.end
    if not findings or findings[-1].detail.startswith("a header"):
        findings.append(Finding("no_end_marker", f"the file ends at byte {len(data)}, after a member", file, offset=at))
    return members, findings


def _fields(header: bytes, file: str, at: int) -> tuple[str, int, int]:
    name, size = parse_header(header, file)
    if header != tar_header(name, size):
        raise ShardError("not the header that this format writes", where=file)
    return name, at, size


def _is_end(data: memoryview, at: int) -> bool:
    return bytes(data[at:]) == tar_end(at)


def _next_header(data: memoryview, at: int) -> int:
    """Where the next sound header is, or the end of the archive starts; else the end of the data."""
    while at < len(data):
        header = bytes(data[at : at + TAR_BLOCK])
        if header[257:262] == b"ustar" or _is_end(data, at):
            try:
                parse_header(header, "")
                return at
            except ShardError:
                if _is_end(data, at):
                    return at
        at += TAR_BLOCK
    return len(data)


def changed_fields(header: bytes, name: str, size: int) -> list[str]:
    """The fields in which a header differs from the one that this format writes."""
    expected = tar_header(name, size)
    return [field for field, start, end in USTAR_FIELDS if header[start:end] != expected[start:end]]


def describe_sample(block: bytes, key: str) -> str:
    """What is wrong with the members of a sample whose checksum is not the index's."""
    found, at = zero_blocks(block), 0
    for suffix in (CODES, META, TOKENS):
        header = block[at : at + TAR_BLOCK]
        size = _payload_size(block, at, suffix)
        if len(header) < TAR_BLOCK or size is None:
            found.append(f"{key}.{suffix} cannot be found at byte {at} of the sample")
            break
        name = f"{key}.{suffix}"
        if fields := changed_fields(header, name, size):
            found.append(f"header of {name}: {', '.join(fields)}")
        found += _payload_damage(block[at + TAR_BLOCK : at + TAR_BLOCK + size], name, suffix)
        at = Member(name, at, size).end
    return "; ".join(found) or "a payload differs, the headers are sound"


def zero_blocks(block: bytes) -> list[str]:
    """Runs of whole 512-byte blocks of zeros, which no sample holds."""
    zero = [not any(block[at : at + TAR_BLOCK]) for at in range(0, len(block), TAR_BLOCK)]
    starts = [i for i, here in enumerate(zero) if here and (i == 0 or not zero[i - 1])]
    ends = [i + 1 for i, here in enumerate(zero) if here and (i + 1 == len(zero) or not zero[i + 1])]
    return [
        f"bytes {start * TAR_BLOCK} to {min(end * TAR_BLOCK, len(block))} of the sample are zero"
        for start, end in zip(starts, ends, strict=True)
    ]


def _payload_size(block: bytes, at: int, suffix: str) -> int | None:
    """Bytes of a payload, by its header where that is sound, else by the payload itself."""
    try:
        return parse_header(block[at : at + TAR_BLOCK], "")[1]
    except ShardError:
        payload = block[at + TAR_BLOCK :]
    if suffix != META:
        try:
            return parse_npy(payload, "")[1]
        except ShardError:
            return None
    following = next((i for i in range(0, len(payload), TAR_BLOCK) if payload[i + 257 : i + 262] == b"ustar"), None)
    return None if following is None else len(payload[:following].rstrip(b"\0"))


def _payload_damage(payload: bytes, name: str, suffix: str) -> list[str]:
    try:
        if suffix == META:
            json.loads(payload)
        elif (end := parse_npy(payload, name)[1]) != len(payload):
            return [f"payload of {name}: {len(payload)} bytes, its array has {end}"]
    except (ShardError, ValueError) as error:
        return [f"payload of {name}: {error}"]
    return []


def describe_mel(block: bytes, key: str) -> str:
    """What is wrong with a sample's Whisper features whose checksum is not the index's."""
    found = zero_blocks(block)
    try:
        decode_mels(block, f"{key}'s features")
    except ShardError as error:
        found.append(str(error))
    return "; ".join(found) or "the payload or its padding differs"
