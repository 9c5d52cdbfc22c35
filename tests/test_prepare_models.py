"""higgs-prepare with models: tiny random ones of each kind, and what is stored of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.recordings import make_recording, write_srt
from higgs_tune.preprocess.judges import sounds
from higgs_tune.preprocess.judges.dnsmos import WINDOW, every_ninth, every_second
from higgs_tune.preprocess.judges.load import load_sound_model
from higgs_tune.preprocess.prepare import cli, pipeline, work
from higgs_tune.preprocess.prepare.config import PrepareConfig
from higgs_tune.preprocess.prepare.reading import read_cut
from higgs_tune.preprocess.prepare.records import read_segments
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
)
from transformers.pipelines import pipeline as transformers_pipeline

SPEECH, MUSIC, OVERLAP = "Speech", "Music", "Overlap"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wav2vec2 that knows three sounds that exclude each other."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8),
        conv_kernel=(10, 8), conv_stride=(160, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2, classifier_proj_size=16,
        id2label=dict(enumerate((SPEECH, MUSIC, OVERLAP))), label2id={SPEECH: 0, MUSIC: 1, OVERLAP: 2},
    )  # fmt: skip
    model: Any = Wav2Vec2ForSequenceClassification(config).eval()
    with torch.no_grad():
        model.classifier.weight.mul_(20)
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recording")
    write_srt(folder / "a.srt", make_recording(folder / "a.wav", 3, sentences=5))
    return folder


def options(recording: Path, out: Path, **given: Any) -> PrepareConfig:
    plain: dict[str, Any] = {"vad": "energy", "quality": "none", "num_processes": 1, "val_fraction": 0.0}
    return PrepareConfig(recordings=(recording,), out=out, **plain | given)


def test_unwanted_sounds_are_those_of_transformers_pipeline(classifier: Path, recording: Path, tmp_path: Path) -> None:
    """And --from decides by them anew."""
    out = tmp_path / "out"
    made = pipeline.prepare(options(recording, out, sound_model=str(classifier), sound_labels=(MUSIC, OVERLAP)))
    judge = transformers_pipeline("audio-classification", model=str(classifier), device="cpu")
    segments = read_segments(out)
    assert len(segments) == 5 and not made["errors"]
    values = []
    for one in segments:
        wave_S = read_cut(recording / "a.wav", round(one.start * 1000), round(one.end * 1000))
        told: Any = judge(wave_S, top_k=None)
        values.append(max(row["score"] for row in told if row["label"] != SPEECH))
        assert one.sound == pytest.approx(values[-1], abs=1e-4)
    bound = float(np.median(values))
    again = pipeline.decide_again(options(recording, out, from_=out, sound_model=str(classifier), max_sound=bound,
                                            sound_labels=(MUSIC, OVERLAP)))  # fmt: skip
    rejected = [one for one in read_segments(out) if one.reject and one.reject.reason == "unwanted_sound"]
    assert [one.sound for one in rejected] == [one.sound for one in segments if (one.sound or 0) > bound] and rejected
    assert again["accounting"]["fates_ms"]["sound"] > 0
    assert "music or another unwanted sound" in (out / "report.html").read_text()
    assert pipeline.saved_config(out).sound_labels == (MUSIC, OVERLAP)


@pytest.mark.fast
def test_a_sound_that_the_classifier_does_not_know_is_named(
    classifier: Path, recording: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"architectures": ["HubertForCTC"], "id2label": {}}))
    cases = (
        (["--sound_model", str(classifier), "--sound_labels", "Noise"], "expected Music, Overlap, Speech, got Noise"),
        (["--sound_model", str(tmp_path / "other")], "no audio classifier in this checkpoint"),
        (["--sound_model", str(tmp_path / "none")], "no checkpoint here"),
    )
    for arguments, message in cases:
        monkeypatch.setattr("sys.argv", ["higgs-prepare", str(recording), "--out", str(tmp_path / "o"), *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 2 and message in capsys.readouterr().err


def test_classes_of_audioset_do_not_exclude_each_other(tmp_path: Path, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    config = ASTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_length=64,
        num_mel_bins=32, id2label={n: f"sound {n}" for n in range(sounds.AUDIOSET_CLASSES)},
        label2id={f"sound {n}": n for n in range(sounds.AUDIOSET_CLASSES)},
    )  # fmt: skip
    model: Any = ASTForAudioClassification(config).eval()
    extractor = ASTFeatureExtractor(max_length=64, num_mel_bins=32)
    model.save_pretrained(tmp_path)
    extractor.save_pretrained(tmp_path)
    wave_S = np.random.default_rng(0).normal(0, 0.1, 25 * 16_000).astype(np.float32)
    judge = load_sound_model(str(tmp_path), ("sound 3", "sound 500"), "cpu")
    parts = np.array_split(wave_S, 3)  # of at most 10 s
    with torch.no_grad():
        rows = [model(**extractor(part, sampling_rate=16_000, return_tensors="pt")).logits[0] for part in parts]
    wanted = max(float(row.sigmoid()[[3, 500]].max()) for row in rows)
    assert judge.probability(wave_S) == pytest.approx(wanted, abs=1e-6) and wanted > 0.1


@pytest.mark.fast
@pytest.mark.parametrize("seconds", [9.01, 9.5, 12.0, 15.0, 18.1, 40.0])
def test_quick_windows_are_the_middle_of_each_nine(seconds: float) -> None:
    length = round(seconds * 16_000)
    starts, all_starts = every_ninth(length), every_second(length)
    assert set(starts) <= set(all_starts) and all_starts[-1] + WINDOW <= length
    assert len(starts) == max(1, round(len(all_starts) / 9))
    assert abs(np.mean(starts) - np.mean(all_starts)) <= 4.5 * 16_000


@pytest.mark.fast
def test_a_transcript_is_read_once(recording: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Also by a restart, that takes everything else from what is stored."""
    read, plain = list[Path](), work.read_transcript

    def counted(file: Path) -> Any:
        read.append(file)
        return plain(file)

    monkeypatch.setattr(work, "read_transcript", counted)
    for runs in (1, 2):
        pipeline.prepare(options(recording, tmp_path))
        assert read == [recording / "a.srt"] * runs
