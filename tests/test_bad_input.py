"""What people's data is like: every kind of bad input is a named reject or a clear error, and the rest is all there."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import struct
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import soundfile
from conftest import ROOT, preprocess
from higgs_tune.preprocess.audio.options import Flag
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.reader import ShardSet

OUTSIDE = "/etc/hostname"
FORMATS: dict[str, dict[str, Any]] = {
    "wav": {},
    "flac": {},
    "mp3": {},
    "ogg": {},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "aiff": {},
    "au": {},
    "w64": {},
    "rf64": {},
}


def entry(audio: Any = "good.wav", text: Any = "مرحبا", role: Any = "assistant", **more: Any) -> dict[str, Any]:
    """A sample; `audio` is the target's path, or its whole content part."""
    target = audio if isinstance(audio, dict) else {"type": "audio", "audio_url": audio}
    user = [{"type": "text", "text": "say"}, {"type": "audio", "audio_url": "good.wav"}]
    answer = [{"type": "text", "text": text}, target]
    return {"messages": [{"role": "user", "content": user}, {"role": role, "content": answer}], **more}


def with_messages(messages: Any) -> dict[str, Any]:
    return {"messages": messages}


def header(channels: int, rate: int, *, claimed: int) -> bytes:
    """A WAV header that says whatever it is told."""
    width = 2 * channels
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * width, width, 16)
    sizes = [struct.pack("<I", size) for size in (36 + claimed, len(form), claimed)]
    return b"RIFF" + sizes[0] + b"WAVEfmt " + sizes[1] + form + b"data" + sizes[2]


def make_files(root: Path) -> None:
    """The audio files that the corpus names, in `root`."""
    rng = np.random.default_rng(0)
    noise = 0.1 * rng.standard_normal((24000, 1))
    soundfile.write(root / "good.wav", noise[:8000], 16000)
    soundfile.write(root / "other.wav", -noise[:9600], 24000)
    for kind, container in FORMATS.items():
        soundfile.write(root / f"whole.{kind}", noise, 24000, **container)
        whole = (root / f"whole.{kind}").read_bytes()
        (root / f"head.{kind}").write_bytes(whole[:40])
        (root / f"half.{kind}").write_bytes(whole[: len(whole) // 2])
    whole = (root / "whole.wav").read_bytes()
    (root / "claims twice.wav").write_bytes(whole[:40] + struct.pack("<I", 96000) + whole[44:])
    (root / "claims half.wav").write_bytes(whole[:40] + struct.pack("<I", 24000) + whole[44:])
    (root / "nothing.wav").write_bytes(b"")
    (root / "text.wav").write_text("this is no audio\n" * 100)
    (root / "zeros.flac").write_bytes(bytes(4096))
    soundfile.write(root / "nan.wav", np.full(8000, np.nan), 16000, subtype="FLOAT")
    soundfile.write(root / "inf.wav", np.full(8000, np.inf), 16000, subtype="FLOAT")
    soundfile.write(root / "integers.wav", np.round(32767 * noise), 24000, subtype="FLOAT")
    soundfile.write(root / "huge.wav", 1e30 * noise, 24000, subtype="FLOAT")
    soundfile.write(root / "surround.wav", np.tile(noise, 8), 48000)
    soundfile.write(root / "one.wav", noise[:1], 16000)
    soundfile.write(root / "empty.wav", np.zeros(0), 16000)
    (root / "mute.wav").write_bytes(header(0, 16000, claimed=3200) + bytes(3200))
    (root / "rateless.wav").write_bytes(header(1, 0, claimed=3200) + bytes(3200))
    (root / "slow.wav").write_bytes(header(1, 1, claimed=3200) + bytes(3200))
    ten_hours = 10 * 3600 * 16000 * 2
    with (root / "hours.wav").open("wb") as file:
        file.write(header(1, 16000, claimed=ten_hours))
        file.truncate(44 + ten_hours)  # sparse: no disk, but real to a reader
    (root / "folder.wav").mkdir()
    os.mkfifo(root / "pipe.wav")
    (root / "loop.wav").symlink_to(root / "pool.wav")
    (root / "pool.wav").symlink_to(root / "loop.wav")
    (root / "dangling.wav").symlink_to(root / "gone.wav")
    (root / "escape.wav").symlink_to(OUTSIDE)


def cut(**options: Any) -> dict[str, Any]:
    return {"type": "audio", "audio_url": "other.wav", **options}


def corpus() -> dict[str, tuple[Any, str]]:
    """Entry (or raw line) and expected reason, by name."""
    inline = base64.b64encode(b"RIFF but no more").decode()
    text = {"type": "text", "text": "hello"}
    samples: dict[str, tuple[Any, str]] = {
        "missing": (entry("nowhere.wav"), "missing_audio"),
        "dangling link": (entry("dangling.wav"), "missing_audio"),
        "no bytes": (entry("nothing.wav"), "unreadable_audio"),
        "text as audio": (entry("text.wav"), "unreadable_audio"),
        "zeros as flac": (entry("zeros.flac"), "unreadable_audio"),
        "half a wav": (entry("half.wav"), "truncated_audio"),
        "half a flac": (entry("half.flac"), "unreadable_audio"),
        "half an mp3": (entry("half.mp3"), "truncated_audio"),
        "half an ogg": (entry("half.ogg"), "truncated_audio"),
        "half an opus": (entry("half.opus"), "truncated_audio"),
        "half an aiff": (entry("half.aiff"), "truncated_audio"),
        "half an au": (entry("half.au"), "truncated_audio"),
        "half a w64": (entry("half.w64"), "truncated_audio"),
        "half an rf64": (entry("half.rf64"), "truncated_audio"),
        "more samples claimed": (entry("claims twice.wav"), "truncated_audio"),
        "fewer samples claimed": (entry("claims half.wav"), "truncated_audio"),
        "integers as floats": (entry("integers.wav"), "out_of_range"),
        "beyond any microphone": (entry("huge.wav"), "out_of_range"),
        "not a number": (entry("nan.wav"), "non_finite_audio"),
        "infinite": (entry("inf.wav"), "non_finite_audio"),
        "no channels": (entry("mute.wav"), "unreadable_audio"),
        "no rate": (entry("rateless.wav"), "unreadable_audio"),
        "1 Hz": (entry("slow.wav"), "too_long"),
        "7.1": (entry("surround.wav"), "too_many_channels"),
        "one sample": (entry("one.wav"), "too_short"),
        "no samples": (entry("empty.wav"), "empty_audio"),
        "ten hours": (entry("hours.wav"), "too_long"),
        "folder": (entry("folder.wav"), "unreadable_audio"),
        "pipe": (entry("pipe.wav"), "unreadable_audio"),
        "link loop": (entry("loop.wav"), "unreadable_audio"),
        "NUL in a name": (entry("good.wav\0.txt"), "unreadable_audio"),
        "name without end": (entry("a" * 5000), "unreadable_audio"),
        "path traversal": (entry("../" * 9 + OUTSIDE[1:]), "outside_audio_root"),
        "absolute path": (entry(OUTSIDE), "outside_audio_root"),
        "link to the outside": (entry("escape.wav"), "outside_audio_root"),
        "device": (entry("/dev/zero"), "outside_audio_root"),
        "URL": (entry("https://example.org/a.wav"), "remote_audio"),
        "arrow cell of nothing": (entry("data.arrow#audio:3"), "missing_audio"),
        "raw_audio is no base64": (entry({"type": "audio", "raw_audio": "%%%"}), "unreadable_audio"),
        "raw_audio is no audio": (entry({"type": "audio", "raw_audio": inline}), "unreadable_audio"),
        "raw_audio is a number": (entry({"type": "audio", "audio_url": "", "raw_audio": 7}), "malformed_chatml"),
        "cut after the end": (entry(cut(offset=5)), "cut_outside_audio"),
        "cut over the end": (entry(cut(offset=0.1, duration=3)), "cut_outside_audio"),
        "cut without end": (entry(cut(offset=10**400)), "cut_outside_audio"),
        "cut after all time": (entry(cut(offset=1e308)), "cut_outside_audio"),
        "cut of all time": (entry(cut(duration=1e308)), "too_long"),
        "offset is NaN": (entry(cut(offset=float("nan"))), "malformed_chatml"),
        "offset is Infinity": (entry(cut(offset=float("inf"))), "malformed_chatml"),
        "duration is NaN": (entry(cut(duration=float("nan"))), "malformed_chatml"),
        "duration is Infinity": (entry(cut(duration=float("inf"))), "malformed_chatml"),
        "offset beyond numbers": (json.dumps(entry(cut(offset=7))).replace("7", "1e999"), "malformed_chatml"),
        "cut of an hour": (entry(cut(duration=3600)), "too_long"),
        "cut of nothing": (entry(cut(duration=1e-6)), "empty_audio"),
        "negative offset": (entry(cut(offset=-1)), "malformed_chatml"),
        "offset in words": (entry(cut(offset="one")), "malformed_chatml"),
        "no path": (entry({"type": "audio"}), "malformed_chatml"),
        "path is a number": (entry(7), "malformed_chatml"),
        "empty text": (entry(text=""), "empty_text"),
        "blank text": (entry(text=" \t\n"), "empty_text"),
        "marks without a letter": (entry(text="\u200f"), "empty_text"),
        "marks and spaces": (entry(text=" \u200b\ufeff "), "empty_text"),
        "no text": (entry(text=None), "malformed_chatml"),
        "control characters": (entry(text="one\x07two\x1b[31m"), "control_character"),
        "NUL in text": (entry(text="one\0two"), "control_character"),
        "100 k characters": (entry(text="word " * 20_000), "text_too_long"),
        "half a surrogate pair": (entry(text="\ud800"), "invalid_unicode"),
        "not UTF-8": (b'{"id": "not UTF-8", "messages": [{"role": "user", "content": "\xff\xfe"}]}', "invalid_unicode"),
        "audio token in text": (entry(text="a <|AUDIO_OUT|> b"), "template_token_in_text"),
        "turn token in text": (entry(text="a <|eot_id|> b"), "template_token_in_text"),
        "turn token in recipient": (
            with_messages([{"role": "assistant", "content": "a", "recipient": "<|eot_id|>"}]),
            "template_token_in_text",
        ),
        "unknown role": (entry(role="narrator"), "unknown_role"),
        "role is a list": (entry(role=["user"]), "unknown_role"),
        "no messages": ({"text": "hello"}, "malformed_chatml"),
        "zero messages": (with_messages([]), "malformed_chatml"),
        "messages in words": (with_messages("hello"), "malformed_chatml"),
        "message in words": (with_messages(["hello"]), "malformed_chatml"),
        "no content": (with_messages([{"role": "user"}]), "malformed_chatml"),
        "zero content": (with_messages([{"role": "user", "content": []}]), "empty_text"),
        "video": (with_messages([{"role": "user", "content": [{"type": "video"}]}]), "malformed_chatml"),
        "user to a recipient": (
            with_messages([{"role": "user", "content": [text], "recipient": "x"}]),
            "malformed_chatml",
        ),
        "only a user": (with_messages([{"role": "user", "content": [text]}]), "nothing_to_train"),
        "start after the end": (entry(start_index=9), "nothing_to_train"),
        "start before the start": (entry(start_index=-1), "malformed_chatml"),
        "start in words": (entry(start_index="one"), "malformed_chatml"),
        "misc is a list": (entry(misc=[1]), "malformed_chatml"),
        "speaker is an object": (entry(speaker={"a": 1}), "malformed_chatml"),
        "speaker is true": (entry(speaker=True), "malformed_chatml"),
        "a word as a line": ('"hello"', "malformed_chatml"),
        "half a line": ('{"messages": [{"role": "user"', "invalid_json"),
        "nesting without end": ("[" * 100_000, "invalid_json"),
        "integer without end": ('{"messages": ' + "9" * 5000 + "}", "invalid_json"),
        "same id again": (entry(id="good 0"), "duplicate_id"),
    }
    for kind in FORMATS:
        reason = "unreadable_audio" if kind in ("flac", "mp3") else "truncated_audio"
        samples[f"head of {kind}"] = (entry(f"head.{kind}"), reason)
    return samples


def as_line(name: str, given: Any) -> bytes:
    if isinstance(given, dict):
        return json.dumps({"id": name, **given}).encode()
    return given if isinstance(given, bytes) else given.encode()


def test_every_kind_is_a_named_reject_and_nothing_else_is_lost(toy: Path, tmp_path: Path) -> None:
    make_files(tmp_path)
    bad = corpus()
    assert len(bad) >= 40
    lines: list[bytes] = []
    good_at, bad_at = {}, {}
    for i, (name, (given, reason)) in enumerate(bad.items()):
        good_at[len(lines)] = "other.wav" if i % 2 else "good.wav"
        more = {"speaker": "\0\u202e", "id": f"good {i}", "misc": {"snr": float("nan"), "peak": float("inf")}}
        lines.append(as_line(f"good {i}", entry(good_at[len(lines)], **more)))
        bad_at[len(lines)] = (name, reason)
        lines.append(as_line(name, given))
    (tmp_path / "data.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    summary = preprocess(toy, tmp_path / "data.jsonl", tmp_path / "out", audio_root=tmp_path, samples_per_shard=50)

    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    named = {reject["position"]: (bad_at[reject["position"]][0], reject["reason"]) for reject in rejects}
    assert named == bad_at
    assert all(reject["detail"] for reject in rejects)
    broken = [reject for reject in rejects if reject["reason"] == "invalid_json"]
    assert broken
    assert all(reject["detail"].startswith(f"line {reject['position'] + 1}: ") for reject in broken)
    assert summary["samples"] == len(good_at)
    shards = ShardSet(tmp_path / "out")
    for row, name in enumerate(good_at.values()):
        meta = shards.read(row).meta
        assert meta["misc"] == {"snr": None, "peak": None}
        segments = meta["segments"]
        digests = [hashlib.sha256((tmp_path / file).read_bytes()).hexdigest() for file in ("good.wav", name)]
        assert [segment["sha256"] for segment in segments] == digests


def test_every_reason_is_documented() -> None:
    source = "".join(file.read_text() for file in (ROOT / "preprocess").rglob("*.py"))
    reasons = set(re.findall(r'Reject\(\s*"([a-z_]+)"', source)) | set(get_args(Flag))
    table = (ROOT / "docs" / "preprocessing.md").read_text().split("## Rejects")[1]
    assert set(re.findall(r"`([a-z_]+)`", "".join(re.findall(r"^\|([^|]*)\|", table, re.MULTILINE)))) == reasons


def test_files_may_be_anywhere_below_the_root(toy: Path, tmp_path: Path) -> None:
    """Absolute paths and links are fine as long as they stay; without a root they may lead anywhere."""
    (tmp_path / "root").mkdir()
    make_files(tmp_path / "root")
    (tmp_path / "root" / "link.wav").symlink_to("good.wav")
    absolute = str(tmp_path / "root" / "good.wav")
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(entry(audio)) for audio in (absolute, "link.wav", "sub/../good.wav")))
    (tmp_path / "root" / "sub").mkdir()
    summary = preprocess(toy, data, tmp_path / "out", audio_root=tmp_path / "root")
    assert (summary["samples"], summary["clips"]) == (3, 1)  # one file under four names is encoded once
    shards = ShardSet(tmp_path / "out")
    sources = [[segment["source"] for segment in shards.read(row).meta["segments"]] for row in range(3)]
    assert sources == [["good.wav", name] for name in (absolute, "link.wav", "sub/../good.wav")]
    data.write_text(json.dumps(entry(absolute)).replace('"good.wav"', f'"{absolute}"'))
    assert preprocess(toy, data, tmp_path / "free")["samples"] == 1


def test_flags_mark_clips_and_reject_them_on_demand(toy: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "good.wav", 0.1 * rng.standard_normal(8000), 16000)
    soundfile.write(tmp_path / "silent.wav", 1e-5 * rng.standard_normal(8000), 16000)
    soundfile.write(tmp_path / "loud.wav", np.clip(2 * rng.standard_normal(8000), -1, 1), 16000)
    data = tmp_path / "data.json"
    data.write_text(json.dumps([entry(name) for name in ("good.wav", "silent.wav", "loud.wav")]))
    assert preprocess(toy, data, tmp_path / "kept")["flags"] == {"silence": 1, "clipping": 1}
    shards = ShardSet(tmp_path / "kept")
    flags = [shards.read(row).meta["segments"][1].get("flags") for row in range(3)]
    assert flags == [None, ["silence"], ["clipping"]]
    strict = preprocess(toy, data, tmp_path / "strict", reject_flags=("silence", "clipping"))
    assert strict["rejects"] == {"silence": 1, "clipping": 1}
    level = preprocess(toy, data, tmp_path / "level", loudness_lufs=-23.0)
    assert level["rejects"] == {"unmeasurable_loudness": 1}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a ChatML file or manifest"),
        (b"hello", "not a ChatML file or manifest"),
        (b"\x00\xff\xfe\x01" * 99, "not a ChatML file or manifest"),
        (b"[{]", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "the data holds no samples"),
        (b'{\n "messages": []\n}\n', "a JSON object over several lines"),
        (b'[{"audio": "a.wav", "text": "hello"}]', r"lacks columns .*expected \['speaker'\]"),
    ],
)
def test_unusable_data_is_refused(toy: Path, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        preprocess(toy, tmp_path / "data.json", tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
