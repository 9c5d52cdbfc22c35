"""The codec against boson's real HiggsAudioTokenizer, at its real sizes with random weights."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import pyloudnorm
import pytest
import soundfile
import torch
from helpers.boson_codec import boson_tokenizer, naive_resample, save_boson
from higgs_tune.preprocess.audio.audio import load_clip
from higgs_tune.preprocess.audio.clip import Clip
from higgs_tune.preprocess.audio.options import AudioOptions
from higgs_tune.preprocess.audio.resample import resample_soxr
from higgs_tune.preprocess.codec.checkpoint import load_codec
from higgs_tune.preprocess.codec.codec import HiggsCodec
from higgs_tune.preprocess.codec.resample import resample_sinc
from higgs_tune.shards.errors import UserError
from safetensors.torch import save_file
from transformers import HubertConfig

ANY = AudioOptions(0.0, 60.0)


@pytest.fixture(scope="module")
def boson() -> Any:
    return boson_tokenizer(HubertConfig(num_hidden_layers=2))


@pytest.fixture(scope="module")
def codec(boson: Any, tmp_path_factory: pytest.TempPathFactory) -> HiggsCodec:
    return ours(boson, tmp_path_factory.mktemp("codec"))


def ours(boson: Any, folder: Path) -> HiggsCodec:
    """Our codec with the weights of boson's."""
    save_boson(boson, folder)
    return load_codec(folder)


@pytest.fixture(scope="module")
def narrow() -> Any:
    """Boson's class with few channels: long clips are cheap."""
    return boson_tokenizer(HubertConfig(num_hidden_layers=2, conv_dim=(32,) * 7, intermediate_size=256), narrow=8)


@pytest.fixture(scope="module")
def narrow_codec(narrow: Any, tmp_path_factory: pytest.TempPathFactory) -> HiggsCodec:
    return ours(narrow, tmp_path_factory.mktemp("narrow"))


def tone(seconds: float, rate: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Noise and a gliding tone, float32 [S, C]."""
    rng = np.random.default_rng(seed)
    at = np.arange(int(seconds * rate)) / rate
    wave = 0.3 * np.sin(2 * np.pi * (200 + 300 * at) * at)
    return (wave[:, None] + 0.05 * rng.standard_normal((len(at), channels))).astype(np.float32)


@pytest.mark.parametrize(
    ("seconds", "rate", "channels", "kind"),
    [
        (0.2, 24000, 1, "wav"),
        (1.0, 16000, 1, "flac"),
        (1.37, 44100, 2, "wav"),
        (2.003, 48000, 2, "flac"),
        (1.5, 8000, 1, "wav"),
        (1.1, 22050, 1, "mp3"),
        (0.9, 32000, 2, "ogg"),
        (0.7, 48000, 1, "opus"),
        (3.2, 24000, 1, "flac"),
    ],
)
def test_codes_equal_boson(
    boson: Any, codec: HiggsCodec, tmp_path: Path, seconds: float, rate: int, channels: int, kind: str
) -> None:
    """File path in, as boson takes it: its mono mix, its resampling, its codes; and back to sound."""
    assert_same_codes(boson, codec, tmp_path, seconds, rate, channels, kind)


RATES = (8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000)


@pytest.mark.parametrize("number", range(8))
def test_codes_equal_boson_at_every_length(narrow: Any, narrow_codec: HiggsCodec, tmp_path: Path, number: int) -> None:
    """0.2 s to 40 s, both ends included, at every common rate, mono and stereo; lengths that fit no frame."""
    seconds = 0.2 * 200 ** (number / 7)
    assert_same_codes(narrow, narrow_codec, tmp_path, seconds, RATES[number], 1 + (number // 2) % 2, "flac")


def assert_same_codes(
    boson: Any, codec: HiggsCodec, folder: Path, seconds: float, rate: int, channels: int, kind: str
) -> None:
    path = folder / f"clip.{kind}"
    container: dict[str, Any] = {"format": "OGG", "subtype": "OPUS"} if kind == "opus" else {}
    soundfile.write(path, tone(seconds, rate, channels), rate, **container)
    expected = boson.encode(str(path)).numpy()
    wave = load_clip(Clip("clip", str(path)), codec.config.sample_rate_hz, ANY)
    codes = codec.encode(wave.samples_S)
    assert codes.dtype == np.uint16
    np.testing.assert_array_equal(codes, expected)
    assert len(np.unique(codes)) > 8  # a codec that always says the same would pass anything
    if seconds < 3:
        decoded = boson.decode(torch.from_numpy(expected)[None])[0, 0]
        np.testing.assert_allclose(codec.decode(codes), decoded, atol=1e-4)


@pytest.mark.parametrize("samples", [1920, 4095, 4096, 4160, 8200, 12345, 3 * 4096 + 7])
def test_tiles_leave_no_seam(codec: HiggsCodec, samples: int) -> None:
    """The first block in tiles equals it in one piece, wherever the last tile ends."""
    encoder = codec.acoustic_encoder
    wave_11S = torch.from_numpy(tone(samples / 24000, 24000).T.copy())[None]
    with torch.inference_mode():
        whole = encoder.block[0](encoder.conv1(wave_11S))
        tiled = encoder._first_block(wave_11S)
    assert tiled.shape == whole.shape
    torch.testing.assert_close(tiled, whole, atol=1e-5, rtol=1e-5)


def test_loudness_equals_boson(boson: Any, codec: HiggsCodec, tmp_path: Path) -> None:
    """As `encode(…, loudness_normalize=True)`; its own call ends in float64, which its model refuses."""
    path = tmp_path / "quiet.wav"
    soundfile.write(path, 0.1 * tone(1.0, 16000), 16000)
    wave, rate = librosa.load(path, sr=None)
    meter = pyloudnorm.Meter(rate)
    level = pyloudnorm.normalize.loudness(wave, meter.integrated_loudness(wave), -23.0)
    expected = boson.encode(level.astype(np.float32), int(rate)).numpy()
    loaded = load_clip(Clip("quiet", str(path)), 24000, replace(ANY, loudness_lufs=-23.0))
    np.testing.assert_array_equal(codec.encode(loaded.samples_S), expected)
    plain = load_clip(Clip("quiet", str(path)), 24000, ANY)
    assert np.abs(loaded.samples_S).max() > 2 * np.abs(plain.samples_S).max()


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "ogg"])
def test_cuts_are_those_of_librosa(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"clip.{kind}"
    soundfile.write(path, tone(2.0, 22050, 2), 22050)
    expected, _ = librosa.load(path, sr=24000, offset=0.703, duration=0.5)
    cut = load_clip(Clip("clip", str(path), offset_s=0.703, duration_s=0.5), 24000, ANY)
    np.testing.assert_array_equal(cut.samples_S, expected)
    to_the_end = load_clip(Clip("clip", str(path), offset_s=1.5), 24000, ANY)
    assert to_the_end.seconds == pytest.approx(0.5, abs=1e-3)


@pytest.mark.fast
def test_resampler_equals_the_formula() -> None:
    wave = torch.from_numpy(tone(0.05, 24000)[:, 0])[None]
    torch.testing.assert_close(resample_sinc(wave, 24000, 16000), naive_resample(wave, 24000, 16000), atol=1e-6, rtol=0)


@pytest.mark.fast
@pytest.mark.parametrize(("source", "target"), [(16000, 24000), (44100, 24000), (22050, 24000), (24000, 16000)])
@pytest.mark.parametrize("samples", [1, 479, 12347])
def test_soxr_equals_librosa(source: int, target: int, samples: int) -> None:
    wave_S = tone(1.0, source)[:samples, 0]
    expected = librosa.resample(wave_S, orig_sr=source, target_sr=target)
    found = resample_soxr(wave_S, source, target)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


@pytest.mark.fast
def test_toy_roundtrips_through_the_same_loader(toy: Path) -> None:
    codec = load_codec(toy / "codec")
    codes = codec.encode(tone(1.0, 24000)[:, 0])
    assert codes.shape == (8, 25)
    assert codec.decode(codes).shape == (24000,)


def write_native(codec_folder: Path, folder: Path, *, weight_norm: bool) -> None:
    """The transformers-native layout of the toy codec, beside weights that only training uses."""
    codec = load_codec(codec_folder)
    weights: dict[str, torch.Tensor] = {}
    for name, value in codec.state_dict().items():
        named = name.replace(".embed", ".codebook.embed") if name.endswith(".embed") else name
        named = f"quantizer.{named}" if named.startswith("quantizers.") else named
        position = named.endswith("pos_conv_embed.conv.weight")  # always weight-normed, along the kernel
        if position or (weight_norm and re.search(r"acoustic_..coder\..*conv.*\.weight$", named)):
            stem = named.removesuffix("weight") + "parametrizations.weight."
            weights[stem + "original0"] = value.norm(dim=(0, 1) if position else (1, 2), keepdim=True)
            weights[stem + "original1"] = 3 * value
        else:
            weights[named] = value.contiguous()
    known = (Path(__file__).parent / "native_names.txt").read_text().split()
    numberless = {re.sub(r"\d+", "N", name) for name in weights}
    assert numberless <= set(known)  # else this is no layout that transformers writes
    weights |= {"fc1.weight": torch.zeros(2), "quantizer.quantizers.0.codebook.embed_avg": torch.zeros(2)}
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    acoustic, semantic = codec.config.acoustic, codec.config.semantic
    sizes = ("encoder_hidden_size", "decoder_hidden_size", "hidden_size", "downsampling_ratios", "upsampling_ratios")
    config = {
        "model_type": "higgs_audio_v2_tokenizer",
        "sample_rate": 24000,
        "semantic_sample_rate": 16000,
        "channel_ratios": [1, 1],
        "acoustic_model_config": {"model_type": "dac"} | {name: getattr(acoustic, name) for name in sizes},
        "semantic_model_config": semantic.to_dict(),
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("weight_norm", [False, True])
def test_native_layout_gives_the_same_codes(toy: Path, tmp_path: Path, weight_norm: bool) -> None:
    write_native(toy / "codec", tmp_path / "native", weight_norm=weight_norm)
    boson, native = load_codec(toy / "codec"), load_codec(tmp_path / "native")
    wave_S = tone(1.23, 24000)[:, 0]
    codes = boson.encode(wave_S)
    np.testing.assert_array_equal(native.encode(wave_S), codes)
    np.testing.assert_allclose(native.decode(codes), boson.decode(codes), atol=1e-5)
    config = json.loads((tmp_path / "native" / "config.json").read_text()) | {"strides": [1, 2]}
    (tmp_path / "native" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"unsupported strides .*expected \[1, 1\], got \[1, 2\]"):
        load_codec(tmp_path / "native")


def test_lower_precision_is_only_for_the_encoder(toy: Path) -> None:
    wave_S = tone(1.0, 24000)[:, 0]
    exact, rough = load_codec(toy / "codec"), load_codec(toy / "codec")
    rough.encoder_precision(torch.bfloat16)
    assert rough.acoustic_encoder.conv1.weight.dtype == torch.bfloat16
    assert rough.fc.weight.dtype == torch.float32
    codes = rough.encode(wave_S)
    assert codes.shape == exact.encode(wave_S).shape
    np.testing.assert_array_equal(rough.decode(codes), exact.decode(codes))


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
    torch.save(weights, tmp_path / "model.pth")
    for change, message in (
        ({"ratios": 5}, "unsupported ratios .*expected 5 ratios, got 5"),
        ({"ratios": [8, 5, 4, 2, 1]}, "unsupported length of a frame.*expected 960 samples, got 320"),
        ({"ratios": ["8", 5, 4, 2, 3]}, "config and weights make no codec"),
        ({"sample_rate": "x"}, "unsupported sample_rate .*expected 24000, got 'x'"),
        ({"sample_rate": 48000}, "unsupported sample_rate .*expected 24000, got 48000"),
        ({"semantic_sample_rate": 8000}, "unsupported semantic_sample_rate .*expected 16000, got 8000"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(json.loads(config) | change))
        with pytest.raises(UserError, match=message):
            load_codec(tmp_path)
    for content in ("[1]", "null"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"config has the wrong content .*expected a JSON object"):
            load_codec(tmp_path)
    (tmp_path / "config.json").write_text(config)
    torch.save({"a": Path()}, tmp_path / "model.pth")
    with pytest.raises(
        UserError, match=r"cannot read weights: it holds more than tensors, and no pickled code is run \("
    ):
        load_codec(tmp_path)
    weights["fc_prior.weight"] = weights.pop("fc_prior.weight")[:5]
    weights["surprise"] = weights.pop("fc_prior.bias")
    torch.save(weights, tmp_path / "model.pth")
    fitting = r"1 missing: fc_prior\.bias; 1 unexpected: surprise; 1 of a wrong shape: fc\.weight \(expected"
    with pytest.raises(UserError, match=fitting):
        load_codec(tmp_path)
    torch.save({f"x{name}": value for name, value in weights.items()} | weights, tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"\d+ unexpected: surprise, x\S+, x\S+ and \d+ more; 1 of"):
        load_codec(tmp_path)
