"""Loading the audio tokenizer from either checkpoint layout.

Boson's original: `config.json` (no model_type) and `model.pth`. Transformers-native: `config.json` with
`model_type: higgs_audio_v2_tokenizer` and safetensors. Sizes that Boson's config leaves out are read from the weights.
Guarantees (tests/test_codec.py): no pickled code is run; a missing or unknown weight, or one of a wrong shape, is an
error that lists it.
"""

from __future__ import annotations

import re
from pathlib import Path
from pickle import UnpicklingError  # what torch.load raises for what weights_only forbids
from typing import Any

import torch
from higgs_tune.preprocess.checkpoints.weights import all_finite
from higgs_tune.preprocess.codec.codec import CodecConfig, HiggsCodec
from higgs_tune.preprocess.codec.weights import NATIVE_TYPE, codec_weight_files, read_codec_config
from higgs_tune.shards.errors import UserError, few, first_line
from higgs_tune.shards.format import FRAME_RATE_HZ
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn.utils import parametrize
from transformers import DacConfig, HubertConfig
from transformers.modeling_utils import no_init_weights

CODEC_RATE_HZ = 24_000
RATES_HZ = {"sample_rate": CODEC_RATE_HZ, "semantic_sample_rate": 16_000}  # the encoder's strides presume them
Weights = dict[str, torch.Tensor]

# weights that neither encoding nor decoding uses
_UNUSED = re.compile(r"^(decoder_semantic|fc_post1|fc1)\.|\.(inited|cluster_size|embed_avg)$|masked_spec_embed$")


def load_codec(path: str | Path, device: str | torch.device = "cpu") -> HiggsCodec:
    """Load a codec for inference, in float32.

    Both layouts pad a clip that is no whole number of frames by 320 samples, as Boson's class does and as the language
    model was trained; transformers' own class for the native layout (5.23) pads by 480.

    Raises:
        UserError: no config, an unknown layout, or weights that do not fit.
    """
    folder = Path(path)
    raw = read_codec_config(folder)
    try:
        codec = _make_codec(folder, raw, native=raw.get("model_type") == NATIVE_TYPE)
    except KeyError as error:
        raise UserError(f"the audio tokenizer lacks a weight or setting: {error}", where=folder) from error
    except UserError:
        raise
    except Exception as error:  # from anywhere in transformers' and PyTorch's blocks
        raise UserError(f"config and weights make no codec: {first_line(error)}", where=folder) from error
    return codec.requires_grad_(False).eval().to(device)


def _make_codec(folder: Path, raw: dict[str, Any], *, native: bool) -> HiggsCodec:
    weights, where = _read_weights(folder), folder / "config.json"
    config = _native_config(raw, weights, where) if native else _boson_config(raw, weights, where)
    with no_init_weights():  # on the meta device, weight norm would import all of torch's compiler: seconds a worker
        codec = HiggsCodec(config)
    fold_position_conv(codec)
    rename = native_name if native else boson_name
    _assign(codec, {rename(name): name for name in codec.state_dict()}, weights, folder)
    return codec


def _read_weights(folder: Path) -> Weights:
    weights: Weights = {}
    for file in codec_weight_files(folder):
        try:
            if file.suffix == ".pth":
                weights |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            else:
                weights |= load_file(file)
        except (OSError, RuntimeError, ValueError, TypeError, EOFError, SafetensorError, UnpicklingError) as error:
            pickled = "it holds more than tensors, and no pickled code is run"
            reason = pickled if isinstance(error, UnpicklingError) else first_line(error)
            raise UserError(f"cannot read weights: {reason}", where=file) from error
    if broken := [name for name, value in weights.items() if not all_finite(value)]:
        raise UserError("the audio tokenizer's weights are NaN or infinite", where=folder, got=few(sorted(broken)))
    if not any(name.startswith("semantic_model.") for name in weights):
        hint = "Use a checkpoint whose weights hold semantic_model.*: no remote code is run to fetch them."
        raise UserError("the HuBERT weights are missing", where=folder, hint=hint)
    return fuse_weight_norm({name: value for name, value in weights.items() if not _UNUSED.search(name)})


def fuse_weight_norm(weights: Weights) -> Weights:
    """Replace each weight-normed pair (direction, magnitude) by its product."""
    fused = dict(weights)
    for name in weights:
        for suffix, other in (("weight_v", "weight_g"), ("parametrizations.weight.original1", "original0")):
            if name.endswith("." + suffix):
                stem = name.removesuffix(suffix)
                magnitude = fused.pop(stem + other if other == "weight_g" else name.replace("original1", other))
                direction = fused.pop(name)
                axis = max(range(magnitude.ndim), key=lambda d: magnitude.shape[d])
                fused[stem + "weight"] = torch._weight_norm(direction, magnitude, axis)  # pyright: ignore[reportPrivateImportUsage]
    return fused


def native_name(name: str) -> str:
    """The transformers-native name of a weight of `HiggsCodec`."""
    name = re.sub(r"^(quantizers\.\d+)\.embed$", r"\1.codebook.embed", name)
    return re.sub(r"^quantizers\.", "quantizer.quantizers.", name)


def boson_name(name: str) -> str:
    """The name in Boson's model.pth, with weight norm fused, of a weight of `HiggsCodec`."""
    part, _, rest = name.partition(".")
    if part in _DAC_LAYERS:
        return _DAC_LAYERS[part] + _boson_dac(part, rest)
    name = re.sub(r"^fc\.", "fc_prior.", name)
    name = re.sub(r"^fc2\.", "fc_post2.", name)
    name = re.sub(r"^(quantizers\.\d+)\.embed$", r"\1._codebook.embed", name)
    name = re.sub(r"^quantizers\.", "quantizer.vq.layers.", name)
    return re.sub(r"^(encoder_semantic\..*conv1?)\.(weight|bias)$", r"\1.conv.\2", name)


_DAC_LAYERS = {"acoustic_encoder": "encoder.block.", "acoustic_decoder": "decoder_2.model."}
_DAC_RATIOS = 5  # strided blocks of the codec's DAC, encoder and decoder alike


def _boson_dac(part: str, rest: str) -> str:
    """The original DAC numbers its layers: a convolution, the strided blocks, snake, a convolution."""
    head, leaf = rest.split(".", 1)
    if head != "block":
        return f"{ {'conv1': 0, 'snake1': _DAC_RATIOS + 1, 'conv2': _DAC_RATIOS + 2}[head] }.{leaf}"
    number, inner, leaf = leaf.split(".", 2)
    encoder = part == "acoustic_encoder"
    layers = ("res_unit1", "res_unit2", "res_unit3", "snake1", "conv1")
    layers = layers if encoder else ("snake1", "conv_t1", "res_unit1", "res_unit2", "res_unit3")
    if inner.startswith("res_unit"):
        layer, leaf = leaf.split(".", 1)
        leaf = f"block.{('snake1', 'conv1', 'snake2', 'conv2').index(layer)}.{leaf}"
    return f"{int(number) + 1}.block.{layers.index(inner)}.{leaf}"


def _boson_config(raw: dict[str, Any], weights: Weights, where: Path) -> CodecConfig:
    ratios = raw["ratios"]
    for name, good, expected in (
        ("bins", isinstance(raw.get("bins", 1024), int), "an integer"),
        ("downsample_mode", raw.get("downsample_mode", "step_down") == "step_down", "step_down"),
        ("ratios", isinstance(ratios, list) and len(ratios) == _DAC_RATIOS, f"{_DAC_RATIOS} ratios"),
    ):
        if not good:
            raise UserError(f"unsupported {name}", where=where, expected=expected, got=raw[name])
    last = _DAC_RATIOS + 2
    acoustic = DacConfig(
        encoder_hidden_size=len(weights["encoder.block.0.weight"]),
        downsampling_ratios=ratios,
        decoder_hidden_size=len(weights["decoder_2.model.0.weight"]),
    )
    acoustic.upsampling_ratios = ratios
    acoustic.hidden_size = len(weights[f"encoder.block.{last}.weight"])
    return _config(raw, acoustic, _hubert(weights), weights, where)


def _native_config(raw: dict[str, Any], weights: Weights, where: Path) -> CodecConfig:
    """Sizes from a native config; missing settings take transformers' defaults."""
    fixed = {"kernel_size": 3, "unit_kernel_size": 3, "channel_ratios": [1, 1], "strides": [1, 1]}
    for name, only in {**fixed, "block_dilations": [1, 1], "downsample_factor": 320}.items():
        if raw.get(name, only) != only:
            raise UserError(f"unsupported {name}", where=where, expected=only, got=raw[name])
    sizes = {"encoder_hidden_size": 64, "decoder_hidden_size": 1024, "hidden_size": 256}
    ratios = {"downsampling_ratios": [8, 5, 4, 2], "upsampling_ratios": [8, 5, 4, 2]}
    given: dict[str, Any] = {**sizes, **ratios, **(raw.get("acoustic_model_config") or {})}
    acoustic = DacConfig(**{name: given[name] for name in ("encoder_hidden_size", "decoder_hidden_size")})
    for name in ("hidden_size", *ratios):  # DacConfig derives these; this codec's differ
        setattr(acoustic, name, given[name])
    semantic = HubertConfig(**(raw.get("semantic_model_config") or {}))
    return _config(raw, acoustic, semantic, weights, where)


def _config(
    raw: dict[str, Any], acoustic: DacConfig, semantic: HubertConfig, weights: Weights, where: Path
) -> CodecConfig:
    books = [value for name, value in weights.items() if name.endswith("codebook.embed")]
    if not books:
        raise KeyError("codebooks")
    semantic.mask_time_prob = semantic.mask_feature_prob = 0.0  # no parameter for masked frames
    codebook_size, codebook_dim = books[0].shape
    for name, only in RATES_HZ.items():
        if raw.get(name) not in (None, only):
            raise UserError(f"unsupported {name}", where=where, expected=only, got=f"{raw[name]!r:.40}")
    rates = RATES_HZ["sample_rate"], RATES_HZ["semantic_sample_rate"]
    config = CodecConfig(*rates, len(books), codebook_size, codebook_dim, semantic, acoustic)
    if config.hop_length * FRAME_RATE_HZ != config.sample_rate_hz:
        expected, got = f"{config.sample_rate_hz // FRAME_RATE_HZ} samples", config.hop_length
        raise UserError("unsupported length of a frame, the product of the ratios", where=where, expected=expected,
                        got=got)  # fmt: skip
    return config


def _hubert(weights: Weights) -> HubertConfig:
    """HuBERT's sizes, read from its weights; strides and head size as in the base model."""

    def shape(name: str) -> torch.Size:
        return weights[f"semantic_model.{name}"].shape

    def count(pattern: str) -> int:
        return len({m[1] for name in weights if (m := re.match(rf"semantic_model\.{pattern}", name))})

    convolutions = count(r"feature_extractor\.conv_layers\.(\d+)\.")
    kernels = [shape(f"feature_extractor.conv_layers.{i}.conv.weight") for i in range(convolutions)]
    layer_norms = count(r"feature_extractor\.conv_layers\.(\d+)\.layer_norm\.")
    hidden, position = shape("feature_projection.projection.weight")[0], shape("encoder.pos_conv_embed.conv.weight")
    return HubertConfig(
        hidden_size=hidden,
        num_hidden_layers=count(r"encoder\.layers\.(\d+)\."),
        num_attention_heads=max(1, hidden // 64),
        intermediate_size=shape("encoder.layers.0.feed_forward.intermediate_dense.weight")[0],
        conv_dim=[kernel[0] for kernel in kernels],
        conv_kernel=[kernel[2] for kernel in kernels],
        conv_stride=[5] + [2] * (convolutions - 1),
        conv_bias="semantic_model.feature_extractor.conv_layers.0.conv.bias" in weights,
        feat_extract_norm="layer" if layer_norms > 1 else "group",
        feat_proj_layer_norm="semantic_model.feature_projection.layer_norm.weight" in weights,
        num_conv_pos_embeddings=position[2],
        num_conv_pos_embedding_groups=hidden // position[1],
    )


def fold_position_conv(codec: HiggsCodec) -> None:
    """Fuse the weight norm of HuBERT's position embedding, which would be computed at each call."""
    parametrize.remove_parametrizations(codec.semantic_model.encoder.pos_conv_embed.conv, "weight")


def _assign(codec: HiggsCodec, own_name: dict[str, str], weights: Weights, folder: Path) -> None:
    """Fill the codec with the weights.

    Args:
        own_name: our name for each name in the checkpoint.

    Raises:
        UserError: lists missing and unexpected weights, and wrong shapes.
    """
    own = codec.state_dict()
    filled = {own_name[name]: value.float() for name, value in weights.items() if name in own_name}
    problems = {
        "missing": sorted(own_name.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - own_name.keys()),
        "of a wrong shape": [
            f"{name} (expected {tuple(own[name].shape)}, got {tuple(value.shape)})"
            for name, value in filled.items()
            if own[name].shape != value.shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{len(names)} {kind}: {few(names)}" for kind, names in problems.items() if names)
        raise UserError(f"the audio tokenizer's weights do not fit: {listed}", where=folder)
    codec.load_state_dict(filled, assign=True)
