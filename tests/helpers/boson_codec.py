"""Boson's own HiggsAudioTokenizer, as the reference: the real class, with stand-ins for what it imports and we forbid.

torchaudio is replaced by the textbook formula of its resampler, evaluated sample by sample; audiotools, omegaconf and
vector_quantize_pytorch are imported by that package but never used on this path.
"""

from __future__ import annotations

import importlib
import math
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from transformers import HubertConfig, HubertModel

Resample = Callable[[torch.Tensor, int, int], torch.Tensor]
REAL_CONFIG = {
    "n_filters": 32,
    "D": 256,
    "codebook_dim": 64,
    "target_bandwidths": [0.5, 1, 1.5, 2, 4],
    "ratios": [8, 5, 4, 2, 3],
    "sample_rate": 24000,
    "bins": 1024,
    "n_q": 8,
    "semantic_techer": "hubert_base_general",
}


def naive_resample(wave: torch.Tensor, source_hz: int, target_hz: int) -> torch.Tensor:
    """torchaudio.functional.resample with its defaults, by definition: a windowed-sinc sum for each output sample."""
    common = math.gcd(source_hz, target_hz)
    source, target = source_hz // common, target_hz // common
    cutoff = min(source, target) * 0.99
    signal = wave.reshape(-1).double().numpy()
    reach = math.ceil(6 * source / cutoff)
    n = np.arange(math.ceil(target * len(signal) / source))[:, None]
    at = n // target * source + np.arange(-reach, reach + source)
    time = np.clip(((at - n // target * source) / source - (n % target) / target) * cutoff, -6, 6)
    weight = np.sinc(time) * np.cos(time * math.pi / 12) ** 2 * cutoff / source
    padded = np.pad(signal, (reach, 2 * (reach + source)))
    out = (padded[at + reach] * weight.astype(np.float32)).sum(1)
    return torch.from_numpy(out).to(wave.dtype).reshape(*wave.shape[:-1], -1)


def _stand_ins(resample: Resample) -> dict[str, types.ModuleType]:
    def module(name: str, **names: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__dict__.update(names)
        return made

    layers = importlib.import_module("boson_multimodal.audio_processing.descriptaudiocodec.dac.nn.layers")
    functional = module("torchaudio.functional", resample=resample)
    return {
        "torchaudio": module("torchaudio", functional=functional),
        "torchaudio.functional": functional,
        "vector_quantize_pytorch": module("vector_quantize_pytorch", ResidualFSQ=None),
        "audiotools": module("audiotools", AudioSignal=None),
        "audiotools.ml": module("audiotools.ml", BaseModel=nn.Module),
        "omegaconf": module("omegaconf", OmegaConf=None),
        "dac": module("dac"),
        "dac.nn": module("dac.nn"),
        "dac.nn.layers": layers,
        "dac.nn.quantize": module("dac.nn.quantize", ResidualVectorQuantize=None),
    }


def boson_tokenizer(
    hubert: HubertConfig, seed: int = 0, *, narrow: int = 1, resample: Resample = naive_resample
) -> Any:
    """HiggsAudioTokenizer with random weights, at its real sizes but for `hubert`, whose hidden size is 768.

    Args:
        narrow: how many times fewer channels its DAC has.
        resample: stands in for torchaudio's resampler.
    """
    with mock.patch.dict(sys.modules, _stand_ins(resample)):
        library = importlib.import_module("boson_multimodal.audio_processing.higgs_audio_tokenizer")
    torch.manual_seed(seed)
    dac = library.dac2
    sizes = {
        "Encoder": lambda width, *rest, make=dac.Encoder: make(width // narrow, *rest),
        "Decoder": lambda channels, width, *rest, make=dac.Decoder: make(channels, width // narrow, *rest),
    }
    with mock.patch.object(library, "AutoModel") as auto, mock.patch.multiple(dac, **sizes):
        auto.from_pretrained.return_value = HubertModel(hubert)
        tokenizer = library.HiggsAudioTokenizer(**REAL_CONFIG, device="cpu")
    for layer in tokenizer.quantizer.vq.layers:
        nn.init.normal_(layer._codebook.embed, std=0.3)
        layer._codebook.inited.fill_(1)
    return tokenizer.eval()


def save_boson(tokenizer: Any, folder: Path) -> None:
    """Write the original layout: config.json and model.pth, HuBERT inside."""
    import json

    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tokenizer.state_dict(), folder / "model.pth")
    (folder / "config.json").write_text(json.dumps(REAL_CONFIG))


@contextmanager
def serving_with(tokenizer: Any) -> Iterator[None]:
    """Within the block Boson's serving engine can be imported; its codec is `tokenizer`, whatever folder is given."""
    with mock.patch.dict(sys.modules, _stand_ins(naive_resample)):
        engine = importlib.import_module("boson_multimodal.serve.serve_engine")
        with mock.patch.object(engine, "load_higgs_audio_tokenizer", return_value=tokenizer):
            yield
