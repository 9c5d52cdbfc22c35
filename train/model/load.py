"""Loading the model: boson's classes hold the weights, our functions run them.

In: a checkpoint folder, in Boson's original or the transformers-native layout. Out: `HiggsAudioModel`, frozen, in
evaluation mode. Guarantees (test_native.py, test_train.py): missing, unexpected and wrong-shaped weights are errors.

The model is built on meta and filled tensor by tensor, straight to the device in the wanted dtype, so host memory holds
no second copy. No remote code, no pickles.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.tensor  # peft 0.21 uses it without importing it
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
from higgs_tune.preprocess.audio.whisper import tower_config, tower_weights
from higgs_tune.preprocess.checkpoints.checkpoint import read_config
from higgs_tune.preprocess.checkpoints.native import NOT_WEIGHTS, boson_weight_name
from higgs_tune.preprocess.checkpoints.weights import all_finite, weight_files
from higgs_tune.shards.errors import UserError
from higgs_tune.train.model.quantized import QUANTIZED, Quantization, quantize
from safetensors import SafetensorError, safe_open

__all__ = ["HiggsAudioConfig", "HiggsAudioModel", "Loaded", "load_config", "load_model"]

TEXT_HEAD_WEIGHT = "audio_decoder_proj.text_lm_head.weight"
_AUDIO_ATTENTION = re.compile(r"layers\.\d+\.(audio_attn|audio_post_audio_attn_layer_norm)\.")
_SUPPORTED = {
    "use_delay_pattern": (True,),
    "audio_decoder_proj_num_layers": (0,),
    "use_rq_transformer": (False,),
    "encode_audio_in_tokens": (True,),
    "audio_adapter_type": ("dual_ffn", "dual_ffn_fast_forward"),
}


@dataclass(frozen=True)
class Loaded:
    """A model, and the parts that its checkpoint lacks.

    has_text_head: False where it is missing or all zeros; text cannot be trained then.
    new_audio_attention: audio self-attention was added, in a way that leaves every logit as it was.
    """

    model: HiggsAudioModel
    has_text_head: bool
    new_audio_attention: bool


# sizes of bosonai/higgs-audio-v2-generation-3B-base, for estimates where no checkpoint is at hand
RELEASED: dict[str, Any] = {
    "text_config": {
        "model_type": "llama", "vocab_size": 128_256, "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
    },
    "audio_adapter_type": "dual_ffn_fast_forward", "audio_dual_ffn_layers": list(range(28)),
    "audio_ffn_hidden_size": 3072, "audio_ffn_intermediate_size": 8192, "audio_num_codebooks": 8,
    "audio_codebook_size": 1024, "encode_audio_in_tokens": True, "use_delay_pattern": True, "skip_audio_tower": True,
    "encode_whisper_embed": False,
}  # fmt: skip


def load_config(path: Path, tower: Path | None = None) -> HiggsAudioConfig:
    """Read and check a checkpoint's config.

    Args:
        tower: the Whisper checkpoint to attach, as `load_model` does.

    Raises:
        UserError: no config.json, another model, a switch that this trainer does not know, or a tower of its own.
    """
    return checked_config(read_config(path), path, tower)


def checked_config(values: dict[str, Any], path: Path, tower: Path | None = None) -> HiggsAudioConfig:
    """`load_config` of a config that is read already."""
    config = HiggsAudioConfig(**values)
    for name, known in _SUPPORTED.items():
        if getattr(config, name) not in known:
            expected = " or ".join(map(str, known))
            raise UserError(f"unsupported {name}", where=path, expected=expected, got=getattr(config, name))
    config.use_audio_out_self_attention = bool(config.use_audio_out_self_attention)
    if tower is not None:
        if not config.skip_audio_tower:
            raise UserError("the checkpoint has a Whisper tower of its own; no other can be attached", where=path,
                            expected="skip_audio_tower: true", hint="Leave out --whisper_path.")  # fmt: skip
        config.skip_audio_tower, config.encode_whisper_embed = False, True
        config.audio_encoder_config = tower_config(tower)
    config._attn_implementation = "sdpa"
    config.audio_encoder_config._attn_implementation = "sdpa"
    return config


def load_model(
    path: Path, *, device: torch.device, dtype: torch.dtype, audio_attention: bool = False, tower: Path | None = None,
    quantization: Quantization | None = None,
) -> Loaded:  # fmt: skip
    """Load a checkpoint.

    Args:
        dtype: of every weight.
        audio_attention: add audio self-attention to the layers with an audio FFN, if the checkpoint has none.
        tower: a Whisper checkpoint whose encoder becomes the audio tower; its projector is new, and its output zero.
        quantization: of the linear layers, each as soon as it is read.

    Raises:
        UserError: missing, unexpected or wrong-shaped weights; the message lists them.
    """
    config = load_config(path, tower)
    adding = audio_attention and not config.use_audio_out_self_attention
    model = meta_model(config, audio_attention=audio_attention)
    own = model.state_dict()
    filled, problems = _read_weights(path, own, device, dtype, quantization)
    if tower is not None:
        filled |= _attached_tower(tower, own, device, dtype)
    missing = {name for name in own if name not in filled}
    if adding:
        missing = {name for name in missing if not _AUDIO_ATTENTION.match(name)}
    problems += [f"missing {name}" for name in sorted(missing - {TEXT_HEAD_WEIGHT})]
    if problems:
        more = f" and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise UserError(f"the checkpoint cannot be used: {'; '.join(problems[:20])}{more}", where=path)
    if TEXT_HEAD_WEIGHT in missing:
        filled[TEXT_HEAD_WEIGHT] = torch.zeros(own[TEXT_HEAD_WEIGHT].shape, device=device, dtype=dtype)
    if adding:
        for name, (origin, is_zero) in identity_attention(filled, config).items():
            filled[name] = torch.zeros_like(filled[origin]) if is_zero else filled[origin].clone()
    model.load_state_dict(filled, assign=True)
    make_buffers(model, config, device)
    has_text_head = bool(filled[TEXT_HEAD_WEIGHT].any())  # zeros in older exports of a base without one
    return Loaded(model.requires_grad_(False).eval(), has_text_head, adding)


def meta_model(config: HiggsAudioConfig, *, audio_attention: bool = False) -> HiggsAudioModel:
    """The model without memory for its weights.

    Args:
        audio_attention: with audio self-attention, also where its checkpoint has none.
    """
    config.use_audio_out_self_attention |= audio_attention
    with torch.device("meta"):
        return HiggsAudioModel(config)


def _read_weights(
    path: Path, own: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype,
    quantization: Quantization | None,
) -> tuple[dict[str, torch.Tensor], list[str]]:  # fmt: skip
    """The checkpoint's weights under Boson's names, and a line for each that does not fit."""
    filled: dict[str, torch.Tensor] = {}
    problems: list[str] = []
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt", device=str(device)) as tensors:
                for stored in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                    name, shape = boson_weight_name(stored), tensors.get_slice(stored).get_shape()
                    if NOT_WEIGHTS.search(stored):
                        continue
                    if name not in own:
                        problems.append(f"unexpected {stored}")
                    elif name in filled:
                        problems.append(f"{stored} is a second {name}")
                    elif list(own[name].shape) != shape:
                        problems.append(f"{stored}: expected {list(own[name].shape)}, got {shape}")
                        filled[name] = own[name]
                    else:
                        filled[name] = tensors.get_tensor(stored).to(dtype)
                        if not all_finite(filled[name]):
                            problems.append(f"{stored} holds NaN or infinite values as {dtype}")
                        if quantization and QUANTIZED.fullmatch(name):
                            filled[name] = quantize(filled[name], quantization)
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot read weights: {error}", where=file) from error
    return filled, problems


def _attached_tower(
    tower: Path, own: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Weights of the Whisper tower, and of a projector that maps its output to zero.

    So the features add nothing at first but their positions, and the projector has a gradient from the first step on.
    """
    new = {f"audio_tower.{name}": value.to(device, dtype) for name, value in tower_weights(tower).items()}
    shapes = {name: value.shape for name, value in own.items() if name.startswith("audio_encoder_proj.")}
    return new | {name: torch.zeros(shape, device=device, dtype=dtype) for name, shape in shapes.items()}


def identity_attention(names: Collection[str], config: HiggsAudioConfig) -> dict[str, tuple[str, bool]]:
    """Weights of audio self-attention that leaves the model's function as it is.

    The output projection is zero, so it adds nothing to the residual stream; the norm after it is the audio input norm,
    so the shared attention sees what it saw before. Queries, keys and values begin as those of the shared attention.

    Returns:
        by the name of each new weight: the weight of `names` that it has the shape of, and whether it is zero instead
        of a copy.
    """
    new: dict[str, tuple[str, bool]] = {}
    for layer in config.audio_dual_ffn_layers or ():
        prefix = f"layers.{layer}"
        for name in names:
            if name.startswith(f"{prefix}.self_attn."):
                new[name.replace(".self_attn.", ".audio_attn.")] = name, ".o_proj." in name
        norm = f"{prefix}.audio_input_layernorm.weight"
        new[f"{prefix}.audio_post_audio_attn_layer_norm.weight"] = norm, False
    return new


def make_buffers(model: HiggsAudioModel, config: HiggsAudioConfig, device: torch.device) -> None:
    """What no checkpoint holds: rotary frequencies, and boson's codebook weights."""
    rotary = type(model.rotary_emb)(config=config.text_config, device=device)
    model.rotary_emb = rotary
    for layer in model.layers:
        for name in ("self_attn", "audio_attn"):
            attention = getattr(layer, name, None)
            if attention is not None:
                attention.rotary_emb = rotary
    model.audio_codebook_weights = torch.ones(config.audio_num_codebooks, device=device) / config.audio_num_codebooks


def without_marks(value: Any) -> Any:
    """Without the mark that an attention was chosen: transformers would ignore `attn_implementation`."""
    if not isinstance(value, dict):
        return value
    return {name: without_marks(x) for name, x in value.items() if name != "_attn_implementation_autoset"}
