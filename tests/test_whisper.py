"""Whisper features against boson's own collator and tower, and what the pipeline stores of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import librosa
import numpy as np
import pytest
import soundfile
import torch
from boson_multimodal.data_collator.higgs_audio_collator import HiggsAudioBatchInput, HiggsAudioSampleCollator
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample, prepare_chatml_sample
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
from boson_multimodal.model.higgs_audio.configuration_higgs_audio import HiggsAudioEncoderConfig
from conftest import preprocess
from higgs_tune.preprocess.audio.whisper import Tower, log_mel, tower_sha256
from higgs_tune.preprocess.workdir import Features
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.reader import ShardSet
from higgs_tune.shards.sequence import SpecialIds, mel_window
from torch import nn
from transformers import PreTrainedTokenizerBase, WhisperConfig, WhisperFeatureExtractor, WhisperModel

RATE = 24_000
EXTRACTOR = WhisperFeatureExtractor(feature_size=128)
SMALL_TOWER: dict[str, Any] = {"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "d_model": 32}


def wave(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise that swells, float32 [S] at 24 kHz."""
    rng = np.random.default_rng(seed)
    samples = round(seconds * RATE)
    return (np.linspace(0.02, 0.3, samples) * rng.standard_normal(samples)).astype(np.float32)


def collate(
    ids: SpecialIds, input_ids: list[int], label_ids: list[int], codes: list[np.ndarray], waves: list[np.ndarray]
) -> HiggsAudioBatchInput:
    """Boson's collator on one sample with Whisper features.

    Args:
        codes: of each chunk; the collator repeats the placeholders of long audio, but expects its codes split.
        waves: of each reference, whole.
    """
    collator = HiggsAudioSampleCollator(
        whisper_processor=SimpleNamespace(feature_extractor=EXTRACTOR),  # pyright: ignore[reportArgumentType]
        audio_in_token_id=ids.audio_in,
        audio_out_token_id=ids.audio_out,
        pad_token_id=0,
        audio_stream_bos_id=ids.stream_bos,
        audio_stream_eos_id=ids.stream_eos,
        round_to=1,
        audio_num_codebooks=ids.codebooks,
    )
    tensors: dict[str, Any] = {
        "input_ids": torch.tensor(input_ids),
        "label_ids": torch.tensor(label_ids),
        "audio_ids_concat": torch.from_numpy(np.concatenate(codes, axis=1).astype(np.int64)),
        "audio_ids_start": torch.tensor(np.cumsum([0, *(code.shape[1] for code in codes)])[:-1]),
        "audio_waveforms_concat": torch.from_numpy(np.concatenate(waves)),
        "audio_waveforms_start": torch.tensor(np.cumsum([0, *map(len, waves)])[:-1]),
        "audio_sample_rate": torch.full((len(waves),), RATE),
        "audio_speaker_indices": torch.zeros(0),
    }
    return collator([ChatMLDatasetSample(**tensors)])


@pytest.mark.fast
@pytest.mark.parametrize(
    "wave_S",
    [
        wave(0.3),
        wave(1.23456),
        wave(29.999),
        wave(30.0),
        wave(30.03),
        wave(61.7),
        np.zeros(3 * RATE, np.float32),
        np.concatenate([np.zeros(RATE, np.float32), wave(0.01)]),  # the loudest frame is the last
        wave(2.0) * 1e-4,
        wave(10.0),
    ],
    ids=["short", "odd", "almost-30", "30", "over-30", "three-chunks", "silence", "click-at-end", "faint", "ten"],
)
def test_mel_windows_are_boson_collators(toy_ids: SpecialIds, wave_S: np.ndarray) -> None:
    """All 3000 frames of every chunk, as they come back from storage; and how many of them are true."""
    codes = [np.zeros((8, 1), np.uint16)] * (-(-len(wave_S) // (30 * RATE)) + 1)
    batch = collate(toy_ids, [1, toy_ids.audio_in, 2, toy_ids.audio_out], [-100] * 4, codes, [wave_S])
    assert batch.audio_features is not None
    assert batch.audio_feature_attention_mask is not None
    chunks = log_mel(wave_S, RATE, 128)
    assert [chunk.frames for chunk in chunks] == batch.audio_feature_attention_mask.sum(1).tolist()
    rebuilt = np.stack([mel_window(chunk.values_CF.astype(np.float16)) for chunk in chunks])
    np.testing.assert_allclose(rebuilt, batch.audio_features.numpy(), atol=5e-4, rtol=0)


@pytest.fixture
def long_set(tmp_path: Path) -> Path:
    """One sample with a reference of 61.7 s and one of 5 s, and a target of 2 s."""
    for name, seconds in (("long", 61.7), ("short", 5.0), ("target", 2.0)):
        soundfile.write(tmp_path / f"{name}.wav", wave(seconds), RATE, subtype="FLOAT")
    user = [
        {"type": "text", "text": "two voices"},
        {"type": "audio", "audio_url": "long.wav"},
        {"type": "text", "text": "and"},
        {"type": "audio", "audio_url": "short.wav"},
    ]
    answer = [{"type": "text", "text": "done"}, {"type": "audio", "audio_url": "target.wav"}]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    (tmp_path / "data.json").write_text(json.dumps([{"messages": messages}]))
    return tmp_path


def test_long_references_are_split_as_boson_splits_them(
    toy: Path, toy_ids: SpecialIds, toy_tokenizer: PreTrainedTokenizerBase, long_set: Path
) -> None:
    data = long_set / "data.json"
    preprocess(toy, data, long_set / "plain", max_seconds=90.0)
    plain = ShardSet(long_set / "plain").read(0)
    preprocess(toy, data, long_set / "mel", max_seconds=90.0, whisper_features="mel")
    shards = ShardSet(long_set / "mel")
    sample = shards.read(0, mels=True)

    input_ids, label_ids, *_ = prepare_chatml_sample(json.loads(data.read_text())[0], toy_tokenizer)
    assert input_ids is not None
    assert label_ids is not None
    codes = np.split(plain.codes_KT, [750, 1500, 1543, 1668], axis=1)
    waves = [librosa.load(long_set / f"{name}.wav", sr=RATE)[0] for name in ("long", "short")]
    batch = collate(toy_ids, input_ids, label_ids, codes, waves)
    assert batch.audio_features is not None
    assert sample.tokens_2L[0].tolist() == batch.input_ids[0].tolist()
    # boson's collator masks the target's placeholder in the labels; stored labels are those before that
    expected = batch.label_ids[0] if batch.label_ids is not None else torch.zeros(0)
    is_out = sample.tokens_2L[0] == toy_ids.audio_out
    assert sample.tokens_2L[1][~is_out].tolist() == expected[torch.from_numpy(~is_out)].tolist()

    windows = np.stack([mel_window(mel) for mel in sample.mels])
    np.testing.assert_allclose(windows, batch.audio_features.numpy(), atol=5e-4, rtol=0)
    assert sample.segment_frames == [code.shape[1] for code in codes] == [750, 750, 43, 125, 50]
    assert [segment["seconds"] for segment in sample.meta["segments"]] == [30, 30, 1.7, 5, 2]
    np.testing.assert_array_equal(sample.codes_KT, plain.codes_KT)  # the whole clip is encoded once, then cut
    assert batch.audio_feature_attention_mask is not None
    frames = batch.audio_feature_attention_mask.sum(1)
    assert sample.mel_frames == [*frames.tolist(), 0]
    assert int(shards.index["mel_tokens"][0]) == sum(int(((f - 1) // 2 + 1 - 2) // 2 + 1) for f in frames)
    assert shards.provenance["features"]["extractor"]["feature_size"] == 128


@pytest.mark.fast
@pytest.mark.parametrize(("roles", "expected"), [("reference", [1, 0]), ("target", [0, 1]), ("both", [1, 1])])
def test_roles_choose_whose_features(toy: Path, tmp_path: Path, roles: str, expected: list[int]) -> None:
    """A clip that is a reference here and a target there is still encoded once."""
    for name in "ab":
        soundfile.write(tmp_path / f"{name}.wav", wave(1.0, ord(name)), RATE)
    (tmp_path / "data.csv").write_text("audio,text,speaker\na.wav,one,s\nb.wav,two,s\n")
    summary = preprocess(
        toy, tmp_path / "data.csv", tmp_path / "out", whisper_features="mel", whisper_roles=roles, clips_per_unit=1
    )
    assert summary["clips"] == 2
    shards = ShardSet(tmp_path / "out")
    for row in range(2):
        sample = shards.read(row, mels=True)
        assert [bool(frames) for frames in sample.mel_frames] == [bool(x) for x in expected]
        assert len(sample.mels) == sum(expected)
        assert all(mel.dtype == np.float16 and mel.shape == (128, 102) for mel in sample.mels)


def test_long_target_with_features_is_a_named_reject(toy: Path, long_set: Path) -> None:
    entries = json.loads((long_set / "data.json").read_text())
    entries.append(json.loads(json.dumps(entries[0]).replace("target.wav", "long.wav")))
    (long_set / "data.json").write_text(json.dumps(entries))
    options = {"max_seconds": 90.0, "whisper_features": "mel", "whisper_roles": "both"}
    summary = preprocess(toy, long_set / "data.json", long_set / "out", **options)
    assert summary["rejects"] == {"too_long_for_whisper": 1}


@pytest.fixture(scope="module")
def tower_model(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's checkpoint with a small audio tower."""
    folder = tmp_path_factory.mktemp("tower")
    config: Any = HiggsAudioConfig.from_pretrained(toy / "model")
    config.skip_audio_tower, config.encode_whisper_embed = False, True
    config.audio_encoder_config = HiggsAudioEncoderConfig(num_mel_bins=128, **SMALL_TOWER)
    torch.manual_seed(1)
    HiggsAudioModel(config).save_pretrained(folder)
    for file in (toy / "model").glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("seconds", [0.5, 7.77, 30.0])
def test_tower_output_is_that_of_bosons_model(tower_model: Path, seconds: float) -> None:
    model: Any = HiggsAudioModel.from_pretrained(tower_model, attn_implementation="sdpa").eval()
    model.audio_encoder_proj = nn.Identity()
    features = EXTRACTOR(
        [librosa.resample(wave(seconds), orig_sr=RATE, target_sr=16000)],
        sampling_rate=16000,
        return_attention_mask=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        expected, lengths = model._apply_audio_tower(features["input_features"], features["attention_mask"])
    features = Tower(tower_model, "cpu")(log_mel(wave(seconds), RATE, 128)[0])
    assert features.frames == features.values_CF.shape[1] == int(lengths[0])
    np.testing.assert_allclose(features.values_CF.T, expected[0, : features.frames], atol=1e-5)


def test_pipeline_stores_the_towers_output(toy: Path, tower_model: Path, long_set: Path) -> None:
    options = {"max_seconds": 90.0, "whisper_features": "encoder"}
    preprocess(toy, long_set / "data.json", long_set / "out", model_path=tower_model, **options)
    shards = ShardSet(long_set / "out")
    sample, tower = shards.read(0, mels=True), Tower(tower_model, "cpu")
    expected = [tower(mel) for name in (61.7, 5.0) for mel in log_mel(wave(name), RATE, 128)]
    assert len(sample.mels) == len(expected) == 4
    for stored, features in zip(sample.mels, expected, strict=True):
        np.testing.assert_allclose(stored, features.values_CF, atol=2e-3)
    assert int(shards.index["mel_tokens"][0]) == sum(features.frames for features in expected)
    assert shards.provenance["features"]["tower_sha256"] == tower_sha256(tower_model)


def test_a_whisper_checkpoint_can_be_the_tower(tower_model: Path, tmp_path: Path) -> None:
    names = {"num_mel_bins": 128, "decoder_layers": 1, "decoder_ffn_dim": 8, "decoder_attention_heads": 2}
    whisper = WhisperModel(WhisperConfig(**names, **SMALL_TOWER, vocab_size=60000))
    whisper.encoder.load_state_dict(Tower(tower_model, "cpu").encoder.state_dict())
    whisper.save_pretrained(tmp_path)
    mel = Features(np.zeros((128, 102), np.float32), 100)
    one, two = Tower(tmp_path, "cpu")(mel), Tower(tower_model, "cpu")(mel)
    np.testing.assert_array_equal(one.values_CF, two.values_CF)
    assert tower_sha256(tmp_path) == tower_sha256(tower_model)


def test_a_checkpoint_without_a_tower_is_refused(toy: Path, long_set: Path) -> None:
    with pytest.raises(UserError, match=r"no audio tower .*--whisper_path"):
        preprocess(toy, long_set / "data.json", long_set / "out", whisper_features="encoder")
