"""The codec against boson's real HiggsAudioTokenizer, at its real sizes with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from boson_codec import boson_tokenizer, naive_resample, save_boson
from higgs_tune.preprocess.audio import Clip, Limits, load_clip
from higgs_tune.preprocess.codec import HiggsCodec
from higgs_tune.preprocess.codec_checkpoint import load_codec
from higgs_tune.preprocess.resample import resample_sinc
from higgs_tune.shards.errors import UserError
from transformers import HubertConfig


@pytest.fixture(scope="module")
def boson() -> Any:
    return boson_tokenizer(HubertConfig(num_hidden_layers=2))


@pytest.fixture(scope="module")
def codec(boson: Any, tmp_path_factory: pytest.TempPathFactory) -> HiggsCodec:
    folder = tmp_path_factory.mktemp("codec")
    save_boson(boson, folder)
    return load_codec(folder)


def tone(seconds: float, rate: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Noise and a gliding tone, float32 [S, C]."""
    rng = np.random.default_rng(seed)
    at = np.arange(int(seconds * rate)) / rate
    wave = 0.3 * np.sin(2 * np.pi * (200 + 300 * at) * at)
    return (wave[:, None] + 0.05 * rng.standard_normal((len(at), channels))).astype(np.float32)


@pytest.mark.parametrize(
    ("seconds", "rate", "channels", "suffix"),
    [
        (0.2, 24000, 1, "wav"),
        (1.0, 16000, 1, "flac"),
        (1.37, 44100, 2, "wav"),
        (2.003, 48000, 2, "flac"),
        (1.5, 8000, 1, "wav"),
    ],
)
def test_codes_equal_boson(
    boson: Any, codec: HiggsCodec, tmp_path: Path, seconds: float, rate: int, channels: int, suffix: str
) -> None:
    """File path in, as boson takes it: its mono mix, its resampling, its codes."""
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, tone(seconds, rate, channels), rate)
    expected = boson.encode(str(path)).numpy()
    wave = load_clip(Clip("clip", str(path)), codec.config.sample_rate_hz, Limits(0.0, 60.0))
    codes = codec.encode(wave.samples_S)
    assert codes.dtype == np.uint16
    assert codes.shape == expected.shape
    assert (codes == expected).mean() >= 0.9999
    assert len(np.unique(codes)) > 8  # a codec that always says the same would pass anything
    decoded = boson.decode(torch.from_numpy(expected)[None])[0, 0]
    np.testing.assert_allclose(codec.decode(codes), decoded, atol=1e-4)


def test_resampler_equals_the_formula() -> None:
    wave = torch.from_numpy(tone(0.05, 24000)[:, 0])[None]
    torch.testing.assert_close(resample_sinc(wave, 24000, 16000), naive_resample(wave, 24000, 16000), atol=1e-6, rtol=0)


def test_toy_roundtrips_through_the_same_loader(toy: Path) -> None:
    codec = load_codec(toy / "codec")
    codes = codec.encode(tone(1.0, 24000)[:, 0])
    assert codes.shape == (8, 25)
    assert codec.decode(codes).shape == (24000,)


def test_bad_checkpoints_are_named(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no audio tokenizer here .*expected config\.json"):
        load_codec(tmp_path)
    with pytest.raises(UserError, match="not the config of a Higgs audio tokenizer"):
        load_codec(toy / "model")
    config = (toy / "codec" / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match="has no weights"):
        load_codec(tmp_path)
    weights = torch.load(toy / "codec" / "model.pth", weights_only=True)
    weights["fc_prior.weight"] = weights.pop("fc_prior.weight")[:5]
    weights["surprise"] = weights.pop("fc_prior.bias")
    torch.save(weights, tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"missing fc_prior\.bias.*unexpected surprise.*fc\.weight: expected"):
        load_codec(tmp_path)
