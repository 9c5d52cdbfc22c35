"""Where each weight of the exported checkpoint comes from: the base, the adapter, or both.

In: a base checkpoint in either layout, and perhaps an adapter. Out: the config of the result, and a `Source` for each
of its weights under Boson's names. Only headers and LoRA's small matrices are read here. The structure is that of the
model itself, built on meta with PEFT's modules in it, so whatever the trainer trains is exported.
Guarantees (test_export.py, test_handover.py): every tensor of base and adapter is used, or the export is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from higgs_tune.preprocess.audio.whisper import tower_weights
from higgs_tune.preprocess.checkpoints.native import NOT_WEIGHTS, boson_weight_name
from higgs_tune.preprocess.checkpoints.weights import weight_files
from higgs_tune.shards.errors import UserError, few
from higgs_tune.train.export.lora import MergedWeight
from higgs_tune.train.export.tensors import Cast, Held, Source, Stored, Zeros, chunks, stored_tensors
from higgs_tune.train.model.adapter import (
    ADAPTER_FILE,
    PREFIX,
    Adapter,
    adapter_state,
    check_tensors,
    inject,
    read_adapter_header,
    tensor_name,
)
from higgs_tune.train.model.load import (
    TEXT_HEAD_WEIGHT,
    HiggsAudioConfig,
    HiggsAudioModel,
    identity_attention,
    load_config,
)
from higgs_tune.train.model.whisper_tower import WhisperTower
from peft import PeftModel
from peft.tuners.lora import Embedding, Linear, LoraLayer


@dataclass(frozen=True)
class AdapterOnMeta:
    """An adapter whose tensors have not been read: its PEFT model on meta, and where its tensors are stored.

    Attributes:
        adapter: with tensors on meta. model: with PEFT's modules. stored: by PEFT's names on boson's class.
    """

    adapter: Adapter
    model: PeftModel
    stored: dict[str, Stored]

    def lora_layers(self) -> dict[str, LoraLayer]:
        """The layers with LoRA, by their names in boson's class."""
        modules = self.model.get_base_model().named_modules()
        return {name: module for name, module in modules if isinstance(module, LoraLayer)}

    def saved_weights(self) -> dict[str, Stored]:
        """The tensors that stand in place of the base's, by the base's names."""
        full = {name: tensor for name, tensor in self.stored.items() if ".lora_" not in name}
        return {name.removeprefix(PREFIX).replace(".base_layer.", "."): tensor for name, tensor in full.items()}

    def full_modules(self) -> list[str]:
        """Names of the modules whose weights it holds in full."""
        return sorted({name.rpartition(".")[0] for name in self.saved_weights()})


@dataclass(frozen=True)
class Start:
    """What an export begins with: a base checkpoint, perhaps an adapter, and the Whisper tower that was attached."""

    base: Path
    adapter: Path | None = None
    tower: WhisperTower | None = None

    def config(self, header: Adapter | None) -> HiggsAudioConfig:
        """The config of the base with what adapter and tower add."""
        config = load_config(self.base, self.tower.folder if self.tower else None)
        config.use_audio_out_self_attention |= bool(header and header.has_audio_attention)
        return config


@dataclass(frozen=True)
class Plan:
    """The result of an export. weights: by Boson's names, in the base's order."""

    config: HiggsAudioConfig
    weights: dict[str, Source]


def plan_weights(start: Start) -> Plan:
    """The weights of a base checkpoint, with an adapter merged into them.

    Raises:
        UserError: base, adapter and tower cannot be used, or do not fit together; the message lists what.
    """
    header = read_adapter_header(start.adapter) if start.adapter else None
    config, stored = start.config(header), _base_tensors(start.base)
    if config.use_audio_out_self_attention and not any(".audio_attn." in name for name in stored):
        stored = _with_attention(stored, config)
    model = _on_meta(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if start.tower:
        stored = stored | _attached_tower(start.tower, shapes)
    weights = _checked(start.base, stored, shapes)
    return Plan(config, _merged(weights, _inject(model, header)) if header else weights)


def adapter_on_meta(start: Start) -> AdapterOnMeta:
    """An adapter in the model that its base's config describes.

    Raises:
        UserError: they do not fit together, or there is no adapter.
    """
    if start.adapter is None:
        raise UserError("no adapter here", where=start.base, expected="adapter_config.json")
    header = read_adapter_header(start.adapter)
    return _inject(_on_meta(start.config(header)), header)


def _attached_tower(tower: WhisperTower, shapes: dict[str, tuple[int, ...]]) -> dict[str, Source]:
    """The weights of an attached tower, and of its projector, which the adapter holds."""
    attached: dict[str, Source] = {f"audio_tower.{name}": Held(v) for name, v in tower_weights(tower.folder).items()}
    projector = {name: shape for name, shape in shapes.items() if name.startswith("audio_encoder_proj.")}
    return attached | {name: Zeros(shape, torch.float32) for name, shape in projector.items()}


def _on_meta(config: HiggsAudioConfig) -> HiggsAudioModel:
    with torch.device("meta"):
        return HiggsAudioModel(config)


def _inject(model: HiggsAudioModel, header: Adapter) -> AdapterOnMeta:
    """PEFT's modules in a model on meta, and the adapter's tensors, checked against them."""
    peft_model = inject(model, header.config_for(model), header.folder, last_norm=header.has_last_norm)
    check_tensors(header, adapter_state(peft_model))
    file = header.folder / ADAPTER_FILE
    return AdapterOnMeta(header, peft_model, {tensor_name(name): t for name, t in stored_tensors(file).items()})


def _base_tensors(base: Path) -> dict[str, Source]:
    """The tensors of a checkpoint of either layout, by Boson's names.

    Raises:
        UserError: two of them have one name.
    """
    found: dict[str, Source] = {}
    for file in weight_files(base):
        for stored, tensor in stored_tensors(file).items():
            if NOT_WEIGHTS.search(stored):
                continue
            if (name := boson_weight_name(stored)) in found:
                raise UserError(f"the checkpoint cannot be used: {stored} is a second {name}", where=file)
            found[name] = tensor
    return found


def _with_attention(stored: dict[str, Source], config: HiggsAudioConfig) -> dict[str, Source]:
    """With audio self-attention that leaves the model's function as it is; the adapter then changes it."""
    copies = identity_attention(stored, config)
    return stored | {
        name: Zeros(stored[origin].shape, stored[origin].dtype) if is_zero else stored[origin]
        for name, (origin, is_zero) in copies.items()
    }


def _checked(base: Path, stored: dict[str, Source], shapes: dict[str, tuple[int, ...]]) -> dict[str, Source]:
    """The tensors, if they are those of the model.

    Raises:
        UserError: lists missing, unexpected and wrong-shaped ones; or the text head is missing.
    """
    problems = [f"unexpected {name}" for name in stored if name not in shapes]
    problems += [
        f"{name}: expected {list(shapes[name])}, got {list(tensor.shape)}"
        for name, tensor in stored.items()
        if name in shapes and tensor.shape != shapes[name]
    ]
    problems += [f"missing {name}" for name in shapes if name not in stored and name != TEXT_HEAD_WEIGHT]
    if problems:
        raise UserError(f"the checkpoint cannot be used: {few(problems, 20)}", where=base)
    head = stored.get(TEXT_HEAD_WEIGHT)
    if head is None or not _any_nonzero(head):
        hint = "Take a base that holds it, as the released checkpoint does in both layouts."
        raise UserError("the base checkpoint has no text head, which an export needs", where=base, hint=hint)
    return stored


def _any_nonzero(source: Source) -> bool:
    """Whether a tensor is not all zeros: those were written by older exports for a head that is missing."""
    return any(bool(chunk.any()) for chunk in chunks(source))


def _merged(weights: dict[str, Source], adapter: AdapterOnMeta) -> dict[str, Source]:
    """The weights with the adapter's LoRA, and its fully trained modules in their place."""
    merged = weights | dict(adapter.saved_weights())
    for name, layer in adapter.lora_layers().items():
        weight = f"{name}.weight"
        if not isinstance(layer, Linear | Embedding):
            raise UserError("LoRA on this kind of layer cannot be exported", where=adapter.adapter.folder,
                            expected="linear layers and embeddings", got=name)  # fmt: skip
        merged[weight] = _with_lora(merged[weight], f"{PREFIX}{name}.", layer, adapter)
    return merged


def _with_lora(base: Source, prefix: str, layer: Any, adapter: AdapterOnMeta) -> Source:
    def tensor(part: str) -> torch.Tensor:
        return adapter.stored[prefix + part].whole().float()

    scaling = float(layer.scaling["default"])
    if isinstance(layer, Linear):
        merged = MergedWeight(base, tensor("lora_A.weight"), tensor("lora_B.weight"), scaling)
        dora = layer.use_dora["default"]
        return replace(merged, magnitude=tensor("lora_magnitude_vector").reshape(-1)) if dora else merged
    if layer.use_dora["default"]:
        raise UserError("DoRA on embeddings cannot be exported", where=adapter.adapter.folder,
                        hint="Merge it into its base with PEFT, and take the result as the base.")  # fmt: skip
    return MergedWeight(base, tensor("lora_embedding_B").T, tensor("lora_embedding_A").T, scaling)


def in_dtype(weights: dict[str, Source], dtype: torch.dtype | None) -> dict[str, Source]:
    """The weights in one dtype; with None, as they are."""
    return {name: Cast(w, dtype) if dtype and w.dtype != dtype else w for name, w in weights.items()}
