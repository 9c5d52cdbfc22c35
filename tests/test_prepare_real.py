"""higgs-prepare with real judges: skipped where they are not installed (the extra `eval-test`)."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from helpers.real_whisper import PARTS, join_parts
from higgs_tune.preprocess.judges.load import load_quality_model
from higgs_tune.preprocess.prepare import pipeline
from higgs_tune.preprocess.prepare.config import PrepareConfig
from higgs_tune.preprocess.prepare.records import read_segments

SENTENCES = (
    "The weather was warm and the children played in the garden until evening.",
    "Please send the letter to my brother before the end of the week.",
    "Nobody had seen the old captain since the storm took his boat away.",
)
GERMAN = "Am Abend gingen die Kinder langsam nach Hause und erzählten von ihrem Tag im Wald."


def needs(*packages: str) -> None:
    for name in packages:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    if not (shutil.which("flite") and shutil.which("espeak-ng")):
        pytest.skip("flite and espeak-ng are not installed")


def speak(file: Path, text: str, *, voice: str = "slt") -> np.ndarray:
    command = ["espeak-ng", "-v", "de", "-s", "150", "-w", str(file), text]
    command = command if voice == "de" else ["flite", "-voice", voice, "-t", text, "-o", str(file)]
    subprocess.run(command, check=True, timeout=60)
    wave_S, rate_hz = soundfile.read(file, dtype="float32")
    return soxr.resample(wave_S, rate_hz, 16_000)


@pytest.mark.fast
def test_quick_quality_is_near_the_packages(tmp_path: Path) -> None:
    """DNSMOS on one window of nine, against speechmos itself: within 0.25, clean and in noise, 3 to 15 s."""
    needs("speechmos", "onnxruntime")
    from speechmos import dnsmos  # pyright: ignore[reportMissingImports]

    waves = [speak(tmp_path / "a.wav", text, voice=voice) for text in SENTENCES for voice in ("slt", "rms")]
    joined_S, rng = np.concatenate(waves), np.random.default_rng(0)
    quick, every = load_quality_model("dnsmos", quick=True), load_quality_model("dnsmos")
    for seconds in (3.2, 5.0, 7.5, 11.2, 14.5):
        clip_S = joined_S[16_000 : 16_000 + int(seconds * 16_000)]
        for level in (0.0, 0.05):
            noisy_S = (clip_S + level * rng.standard_normal(len(clip_S))).clip(-1, 1).astype(np.float32)
            own = dnsmos.run(noisy_S, 16_000)["ovrl_mos"]
            assert every.score(noisy_S)["overall"] == pytest.approx(own, abs=1e-4)
            assert quick.score(noisy_S)["overall"] == pytest.approx(own, abs=0.25), seconds


def test_the_transcript_of_another_file_and_another_language_are_named(tmp_path: Path) -> None:
    needs(*PARTS, "faster_whisper", "silero_vad", "onnxruntime")
    (tmp_path / "whisper").mkdir()
    folder = tmp_path / "in"
    folder.mkdir()
    for number, text in enumerate(SENTENCES):
        speak(folder / f"{number}.wav", text)
        (folder / f"{number}.txt").write_text(SENTENCES[1] if number == 2 else text)
    speak(folder / "german.wav", GERMAN, voice="de")
    pipeline.prepare(PrepareConfig(recordings=(folder,), out=tmp_path / "out", language="en", quality="none",
                                   asr=str(join_parts(tmp_path / "whisper")), num_processes=1))  # fmt: skip
    found = {Path(one.recording).stem: one for one in read_segments(tmp_path / "out")}
    assert {name: one.reject.step if one.reject else "kept" for name, one in found.items()} == {
        "0": "kept", "1": "kept", "2": "agreement", "german": "language",
    }  # fmt: skip
    assert found["2"].reject and found["2"].reject.reason == "disagreement"
