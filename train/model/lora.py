"""LoRA by preset and stage, and modules trained in full.

In: boson's model, a `TrainableOptions`, a stage, perhaps an adapter to continue. Out: a `PeftModel` whose only
trainable parameters are those of the stage. Guarantees (test_lora.py, test_adapters.py): LoRA is on the wanted modules
and no others; each of them trains, or is refused by name.

Methods: LoRA (https://arxiv.org/abs/2106.09685), rsLoRA (https://arxiv.org/abs/2312.03732) and DoRA
(https://arxiv.org/abs/2402.09353) as PEFT writes them, so an adapter trained here loads on `HiggsAudioModel` with plain
PEFT. Modules trained in full are PEFT's `modules_to_save`, in the same file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from higgs_tune.shards.errors import UserError, few
from higgs_tune.train.model.adapter import (
    Adapter,
    adapter_state,
    exact_pattern,
    inject,
    load_weights,
    module_of,
    read_adapter,
)
from higgs_tune.train.model.load import HiggsAudioModel
from higgs_tune.train.presets import PRESETS
from peft import LoraConfig, PeftModel
from torch import nn

Stage = Literal["stage1", "stage2", "single"]

# every parameter that only audio positions use; stage 1 keeps all of them as they are
AUDIO_PARAMETER = re.compile(
    r"(^|\.)(audio_mlp|audio_attn|audio_input_layernorm|audio_post_attention_layernorm|audio_post_audio_attn_layer_norm"
    r"|audio_codebook_embeddings|audio_out_embed_projector|audio_lm_head|audio_tower|audio_encoder_proj)(\.|$)"
)
TEXT_HEAD, AUDIO_HEAD = "audio_decoder_proj.text_lm_head", "audio_decoder_proj.audio_lm_head"
AUDIO_ATTENTION = ("audio_attn", "audio_post_audio_attn_layer_norm")


@dataclass(frozen=True)
class TrainableOptions:
    """Which modules train, by LoRA or in full.

    Attributes:
        r, alpha, dropout: rank of LoRA, its scaling (alpha / r), dropout of its input.
        preset: which linear layers get LoRA; or `pattern`, a regular expression over module names.
        rslora, dora: variants of LoRA.
        heads, audio_embeddings, audio_attention, audio_tower, audio_encoder_proj: trained in full.
        text_loss: whether the run has a text loss. features: its Whisper features: none, mel or encoder.
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
    text_loss: bool = True
    features: str = "none"

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
        heads = [TEXT_HEAD] if stage == "stage1" else [TEXT_HEAD, AUDIO_HEAD]
        wanted_heads = [head for head in heads if self.heads and self.reaches(head)]
        return wanted_heads + [name for wanted, names in audio.values() if wanted for name in names]

    def reaches(self, module: str) -> bool:
        """Whether a loss of the run depends on a module. Stored encoder features bypass the Whisper tower."""
        if module.startswith("audio_tower"):
            return self.features == "mel"
        if module.startswith("audio_encoder_proj"):
            return self.features != "none"
        return self.text_loss or not module.startswith(TEXT_HEAD)


def target_modules(model: nn.Module, options: TrainableOptions, stage: Stage) -> list[str]:
    """Names of the linear layers that get LoRA, in model order; those trained in full are left out.

    Raises:
        UserError: the preset or the pattern leaves nothing to train in this stage, names a layer that no loss reaches,
            or is no regular expression.
    """
    try:
        text = options.pattern or PRESETS[options.preset].pattern
        pattern = re.compile(text)
    except re.error as error:
        raise UserError(f"--lora_target_modules is not a regular expression: {error}", got=options.pattern) from error
    linear_layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    full = options.full_modules(stage)
    names = [name for name in linear_layers if pattern.fullmatch(name) and not _is_within(name, full)]
    if stage == "stage1":
        names = [name for name in names if not AUDIO_PARAMETER.search(name)]
    flag = f"--lora_target_modules {options.pattern}" if options.pattern else f"--lora_preset {options.preset}"
    if not names:
        raise UserError(f"{flag} leaves nothing to train in {stage}", expected="a linear layer", got=text)
    if idle := [name for name in names if not options.reaches(name)]:
        hint = "The Whisper tower trains with mel features, its projector with mel or encoder, the text head with text."
        raise UserError(f"{flag} names layers that no loss of this run reaches", got=few(idle), hint=hint)
    return names


def _is_within(module: str, saved: Iterable[str]) -> bool:
    """Whether PEFT's `modules_to_save` (last parts of names) hold a module, or one around it."""
    parts = module.split(".")
    around = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(name.endswith(last) for last in saved for name in around)


def add_lora(
    model: HiggsAudioModel, options: TrainableOptions, stage: Stage, base: str | Path, adapter: Path | None
) -> PeftModel:
    """Inject LoRA for a stage; continue the adapter's modules, if one is given.

    Args:
        base: the base checkpoint, named in the adapter's config.
        adapter: folder of an earlier stage's adapter; its modules continue, those of this stage join. Modules that no
            loss of this run reaches, and the Whisper tower unless it is targeted, stay as they are.

    Raises:
        UserError: the adapter's rank or modules do not fit.
    """
    targets, full = target_modules(model, options, stage), set(options.full_modules(stage))
    earlier = read_adapter(adapter) if adapter else None
    continued = _continued_modules(earlier, model, full) if earlier else []
    if earlier:
        full |= set(earlier.config.get("modules_to_save") or ())
    names = {name for name in (*targets, *continued) if not _is_within(name, full)}
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=options.dropout,
        target_modules=exact_pattern(name for name, _ in model.named_modules() if name in names),
        modules_to_save=sorted(full) or None,
        rank_pattern=(earlier.config.get("rank_pattern") if earlier else None) or {},
        alpha_pattern=(earlier.config.get("alpha_pattern") if earlier else None) or {},
        use_rslora=options.rslora,
        use_dora=options.dora,
        bias="none",
    )
    model.name_or_path = str(base)  # peft writes it into the adapter's config
    peft_model = inject(model, config, adapter)
    if earlier:
        saved = earlier.config.get("modules_to_save") or ()
        own = [(name, module_of(name)) for name in adapter_state(peft_model)]
        load_weights(peft_model, earlier, [n for n, module in own if module in continued or _is_within(module, saved)])
    _freeze_and_cast(peft_model, options, stage, set(targets))
    return peft_model


def _continued_modules(earlier: Adapter, model: nn.Module, full: Iterable[str]) -> list[str]:
    """The modules that an earlier adapter adapts by LoRA.

    Raises:
        UserError: it adapts what this trainer cannot train on.
    """
    names = earlier.adapted_modules(model)
    other = [name for name in names if not isinstance(model.get_submodule(name), nn.Linear)]
    if other:
        raise UserError("only LoRA on linear layers can be trained on", where=earlier.folder, got=few(other))
    if twice := [name for name in names if _is_within(name, full)]:
        hint = "Leave out the option that trains them in full, or merge the adapter first (higgs-export)."
        raise UserError("the adapter has LoRA on modules that this run trains in full", where=earlier.folder,
                        got=few(twice), hint=hint)  # fmt: skip
    biases = [name for name in earlier.weights if name.endswith(".bias") and ".lora_" not in name]
    if earlier.config.get("bias", "none") != "none" and biases:
        hint = "Merge it first (higgs-export)."
        raise UserError("an adapter that trains biases cannot be trained on", where=earlier.folder,
                        expected="bias: none", got=earlier.config["bias"], hint=hint)  # fmt: skip
    return names


def _freeze_and_cast(peft_model: PeftModel, options: TrainableOptions, stage: Stage, targets: set[str]) -> None:
    """Freeze what the stage freezes or no loss reaches; make all that trains float32 masters."""
    for name, parameter in peft_model.named_parameters():
        module = module_of(name)
        frozen = stage == "stage1" and AUDIO_PARAMETER.search(name)
        frozen = frozen or not options.reaches(module)
        frozen = frozen or (".lora_" in name and module.startswith("audio_tower.") and module not in targets)
        if frozen:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


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
