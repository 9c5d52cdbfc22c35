"""Reading a LoRA adapter in PEFT's format: every tensor of the file lands in the model, or the adapter is refused.

In: a folder with adapter_config.json and adapter_model.safetensors, from this trainer or another one. Out: an
`Adapter`, and a `PeftModel` with it. Guarantees (test_adapters.py): the loaded model is the one that PEFT's own loader
gives; missing and unexpected tensors, and options that cannot be honoured, are errors that name them.

Tensor names may lack or repeat PEFT's prefix, keep the adapter's name, or be those of transformers' native class.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from higgs_tune.preprocess.checkpoints.native import boson_weight_name
from higgs_tune.preprocess.checkpoints.weights import read_header
from higgs_tune.shards.errors import UserError, few, first_line
from higgs_tune.train.model.load import HiggsAudioModel
from higgs_tune.train.model.module_names import PREFIX, from_native, names_in_native
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import nn

ADAPTER_FILE, CONFIG_FILE, PICKLE = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
_OTHER_PREFIXES = ("module.", "_orig_mod.", PREFIX)  # of DDP, of torch.compile, of PEFT once more
_LORA_PART = re.compile(r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)\b")
# options of LoRA that give the same model, whatever their value, once the tensors are there
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "fan_in_fan_out", "inference_mode",
    "loftq_config", "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
}  # fmt: skip
_HONOURED = {
    "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "lora_alpha", "modules_to_save", "r", "rank_pattern", "target_modules", "use_dora", "use_rslora",
}  # fmt: skip
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # those that leave the base's weights alone


@dataclass(frozen=True)
class Adapter:
    """config: adapter_config.json. weights: by PEFT's names on boson's class. native: stored by the native's."""

    folder: Path
    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    native: bool = False

    def peft_config(self, **changes: Any) -> LoraConfig:
        """PEFT's own object of the config.

        Raises:
            UserError: PEFT does not take it.
        """
        known = {item.name for item in fields(LoraConfig)}
        values = {name: value for name, value in self.config.items() if name in known} | changes
        try:
            return LoraConfig(**values | {"inference_mode": False, "peft_type": None})
        except (TypeError, ValueError) as error:
            raise UserError(f"PEFT refuses the adapter's config: {first_line(error)}", where=self.folder) from error

    def adapted_modules(self, model: nn.Module) -> list[str]:
        """Names of the modules that the config adapts, as PEFT matches them, in the model's order."""
        return self._match(model)[0]

    def _match(self, model: nn.Module) -> tuple[list[str], bool]:
        """The modules that the config adapts, and whether it is told in names of transformers' native class."""
        config = self.peft_config()
        leaves = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
        plain = [name for name in leaves if check_target_module_exists(config, name)]
        if plain and not self.native:
            return plain, False
        if not any(".audio_tower." in name for name in self.weights):  # the native class has none
            leaves = [name for name in leaves if not name.startswith("audio_tower.")]
        native = names_in_native(config, leaves)
        return (native, True) if native else (plain, False)

    def config_for(self, model: nn.Module) -> LoraConfig:
        """PEFT's object of the config; made on transformers' native class, it is told in boson's names.

        Raises:
            UserError: PEFT does not take it.
        """
        config, (names, is_native) = self.peft_config(), self._match(model)
        if not is_native:
            return config
        return self.peft_config(**from_native(config, names, [name for name, _ in model.named_modules()]))

    @property
    def has_audio_attention(self) -> bool:
        """Whether it holds audio self-attention, which the released checkpoint lacks."""
        return any(".audio_attn." in name for name in self.weights)

    @property
    def has_last_norm(self) -> bool:
        """Whether it holds the norm before the heads, see `wrap_last_norm`."""
        return f"{PREFIX}norm.weight" in self.weights


def read_adapter_config(folder: Path) -> dict[str, Any] | None:
    """The adapter_config.json of a folder; None where the folder holds no adapter.

    Raises:
        UserError: it is not JSON, not LoRA's, or has options that cannot be honoured.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"the adapter's config is not JSON: {error}", where=file) from error
    kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
    if kind != "LORA":
        raise UserError("not a LoRA adapter", where=file, expected="peft_type LORA", got=kind)
    known = {item.name for item in fields(LoraConfig)}
    refused = [name for name in sorted(known & config.keys() - _NEUTRAL - _HONOURED) if config[name]]
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        refused.append("init_lora_weights")
    if refused:
        got = ", ".join(f"{name}: {config[name]!r:.60}" for name in refused)
        raise UserError("the adapter uses options of PEFT that are not supported", where=file, expected="none of them",
                        got=got, hint="Merge it into its base with PEFT, and take the result as the base.")  # fmt: skip
    unknown = [name for name in sorted(config.keys() - known) if config[name]]
    if unknown:
        _warn_once(f"warning: {file}: this PEFT does not know {', '.join(unknown)}, and ignores it")
    return {"r": 8, "lora_alpha": 8} | config  # PEFT's own defaults


@cache
def _warn_once(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def read_adapter(folder: Path) -> Adapter:
    """An adapter, with its tensors by PEFT's names on boson's class.

    Raises:
        UserError: there is none, it is a pickle, damaged, or has options that cannot be honoured.
    """
    config, file = _config_and_file(folder)
    try:
        stored = load_file(file)
    except Exception as error:  # safetensors raises its own kind, and OSError
        raise UserError(f"cannot read the adapter: {first_line(error)}", where=file) from error
    return _adapter(folder, config, stored)


def read_adapter_header(folder: Path) -> Adapter:
    """An adapter whose tensors are on meta: names and shapes, without their values.

    Raises:
        UserError: as `read_adapter`.
    """
    config, file = _config_and_file(folder)
    stored = {name: torch.empty(entry["shape"], device="meta") for name, entry in read_header(file).items()}
    return _adapter(folder, config, stored)


def _config_and_file(folder: Path) -> tuple[dict[str, Any], Path]:
    config, file = read_adapter_config(folder), folder / ADAPTER_FILE
    if config is None:
        raise UserError("no adapter here", where=folder, expected=CONFIG_FILE)
    if not file.exists() and (folder / PICKLE).exists():
        hint = (
            f"python -c \"import torch, safetensors.torch as s; s.save_file(torch.load('{PICKLE}', "
            f"weights_only=True), '{ADAPTER_FILE}')\" converts it, in its folder."
        )
        raise UserError("pickles are not read", where=folder / PICKLE, expected=ADAPTER_FILE, hint=hint)
    if not file.is_file():
        raise UserError("cannot read the adapter: no such file", where=file)
    return config, file


def _adapter(folder: Path, config: dict[str, Any], stored: dict[str, torch.Tensor]) -> Adapter:
    weights: dict[str, torch.Tensor] = {}
    for name, value in stored.items():
        known = tensor_name(name)
        if known in weights:
            got = f"{name} for {known}"
            raise UserError("two tensors of the adapter have one meaning", where=folder / ADAPTER_FILE, got=got)
        weights[known] = value
    native = any(PREFIX + _bare(name) != tensor_name(name) for name in stored)
    return Adapter(folder, config, weights, native)


def _bare(stored: str) -> str:
    """A stored tensor's name without prefixes and the adapter's name."""
    name = stored
    while prefix := next((prefix for prefix in _OTHER_PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    name = re.sub(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)\.default\b", r".\1", name)
    return re.sub(r"\.modules_to_save\.default\b", "", name)


def tensor_name(stored: str) -> str:
    """PEFT's name, on boson's class, of a stored tensor."""
    return PREFIX + boson_weight_name(_bare(stored))


def module_of(tensor: str) -> str:
    """The adapted module that a tensor of LoRA belongs to; of another tensor, the module that holds it."""
    name = tensor.removeprefix(PREFIX)
    part = _LORA_PART.search(name)
    return name[: part.start()] if part else name.rpartition(".")[0]


def inject(model: HiggsAudioModel, config: LoraConfig, where: Path | None, *, last_norm: bool = False) -> PeftModel:
    """PEFT's modules in a model, with new weights.

    Args:
        last_norm: the norm before the heads trains in full.

    Raises:
        UserError: PEFT finds nothing to adapt, or cannot adapt it.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of classes that PEFT has no table for
            peft_model = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"PEFT cannot adapt the model: {first_line(error)}", where=where) from error
    assert isinstance(peft_model, PeftModel)
    if last_norm:
        wrap_last_norm(model)
    return peft_model


def wrap_last_norm(model: HiggsAudioModel) -> None:
    """Train the norm before the heads in full, as `modules_to_save` trains others.

    PEFT matches the ends of names there, and every norm's name ends in `norm`, so no entry means this one alone. It is
    stored as its weight, which plain PEFT loads into the model itself.
    """
    if isinstance(model.norm, ModulesToSaveWrapper):  # by an adapter of another trainer, with all norms
        return
    wrapper = ModulesToSaveWrapper(model.norm, "default")
    wrapper.set_adapter("default")
    setattr(model, "norm", wrapper)  # noqa: B010  (boson's class declares another type)


def adapter_state(peft_model: PeftModel) -> dict[str, torch.Tensor]:
    """The tensors of a model's adapter, by the names that PEFT saves them under."""
    return get_peft_model_state_dict(peft_model, save_embedding_layers=False)  # it would ask the Hub


def load_weights(peft_model: PeftModel, adapter: Adapter, expected: Iterable[str]) -> None:
    """Set an adapter's tensors; what else the model's adapter has keeps its values.

    Args:
        expected: names of the tensors that the adapter must hold, no more and no less.

    Raises:
        UserError: tensors are missing, unexpected, or of other shapes.
    """
    own = adapter_state(peft_model)
    check_tensors(adapter, own, expected)
    set_peft_model_state_dict(peft_model, own | adapter.weights)


def check_tensors(adapter: Adapter, own: dict[str, torch.Tensor], expected: Iterable[str] | None = None) -> None:
    """Compare an adapter's tensors with those of a model's adapter.

    Args:
        own: the model's. expected: names that the adapter must hold, no more and no less; all of `own` by default.

    Raises:
        UserError: tensors are missing, unexpected, or of other shapes.
    """
    wanted, file = set(own if expected is None else expected), adapter.folder / ADAPTER_FILE
    missing, unexpected = sorted(wanted - adapter.weights.keys()), sorted(adapter.weights.keys() - wanted)
    if missing or unexpected:
        parts = [
            f"{len(names)} {kind} ({few(names)})" for kind, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]  # fmt: skip
        hint = "Is it whole, and made for this model?"
        raise UserError(f"the adapter's tensors do not fit its config and the model: {'; '.join(parts)}", where=file,
                        expected=f"{len(wanted)} tensors", got=len(adapter.weights), hint=hint)  # fmt: skip
    shapes = [
        f"{name}: expected {list(own[name].shape)}, got {list(value.shape)}"
        for name, value in adapter.weights.items()
        if own[name].shape != value.shape
    ]
    if shapes:
        raise UserError(f"the adapter's tensors have other shapes: {few(shapes)}", where=file)


def apply_adapter(model: HiggsAudioModel, adapter: Adapter) -> PeftModel:
    """The model with its adapter, as `PeftModel.from_pretrained` gives it; but nothing may be missing.

    Raises:
        UserError: the adapter does not fit.
    """
    peft_model = inject(model, adapter.config_for(model), adapter.folder, last_norm=adapter.has_last_norm)
    load_weights(peft_model, adapter, adapter_state(peft_model))
    return peft_model


def merge_adapter(model: HiggsAudioModel, adapter: Adapter) -> None:
    """Merge an adapter into the model's weights, in place, by PEFT; all of them are frozen then.

    Raises:
        UserError: the adapter does not fit.
    """
    apply_adapter(model, adapter).merge_and_unload()  # pyright: ignore[reportCallIssue]
    model.requires_grad_(False).eval()
