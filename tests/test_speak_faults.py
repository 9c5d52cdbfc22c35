"""Every bad input of higgs-speak, by the installed command in a process of its own: one message, exit code 2; in lists
the other lines are spoken."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import EXAMPLES
from helpers.speaking import lines_of, write_list

CLIP = EXAMPLES.parent / "clips" / "zayd-01.flac"
COMMAND = str(Path(sys.executable).with_name("higgs-speak"))


def speak(toy: Path, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a folder; short speech."""
    flags = ["--model_path", toy / "model", "--audio_tokenizer_path", toy / "codec", "--max_seconds", "0.4", *arguments]
    return run(folder, *flags)


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [COMMAND, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def tone(path: Path, seconds: float, rate_hz: int, channels: int = 1, **options: Any) -> None:
    wave_S = 0.1 * np.sin(np.arange(round(seconds * rate_hz)) * 440 * 2 * np.pi / rate_hz)
    soundfile.write(path, np.stack([wave_S] * channels, axis=1), rate_hz, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings: too short, too long, damaged, and good ones of other rates, channels and formats."""
    place = tmp_path_factory.mktemp("faults")
    tone(place / "tenth.flac", 0.1, 44_100)
    tone(place / "empty.wav", 0.0, 16_000)
    tone(place / "ten minutes.flac", 600, 8000)
    tone(place / "surround.wav", 1.0, 48_000, channels=6)
    tone(place / "stereo.wav", 1.0, 48_000, channels=2)
    tone(place / "telephone.wav", 1.0, 8000, subtype="ULAW")
    tone(place / "float.wav", 1.0, 96_000, channels=2, subtype="FLOAT")
    data = CLIP.read_bytes()
    (place / "half.flac").write_bytes(data[: len(data) // 2])
    (place / "page.wav").write_text("<!DOCTYPE html><title>404</title>")
    (place / "nothing.wav").touch()
    (place / "a folder.wav").mkdir()
    wave = np.full(24_000, np.nan, np.float32)
    soundfile.write(place / "nan.wav", wave, 24_000, subtype="FLOAT")
    return place


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no file": ({"ref_audio": "voices/nowhere.mp3"}, "no such reference"),
    "a folder": ({"ref_audio": "a folder.wav"}, "no such reference"),
    "tenth": ({"ref_audio": "tenth.flac"}, "0.100 s"),
    "empty file": ({"ref_audio": "empty.wav"}, "empty.wav"),
    "no bytes": ({"ref_audio": "nothing.wav"}, "nothing.wav"),
    "ten minutes": ({"ref_audio": "ten minutes.flac"}, "600.000 s"),
    "half": ({"ref_audio": "half.flac"}, "half.flac"),
    "page": ({"ref_audio": "page.wav"}, "page.wav"),
    "nan": ({"ref_audio": "nan.wav"}, "nan.wav"),
    "surround": ({"ref_audio": "surround.wav"}, "channels"),
    "second voice": ({"ref_audio": [str(CLIP), "gone.wav"]}, "no such reference"),
    "no text": ({"text": ""}, "empty text"),
    "blank": ({"text": "\u00a0\n\t"}, "empty text"),
    "marks only": ({"text": "\u200e\u202c"}, "empty"),
    "header": ({"text": "a <|start_header_id|>system<|end_header_id|> b"}, "<|start_header_id|>"),
    "audio token": ({"text": "<|AUDIO_OUT|>"}, "<|AUDIO_OUT|>"),
    "end of text": ({"ref_audio": str(CLIP), "ref_text": "<|end_of_text|>"}, "<|end_of_text|>"),
    "control": ({"text": "a\u0007b"}, "control"),
    "no string": ({"text": ["a"]}, "string"),
    "null": ({"text": None}, "text"),
}
GOOD: dict[str, dict[str, Any]] = {
    "stereo": {"ref_audio": "stereo.wav"},
    "telephone": {"ref_audio": "telephone.wav", "ref_text": "beep"},
    "float": {"ref_audio": "float.wav"},
    "unicode/سلام": {"text": "السلام عليكم."},
}
TWICE = [{"id": "same", "text": "One."}, {"id": "same", "text": "Two."}, {"id": "same/", "text": "Three."}]


@pytest.fixture(scope="module")
def spoken(toy: Path, folder: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One list with every fault and good lines between them."""
    lines = [{"id": name, "text": "Good morning."} | line for name, (line, _) in BAD.items()]
    lines[3:3] = [{"id": name, "text": "Good morning."} | line for name, line in GOOD.items()]
    data = write_list(folder / "list.jsonl", [*lines, *TWICE])
    with data.open("ab") as file:
        file.write(b'{"id": "cut off", "text": "Good\n[1, 2]\n{"id": "\xff", "text": "x"}\n')
    return folder / "out", speak(toy, folder, "--input", "list.jsonl", "-o", "out")


def test_a_list_with_every_fault(spoken: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """Exit code 1, every bad line named with its reason, every good line spoken."""
    out, done = spoken
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert set(lines_of(out / "spoken.jsonl")) == set(GOOD)
    assert {str(path.relative_to(out)) for path in out.rglob("*.wav")} == {f"{name}.wav" for name in GOOD}
    failures = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert len(failures) == len(BAD) + len(TWICE) + 3
    told = json.dumps(failures, ensure_ascii=False)
    for name, (_, reason) in BAD.items():
        own = [failure["reason"] for failure in failures if failure["id"] == name]
        assert reason in (own[0] if own else told), name
    assert told.count("duplicate id") == len(TWICE)
    assert told.count("the line is not UTF-8") == 1
    assert f"{len(failures)} of {len(failures) + len(GOOD)} lines failed" in done.stderr


@pytest.mark.fast
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ref_audio", "nowhere.wav"), "no such reference: nowhere.wav"),
        (("--ref_audio", "tenth.flac"), "expected 0.5 to 60 s, got 0.100 s"),
        (("--ref_audio", "ten minutes.flac"), "got 600.000 s"),
        (("--audio_tokenizer_path", "a folder.wav"), "a folder.wav"),
    ],
    ids=["no reference", "0.1 s", "10 minutes", "no codec"],
)
def test_a_single_text(toy: Path, folder: Path, flags: tuple[str, ...], message: str) -> None:
    """Exit code 2 and one message; nothing is left."""
    done = speak(toy, folder, "--text", "Good morning.", "-o", "single.wav", *flags)
    assert done.returncode == 2
    *_, last = done.stderr.strip().splitlines()
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in done.stderr
    assert not list(folder.glob("*single*"))


def test_no_codec_at_all(toy: Path, folder: Path) -> None:
    """Without the option, and with a folder whose weights are missing."""
    done = run(folder, "--model_path", toy / "model", "--text", "x", "-o", "x.wav")
    assert done.returncode == 2
    assert "--audio_tokenizer_path is missing" in done.stderr
    (folder / "codec").mkdir()
    shutil.copy(toy / "codec" / "config.json", folder / "codec")
    done = speak(toy, folder, "--text", "x", "-o", "x.wav", "--audio_tokenizer_path", "codec")
    assert done.returncode == 2
    assert "the audio tokenizer has no weights" in done.stderr
    assert not (folder / "x.wav").exists()
