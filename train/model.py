"""The model: boson's classes hold the weights, our functions run them.

In: a checkpoint folder in Boson's original layout. Out: `HiggsAudioModel`, frozen, in evaluation mode.
Never: remote code, pickles, a weight that is silently missing.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.tensor  # peft 0.21 uses it without importing it
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
from safetensors import safe_open

from ..preprocess.checkpoint import read_config
from ..shards.errors import UserError

__all__ = ["HiggsAudioConfig", "HiggsAudioModel", "load_config", "load_model"]


def load_config(path: Path) -> HiggsAudioConfig:
    """Read and check a checkpoint's config.

    Raises:
        UserError: no config.json, another model, or a switch that this trainer does not know.
    """
    config = HiggsAudioConfig(**read_config(path))
    supported = {
        "use_delay_pattern": (True,),
        "audio_decoder_proj_num_layers": (0,),
        "use_rq_transformer": (False,),
        "encode_audio_in_tokens": (True,),
        "skip_audio_tower": (True,),
        "audio_adapter_type": ("dual_ffn", "dual_ffn_fast_forward"),
    }
    for name, values in supported.items():
        if getattr(config, name) not in values:
            expected = " or ".join(str(value) for value in values)
            raise UserError(f"unsupported {name}", where=path, expected=expected, got=getattr(config, name))
    config._attn_implementation = "sdpa"
    return config


def load_model(path: Path, *, device: torch.device, dtype: torch.dtype) -> HiggsAudioModel:
    """Build on meta and fill straight to the device, tensor by tensor, in the wanted dtype.

    Raises:
        UserError: missing, unexpected or wrong-shaped weights; the message lists them.
    """
    config = load_config(path)
    with torch.device("meta"):
        model = HiggsAudioModel(config)
    own = model.state_dict()
    filled: dict[str, torch.Tensor] = {}
    problems: list[str] = []
    for file in _weight_files(path):
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                shape = tensors.get_slice(name).get_shape()
                if name not in own:
                    problems.append(f"unexpected {name}")
                elif list(own[name].shape) != shape:
                    problems.append(f"{name}: expected {list(own[name].shape)}, got {shape}")
                else:
                    filled[name] = tensors.get_tensor(name).to(dtype)
    problems += [f"missing {name}" for name in own if name not in filled and f"unexpected {name}" not in problems]
    if problems:
        more = f" and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise UserError(f"the checkpoint does not fit its config: {'; '.join(problems[:20])}{more}", where=path)
    model.load_state_dict(filled, assign=True)
    _make_buffers(model, config, device)
    return model.requires_grad_(False).eval()


def _weight_files(path: Path) -> list[Path]:
    files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise UserError("the checkpoint has no weights", where=path, expected="model*.safetensors")
    return files


def _make_buffers(model: HiggsAudioModel, config: HiggsAudioConfig, device: torch.device) -> None:
    """What no checkpoint holds: rotary frequencies, and boson's codebook weights."""
    rotary = type(model.rotary_emb)(config=config.text_config, device=device)
    model.rotary_emb = rotary
    for layer in model.layers:
        for name in ("self_attn", "audio_attn"):
            attention = getattr(layer, name, None)
            if attention is not None:
                attention.rotary_emb = rotary
    model.audio_codebook_weights = torch.ones(config.audio_num_codebooks, device=device) / config.audio_num_codebooks
