"""The damage table: whatever happens to a set's files, reading says what is wrong and where."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard
from helpers.build_set import IDS, build_set, synthetic_sample
from higgs_tune.shards.errors import ShardError
from higgs_tune.shards.format import decode_mels, encode_mels
from higgs_tune.shards.reader import ShardSet
from higgs_tune.shards.split import ValidationSplit
from higgs_tune.shards.ustar import TAR_BLOCK, tar_member
from higgs_tune.shards.writer import SetWriter

SHARD = "codes-000001.tar"
# name and first byte of every field of a USTAR header
FIELDS = {"name": 0, "mode": 100, "uid": 108, "gid": 116, "size": 124, "mtime": 136, "chksum": 148, "typeflag": 156}
FIELDS |= {"linkname": 157, "magic": 257, "version": 263, "uname": 265, "gname": 297, "devmajor": 329, "prefix": 345}
FIELDS |= {"padding": 500}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    build_set(out, mel=True)
    return out


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "set"))


def read_all(folder: Path) -> None:
    shards = ShardSet(folder)
    for row in range(len(shards)):
        shards.read(row, mels=True)


def change(path: Path, at: int, new: Callable[[bytes], bytes], length: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + length] = new(bytes(data[at : at + length]))
    path.write_bytes(data)


def flip(old: bytes) -> bytes:
    return bytes([old[0] ^ 0x10])


def third_sample(folder: Path) -> tuple[int, int, int]:
    """Row, offset and length of a sample in the middle of `SHARD`."""
    index = ShardSet(folder).index
    row = int(np.flatnonzero(index["shard"] == 1)[2])
    return row, int(index["offset"][row]), int(index["length"][row])


@pytest.mark.fast
@pytest.mark.parametrize(("where", "past"), [("member boundary", 0), ("header", 100), ("payload", TAR_BLOCK + 40)])
def test_cut_shard(copy: Path, where: str, past: int) -> None:
    _, offset, _ = third_sample(copy)
    path = copy / SHARD
    before = ShardSet(copy)
    path.write_bytes(path.read_bytes()[: offset + past])
    with pytest.raises(ShardError, match=rf"wrong size .*{SHARD}.*expected \d+ bytes, got {offset + past}"):
        ShardSet(copy)
    with pytest.raises(ShardError, match=rf"ends early .*{SHARD}, key .*offset {offset}"):
        before.read(third_sample_row(before))  # a set that was open before


def third_sample_row(shards: ShardSet) -> int:
    return int(np.flatnonzero(shards.index["shard"] == 1)[2])


@pytest.mark.parametrize("member", [0, 1, 2])
@pytest.mark.parametrize("field", FIELDS)
def test_flipped_byte_in_a_header(copy: Path, field: str, member: int) -> None:
    row, offset, length = third_sample(copy)
    data = (copy / SHARD).read_bytes()[offset : offset + length]
    headers = [at for at in range(0, length, TAR_BLOCK) if data[at + 257 : at + 262] == b"ustar"]
    change(copy / SHARD, offset + headers[member] + FIELDS[field], flip)
    shards = ShardSet(copy)
    with pytest.raises(ShardError, match=rf"wrong checksum .*{SHARD}, key \d+, offset {offset}.*expected xxh3.*got"):
        shards.read(row)
    shards.read(row - 1)
    shards.read(row + 1)


@pytest.mark.fast
@pytest.mark.parametrize("part", [0.15, 0.5, 0.95])
def test_flipped_byte_in_a_payload(copy: Path, part: float) -> None:
    row, offset, length = third_sample(copy)
    change(copy / SHARD, offset + int(part * length), flip)
    with pytest.raises(ShardError, match=rf"wrong checksum .*{SHARD}, key \d+, offset {offset}"):
        ShardSet(copy).read(row)


def test_zeroed_block(copy: Path) -> None:
    row, offset, _ = third_sample(copy)
    change(copy / SHARD, offset, lambda old: bytes(len(old)), TAR_BLOCK)
    with pytest.raises(ShardError, match=rf"wrong checksum .*{SHARD}"):
        ShardSet(copy).read(row)


def test_flipped_byte_in_whisper_features(copy: Path) -> None:
    row, _, _ = third_sample(copy)
    offset = int(ShardSet(copy).index["mel_offset"][row])
    change(copy / "mel-000001.tar", offset + 600, flip)
    shards = ShardSet(copy)
    shards.read(row)
    with pytest.raises(ShardError, match=rf"wrong checksum .*mel-000001\.tar, key \d+, offset {offset}"):
        shards.read(row, mels=True)


def equal_sized_set(folder: Path, first: int) -> Path:
    """Two shards of the same size."""
    writer = SetWriter(folder, IDS, ValidationSplit())
    writer.begin()
    for number in range(2):
        sample = synthetic_sample(7)
        key = f"{first + number:09d}"
        writer.write(number, [type(sample)(key, sample.meta, sample.tokens_2L, sample.codes_KT)], [])
    writer.finish(2, {"model": {"special_ids": IDS.to_dict()}})
    return folder


def test_swapped_shards(tmp_path: Path) -> None:
    folder = equal_sized_set(tmp_path / "set", 0)
    one, two = folder / "codes-000000.tar", folder / SHARD
    assert one.stat().st_size == two.stat().st_size
    one.rename(folder / "x")
    two.rename(one)
    (folder / "x").rename(two)
    with pytest.raises(ShardError, match=r"wrong checksum .*codes-000000\.tar, key 000000000, offset 0"):
        read_all(folder)


def test_stale_index_and_wrong_manifest(tmp_path: Path) -> None:
    """Files of another build of the same size: index or manifest do not fit the rest."""
    old, new = equal_sized_set(tmp_path / "old", 10), equal_sized_set(tmp_path / "new", 20)
    for name, message in (
        ("index.npy", r"the index is not the manifest's .*index\.npy.*expected xxh3.*got"),
        ("manifest.json", r"the index is not the manifest's .*index\.npy"),
    ):
        mixed = Path(shutil.copytree(new, tmp_path / f"mixed-{name}"))
        shutil.copy(old / name, mixed / name)
        with pytest.raises(ShardError, match=message):
            read_all(mixed)


@pytest.mark.parametrize("name", [SHARD, "mel-000002.tar", "index.npy"])
def test_missing_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(ShardError, match=rf"missing .*{name}"):
        read_all(copy)


def test_wrong_size(copy: Path) -> None:
    with (copy / SHARD).open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(ShardError, match=rf"wrong size .*{SHARD}"):
        read_all(copy)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ('{"format_version": 9}', "unknown format version"),
        ('{"format_version": 1}', "manifest is damaged: index"),
    ],
)
def test_damaged_manifest(copy: Path, text: str, message: str) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(Exception, match=rf"{message}.*manifest\.json") as raised:
        ShardSet(copy)
    assert raised.type.__name__ in ("ShardError", "UserError")


def test_damaged_zstandard_data() -> None:
    """Damage that a checksum over the stored bytes would not see, because it happened before they were stored."""
    sample = synthetic_sample(1, mel=True)
    member = encode_mels(sample)
    size = int(member[124:135], 8)
    data = member[TAR_BLOCK : TAR_BLOCK + size]

    def decode(payload: bytes) -> None:
        decode_mels(tar_member(f"{sample.key}.mel.npy.zst", payload), "here")

    decode(data)
    for cut in (1, 4, 5, size // 2, size - 1):
        with pytest.raises(ShardError, match=r"(truncated|damaged zstandard data).*here"):
            decode(data[:-cut])
    with pytest.raises(ShardError, match="bytes after the zstandard data"):
        decode(data + b"more")
    with pytest.raises(ShardError, match="damaged zstandard data"):
        decode(data[:20] + bytes([data[20] ^ 1]) + data[21:])
    compress = zstandard.ZstdCompressor(level=3).compress
    whole = zstandard.ZstdDecompressor().decompress(data)
    with pytest.raises(ShardError, match="the array ends early"):
        decode(compress(whole[:-2]))
    with pytest.raises(ShardError, match="not an array of this format"):
        decode(compress(whole + b"garbage"))


def test_manifest_names_every_byte(whole: Path) -> None:
    """What the manifest says of each file is what plain tools say of it."""
    import hashlib

    manifest = json.loads((whole / "manifest.json").read_bytes())
    entries = [*manifest["shards"], *manifest["mel_shards"], manifest["index"], manifest["rejects"]]
    for entry in entries:
        data = (whole / entry["name"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert {entry["name"] for entry in entries} | {"manifest.json"} == {path.name for path in whole.iterdir()}
