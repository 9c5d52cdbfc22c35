"""ECAPA-TDNN head over WavLM's hidden states, run from the tensors of its state dict.

In: hidden states, tensors by their published names. Out: an embedding. All sizes follow from the tensors.

Sources: Desplanques et al., ECAPA-TDNN, Interspeech 2020; its variant in UniSpeech's speaker verification (Chen et al.,
WavLM, 2022), whose checkpoint Seed-TTS-eval uses: a learned mean of hidden states, instance norm, batch norm after
ReLU, attention without global context.

Shapes: L hidden states, T frames, C channels, D embedding dimensions; one clip, so the batch axis is 1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LEAST_VARIANCE = 1e-9
OFFSET = 1e-6  # added to the features before they are normalised
BLOCKS = {"layer2": 2, "layer3": 3, "layer4": 4}  # dilation of each
Tensors = dict[str, Tensor]
_NORM = ("running_mean", "running_var", "weight", "bias")


def embed(tensors: Tensors, hidden_L1TC: Tensor) -> Tensor:
    """The embedding [1, D] of one clip.

    Raises:
        KeyError: a tensor is missing.
        RuntimeError: tensors do not fit together.
    """
    shares_L = functional.softmax(tensors["feature_weight"], dim=-1)
    x_1CT = torch.einsum("l,lbtc->bct", shares_L, hidden_L1TC) + OFFSET
    x_1CT = _conv_relu_norm(tensors, "layer1", functional.instance_norm(x_1CT), padding=2)
    outputs = []
    for name, dilation in BLOCKS.items():
        x_1CT = _block(tensors, name, x_1CT, dilation)
        outputs.append(x_1CT)
    x_1CT = functional.relu(_conv(tensors, "conv", torch.cat(outputs, 1)))
    return _linear(tensors, "linear", _norm(tensors, "bn", _pool(tensors, x_1CT)))


def _block(tensors: Tensors, name: str, x_1CT: Tensor, dilation: int) -> Tensor:
    """Pointwise convolution, dilated ones in a chain of channel groups, another pointwise one, and channel gates."""
    residual = _conv(tensors, f"{name}.shortcut", x_1CT) if f"{name}.shortcut.weight" in tensors else x_1CT
    x_1CT = _conv_relu_norm(tensors, f"{name}.Conv1dReluBn1", x_1CT)
    x_1CT = _chain(tensors, f"{name}.Res2Conv1dReluBn", x_1CT, dilation)
    x_1CT = _conv_relu_norm(tensors, f"{name}.Conv1dReluBn2", x_1CT)
    gate = functional.relu(_linear(tensors, f"{name}.SE_Connect.linear1", x_1CT.mean(2)))
    gate = torch.sigmoid(_linear(tensors, f"{name}.SE_Connect.linear2", gate))
    return x_1CT * gate[:, :, None] + residual


def _chain(tensors: Tensors, name: str, x_1CT: Tensor, dilation: int) -> Tensor:
    """Each group of channels is convolved after the group before it was added; the last one stays as it is."""
    *groups, last = x_1CT.split(tensors[f"{name}.convs.0.weight"].shape[0], 1)
    outputs: list[Tensor] = []
    for number, group in enumerate(groups):
        given = group + outputs[-1] if outputs else group
        given = _conv(tensors, f"{name}.convs.{number}", given, padding=dilation, dilation=dilation)
        outputs.append(_norm(tensors, f"{name}.bns.{number}", functional.relu(given)))
    return torch.cat([*outputs, last], 1)


def _pool(tensors: Tensors, x_1CT: Tensor) -> Tensor:
    """Mean and deviation over time [1, 2 C], weighted by attention."""
    scores_1CT = _conv(tensors, "pooling.linear2", torch.tanh(_conv(tensors, "pooling.linear1", x_1CT)))
    weights_1CT = functional.softmax(scores_1CT, dim=2)
    mean_1C = (weights_1CT * x_1CT).sum(2)
    variance_1C = (weights_1CT * x_1CT**2).sum(2) - mean_1C**2
    return torch.cat([mean_1C, variance_1C.clamp(min=LEAST_VARIANCE).sqrt()], 1)


def _conv(tensors: Tensors, name: str, x_1CT: Tensor, *, padding: int = 0, dilation: int = 1) -> Tensor:
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    return functional.conv1d(x_1CT, weight, bias, padding=padding, dilation=dilation)


def _norm(tensors: Tensors, name: str, x: Tensor) -> Tensor:
    mean, variance, weight, bias = (tensors[f"{name}.{kind}"] for kind in _NORM)
    return functional.batch_norm(x, mean, variance, weight, bias)


def _conv_relu_norm(tensors: Tensors, name: str, x_1CT: Tensor, *, padding: int = 0) -> Tensor:
    return _norm(tensors, f"{name}.bn", functional.relu(_conv(tensors, f"{name}.conv", x_1CT, padding=padding)))


def _linear(tensors: Tensors, name: str, x: Tensor) -> Tensor:
    return functional.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])
