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
from pathlib import Path

from higgs_tune.shards.errors import UserError, few
from higgs_tune.train.model.adapter import (
    PREFIX,
    Adapter,
    adapter_state,
    inject,
    load_weights,
    module_of,
    read_adapter,
)
from higgs_tune.train.model.load import HiggsAudioModel
from higgs_tune.train.model.module_names import exact_pattern
from higgs_tune.train.model.trainable import AUDIO_PARAMETER, Stage, TrainableOptions
from higgs_tune.train.presets import PRESETS
from peft import LoraConfig, PeftModel
from torch import nn


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
    full, extra = options.full_modules(stage), options.extra_modules(linear_layers, stage)
    names = [name for name in linear_layers if pattern.fullmatch(name) and not _is_within(name, full)]
    if stage == "stage1":
        names = [name for name in names if not AUDIO_PARAMETER.search(name)]
    flag = f"--lora_target_modules {options.pattern}" if options.pattern else f"--lora_preset {options.preset}"
    if not names:
        raise UserError(f"{flag} leaves nothing to train in {stage}", expected="a linear layer", got=text)
    if idle := [name for name in names if not options.reaches(name)]:
        hint = "The Whisper tower trains with mel features, its projector with mel or encoder, the text head with text."
        raise UserError(f"{flag} names layers that no loss of this run reaches", got=few(idle), hint=hint)
    return [name for name in linear_layers if name in {*names, *extra}]


def _is_within(module: str, saved: Iterable[str]) -> bool:
    """Whether PEFT's `modules_to_save` (ends of names, PEFT's prefix among them) hold a module, or one around it."""
    parts = module.split(".")
    around = [PREFIX + ".".join(parts[:count]) for count in range(1, len(parts) + 1)]
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
    told = earlier.config_for(model) if earlier else None
    saved = list(told.modules_to_save or ()) if told else []
    full |= set(saved)
    names = {name for name in (*targets, *continued) if not _is_within(name, full)}
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=options.dropout,
        target_modules=exact_pattern(name for name, _ in model.named_modules() if name in names),
        modules_to_save=sorted(full) or None,
        rank_pattern=(told.rank_pattern if told else None) or {},
        alpha_pattern=(told.alpha_pattern if told else None) or {},
        use_rslora=options.rslora,
        use_dora=options.dora,
        bias="none",
    )
    model.name_or_path = str(base)  # peft writes it into the adapter's config
    has_last_norm = bool(earlier and earlier.has_last_norm)
    peft_model = inject(model, config, adapter, last_norm=options.norms or has_last_norm)
    if earlier:
        saved += ["model.norm"] if has_last_norm else []
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
    width = max((len(name) for name, _ in kinds), default=0)
    return [f"  {name:<{width}} {list(shape)!s:>16} x{len(n):<4} {sum(n):>13,}" for (name, shape), n in kinds.items()]


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
