"""Diagnosis of damaged shards: the walk over a damaged tar, and the reason why a sample cannot be read, in words.

In: bytes of a shard. Out: tar members, and a `Finding` on each damage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from higgs_tune.shards.errors import ShardError
from higgs_tune.shards.ustar import TAR_BLOCK, parse_header, tar_end, tar_header


@dataclass(frozen=True)
class Finding:
    """One fault of a set.

    Attributes:
        kind: a short fixed name, to count by.
        detail: the fault in words, with expected and got.
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
    """A tar member: name, offset of its header, payload size in bytes."""

    name: str
    offset: int
    size: int

    @property
    def end(self) -> int:
        """Offset of the next header."""
        return self.offset + TAR_BLOCK + self.size + -self.size % TAR_BLOCK


def walk(data: memoryview, file: str) -> tuple[list[Member], list[Finding]]:
    """The members of a shard, read from header to header; after a damaged header, on from the next sound one."""
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
    """Offset of the next sound header or of the end marker; else the end of the data."""
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


def describe_damage(block: bytes, decode: Callable[[bytes, str], object]) -> str:
    """The damage of a sample, or of its features, whose checksum is not the index's.

    Args:
        decode: reads the bytes, and raises ShardError where it cannot.
    """
    reasons = zero_blocks(block)
    try:
        decode(block, "the sample")
    except ShardError as error:
        reasons.append(str(error))
    return "; ".join(reasons) or "it can be read, but its checksum is not the index's"


def zero_blocks(block: bytes) -> list[str]:
    """Runs of whole 512-byte blocks of zeros, in words; no intact sample holds one."""
    zero = [not any(block[at : at + TAR_BLOCK]) for at in range(0, len(block), TAR_BLOCK)]
    starts = [i for i, here in enumerate(zero) if here and (i == 0 or not zero[i - 1])]
    ends = [i + 1 for i, here in enumerate(zero) if here and (i + 1 == len(zero) or not zero[i + 1])]
    return [
        f"bytes {start * TAR_BLOCK} to {min(end * TAR_BLOCK, len(block))} of the sample are zero"
        for start, end in zip(starts, ends, strict=True)
    ]
