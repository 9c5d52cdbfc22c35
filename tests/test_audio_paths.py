"""Names of audio files as lists have them, and what is said where no file is found."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import preprocess
from higgs_tune.preprocess.input.audio_paths import AudioPaths
from higgs_tune.shards.errors import UserError


def clip(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.random.default_rng(seed).standard_normal(18000), 16000)


@pytest.mark.fast
def test_every_spelling_of_a_name_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    composed = unicodedata.normalize("NFC", "صوت أ é.wav")
    for name in ("wavs/a b.wav", "wavs/100%.wav", composed):
        clip(tmp_path / name)
    paths = AudioPaths(tmp_path)
    spaced = tmp_path / "wavs" / "a b.wav"
    for name in ("wavs/a b.wav", r"wavs\a b.wav", "wavs/a%20b.wav", r"wavs\a%20b.wav", "~/wavs/a b.wav", str(spaced)):
        assert Path(paths.locate(name)) == spaced
    for url in (
        f"file://{spaced}",
        f"file://localhost{spaced}",
        f"file:{spaced}",
        f"file://{str(spaced).replace(' ', '%20')}",
    ):
        assert Path(paths.locate(url)) == spaced
    assert paths.locate("wavs/100%.wav") == str(tmp_path / "wavs/100%.wav")  # the literal name wins
    assert Path(paths.locate(unicodedata.normalize("NFD", composed))) == tmp_path / composed
    assert paths.locate(r"wavs\none.wav") == str(tmp_path / r"wavs\none.wav")


def rows(folder: Path, names: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{name},text {i},s\n" for i, name in enumerate(names))
    (folder / "rows.csv").write_text("audio,text,speaker\n" + text)
    return folder / "rows.csv"


@pytest.mark.parametrize(
    ("lists", "start", "root"),
    [
        ("lists", "data", "data"),  # beside the list's folder, a child of the current one
        (".", "data", "data"),
        ("a/b/lists", ".", "."),  # a parent of the list's folder
        ("repo/lists", "repo", "."),  # paths climb out of the folder that they start from
    ],
)
def test_the_message_names_an_audio_root_that_works(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lists: str, start: str, root: str
) -> None:
    climbs = start != root
    names = [f"{'../other/' if climbs else ''}wavs/{i}.wav" for i in range(3)]
    (tmp_path / start).mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        clip((tmp_path / start / name).resolve(), i)
    monkeypatch.chdir(tmp_path)
    data = rows(tmp_path / lists, names)
    expected = rf"'missing_audio': 3.*--audio_root {(tmp_path / root).resolve()} finds 3 of 3$"
    with pytest.raises(UserError, match=expected):
        preprocess(toy, data, tmp_path / "out")
    assert preprocess(toy, data, tmp_path / "good", audio_root=tmp_path / root)["samples"] == 3
    if climbs:
        with pytest.raises(UserError, match=rf"'outside_audio_root': 3.*--audio_root {tmp_path} finds 3 of 3"):
            preprocess(toy, data, tmp_path / "out", audio_root=tmp_path / start)


def test_paths_of_another_machine_are_named(toy: Path, tmp_path: Path) -> None:
    clip(tmp_path / "wavs" / "0.wav")
    data = rows(tmp_path, ["/home/her/set/wavs/0.wav", "/home/her/set/wavs/1.wav"])
    with pytest.raises(UserError, match=r"wavs/0\.wav exists below .*: take /home/her/set/ off the paths"):
        preprocess(toy, data, tmp_path / "out")


def test_a_missing_file_is_named_before_a_missing_reference(toy: Path, tmp_path: Path) -> None:
    """Its path is the one that was looked for; a broken file and a URL are named first, too."""
    clip(tmp_path / "0.wav")
    clip(tmp_path / "1.wav", 1)
    (tmp_path / "broken.wav").write_bytes(b"no audio")
    lines: list[dict[str, Any]] = [
        {"audio": "0.wav", "text": "zero", "speaker": "a"},
        {"audio": "1.wav", "text": "one", "speaker": "a"},
        {"audio": "gone.wav", "text": "two", "speaker": "b"},
        {"audio": "broken.wav", "text": "three", "speaker": "c"},
        {"audio": "https://example.org/a.wav", "text": "four", "speaker": "d"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    summary = preprocess(toy, tmp_path / "rows.jsonl", tmp_path / "out")
    assert summary["rejects"] == {"missing_audio": 1, "unreadable_audio": 1, "remote_audio": 1}
    assert f"no such file: {tmp_path / 'gone.wav'}" in (tmp_path / "out" / "rejects.jsonl").read_text()
