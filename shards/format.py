"""On-disk format version 1: from a sample to the bytes of its tar members, and back.

In: a `Sample` (text tokens with labels, raw codec codes, metadata). Out: bytes. Codes are stored raw: the loader adds
delay pattern, BOS and EOS. Byte layout: docs/format.md.

Guarantees:
    The same sample always gives the same bytes (tests/test_writer.py).
    Any tar program reads a shard (tests/test_shards.py).

Shapes: K codebooks, T frames of all segments together, L text tokens (an audio segment counts as one placeholder).
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
import zstandard
from higgs_tune.shards.durable import to_json
from higgs_tune.shards.errors import ShardError
from higgs_tune.shards.ustar import TAR_BLOCK, split_members, tar_member

FORMAT_VERSION = 1
FRAME_RATE_HZ = 25  # of the Higgs audio tokenizer: 24 kHz / (8*5*4*2*3)
MAX_KEY_CHARS = 64
CODES, META, TOKENS = "codes.npy", "json", "tokens.npy"  # member suffixes, in the order of the shard
MEL = "mel.npy.zst"
ZSTD_LEVEL = 3
MEL_TAIL = 2  # stored log-mel frames after the clip's own: their windows still cover the end of the signal
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Sample:
    """One training sample as stored.

    Attributes:
        key: unique in its set; letters, digits, `_` and `-`.
        meta: `messages`, `start_index`, `speaker`, `misc`, `segments` (see docs/format.md).
        tokens_2L: int32 [2, L]; row 0 input ids, row 1 label ids (-100: no label), not shifted.
        codes_KT: uint16 [K, T]; raw codes, segment after segment.
        mels: Whisper features, float16 [C, F] for each segment whose metadata has `mel_frames`, in order: C mel bins
            and F = `mel_frames` to `mel_frames + MEL_TAIL`, or C tower channels and F = `mel_frames` tower frames.
            Empty if there are none, or if they were not read.
    """

    key: str
    meta: dict[str, Any]
    tokens_2L: np.ndarray
    codes_KT: np.ndarray
    mels: tuple[np.ndarray, ...] = ()

    @property
    def segment_frames(self) -> list[int]:
        """Frames of each audio segment, in order of appearance."""
        return [segment["frames"] for segment in self.meta["segments"]]

    @property
    def mel_frames(self) -> list[int]:
        """Frames of Whisper features of each audio segment; 0 for a segment without."""
        return [segment.get("mel_frames", 0) for segment in self.meta["segments"]]


@dataclass(frozen=True, slots=True)
class Arrays:
    """The part of a `Sample` that training needs: all but its metadata."""

    key: str
    tokens_2L: np.ndarray
    codes_KT: np.ndarray
    segment_frames: list[int]


def checksum(data: bytes | memoryview) -> int:
    """XXH3-64 of bytes, as index rows hold it."""
    return xxhash.xxh3_64_intdigest(data)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def encode_sample(sample: Sample) -> bytes:
    """The sample's tar members, in the order of the shard.

    Raises:
        ValueError: the sample breaks a rule of the format (key, dtype, shape); a bug of the caller.
    """
    check_sample(sample)
    return b"".join(
        tar_member(f"{sample.key}.{suffix}", payload)
        for suffix, payload in (
            (CODES, _npy(sample.codes_KT)),
            (META, to_json(sample.meta)),
            (TOKENS, _npy(sample.tokens_2L)),
        )
    )


def encode_mels(sample: Sample) -> bytes:
    """The tar member of a sample's Whisper features: .npy arrays, one after another, in one zstandard frame."""
    if not mels_fit(sample.mels, sample.mel_frames) or any(mel.dtype != np.float16 for mel in sample.mels):
        shapes = [mel.shape for mel in sample.mels]
        raise ValueError(f"sample {sample.key!r}: mel_frames {sample.mel_frames}, arrays {shapes}")
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True)
    return tar_member(f"{sample.key}.{MEL}", compressor.compress(b"".join(_npy(mel) for mel in sample.mels)))


def mels_fit(mels: tuple[np.ndarray, ...], mel_frames: list[int]) -> bool:
    """Whether the arrays of Whisper features have the lengths that the segments' metadata states."""
    stated = [frames for frames in mel_frames if frames]
    return len(mels) == len(stated) and all(
        0 <= mel.shape[1] - frames <= MEL_TAIL for mel, frames in zip(mels, stated, strict=True)
    )


def check_sample(sample: Sample) -> None:
    """Raise ValueError if a sample breaks a rule of the format."""
    tokens, codes = sample.tokens_2L, sample.codes_KT
    problems = [
        (not KEY_PATTERN.fullmatch(sample.key), f"key {sample.key!r}"),
        (tokens.dtype != np.int32 or tokens.ndim != 2 or len(tokens) != 2, f"tokens {tokens.dtype}{tokens.shape}"),
        (codes.dtype != np.uint16 or codes.ndim != 2, f"codes {codes.dtype}{codes.shape}"),
        (sum(sample.segment_frames) != codes.shape[-1], f"segments {sample.segment_frames}, codes {codes.shape}"),
    ]
    broken = [text for wrong, text in problems if wrong]
    if broken:
        raise ValueError(f"sample {sample.key!r} breaks format version {FORMAT_VERSION}: {'; '.join(broken)}")


_NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '(<i4|<u2|<f2)', 'fortran_order': False, 'shape': \((\d+), (\d+)\), \} *\n",
    re.DOTALL,
)


_DTYPES = {b"<i4": np.dtype("<i4"), b"<u2": np.dtype("<u2"), b"<f2": np.dtype("<f2")}


def parse_npy(payload: bytes | memoryview, where: str, at: int = 0) -> tuple[np.ndarray, int]:
    """A 2-D array out of the bytes of an .npy file, without a copy.

    Args:
        at: first byte of the array's header.

    Returns:
        The array, and the byte after its last.

    Raises:
        ShardError: not a header that this format writes, or the bytes end early.
    """
    match = _NPY_HEADER.match(payload, at)
    if match is None:
        raise ShardError("not an array of this format", where=where, got=bytes(payload[at : at + 16]))
    dtype, shape = _DTYPES[match[2]], (int(match[3]), int(match[4]))
    end = match.end() + dtype.itemsize * shape[0] * shape[1]
    if len(payload) < end:
        raise ShardError("the array ends early", where=where, expected=f"{end} bytes", got=f"{len(payload)} bytes")
    return np.frombuffer(payload, dtype, shape[0] * shape[1], match.end()).reshape(shape), end


def _whole_npy(payload: bytes | memoryview, where: str) -> np.ndarray:
    array, end = parse_npy(payload, where)
    if end != len(payload):
        raise ShardError("bytes after the array", where=where, expected=f"{end} bytes", got=f"{len(payload)} bytes")
    return array


_FRAMES = re.compile(rb'"frames":(\d+)')


def decode_arrays(block: bytes, where: str) -> Arrays:
    """The arrays of a sample whose checksum is right; several times faster than `decode_sample`.

    The metadata is not parsed, but searched for each segment's `"frames":` after the last `"segments":[`. That is safe:
    its keys are sorted, so `segments` is followed by `speaker` and `start_index` alone, and quotes in strings are
    escaped.

    Raises:
        ShardError: the bytes are not one sample of this format.
    """
    try:
        meta_at = 2 * TAR_BLOCK + -(-int(block[124:135], 8) // TAR_BLOCK) * TAR_BLOCK
        tokens_at = meta_at + -(-int(block[meta_at - 388 : meta_at - 377], 8) // TAR_BLOCK) * TAR_BLOCK + TAR_BLOCK
        codes_KT, _ = parse_npy(block, where, TAR_BLOCK)
        tokens_2L, _ = parse_npy(block, where, tokens_at)
        frames = _FRAMES.findall(block, block.rindex(b'"segments":[', meta_at, tokens_at), tokens_at)
        key = block[: block.index(b".")].decode("ascii")
    except ValueError as error:
        raise ShardError(f"not a sample of this format: {error}", where=where) from error
    return Arrays(key, tokens_2L, codes_KT, [int(count) for count in frames])


def decode_sample(block: bytes, where: str) -> Sample:
    """Inverse of `encode_sample`.

    Raises:
        ShardError: the bytes are not one sample of this format; says what and where.
    """
    members = split_members(block, where)
    names = [name for name, _ in members]
    key = names[0].partition(".")[0] if names else ""
    if names != [f"{key}.{suffix}" for suffix in (CODES, META, TOKENS)]:
        raise ShardError("wrong members", where=where, expected=f"{CODES}, {META}, {TOKENS} of one key", got=names)
    codes, meta, tokens = (payload for _, payload in members)
    try:
        return Sample(key, json.loads(bytes(meta)), _whole_npy(tokens, where), _whole_npy(codes, where))
    except ValueError as error:
        raise ShardError(f"damaged metadata: {error}", where=where) from error


def decode_mels(block: bytes, where: str) -> tuple[str, tuple[np.ndarray, ...]]:
    """Inverse of `encode_mels`: the key, and the arrays.

    Raises:
        ShardError: the member, the zstandard frame or an array is damaged, cut, or followed by more.
    """
    members = split_members(block, where)
    if len(members) != 1 or not members[0][0].endswith(f".{MEL}"):
        raise ShardError("wrong members", where=where, expected=f"one {MEL}", got=[name for name, _ in members])
    name, payload = members[0]
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    try:
        data = decompressor.decompress(bytes(payload))
    except zstandard.ZstdError as error:
        raise ShardError(f"damaged zstandard data: {error}", where=where) from error
    if not decompressor.eof:
        raise ShardError("the zstandard data is truncated", where=where)
    if decompressor.unused_data:
        raise ShardError("bytes after the zstandard data", where=where, got=f"{len(decompressor.unused_data)} bytes")
    arrays, at = [], 0
    while at < len(data):
        array, at = parse_npy(data, where, at)
        arrays.append(array)
    return name.removesuffix(f".{MEL}"), tuple(arrays)
