"""Whole files stay whole: joined recordings, wrong headers, tags, foreign bytes; lost samples are a named reject."""

from __future__ import annotations

import base64
import io
import json
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import preprocess
from higgs_tune.preprocess.audio import flac, mp3
from higgs_tune.preprocess.audio.audio import clip_seconds, load_clip
from higgs_tune.preprocess.audio.clip import Clip, Waveform
from higgs_tune.preprocess.audio.containers import split
from higgs_tune.preprocess.audio.opening import open_audio
from higgs_tune.preprocess.audio.options import AudioOptions
from higgs_tune.preprocess.audio.parts import FileData
from higgs_tune.preprocess.check import check_data
from higgs_tune.preprocess.config import PreprocessConfig
from higgs_tune.preprocess.reject import Reject
from higgs_tune.shards.reader import ShardSet

ANY = AudioOptions(0.0, 60.0)
RATE = 24_000
KINDS: dict[str, dict[str, Any]] = {
    "mp3": {"format": "MP3"},
    "vbr": {"format": "MP3", "bitrate_mode": "VARIABLE", "compression_level": 0.3},
    "vorbis": {"format": "OGG", "subtype": "VORBIS"},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "flac": {"format": "FLAC"},
    "wav": {"format": "WAV"},
    "odd": {"format": "WAV", "subtype": "PCM_U8"},
    "rf64": {"format": "RF64"},
    "aiff": {"format": "AIFF"},
    "w64": {"format": "W64"},
    "au": {"format": "AU"},
}
ID3 = b"ID3\x03\0\0\0\0\x02\x0a" + bytes(266)
ID3V1 = b"TAG" + bytes(125)
APE = (
    b"APETAGEX"
    + (2000).to_bytes(4, "little")
    + (42).to_bytes(4, "little")
    + bytes(4)
    + b"\0\0\0\x80"
    + bytes(8)
    + bytes(10)
)


def sound(seconds: float, seed: int = 0, rate: int = RATE, channels: int = 1) -> np.ndarray:
    """A gliding tone in noise, float32 [S, C]."""
    at = np.arange(int(seconds * rate)) / rate
    noise = 0.02 * np.random.default_rng(seed).standard_normal((len(at), channels))
    return (0.3 * np.sin(2 * np.pi * (200 + 50 * seed + 300 * at) * at)[:, None] + noise).astype(np.float32)


def stored(wave_SC: np.ndarray, kind: str, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave_SC, rate, **KINDS[kind])
    return file.getvalue()


def decoded(data: bytes) -> np.ndarray:
    """libsndfile's samples of one recording, mixed to mono."""
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        return np.mean(file.read(dtype="float32", always_2d=True), axis=1)


def load(data: bytes, rate: int = RATE, **cut: float) -> Waveform:
    """Through base64, as a part of the data."""
    clip = Clip("inline:x", "", base64.b64encode(data).decode())
    return load_clip(replace(clip, **cut), rate, ANY)


def rejected(data: bytes) -> str:
    with pytest.raises(Reject) as error:
        load(data)
    return str(error.value)


@pytest.mark.fast
@pytest.mark.parametrize("kind", KINDS)
def test_joined_files_are_read_whole(kind: str, tmp_path: Path) -> None:
    """Three parts of a form: the samples are those of each part, in order; cuts may cross the seams."""
    parts = [stored(sound(seconds, i), kind) for i, seconds in enumerate((0.50005, 0.8, 0.3))]
    expected = np.concatenate([decoded(part) for part in parts])
    wave = load(b"".join(parts))
    np.testing.assert_array_equal(wave.samples_S, expected)
    path = tmp_path / "joined"
    path.write_bytes(b"".join(parts))
    clip = Clip("joined", str(path))
    np.testing.assert_array_equal(load_clip(clip, RATE, ANY).samples_S, expected)
    assert clip_seconds(clip, ANY) == wave.seconds == len(expected) / RATE
    cut = load_clip(replace(clip, offset_s=0.25, duration_s=1.2), RATE, ANY).samples_S
    settled = 1152 if kind in ("mp3", "vbr", "vorbis", "opus") else 0  # decoders settle after a seek
    np.testing.assert_allclose(cut[settled:], expected[6000:34800][settled:], atol=2e-3 if settled else 0)


@pytest.mark.fast
@pytest.mark.parametrize("kind", KINDS)
def test_tags_and_foreign_bytes_do_no_harm(kind: str) -> None:
    """Behind the file, before it where libsndfile knows the tag, and between joined files."""
    data = stored(sound(0.7), kind)
    expected = decoded(data)
    foreign = np.random.default_rng(0).bytes(3000)
    for around in ((b"", ID3V1), (b"", APE), (b"", bytes(5000)), (b"", foreign), (ID3, ID3V1)):
        np.testing.assert_array_equal(load(around[0] + data + around[1]).samples_S, expected)
    for between in (ID3, ID3V1, bytes(999)):
        np.testing.assert_array_equal(load(data + between + data).samples_S, np.concatenate([expected, expected]))


@pytest.mark.fast
@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_different_form_are_rejected_by_name(kind: str) -> None:
    data = stored(sound(0.5), kind)
    for other, form in ((stored(sound(0.5, rate=16000), kind, 16000), "16000 Hz mono"),
                        (stored(sound(0.5, channels=2), kind), "24000 Hz 2 channels")):  # fmt: skip
        said = rejected(data + other)
        if kind == "opus" and "16000" in form:
            continue  # every Opus stream decodes at the rate that its header names
        assert said.startswith(
            "joined_audio: the file holds 2 recordings of different form: 24000 Hz mono, then " + form
        )


@pytest.mark.parametrize("rate", [8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2])
def test_mp3_frames_are_counted(rate: int, channels: int) -> None:
    """Of every rate of MPEG 1, 2 and 2.5: as many as the encoder wrote into its header, and no byte is left over."""
    for kind in ("mp3", "vbr"):
        data = stored(sound(1.0, rate=rate, channels=channels), kind, rate)
        (part,) = mp3.recordings(data, 0)
        assert part.frames is None
        assert not part.head
        assert (part.ranges[0][0], part.ranges[-1][1]) == (0, len(data))


def without_xing(data: bytes) -> bytes:
    (part,) = mp3.recordings(data, 0)
    return data[part.ranges[0][1] :]


@pytest.mark.fast
@pytest.mark.parametrize("loud_first", [True, False])
def test_mp3_of_variable_bit_rate_without_its_header(loud_first: bool) -> None:
    """As streams and editors leave it: all frames, sample for sample; joined too, and with a tag in between."""
    noise = np.random.default_rng(0).standard_normal((44100, 1)).astype(np.float32)
    pieces = [0.2 * noise, 0.02 * sound(4.0, rate=44100)]
    data = stored(np.concatenate(pieces if loud_first else pieces[::-1]), "vbr", 44100)
    expected, bare = decoded(data), without_xing(data)
    found = load(bare, 44100).samples_S
    assert 0 <= len(found) - len(expected) < 3 * 1152
    shift = next(i for i in range(3 * 1152) if np.array_equal(found[i : i + 99], expected[:99]))
    np.testing.assert_array_equal(found[shift : shift + len(expected)], expected)
    assert load(bare + ID3 + bare, 44100).seconds == pytest.approx(2 * 5, abs=0.2)
    assert load(data + bare, 44100).seconds == pytest.approx(2 * 5, abs=0.2)
    assert load(np.random.default_rng(1).bytes(500) + bare, 44100).seconds == pytest.approx(5, abs=0.1)


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["mp3", "vbr", "vorbis", "opus", "flac", "aiff", "w64", "au", "rf64"])
def test_a_part_without_its_end_is_rejected(kind: str) -> None:
    data = stored(sound(1.0), kind)
    half = data[: len(data) // 2]
    for joined in (half, data + half, *([half + data] if kind in ("mp3", "vbr", "vorbis", "opus", "flac") else [])):
        assert rejected(joined).startswith(("truncated_audio: ", "unreadable_audio: "))


PCM = (sound(2.0, rate=16000) * 32767).astype("<i2").tobytes()
FMT = b"fmt " + struct.pack("<IHHIIHH", 16, 1, 1, 16000, 32000, 2, 16)
LIST = b"LIST" + (26).to_bytes(4, "little") + b"INFOISFT" + (14).to_bytes(4, "little") + b"Lavf60.16.100\0"


def riff(body: bytes, size: int | None = None) -> bytes:
    return b"RIFF" + (4 + len(body) if size is None else size).to_bytes(4, "little") + b"WAVE" + body


def chunk(size: int | None = None, pcm: bytes = PCM) -> bytes:
    return b"data" + (len(pcm) if size is None else size).to_bytes(4, "little") + pcm


BODY = FMT + chunk()
RIFF_SIZES = (0, 36, 100, len(BODY) - 4, len(BODY) + 12, len(BODY) + 104, 2**32 - 1)
PIPE_SIZES = [
    (0, 0),
    (36, 0),
    (2**32 - 1, 2**32 - 1),
    (0x7FFFF024, 0x7FFFF000),
    (0x80000024, 0x80000000),
    (0, 2**32 - 1),
]
DS64 = b"ds64" + struct.pack("<IQQQI", 28, 0, 0, 0, 0)
WAVS = {
    "plain": riff(BODY),
    **{f"riff {size}": riff(BODY, size) for size in RIFF_SIZES},
    **{f"pipe {outer:x} {inner:x}": riff(FMT + chunk(inner), outer) for outer, inner in PIPE_SIZES},
    "pipe with a list before": riff(FMT + LIST + chunk(0), 0),
    "list after": riff(BODY + LIST),
    "list before": riff(FMT + LIST + chunk()),
    "list cut off": riff(BODY + LIST, len(BODY) + 38)[:-9],
    "long chunk cut off": riff(BODY, 2**20) + b"LIST" + (2**20).to_bytes(4, "little") + bytes(range(1, 256)) * 99,
    "ID3v1 after": riff(BODY) + ID3V1,
    "ID3 before": ID3 + riff(BODY),
    "zeros after": riff(BODY) + bytes(4096),
    "junk after": riff(BODY) + np.random.default_rng(0).bytes(4000),
    "RF64 of a pipe": b"RF64" + b"\xff" * 4 + b"WAVE" + DS64 + FMT + chunk(2**32 - 1),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", WAVS)
def test_wav_files_are_judged_by_their_samples(name: str) -> None:
    wave = load(WAVS[name], 16000)
    np.testing.assert_array_equal(wave.samples_S, np.frombuffer(PCM, "<i2").astype(np.float32) / 32768)


@pytest.mark.fast
def test_joined_wav_files_of_pipes() -> None:
    for sizes in ((0, 0), (2**32 - 1, 2**32 - 1), (None, None)):
        one = riff(FMT + chunk(sizes[1]), sizes[0])
        assert load(one * 3, 16000).seconds == 6.0
    odd = riff(FMT + chunk(None, PCM[:-1]) + b"\0" + LIST)
    assert load(odd + riff(FMT + chunk(None, PCM[:-1]) + LIST) + odd, 16000).seconds == 3 * 31999 / 16000


@pytest.mark.fast
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            riff(FMT + chunk(2 * len(PCM))),
            "truncated_audio: the header states 128000 .*the file has 64000",
        ),
        (riff(FMT + chunk(32000), len(BODY) + 4), "truncated_audio: .* 32000 bytes of samples, but 32000 more follow"),
        (riff(FMT + chunk(32000), 36 + 32000), "truncated_audio: .* 32000 bytes of samples, but 32000 more follow"),
        (riff(FMT + chunk(0, b"")), "empty_audio"),
        (riff(FMT + chunk(0, b"") + LIST), "empty_audio"),
    ],
)
def test_wav_files_that_lack_or_hide_samples(data: bytes, said: str) -> None:
    assert re.match(said, rejected(data))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        (
            "my voice.m4a",
            b"\0\0\0\x1cftypM4A \0\0\2\0isomiso2mp41" + bytes(99),
            "MPEG-4 .* ffmpeg -i 'my voice.m4a' -c:a",
        ),
        (
            "voice.wav",
            b"\x1aE\xdf\xa3\x9fB\x86\x81\x01" + bytes(99),
            "Matroska or WebM .* ffmpeg -i voice.wav -c:a flac",
        ),
        ("voice.amr", b"#!AMR\n" + b"\x3c" * 99, "an AMR file"),
        ("voice.wma", bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c") + bytes(99), "Windows Media"),
        ("voice.aac", b"\xff\xf1\x50\x80\x02\x1f\xfc" + bytes(99), "an AAC file"),
        ("lfs.wav", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.* git lfs pull"),
        ("page.wav", b"<!DOCTYPE html><html><body>403 Forbidden", "an HTML page; download"),
        ("denied.mp3", b'<?xml version="1.0"?><Error><Code>AccessDenied', "an XML document"),
        ("zeros.wav", bytes(9999), "nothing but zero bytes"),
        ("empty.wav", b"", "an empty file"),
        ("archive.wav", b"PK\x03\x04" + bytes(99), "a ZIP archive"),
    ],
)
def test_other_files_are_named(name: str, data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(Reject, match=f"unreadable_audio: .*, but .*{said}" if data else said):
        load_clip(Clip(name, str(tmp_path / name)), RATE, ANY)


@pytest.mark.fast
def test_flags_are_those_of_the_mix() -> None:
    """Of what is encoded: channels that cancel each other are silence, or nearly so."""
    wave_S = sound(1.0)[:, 0]
    for channels, flags in (
        ((wave_S, -wave_S), ("silence", "antiphase")),
        ((wave_S, -0.999 * wave_S), ("silence", "antiphase")),
        ((wave_S, -0.8 * wave_S), ("antiphase",)),
        ((wave_S, 0 * wave_S), ()),
        ((wave_S, wave_S), ()),
        ((wave_S, sound(1.0, seed=7)[:, 0]), ()),
        ((0 * wave_S, 0 * wave_S), ("silence",)),
    ):
        assert load(stored(np.stack(channels, 1), "flac")).flags == flags


@pytest.mark.fast
def test_blocks_of_a_file_are_its_bytes(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(200_000)
    (tmp_path / "data").write_bytes(data)
    with (tmp_path / "data").open("rb") as file:
        blocks = FileData(file)
        for begin, end in ((0, 4), (65530, 65550), (199_990, 200_010), (10, 10), (5, 150_000), (3, 9)):
            assert blocks[begin:end] == data[begin:end]
        for at in (0, 65_530, 131_071, 199_992):
            assert blocks.find(data[at : at + 8]) == at
        assert blocks.find(b"not in these bytes") == -1
        assert (blocks[7], len(blocks)) == (data[7], len(data))


def forms(folder: Path) -> dict[str, Callable[[], bytes]]:
    """Files of every kind of this page, by name."""
    one, other = stored(sound(0.6), "mp3"), stored(sound(0.6, rate=16000), "mp3", 16000)
    antiphase = np.concatenate([sound(0.6), -sound(0.6)], 1)
    return {
        "joined": lambda: one + one,
        "mixed": lambda: one + other,
        "half": lambda: one[: len(one) // 2],
        "cancelled": lambda: stored(antiphase, "flac"),
        "pipe": lambda: WAVS["pipe 24 0"],
        "page": lambda: b"<html>",
    }


def test_check_and_build_agree(toy: Path, tmp_path: Path) -> None:
    """Rejects and flags, one by one, and the lengths that are stored."""
    lines = []
    for name, make in forms(tmp_path).items():
        (tmp_path / name).write_bytes(make())
        lines.append(json.dumps({"id": name, "audio": name, "text": "hello", "speaker": "s"}))
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines))
    for flags in ((), ("antiphase",)):
        options: dict[str, Any] = {"ref_drop": 1.0, "reject_flags": flags}
        out = tmp_path / f"out-{len(flags)}"
        built = preprocess(toy, data, out, **options)
        expected = {"joined_audio": 1, "truncated_audio": 1, "unreadable_audio": 1}
        assert built["rejects"] == expected | dict.fromkeys(flags, 1)
        config = PreprocessConfig(data=data, model_path=toy / "model", check=True, num_processes=1, **options)
        report = check_data(config)
        assert report["rejects"] == built["rejects"]
        assert report["clips"]["flags"] == dict(built["flags"])
        shards = ShardSet(out)
        lengths = {shards.read(row).key: shards.read(row).meta["segments"][0]["seconds"] for row in range(len(shards))}
        wanted = {"joined": 1.2, "pipe": 2.0} | ({} if flags else {"cancelled": 0.6})
        assert lengths == pytest.approx(wanted)


@pytest.mark.fast
def test_usual_files_are_left_to_libsndfile() -> None:
    for kind in KINDS:
        (part,) = split(stored(sound(0.5), kind))
        assert (part.head, part.frames) == (b"", None)


@pytest.mark.parametrize("rate", [8000, 22_050, RATE, 48_000])
@pytest.mark.parametrize(("seconds", "stated"), [(2.0, 1), (2.0, 9000), (0.05, 100), (70.0, 24_000)])
def test_flac_headers_that_state_too_few_samples(seconds: float, stated: int, rate: int) -> None:
    """libsndfile plays only the stated ones."""
    whole = io.BytesIO()
    soundfile.write(whole, sound(seconds, rate=rate), rate, format="FLAC")
    data = bytearray(whole.getvalue())
    fields = int.from_bytes(data[18:26], "big")
    data[18:26] = (fields & ~flac.TOTAL | stated).to_bytes(8, "big")
    short = bytes(data)
    for file, times in ((short, 1), (short + ID3V1, 1), (short + short, 2), (whole.getvalue() + short, 2)):
        (part, *_), expected = split(file), int(seconds * rate) * times
        assert part.head or file.startswith(whole.getvalue())
        with open_audio(file, "voice.flac") as opened:
            assert opened.frames == expected
            assert len(opened.read(expected + 1)) == expected
