"""What trains: LoRA targets by preset and stage, PEFT injection, and running a LoRA layer without PEFT's casts.

In: boson's model, a preset or a regular expression, a stage, perhaps an adapter to continue. Out: a `PeftModel` whose
only trainable parameters are those of the stage. Never: a trainable parameter that the stage freezes.

Method: LoRA (https://arxiv.org/abs/2106.09685) as PEFT writes it, so an adapter trained here loads on
`HiggsAudioModel` with plain PEFT.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

from ..shards.errors import UserError
from .model import HiggsAudioModel

Stage = Literal["stage1", "stage2", "single"]

_ATTENTION = r"self_attn\.[qkvo]_proj"
_TEXT_FFN = r"mlp\.(gate|up|down)_proj"
_AUDIO_FFN = r"audio_mlp\.(gate|up|down)_proj"
PRESETS: dict[str, tuple[str, ...]] = {
    "comprehensive": (_ATTENTION, _TEXT_FFN, _AUDIO_FFN),
    "text_only": (_ATTENTION, _TEXT_FFN),
    "audio_focused": (_ATTENTION, _AUDIO_FFN),
    "attention_only": (_ATTENTION,),
}
DEFAULT_PRESET: dict[Stage, str] = {"stage1": "text_only", "stage2": "comprehensive", "single": "comprehensive"}

# every parameter that only audio positions use; stage 1 keeps all of them as they are
AUDIO_PARAMETER = re.compile(
    r"(^|\.)(audio_mlp|audio_attn|audio_input_layernorm|audio_post_attention_layernorm|audio_post_audio_attn_layer_norm"
    r"|audio_codebook_embeddings|audio_out_embed_projector|audio_lm_head|audio_tower|audio_encoder_proj)(\.|$)"
)


@dataclass(frozen=True)
class LoraOptions:
    """r, alpha: rank and scaling (alpha / r); dropout: of LoRA's input; preset: which modules."""

    r: int
    alpha: float
    dropout: float
    preset: str


def target_modules(model: nn.Module, preset: str, stage: Stage) -> list[str]:
    """Names of the linear layers that get LoRA, in model order.

    Raises:
        UserError: the preset leaves nothing to train in this stage.
    """
    pattern = re.compile(rf"layers\.\d+\.({'|'.join(PRESETS[preset])})")
    names = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and pattern.fullmatch(name)
    ]
    if stage == "stage1":
        names = [name for name in names if not AUDIO_PARAMETER.search(name)]
    if not names:
        raise UserError(f"--lora_preset {preset} leaves nothing to train in {stage}")
    return names


def read_adapter_config(folder: Path) -> dict[str, Any] | None:
    """The adapter_config.json of a training output folder; None where the folder holds no adapter.

    Raises:
        UserError: it is not JSON, or not LoRA's.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"the adapter's config is not JSON: {error}", where=file) from error
    if config.get("peft_type") != "LORA":
        raise UserError("not a LoRA adapter", where=file, expected="peft_type LORA", got=config.get("peft_type"))
    return config


def add_lora(
    model: HiggsAudioModel, options: LoraOptions, stage: Stage, base_path: Path, adapter: Path | None
) -> PeftModel:
    """Inject LoRA for a stage; continue the adapter's modules, if one is given.

    Args:
        base_path: the base checkpoint, named in the adapter's config.
        adapter: folder of an earlier stage's adapter; its modules continue, those of this stage join.

    Raises:
        UserError: the adapter's rank or modules do not fit.
    """
    targets = target_modules(model, options.preset, stage)
    weights: dict[str, torch.Tensor] = {}
    if adapter is not None:
        weights = load_file(adapter / "adapter_model.safetensors")
        earlier = {m[1] for name in weights if (m := re.match(r"base_model\.model\.(.*)\.lora_A\.weight$", name))}
        targets = [name for name, _ in model.named_modules() if name in earlier or name in set(targets)]
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=options.dropout,
        target_modules=targets,
        bias="none",
    )
    model.name_or_path = str(base_path)  # peft writes it into the adapter's config
    peft_model = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    assert isinstance(peft_model, PeftModel)
    if weights:
        _load_adapter(peft_model, weights, adapter)
    if stage == "stage1":
        for name, parameter in peft_model.named_parameters():
            if AUDIO_PARAMETER.search(name):
                parameter.requires_grad_(False)
    return peft_model


def _load_adapter(peft_model: PeftModel, weights: dict[str, torch.Tensor], adapter: Path | None) -> None:
    try:
        result = set_peft_model_state_dict(peft_model, weights)
    except RuntimeError as error:
        raise UserError(f"the adapter does not fit: {error}", where=adapter) from error
    if result.unexpected_keys:
        raise UserError(
            "the adapter has weights for no module of this model", where=adapter, got=result.unexpected_keys
        )


def trainable(peft_model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: parameter for name, parameter in peft_model.named_parameters() if parameter.requires_grad}


def linear(module: nn.Module, x_NH: torch.Tensor) -> torch.Tensor:
    """Run a linear layer, with LoRA if it has one.

    LoRA's factors are kept in float32 and used in the activations' dtype. Variants that PEFT computes otherwise
    (DoRA) go through PEFT's own forward.
    """
    if not isinstance(module, LoraLayer):
        return module(x_NH)
    if module.merged or module.disable_adapters or any(module.use_dora.values()):
        return module(x_NH)
    base = module.get_base_layer()
    y_NO = F.linear(x_NH, base.weight, base.bias)  # pyright: ignore[reportArgumentType]
    for name in module.active_adapters:
        if name in module.lora_A:
            a_rH = module.lora_A[name].get_parameter("weight").to(x_NH.dtype)
            b_Or = module.lora_B[name].get_parameter("weight").to(x_NH.dtype)
            low_Nr = F.linear(module.lora_dropout[name](x_NH), a_rH)
            y_NO = y_NO + F.linear(low_Nr, b_Or) * module.scaling[name]
    return y_NO
