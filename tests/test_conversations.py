"""Conversations of other tools: each audio is where that tool means it, and what does not match is a named reject."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import preprocess
from higgs_tune.preprocess.input.chatml import parse_entry
from higgs_tune.preprocess.input.conversations import as_chatml
from higgs_tune.preprocess.reject import Reject
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.reader import ShardSet

INLINE = base64.b64encode(b"some bytes").decode()


def shown(part: Any) -> str:
    return getattr(part, "text", None) or getattr(part, "raw_audio", None) or getattr(part, "audio_url", "")


def layout(entry: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """(role, texts and audio paths in order) of each message, as parsed; inline audio as its base64."""
    messages = parse_entry(as_chatml(entry), 0).chat.messages
    parts = [(message.role, message.content) for message in messages]
    return [
        (
            role,
            [getattr(p, "text", None) or getattr(p, "raw_audio", None) or getattr(p, "audio_url", "") for p in content],
        )
        for role, content in parts
        if isinstance(content, list)
    ]


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


WANTED = [("user", ["a.wav", "say"]), ("assistant", ["hello", "b.wav"])]


@pytest.mark.parametrize(
    "entry",
    [
        {"messages": [turn("user", "<audio>say"), turn("assistant", "hello<audio>")], "audios": ["a.wav", "b.wav"]},
        {"messages": [turn("user", "<audio>say"), turn("assistant", "hello<audio>")],
         "audio": [{"path": "a.wav"}, {"path": "b.wav"}]},
        {"conversations": [{"from": "human", "value": "<audio>say"}, {"from": "gpt", "value": "hello<audio>"}],
         "audios": ["a.wav", "b.wav"]},
        {"messages": [turn("user", "<audio>a.wav</audio>say"), turn("assistant", "hello<audio>b.wav</audio>")]},
        {"messages": [turn("user", [{"type": "audio", "audio": "a.wav"}, {"type": "text", "text": "say"}]),
                      turn("assistant", [{"text": "hello"}, {"audio": "b.wav"}])]},
        {"messages": [turn("user", [{"type": "audio", "path": "a.wav"}, "say"]),
                      turn("assistant", ["hello", {"type": "audio_url", "audio_url": {"url": "b.wav"}}])]},
        {"messages": [turn("user", [{"type": "audio"}, {"type": "text", "text": "say"}]),
                      turn("assistant", [{"type": "text", "text": "hello<audio>"}])], "audio_path": ["a.wav", "b.wav"]},
        {"messages": [turn("user", "<audio>say", audios=["a.wav"]), turn("assistant", "hello<audio>", audio="b.wav")]},
        {"messages": [turn("user", [{"type": "audio", "audio_url": "a.wav"}, "say"]),
                      turn("assistant", ["hello", {"type": "audio", "audio_url": "b.wav"}])], "audios": ["b.wav"]},
    ],
)  # fmt: skip
def test_every_form_means_the_same(entry: dict[str, Any]) -> None:
    assert layout(entry) == WANTED
    assert layout(as_chatml(entry)) == WANTED  # a restart reads what was stored


@pytest.mark.fast
def test_bytes_and_data_urls_are_inline_audio() -> None:
    part: dict[str, Any]
    for part in (
        {"type": "audio", "audio": f"data:audio/wav;base64,{INLINE}"},
        {"type": "audio", "audio_url": f"data:audio/wav;base64,{INLINE}"},
        {"type": "input_audio", "input_audio": {"data": INLINE, "format": "wav"}},
        {"type": "audio", "audio": {"bytes": b"some bytes", "path": "gone.wav"}},
    ):
        assert layout({"messages": [turn("assistant", [part])]}) == [("assistant", [INLINE])]


def test_a_system_text_beside_the_messages_comes_first() -> None:
    entry = {"system": "be kind", "messages": [turn("user", "say"), turn("assistant", "hello")], "start_index": 1}
    assert layout(entry)[0] == ("system", ["be kind"])
    assert as_chatml(entry)["start_index"] == 2


@pytest.mark.parametrize(
    ("entry", "detail"),
    [
        (
            {"messages": [turn("assistant", "<audio>hello")], "audios": ["a.wav", "b.wav"]},
            "1 <audio> tags.* 2 audio files",
        ),
        ({"messages": [turn("assistant", "<audio><audio>")], "audios": ["a.wav"]}, "2 <audio> tags.* 1 audio files"),
        ({"messages": [turn("assistant", "<audio>hello")]}, "1 <audio> tags.* 0 audio files"),
        ({"messages": [turn("assistant", "hello")], "audios": ["a.wav"]}, "1 audio files, but no <audio> tag"),
        ({"messages": [turn("assistant", "hello")], "audio_path": "a.wav"}, "no <audio> tag"),
        ({"messages": [turn("assistant", "hello")], "speech_file": "a.wav"}, "speech_file names audio that no message"),
        ({"messages": [turn("assistant", "<audio>")], "audios": ["a.wav"], "wavs": ["b.wav"]}, "one list of audio"),
        ({"messages": [turn("assistant", "<audio>")], "audios": [7]}, "audio: expected a path, got 7"),
        ({"messages": [turn("assistant", "a")], "conversations": []}, "got both"),
        ({"messages": [turn("assistant", "a")], "images": ["a.png"]}, "text and audio only"),
        ({"messages": [turn("assistant", "a", loss=False)]}, "a message without loss"),
        ({"messages": [turn("system", "a"), turn("assistant", "a")], "system": "b"}, "got both"),
        ({"messages": [turn("assistant", [{"type": "audio", "audio": "a.wav", "path": "b.wav"}])]}, "several files"),
    ],
)
def test_what_does_not_match_is_rejected(entry: dict[str, Any], detail: str) -> None:
    with pytest.raises(Reject, match=detail) as reject:
        as_chatml(entry)
    assert reject.value.reason == "malformed_chatml"


def test_tagged_audio_is_built_and_a_set_without_a_target_is_refused(toy: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in "ab":
        soundfile.write(tmp_path / f"{name}.wav", 0.1 * rng.standard_normal(8000), 16000)
    good = {"messages": [turn("user", "<audio>say"), turn("assistant", "<audio>hello")], "audios": ["a.wav", "b.wav"]}
    bad = good | {"audios": ["a.wav"], "id": "short"}
    heard = {"messages": [turn("user", "<audio>what is said?"), turn("assistant", "hello")], "audios": ["a.wav"]}
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, [good, bad, heard])))
    assert preprocess(toy, data, tmp_path / "out")["rejects"] == {"malformed_chatml": 1}
    assert "short" in (tmp_path / "out" / "rejects.jsonl").read_text()
    segments = ShardSet(tmp_path / "out").read(0).meta["segments"]
    assert [(segment["role"], segment["source"]) for segment in segments] == [("user", "a.wav"), ("assistant", "b.wav")]
    data.write_text("\n".join(map(json.dumps, [heard, heard | {"id": "again"}])))
    with pytest.raises(UserError, match=r"no sample has an audio target.*--allow_text_only"):
        preprocess(toy, data, tmp_path / "text")
    assert preprocess(toy, data, tmp_path / "text", allow_text_only=True)["samples"] == 2
