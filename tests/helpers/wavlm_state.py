"""State dicts by the names and shapes of `wavlm_large_finetune.pth`, at any size, with weights that never change."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

KERNELS = (10, 3, 3, 3, 3, 2, 2)


@dataclass(frozen=True)
class Sizes:
    """Sizes of WavLM and its head; the defaults are a tiny model, `LARGE` is the published one."""

    hidden: int = 16
    layers: int = 3
    heads: int = 2
    inner: int = 32
    conv: int = 8
    positions: int = 8
    position_groups: int = 4
    buckets: int = 32
    channels: int = 16
    embedding: int = 8


LARGE = Sizes(1024, 24, 16, 4096, 512, 128, 16, 320, 512, 256)


def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, by its published name."""
    encoder = {f"feature_extract.model.{name}": shape for name, shape in _encoder(sizes)}
    return {"feature_weight": (sizes.layers + 1,)} | encoder | dict(_head(sizes))


def _encoder(sizes: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = sizes.hidden, sizes.inner
    yield "mask_emb", (hidden,)
    for number, kernel in enumerate(KERNELS):
        name = f"feature_extractor.conv_layers.{number}"
        yield f"{name}.0.weight", (sizes.conv, sizes.conv if number else 1, kernel)
        yield from ((f"{name}.2.1.{kind}", (sizes.conv,)) for kind in ("weight", "bias"))
    yield from _affine("post_extract_proj", hidden, sizes.conv)
    yield "encoder.pos_conv.0.bias", (hidden,)
    yield "encoder.pos_conv.0.weight_g", (1, 1, sizes.positions)
    yield "encoder.pos_conv.0.weight_v", (hidden, hidden // sizes.position_groups, sizes.positions)
    for number in range(sizes.layers):
        name = f"encoder.layers.{number}"
        if number == 0:
            yield f"{name}.self_attn.relative_attention_bias.weight", (sizes.buckets, sizes.heads)
        yield f"{name}.self_attn.grep_a", (1, sizes.heads, 1, 1)
        yield from _affine(f"{name}.self_attn.grep_linear", 8, hidden // sizes.heads)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _affine(f"{name}.self_attn.{part}", hidden, hidden)
        yield from _affine(f"{name}.fc1", inner, hidden)
        yield from _affine(f"{name}.fc2", hidden, inner)
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            yield from _affine(f"{name}.{norm}", hidden)
    yield from _affine("encoder.layer_norm", hidden)
    yield from _affine("layer_norm", sizes.conv)


def _head(sizes: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    channels, group = sizes.channels, sizes.channels // 8
    yield from _affine("layer1.conv", channels, sizes.hidden, 5)
    yield from _batch_norm("layer1.bn", channels)
    for layer in ("layer2", "layer3", "layer4"):
        for part in ("Conv1dReluBn1", "Conv1dReluBn2"):
            yield from _affine(f"{layer}.{part}.conv", channels, channels, 1)
            yield from _batch_norm(f"{layer}.{part}.bn", channels)
        for number in range(7):
            yield from _affine(f"{layer}.Res2Conv1dReluBn.convs.{number}", group, group, 3)
            yield from _batch_norm(f"{layer}.Res2Conv1dReluBn.bns.{number}", group)
        yield from _affine(f"{layer}.SE_Connect.linear1", 128, channels)
        yield from _affine(f"{layer}.SE_Connect.linear2", channels, 128)
    yield from _affine("conv", 1536, 3 * channels, 1)
    yield from _affine("pooling.linear1", 128, 1536, 1)
    yield from _affine("pooling.linear2", 1536, 128, 1)
    yield from _batch_norm("bn", 3072)
    yield from _affine("linear", sizes.embedding, 3072)


def _affine(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _batch_norm(name: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from ((f"{name}.{kind}", (channels,)) for kind in ("weight", "bias", "running_mean", "running_var"))
    yield f"{name}.num_batches_tracked", ()


def state_dict(sizes: Sizes) -> dict[str, torch.Tensor]:
    """Random weights that depend on a tensor's name and shape alone."""
    return {name: _values(name, shape) for name, shape in shapes(sizes).items()}


def _values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.tensor(1)
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith(("running_var", "weight_g")):
        values = np.abs(values) + np.float32(0.5)
    elif len(shape) > 1:
        values /= np.float32(np.sqrt(np.prod(shape[1:])))
    return torch.from_numpy(values)
