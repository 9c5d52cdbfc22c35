"""The miniature codec as it trains: the project's own codec modules, with gradients, in batches.

Its HuBERT stays random and frozen, so its features are computed once a clip. Codebooks are moving averages of what
falls to them (van den Oord et al., arXiv 1711.00937, appendix A.1).

Shapes: B clips, S samples, T frames, C channels, K codebooks, D codebook_dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from higgs_tune.preprocess.codec.checkpoint import fold_position_conv
from higgs_tune.preprocess.codec.codec import CodecConfig, HiggsCodec
from higgs_tune.train.toy import small_hubert
from torch import nn
from transformers import DacConfig
from transformers.models.dac.modeling_dac import DacEncoder, DacResidualUnit, Snake1d

SAMPLE_RATE_HZ, CODEBOOKS, CODEBOOK_SIZE = 24_000, 8, 1024
DECAY = 0.99  # of the codebooks' moving averages, a step
DEAD, REBORN = 0.003, 0.02  # a code with fewer frames a step, on average, starts again, with this many


def codec_config() -> CodecConfig:
    """The released codec's shape at small widths: 2.4 M parameters."""
    acoustic = DacConfig(encoder_hidden_size=8, downsampling_ratios=[8, 5, 4, 2, 3], decoder_hidden_size=256)
    acoustic.upsampling_ratios, acoustic.hidden_size = acoustic.downsampling_ratios, 64
    return CodecConfig(SAMPLE_RATE_HZ, 16_000, CODEBOOKS, CODEBOOK_SIZE, 8, small_hubert(), acoustic)


class _SnakeFunction(torch.autograd.Function):
    """x + sin(ax)^2 / a. It keeps its input and its output, which the neighbouring layers keep too."""

    @staticmethod
    def forward(ctx: Any, x_BCS: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        out_BCS = torch.mul(alpha, x_BCS).sin_().square_().mul_((alpha + 1e-9).reciprocal()).add_(x_BCS)
        ctx.save_for_backward(x_BCS, alpha, out_BCS)
        return out_BCS

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (grad,), (x_BCS, alpha, out_BCS) = grads, ctx.saved_tensors
        double = torch.mul(2 * alpha, x_BCS).sin_()
        by_alpha = torch.mul(double, x_BCS).add_(x_BCS).sub_(out_BCS).mul_(grad).sum((0, 2), keepdim=True) / alpha
        return double.add_(1).mul_(grad), by_alpha


class _TrainableSnake(Snake1d):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return _SnakeFunction.apply(hidden_states, self.alpha)  # pyright: ignore[reportReturnType]


def _keep_variance(module: nn.Module) -> None:
    """Start a convolution so that its output varies as its input does.

    PyTorch's own start shrinks the signal at each layer, most in transposed convolutions: after five of them the
    decoder says nearly the same whatever its input, and takes thousands of steps to grow out of that.
    """
    if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
        inputs = module.in_channels * module.kernel_size[0] / (1 if isinstance(module, nn.Conv1d) else module.stride[0])
        nn.init.normal_(module.weight, std=inputs**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, DacResidualUnit):
        nn.init.normal_(module.conv2.weight, std=0.3 * module.conv2.in_channels**-0.5)


class MiniatureCodec(nn.Module):
    """A `HiggsCodec` and the running counts of its codebooks."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.codec = HiggsCodec(codec_config())
        for part in (self.codec.acoustic_encoder, self.codec.acoustic_decoder, self.codec.encoder_semantic):
            part.apply(_keep_variance)
        self.codec.acoustic_decoder.conv2.weight.data.mul_(0.05)  # about as loud as speech
        fold_position_conv(self.codec)
        self.codec.semantic_model.requires_grad_(False).eval()
        for module in self.codec.modules():
            if isinstance(module, Snake1d):
                module.__class__ = _TrainableSnake
        self.register_buffer("counts_KN", torch.zeros(CODEBOOKS, CODEBOOK_SIZE))
        self.counts_KN: torch.Tensor

    @torch.no_grad()
    def semantic_features(self, wave_S: torch.Tensor) -> torch.Tensor:
        """HuBERT's features of one clip: [T, C]."""
        return self.codec._semantic_features(wave_S[None, None])[0].T.clone()

    def forward(
        self, wave_BS: torch.Tensor, semantic_BTC: torch.Tensor, books_B: torch.Tensor, *, learn_codes: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Encode, quantise and decode.

        Args:
            books_B: how many codebooks each clip uses.
            learn_codes: whether encoder and codebooks learn, or the decoder alone.

        Returns:
            The waveforms [B, S], the commitment loss, the codes [K, B, T].
        """
        with torch.set_grad_enabled(learn_codes):
            quantized_BTC, commitment, codes_KBT = self._quantised(wave_BS, semantic_BTC, books_B, learn_codes)
        codec = self.codec
        wave_B1S = codec.acoustic_decoder(codec.fc2(quantized_BTC).transpose(1, 2))
        return wave_B1S[:, 0], commitment, codes_KBT

    def _quantised(
        self, wave_BS: torch.Tensor, semantic_BTC: torch.Tensor, books_B: torch.Tensor, learn: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        codec = self.codec
        acoustic_BCT = DacEncoder.forward(codec.acoustic_encoder, wave_BS[:, None])
        semantic_BCT = codec.encoder_semantic(semantic_BTC.transpose(1, 2))
        residual = codec.fc(torch.cat([acoustic_BCT, semantic_BCT], dim=1).transpose(1, 2))
        quantized, commitment, codes = torch.zeros(()), torch.zeros(()), []
        for k in range(CODEBOOKS):
            codebook: Any = codec.quantizers[k]
            x_BTD = codebook.project_in(residual)
            code_BT, vector_BTD = self._nearest(k, x_BTD.detach(), learn)
            commitment = commitment + F.mse_loss(x_BTD, vector_BTD)
            out_BTC = codebook.project_out(x_BTD + (vector_BTD - x_BTD).detach())
            quantized = quantized + out_BTC * (books_B > k)[:, None, None]
            residual = residual - out_BTC
            codes.append(code_BT)
        return quantized, commitment, torch.stack(codes)

    @torch.no_grad()
    def _nearest(self, k: int, x_BTD: torch.Tensor, learn: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest codes [B, T] and their vectors [B, T, D]; where it learns, codebook `k` moves towards `x_BTD`."""
        embed_ND, counts_N = self.codec.quantizers[k].get_buffer("embed"), self.counts_KN[k]
        x_MD = x_BTD.flatten(0, 1)
        if not counts_N.any():  # the first batch
            embed_ND.copy_(_draw(x_MD, len(embed_ND)) + 0.01 * torch.randn_like(embed_ND))
            counts_N.fill_(len(x_MD) / len(embed_ND))
        code_M = torch.cdist(x_MD[None], embed_ND[None])[0].argmin(1)
        vector_BTD = embed_ND[code_M].view(x_BTD.shape)
        if learn:
            _move(embed_ND, counts_N, code_M, x_MD)
        return code_M.view(x_BTD.shape[:2]), vector_BTD


def _move(embed_ND: torch.Tensor, counts_N: torch.Tensor, code_M: torch.Tensor, x_MD: torch.Tensor) -> None:
    """Move a codebook's vectors and counts towards what fell to each code; a code that is not used starts again."""
    sums_ND = (counts_N[:, None] * embed_ND).mul_(DECAY).index_add_(0, code_M, x_MD, alpha=1 - DECAY)
    counts_N.mul_(DECAY).add_(torch.bincount(code_M, minlength=len(counts_N)), alpha=1 - DECAY)
    embed_ND.copy_(sums_ND / counts_N[:, None].clamp(min=1e-6))
    dead = counts_N < DEAD
    embed_ND[dead] = _draw(x_MD, int(dead.sum()))
    counts_N[dead] = REBORN


def _draw(x_MD: torch.Tensor, count: int) -> torch.Tensor:
    return x_MD[torch.randint(len(x_MD), (count,))]
