"""higgs-export of an audio tokenizer: native names, the same codes and sound, every weight."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.boson_codec import boson_tokenizer, save_boson
from higgs_tune.preprocess.codec.checkpoint import load_codec
from higgs_tune.shards.errors import UserError
from higgs_tune.train.export.merge import ExportConfig, export
from safetensors.torch import load_file
from transformers import HubertConfig


@pytest.mark.fast
def test_a_codec_becomes_native(tmp_path: Path) -> None:
    codec = boson_tokenizer(HubertConfig(num_hidden_layers=2, conv_dim=(32,) * 7, intermediate_size=256), narrow=8)
    save_boson(codec, tmp_path / "boson")
    (tmp_path / "boson" / "LICENSE").write_text("the licence")
    export(ExportConfig(tmp_path / "boson", out=tmp_path / "native", layout="native"))
    before, after = load_codec(tmp_path / "boson"), load_codec(tmp_path / "native")
    wave_S = np.random.default_rng(0).uniform(-0.5, 0.5, 24_000).astype(np.float32)
    codes_KT = before.encode(wave_S)
    np.testing.assert_array_equal(after.encode(wave_S), codes_KT)
    np.testing.assert_array_equal(after.decode(codes_KT), before.decode(codes_KT))
    stored, native = codec.state_dict(), load_file(tmp_path / "native" / "model.safetensors")
    assert torch.equal(native["fc1.weight"], stored["fc_post1.weight"])
    part = "decoder_semantic.conv_blocks.0"
    assert torch.equal(native[f"{part}.conv.weight"], stored[f"{part}.conv.conv.weight"])
    assert torch.equal(native["quantizer.quantizers.3.codebook.embed"], stored["quantizer.vq.layers.3._codebook.embed"])
    fused = len([name for name in stored if name.endswith("weight_g")])  # transformers' DAC has no weight norm
    assert len(native) == len([name for name in stored if "masked_spec" not in name]) - fused
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    assert config["target_bandwidths"] == [0.5, 1.0, 1.5, 2.0]
    assert (tmp_path / "native" / "LICENSE").read_text() == "the licence"


@pytest.mark.fast
def test_mistakes_are_named(toy: Path, tmp_path: Path) -> None:
    codec = toy / "codec"
    with pytest.raises(UserError, match="converted to the native layout, and nothing else"):
        export(ExportConfig(codec, out=tmp_path / "out"))
    with pytest.raises(UserError, match="audio tokenizers in the native layout alone"):
        export(ExportConfig(toy / "model", out=tmp_path / "out", layout="native", audio_tokenizer_path=str(codec)))
    export(ExportConfig(codec, out=tmp_path / "native", layout="native"))
    with pytest.raises(UserError, match="in the native layout already"):
        export(ExportConfig(tmp_path / "native", out=tmp_path / "out", layout="native"))
    assert {path.name for path in tmp_path.iterdir()} == {"native"}
