"""The Higgs audio tokenizer: waveform to codes and codes to waveform.

In: mono float32 at 24 kHz, one clip at a time (HuBERT's group norm runs over time, so padding to a batch would change
every feature). Out: uint16 codes [K, T] at 25 frames a second, and back.

The architecture is X-codec's as Boson AI trained it (`boson_multimodal.audio_processing.higgs_audio_tokenizer`):
HuBERT hidden states, averaged over all layers, and a DAC encoder, joined and quantised by 8 residual codebooks.
The blocks are transformers' Hubert and DAC; `codec/checkpoint.py` loads checkpoints of both layouts.
Guarantees: codes equal those of Boson's class at every length and rate (tests/test_codec.py).

Shapes: S samples at 24 kHz, T frames, K codebooks, C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from higgs_tune.preprocess.codec.resample import resample_sinc
from torch import nn
from transformers import DacConfig, HubertConfig, HubertModel
from transformers.models.dac.modeling_dac import DacDecoder, DacEncoder, Snake1d


@dataclass(frozen=True)
class CodecConfig:
    """Sizes of a codec, read from a checkpoint by `codec/checkpoint.py`."""

    sample_rate_hz: int
    semantic_sample_rate_hz: int
    codebooks: int
    codebook_size: int
    codebook_dim: int
    semantic: HubertConfig
    acoustic: DacConfig

    @property
    def hop_length(self) -> int:
        """Samples a frame."""
        return math.prod(self.acoustic.downsampling_ratios)

    @property
    def frame_rate_hz(self) -> int:
        return math.ceil(self.sample_rate_hz / self.hop_length)

    @property
    def semantic_stride(self) -> int:
        """HuBERT frames (50 a second) to one code frame."""
        return int(self.hop_length / (self.sample_rate_hz / self.semantic_sample_rate_hz) / 320)


class _ResidualUnit(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv1d(channels, channels, 1, bias=False)

    def forward(self, x_1CT: torch.Tensor) -> torch.Tensor:
        return x_1CT + self.conv2(F.elu(self.conv1(F.elu(x_1CT))))


class _SemanticBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.res_units = nn.Sequential(_ResidualUnit(channels), _ResidualUnit(channels))
        self.conv = nn.Conv1d(channels, channels, 3, padding=1)

    def forward(self, x_1CT: torch.Tensor) -> torch.Tensor:
        return self.conv(self.res_units(x_1CT))


class _SemanticEncoder(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, padding=1, bias=False)
        self.conv_blocks = nn.Sequential(_SemanticBlock(channels), _SemanticBlock(channels))

    def forward(self, x_1CT: torch.Tensor) -> torch.Tensor:
        return self.conv_blocks(self.conv(x_1CT))


class _Codebook(nn.Module):
    def __init__(self, config: CodecConfig, channels: int) -> None:
        super().__init__()
        self.project_in = nn.Linear(channels, config.codebook_dim)
        self.project_out = nn.Linear(config.codebook_dim, channels)
        self.register_buffer("embed", torch.zeros(config.codebook_size, config.codebook_dim))
        self.embed: torch.Tensor

    def nearest(self, x_1CT: torch.Tensor) -> torch.Tensor:
        """Index of the nearest code vector for each frame, int64 [1, T]."""
        x_TD = self.project_in(x_1CT.transpose(1, 2))[0]
        # in this order of operations, as the original: ties and near-ties fall alike
        distance_TB = x_TD.pow(2).sum(1, keepdim=True) - 2 * x_TD @ self.embed.t() + self.embed.t().pow(2).sum(0)
        return (-distance_TB).max(dim=-1).indices[None]

    def lookup(self, codes_1T: torch.Tensor) -> torch.Tensor:
        return self.project_out(F.embedding(codes_1T, self.embed)).transpose(1, 2)


class _SnakeInPlace(Snake1d):
    """x + sin(ax)^2 / a by the same operations in the same order, but one buffer instead of six: memory is its cost."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        squared = torch.mul(self.alpha, hidden_states).sin_().pow_(2)
        return squared.mul_((self.alpha + 1e-9).reciprocal()).add_(hidden_states)


class _TiledEncoder(DacEncoder):
    """DacEncoder whose first block, at the full sample rate, runs tile by tile on the CPU.

    The output of one layer is then still in the cache when the next layer reads it. The layers before the stride see 42
    samples to each side; tiles overlap by these and one step, and the overlap is dropped, so the result is the same.
    """

    _TILE, _REACH = 4096, 3 + 3 * (1 + 3 + 9)  # samples; kernels of 7, three of them dilated

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        if hidden_state.device.type != "cpu":
            return super().forward(hidden_state)
        hidden_state = self._first_block(hidden_state)
        for block in self.block[1:]:
            hidden_state = block(hidden_state)
        return self.conv2(self.snake1(hidden_state))

    def _first_block(self, x_11S: torch.Tensor) -> torch.Tensor:
        block: Any = self.block[0]
        stride, samples = block.conv1.stride[0], x_11S.shape[2]
        tile, halo = max(1, self._TILE // stride), -(-self._REACH // stride) + 1  # in steps of what comes out
        tiles = []
        for first in range(0, max(1, samples // stride), tile):
            begin, end = max(0, first - halo), first + tile + halo
            steps = block(self.conv1(x_11S[..., begin * stride : end * stride]))
            last = end * stride >= samples
            tiles.append(steps[..., first - begin : None if last else first - begin + tile])
            if last:
                break
        return torch.cat(tiles, dim=2)


class HiggsCodec(nn.Module):
    """The codec, for inference only. Module names are those of the transformers-native checkpoint layout."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        semantic, acoustic = config.semantic.hidden_size, config.acoustic.hidden_size
        self.semantic_model = HubertModel(config.semantic)
        self.encoder_semantic = _SemanticEncoder(semantic)
        self.acoustic_encoder = _TiledEncoder(config.acoustic)
        self.acoustic_decoder = DacDecoder(config.acoustic)
        for module in self.acoustic_decoder.modules():
            if isinstance(module, nn.ConvTranspose1d):  # Boson's decoder keeps odd strides exact
                module.output_padding = (module.stride[0] % 2,)
        self.acoustic_decoder.register_module("tanh", nn.Identity())
        for module in self.modules():
            if isinstance(module, Snake1d):
                module.__class__ = _SnakeInPlace
        self.fc = nn.Linear(acoustic + semantic, acoustic + semantic)
        self.fc2 = nn.Linear(acoustic + semantic, acoustic)
        self.quantizers = nn.ModuleList(_Codebook(config, acoustic + semantic) for _ in range(config.codebooks))

    @property
    def device(self) -> torch.device:
        return self.fc.weight.device

    @torch.inference_mode()
    def encode(self, wave_S: np.ndarray | torch.Tensor) -> np.ndarray:
        """Codes of one clip.

        Args:
            wave_S: float32 [S], mono, at `config.sample_rate_hz`.

        Returns:
            uint16 [K, T].

        Raises:
            ValueError: the clip is shorter than one frame.
        """
        x_11S = torch.as_tensor(wave_S, dtype=torch.float32).to(self.device)[None, None]
        semantic_1CT = self.encoder_semantic(self._semantic_features(x_11S))
        acoustic_1CT = self._acoustic_features(x_11S, semantic_1CT.shape[2])
        frames = min(acoustic_1CT.shape[2], semantic_1CT.shape[2])
        joined = torch.cat([acoustic_1CT[..., :frames], semantic_1CT[..., :frames]], dim=1).float()
        residual = self.fc(joined.transpose(1, 2)).transpose(1, 2)
        codes = []
        for codebook in self.quantizers:
            assert isinstance(codebook, _Codebook)
            codes.append(codebook.nearest(residual))
            residual = residual - codebook.lookup(codes[-1])
        return torch.cat(codes).cpu().numpy().astype(np.uint16)

    @torch.inference_mode()
    def decode(self, codes_KT: np.ndarray | torch.Tensor) -> np.ndarray:
        """Waveform of one clip's codes: uint16 or int [K, T] to float32 [T * hop_length]."""
        codes = torch.as_tensor(np.asarray(codes_KT).astype(np.int64), device=self.device)
        quantized_1CT = torch.zeros((), device=self.device)
        for codebook, codes_T in zip(self.quantizers, codes, strict=True):
            assert isinstance(codebook, _Codebook)
            quantized_1CT = quantized_1CT + codebook.lookup(codes_T[None])
        wave_11S = self.acoustic_decoder(self.fc2(quantized_1CT.transpose(1, 2)).transpose(1, 2))
        return wave_11S[0, 0].float().cpu().numpy()

    def encoder_precision(self, dtype: torch.dtype) -> None:
        """Run HuBERT and the DAC encoder in `dtype`; resampling and quantisation stay in float32."""
        for part in (self.semantic_model, self.encoder_semantic, self.acoustic_encoder):
            nn.Module.to(part, dtype)

    @property
    def _encoder_dtype(self) -> torch.dtype:
        return self.acoustic_encoder.conv1.weight.dtype

    def _semantic_features(self, x_11S: torch.Tensor) -> torch.Tensor:
        """HuBERT's hidden states, averaged over the embedding and all layers, at the code frame rate: [1, C, T]."""
        x_1S = resample_sinc(x_11S[:, 0], self.config.sample_rate_hz, self.config.semantic_sample_rate_hz)
        x_1S = F.pad(x_1S, (160, 160)).to(self._encoder_dtype)
        states = self.semantic_model(x_1S, output_hidden_states=True).hidden_states
        mean_1TC = torch.stack(states, dim=1).mean(1)
        return mean_1TC[:, :: self.config.semantic_stride].transpose(1, 2)

    def _acoustic_features(self, x_11S: torch.Tensor, frames: int) -> torch.Tensor:
        if self._acoustic_frames(x_11S.shape[2]) != frames:
            pad = 160 * self.config.semantic_stride
            x_11S = F.pad(x_11S, (pad, pad))
        return self.acoustic_encoder(x_11S.to(self._encoder_dtype))

    def _acoustic_frames(self, samples: int) -> int:
        """Frames that the DAC encoder makes of `samples` samples."""
        for stride in self.config.acoustic.downsampling_ratios:
            samples = (samples + 2 * math.ceil(stride / 2) - 2 * stride) // stride + 1
        return samples
