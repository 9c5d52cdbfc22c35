"""LoRA by preset and stage, and modules trained in full.

In: boson's model, a `TrainableOptions`, a stage, perhaps an adapter to continue. Out: a `PeftModel` whose only
trainable parameters are those of the stage (test_lora.py, test_train.py).

Methods: LoRA (https://arxiv.org/abs/2106.09685), rsLoRA (https://arxiv.org/abs/2312.03732) and DoRA
(https://arxiv.org/abs/2402.09353) as PEFT writes them, so an adapter trained here loads on `HiggsAudioModel` with plain
PEFT. Modules trained in full are PEFT's `modules_to_save`, in the same file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from higgs_tune.shards.errors import UserError
from higgs_tune.train.model.load import HiggsAudioModel
from higgs_tune.train.presets import PRESETS
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

Stage = Literal["stage1", "stage2", "single"]

# every parameter that only audio positions use; stage 1 keeps all of them as they are
AUDIO_PARAMETER = re.compile(
    r"(^|\.)(audio_mlp|audio_attn|audio_input_layernorm|audio_post_attention_layernorm|audio_post_audio_attn_layer_norm"
    r"|audio_codebook_embeddings|audio_out_embed_projector|audio_lm_head|audio_tower|audio_encoder_proj)(\.|$)"
)
TEXT_HEAD, AUDIO_HEAD = "audio_decoder_proj.text_lm_head", "audio_decoder_proj.audio_lm_head"
AUDIO_ATTENTION = ("audio_attn", "audio_post_audio_attn_layer_norm")
_SAVED = re.compile(r"base_model\.model\.(.*?)(\.lora_(A|B|magnitude_vector)\b.*|\.(weight|bias))$")


@dataclass(frozen=True)
class TrainableOptions:
    """Which modules train, by LoRA or in full.

    Attributes:
        r, alpha, dropout: rank of LoRA, its scaling (alpha / r), dropout of its input.
        preset: which linear layers get LoRA; or `pattern`, a regular expression over module names.
        rslora, dora: variants of LoRA.
        heads, audio_embeddings, audio_attention, audio_tower, audio_encoder_proj: trained in full.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    preset: str = "comprehensive"
    pattern: str | None = None
    rslora: bool = False
    dora: bool = False
    heads: bool = False
    audio_embeddings: bool = False
    audio_attention: bool = False
    audio_tower: bool = False
    audio_encoder_proj: bool = False

    def full_modules(self, stage: Stage) -> list[str]:
        """Names (or last parts of names) of modules trained in full.

        Raises:
            UserError: an audio module is asked for in stage 1.
        """
        audio = {
            "--train_audio_embeddings": (self.audio_embeddings, ("audio_codebook_embeddings",)),
            "--use_audio_out_self_attention": (self.audio_attention, AUDIO_ATTENTION),
            "--train_audio_tower": (self.audio_tower, ("audio_tower",)),
            "--train_audio_encoder_proj": (self.audio_encoder_proj, ("audio_encoder_proj",)),
        }
        asked = [flag for flag, (wanted, _) in audio.items() if wanted]
        if stage == "stage1" and asked:
            raise UserError(f"{', '.join(asked)} cannot train in stage1, which freezes every audio parameter")
        heads = ([TEXT_HEAD] if stage == "stage1" else [TEXT_HEAD, AUDIO_HEAD]) if self.heads else []
        return heads + [name for wanted, names in audio.values() if wanted for name in names]


def target_modules(model: nn.Module, options: TrainableOptions, stage: Stage) -> list[str]:
    """Names of the linear layers that get LoRA, in model order.

    Raises:
        UserError: the preset or the pattern leaves nothing to train in this stage, or is no regular expression.
    """
    try:
        text = options.pattern or PRESETS[options.preset].pattern
        pattern = re.compile(text)
    except re.error as error:
        raise UserError(f"--lora_target_modules is not a regular expression: {error}", got=options.pattern) from error
    linear_layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = [name for name in linear_layers if pattern.fullmatch(name)]
    if stage == "stage1":
        names = [name for name in names if not AUDIO_PARAMETER.search(name)]
    if not names:
        flag = f"--lora_target_modules {options.pattern}" if options.pattern else f"--lora_preset {options.preset}"
        raise UserError(f"{flag} leaves nothing to train in {stage}", expected="a linear layer", got=text)
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


def read_adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a training output folder's adapter.

    Raises:
        UserError: they are missing or damaged.
    """
    file = folder / "adapter_model.safetensors"
    try:
        return load_file(file)
    except Exception as error:  # safetensors raises its own kind, and OSError
        raise UserError(f"cannot read the adapter: {error}", where=file) from error


def has_audio_attention(adapter: Path) -> bool:
    """Whether an adapter holds audio self-attention, which the released checkpoint lacks."""
    return any(".audio_attn." in name for name in read_adapter_weights(adapter))


def add_lora(
    model: HiggsAudioModel, options: TrainableOptions, stage: Stage, base_path: Path, adapter: Path | None
) -> PeftModel:
    """Inject LoRA for a stage; continue the adapter's modules, if one is given.

    Args:
        base_path: the base checkpoint, named in the adapter's config.
        adapter: folder of an earlier stage's adapter; its modules continue, those of this stage join.

    Raises:
        UserError: the adapter's rank or modules do not fit.
    """
    targets, full = set(target_modules(model, options, stage)), set(options.full_modules(stage))
    weights = read_adapter_weights(adapter) if adapter is not None else {}
    for name in weights:
        match = _SAVED.match(name)
        if match and match[3]:
            targets.add(match[1])
        elif match:
            full.add(_full_name(match[1]))
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=options.dropout,
        target_modules=[name for name, _ in model.named_modules() if name in targets],
        modules_to_save=sorted(full) or None,
        use_rslora=options.rslora,
        use_dora=options.dora,
        bias="none",
    )
    model.name_or_path = str(base_path)  # peft writes it into the adapter's config
    peft_model = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    assert isinstance(peft_model, PeftModel)
    if weights:
        _load_adapter(peft_model, weights, adapter)
    for name, parameter in peft_model.named_parameters():
        if stage == "stage1" and AUDIO_PARAMETER.search(name):
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # float32 masters of all that trains
    return peft_model


def _full_name(name: str) -> str:
    """The name in `modules_to_save` that a fully trained weight belongs to."""
    parts = name.split(".")
    for known in ("audio_attn", "audio_tower", "audio_encoder_proj"):
        if known in parts:
            return known
    return name if name in (TEXT_HEAD, AUDIO_HEAD) else parts[-1]


def _load_adapter(peft_model: PeftModel, weights: dict[str, torch.Tensor], adapter: Path | None) -> None:
    """Set an earlier adapter's weights; modules that join in this stage keep their own."""
    own = get_peft_model_state_dict(peft_model)  # peft insists on weights for every module trained in full
    try:
        result = set_peft_model_state_dict(peft_model, own | weights)
    except RuntimeError as error:
        raise UserError(f"the adapter does not fit: {error}", where=adapter) from error
    if result.unexpected_keys:
        got = result.unexpected_keys
        raise UserError("the adapter has weights for no module of this model", where=adapter, got=got)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def describe_trainable(parameters: dict[str, nn.Parameter]) -> list[str]:
    """The trainable parameters for people: a line for each kind of tensor, with `*` for the number of its layer."""
    kinds: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for name, value in parameters.items():
        kind = re.sub(r"\.\d+\.", ".*.", name.removeprefix("base_model.model."))
        kinds.setdefault((kind, tuple(value.shape)), []).append(value.numel())
    return [f"  {name:<60} {list(shape)!s:>16} x{len(n):<4} {sum(n):>13,}" for (name, shape), n in kinds.items()]


def parameter_group(name: str) -> str:
    """lora, head or new: parameters with learning rates of their own."""
    if ".lora_" in name:
        return "lora"
    return "head" if "lm_head" in name or "embeddings" in name else "new"


@contextmanager
def base_only(peft_model: nn.Module) -> Iterator[None]:
    """Run the base model alone: adapters and fully trained modules are set aside within the block."""
    if not isinstance(peft_model, PeftModel):
        yield
        return
    flags = {name: parameter.requires_grad for name, parameter in peft_model.named_parameters()}
    try:
        with peft_model.disable_adapter():
            yield
    finally:  # peft turns all of an adapter's parameters on
        for name, parameter in peft_model.named_parameters():
            parameter.requires_grad_(flags[name])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout within the block."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
